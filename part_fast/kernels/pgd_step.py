"""pgd_step, pgd_step_ and their backward in Triton: each one launch, whatever the form of eps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from part_fast.kernels import Launch, clamp, narrow, widen
from part_fast.kernels.images import WARPS, Gradients, bound_of, gradients_like, split_gradient, tile_of, walk


@triton.jit
def moved_by(x_adv, sign, natural, alpha, DTYPE: tl.constexpr):
    """x_adv + alpha * sign(grad) - x."""
    return x_adv + tl.full((1,), alpha, DTYPE) * sign - natural


@triton.jit
def sign_of(grad, images, first, start, span, inside, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Sign of a tile's gradient, from its position `first` on, in DTYPE; that of NaN is 0."""
    WIDTH: tl.constexpr = grad.dtype.element_ty.primitive_bitwidth
    if images.dtype.element_ty.primitive_bitwidth == WIDTH:
        value = widen(tl.load(grad + first + tl.arange(0, BLOCK), mask=inside))
        sign = (value > 0).to(DTYPE) - (value < 0).to(DTYPE)
    else:
        # Of another width than the images: were both loaded by the threads that hold the same elements, 16 bytes of the
        # narrower would be 32 of the wider, and each of its accesses would use half of every sector. In a shape of its
        # own each has full accesses, and what becomes of the sign changes threads once, through shared memory.
        EACH: tl.constexpr = 128 // WIDTH
        offset = tl.arange(0, BLOCK // EACH)[:, None] * EACH + tl.arange(0, EACH)[None, :]
        if inside is None:
            value = widen(tl.load(grad + first + offset))
        else:
            value = widen(tl.load(grad + first + offset, mask=start + offset < span))
        sign = tl.reshape((value > 0).to(tl.int8) - (value < 0).to(tl.int8), (BLOCK,)).to(DTYPE)
    return sign


@triton.jit
def pgd_step_tile(
    x_adv, grad, x, out, budget, alpha, clip_low, clip_high, row, start, span, inside,
    SOURCE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, REPEAT: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    bound = bound_of(budget, row, start, span, inside, SOURCE, CHANNELS, CHANNELS_LAST, BLOCK, DTYPE)
    low, high = tl.full((1,), clip_low, DTYPE), tl.full((1,), clip_high, DTYPE)
    first = row * (span * REPEAT) + start
    for repeat in range(REPEAT):
        place = first + repeat * span + tl.arange(0, BLOCK)
        natural = widen(tl.load(x + place, mask=inside))
        sign = sign_of(grad, x, first + repeat * span, start, span, inside, BLOCK, DTYPE)
        moved = moved_by(widen(tl.load(x_adv + place, mask=inside)), sign, natural, alpha, DTYPE)
        result = clamp(natural + clamp(moved, -bound, bound), low, high)
        tl.store(out + place, narrow(result, out.dtype.element_ty), mask=inside)


@triton.jit
def pgd_step_fwd_kernel(
    x_adv, grad, x, out, alpha: tl.float64, clip_low: tl.float64, clip_high: tl.float64,
    eps, eps_high: tl.float64, eps_low: tl.float64, span, tiles, pixels, width, stride_n, stride_c, stride_h, stride_w,
    SOURCE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, REPEAT: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    budget = (eps, eps_high, eps_low, pixels, width, stride_n, stride_c, stride_h, stride_w)
    row, start = tile_of(tiles, SOURCE, INDEX, BLOCK)
    if start + BLOCK <= span:
        # No mask: whatever the size, only the last tile has narrow accesses.
        pgd_step_tile(
            x_adv, grad, x, out, budget, alpha, clip_low, clip_high, row, start, span, None,
            SOURCE, CHANNELS, CHANNELS_LAST, REPEAT, BLOCK, DTYPE,
        )  # fmt: skip
    else:
        pgd_step_tile(
            x_adv, grad, x, out, budget, alpha, clip_low, clip_high, row, start, span,
            start + tl.arange(0, BLOCK) < span, SOURCE, CHANNELS, CHANNELS_LAST, REPEAT, BLOCK, DTYPE,
        )  # fmt: skip


@triton.jit
def pgd_step_bwd_tile(
    grad_out, x_adv, grad, x, grad_x_adv, grad_x, grad_eps, budget, alpha, clip_low, clip_high,
    row, start, span, inside,
    SOURCE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, REPEAT: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    bound = bound_of(budget, row, start, span, inside, SOURCE, CHANNELS, CHANNELS_LAST, BLOCK, DTYPE)
    low, high = tl.full((1,), clip_low, DTYPE), tl.full((1,), clip_high, DTYPE)
    first = row * (span * REPEAT) + start
    for repeat in range(REPEAT):
        place = first + repeat * span + tl.arange(0, BLOCK)
        natural = widen(tl.load(x + place, mask=inside))
        sign = sign_of(grad, x, first + repeat * span, start, span, inside, BLOCK, DTYPE)
        moved = moved_by(widen(tl.load(x_adv + place, mask=inside)), sign, natural, alpha, DTYPE)
        result = natural + clamp(moved, -bound, bound)
        through = widen(tl.load(grad_out + place, mask=inside))
        through = tl.where((result < low) | (result > high), tl.zeros_like(through), through)
        split_gradient(through, moved > bound, moved < -bound, grad_x_adv, grad_x, grad_eps, place, inside)


@triton.jit
def pgd_step_bwd_kernel(
    grad_out, x_adv, grad, x, grad_x_adv, grad_x, grad_eps,
    alpha: tl.float64, clip_low: tl.float64, clip_high: tl.float64,
    eps, eps_high: tl.float64, eps_low: tl.float64, span, tiles, pixels, width, stride_n, stride_c, stride_h, stride_w,
    SOURCE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, REPEAT: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    budget = (eps, eps_high, eps_low, pixels, width, stride_n, stride_c, stride_h, stride_w)
    row, start = tile_of(tiles, SOURCE, INDEX, BLOCK)
    if start + BLOCK <= span:
        pgd_step_bwd_tile(
            grad_out, x_adv, grad, x, grad_x_adv, grad_x, grad_eps, budget, alpha, clip_low, clip_high,
            row, start, span, None, SOURCE, CHANNELS, CHANNELS_LAST, REPEAT, BLOCK, DTYPE,
        )  # fmt: skip
    else:
        pgd_step_bwd_tile(
            grad_out, x_adv, grad, x, grad_x_adv, grad_x, grad_eps, budget, alpha, clip_low, clip_high,
            row, start, span, start + tl.arange(0, BLOCK) < span,
            SOURCE, CHANNELS, CHANNELS_LAST, REPEAT, BLOCK, DTYPE,
        )  # fmt: skip


def pgd_step_launch(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: Tensor | None, eps_high: float, eps_low: float,
    alpha: float, clip_low: float, clip_high: float, out: Tensor,
) -> Launch:  # fmt: skip
    way = walk(x_adv, eps, eps_high, eps_low, min(x_adv.element_size(), grad.element_size()))
    return Launch(
        pgd_step_fwd_kernel, way.programs,
        {
            "x_adv": x_adv, "grad": grad, "x": x, "out": out,
            "alpha": alpha, "clip_low": clip_low, "clip_high": clip_high, **way.arguments,
        },
        way.constants, WARPS,
    )  # fmt: skip


def pgd_step(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: Tensor | None, eps_high: float, eps_low: float,
    alpha: float, clip_low: float, clip_high: float,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(x_adv)
    pgd_step_launch(x_adv, grad, x, eps, eps_high, eps_low, alpha, clip_low, clip_high, out).run()
    return out


def pgd_step_(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: Tensor | None, eps_high: float, eps_low: float,
    alpha: float, clip_low: float, clip_high: float,
) -> None:  # fmt: skip
    pgd_step_launch(x_adv, grad, x, eps, eps_high, eps_low, alpha, clip_low, clip_high, x_adv).run()


def pgd_step_bwd_launch(
    grad_out: Tensor, x_adv: Tensor, grad: Tensor, x: Tensor, eps: Tensor | None, eps_high: float, eps_low: float,
    alpha: float, clip_low: float, clip_high: float, out: Gradients,
) -> Launch:  # fmt: skip
    grad_x_adv, grad_x, grad_eps = out
    dense = eps is not None and eps.dtype != torch.uint8
    way = walk(x_adv, eps, eps_high, eps_low, min(t.element_size() for t in (grad_out, x_adv, grad)))
    return Launch(
        pgd_step_bwd_kernel, way.programs,
        {
            "grad_out": grad_out, "x_adv": x_adv, "grad": grad, "x": x,
            "grad_x_adv": grad_x_adv, "grad_x": grad_x, "grad_eps": grad_eps if dense else None,
            "alpha": alpha, "clip_low": clip_low, "clip_high": clip_high, **way.arguments,
        },
        way.constants, WARPS,
    )  # fmt: skip


def pgd_step_bwd(
    grad_out: Tensor, x_adv: Tensor, grad: Tensor, x: Tensor, eps: Tensor | None, eps_high: float, eps_low: float,
    alpha: float, clip_low: float, clip_high: float,
) -> Gradients:  # fmt: skip
    out = gradients_like(grad_out, eps)
    pgd_step_bwd_launch(
        grad_out, x_adv, grad, x, eps, eps_high, eps_low, alpha, clip_low, clip_high, out
    ).run()  # fmt: skip
    return out
