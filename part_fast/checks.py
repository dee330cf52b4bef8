"""Argument checks, the same for every backend: one line that names the argument, what it got, what it takes.

The checks read shapes, dtypes, devices, layouts and Python scalars, never the values of a tensor,
which would make a GPU wait. `values` is for the entry of attacks, budgets and losses.
"""

from __future__ import annotations

import math
import numbers
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from part_fast.errors import BadTypeError, BadValueError

Bound = float | Tensor
# (low, high), each a number or one per channel; None for no clip.
Clip = tuple[Bound | Sequence[float], Bound | Sequence[float]] | None
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def number(name: str, value: Any, low: float = -math.inf) -> float:
    """A finite Python number, at least `low`."""
    if type(value) is not float:
        if type(value) is bool or not isinstance(value, numbers.Real):
            raise BadTypeError(f"{name} must be a number, got {_kind(value)}")
        try:
            value = float(value)
        except OverflowError:  # a whole number that no float holds
            value = math.inf if value > 0 else -math.inf
    if not (math.isfinite(value) and value >= low):
        takes = "finite" if low == -math.inf else f"finite and >= {low:g}"
        raise BadValueError(f"{name} must be {takes}, got {value}")
    return float(value)


def count(name: str, value: Any, low: int = 0) -> int:
    """A whole number, at least `low`."""
    if type(value) is not int and (type(value) is bool or not isinstance(value, numbers.Integral)):
        raise BadTypeError(f"{name} must be a whole number, got {_kind(value)}")
    if value < low:
        raise BadValueError(f"{name} must be >= {low}, got {value}")
    return int(value)


def seed(name: str, value: Any) -> int:
    """A whole number that torch's generators take: from 0 to 2**63 - 1."""
    if count(name, value) >= 2**63:
        raise BadValueError(f"{name} must be < 2**63, got {value}")
    return int(value)


def model(value: Any) -> None:
    """What attacks can ask: a module or a function."""
    if not callable(value):
        raise BadTypeError(f"model must be callable, images to logits, got {_kind(value)}")


def transformed() -> bool:
    """Whether a torch.func transform (vmap, grad, jvp, ...) or forward-mode AD is active."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def has_tangent(value: Any) -> bool:
    """Whether a tensor carries a forward-mode derivative."""
    return forward_ad._current_level >= 0 and isinstance(value, Tensor) and forward_ad.unpack_dual(value)[1] is not None


def derivative_of_backward() -> bool:
    """Whether the result of a backward may be differentiated again; the backward then runs in plain PyTorch."""
    return not torch.compiler.is_compiling() and (torch.is_grad_enabled() or transformed())


def clip_range(clip: Any, x: Tensor | None = None) -> tuple[Any, Any]:
    """(low, high) of a clip argument for images x (N,C,H,W); None is no clip.

    Two floats; or, where either is given per channel, two tensors (1,C,1,1) in the dtype of x. Without x only two
    floats are allowed.
    """
    if clip is None:
        return -math.inf, math.inf
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise BadTypeError(f"clip must be (low, high) or None, got {clip!r}")
    low, high = clip
    if not (type(low) is type(high) is float):
        if x is not None and (_holds_values(low) or _holds_values(high)):
            return _channels(low, high, x)
        low, high = (float(bound) if isinstance(bound, numbers.Real) else math.nan for bound in clip)
    if not low <= high:
        channels = "" if x is None else ", or one per channel"
        raise BadValueError(f"clip must be two numbers, low <= high{channels}, got {clip!r}")
    return low, high


def _holds_values(bound: Any) -> bool:
    return not isinstance(bound, numbers.Real) and (isinstance(bound, (list, tuple)) or hasattr(bound, "__array__"))


def _channels(low: Any, high: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds of a clip as (1,C,1,1), rounded to the compute dtype of x and then to that of x, as the ops round."""
    bounds = []
    for bound in (low, high):
        if not isinstance(bound, Tensor):
            try:
                bound = torch.as_tensor(bound, dtype=torch.float64).to(x.device)
            except (TypeError, ValueError, RuntimeError) as error:
                raise BadTypeError(f"clip must be two numbers, or a number per channel, got {bound!r}") from error
        if bound.is_complex() or bound.requires_grad:
            what = bound.dtype if bound.is_complex() else "one that requires a gradient, which no op has for it"
            raise BadTypeError(f"clip must be real and constant, got {what}")
        if bound.device != x.device:
            raise BadValueError(f"clip must be on the device of the images, {x.device}, got {bound.device}")
        shape = (1, x.shape[1], 1, 1)
        try:
            wide = (bound.view(-1, 1, 1) if bound.ndim == 1 else bound).expand(shape)
        except RuntimeError:
            got = tuple(bound.shape)
            raise BadValueError(f"clip must be two numbers, or a number per channel, {shape}, got {got}") from None
        bounds.append(wide.to(compute_dtype(x)).to(x.dtype))
    if readable(bounds[0]) and not bool((bounds[0] <= bounds[1]).all()):
        raise BadValueError(f"clip must have low <= high in every channel, got {low!r} and {high!r}".replace("\n", " "))
    return bounds[0], bounds[1]


