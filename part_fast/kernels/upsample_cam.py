"""upsample_cam in Triton, and the enlarged map as a program of cam_mask and epsilon_map sees it, tile by tile."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from part_fast.kernels import INTERPRETED, Launch, divide, divide_by, narrow, widen

# Pixels of a thread: with four, the weights of their rows take so many registers that a multiprocessor holds half of
# its warps.
EACH = 2
MOST_WARPS = 16
BWD_WARPS = 8


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How one image (height, width) enlarged from (h, w) is cut, as the kernels' common constexprs.

    A tile is ROWS whole rows, COLUMNS wide with padding. An image whose rows are no whole bytes of bits, or too long,
    is cut FLAT: a tile is COLUMNS pixels in a row-major walk. TABLE: the map enlarged along its rows alone fits on the
    chip, so that a pixel takes four values of it instead of sixteen of the map.

    A small image has fewer warps, so that a multiprocessor holds more of them. A block never has several images: a
    batch of the usual size has about as many images as a chip has multiprocessors, and none should be left without.
    """

    count: int
    warps: int
    constants: dict[str, Any]


def tiles_of(cam: Tensor, height: int, width: int) -> Tiles:
    """The tiles for maps `cam` (N,h,w)."""
    pixels = triton.next_power_of_2(max(1, height)) * triton.next_power_of_2(max(8, width))
    warps = max(2, min(MOST_WARPS, pixels // (32 * EACH)))
    limit = 1 << 18 if INTERPRETED else 32 * MOST_WARPS * EACH
    flat = width % 8 != 0 or width > limit
    if flat:
        rows, columns = 1, max(8, min(triton.next_power_of_2(height * width), limit // 2))
        count = triton.cdiv(height * width, columns)
    else:
        columns = triton.next_power_of_2(width) if width else 8
        rows = min(triton.next_power_of_2(max(1, height)), max(1, limit // columns))
        count = triton.cdiv(height, rows)
    small_height, small_width = cam.shape[1:]
    # Triton 3.8 does not compile a gather from fewer elements than the program has threads.
    table_rows = max(triton.next_power_of_2(small_height), 32 * warps // columns)
    return Tiles(
        count,
        warps,
        {
            "MAP_HEIGHT": small_height, "MAP_WIDTH": small_width, "HEIGHT": height, "WIDTH": width,
            "FLAT": flat, "ROWS": rows, "COLUMNS": columns,
            "TABLE": 0 if flat or table_rows * columns > 4 * limit else table_rows,
            "DTYPE": tl.float64 if cam.dtype == torch.float64 else tl.float32,
        },
    )  # fmt: skip


@triton.jit
def extrema(cam, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    """(minimum, maximum) of COUNT values, each of shape (1,); both NaN if one is NaN."""
    BLOCK: tl.constexpr = min(triton.next_power_of_2(COUNT), 1024)
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
def keys_taps(position, SIZE_IN: tl.constexpr, SIZE_OUT: tl.constexpr, DTYPE: tl.constexpr):
    """(index of the first of four taps, their weights), by the operations of ops.upsample_cam.keys_taps, in order."""
    centre = (2 * position + 1) * SIZE_IN - SIZE_OUT
    # Shifted by one period, since division of a negative number would not round down.
    left = (centre + 2 * SIZE_OUT) // (2 * SIZE_OUT) - 1
    remainder = (centre - left * (2 * SIZE_OUT)).to(DTYPE)
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
def along_row(cam, low, high, row, first, c0, c1, c2, c3, MAP_WIDTH: tl.constexpr):
    """The map's `row` (clamped already), normalised and enlarged at the places of these taps."""
    row = row * MAP_WIDTH
    value = normalized(cam, low, high, row + within(first, MAP_WIDTH)) * c0
    value += normalized(cam, low, high, row + within(first + 1, MAP_WIDTH)) * c1
    value += normalized(cam, low, high, row + within(first + 2, MAP_WIDTH)) * c2
    return value + normalized(cam, low, high, row + within(first + 3, MAP_WIDTH)) * c3


@triton.jit
def table_of(
    cam, low, high, MAP_HEIGHT: tl.constexpr, MAP_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, TABLE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The map enlarged along its rows, (TABLE, COLUMNS); a single number where there is none."""
    if TABLE > 0:
        first, c0, c1, c2, c3 = keys_taps(tl.arange(0, COLUMNS)[None, :], MAP_WIDTH, WIDTH, DTYPE)
        row = within(tl.arange(0, TABLE)[:, None], MAP_HEIGHT)
        table = along_row(cam, low, high, row, first, c0, c1, c2, c3, MAP_WIDTH)
    else:
        table = low
    return table


@triton.jit
def pixels_of(
    tile, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """(row, column, row-major index, whether it is in the image) of a tile's pixels."""
    if FLAT:
        pixel = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        row, column = pixel // WIDTH, pixel % WIDTH
        inside = pixel < HEIGHT * WIDTH
    else:
        row, column = tile * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        pixel = row * WIDTH + column
        inside = (row < HEIGHT) & (column < WIDTH)
    return row, column, pixel, inside


@triton.jit
def enlarged(
    cam, table, low, high, row, column, MAP_HEIGHT: tl.constexpr, MAP_WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TABLE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """u = upsample_cam(cam) at a tile's pixels, (ROWS, COLUMNS)."""
    top, r0, r1, r2, r3 = keys_taps(row, MAP_HEIGHT, HEIGHT, DTYPE)
    i0, i1 = within(top, MAP_HEIGHT), within(top + 1, MAP_HEIGHT)
    i2, i3 = within(top + 2, MAP_HEIGHT), within(top + 3, MAP_HEIGHT)
    if TABLE > 0:
        u = tl.gather(table, tl.broadcast_to(i0, (ROWS, COLUMNS)), 0) * r0
        u += tl.gather(table, tl.broadcast_to(i1, (ROWS, COLUMNS)), 0) * r1
        u += tl.gather(table, tl.broadcast_to(i2, (ROWS, COLUMNS)), 0) * r2
        u += tl.gather(table, tl.broadcast_to(i3, (ROWS, COLUMNS)), 0) * r3
    else:
        first, c0, c1, c2, c3 = keys_taps(column, MAP_WIDTH, WIDTH, DTYPE)
        u = along_row(cam, low, high, i0, first, c0, c1, c2, c3, MAP_WIDTH) * r0
        u += along_row(cam, low, high, i1, first, c0, c1, c2, c3, MAP_WIDTH) * r1
        u += along_row(cam, low, high, i2, first, c0, c1, c2, c3, MAP_WIDTH) * r2
        u += along_row(cam, low, high, i3, first, c0, c1, c2, c3, MAP_WIDTH) * r3
    return u


@triton.jit
def upsample_cam_fwd_kernel(
    cam, out, tiles, MAP_HEIGHT: tl.constexpr, MAP_WIDTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    FLAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TABLE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // tiles).to(tl.int64)
    cam += image * (MAP_HEIGHT * MAP_WIDTH)
    low, high = extrema(cam, MAP_HEIGHT * MAP_WIDTH, DTYPE)
    table = table_of(cam, low, high, MAP_HEIGHT, MAP_WIDTH, WIDTH, COLUMNS, TABLE, DTYPE)
    row, column, pixel, inside = pixels_of(tl.program_id(0) % tiles, HEIGHT, WIDTH, FLAT, ROWS, COLUMNS)
    u = enlarged(cam, table, low, high, row, column, MAP_HEIGHT, MAP_WIDTH, HEIGHT, WIDTH, ROWS, COLUMNS, TABLE, DTYPE)
    tl.store(out + image * (HEIGHT * WIDTH) + pixel, narrow(u, out.dtype.element_ty), mask=inside)


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
    low, high = extrema(cam, COUNT, DTYPE)
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
