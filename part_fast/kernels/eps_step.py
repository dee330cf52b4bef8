"""eps_step_ in Triton: the step, and what it leaves in the bank, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from part_fast.kernels import Launch, clamp, narrow, widen
from part_fast.kernels.bank_start import stored_at
from part_fast.kernels.images import WARPS, bound_of, row_tile_of, tile_of, walk
from part_fast.kernels.pgd_step import sign_of


@triton.jit
def level_of(moved, levels, DTYPE: tl.constexpr):
    """The level of a bank, -127 to 127, that is nearest, half to even; 0 for NaN."""
    # Adding what leaves no bit for fractions rounds: 1.5 * 2^23, 1.5 * 2^52.
    whole = tl.full((1,), 6755399441055744.0 if moved.dtype == tl.float64 else 12582912.0, DTYPE)
    level = moved * tl.full((1,), levels, DTYPE)
    level = clamp(level, tl.full((1,), -127, DTYPE), tl.full((1,), 127, DTYPE))
    return tl.where(level != level, 0.0, (level + whole) - whole).to(tl.int8)


@triton.jit
def eps_step_tile(
    x_adv, grad, x, bank, places, samples, step, levels, clip_low, clip_high, budget, row, start, span, inside,
    OF_EPS: tl.constexpr, PROJECT: tl.constexpr,
    SOURCE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, REPEAT: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    bound = bound_of(budget, row, start, span, inside, SOURCE, CHANNELS, CHANNELS_LAST, BLOCK, DTYPE)
    alpha = tl.full((1,), step, DTYPE)
    if OF_EPS:
        alpha = alpha * bound
    low, high = tl.full((1,), clip_low, DTYPE), tl.full((1,), clip_high, DTYPE)
    first = row * (span * REPEAT) + start
    for repeat in range(REPEAT):
        place = first + repeat * span + tl.arange(0, BLOCK)
        natural = widen(tl.load(x + place, mask=inside))
        sign = sign_of(grad, x, first + repeat * span, start, span, inside, BLOCK, DTYPE)
        moved = widen(tl.load(x_adv + place, mask=inside)) + alpha * sign - natural
        if PROJECT:
            moved = clamp(moved, -bound, bound)
        result = narrow(clamp(natural + moved, low, high), x_adv.dtype.element_ty)
        tl.store(x_adv + place, result, mask=inside)
        if bank is not None:
            stored, there, _ = stored_at(
                places, samples, budget[3], budget[4], row, repeat, start, inside,
                SOURCE, CHANNELS, CHANNELS_LAST, REPEAT, BLOCK,
            )  # fmt: skip
            tl.store(bank + stored, level_of(widen(result) - natural, levels, DTYPE), mask=there)


@triton.jit
def eps_step_kernel(
    x_adv, grad, x, bank, places, samples, step: tl.float64, levels: tl.float64,
    clip_low: tl.float64, clip_high: tl.float64,
    eps, eps_high: tl.float64, eps_low: tl.float64, span, tiles, pixels, width, stride_n, stride_c, stride_h, stride_w,
    OF_EPS: tl.constexpr, PROJECT: tl.constexpr,
    SOURCE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, REPEAT: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    budget = (eps, eps_high, eps_low, pixels, width, stride_n, stride_c, stride_h, stride_w)
    if bank is None:
        row, start = tile_of(tiles, SOURCE, INDEX, BLOCK)
    else:
        row, start = row_tile_of(tiles, INDEX, BLOCK)
    if start + BLOCK <= span:
        # No mask: whatever the size, only the last tile has narrow accesses.
        eps_step_tile(
            x_adv, grad, x, bank, places, samples, step, levels, clip_low, clip_high, budget, row, start, span, None,
            OF_EPS, PROJECT, SOURCE, CHANNELS, CHANNELS_LAST, REPEAT, BLOCK, DTYPE,
        )  # fmt: skip
    else:
        eps_step_tile(
            x_adv, grad, x, bank, places, samples, step, levels, clip_low, clip_high, budget, row, start, span,
            start + tl.arange(0, BLOCK) < span,
            OF_EPS, PROJECT, SOURCE, CHANNELS, CHANNELS_LAST, REPEAT, BLOCK, DTYPE,
        )  # fmt: skip


def eps_step_(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: Tensor | None, eps_high: float, eps_low: float,
    step: float, of_eps: bool, project: bool, clip_low: float, clip_high: float,
    bank: Tensor | None, places: Tensor | None, levels: float,
) -> None:  # fmt: skip
    narrowest = min(x_adv.element_size(), grad.element_size())
    way = walk(x_adv, eps, eps_high, eps_low, narrowest, by_image=bank is not None)
    Launch(
        eps_step_kernel, way.programs,
        {
            "x_adv": x_adv, "grad": grad, "x": x, "bank": bank, "places": places,
            "samples": 0 if bank is None else len(bank), "step": step, "levels": levels,
            "clip_low": clip_low, "clip_high": clip_high, **way.arguments,
        },
        {"OF_EPS": of_eps, "PROJECT": project, **way.constants}, WARPS,
    ).run()  # fmt: skip
