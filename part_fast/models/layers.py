"""What the networks share: the 3x3 convolution, activations, the normalisation of the input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from part_fast.errors import BadValueError


def conv3x3(in_planes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name; none works in place, so that a hook on any submodule sees its true output.

    Errors: ValueError for an unknown name.
    """
    known: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu}
    if name not in known:
        raise BadValueError(f"activation takes one of {', '.join(known)}, got {name!r}")
    return known[name]


class Normalize(nn.Module):
    """(x - mean) / std per channel; its buffers stay out of `state_dict`, which then fits any checkpoint."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != 3 or not all(math.isfinite(v) for v in values):
                raise BadValueError(f"{name} takes three finite numbers, one per channel, got {values!r}")
        if min(std) <= 0:
            raise BadValueError(f"std takes three numbers > 0, got {std!r}")
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std), dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def normalization(mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Module:
    if mean is None and std is None:
        return nn.Identity()
    if mean is None or std is None:
        raise BadValueError(f"mean and std go together, got mean={mean!r}, std={std!r}")
    return Normalize(mean, std)


def check_num_classes(num_classes: int) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise BadValueError(f"num_classes takes an integer >= 1, got {num_classes!r}")
