"""One training step, in the order of this file: eps of the batch, attack, loss, update."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from part_fast.attacks.catalogue import ATTACKS
from part_fast.budgets.bank import MaskBank
from part_fast.budgets.cam import CamBudget
from part_fast.budgets.controls import control_map
from part_fast.config import TrainConfig
from part_fast.data.memory import Augmentation
from part_fast.data.mixing import CutMix, smooth_labels
from part_fast.errors import BadValueError
from part_fast.methods import METHODS
from part_fast.ops.bank_view import BankView
from part_fast.training.engine import Engine


class Attacked(NamedTuple):
    """What an attack made of images: adversarial ones like them, and its start, where the loss compares the two."""

    x_adv: Tensor
    start: Tensor | None = None


def batch_epsilon(
    method: str,
    budget: CamBudget | None,
    bank: MaskBank | None,
    indices: Tensor,
    drawn: Augmentation | None,
    config: TrainConfig,
    cutmix: CutMix | None = None,
) -> float | Tensor | CamBudget:
    """How far the pixels of a batch may move: one eps, the maps kept in the bank, or a budget yet to be asked.

    budget: only a method with weighted pixels needs one. drawn, cutmix: what was done to the images, and is to their
    kept maps.
    """
    if not METHODS[method].weighted:
        return config.eps
    if bank is None:
        assert budget is not None
        return budget
    maps = bank.lookup(indices, drawn)
    maps = maps if cutmix is None else cutmix.images(maps)
    return control_map(maps, config.mask_control, config.eps, config.eps_low)


def batch_attack(
    method: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor | CamBudget,
    config: TrainConfig,
    view: BankView | None = None,
) -> Attacked:
    """Adversarial images like x (N,C,H,W), in [0,1], of labels y (N,); `model` is what is attacked.

    epsilon: as `batch_epsilon` gives it. view: the batch's places in a PerturbationBank, for an attack that remembers.
    """
    attack, own = ATTACKS[config.attack], METHODS[method].attack
    if attack.of_method and own is not None:
        return Attacked(own(model, x, y, epsilon, config.alpha, config.steps))
    eps = epsilon(x) if isinstance(epsilon, CamBudget) else epsilon
    start: str | Tensor | BankView = "zero"
    begin = None
    if attack.remembers:
        if view is None:
            raise BadValueError(f"view must be of a PerturbationBank for attack {config.attack}, got None")
        start = view
        if attack.regularised and config.pgi_lambda > 0:
            begin = view.start(x, eps)  # which the attack overwrites
    elif attack.random_start:
        start = _start(x, method, config, attack.released_clip)
    return Attacked(attack.run(model, x, y, eps, config.alpha, config.steps, start, config.seed), begin)


class Loss(NamedTuple):
    """The training loss of a batch, a scalar, and the logits (N,classes) of its adversarial images."""

    loss: Tensor
    logits: Tensor


def batch_loss(method: str, model: nn.Module, x: Tensor, attacked: Attacked, y: Tensor, config: TrainConfig) -> Loss:
    """The loss of images x (N,C,H,W), what an attack made of them, labels y, and a model in train mode.

    y: class indices (N,) or probabilities (N,classes).
    Where the attack gives its start, the loss also gets the mean squared difference of its logits there and of those
    of the adversarial images, times `pgi_lambda`; gradients flow through both.
    """
    logits: list[Tensor] = []

    def forward(images: Tensor) -> Tensor:
        logits.append(model(images))
        return logits[-1]

    if attacked.start is not None:
        forward(attacked.start)
    loss = METHODS[method].objective(forward, x, attacked.x_adv, y, config.beta)  # which ends with x_adv
    if attacked.start is not None:
        loss = loss + config.pgi_lambda * F.mse_loss(logits[-1].float(), logits[0].float())
    return Loss(loss, logits[-1])


def _start(x: Tensor, method: str, config: TrainConfig, clip: tuple[float, float] | None) -> str | Tensor:
    """Where a random attack starts: within each pixel's own eps.

    The released code's attacks with a map start within the whole eps instead. clip: of this start, None if it has no
    such attack.
    """
    if not (config.released and METHODS[method].weighted and clip is not None):
        return "uniform"
    return (x + (2 * torch.rand_like(x) - 1) * config.eps).clamp(*clip)


def train_step(
    engine: Engine,
    method: str,
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor | CamBudget,
    done: int = 0,
    total: int | None = None,
    epoch: int = 0,
    view: BankView | None = None,
) -> Loss:
    """Attack, loss, backward, update; the loss, without a graph, of images x (N,C,H,W), labels y.

    y: class indices (N,), or probabilities (N,classes), as CutMix makes them. The attack is given y, and the loss what
        label smoothing makes of it: with smoothed labels the attack would also gain by what makes unlikely classes
        unlikelier.
    epsilon: as `batch_epsilon` gives it. done, total: how many of this process's images of the epoch are behind it, and
    how many there are; default: the batch is the whole epoch. epoch: counted from 0. view: as in `batch_attack`.
    """
    engine.begin(done, len(x) if total is None else total, epoch)
    smoothing = engine.config.label_smoothing
    with engine.collecting():
        attacked = batch_attack(method, engine.attack_model, x, y, epsilon, engine.config, view)
        target = smooth_labels(y, engine.classes, smoothing) if smoothing else y

        def loss(x: Tensor, y: Tensor, *attacked: Tensor) -> Loss:
            return batch_loss(method, engine.trained, x, Attacked(*attacked), y, engine.config)

        batch = (x, target, *(images for images in attacked if images is not None))
        with engine.perturbed(lambda: batch_loss(method, engine.model, x, attacked, target, engine.config).loss, epoch):
            found = Loss(*engine.learn(method, loss, *batch))
        engine.measure(attacked.x_adv)
    engine.end()
    return found
