"""One training step: eps of the batch, attack, loss, update."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from part_fast.attacks.mma import mma
from part_fast.attacks.pgd import pgd
from part_fast.budgets.bank import MaskBank
from part_fast.budgets.cam import CamBudget
from part_fast.budgets.controls import control_map
from part_fast.config import WEIGHTED, TrainConfig
from part_fast.data.memory import Augmentation
from part_fast.losses import mart_loss, mart_objective, trades_loss, trades_objective
from part_fast.training.engine import Engine


def batch_epsilon(
    method: str,
    budget: CamBudget,
    bank: MaskBank | None,
    indices: Tensor,
    drawn: Augmentation | None,
    config: TrainConfig,
) -> float | Tensor | CamBudget:
    """How far the pixels of a batch may move: one eps, the maps kept in the bank, or a budget yet to be asked."""
    if method not in WEIGHTED:
        return config.eps
    if bank is None:
        return budget
    return control_map(bank.lookup(indices, drawn), config.mask_control, config.eps, config.eps_low)


def train_step(
    engine: Engine,
    method: str,
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor | CamBudget,
    where: tuple[int, int, int] | None = None,
) -> Tensor:
    """Attack, loss, backward, update; the loss, a scalar without a graph, of images x (N,C,H,W), labels y (N,).

    where: this process's images of the epoch done before, all of them, and the epoch, from 0; default: a whole epoch.
    """
    engine.begin(*(where or (0, len(x), 0)))
    with engine.collecting():
        loss = batch_loss(method, engine.trained, x, y, epsilon, engine.config, attack_model=engine.attack_model)
        engine.backward(loss, len(x))
    engine.end()
    return loss.detach()


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

    attack_model: what is attacked in the model's place; default: the model.
    """
    attacked = model if attack_model is None else attack_model
    trades, mart = method in ("trades", "part-t"), method in ("mart", "part-m")
    if config.attack == "pgd" and (trades or mart):
        robust_loss = trades_loss if trades else mart_loss
        return robust_loss(
            model, x, y, None, config.alpha, epsilon, config.steps, config.beta, attack_model=attack_model
        )
    eps = epsilon(x) if isinstance(epsilon, CamBudget) else epsilon
    # The published start: every pixel within the whole eps, not clipped to [0,1].
    start = x + (2 * torch.rand_like(x) - 1) * config.eps if config.released else "uniform"
    attack = mma if config.attack == "mma" else pgd
    x_adv = attack(attacked, x, y, eps, config.alpha, config.steps, start=start)
    if trades or mart:
        objective = trades_objective if trades else mart_objective
        return objective(model(x), model(x_adv), y, config.beta)
    return F.cross_entropy(model(x_adv), y)
