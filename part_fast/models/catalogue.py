"""The networks by the names of a configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence

from part_fast.errors import BadValueError
from part_fast.models.resnet import ResNet, resnet18, resnet_small
from part_fast.models.wideresnet import WideResNet, wideresnet

KNOWN_MODELS = ("resnet18", "resnet-small", "wrn-DEPTH-WIDTH (wrn-34-10, wrn-28-10, ...)")


def build_model(
    name: str,
    num_classes: int = 10,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ResNet | WideResNet:
    """The model called `name` in a training configuration: resnet18, resnet-small, or wrn-DEPTH-WIDTH.

    Raises:
        ValueError: an unknown name (the known ones are listed), or what the model itself refuses.
    """
    if name == "resnet18":
        return resnet18(num_classes, mean=mean, std=std)
    if name == "resnet-small":
        return resnet_small(num_classes, mean=mean, std=std)
    wide = re.fullmatch(r"wrn-(\d+)-(\d+)", name)
    if wide is None:
        raise BadValueError(f"model takes one of {', '.join(KNOWN_MODELS)}, got {name!r}")
    return wideresnet(int(wide[1]), int(wide[2]), num_classes, mean=mean, std=std)