def tensor(name: str, value: Any) -> Tensor:
    """A strided tensor of a floating dtype that part_fast computes with."""
    if not isinstance(value, Tensor):
        raise BadTypeError(f"{name} must be a Tensor, got {_kind(value)}")
    if value.layout is not torch.strided:
        raise BadTypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.dtype not in FLOATING:
        raise BadTypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    return value


def images(name: str, value: Any) -> Tensor:
    """(N,C,H,W), floating; returned contiguous or channels_last, copied where it is neither."""
    tensor(name, value)
    if value.ndim != 4:
        raise BadValueError(f"{name} must have shape (N,C,H,W), got {tuple(value.shape)}")
    return dense(value)


def maps(name: str, value: Any) -> Tensor:
    """(N,h,w), floating, no element shared, h and w at least 1; returned contiguous."""
    cam = tensor(name, value)
    if cam.ndim != 3 or 0 in cam.shape[1:]:
        raise BadValueError(f"{name} must have shape (N,h,w), h and w at least 1, got {tuple(cam.shape)}")
    unshared(name, cam)
    return cam.contiguous()


def features(name: str, value: Any) -> Tensor:
    """(N,K,h,w), floating, no element shared, K, h and w at least 1."""
    layer = tensor(name, value)
    if layer.ndim != 4 or 0 in layer.shape[1:]:
        raise BadValueError(f"{name} must have shape (N,K,h,w), K, h and w at least 1, got {tuple(layer.shape)}")
    unshared(name, layer)
    return layer


def alike(name: str, value: Tensor, than: str, other: Tensor, dtype: bool = True) -> None:
    """`value` has the shape, device and (if asked) dtype of `other`, the argument called `than`."""
    if value.shape != other.shape:
        raise BadValueError(f"{name} must have the shape of {than}, {tuple(other.shape)}, got {tuple(value.shape)}")
    if value.device != other.device:
        raise BadValueError(f"{name} must be on the device of {than}, {other.device}, got {value.device}")
    if dtype and value.dtype != other.dtype:
        raise BadTypeError(f"{name} must have the dtype of {than}, {other.dtype}, got {value.dtype}")


def size_of(size: Any, cam: Tensor) -> tuple[int, int]:
    """(H, W) to enlarge `cam` (N,h,w) to."""
    if type(size) is int:
        size = (size, size)
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise BadTypeError(f"size must be (H, W), got {size!r}")
    height, width = count("size", size[0]), count("size", size[1])
    if height < cam.shape[1] or width < cam.shape[2]:
        raise BadValueError(f"size must be at least the map's {tuple(cam.shape[1:])}, got {(height, width)}")
    return height, width


def dense(value: Tensor) -> Tensor:
    """(N,C,H,W) contiguous or channels_last: `value` itself, or a copy where it is neither."""
    if value.is_contiguous():
        return value
    if torch._C._are_functorch_transforms_active():  # a mapped tensor cannot be asked for channels_last
        return value.contiguous()
    if value.is_contiguous(memory_format=torch.channels_last):
        return value
    # A crop of channels_last images stays so.
    return value.contiguous(memory_format=torch.channels_last if value.stride(1) == 1 else torch.contiguous_format)


