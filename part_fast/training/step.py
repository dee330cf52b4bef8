"""One training step, in the order of this file: eps of the batch, attack, loss, update."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from part_fast.attacks.catalogue import ATTACKS
from part_fast.budgets.bank import MaskBank
from part_fast.budgets.cam import CamBudget
from part_fast.budgets.controls import control_map
from part_fast.config import TrainConfig
from part_fast.data.memory import Augmentation
from part_fast.methods import METHODS
from part_fast.training.engine import Engine


def batch_epsilon(
    method: str,
    budget: CamBudget | None,
    bank: MaskBank | None,
    indices: Tensor,
    drawn: Augmentation | None,
    config: TrainConfig,
) -> float | Tensor | CamBudget:
    """How far the pixels of a batch may move: one eps, the maps kept in the bank, or a budget yet to be asked.

    budget: only a method with weighted pixels needs one.
    """
    if not METHODS[method].weighted:
        return config.eps
    if bank is None:
        assert budget is not None
        return budget
    return control_map(bank.lookup(indices, drawn), config.mask_control, config.eps, config.eps_low)


def batch_loss(
    method: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor | CamBudget,
    config: TrainConfig,
    *,
    attack_model: nn.Module | None = None,
) -> Tensor:
    """The training loss, a scalar, of images x (N,C,H,W) in [0,1], labels y (N,); the model is left in train mode.

    epsilon: as `batch_epsilon` gives it. attack_model: what is attacked in the model's place; default: the model.
    """
    attack, training = ATTACKS[config.attack], METHODS[method]
    if attack.of_method and training.loss is not None:
        return training.loss(
            model, x, y, None, config.alpha, epsilon, config.steps, config.beta, attack_model=attack_model
        )
    eps = epsilon(x) if isinstance(epsilon, CamBudget) else epsilon
    attacked = model if attack_model is None else attack_model
    start = _start(x, config) if attack.random_start else "zero"
    x_adv = attack.run(attacked, x, y, eps, config.alpha, config.steps, start, config.seed)
    return training.objective(model, x, x_adv, y, config.beta)


def _start(x: Tensor, config: TrainConfig) -> str | Tensor:
    """Where a random attack starts: within each pixel's own eps; as published, within the whole one and not clipped."""
    return x + (2 * torch.rand_like(x) - 1) * config.eps if config.released else "uniform"


def train_step(
    engine: Engine,
    method: str,
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor | CamBudget,
    done: int = 0,
    total: int | None = None,
    epoch: int = 0,
) -> Tensor:
    """Attack, loss, backward, update; the loss, a scalar without a graph, of images x (N,C,H,W), labels y (N,).

    epsilon: as `batch_epsilon` gives it. done, total: how many of this process's images of the epoch are behind it, and
    how many there are; default: the batch is the whole epoch. epoch: counted from 0.
    """
    engine.begin(done, len(x) if total is None else total, epoch)
    with engine.collecting():
        loss = batch_loss(method, engine.trained, x, y, epsilon, engine.config, attack_model=engine.attack_model)
        engine.backward(loss, len(x))
    engine.end()
    return loss.detach()
