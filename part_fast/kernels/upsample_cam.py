"""upsample_cam in Triton, and the enlarged map as a program of cam_mask and epsilon_map sees it, tile by tile."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from part_fast.kernels import INTERPRETED, Launch, divide, divide_by, narrow, widen

# Pixels of a thread: with four, their values and weights would take so many registers that a multiprocessor held half
# of its warps.
EACH = 2
MOST_WARPS = 16
# Elements of a table that a thread holds at most; they stay in its registers from tile to tile.
MOST_KEPT = 8
BWD_WARPS = 8


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How one image (height, width) enlarged from (h, w) is cut, as the kernels' common constexprs.

    A tile is BLOCK pixels of a row-major walk. TABLE by WIDE, with padding, is the map enlarged along its rows alone,
    and TALL is the image's rows, whose four weights are made once: where they fit, a pixel takes four values of each
    instead of sixteen of the map; 0 where they do not. A thread holds its part of both between the tiles, so that they
    may not be large. What goes through shared memory has an element a thread at least: warps with the same element
    would all store it.

    A small image has fewer warps, so that a multiprocessor holds more of them: three quarters of what fits, so that
    several images a block could not fill it better.
    """

    count: int
    warps: int
    constants: dict[str, Any]


def tiles_of(cam: Tensor, height: int, width: int, lean: bool = False) -> Tiles:
    """The tiles for maps `cam` (N,h,w). lean: for a kernel that holds much besides u; then a thread has one pixel."""
    pixels = triton.next_power_of_2(max(1, height * width))
    warps = max(2, min(MOST_WARPS, pixels // (32 * EACH)))
    each = EACH
    if lean and pixels > 32 * MOST_WARPS * EACH:
        warps, each = MOST_WARPS if pixels > 8192 else MOST_WARPS // 2, 1
    threads = 32 * warps
    block = max(threads, min(pixels, 1 << 18 if INTERPRETED else threads * each))
    small_height, small_width = cam.shape[1:]
    wide = triton.next_power_of_2(max(1, width))
    maps = max(triton.next_power_of_2(small_height * small_width), threads)
    table = max(triton.next_power_of_2(small_height), threads // wide)
    tall = max(triton.next_power_of_2(max(1, height)), threads // 4)
    return Tiles(
        triton.cdiv(height * width, block),
        warps,
        {
            "MAP_HEIGHT": small_height, "MAP_WIDTH": small_width, "HEIGHT": height, "WIDTH": width,
            "BLOCK": block, "WIDE": wide, "MAPS": maps if maps <= MOST_KEPT * threads else 0,
            "TABLE": table if table * wide <= MOST_KEPT * threads else 0,
            "TALL": tall if 4 * tall <= MOST_KEPT * threads else 0,
            "THREADS": threads, "DTYPE": tl.float64 if cam.dtype == torch.float64 else tl.float32,
        },
    )  # fmt: skip


@triton.jit
def extrema(cam, COUNT: tl.constexpr, THREADS: tl.constexpr, DTYPE: tl.constexpr):
    """(minimum, maximum) of COUNT values, each of shape (1,); both NaN if one is NaN."""
    BLOCK: tl.constexpr = max(THREADS, min(triton.next_power_of_2(COUNT), 1024))
    low = tl.full((1,), float("inf"), DTYPE)
    high = tl.full((1,), float("-inf"), DTYPE)
    for start in range(0, COUNT, BLOCK):
        place = start + tl.arange(0, BLOCK)
        value = widen(tl.load(cam + place, mask=place < COUNT, other=0))
        # Past the end stands the first value again, which changes neither.
        value = tl.where(place < COUNT, value, widen(tl.load(cam + tl.zeros_like(place))))
        unknown = tl.max((value != value).to(tl.int32), 0, keep_dims=True) > 0
        least, most = tl.min(value, 0, keep_dims=True), tl.max(value, 0, keep_dims=True)
        # Written so that a NaN, once there, stays.
        low = tl.where(unknown, float("nan"), tl.where(least < low, least, low))
        high = tl.where(unknown, float("nan"), tl.where(most > high, most, high))
    return low, high


@triton.jit
def first_tap(position, SIZE_IN: tl.constexpr, SIZE_OUT: tl.constexpr):
    """Index of the first of the four taps of an output position."""
    # Shifted by periods, since division of a negative number would not round down. By so many that LLVM cannot divide
    # in 16 bits: ptxas miscompiles a repeated add.s16x2 on sm_90 (triton issue 11581).
    PERIODS: tl.constexpr = (1 << 16) // (2 * SIZE_OUT) + 1
    shifted = (2 * position + 1) * SIZE_IN + (2 * PERIODS - 1) * SIZE_OUT
    return shifted // (2 * SIZE_OUT) - (PERIODS + 1)


@triton.jit
def keys_taps(position, SIZE_IN: tl.constexpr, SIZE_OUT: tl.constexpr, DTYPE: tl.constexpr):
    """(index of the first of four taps, their weights), by the operations of ops.upsample_cam.keys_taps, in order."""
    left = first_tap(position, SIZE_IN, SIZE_OUT) + 1
    remainder = ((2 * position + 1) * SIZE_IN - SIZE_OUT - left * (2 * SIZE_OUT)).to(DTYPE)
    period = tl.full(remainder.shape, 2 * SIZE_OUT, DTYPE)
    phase = divide_by(remainder, period, tl.full(remainder.shape, 1 / (2 * SIZE_OUT), DTYPE))
    w0, w1, w2, w3 = outer_tap(phase + 1), inner_tap(phase), inner_tap(1 - phase), outer_tap(2 - phase)
    zero = tl.zeros_like(phase)
    w0 = tl.where((left >= 1) & (left - 1 < SIZE_IN), w0, zero)
    w1 = tl.where((left >= 0) & (left < SIZE_IN), w1, zero)
    w2 = tl.where((left >= -1) & (left + 1 < SIZE_IN), w2, zero)
    w3 = tl.where((left >= -2) & (left + 2 < SIZE_IN), w3, zero)
    total = ((w0 + w1) + w2) + w3
    inverse = divide(zero + 1, total)
    w0, w1 = divide_by(w0, total, inverse), divide_by(w1, total, inverse)
    return left - 1, w0, w1, divide_by(w2, total, inverse), divide_by(w3, total, inverse)


@triton.jit
def outer_tap(far):
    return ((-0.5 * far + 2.5) * far - 4) * far + 2


@triton.jit
def inner_tap(near):
    return (1.5 * near - 2.5) * near * near + 1


@triton.jit
def within(index, SIZE: tl.constexpr):
    return tl.minimum(tl.maximum(index, 0), SIZE - 1)


@triton.jit
def normalized(cam, low, high, place):
    value = (widen(tl.load(cam + place)) - low).to(low.dtype)
    return tl.where(high == low, tl.zeros_like(value), divide(value, tl.zeros_like(value) + (high - low)))


@triton.jit
def four_of(source, place, COUNT: tl.constexpr):
    """Four elements of a flat tensor at places (COUNT, 4), each (COUNT,); through shared memory at once."""
    even, odd = tl.split(tl.reshape(tl.gather(source, tl.reshape(place, (4 * COUNT,)), 0), (COUNT, 2, 2)))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@triton.jit
def along_row(
    cam, source, low, high, row, column, MAP_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
    COUNT: tl.constexpr, MAPS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The map's rows `row` (clamped already), normalised and enlarged, at `column`, (COUNT,) each."""
    first, c0, c1, c2, c3 = keys_taps(column, MAP_WIDTH, WIDTH, DTYPE)
    row = row * MAP_WIDTH
    if MAPS > 0:
        place = row[:, None] + within(first[:, None] + tl.arange(0, 4)[None, :], MAP_WIDTH)
        v0, v1, v2, v3 = four_of(source, place, COUNT)
    else:
        v0 = normalized(cam, low, high, row + within(first, MAP_WIDTH))
        v1 = normalized(cam, low, high, row + within(first + 1, MAP_WIDTH))
        v2 = normalized(cam, low, high, row + within(first + 2, MAP_WIDTH))
        v3 = normalized(cam, low, high, row + within(first + 3, MAP_WIDTH))
    return ((v0 * c0 + v1 * c1) + v2 * c2) + v3 * c3


@triton.jit
def tables_of(
    cam, low, high, MAP_HEIGHT: tl.constexpr, MAP_WIDTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr, MAPS: tl.constexpr, TABLE: tl.constexpr, TALL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(the map, normalised and if TABLE enlarged along its rows; the weights of the image's rows by tap), both flat."""
    source, weights = low, low
    if MAPS > 0:
        source = normalized(cam, low, high, tl.minimum(tl.arange(0, MAPS), MAP_HEIGHT * MAP_WIDTH - 1))
    if TABLE > 0:
        place = tl.arange(0, TABLE * WIDE)
        source = along_row(
            cam, source, low, high, within(place // WIDE, MAP_HEIGHT), place % WIDE,
            MAP_WIDTH, WIDTH, TABLE * WIDE, MAPS, DTYPE,
        )  # fmt: skip
    if TALL > 0:
        tap = tl.arange(0, 4 * TALL) // TALL
        _, r0, r1, r2, r3 = keys_taps(tl.arange(0, 4 * TALL) % TALL, MAP_HEIGHT, HEIGHT, DTYPE)
        weights = tl.where(tap == 0, r0, tl.where(tap == 1, r1, tl.where(tap == 2, r2, r3)))
    return source, weights


@triton.jit
def row_weights(
    weights, row, MAP_HEIGHT: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr, TALL: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    if TALL > 0:
        r0, r1, r2, r3 = four_of(weights, tl.arange(0, 4)[None, :] * TALL + row[:, None], BLOCK)
    else:
        _, r0, r1, r2, r3 = keys_taps(row, MAP_HEIGHT, HEIGHT, DTYPE)
    return r0, r1, r2, r3


@triton.jit
def enlarged(
    cam, source, weights, low, high, pixel, MAP_HEIGHT: tl.constexpr, MAP_WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, MAPS: tl.constexpr,
    TABLE: tl.constexpr, TALL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """u = upsample_cam(cam) at BLOCK pixels by their row-major index; past the image, at any."""
    row, column = tl.minimum(pixel // WIDTH, HEIGHT - 1), pixel % WIDTH
    top = first_tap(row, MAP_HEIGHT, HEIGHT)
    if TABLE > 0:
        place = within(top[:, None] + tl.arange(0, 4)[None, :], MAP_HEIGHT) * WIDE + column[:, None]
        v0, v1, v2, v3 = four_of(source, place, BLOCK)
    else:
        v0 = along_row(
            cam, source, low, high, within(top, MAP_HEIGHT), column, MAP_WIDTH, WIDTH, BLOCK, MAPS, DTYPE
        )  # fmt: skip
        v1 = along_row(
            cam, source, low, high, within(top + 1, MAP_HEIGHT), column, MAP_WIDTH, WIDTH, BLOCK, MAPS, DTYPE
        )  # fmt: skip
        v2 = along_row(
            cam, source, low, high, within(top + 2, MAP_HEIGHT), column, MAP_WIDTH, WIDTH, BLOCK, MAPS, DTYPE
        )  # fmt: skip
        v3 = along_row(
            cam, source, low, high, within(top + 3, MAP_HEIGHT), column, MAP_WIDTH, WIDTH, BLOCK, MAPS, DTYPE
        )  # fmt: skip
    # The weights last, right before their use, so that less is held at a time.
    r0, r1, r2, r3 = row_weights(weights, row, MAP_HEIGHT, HEIGHT, BLOCK, TALL, DTYPE)
    return ((v0 * r0 + v1 * r1) + v2 * r2) + v3 * r3


@triton.jit
def upsample_cam_fwd_kernel(
    cam, out, tiles, MAP_HEIGHT: tl.constexpr, MAP_WIDTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, MAPS: tl.constexpr, TABLE: tl.constexpr, TALL: tl.constexpr,
    THREADS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // tiles).to(tl.int64)
    cam += image * (MAP_HEIGHT * MAP_WIDTH)
    low, high = extrema(cam, MAP_HEIGHT * MAP_WIDTH, THREADS, DTYPE)
    source, weights = tables_of(cam, low, high, MAP_HEIGHT, MAP_WIDTH, HEIGHT, WIDTH, WIDE, MAPS, TABLE, TALL, DTYPE)
    pixel = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    u = enlarged(
        cam, source, weights, low, high, pixel,
        MAP_HEIGHT, MAP_WIDTH, HEIGHT, WIDTH, BLOCK, WIDE, MAPS, TABLE, TALL, DTYPE,
    )  # fmt: skip
    tl.store(out + image * (HEIGHT * WIDTH) + pixel, narrow(u, out.dtype.element_ty), mask=pixel < HEIGHT * WIDTH)


def upsample_cam_launch(cam: Tensor, height: int, width: int, out: Tensor) -> Launch:
    tiles = tiles_of(cam, height, width)
    return Launch(
        upsample_cam_fwd_kernel, cam.shape[0] * tiles.count,
        {"cam": cam, "out": out, "tiles": tiles.count}, tiles.constants, tiles.warps,
    )  # fmt: skip


def upsample_cam(cam: Tensor, height: int, width: int) -> Tensor:
    out = cam.new_empty((cam.shape[0], height, width))
    upsample_cam_launch(cam, height, width, out).run()
    return out


@triton.jit
def upsample_cam_bwd_kernel(
    grad_out, cam, out, MAP_HEIGHT: tl.constexpr, MAP_WIDTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    DOWN: tl.constexpr, ACROSS: tl.constexpr, SPAN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A program per image. The map's gradient is made in tiles of DOWN x ACROSS from SPAN pixels of a row at a time."""
    image = tl.program_id(0).to(tl.int64)
    cam += image * (MAP_HEIGHT * MAP_WIDTH)
    out += image * (MAP_HEIGHT * MAP_WIDTH)
    grad_out += image * (HEIGHT * WIDTH)
    COUNT: tl.constexpr = MAP_HEIGHT * MAP_WIDTH
    BLOCK: tl.constexpr = min(triton.next_power_of_2(COUNT), 1024)
    low, high = extrema(cam, COUNT, BLOCK, DTYPE)
    spread = high - low
    lowest = tl.zeros((1,), DTYPE)
    highest = tl.zeros((1,), DTYPE)
    for start in range(0, COUNT, BLOCK):
        place = start + tl.arange(0, BLOCK)
        value = widen(tl.load(cam + place, mask=place < COUNT, other=float("nan")))
        lowest += tl.sum((value == low).to(DTYPE), 0, keep_dims=True)
        highest += tl.sum((value == high).to(DTYPE), 0, keep_dims=True)

    # What the minimum and the maximum get for having set the scale: sums over the map of the scaled map's gradient and
    # of its product with the scaled map. A map of more than one tile has its gradient made twice.
    ONE: tl.constexpr = (MAP_HEIGHT <= DOWN) & (MAP_WIDTH <= ACROSS)
    straight = tl.zeros((1,), DTYPE)
    weighted = tl.zeros((1,), DTYPE)
    grad = tl.zeros((DOWN, ACROSS), DTYPE)
    for down in range(0, MAP_HEIGHT, DOWN):
        for across in range(0, MAP_WIDTH, ACROSS):
            j = down + tl.arange(0, DOWN)[:, None]
            i = across + tl.arange(0, ACROSS)[None, :]
            inside = (j < MAP_HEIGHT) & (i < MAP_WIDTH)
            grad = scaled_gradient(grad_out, j, i, MAP_HEIGHT, MAP_WIDTH, HEIGHT, WIDTH, DOWN, ACROSS, SPAN, DTYPE)
            grad = tl.where(inside, grad, 0.0)
            value = widen(tl.load(cam + j * MAP_WIDTH + i, mask=inside, other=0))
            scaled = tl.where(inside & (spread != 0), (value - low) / spread, 0.0)
            straight += tl.sum(tl.sum(grad, 1), 0, keep_dims=True)
            weighted += tl.sum(tl.sum(scaled * grad, 1), 0, keep_dims=True)
    from_low = (weighted - straight) / lowest
    from_high = -weighted / highest
    for down in range(0, MAP_HEIGHT, DOWN):
        for across in range(0, MAP_WIDTH, ACROSS):
            j = down + tl.arange(0, DOWN)[:, None]
            i = across + tl.arange(0, ACROSS)[None, :]
            inside = (j < MAP_HEIGHT) & (i < MAP_WIDTH)
            if not ONE:
                grad = scaled_gradient(grad_out, j, i, MAP_HEIGHT, MAP_WIDTH, HEIGHT, WIDTH, DOWN, ACROSS, SPAN, DTYPE)
            value = widen(tl.load(cam + j * MAP_WIDTH + i, mask=inside, other=0))
            result = grad + tl.where(value == low, from_low, 0.0) + tl.where(value == high, from_high, 0.0)
            result = tl.where(spread == 0, 0.0, result / spread)
            tl.store(out + j * MAP_WIDTH + i, narrow(result, out.dtype.element_ty), mask=inside)


@triton.jit
def scaled_gradient(
    grad_out, j, i, MAP_HEIGHT: tl.constexpr, MAP_WIDTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    DOWN: tl.constexpr, ACROSS: tl.constexpr, SPAN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradient of the scaled map at rows j (DOWN, 1) and columns i (1, ACROSS)."""
    grad = tl.zeros((DOWN, ACROSS), DTYPE)
    for first in range(0, WIDTH, SPAN):
        x = first + tl.arange(0, SPAN)[:, None]
        # Past the row's end no tap falls on the map, and its weights are 0 / 0.
        across_weight = tl.where(x < WIDTH, weight_on(x, i, MAP_WIDTH, WIDTH, DTYPE), 0.0)
        for y in range(HEIGHT):
            g = widen(tl.load(grad_out + y * WIDTH + x, mask=x < WIDTH, other=0)).to(DTYPE)
            part = tl.sum(g * across_weight, 0, keep_dims=True)
            grad += weight_on(tl.zeros_like(j) + y, j, MAP_HEIGHT, HEIGHT, DTYPE) * part
    return grad


@triton.jit
def weight_on(position, index, SIZE_IN: tl.constexpr, SIZE_OUT: tl.constexpr, DTYPE: tl.constexpr):
    """Weight with which map index `index` enters output `position`; several taps fall on a single row of a map."""
    first, w0, w1, w2, w3 = keys_taps(position, SIZE_IN, SIZE_OUT, DTYPE)
    zero = tl.zeros_like(w0)
    # Taps outside the map weigh 0, so that they need not be clamped to be left out.
    weight = tl.where(index == first, w0, zero) + tl.where(index == first + 1, w1, zero)
    return weight + tl.where(index == first + 2, w2, zero) + tl.where(index == first + 3, w3, zero)


def upsample_cam_bwd_launch(grad_out: Tensor, cam: Tensor, out: Tensor) -> Launch:
    (small_height, small_width), (height, width) = cam.shape[1:], grad_out.shape[1:]
    constants = {
        "MAP_HEIGHT": small_height, "MAP_WIDTH": small_width, "HEIGHT": height, "WIDTH": width,
        "DOWN": min(triton.next_power_of_2(small_height), 32), "ACROSS": min(triton.next_power_of_2(small_width), 16),
        "SPAN": min(triton.next_power_of_2(max(1, width)), 256),
        "DTYPE": tl.float64 if cam.dtype == torch.float64 else tl.float32,
    }  # fmt: skip
    return Launch(
        upsample_cam_bwd_kernel, cam.shape[0], {"grad_out": grad_out, "cam": cam, "out": out}, constants, BWD_WARPS
    )


def upsample_cam_bwd(grad_out: Tensor, cam: Tensor) -> Tensor:
    out = torch.empty_like(cam)
    upsample_cam_bwd_launch(grad_out, cam, out).run()
    return out
