"""bank_start in Triton, and which stored value each element of the images has (also for eps_step_)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from part_fast.kernels import Launch, clamp, narrow, widen
from part_fast.kernels.images import BITS, PIXEL, WARPS, bound_of, row_tile_of, walk


@triton.jit
def stored_at(
    places, samples, pixels, width, row, repeat, start, inside,
    SOURCE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, REPEAT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(place in the bank, whether there is one, whether the image's sample is in the bank) of a tile's elements.

    The tile is one of a walk by images.
    """
    position = start + tl.arange(0, BLOCK)
    if (SOURCE == BITS) & (REPEAT == 1):
        image, channel, pixel = row // CHANNELS, row % CHANNELS, position
    elif (SOURCE == BITS) | (SOURCE == PIXEL):
        image, channel, pixel = row, repeat, position
    elif CHANNELS_LAST:
        image, channel, pixel = row, position % CHANNELS, position // CHANNELS
    else:
        image, channel, pixel = row, position // pixels, position % pixels
    drawn = places + image.to(tl.int64) * 4
    sample, flip = tl.load(drawn), tl.load(drawn + 3)
    height = pixels // width
    # Further than the whole image is outside, whatever it is.
    dy = tl.minimum(tl.maximum(tl.load(drawn + 1), -height), height).to(tl.int32)
    dx = tl.minimum(tl.maximum(tl.load(drawn + 2), -width), width).to(tl.int32)
    line, column = pixel // width + dy, pixel % width
    column = tl.where(flip != 0, width - 1 - column, column) + dx
    known = (sample >= 0) & (sample < samples)
    there = known & (line >= 0) & (line < height) & (column >= 0) & (column < width)
    if inside is not None:
        there = there & inside
    return sample * CHANNELS * pixels + (channel * pixels + line * width + column), there, known


@triton.jit
def bank_start_tile(
    x, bank, places, out, samples, unit, clip_low, clip_high, budget, row, start, span, inside,
    SOURCE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, REPEAT: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    bound = bound_of(budget, row, start, span, inside, SOURCE, CHANNELS, CHANNELS_LAST, BLOCK, DTYPE)
    low, high = tl.full((1,), clip_low, DTYPE), tl.full((1,), clip_high, DTYPE)
    first = row * (span * REPEAT) + start
    for repeat in range(REPEAT):
        place = first + repeat * span + tl.arange(0, BLOCK)
        stored, there, known = stored_at(
            places, samples, budget[3], budget[4], row, repeat, start, inside,
            SOURCE, CHANNELS, CHANNELS_LAST, REPEAT, BLOCK,
        )  # fmt: skip
        moved = tl.load(bank + stored, mask=there, other=0).to(DTYPE) * tl.full((1,), unit, DTYPE)
        moved = tl.where(known, moved, float("nan"))
        result = clamp(widen(tl.load(x + place, mask=inside)) + clamp(moved, -bound, bound), low, high)
        tl.store(out + place, narrow(result, out.dtype.element_ty), mask=inside)


@triton.jit
def bank_start_kernel(
    x, bank, places, out, samples, unit: tl.float64, clip_low: tl.float64, clip_high: tl.float64,
    eps, eps_high: tl.float64, eps_low: tl.float64, span, tiles, pixels, width, stride_n, stride_c, stride_h, stride_w,
    SOURCE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, REPEAT: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    budget = (eps, eps_high, eps_low, pixels, width, stride_n, stride_c, stride_h, stride_w)
    row, start = row_tile_of(tiles, INDEX, BLOCK)
    if start + BLOCK <= span:
        # No mask: whatever the size, only the last tile has narrow accesses.
        bank_start_tile(
            x, bank, places, out, samples, unit, clip_low, clip_high, budget, row, start, span, None,
            SOURCE, CHANNELS, CHANNELS_LAST, REPEAT, BLOCK, DTYPE,
        )  # fmt: skip
    else:
        bank_start_tile(
            x, bank, places, out, samples, unit, clip_low, clip_high, budget, row, start, span,
            start + tl.arange(0, BLOCK) < span, SOURCE, CHANNELS, CHANNELS_LAST, REPEAT, BLOCK, DTYPE,
        )  # fmt: skip


def bank_start(
    x: Tensor, bank: Tensor, places: Tensor, eps: Tensor | None, eps_high: float, eps_low: float,
    unit: float, clip_low: float, clip_high: float,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(x)
    way = walk(x, eps, eps_high, eps_low, x.element_size(), by_image=True)
    Launch(
        bank_start_kernel, way.programs,
        {
            "x": x, "bank": bank, "places": places, "out": out, "samples": len(bank),
            "unit": unit, "clip_low": clip_low, "clip_high": clip_high, **way.arguments,
        },
        way.constants, WARPS,
    ).run()  # fmt: skip
    return out
