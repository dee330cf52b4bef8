"""Weights from and for others: any checkpoint into a model, and a model into a file."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from part_fast.atomic import replacing
from part_fast.errors import BadTypeError, BadValueError, MissingFileError
from part_fast.models.layers import Normalize
from part_fast.models.preact_resnet import PreActResNet
from part_fast.models.resnet import ResNet
from part_fast.models.weights_file import read_weights, write_weights
from part_fast.models.wideresnet import WideResNet
from part_fast.reading import first_line, read_torch

# The file formats of `export_weights`, and the endings that say which.
FORMATS = {"safetensors": (".safetensors",), "robustbench": (".pt", ".pth")}


def load_weights(model: nn.Module, path_or_state: str | os.PathLike[str] | Mapping[str, object]) -> nn.Module:
    """Copy a checkpoint into `model`, in place, and return the model; nothing is written if anything does not fit.

    Takes a `.safetensors` file, any file of `torch.save` (read with `weights_only=True`), or a mapping. The weights
    may lie at the top or up to three mappings deep (`state_dict`, `model`, `net`, `ema_state_dict`, ...), and under any
    prefix that all of them have (`module.` of DataParallel and AveragedModel, `_orig_mod.` of torch.compile,
    `module.basic_net.` of an attack's wrapper, `1.` of a Sequential). Where several sets of weights fit, one under a
    usual name is taken, with a warning if they differ.

    Ignored: `sub_block1.*`, which published WRN checkpoints carry and never use; AveragedModel's `n_averaged`; equal
    copies of weights; a normalisation's mean and std that are the model's own (0 and 1 where it has none); and the
    absence of `num_batches_tracked`, which old checkpoints lack. Weights take the dtype and device of the model.

    A WideResNet with SiLU also takes the names of the checkpoints of Gowal et al. and Rebuffi et al.
    (`init_conv.weight`, `layer.0.block.0.batchnorm_0.weight`, ...), with a warning where neither the file nor the model
    says how images are normalised.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: it is neither a path nor a mapping.
        ValueError: the file cannot be read safely (it says which objects stand in the way and how to get the weights
            out); or keys are missing, unexpected, of another shape, kind of number or normalisation; or a value is
            not finite (all are named).
    """
    if not isinstance(path_or_state, (str, os.PathLike, Mapping)):
        raise BadTypeError(f"path_or_state must be a path or a mapping, got {type(path_or_state).__name__}")
    if isinstance(path_or_state, Mapping):
        source, raw = "the state_dict", path_or_state
    else:
        source, raw = str(path_or_state), _read_checkpoint(Path(path_or_state))
    own = model.state_dict()
    theirs = any(isinstance(part, WideResNet) and part.activation == "silu" for part in model.modules())
    renamed = _renamed(raw) if theirs else raw
    state, others = _match_keys(renamed, own, source)

    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    unexpected = [key for key, value in others.items() if not _normalises(key, value)]
    dtypes = [
        f"{key} {state[key].dtype} instead of {own[key].dtype}".replace("torch.", "")
        for key in own
        if key in state and state[key].is_floating_point() != own[key].is_floating_point()
    ]
    what = {"missing": missing, "unexpected": unexpected, "other shapes:": shapes, "other kinds of numbers:": dtypes}
    problems = [f"{problem} {_shorten(keys)}" for problem, keys in what.items() if keys]
    if problems:
        raise BadValueError(f"{source} does not fit {type(model).__name__}: {'; '.join(problems)}")
    _check_normalisation(model, others, source)
    if renamed is not raw and not others and not any(isinstance(part, Normalize) for part in model.modules()):
        warnings.warn(
            f"{source} does not say how its images are normalised, which published ones of these names are, and the "
            "model does not normalise: build it with their mean and std",
            stacklevel=2,
        )
    broken = [key for key, value in state.items() if not bool(torch.isfinite(value.float()).all())]
    if broken:
        raise BadValueError(f"{source} holds NaN or infinite values, of a training that diverged: {_shorten(broken)}")
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(value)
    return model


def export_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    sub_block1: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the weights of `model` to a file at `path`, at once and whole, and return where they are.

    safetensors: every tensor under its name here. robustbench: a file of `torch.save` whose names are those of
    RobustBench's `ResNet` (for `resnet18`), `PreActResNet` (PreActBlockV2 and `bn_before_fc=True`) and `WideResNet`,
    which load it with `load_state_dict(torch.load(path))`;
    `resnet_small` keeps the names, but RobustBench has no network of its shape. Tensors are copied to the CPU,
    contiguous, in the model's dtype; `load_weights` reads both formats.

    Args:
        model: what `build_model` makes; for robustbench one of part_fast's own networks.
        path: a name ending in .safetensors, or in .pt or .pth for robustbench.
        format: "safetensors" or "robustbench"; default: by the ending of `path`.
        sub_block1: also write the weights of `block1` as `sub_block1`, which RobustBench's WideResNet carries under
            `sub_block1=True`, as published TRADES checkpoints do, and never computes with.
        overwrite: replace a file that is there.

    Raises:
        FileExistsError: there is a file at `path` and `overwrite` is not set.
        FileNotFoundError: there is no such folder.
        TypeError: model is no module; or, for robustbench, no ResNet, PreActResNet or WideResNet of part_fast.
        ValueError: an unknown format or another ending than its own, `sub_block1` for a model without `block1`, or
            robustbench for a model that normalises inside or has SiLU: RobustBench's of these names does and has not,
            its logits would be others.

    Source: github.com/RobustBench/robustbench, `robustbench/model_zoo/architectures`.
    """
    path = Path(path)
    if not isinstance(model, nn.Module):
        raise BadTypeError(f"model takes a torch.nn.Module, got {type(model).__name__}")
    if format is None:
        format = next((name for name, endings in FORMATS.items() if path.suffix in endings), None)
        if format is None:
            endings = ", ".join(ending for endings in FORMATS.values() for ending in endings)
            raise BadValueError(f"path takes a name that ends in one of {endings}, got {str(path)!r}")
    elif format not in FORMATS:
        raise BadValueError(f"format takes one of {', '.join(FORMATS)}, got {format!r}")
    elif path.suffix not in FORMATS[format]:
        raise BadValueError(
            f"path takes a name that ends in {' or '.join(FORMATS[format])} for {format}, got {str(path)!r}"
        )
    if sub_block1 and not isinstance(model, WideResNet):
        raise BadValueError(f"sub_block1 takes a WideResNet, got {type(model).__name__}, which has no block1")
    if format == "robustbench" and not isinstance(model, ResNet | PreActResNet | WideResNet):
        raise BadTypeError(
            "model takes a ResNet, PreActResNet or WideResNet of part_fast.models for format robustbench, got "
            f"{type(model).__name__}: give a path that ends in .safetensors"
        )
    if format == "robustbench" and not isinstance(model.normalize, nn.Identity):
        raise BadValueError("format robustbench takes a model without mean and std: RobustBench's does not normalise")
    if format == "robustbench" and getattr(model, "activation", "relu") != "relu":
        raise BadValueError("format robustbench takes a model with ReLU: RobustBench's of these names has no other")
    if not path.parent.is_dir():
        raise MissingFileError(f"no folder at {path.parent} to write {path.name} in")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already: pass overwrite=True (--overwrite) to replace it")

    state = own_copies(model)
    if sub_block1:
        state |= {f"sub_{key}": value.clone() for key, value in state.items() if key.startswith("block1.")}
    if format == "safetensors":
        write_weights(path, state)
        return path
    with replacing(path) as temporary:
        torch.save(state, temporary)
    return path


def own_copies(model: nn.Module) -> dict[str, Tensor]:
    """The model's `state_dict`, each tensor contiguous on the CPU with a storage of its own, which files need.

    Errors: ValueError for a state that holds something else than tensors.
    """
    copies = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise BadValueError(
                f"the state_dict of {type(model).__name__} must hold tensors alone, got {key!r}, {type(value).__name__}"
            )
        copies[key] = torch.empty_like(value, device="cpu", memory_format=torch.contiguous_format).copy_(value)
    return copies


def _read_checkpoint(path: Path) -> Mapping[str, object]:
    if not path.is_file():
        raise MissingFileError(f"no checkpoint file at {path}")
    if path.suffix == ".safetensors":
        return read_weights(path)
    try:
        raw = read_torch(path)
    # A damaged file can raise nearly anything; the first line of any of them says what happened.
    except Exception as error:
        reason = _why_unread(path, error)
        raise BadValueError(f"{path} is not a checkpoint that loads without running code: {reason}") from error
    if not isinstance(raw, Mapping):
        raise BadValueError(f"{path} holds a {type(raw).__name__}, a checkpoint is a dictionary of tensors")
    return raw


def _why_unread(path: Path, error: Exception) -> str:
    """The objects that torch refuses to read, and how to get the weights out; else the first line of the error."""
    try:
        refused = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # a file of before torch 1.6, or a damaged one
        refused = re.findall(r"(?:GLOBAL|Unsupported (?:global|class):?) ([\w.]+) was not", str(error))
    if not refused:
        return re.sub(r"\x1b\[[0-9;]*m", "", first_line(error))
    whole = any(_is_module(name) for name in refused)
    # The user's own classes say more than those of torch that every model has.
    named = sorted(refused, key=lambda name: (name.startswith("torch."), name))
    weights = f"torch.load({path.name!r}, weights_only=False)" + (".state_dict()" if whole else "['state_dict']")
    kind = "a whole model" if whole else "other objects beside the weights"
    return (
        f"it holds {kind}, {_shorten(named)}; if you trust the file, save its weights alone: "
        f"torch.save({weights}, 'weights.pt')" + ("" if whole else ", under whatever key they have")
    )


def _is_module(name: str) -> bool:
    """Whether `name` is that of a layer or network, as far as it is imported already."""
    module, _, attribute = name.rpartition(".")
    kind = getattr(sys.modules.get(module), attribute, None)
    return isinstance(kind, type) and issubclass(kind, nn.Module)


# The names of the WideResNets of Gowal et al., and ours.
_STEM = "init_conv.weight"
_PARTS = {"init_conv": "conv1", "batchnorm": "bn1", "logits": "fc"}
_IN_BLOCK = {
    "batchnorm_0": "bn1",
    "conv_0": "conv1",
    "batchnorm_1": "bn2",
    "conv_1": "conv2",
    "shortcut": "convShortcut",
}


def _renamed(raw: Mapping[str, object], depth: int = 3) -> Mapping[str, object]:
    """`raw` with our names in every mapping that has theirs, under whatever prefix; itself where none has."""
    inner = {name: _renamed(value, depth - 1) for name, value in raw.items() if depth and isinstance(value, Mapping)}
    prefixes = [key.removesuffix(_STEM) for key in raw if isinstance(key, str) and key.endswith(_STEM)]
    if not prefixes:
        same = all(inner[name] is raw[name] for name in inner)
        return raw if same else {**raw, **inner}
    return {_our_name(key, prefixes): value for key, value in {**raw, **inner}.items()}


def _our_name(key: str, prefixes: Sequence[str]) -> str:
    prefix = next((one for one in sorted(prefixes, key=len, reverse=True) if str(key).startswith(one)), "")
    name, _, kind = str(key).removeprefix(prefix).rpartition(".")
    block = re.fullmatch(r"layer\.(\d+)\.block\.(\d+)\.(\w+)", name)
    if name in _PARTS:
        return f"{prefix}{_PARTS[name]}.{kind}"
    if block is not None and block[3] in _IN_BLOCK:
        return f"{prefix}block{int(block[1]) + 1}.layer.{block[2]}.{_IN_BLOCK[block[3]]}.{kind}"
    return key


# Names under which weights usually lie, the plainest first.
_CONTAINERS = ("", "state_dict", "model_state_dict", "model", "net", "model.state_dict")


def _match_keys(
    raw: Mapping[str, object], own: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The checkpoint's tensors under the model's names, and those that are none of the model's, under their own."""
    chosen, prefix, prefixes = _find_weights(raw, own, source)
    state: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for original, value in chosen.items():
        if not isinstance(original, str):
            raise BadValueError(f"{source} holds a key that is a {type(original).__name__}, a state_dict has names")
        if not isinstance(value, Tensor):
            raise BadValueError(f"{source} holds a {type(value).__name__} at {original!r}, a state_dict holds tensors")
        if not _is_plain(value):
            kind = f"{value.dtype}, {value.layout} on {value.device}".replace("torch.", "")
            raise BadValueError(f"{source} holds a tensor at {original!r} that is no array of numbers: {kind}")
        key = original.removeprefix(prefix)
        if original.startswith(prefix) and key in own:
            state[key] = value
        elif not (key.startswith("sub_block1.") or key.rpartition(".")[2] == "n_averaged"):
            others[original] = value
    for original in list(others):
        key = next((short for p in prefixes if (short := original.removeprefix(p)) in state), "")
        if key and not _equal(others.pop(original), state[key]):
            raise BadValueError(f"{source} holds {key!r} twice, with and without a prefix")
    return state, others


def _find_weights(
    raw: Mapping[str, object], own: Mapping[str, Tensor], source: str
) -> tuple[Mapping[str, object], str, set[str]]:
    """The mapping in `raw` that holds the model's weights, their prefix there, and all prefixes of copies of them.

    Errors: ValueError where one mapping holds two sets that differ; a warning where two mappings do.
    """
    required = [key for key in own if not key.endswith("num_batches_tracked")]
    found = []  # (how many of the model's names, the name of the mapping, prefix, mapping)
    for where, inner in _tensor_sets(raw):
        prefixes = {""}
        for key in inner:
            parts = key.split(".")
            prefixes |= {key[: len(key) - len(rest)] for i in range(len(parts)) if (rest := ".".join(parts[i:])) in own}
        found += [(sum(prefix + key in inner for key in required), where, prefix, inner) for prefix in prefixes]
    if not found:
        return raw, "", set()
    usual = {name: place for place, name in enumerate(_CONTAINERS)}
    found.sort(key=lambda one: (-one[0], usual.get(one[1], len(usual)), len(one[2])))
    _, where, prefix, chosen = found[0]
    whole = [one for one in found if 0 < one[0] == len(required)]
    for _, other_where, other_prefix, other in whole[1:]:
        unlike = [key for key in required if not _equal(chosen[prefix + key], other[other_prefix + key])]
        if unlike and other is chosen:
            raise BadValueError(
                f"{source} holds {unlike[0]!r} twice and not alike, under the prefixes {prefix!r} and "
                f"{other_prefix!r}: give a mapping with one of them"
            )
        if unlike:
            taken, left = (f"those in {name!r}" if name else "those at the top" for name in (where, other_where))
            message = f"{source} holds two sets of weights that differ: {taken} are taken, {left} are not"
            warnings.warn(f"{message}; to load another, give its mapping to load_weights", stacklevel=4)
    return chosen, prefix, {one[2] for one in whole if one[3] is chosen} | {"", "module.", "model.", "_orig_mod."}


def _tensor_sets(
    raw: Mapping[str, object], where: str = "", depth: int = 3, seen: set[int] | None = None
) -> Iterator[tuple[str, Any]]:
    """The mappings in `raw`, itself included, that hold tensors, by the names that lead there; each of them once."""
    seen = set() if seen is None else seen
    seen.add(id(raw))
    if any(isinstance(value, Tensor) for value in raw.values()) and all(isinstance(key, str) for key in raw):
        yield where, raw
    for name, value in raw.items():
        if depth and isinstance(value, Mapping) and isinstance(name, str) and id(value) not in seen:
            yield from _tensor_sets(value, f"{where}.{name}" if where else name, depth - 1, seen)


def _equal(one: object, other: object) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    return _is_plain(one) and _is_plain(other) and torch.equal(one, other)


def _is_plain(value: Tensor) -> bool:
    """Whether `value` holds real numbers as an array: quantised, complex, sparse and empty (meta) tensors do not."""
    strided = value.layout is torch.strided and value.device.type != "meta"
    return strided and not value.is_quantized and not value.is_complex()


# What normalising layers call their buffers.
_MEANS, _STDS = ("mean", "mu", "new_mean"), ("std", "sigma", "new_std")


def _normalises(key: str, value: Tensor) -> bool:
    return key.rpartition(".")[2] in (*_MEANS, *_STDS) and value.numel() in (1, 3) and value.is_floating_point()


def _check_normalisation(model: nn.Module, others: Mapping[str, Tensor], source: str) -> None:
    """Errors: ValueError where the checkpoint's network normalises its images otherwise than the model."""
    inside = next((module for module in model.modules() if isinstance(module, Normalize)), None)
    for key, value in others.items():
        is_mean = key.rpartition(".")[2] in _MEANS
        own = torch.tensor(0.0 if is_mean else 1.0) if inside is None else inside.mean if is_mean else inside.std
        theirs = value.detach().flatten().float().cpu()
        if not torch.allclose(theirs, own.detach().flatten().float().cpu(), rtol=0, atol=1e-4):
            has = "does not normalise" if inside is None else f"has {own.flatten().tolist()}"
            numbers = ", ".join(f"{number:.4f}" for number in theirs.tolist())
            raise BadValueError(
                f"{source} normalises its images, {key} ({numbers}), and the model {has}: "
                f"build it with that mean and std"
            )


def _shorten(keys: Sequence[str], show: int = 4) -> str:
    more = f" and {len(keys) - show} more" if len(keys) > show else ""
    return ", ".join(keys[:show]) + more
