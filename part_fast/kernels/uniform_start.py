"""uniform_start in Triton: one launch, whatever the form of eps; the noise is made where it is used."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from part_fast.kernels import Launch, clamp, narrow, widen
from part_fast.kernels.images import LIKE, SCALAR, WARPS, bound_of, tile_of, walk


@triton.jit
def philox_words(block, seed):
    """Philox4x32-10: the four words of the blocks numbered `block`."""
    number = block.to(tl.uint64)
    a, b = (number & 0xFFFFFFFF).to(tl.uint32), (number >> 32).to(tl.uint32)
    c, d = tl.zeros_like(a), tl.zeros_like(a)
    key = tl.full((1,), seed, tl.int64).to(tl.uint64)
    k0, k1 = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    first_factor, second_factor = tl.full((1,), 0xD2511F53, tl.uint32), tl.full((1,), 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        first_high, first_low = tl.umulhi(a, first_factor), a * first_factor
        second_high, second_low = tl.umulhi(c, second_factor), c * second_factor
        a, b, c, d = second_high ^ b ^ k0, second_low, first_high ^ d ^ k1, first_low
        k0 += tl.full((1,), 0x9E3779B9, tl.uint32)
        k1 += tl.full((1,), 0xBB67AE85, tl.uint32)
    return a, b, c, d


@triton.jit
def noise_of(first, seed, GROUPED: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """2u - 1 for BLOCK elements from element `first` on; GROUPED: that one is known to be the first of a block."""
    if GROUPED:
        a, b, c, d = philox_words(first // 4 + tl.arange(0, BLOCK // 4), seed)
        word = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK,))
    else:
        element = first + tl.arange(0, BLOCK)
        a, b, c, d = philox_words(element // 4, seed)
        turn = element % 4
        word = tl.where(turn < 2, tl.where(turn == 0, a, b), tl.where(turn == 2, c, d))
    return 2 * ((word >> 8).to(tl.int32).to(DTYPE) * (1.0 / (1 << 24))) - 1


@triton.jit
def uniform_start_tile(
    x, out, budget, scale, seed, clip_low, clip_high, row, start, span, inside,
    SOURCE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, REPEAT: tl.constexpr,
    GROUPED: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    bound = bound_of(budget, row, start, span, inside, SOURCE, CHANNELS, CHANNELS_LAST, BLOCK, DTYPE)
    bound = tl.full((1,), scale, DTYPE) * bound
    low, high = tl.full((1,), clip_low, DTYPE), tl.full((1,), clip_high, DTYPE)
    first = row * (span * REPEAT) + start
    for repeat in range(REPEAT):
        place = first + repeat * span + tl.arange(0, BLOCK)
        noise = noise_of(first + repeat * span, seed, GROUPED, BLOCK, DTYPE) * bound
        result = clamp(widen(tl.load(x + place, mask=inside)) + noise, low, high)
        tl.store(out + place, narrow(result, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def uniform_start_kernel(
    x, out, scale: tl.float64, seed: tl.int64, clip_low: tl.float64, clip_high: tl.float64,
    eps, eps_high: tl.float64, eps_low: tl.float64, span, tiles, pixels, width, stride_n, stride_c, stride_h, stride_w,
    SOURCE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, REPEAT: tl.constexpr,
    INDEX: tl.constexpr, GROUPED: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    budget = (eps, eps_high, eps_low, pixels, width, stride_n, stride_c, stride_h, stride_w)
    row, start = tile_of(tiles, SOURCE, INDEX, BLOCK)
    if start + BLOCK <= span:
        # No mask: whatever the size, only the last tile has narrow accesses.
        uniform_start_tile(
            x, out, budget, scale, seed, clip_low, clip_high, row, start, span, None,
            SOURCE, CHANNELS, CHANNELS_LAST, REPEAT, GROUPED, BLOCK, DTYPE,
        )  # fmt: skip
    else:
        uniform_start_tile(
            x, out, budget, scale, seed, clip_low, clip_high, row, start, span,
            start + tl.arange(0, BLOCK) < span, SOURCE, CHANNELS, CHANNELS_LAST, REPEAT, GROUPED, BLOCK, DTYPE,
        )  # fmt: skip


def uniform_start(
    x: Tensor, eps: Tensor | None, eps_high: float, eps_low: float, scale: float, seed: int,
    clip_low: float, clip_high: float,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(x)
    way = walk(x, eps, eps_high, eps_low, x.element_size())
    # Tiles begin at multiples of BLOCK in their rows.
    grouped = way.constants["SOURCE"] in (SCALAR.value, LIKE.value) or way.arguments["span"] % 4 == 0
    Launch(
        uniform_start_kernel, way.programs,
        {
            "x": x, "out": out, "scale": scale, "seed": seed, "clip_low": clip_low, "clip_high": clip_high,
            **way.arguments,
        },
        {**way.constants, "GROUPED": grouped}, WARPS,
    ).run()  # fmt: skip
    return out
