"""CIFAR-style networks on [0,1] images, under the parameter names of the published checkpoints."""

from __future__ import annotations

import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from part_fast.attack_model.cpu.packed_conv import PackedConv2d, residual

__all__ = [
    "KNOWN_MODELS",
    "ResNet",
    "WideResNet",
    "build_model",
    "export_weights",
    "load_weights",
    "resnet18",
    "resnet_small",
    "wideresnet",
]

# The file formats of `export_weights`, and the endings that say which.
FORMATS = {"safetensors": (".safetensors",), "robustbench": (".pt", ".pth")}

KNOWN_MODELS = ("resnet18", "resnet-small", "wrn-DEPTH-WIDTH (wrn-34-10, wrn-28-10, ...)")


def _conv3x3(in_planes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)


class _Normalize(nn.Module):
    """(x - mean) / std per channel; its buffers stay out of `state_dict`, which then fits any checkpoint."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != 3 or not all(math.isfinite(v) for v in values):
                raise ValueError(f"{name} takes three finite numbers, one per channel, got {values!r}")
        if min(std) <= 0:
            raise ValueError(f"std takes three numbers > 0, got {std!r}")
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


def _normalize(mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Module:
    if mean is None and std is None:
        return nn.Identity()
    if mean is None or std is None:
        raise ValueError(f"mean and std go together, got mean={mean!r}, std={std!r}")
    return _Normalize(mean, std)


def _check_num_classes(num_classes: int) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes takes an integer >= 1, got {num_classes!r}")


class _ResNetBlock(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_planes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes)
            )

    # No in-place ReLU here or below: a hook on any submodule (a CAM's target layer) must see its true output.
    def forward(self, x: Tensor) -> Tensor:
        if len(self.shortcut) == 0 and _packed(self.conv1, self.bn1) and _packed(self.conv2, self.bn2):
            return residual(self.conv1, self.conv2, x)
        x = _cast(self.conv1, x)
        out = _fused(self.conv1, self.bn1, x)
        return _fused(self.conv2, self.bn2, out, self.shortcut(x))


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
        _check_num_classes(num_classes)
        self.num_classes = num_classes
        self.normalize = _normalize(mean, std)
        self.conv1 = _conv3x3(3, widths[0], stem_stride)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs = (widths[0], *widths)
        stages = [_resnet_stage(*shape) for shape in zip(blocks, inputs, widths, strides, strict=False)]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = _fused(self.conv1, self.bn1, self.normalize(x))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def _resnet_stage(blocks: int, in_planes: int, planes: int, stride: int) -> nn.Sequential:
    first = _ResNetBlock(in_planes, planes, stride)
    return nn.Sequential(first, *(_ResNetBlock(planes, planes, 1) for _ in range(blocks - 1)))


class _WideBlock(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = _conv3x3(in_planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes)
        self.convShortcut = None if in_planes == planes else nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        # Where the shape changes, the shortcut too starts after the activation.
        out = _cast(self.conv1, out)
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        out = _fused(self.conv1, self.bn2, out)
        return _fused(self.conv2, None, out, shortcut, relu=False)


class _WideStage(nn.Module):
    def __init__(self, blocks: int, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        first = _WideBlock(in_planes, planes, stride)
        self.layer = nn.Sequential(first, *(_WideBlock(planes, planes, 1) for _ in range(blocks - 1)))

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
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth takes 6n + 4 with n >= 1 (10, 16, 22, 28, 34, ...), got {depth!r}")
        if isinstance(widen_factor, bool) or not isinstance(widen_factor, int) or widen_factor < 1:
            raise ValueError(f"widen_factor takes an integer >= 1, got {widen_factor!r}")
        _check_num_classes(num_classes)
        self.num_classes = num_classes
        self.normalize = _normalize(mean, std)
        blocks = (depth - 4) // 6
        widths = [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = _conv3x3(3, 16)
        self.block1 = _WideStage(blocks, 16, widths[0], 1)
        self.block2 = _WideStage(blocks, widths[0], widths[1], 2)
        self.block3 = _WideStage(blocks, widths[1], widths[2], 2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(self.normalize(x)))))
        out = F.relu(self.bn1(out))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


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


def wideresnet(
    depth: int = 34,
    widen_factor: int = 10,
    num_classes: int = 10,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> WideResNet:
    """WRN-depth-widen_factor as used in adversarial training; WRN-34-10 has 46,160,474 parameters for 10 classes.

    Images (N,3,H,W) in [0,1] -> logits (N,num_classes); the map at `block3` is H/4 x W/4. `mean` and `std`, three
    numbers each, normalise inside the model and add no `state_dict` key. Keys are those of the usual checkpoints:
    `block1.layer.0.bn1.weight`, `block1.layer.0.convShortcut.weight`, `bn1.weight`, `fc.weight`. Convolutions start
    at N(0, 2 / (k*k*out_channels)), the bias of `fc` at zero.

    Raises:
        ValueError: depth is not 6n + 4, widen_factor or num_classes < 1, or mean and std as in `resnet18`.

    Source: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016; no dropout, as in TRADES.
    """
    return WideResNet(depth, widen_factor, num_classes, mean=mean, std=std)


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
        raise ValueError(f"model takes one of {', '.join(KNOWN_MODELS)}, got {name!r}")
    return wideresnet(int(wide[1]), int(wide[2]), num_classes, mean=mean, std=std)


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

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read safely (it says which objects stand in the way and how to get the weights
            out), or keys are missing, unexpected, of another shape or of another normalisation (named).
    """
    if isinstance(path_or_state, Mapping):
        source, raw = "the state_dict", path_or_state
    else:
        source, raw = str(path_or_state), _read_checkpoint(Path(path_or_state))
    own = model.state_dict()
    state, others = _match_keys(raw, own, source)

    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    unexpected = [key for key, value in others.items() if not _normalises(key, value)]
    problems = [
        f"{what} {_shorten(keys)}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("other shapes:", shapes))
        if keys
    ]
    if problems:
        raise ValueError(f"{source} does not fit {type(model).__name__}: {'; '.join(problems)}")
    _check_normalisation(model, others, source)
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
    RobustBench's `ResNet` (for `resnet18`) and `WideResNet`, which load it with `load_state_dict(torch.load(path))`;
    `resnet_small` keeps the names, but RobustBench has no network of its shape. Tensors are copied to the CPU,
    contiguous, in the model's dtype; `load_weights` reads both formats.

    Args:
        model: what `build_model` makes.
        path: a name ending in .safetensors, or in .pt or .pth for robustbench.
        format: "safetensors" or "robustbench"; default: by the ending of `path`.
        sub_block1: also write the weights of `block1` as `sub_block1`, which RobustBench's WideResNet carries under
            `sub_block1=True`, as published TRADES checkpoints do, and never computes with.
        overwrite: replace a file that is there.

    Raises:
        FileExistsError: there is a file at `path` and `overwrite` is not set.
        FileNotFoundError: there is no such folder.
        TypeError: model is not a ResNet or WideResNet of this module.
        ValueError: an unknown format or another ending than its own, `sub_block1` for a model without `block1`, or
            robustbench for a model that normalises inside: RobustBench's does not, its logits would be others.

    Source: github.com/RobustBench/robustbench, `robustbench/model_zoo/architectures`.
    """
    path = Path(path)
    if not isinstance(model, ResNet | WideResNet):
        raise TypeError(f"model takes a ResNet or WideResNet of part_fast.models, got {type(model).__name__}")
    if format is None:
        format = next((name for name, endings in FORMATS.items() if path.suffix in endings), None)
        if format is None:
            endings = ", ".join(ending for endings in FORMATS.values() for ending in endings)
            raise ValueError(f"path takes a name that ends in one of {endings}, got {str(path)!r}")
    elif format not in FORMATS:
        raise ValueError(f"format takes one of {', '.join(FORMATS)}, got {format!r}")
    elif path.suffix not in FORMATS[format]:
        raise ValueError(
            f"path takes a name that ends in {' or '.join(FORMATS[format])} for {format}, got {str(path)!r}"
        )
    if sub_block1 and not isinstance(model, WideResNet):
        raise ValueError(f"sub_block1 takes a WideResNet, got {type(model).__name__}, which has no block1")
    if format == "robustbench" and not isinstance(model.normalize, nn.Identity):
        raise ValueError("format robustbench takes a model without mean and std: RobustBench's does not normalise")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder at {path.parent} to write {path.name} in")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already: pass overwrite=True (--overwrite) to replace it")

    state = model.state_dict()
    if sub_block1:
        state |= {f"sub_{key}": value for key, value in state.items() if key.startswith("block1.")}
    # Copies: a file then holds each tensor's own values alone, and no storage that two of them share.
    state = {
        key: torch.empty_like(value, device="cpu", memory_format=torch.contiguous_format).copy_(value)
        for key, value in state.items()
    }
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if format == "safetensors":
            from safetensors.torch import save_file

            save_file(state, temporary)
        else:
            torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _read_checkpoint(path: Path) -> Mapping[str, object]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    # Each reader has its own exceptions for a damaged file; the first line of any of them says what happened.
    except Exception as error:
        reason = _why_unread(path, error)
        raise ValueError(f"{path} is not a checkpoint that loads without running code: {reason}") from error
    if not isinstance(raw, Mapping):
        raise ValueError(f"{path} holds a {type(raw).__name__}, a checkpoint is a dictionary of tensors")
    return raw


def _why_unread(path: Path, error: Exception) -> str:
    """The objects that torch refuses to read, and how to get the weights out; else the first line of the error."""
    try:
        refused = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # a file of before torch 1.6, or a damaged one
        refused = re.findall(r"(?:GLOBAL|Unsupported (?:global|class):?) ([\w.]+) was not", str(error))
    if not refused:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return re.sub(r"\x1b\[[0-9;]*m", "", first)
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
        if not isinstance(value, Tensor):
            raise ValueError(f"{source} holds a {type(value).__name__} at {original!r}, a state_dict holds tensors")
        key = original.removeprefix(prefix)
        if original.startswith(prefix) and key in own:
            state[key] = value
        elif not (key.startswith("sub_block1.") or key.rpartition(".")[2] == "n_averaged"):
            others[original] = value
    for original in list(others):
        key = next((short for p in prefixes if (short := original.removeprefix(p)) in state), "")
        if key and not _equal(others.pop(original), state[key]):
            raise ValueError(f"{source} holds {key!r} twice, with and without a prefix")
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
            raise ValueError(
                f"{source} holds {unlike[0]!r} twice and not alike, under the prefixes {prefix!r} and "
                f"{other_prefix!r}: give a mapping with one of them"
            )
        if unlike:
            taken, left = (f"those in {name!r}" if name else "those at the top" for name in (where, other_where))
            message = f"{source} holds two sets of weights that differ: {taken} are taken, {left} are not"
            warnings.warn(f"{message}; to load another, give its mapping to load_weights", stacklevel=4)
    return chosen, prefix, {one[2] for one in whole if one[3] is chosen} | {"", "module.", "model.", "_orig_mod."}


def _tensor_sets(raw: Mapping[str, object], where: str = "", depth: int = 3) -> Iterator[tuple[str, Any]]:
    """The mappings in `raw`, itself included, that hold tensors, by the names that lead there."""
    if any(isinstance(value, Tensor) for value in raw.values()) and all(isinstance(key, str) for key in raw):
        yield where, raw
    for name, value in raw.items():
        if depth and isinstance(value, Mapping):
            yield from _tensor_sets(value, f"{where}.{name}" if where else str(name), depth - 1)


def _equal(one: object, other: object) -> bool:
    return (
        isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    )


# What normalising layers call their buffers.
_MEANS, _STDS = ("mean", "mu", "new_mean"), ("std", "sigma", "new_std")


def _normalises(key: str, value: Tensor) -> bool:
    return key.rpartition(".")[2] in (*_MEANS, *_STDS) and value.numel() in (1, 3) and value.is_floating_point()


def _check_normalisation(model: nn.Module, others: Mapping[str, Tensor], source: str) -> None:
    """Errors: ValueError where the checkpoint's network normalises its images otherwise than the model."""
    inside = next((module for module in model.modules() if isinstance(module, _Normalize)), None)
    for key, value in others.items():
        is_mean = key.rpartition(".")[2] in _MEANS
        own = torch.tensor(0.0 if is_mean else 1.0) if inside is None else inside.mean if is_mean else inside.std
        theirs = value.detach().flatten().float().cpu()
        if not torch.allclose(theirs, own.detach().flatten().float().cpu(), rtol=0, atol=1e-4):
            has = "does not normalise" if inside is None else f"has {own.flatten().tolist()}"
            numbers = ", ".join(f"{number:.4f}" for number in theirs.tolist())
            raise ValueError(
                f"{source} normalises its images, {key} ({numbers}), and the model {has}: "
                f"build it with that mean and std"
            )


def _shorten(keys: Sequence[str], show: int = 4) -> str:
    more = f" and {len(keys) - show} more" if len(keys) > show else ""
    return ", ".join(keys[:show]) + more
