"""Networks that are not part_fast's: those of torchvision and timm by name, and what a function of the user's makes."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from part_fast.errors import BadValueError, MissingPackageError
from part_fast.models.layers import check_num_classes
from part_fast.optional import needs


def is_external(name: str) -> bool:
    """Whether the network called `name` in a configuration is not part_fast's."""
    return ":" in name


def is_own_code(name: str) -> bool:
    """Whether `name` is of a function that is in no table of torchvision's or timm's: building it runs any code."""
    return is_external(name) and not name.startswith(("torchvision:", "torchvision.models:", "timm:"))


def refuse_own_code(name: str, source: Path) -> None:
    """Refuse to run a function that only a file names, which may have come from anybody.

    Errors: ValueError that says what to type, for a network of `is_own_code`.
    """
    if is_own_code(name):
        raise BadValueError(
            f"{source} names the network {name}, and to build it runs that code: if you trust it, name it yourself, "
            f"--model {name}"
        )


def torchvision_network(
    name: str,
    num_classes: int = 10,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """The classifier called `name` in `torchvision.models`, such as resnet50, with random weights."""
    with needs("torchvision", "download"):
        from torchvision import models
    known = models.list_models(module=models)
    return _built(
        f"torchvision:{name}", _known(name, known, "torchvision", models.get_model_builder), num_classes, mean, std
    )


def timm_network(
    name: str,
    num_classes: int = 10,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """What `timm.create_model(name)` makes, with random weights."""
    with needs("timm", "examples"):
        import timm
    known = timm.list_models()
    plain = name.partition(".")[0]  # what follows names pretrained weights, and variants with them

    def build(num_classes: int) -> nn.Module:
        try:
            return timm.create_model(name, pretrained=False, num_classes=num_classes)
        except RuntimeError as error:  # such as an unknown variant
            raise BadValueError(f"model timm:{name}: {' '.join(str(error).split())}") from error

    return _built(f"timm:{name}", _known(plain, known, "timm", lambda _: build), num_classes, mean, std)


def network_of_function(
    module: str,
    function: str,
    num_classes: int = 10,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """What `function` of a Python module makes when it is called with num_classes=; torchvision.models is a table.

    The current folder is searched for the module first, as `python -m` does.
    Errors: ValueError or ImportError, one line, where there is no such module or function, or it makes no network. What
    the user's own code raises keeps its traceback.
    """
    if module == "torchvision.models":
        return torchvision_network(function, num_classes, mean=mean, std=std)
    name = f"{module}:{function}"
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name) or module.endswith(".py"):
        raise BadValueError(
            "model must be MODULE:FUNCTION as Python imports them, such as my_file:build or my.module:build, "
            f"got {name!r}"
        )
    found = getattr(_imported(module, name), function, None)
    if found is None:
        near = difflib.get_close_matches(function, [key for key in vars(sys.modules[module]) if key[0] != "_"])
        raise BadValueError(f"model {name}: {module} ({_file_of(module)}) has no {function}{_perhaps(near)}")
    if not callable(found):
        raise BadValueError(
            f"model {name} must be a function that is called with num_classes=, got {type(found).__name__}"
        )
    return _built(name, found, num_classes, mean, std)


def check_network(model: nn.Module, name: str, images: Tensor, num_classes: int, *, trains: bool = False) -> None:
    """Try a network of others on `images` (N,C,H,W) in [0,1], in eval mode; with `trains` in train mode as well.

    The model and the random generators stay as they are.
    Errors: ValueError, one line, unless it takes them and gives logits (N,num_classes).
    """
    shape = tuple(images.shape[1:])
    devices = [images.device] if images.device.type == "cuda" else []
    for mode in (False, True) if trains else (False,):
        with torch.random.fork_rng(devices), torch.no_grad():
            network = copy.deepcopy(model).train(mode)
            try:
                logits = network(images)
            except Exception as error:  # whatever a network raises for images that it is not made for
                reason = " ".join(str(error).split())
                raise BadValueError(
                    f"model {name} does not take images {shape}: {type(error).__name__}: {reason}"
                ) from error
        where = " in training" if mode else ""
        if not isinstance(logits, Tensor):
            raise BadValueError(f"model {name} must give logits, a tensor, got {type(logits).__name__}{where}")
        if tuple(logits.shape) != (len(images), num_classes):
            raise BadValueError(
                f"model {name} must give logits ({len(images)},{num_classes}) for {len(images)} images of "
                f"{num_classes} classes, got {tuple(logits.shape)}{where}"
            )


def _known(
    name: str, known: Iterable[str], package: str, find: Callable[[str], Callable[..., Any]]
) -> Callable[..., Any]:
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known)
        raise BadValueError(f"model {package}:{name}: {package} has no classifier {name!r}{_perhaps(near)}")
    return find(name)


def _perhaps(near: Sequence[str]) -> str:
    return f"; perhaps you meant {' or '.join(near)}" if near else ""


def _imported(module: str, name: str) -> Any:
    """The module. Errors: ImportError, one line: where it was looked for, or which import in it fails."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = getattr(error, "name", None)
        if isinstance(error, ModuleNotFoundError) and missing and f"{module}.".startswith(f"{missing}."):
            said = f"there is no module {missing}, neither in {here} nor where Python looks for packages"
            if "is not a package" in str(error):
                said = " ".join(str(error).split())
        else:
            said = f"to import {module} fails: {' '.join(str(error).split())}"
        raise MissingPackageError(
            f"model {name} cannot be built: {said}; start part-fast in the folder that holds it, or add that to "
            "PYTHONPATH",
            name=missing,
        ) from error


def _file_of(module: str) -> str:
    return str(getattr(sys.modules[module], "__file__", None) or "built in")


def _built(
    name: str,
    function: Callable[..., Any],
    num_classes: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> nn.Module:
    check_num_classes(num_classes)
    if mean is not None or std is not None:
        raise BadValueError(f"mean and std must not be given for {name}, which gets images in [0,1] and may normalise")
    try:
        inspect.signature(function).bind(num_classes=num_classes)
    except TypeError as error:
        raise BadValueError(
            f"model {name} must be a function that is called with num_classes= alone, got one that refuses it: {error}"
        ) from error
    except ValueError:  # of a builtin there is no signature
        pass
    network = function(num_classes=num_classes)
    if not isinstance(network, nn.Module):
        raise BadValueError(f"model {name} must give a torch.nn.Module, got {type(network).__name__}")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise BadValueError(f"model {name} must give a network with parameters to train, got one without")
    return network
