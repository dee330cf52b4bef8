"""What the networks share: the 3x3 convolution, the normalisation of the input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from part_fast.attack_model.cpu.packed_conv import PackedConv2d
from part_fast.errors import BadValueError


def conv3x3(in_planes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)


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


def _fused(
    conv: nn.Conv2d, bn: nn.Module | None, x: Tensor, other: Tensor | None = None, *, relu: bool = True
) -> Tensor:
    """relu(bn(conv(x)) + other); one pass in an AttackModel that has folded the BatchNorm and packed the weights."""
    if _packed(conv, bn):
        return conv.with_relu(x, other, relu=relu)
    out: Tensor = conv(x) if bn is None else bn(conv(x))
    out = out if other is None else out + other
    return F.relu(out) if relu else out


def _cast(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """x as a packed convolution takes it: cast once for all branches, whose gradients are summed before the cast."""
    return conv.cast(x) if isinstance(conv, PackedConv2d) else x


def _packed(conv: nn.Conv2d, bn: nn.Module | None) -> TypeGuard[PackedConv2d]:
    """Whether the convolution is packed, the BatchNorm folded, and nobody else is to see what is between them."""
    return isinstance(conv, PackedConv2d) and isinstance(bn, nn.Identity | None) and not (_hooked(conv) or _hooked(bn))


def _hooked(module: nn.Module | None) -> bool:
    """Whether somebody must see the module's own input, output or gradients."""
    return module is not None and any(
        (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    )


def normalization(mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Module:
    if mean is None and std is None:
        return nn.Identity()
    if mean is None or std is None:
        raise BadValueError(f"mean and std go together, got mean={mean!r}, std={std!r}")
    return Normalize(mean, std)


def check_num_classes(num_classes: int) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise BadValueError(f"num_classes takes an integer >= 1, got {num_classes!r}")
