"""ResNet-18 for CIFAR and the demo's small one, under the parameter names of the usual checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from part_fast.models.layers import check_num_classes, conv3x3, normalization


class _ResNetBlock(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_planes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes)
            )

    # No in-place ReLU here or below: a hook on any submodule (a CAM's target layer) must see its true output.
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Post-activation residual network with a 3x3 stem, no max pool, four stages and a global average.

    Use `resnet18` or `resnet_small`; this class is what both build. It maps images (N,3,H,W) in [0,1], any H and W,
    to logits (N,num_classes). Stage i is the submodule `layer{i}`; CAM reads `layer4`.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        strides: Sequence[int],
        num_classes: int = 10,
        *,
        stem_stride: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_num_classes(num_classes)
        self.num_classes = num_classes
        self.normalize = normalization(mean, std)
        self.conv1 = conv3x3(3, widths[0], stem_stride)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs = (widths[0], *widths)
        stages = [_resnet_stage(*shape) for shape in zip(blocks, inputs, widths, strides, strict=False)]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(self.normalize(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def _resnet_stage(blocks: int, in_planes: int, planes: int, stride: int) -> nn.Sequential:
    first = _ResNetBlock(in_planes, planes, stride)
    return nn.Sequential(first, *(_ResNetBlock(planes, planes, 1) for _ in range(blocks - 1)))


def resnet18(
    num_classes: int = 10, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> ResNet:
    """ResNet-18 as used for CIFAR: 3x3 stem, no max pool; 11,173,962 parameters for 10 classes.

    Images (N,3,H,W) in [0,1] -> logits (N,num_classes); the map at `layer4` is H/8 x W/8. `mean` and `std`, three
    numbers each, normalise inside the model and add no `state_dict` key. Keys are those of the usual CIFAR
    checkpoints: `conv1.weight`, `layer2.0.shortcut.0.weight`, `linear.weight`. Weights start at PyTorch's defaults.

    Raises:
        ValueError: num_classes < 1, or mean and std not both given as three numbers with std > 0.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """
    return ResNet((2, 2, 2, 2), (64, 128, 256, 512), (1, 2, 2, 2), num_classes, mean=mean, std=std)


def resnet_small(
    num_classes: int = 10, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> ResNet:
    """The demo's ResNet: four one-block stages, a stem of stride 2; made to be trained on two CPU cores.

    Images (N,3,H,W) in [0,1] -> logits (N,num_classes); the map at `layer4` is H/4 x W/4, so 8x8 for 32x32 images.
    Arguments, key names and errors are those of `resnet18`.
    """
    return ResNet((1, 1, 1, 1), (16, 32, 32, 64), (1, 2, 1, 1), num_classes, stem_stride=2, mean=mean, std=std)