def same_format(value: Tensor, other: Tensor) -> Tensor:
    """`value` in the memory format of `other` (contiguous or channels_last); a copy only if it has not."""
    if other.is_contiguous():
        return value.contiguous()
    return value.contiguous(memory_format=torch.channels_last)


def compute_dtype(value: Tensor) -> torch.dtype:
    """What ops compute in: float64 for float64, else float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value.to(dtype)`, without a call if the dtype is the same: torch 2.11 compiles an autograd.Function that ends in
    such a call to one whose gradients are all zero."""
    return value if value.dtype == dtype else value.to(dtype)


def values(name: str, value: Tensor, low: float, high: float = math.inf) -> None:
    """Every value is finite and in [low, high]. Reads CPU tensors; CUDA ones under PART_FAST_CHECK=1."""
    if readable(value):
        _within(name, *_extremes(value), _rounded(low, value), _rounded(high, value))


def pixels(name: str, value: Any, clip: Any) -> Tensor:
    """Images (N,C,H,W) as `images` returns them, within clip where values may be read.

    A value may lie outside by 1e-6 of the larger bound or of 1, as rounding leaves images that were un-normalised.
    """
    x = images(name, value)
    low, high = clip_range(clip, x)
    if not readable(x):
        return x
    try:
        _check_pixels(name, x, low, high)
    except BadValueError as error:
        raise BadValueError(f"{error}{_remedy(x)}") from None
    return x


def _check_pixels(name: str, value: Tensor, low: Any, high: Any) -> None:
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        channels = value.detach().transpose(0, 1).flatten(1)
        for c, (channel, least, most) in enumerate(zip(channels, low.flatten(), high.flatten(), strict=True)):
            _within(name, *_extremes(channel), float(least), float(most), True, f" in channel {c}")
    else:
        _within(name, *_extremes(value), _rounded(low, value), _rounded(high, value), True)


def _remedy(value: Tensor) -> str:
    """What may be wrong with images whose values are not those of images, for the end of a message."""
    least, most = _extremes(value)
    if not (math.isfinite(least) and math.isfinite(most)):
        return "; look at what made them"
    if least >= 0 and 2 < most <= 255:
        return "; divide 8-bit images by 255"
    return "; normalise in the model, or give clip in the units of the images"


def image_units(name: str, eps: float | Tensor, clip: Any, stacklevel: int = 2) -> None:
    """Warn of an eps larger than the whole range of clip: 8 was written, say, where 8/255 is meant.

    stacklevel: of the warning; 1 is the caller of this function.
    """
    low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in clip or (-math.inf, math.inf))
    if not (readable(low) and readable(high) and (not isinstance(eps, Tensor) or readable(eps))):
        return
    eps = float(eps.detach().max()) if isinstance(eps, Tensor) else eps
    span = float((high - low).max())
    if eps > span:
        warnings.warn(
            f"{name} is in the units of the images, whose whole range is {span:g}: got {eps:g}; "
            "8 gray levels of 255 are 8/255",
            stacklevel=stacklevel + 1,
        )


def _rounded(bound: float, value: Tensor) -> float:
    return float(torch.tensor(bound, dtype=value.dtype))  # 0.6 rounded to float32 is more than 0.6


def _extremes(value: Tensor) -> tuple[float, float]:
    least, most = torch.aminmax(value.detach())
    return float(least), float(most)


def _within(
    name: str, least: float, most: float, low: float, high: float, rounding: bool = False, where: str = ""
) -> None:
    bounds = [abs(bound) for bound in (low, high) if math.isfinite(bound)]
    slack = 1e-6 * max(1.0, *bounds, 0.0) if rounding else 0.0
    if not (math.isfinite(least) and math.isfinite(most) and low - slack <= least and most <= high + slack):
        takes = f"finite and >= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        if low == -math.inf == -high:
            takes = "finite"
        got = f"{_digits(least, low)} to {_digits(most, high)}"
        raise BadValueError(f"{name} must be {takes}{where}, got values from {got}")


def _digits(value: float, bound: float) -> str:
    """A value with enough digits to differ from its bound in print."""
    text = f"{value:g}"
    return text if value == bound or text != f"{bound:g}" else f"{value:.9g}"


