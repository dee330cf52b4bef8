"""The networks by the names of a configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from part_fast.errors import BadValueError
from part_fast.models.resnet import ResNet, resnet18, resnet_small
from part_fast.models.wideresnet import WideResNet, wideresnet


@dataclass(frozen=True)
class Model:
    """One network, or a family of them, whose name has capitals where the numbers stand.

    help: what it is, or names of the family, for help texts and messages.
    build: callable(*numbers, num_classes, mean=, std=) -> the network.
    """

    help: str
    build: Callable[..., ResNet | WideResNet]


MODELS = {
    "resnet18": Model("the one for 32x32 images", resnet18),
    "resnet-small": Model("four one-block stages, the demo's", resnet_small),
    "wrn-DEPTH-WIDTH": Model("wrn-34-10, wrn-28-10, ...", wideresnet),
}

KNOWN_MODELS = tuple(f"{name} ({model.help})" if name != name.lower() else name for name, model in MODELS.items())


def build_model(
    name: str,
    num_classes: int = 10,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ResNet | WideResNet:
    """The model called `name` in a training configuration: one of `MODELS`, such as resnet18 or wrn-34-10.

    Raises:
        ValueError: an unknown name (the known ones are listed), or what the model itself refuses.
    """
    for known, model in MODELS.items():
        numbers = re.fullmatch(re.sub("[A-Z]+", r"(\\d+)", known), name)
        if numbers is not None:
            return model.build(*map(int, numbers.groups()), num_classes, mean=mean, std=std)
    raise BadValueError(f"model takes one of {', '.join(KNOWN_MODELS)}, got {name!r}")
