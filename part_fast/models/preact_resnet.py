"""PreActResNet-18 for CIFAR, under the parameter names of the usual checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from part_fast.choices import check_choice
from part_fast.models.layers import activation_of, check_num_classes, conv3x3, normalization

# Where a shortcut starts whose shape changes.
SHORTCUTS = ("activation", "input")


class _PreActBlock(nn.Module):
    def __init__(
        self, in_planes: int, planes: int, stride: int, activation: Callable[[Tensor], Tensor], shortcut: str
    ) -> None:
        super().__init__()
        self.activation, self.starts_active = activation, shortcut == "activation"
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = conv3x3(in_planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.shortcut = None
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(x))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(out if self.starts_active else x)
        residual: Tensor = self.conv2(self.activation(self.bn2(self.conv1(out))))
        return residual + shortcut


class PreActResNet(nn.Module):
    """PreActResNet-18; `preact_resnet18` builds it and documents it."""

    def __init__(
        self,
        num_classes: int = 10,
        *,
        activation: str = "relu",
        shortcut: str = "activation",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_num_classes(num_classes)
        check_choice("shortcut", shortcut, SHORTCUTS)
        self.num_classes, self.activation, self.shortcut = num_classes, activation, shortcut
        self._activate = activation_of(activation)
        self.normalize = normalization(mean, std)
        self.conv1 = conv3x3(3, 64)
        widths = (64, 64, 128, 256, 512)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(
                _PreActBlock(widths[stage], widths[stage + 1], 1 if stage == 0 else 2, self._activate, shortcut),
                _PreActBlock(widths[stage + 1], widths[stage + 1], 1, self._activate, shortcut),
            )
            for stage in range(4)
        )
        self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(self.normalize(x))))))
        out = self._activate(self.bn(out))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def preact_resnet18(
    num_classes: int = 10,
    *,
    activation: str = "relu",
    shortcut: str = "activation",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> PreActResNet:
    """PreActResNet-18 as used in adversarial training on CIFAR: 11,172,170 parameters for 10 classes.

    Images (N,3,H,W) in [0,1] -> logits (N,num_classes); the map at `layer4` is H/8 x W/8, before the last BatchNorm and
    activation. activation: "relu" or "silu". shortcut: where one starts whose shape changes, "activation", after the
    block's first activation, as in Rice et al. (2020), or "input", before its first BatchNorm, as in Wong et al. (2020)
    and de Jorge et al. (2022): two networks whose checkpoints have the same keys, and which give other logits with each
    other's. Other arguments and errors are those of `resnet18`. Keys are those of the usual checkpoints, with a
    BatchNorm before the last layer: `conv1.weight`, `layer2.0.shortcut.0.weight`, `bn.weight`, `linear.weight`. With
    "silu" it is not the PreActResNet of Rebuffi et al. (2021), whose shortcuts are 3x3: that one's checkpoints have
    other names, and are refused.

    Source: He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016; the last BatchNorm as in Rice et al.,
    "Overfitting in adversarially robust deep learning", ICML 2020.
    """
    return PreActResNet(num_classes, activation=activation, shortcut=shortcut, mean=mean, std=std)
