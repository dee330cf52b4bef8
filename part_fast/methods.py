"""The training methods by name: what training, its configuration, the command line and the benchmarks know of each.

The table holds the losses, so that it stands above losses.py, and below config.py, which reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from part_fast.losses import mart_attack, mart_objective, trades_attack, trades_objective

# A network, or what forwards through it: images (N,C,H,W) -> logits (N,classes).
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """One training method.

    help: what it is, for help texts. plain: the name of the method that warms it up, the same without pixel weights.
    objective: callable(model, x, x_adv, y, beta) -> the loss, a scalar, of images x and x_adv (N,C,H,W) that were
        attacked already, and labels y (N,). Its last forward is that of x_adv.
    attack: callable(model, x, y, epsilon, alpha, steps) -> x_adv: the method's own PGD, which starts elsewhere or
        increases something else; epsilon may be a CamBudget. None: `pgd` itself.
    weighted: whether each pixel has an eps of its own. beta: whether the loss has a robust term, which beta weighs.
    """

    help: str
    plain: str
    objective: Callable[[Forward, Tensor, Tensor, Tensor, float], Tensor]
    attack: Callable[..., Tensor] | None = None
    weighted: bool = False
    beta: bool = False


def _cross_entropy(model: Forward, x: Tensor, x_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    return F.cross_entropy(model(x_adv), y)


def _trades(model: Forward, x: Tensor, x_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    return trades_objective(model(x), model(x_adv), y, beta)


def _mart(model: Forward, x: Tensor, x_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    return mart_objective(model(x), model(x_adv), y, beta)


METHODS: dict[str, Method] = {
    "at": Method("plain adversarial training: cross-entropy of attacked images", "at", _cross_entropy),
    "part": Method("at with an eps for each pixel, the method of this package", "at", _cross_entropy, weighted=True),
    "trades": Method("accuracy plus beta times stability", "trades", _trades, trades_attack, beta=True),
    "part-t": Method("trades with an eps for each pixel", "trades", _trades, trades_attack, weighted=True, beta=True),
    "mart": Method("attacked images that are nearly wrong count more", "mart", _mart, mart_attack, beta=True),
    "part-m": Method("mart with an eps for each pixel", "mart", _mart, mart_attack, weighted=True, beta=True),
}
