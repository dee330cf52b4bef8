"""WideResNet, under the parameter names of the published checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from part_fast.errors import BadValueError
from part_fast.models.layers import activation_of, check_num_classes, conv3x3, normalization


class _WideBlock(nn.Module):
    def __init__(
        self, in_planes: int, planes: int, stride: int, activation: Callable[[Tensor], Tensor], pads_end: bool
    ) -> None:
        super().__init__()
        self.activation = activation
        self.pads_end = pads_end and stride == 2
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=0 if self.pads_end else 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.convShortcut = None if in_planes == planes else nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(x))
        # Where the shape changes, the shortcut too starts after the activation.
        shortcut: Tensor = x if self.convShortcut is None else self.convShortcut(out)
        if self.pads_end:  # of an odd number of pixels the first side too
            out = F.pad(out, (out.shape[3] % 2, 1, out.shape[2] % 2, 1))
        residual: Tensor = self.conv2(self.activation(self.bn2(self.conv1(out))))
        return residual + shortcut


class _WideStage(nn.Module):
    def __init__(
        self,
        blocks: int,
        in_planes: int,
        planes: int,
        stride: int,
        activation: Callable[[Tensor], Tensor],
        pads_end: bool,
    ) -> None:
        super().__init__()
        rest = [(planes, planes, 1)] * (blocks - 1)
        shapes = [(in_planes, planes, stride), *rest]
        self.layer = nn.Sequential(*(_WideBlock(*shape, activation, pads_end) for shape in shapes))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """Pre-activation wide residual network, without dropout; `wideresnet` builds it and documents it."""

    def __init__(
        self,
        depth: int = 34,
        widen_factor: int = 10,
        num_classes: int = 10,
        *,
        activation: str = "relu",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 10 or (depth - 4) % 6:
            raise BadValueError(f"depth takes 6n + 4 with n >= 1 (10, 16, 22, 28, 34, ...), got {depth!r}")
        if isinstance(widen_factor, bool) or not isinstance(widen_factor, int) or widen_factor < 1:
            raise BadValueError(f"widen_factor takes an integer >= 1, got {widen_factor!r}")
        check_num_classes(num_classes)
        self.num_classes, self.activation = num_classes, activation
        self._activate, pads_end = activation_of(activation), activation == "silu"
        self.normalize = normalization(mean, std)
        blocks = (depth - 4) // 6
        widths = [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = conv3x3(3, 16)
        self.block1 = _WideStage(blocks, 16, widths[0], 1, self._activate, pads_end)
        self.block2 = _WideStage(blocks, widths[0], widths[1], 2, self._activate, pads_end)
        self.block3 = _WideStage(blocks, widths[1], widths[2], 2, self._activate, pads_end)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(self.normalize(x)))))
        out = self._activate(self.bn1(out))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def wideresnet(
    depth: int = 34,
    widen_factor: int = 10,
    num_classes: int = 10,
    *,
    activation: str = "relu",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> WideResNet:
    """WRN-depth-widen_factor as used in adversarial training; WRN-34-10 has 46,160,474 parameters for 10 classes.

    Images (N,3,H,W) in [0,1] -> logits (N,num_classes); the map at `block3` is H/4 x W/4. `mean` and `std`, three
    numbers each, normalise inside the model and add no `state_dict` key. Keys are those of the usual checkpoints:
    `block1.layer.0.bn1.weight`, `block1.layer.0.convShortcut.weight`, `bn1.weight`, `fc.weight`. Convolutions start
    at N(0, 2 / (k*k*out_channels)), the bias of `fc` at zero.

    activation: "relu"; or "silu" for the network of Gowal et al. and Rebuffi et al., whose convolutions of stride 2
    moreover pad below and on the right alone. Their checkpoints, `init_conv.weight`,
    `layer.0.block.0.batchnorm_0.weight`, are read into it by `load_weights`, and into no other, whose logits would
    differ; they normalise by CIFAR-10's (or CIFAR-100's) mean and std, which are to be given here.

    Raises:
        ValueError: depth is not 6n + 4, widen_factor or num_classes < 1, an unknown activation, or mean and std as in
            `resnet18`.

    Source: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016; no dropout, as in TRADES; "silu": Gowal et
    al., "Uncovering the Limits of Adversarial Training against Norm-Bounded Adversarial Examples", arXiv 2010.03593.
    """
    return WideResNet(depth, widen_factor, num_classes, activation=activation, mean=mean, std=std)
