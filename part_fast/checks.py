"""Argument checks, the same for every backend: one line that names the argument, what it got, what it takes.

The checks read shapes, dtypes, devices, layouts and Python scalars, never the values of a tensor,
which would make a GPU wait. `values` is for the entry of attacks, budgets and losses.
"""

from __future__ import annotations

import math
import numbers
import os
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def number(name: str, value: Any, low: float = -math.inf) -> float:
    """A finite Python number, at least `low`."""
    if type(value) is not float:
        if type(value) is bool or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {_kind(value)}")
        value = float(value)
    if not (math.isfinite(value) and value >= low):
        takes = "finite" if low == -math.inf else f"finite and >= {low:g}"
        raise ValueError(f"{name} must be {takes}, got {value}")
    return value


def count(name: str, value: Any, low: int = 0) -> int:
    """A whole number, at least `low`."""
    if type(value) is not int and (type(value) is bool or not isinstance(value, numbers.Integral)):
        raise TypeError(f"{name} must be a whole number, got {_kind(value)}")
    if value < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")
    return int(value)


def seed(name: str, value: Any) -> int:
    """A whole number that torch's generators take: from 0 to 2**63 - 1."""
    if count(name, value) >= 2**63:
        raise ValueError(f"{name} must be < 2**63, got {value}")
    return int(value)


def clip_range(clip: Any) -> tuple[float, float]:
    """(low, high) of a clip argument; None is no clip."""
    if clip is None:
        return -math.inf, math.inf
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise TypeError(f"clip must be (low, high) or None, got {clip!r}")
    low, high = (
        value if type(value) is float else float(value) if isinstance(value, numbers.Real) else math.nan
        for value in clip
    )
    if not low <= high:
        raise ValueError(f"clip must be two numbers, low <= high, got {clip!r}")
    return low, high


def tensor(name: str, value: Any) -> Tensor:
    """A strided tensor of a floating dtype that part_fast computes with."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {_kind(value)}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    return value


def images(name: str, value: Any) -> Tensor:
    """(N,C,H,W), floating, contiguous or channels_last."""
    tensor(name, value)
    if value.ndim != 4:
        raise ValueError(f"{name} must have shape (N,C,H,W), got {tuple(value.shape)}")
    if not (value.is_contiguous() or value.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(f"{name} must be contiguous or channels_last, got {_strides(value)}")
    return value


def maps(name: str, value: Any) -> Tensor:
    """(N,h,w), floating, no element shared, h and w at least 1; returned contiguous."""
    tensor(name, value)
    if value.ndim != 3 or 0 in value.shape[1:]:
        raise ValueError(f"{name} must have shape (N,h,w), h and w at least 1, got {tuple(value.shape)}")
    _unshared(name, value)
    return value.contiguous()


def features(name: str, value: Any) -> Tensor:
    """(N,K,h,w), floating, no element shared, K, h and w at least 1."""
    tensor(name, value)
    if value.ndim != 4 or 0 in value.shape[1:]:
        raise ValueError(f"{name} must have shape (N,K,h,w), K, h and w at least 1, got {tuple(value.shape)}")
    _unshared(name, value)
    return value


def alike(name: str, value: Tensor, than: str, other: Tensor, dtype: bool = True) -> None:
    """`value` has the shape, device and (if asked) dtype of `other`, the argument called `than`."""
    if value.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {than}, {tuple(other.shape)}, got {tuple(value.shape)}")
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {than}, {other.device}, got {value.device}")
    if dtype and value.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {than}, {other.dtype}, got {value.dtype}")


def size_of(size: Any, cam: Tensor) -> tuple[int, int]:
    """(H, W) to enlarge `cam` (N,h,w) to."""
    if type(size) is int:
        size = (size, size)
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"size must be (H, W), got {size!r}")
    height, width = count("size", size[0]), count("size", size[1])
    if height < cam.shape[1] or width < cam.shape[2]:
        raise ValueError(f"size must be at least the map's {tuple(cam.shape[1:])}, got {(height, width)}")
    return height, width


def same_format(value: Tensor, other: Tensor) -> Tensor:
    """`value` in the memory format of `other` (contiguous or channels_last); a copy only if it has not."""
    if other.is_contiguous():
        return value.contiguous()
    return value.contiguous(memory_format=torch.channels_last)


def compute_dtype(value: Tensor) -> torch.dtype:
    """What ops compute in: float64 for float64, else float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def values(name: str, value: Tensor, low: float, high: float = math.inf) -> None:
    """Every value is finite and in [low, high]. Reads CPU tensors; CUDA ones under PART_FAST_CHECK=1."""
    if not _readable(value):
        return
    least, most = (float(bound) for bound in torch.aminmax(value.detach()))
    low, high = (float(torch.tensor(bound, dtype=value.dtype)) for bound in (low, high))  # 0.6 is more in float32
    if not (math.isfinite(least) and math.isfinite(most) and low <= least and most <= high):
        takes = f"finite and >= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {takes}, got values from {least:g} to {most:g}")


def labels(name: str, value: Any, x: Tensor, classes: int | None = None) -> Tensor:
    """Class indices (N,), int64, on the device of the images x; in [0, classes) where values may be read."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be an int64 tensor of class indices, got {got}")
    if value.shape != x.shape[:1]:
        raise ValueError(f"{name} must have shape ({x.shape[0]},), one class per image, got {tuple(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {value.device}")
    if _readable(value):
        least, most = (int(bound) for bound in torch.aminmax(value))
        if least < 0 or (classes is not None and most >= classes):
            takes = "class indices >= 0" if classes is None else f"class indices in [0, {classes})"
            raise ValueError(f"{name} must be {takes}, got values from {least} to {most}")
    return value


def logits(value: Any, x: Tensor) -> Tensor:
    """What `model` gave for the images x: logits (N,classes), floating."""
    if not isinstance(value, Tensor):
        takes = f"logits ({x.shape[0]}, classes), a Tensor"
        got = type(value).__name__
        raise TypeError(f"model must give {takes}, got {got}: wrap it in a module that returns the logits alone")
    if value.ndim != 2 or value.shape[0] != x.shape[0]:
        raise ValueError(f"model must give logits ({x.shape[0]}, classes), got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"model must give floating logits, got {value.dtype}")
    return value


def _readable(value: Tensor) -> bool:
    if value.numel() == 0 or torch.compiler.is_compiling():
        return False
    return value.device.type == "cpu" or os.environ.get("PART_FAST_CHECK") == "1"


def _unshared(name: str, value: Tensor) -> None:
    if value.is_contiguous():  # the usual case, and quick to tell
        return
    dims = sorted((s, d) for s, d in zip(value.stride(), value.shape, strict=True) if d > 1)
    span = 1
    for stride, extent in dims:
        if stride < span:
            raise ValueError(f"{name} must not share elements (expanded?), got {_strides(value)}")
        span = stride * (extent - 1) + span


def _strides(value: Tensor) -> str:
    return f"strides {value.stride()} for shape {tuple(value.shape)}"


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
