"""cam_mask in Triton: a program per image goes from the small map to the mask; nothing else of full size exists."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from part_fast.kernels import Launch, divide_by
from part_fast.kernels.upsample_cam import enlarged, extrema, tables_of, tiles_of

# ops.cam_mask.RULES in this order
ZSCORE, RELEASED, QUANTILE, SOFT = (tl.constexpr(rule) for rule in range(4))
# What is written of each mask: its bits packed, 0 or 1, or one of two eps.
BITS, BYTES, EPS = (tl.constexpr(form) for form in range(3))


@triton.jit
def write_image(
    cam, out, high_value, low_value, k, tiles,
    RULE: tl.constexpr, FORM: tl.constexpr, KEPT: tl.constexpr,
    MAP_HEIGHT: tl.constexpr, MAP_WIDTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, MAPS: tl.constexpr, TABLE: tl.constexpr, TALL: tl.constexpr,
    THREADS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The program's image, whole. KEPT: it is one tile, whose u stays in registers; else each pass makes u anew."""
    PIXELS: tl.constexpr = HEIGHT * WIDTH
    PLANES: tl.constexpr = 3 if RULE == RELEASED else 1
    # 256 are meant; where the block has more threads, each has one.
    BINS: tl.constexpr = max(256, THREADS)
    image = tl.program_id(0).to(tl.int64)
    cam += image * (MAP_HEIGHT * MAP_WIDTH)
    out += image * (PLANES * ((PIXELS + 7) // 8 if FORM == BITS else PIXELS))
    low, high = extrema(cam, MAP_HEIGHT * MAP_WIDTH, THREADS, DTYPE)
    # Nothing can be said from a flat map, nor from one with NaN or infinities.
    evidence = (high - low > 0) & (high - low < float("inf"))
    if RULE != SOFT:
        # Then u is 0 everywhere.
        low, high = tl.where(evidence, low, 0.0), tl.where(evidence, high, 0.0)
    source, weights = tables_of(cam, low, high, MAP_HEIGHT, MAP_WIDTH, HEIGHT, WIDTH, WIDE, MAPS, TABLE, TALL, DTYPE)
    zero = tl.zeros((BLOCK,), DTYPE)
    kept = zero
    if KEPT:
        kept, pixel, inside = u_of(
            0, zero, cam, source, weights, low, high, False,
            MAP_HEIGHT, MAP_WIDTH, HEIGHT, WIDTH, BLOCK, WIDE, MAPS, TABLE, TALL, DTYPE,
        )  # fmt: skip

    if RULE == ZSCORE:
        total = zero
        for tile in range(tiles):
            u, pixel, inside = u_of(
                tile, kept, cam, source, weights, low, high, KEPT,
                MAP_HEIGHT, MAP_WIDTH, HEIGHT, WIDTH, BLOCK, WIDE, MAPS, TABLE, TALL, DTYPE,
            )  # fmt: skip
            total += u
        mean = mean_of(total, PIXELS).to(DTYPE)
        total = zero
        for tile in range(tiles):
            u, pixel, inside = u_of(
                tile, kept, cam, source, weights, low, high, KEPT,
                MAP_HEIGHT, MAP_WIDTH, HEIGHT, WIDTH, BLOCK, WIDE, MAPS, TABLE, TALL, DTYPE,
            )  # fmt: skip
            total += tl.where(inside, (u - mean) * (u - mean), zero)
        std = tl.sqrt(mean_of(total, PIXELS)).to(DTYPE)

    if RULE == RELEASED:
        counts = tl.zeros((BINS,), tl.int32)
        for tile in range(tiles):
            u, pixel, inside = u_of(
                tile, kept, cam, source, weights, low, high, KEPT,
                MAP_HEIGHT, MAP_WIDTH, HEIGHT, WIDTH, BLOCK, WIDE, MAPS, TABLE, TALL, DTYPE,
            )  # fmt: skip
            entry = entry_of(u)
            counts += tl.histogram(entry, BINS, mask=inside)
        colours = tl.where(evidence, colours_kept(counts.to(tl.float64), PIXELS, BINS), 0)

    if RULE == QUANTILE:
        # The key of the k-th largest pixel, eight bits at a time from the top, by counting.
        BITS_OF_KEY: tl.constexpr = DTYPE.primitive_bitwidth
        KEY: tl.constexpr = tl.uint32 if BITS_OF_KEY == 32 else tl.uint64
        need = tl.zeros((1,), tl.int32) + k
        known = tl.zeros((1,), KEY)
        for step in range(BITS_OF_KEY // 8):
            shift = tl.zeros((1,), KEY) + (BITS_OF_KEY - 8 - 8 * step)
            counts = tl.zeros((BINS,), tl.int32)
            for tile in range(tiles):
                u, pixel, inside = u_of(
                    tile, kept, cam, source, weights, low, high, KEPT,
                    MAP_HEIGHT, MAP_WIDTH, HEIGHT, WIDTH, BLOCK, WIDE, MAPS, TABLE, TALL, DTYPE,
                )  # fmt: skip
                key = key_of(u)
                # Two shifts, since one by all of the key's bits is not defined.
                candidate = inside & (((key ^ known) >> shift) >> 8 == 0)
                counts += tl.histogram(((key >> shift) & 255).to(tl.int32), BINS, mask=candidate)
            chosen, need = digit_of(counts, need, BINS)
            known = known | (chosen.to(KEY) << shift)
        # Without evidence the keys are all equal, and none of them is taken.
        need = tl.where(evidence, need, 0)

    for tile in range(tiles):
        u, pixel, inside = u_of(
            tile, kept, cam, source, weights, low, high, KEPT,
            MAP_HEIGHT, MAP_WIDTH, HEIGHT, WIDTH, BLOCK, WIDE, MAPS, TABLE, TALL, DTYPE,
        )  # fmt: skip
        if RULE == SOFT:
            # low_value + spread * clamp(u, 0, 1); high_value is the spread, rounded once from float64.
            share = tl.where(u < 0, zero, tl.where(u > 1, zero + 1, u))
            value = tl.full((1,), low_value, DTYPE) + tl.full((1,), high_value, DTYPE) * share
            tl.store(out + pixel, value, mask=inside)
        else:
            if RULE == ZSCORE:
                mask = u - mean > std
                write_plane(out, mask, high_value, low_value, tile, pixel, inside, PIXELS, FORM, BLOCK)
            elif RULE == QUANTILE:
                key = key_of(u)
                tie = ((key == known) & inside).to(tl.int32)
                # Pixels with exactly the key: the first `need` of them in row-major order.
                upto = tl.cumsum(tie, 0)
                mask = (key > known) | ((tie > 0) & (upto <= need))
                need -= tl.sum(tie, 0, keep_dims=True)
                write_plane(out, mask, high_value, low_value, tile, pixel, inside, PIXELS, FORM, BLOCK)
            else:
                entry = entry_of(u)
                colour = tl.gather(colours, entry, 0)
                for plane in tl.static_range(3):
                    mask = ((colour >> plane) & 1) != 0
                    start = out + plane * ((PIXELS + 7) // 8 if FORM == BITS else PIXELS)
                    write_plane(start, mask, high_value, low_value, tile, pixel, inside, PIXELS, FORM, BLOCK)


@triton.jit
def u_of(
    tile, kept, cam, source, weights, low, high, KEPT: tl.constexpr,
    MAP_HEIGHT: tl.constexpr, MAP_WIDTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, MAPS: tl.constexpr, TABLE: tl.constexpr, TALL: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """(u of a tile's pixels, 0 past the image; their row-major index; whether they are in the image)."""
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < HEIGHT * WIDTH
    if KEPT:
        u = kept
    else:
        u = enlarged(
            cam, source, weights, low, high, pixel,
            MAP_HEIGHT, MAP_WIDTH, HEIGHT, WIDTH, BLOCK, WIDE, MAPS, TABLE, TALL, DTYPE,
        )  # fmt: skip
        u = tl.where(inside, u, tl.zeros_like(u))
    return u, pixel, inside


@triton.jit
def write_plane(
    out, mask, high_value, low_value, tile, pixel, inside,
    PIXELS: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if FORM == BITS:
        # A tile starts at a whole byte.
        eights = tl.reshape((mask & inside).to(tl.int32), (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
        place = tile * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        tl.store(out + place, tl.sum(eights, 1).to(tl.uint8), mask=place < (PIXELS + 7) // 8)
    elif FORM == BYTES:
        tl.store(out + pixel, mask.to(tl.uint8), mask=inside)
    else:
        high = tl.full((1,), high_value, out.dtype.element_ty)
        low = tl.full((1,), low_value, out.dtype.element_ty)
        tl.store(out + pixel, tl.where(mask, high, low), mask=inside)


@triton.jit
def mean_of(values, COUNT: tl.constexpr):
    """Sum of values over COUNT, in float64, shape (1,)."""
    total = tl.sum(values.to(tl.float64), 0, keep_dims=True)
    return divide_by(total, tl.full((1,), COUNT, tl.float64), tl.full((1,), 1 / COUNT, tl.float64))


@triton.jit
def key_of(u):
    """Unsigned integers in the order of the floats; the two zeros are one."""
    u = tl.where(u == 0, tl.zeros_like(u), u)
    if u.dtype == tl.float64:
        bits = u.to(tl.int64, bitcast=True)
        key = (bits ^ ((bits >> 63) | -9223372036854775808)).to(tl.uint64, bitcast=True)
    else:
        bits = u.to(tl.int32, bitcast=True)
        key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    return key


@triton.jit
def digit_of(counts, need, BINS: tl.constexpr):
    """(digit of the need-th largest, how many are needed of those with this digit), (1,) each."""
    digit = tl.arange(0, BINS)
    chosen = tl.sum((tl.cumsum(counts, 0, reverse=True) >= need).to(tl.int32), 0, keep_dims=True) - 1
    need -= tl.sum(tl.where(digit > chosen, counts, 0), 0, keep_dims=True)
    return chosen, need


@triton.jit
def entry_of(u):
    """Which of the 256 colours u**2 has."""
    return tl.minimum((tl.minimum(u * u, 1.0) * 256).to(tl.int32), 255)


@triton.jit
def colours_kept(counts, PIXELS: tl.constexpr, BINS: tl.constexpr):
    """(BINS,) int32: bit c says whether that colour is more than one deviation above the mean in channel c."""
    entry = tl.arange(0, BINS).to(tl.float64)
    # The nodes of matplotlib's jet, as in ops.cam_mask.
    red = tl.where(entry < 255.0 * 0.35, 0.0, between(entry, 0.35, 0.66, 0.0, 1.0))
    red = tl.where(entry < 255.0 * 0.66, red, 1.0)
    red = tl.where(entry < 255.0 * 0.89, red, between(entry, 0.89, 1.0, 1.0, 0.5))
    green = tl.where(entry < 255.0 * 0.125, 0.0, between(entry, 0.125, 0.375, 0.0, 1.0))
    green = tl.where(
        entry < 255.0 * 0.375, green, tl.where(entry < 255.0 * 0.64, 1.0, between(entry, 0.64, 0.91, 1.0, 0.0))
    )
    green = tl.where(entry < 255.0 * 0.91, green, 0.0)
    blue = tl.where(entry < 255.0 * 0.11, between(entry, 0.0, 0.11, 0.5, 1.0), 1.0)
    blue = tl.where(entry < 255.0 * 0.34, blue, between(entry, 0.34, 0.65, 1.0, 0.0))
    blue = tl.where(entry < 255.0 * 0.65, blue, 0.0)
    mean = mean_of(counts * ((red + green) + blue), 3 * PIXELS)
    red, green, blue = red - mean, green - mean, blue - mean
    square = (red * red + green * green) + blue * blue
    std = tl.sqrt(mean_of(counts * square, 3 * PIXELS))
    return (red > std).to(tl.int32) | ((green > std).to(tl.int32) << 1) | ((blue > std).to(tl.int32) << 2)


@triton.jit
def between(entry, x0: tl.constexpr, x1: tl.constexpr, y0: tl.constexpr, y1: tl.constexpr):
    span: tl.constexpr = 255.0 * x1 - 255.0 * x0
    wide = tl.full(entry.shape, span, tl.float64)
    return divide_by(entry - 255.0 * x0, wide, tl.full(entry.shape, 1 / span, tl.float64)) * (y1 - y0) + y0


@triton.jit
def cam_mask_kernel(
    cam, out, k, tiles, RULE: tl.constexpr, FORM: tl.constexpr, KEPT: tl.constexpr,
    MAP_HEIGHT: tl.constexpr, MAP_WIDTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, MAPS: tl.constexpr, TABLE: tl.constexpr, TALL: tl.constexpr,
    THREADS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    write_image(
        cam, out, 1.0, 0.0, k, tiles, RULE, FORM, KEPT,
        MAP_HEIGHT, MAP_WIDTH, HEIGHT, WIDTH, BLOCK, WIDE, MAPS, TABLE, TALL, THREADS, DTYPE,
    )  # fmt: skip


def cam_mask_launch(cam: Tensor, height: int, width: int, rule: int, k: int, out: Tensor) -> Launch:
    """`out`: bool for the mask, uint8 for its packed bits."""
    tiles = tiles_of(cam, height, width, rule == QUANTILE.value)
    form = BYTES if out.dtype == torch.bool else BITS
    return Launch(
        cam_mask_kernel, cam.shape[0] if out.numel() else 0,
        {"cam": cam, "out": out.view(torch.uint8), "k": k, "tiles": tiles.count},
        {"RULE": rule, "FORM": form.value, "KEPT": tiles.count == 1, **tiles.constants}, tiles.warps,
    )  # fmt: skip


def cam_mask(cam: Tensor, height: int, width: int, rule: int, k: int, packed: bool) -> Tensor:
    head = (cam.shape[0], 3 if rule == RELEASED.value else 1)
    if packed:
        out = cam.new_empty((*head, (height * width + 7) // 8), dtype=torch.uint8)
    else:
        out = cam.new_empty((*head, height, width), dtype=torch.bool)
    cam_mask_launch(cam, height, width, rule, k, out).run()
    return out
