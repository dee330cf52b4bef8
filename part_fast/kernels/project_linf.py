"""project_linf in Triton, and how a program walks over images whose pixels each have an eps (also for pgd_step)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from part_fast.kernels import Launch, clamp, narrow, widen
from part_fast.kernels.images import WARPS, Gradients, bound_of, gradients_like, split_gradient, tile_of, walk


@triton.jit
def project_linf_tile(
    x_adv, x, out, budget, row, start, span, inside,
    SOURCE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, REPEAT: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    bound = bound_of(budget, row, start, span, inside, SOURCE, CHANNELS, CHANNELS_LAST, BLOCK, DTYPE)
    first = row * (span * REPEAT) + start
    for repeat in range(REPEAT):
        place = first + repeat * span + tl.arange(0, BLOCK)
        natural = widen(tl.load(x + place, mask=inside))
        moved = widen(tl.load(x_adv + place, mask=inside)) - natural
        tl.store(out + place, narrow(natural + clamp(moved, -bound, bound), out.dtype.element_ty), mask=inside)


@triton.jit
def project_linf_fwd_kernel(
    x_adv, x, out, eps, eps_high: tl.float64, eps_low: tl.float64, span, tiles, pixels, width,
    stride_n, stride_c, stride_h, stride_w,
    SOURCE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, REPEAT: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    budget = (eps, eps_high, eps_low, pixels, width, stride_n, stride_c, stride_h, stride_w)
    row, start = tile_of(tiles, SOURCE, INDEX, BLOCK)
    if start + BLOCK <= span:
        # No mask: whatever the size, only the last tile has narrow accesses.
        project_linf_tile(
            x_adv, x, out, budget, row, start, span, None, SOURCE, CHANNELS, CHANNELS_LAST, REPEAT, BLOCK, DTYPE
        )
    else:
        inside = start + tl.arange(0, BLOCK) < span
        project_linf_tile(
            x_adv, x, out, budget, row, start, span, inside, SOURCE, CHANNELS, CHANNELS_LAST, REPEAT, BLOCK, DTYPE
        )


def project_linf_launch(
    x_adv: Tensor, x: Tensor, out: Tensor, eps: Tensor | None, eps_high: float, eps_low: float
) -> Launch:
    way = walk(x_adv, eps, eps_high, eps_low, x_adv.element_size())
    return Launch(
        project_linf_fwd_kernel, way.programs,
        {"x_adv": x_adv, "x": x, "out": out, **way.arguments}, way.constants, WARPS,
    )  # fmt: skip


def project_linf(x_adv: Tensor, x: Tensor, eps: Tensor | None, eps_high: float, eps_low: float) -> Tensor:
    out = torch.empty_like(x_adv)
    project_linf_launch(x_adv, x, out, eps, eps_high, eps_low).run()
    return out


@triton.jit
def project_linf_bwd_tile(
    grad_out, x_adv, x, grad_x_adv, grad_x, grad_eps, budget, row, start, span, inside,
    SOURCE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, REPEAT: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    bound = bound_of(budget, row, start, span, inside, SOURCE, CHANNELS, CHANNELS_LAST, BLOCK, DTYPE)
    first = row * (span * REPEAT) + start
    for repeat in range(REPEAT):
        place = first + repeat * span + tl.arange(0, BLOCK)
        moved = widen(tl.load(x_adv + place, mask=inside)) - widen(tl.load(x + place, mask=inside))
        grad = widen(tl.load(grad_out + place, mask=inside))
        split_gradient(grad, moved > bound, moved < -bound, grad_x_adv, grad_x, grad_eps, place, inside)


@triton.jit
def project_linf_bwd_kernel(
    grad_out, x_adv, x, grad_x_adv, grad_x, grad_eps, eps, eps_high: tl.float64, eps_low: tl.float64,
    span, tiles, pixels, width, stride_n, stride_c, stride_h, stride_w,
    SOURCE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, REPEAT: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    budget = (eps, eps_high, eps_low, pixels, width, stride_n, stride_c, stride_h, stride_w)
    row, start = tile_of(tiles, SOURCE, INDEX, BLOCK)
    if start + BLOCK <= span:
        project_linf_bwd_tile(
            grad_out, x_adv, x, grad_x_adv, grad_x, grad_eps, budget, row, start, span, None,
            SOURCE, CHANNELS, CHANNELS_LAST, REPEAT, BLOCK, DTYPE,
        )  # fmt: skip
    else:
        project_linf_bwd_tile(
            grad_out, x_adv, x, grad_x_adv, grad_x, grad_eps, budget, row, start, span,
            start + tl.arange(0, BLOCK) < span, SOURCE, CHANNELS, CHANNELS_LAST, REPEAT, BLOCK, DTYPE,
        )  # fmt: skip


def project_linf_bwd_launch(
    grad_out: Tensor, x_adv: Tensor, x: Tensor, eps: Tensor | None, eps_high: float, eps_low: float, out: Gradients
) -> Launch:
    grad_x_adv, grad_x, grad_eps = out
    dense = eps is not None and eps.dtype != torch.uint8
    way = walk(x_adv, eps, eps_high, eps_low, min(grad_out.element_size(), x_adv.element_size()))
    tensors = {
        "grad_out": grad_out, "x_adv": x_adv, "x": x,
        "grad_x_adv": grad_x_adv, "grad_x": grad_x, "grad_eps": grad_eps if dense else None,
    }  # fmt: skip
    return Launch(project_linf_bwd_kernel, way.programs, {**tensors, **way.arguments}, way.constants, WARPS)


def project_linf_bwd(
    grad_out: Tensor, x_adv: Tensor, x: Tensor, eps: Tensor | None, eps_high: float, eps_low: float
) -> Gradients:
    out = gradients_like(grad_out, eps)
    project_linf_bwd_launch(grad_out, x_adv, x, eps, eps_high, eps_low, out).run()
    return out