def labels(name: str, value: Any, x: Tensor, classes: int | None = None, soft: bool = False) -> Tensor:
    """Class indices (N,), int64, on the device of the images x; in [0, classes) where values may be read.

    soft: or probabilities (N,classes), floating, whose rows sum to 1, as mixup, cutmix and label smoothing make them.
    """
    if soft and isinstance(value, Tensor) and value.is_floating_point():
        return _probabilities(name, value, x, classes)
    takes = "an int64 tensor of class indices" + (", or a floating one of probabilities (N,classes)" if soft else "")
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise BadTypeError(f"{name} must be {takes}, got {got}")
    if value.shape != x.shape[:1]:
        raise BadValueError(f"{name} must have shape ({x.shape[0]},), one class per image, got {tuple(value.shape)}")
    if value.device != x.device:
        raise BadValueError(f"{name} must be on the device of x, {x.device}, got {value.device}")
    if readable(value):
        least, most = (int(bound) for bound in torch.aminmax(value))
        if least < 0 or (classes is not None and most >= classes):
            takes = "class indices >= 0" if classes is None else f"class indices in [0, {classes})"
            raise BadValueError(f"{name} must be {takes}, got values from {least} to {most}")
    return value


def logits(value: Any, x: Tensor) -> Tensor:
    """The output of `model` for the images x: logits (N,classes), floating."""
    if not isinstance(value, Tensor):
        takes = f"logits ({x.shape[0]}, classes), a Tensor"
        got = type(value).__name__
        raise BadTypeError(f"model must give {takes}, got {got}: wrap it in a module that returns the logits alone")
    if value.ndim != 2 or value.shape[0] != x.shape[0]:
        raise BadValueError(f"model must give logits ({x.shape[0]}, classes), got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise BadTypeError(f"model must give floating logits, got {value.dtype}")
    return value


def _probabilities(name: str, value: Tensor, x: Tensor, classes: int | None) -> Tensor:
    tensor(name, value)
    if value.ndim != 2 or len(value) != len(x) or (classes is not None and value.shape[1] != classes):
        takes = f"({len(x)}, {'classes' if classes is None else classes})"
        raise BadValueError(f"{name} must have shape {takes} if it holds probabilities, got {tuple(value.shape)}")
    if value.device != x.device:
        raise BadValueError(f"{name} must be on the device of x, {x.device}, got {value.device}")
    values(name, value, 0)
    if readable(value):
        least, most = _extremes(value.double().sum(1))
        slack = 1e-3 if value.element_size() >= 4 else 2e-2  # rounding changes each value of a row by up to 0.4%
        if not (1 - slack <= least and most <= 1 + slack):
            raise BadValueError(f"{name} must have rows that sum to 1, got sums from {least:g} to {most:g}")
    return value


def indices(name: str, value: Any, samples: int, device: torch.device) -> Tensor:
    """Of samples of a bank: int64 (B,), on its device, from 0 to samples - 1 where values may be read."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.ndim != 1:
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise BadTypeError(f"{name} must be int64 (B,), got {got}")
    if value.device != device:
        raise BadValueError(f"{name} must be on the device of the bank, {device}, got {value.device}")
    if readable(value):
        least, most = (int(bound) for bound in torch.aminmax(value))
        if least < 0 or most >= samples:
            raise BadValueError(f"{name} must be in [0, {samples}), got values from {least} to {most}")
    return value


def readable(value: Tensor) -> bool:
    """Whether values may be looked at: on a CPU, and on a GPU, which waits for it, where PART_FAST_CHECK=1 asks for it;
    never in a graph that is traced or captured."""
    if value.numel() == 0 or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if value.is_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return False
    return value.device.type == "cpu" or os.environ.get("PART_FAST_CHECK") == "1"


def unshared(name: str, value: Tensor) -> None:
    """No two elements of `value` lie at one place in memory, as those of an expanded tensor do."""
    if value.is_contiguous():  # the usual case, and quick to tell
        return
    dims = sorted((s, d) for s, d in zip(value.stride(), value.shape, strict=True) if d > 1)
    span = 1
    for stride, extent in dims:
        if stride < span:
            raise BadValueError(f"{name} must not share elements (expanded?), got {_strides(value)}")
        span = stride * (extent - 1) + span


def _strides(value: Tensor) -> str:
    return f"strides {value.stride()} for shape {tuple(value.shape)}"


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
