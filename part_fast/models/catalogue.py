"""The networks by the names of a configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from part_fast.errors import BadValueError
from part_fast.models.external import network_of_function, timm_network, torchvision_network
from part_fast.models.preact_resnet import preact_resnet18
from part_fast.models.resnet import resnet18, resnet_small
from part_fast.models.wideresnet import wideresnet


@dataclass(frozen=True)
class Model:
    """One network, or a family of them, whose name has capitals where numbers stand, or, around a colon, names.

    help: what it is, or names of the family, for help texts and messages.
    build: callable(*numbers or names, num_classes, mean=, std=) -> the network.
    """

    help: str
    build: Callable[..., nn.Module]


MODELS = {
    "resnet18": Model("the one for 32x32 images", resnet18),
    "resnet-small": Model("four one-block stages, the demo's", resnet_small),
    "preact-resnet18": Model("activations before convolutions", preact_resnet18),
    "preact-resnet18-wong": Model("shortcuts as Wong et al.'s", partial(preact_resnet18, shortcut="input")),
    "preact-resnet18-silu": Model("with SiLU", partial(preact_resnet18, activation="silu")),
    "wrn-DEPTH-WIDTH": Model("wrn-34-10, wrn-28-10, ...", wideresnet),
    "wrn-DEPTH-WIDTH-silu": Model("wrn-28-10-silu, ...", partial(wideresnet, activation="silu")),
    "torchvision:NAME": Model("torchvision:resnet50, ...", torchvision_network),
    "timm:NAME": Model("timm:convnext_atto, ...", timm_network),
    "MODULE:FUNCTION": Model("your own, called with num_classes=", network_of_function),
}

KNOWN_MODELS = tuple(f"{name} ({model.help})" if name != name.lower() else name for name, model in MODELS.items())


def build_model(
    name: str,
    num_classes: int = 10,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """The model called `name` in a training configuration: one of `MODELS`, such as resnet18, wrn-34-10 or timm:vgg11.

    mean, std: three numbers each, by which part_fast's own networks normalise; those of others get images in [0,1].

    Raises:
        ValueError: an unknown name (the known ones are listed), or what the model itself refuses.
        ImportError: the package or module that it is in cannot be imported.
    """
    for known, model in MODELS.items():
        stand_in, meant = (r"(.+)", str) if ":" in known else (r"(\\d+)", int)
        found = re.fullmatch(re.sub("[A-Z]+", stand_in, known), name)
        if found is not None:
            return model.build(*map(meant, found.groups()), num_classes, mean=mean, std=std)
    raise BadValueError(f"model takes one of {', '.join(KNOWN_MODELS)}, got {name!r}")
