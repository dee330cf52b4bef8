"""bank_start: an attack's start from a remembered perturbation, cropped and flipped as its image was."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from part_fast import backends, checks
from part_fast.checks import Clip
from part_fast.errors import BadTypeError, BadValueError, CannotRunError
from part_fast.ops.packed_epsilon import PackedEpsilon, dense_eps, eps_arguments
from part_fast.ops.project_linf import clamped


def sources(places: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(index, inside), both (N,1,H*W): which stored pixel each pixel of an image is, and whether there is one."""
    dy, dx, flip = (column.view(-1, 1, 1) for column in places[:, 1:].unbind(1))
    rows = torch.arange(height, device=places.device).view(1, -1, 1) + dy.clamp(-height, height)
    columns = torch.arange(width, device=places.device).view(1, 1, -1)
    columns = torch.where(flip != 0, width - 1 - columns, columns) + dx.clamp(-width, width)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    index = rows.clamp(0, max(height - 1, 0)) * width + columns.clamp(0, max(width - 1, 0))
    return index.flatten(1).unsqueeze(1), inside.flatten(1).unsqueeze(1)


def _reference(
    x: Tensor, bank: Tensor, places: Tensor, eps: Tensor | None, eps_high: float, eps_low: float,
    unit: float, clip_low: float, clip_high: float,
) -> Tensor:  # fmt: skip
    dtype = checks.compute_dtype(x)
    bound = dense_eps(eps, eps_high, eps_low, x)
    sample = places[:, 0]
    known = (sample >= 0) & (sample < len(bank))
    index, inside = sources(places, x.shape[2], x.shape[3])
    stored = bank.flatten(2)[torch.where(known, sample, 0)] if len(bank) else x.new_zeros(x.shape).flatten(2)
    moved = stored.gather(2, index.expand(stored.shape)).to(dtype) * unit
    moved = moved.masked_fill(~inside, 0.0).masked_fill(~known.view(-1, 1, 1), math.nan).view(x.shape)
    result = torch.clamp(x.to(dtype) + clamped(moved, bound), clip_low, clip_high)
    return torch.empty_like(x).copy_(result)


_bank_start = backends.define(
    "_bank_start(Tensor x, Tensor bank, Tensor places, Tensor? eps, float eps_high, float eps_low, float unit, "
    "float clip_low, float clip_high) -> Tensor",
    _reference,
    lambda x, *args: torch.empty_like(x),
    kernels="bank_start",
)


def bank_start(
    x: Tensor,
    bank: Tensor,
    places: Tensor,
    eps: float | Tensor | PackedEpsilon,
    clip: Clip = (0.0, 1.0),
    *,
    scale: float,
) -> Tensor:
    """Images moved by the perturbation that each sample had before, within each pixel's own eps, and clipped.

    x: images (N,C,H,W), cropped and flipped as `places` says. What is neither contiguous nor channels_last is copied.
    bank: int8 (S,C,H,W), contiguous: value q of a stored, unaugmented sample stands for q * scale / 127, image units.
    places: int64 (N,4), rows (sample, dy, dx, flip) with the numbers of an `Augmentation`: pixel (r, c) takes stored
        pixel (r + dy, c + dx), with W-1-c for c where flip is 1, and 0 where that lies outside.
    eps: of the pixels of x, image units (8/255); a float, a tensor that broadcasts to x, or a PackedEpsilon.
    clip: (low, high), or None for no clip; each a number or one per channel, as in `pgd_step`.
    scale: the largest perturbation that the bank holds, image units, > 0.
    Returns a new tensor like x. NaN in x or eps stays NaN. No derivative: the result does not require grad.

    Equivalent to, with `drawn = Augmentation(places[:, 1], places[:, 2], places[:, 3] != 0)`:
    `delta = drawn.apply(bank[places[:, 0]].float() * (scale / 127))` and
    `torch.clamp(x + torch.clamp(delta, -eps, eps), *clip)`, computed in float32 and rounded once: every backend returns
    the same bits.
    Source: Jia et al., "Prior-guided adversarial initialization for fast adversarial training", ECCV 2022, section 3.
    Errors: TypeError or ValueError that names the argument, before anything is computed. A sample outside the bank, or
        a flip other than 0 and 1, is an error where values may be read (CPU tensors, and CUDA ones under
        PART_FAST_CHECK=1); elsewhere such a sample's image is all NaN.
    """
    x = checks.images("x", x).detach()
    scale = bank_arguments(bank, places, scale, "x", x)
    bound, eps_high, eps_low = eps_arguments(eps, x)
    bound = None if bound is None else bound.detach()
    low, high = checks.clip_range(clip, x)
    tensors = x, bank, places.contiguous(), bound
    if isinstance(low, Tensor):
        # As in pgd_step: rounding keeps order.
        free = _bank_start(*tensors, eps_high, eps_low, scale / 127, -math.inf, math.inf)
        return torch.clamp(free, low, high)
    return _bank_start(*tensors, eps_high, eps_low, scale / 127, low, high)


def bank_arguments(bank: Any, places: Any, scale: Any, than: str, x: Tensor) -> float:
    """Check a bank and its places for the images x, the argument called `than`; the checked scale."""
    if torch._C._are_functorch_transforms_active():
        raise CannotRunError("bank must be used outside of torch.func transforms, which have no rule for it")
    for name, value, dtype in (("bank", bank, torch.int8), ("places", places, torch.int64)):
        if not isinstance(value, Tensor) or value.dtype != dtype:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise BadTypeError(f"{name} must be a tensor of {dtype}, got {got}")
        if value.layout is not torch.strided:
            raise BadTypeError(f"{name} must be a dense tensor, got layout {value.layout}")
        if value.device != x.device:
            raise BadValueError(f"{name} must be on the device of {than}, {x.device}, got {value.device}")
    if bank.ndim != 4 or bank.shape[1:] != x.shape[1:]:
        takes = ", ".join(str(size) for size in ("S", *x.shape[1:]))
        raise BadValueError(f"bank must have shape ({takes}), as the images, got {tuple(bank.shape)}")
    if not bank.is_contiguous():
        raise BadValueError(f"bank must be contiguous, got strides {bank.stride()} for shape {tuple(bank.shape)}")
    if places.shape != (len(x), 4):
        takes = f"({len(x)}, 4), a row (sample, dy, dx, flip) per image"
        raise BadValueError(f"places must have shape {takes}, got {tuple(places.shape)}")
    scale = checks.number("scale", scale)
    if scale <= 0:
        raise BadValueError(f"scale must be > 0, got {scale:g}")
    if checks.readable(places):
        _check_places(places, len(bank))
    return scale


def _check_places(places: Tensor, samples: int) -> None:
    (least, most), (straight, flipped) = ([int(v) for v in torch.aminmax(places[:, column])] for column in (0, 3))
    if least < 0 or most >= samples:
        raise BadValueError(f"places must have samples in [0, {samples}), got samples from {least} to {most}")
    if straight < 0 or flipped > 1:
        raise BadValueError(f"places must have 0 or 1 as flip, got values from {straight} to {flipped}")
