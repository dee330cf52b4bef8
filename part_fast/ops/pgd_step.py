"""pgd_step, pgd_step_: one step of projected gradient descent, fused: sign, step, projection, clip."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from part_fast import backends, checks
from part_fast.checks import Clip
from part_fast.errors import BadValueError
from part_fast.ops.packed_epsilon import PackedEpsilon, dense_eps, eps_arguments
from part_fast.ops.project_linf import clamped, fake_bwd, split_gradient, split_tangent


def _stepped(x_adv: Tensor, grad: Tensor, alpha: float) -> Tensor:
    # Not torch.sign: its value for NaN differs between devices, and a NaN gradient must move nothing.
    sign = (grad > 0).to(x_adv.dtype) - (grad < 0).to(x_adv.dtype)
    return x_adv + alpha * sign


def _reference(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: Tensor | None, eps_high: float, eps_low: float,
    alpha: float, clip_low: float, clip_high: float,
) -> Tensor:  # fmt: skip
    dtype = checks.compute_dtype(x_adv)
    bound = dense_eps(eps, eps_high, eps_low, x_adv)
    natural = x.to(dtype)
    moved = _stepped(x_adv.to(dtype), grad, alpha) - natural
    return checks.rounded(torch.clamp(natural + clamped(moved, bound), clip_low, clip_high), x_adv.dtype)


def _reference_(x_adv: Tensor, *args: Any) -> None:
    x_adv.copy_(_reference(x_adv, *args))


def _reference_bwd(
    grad_out: Tensor, x_adv: Tensor, grad: Tensor, x: Tensor, eps: Tensor | None, eps_high: float, eps_low: float,
    alpha: float, clip_low: float, clip_high: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = checks.compute_dtype(x_adv)
    bound = dense_eps(eps, eps_high, eps_low, x_adv)
    natural = x.to(dtype)
    moved = _stepped(x_adv.to(dtype), grad, alpha) - natural
    result = natural + clamped(moved, bound)
    clipped = (result < clip_low) | (result > clip_high)
    zero = torch.zeros((), dtype=grad_out.dtype, device=grad_out.device)
    return split_gradient(torch.where(clipped, zero, grad_out), moved, bound, eps)


_EPS = "Tensor? eps, float eps_high, float eps_low, float alpha, float clip_low, float clip_high"
_pgd_step = backends.define(
    f"_pgd_step(Tensor x_adv, Tensor grad, Tensor x, {_EPS}) -> Tensor",
    _reference,
    lambda x_adv, *args: torch.empty_like(x_adv),
    kernels="pgd_step",
)
_pgd_step_ = backends.define(
    f"_pgd_step_(Tensor(a!) x_adv, Tensor grad, Tensor x, {_EPS}) -> ()",
    _reference_,
    lambda x_adv, *args: None,
    kernels="pgd_step",
)
_pgd_step_bwd = backends.define(
    f"_pgd_step_bwd(Tensor grad_out, Tensor x_adv, Tensor grad, Tensor x, {_EPS}) -> (Tensor, Tensor, Tensor)",
    _reference_bwd,
    lambda grad_out, x_adv, grad, x, eps, *args: fake_bwd(grad_out, eps),
    kernels="pgd_step",
)


class _PGDStep(torch.autograd.Function):
    @staticmethod
    def forward(x_adv: Tensor, grad: Tensor, x: Tensor, eps: Tensor | None, *scalars: float) -> Tensor:
        return _pgd_step(x_adv, grad, x, eps, *scalars)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.scalars, ctx.backend = inputs[4:], backends.chosen()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x_adv, grad, x, eps = ctx.saved_tensors
        if checks.derivative_of_backward():
            gradients = _reference_bwd(grad_out, x_adv, grad, x, eps, *ctx.scalars)
        else:
            grad_out = checks.same_format(grad_out, x_adv)
            gradients = _pgd_step_bwd.on(ctx.backend, grad_out, x_adv, grad, x, eps, *ctx.scalars)
        grad_x_adv, grad_x, grad_eps = gradients
        grad_grad = torch.zeros_like(grad) if ctx.needs_input_grad[1] else None
        return grad_x_adv, grad_grad, grad_x, grad_eps if ctx.needs_input_grad[3] else None, *(None,) * 5


class _PGDStepTransformed(_PGDStep):
    """With what torch.func and forward-mode AD ask for, and torch.compile refuses."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _PGDStep.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    def jvp(
        ctx: Any, x_adv_t: Tensor | None, grad_t: Tensor | None, x_t: Tensor | None, eps_t: Tensor | None, *_: None
    ) -> Tensor:
        x_adv, grad, x, eps = ctx.saved_tensors
        eps_high, eps_low, alpha, clip_low, clip_high = ctx.scalars
        dtype = checks.compute_dtype(x_adv)
        bound = dense_eps(eps, eps_high, eps_low, x_adv)
        natural = x.to(dtype)
        moved = _stepped(x_adv.to(dtype), grad, alpha) - natural
        result = natural + clamped(moved, bound)
        tangent = split_tangent((x_adv_t, x_t, eps_t), moved, bound)
        clipped = (result < clip_low) | (result > clip_high)
        return torch.where(clipped, torch.zeros_like(tangent), tangent).to(x_adv.dtype)


def pgd_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float | Tensor | PackedEpsilon,
    alpha: float,
    clip: Clip = (0.0, 1.0),
) -> Tensor:
    """One PGD step: along the sign of grad, back into each pixel's eps ball around x, clipped.

    x_adv, x: images (N,C,H,W) of one dtype. grad: their shape, any floating dtype.
        What is neither contiguous nor channels_last is copied, and x or grad in another format than x_adv's too.
    eps: image units (8/255); a float, a tensor that broadcasts to the images, or a PackedEpsilon.
    alpha: step size, image units; negative to descend.
    clip: (low, high), or None for no clip; each a number or one per channel, (C,), (C,1,1) or (1,C,1,1), which is
        rounded as a number is and gives the same bits, but takes one more pass.
    Returns a new tensor like x_adv. A zero or NaN in grad moves nothing; NaN in x_adv, x or eps stays NaN.
    Differentiable in x_adv, x and a tensor eps (grad gets zeros), forward and in reverse, to any order; exactly on a
    bound the gradient belongs to x_adv. torch.vmap maps it over any dimension.

    Equivalent to: `torch.clamp(x + torch.clamp(x_adv + alpha * grad.sign() - x, -eps, eps), *clip)`, computed in
    float32 in this order and rounded once: every backend returns the same bits.
    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, section 2.1;
    with per-pixel eps Zhang et al., ICML 2024 (PART), arXiv 2406.00685.
    Errors: TypeError or ValueError that names the argument, before anything is computed.
    """
    tensors, scalars, channels = _checked(x_adv, grad, x, eps, alpha, clip)
    if checks.transformed():
        result = _PGDStepTransformed.apply(*tensors, *scalars)
    elif torch.is_grad_enabled() and _asks_gradient(*tensors):
        result = _PGDStep.apply(*tensors, *scalars)
    else:
        result = _pgd_step(*tensors, *scalars)
    return result if channels is None else _clipped(result, *channels)


def pgd_step_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float | Tensor | PackedEpsilon,
    alpha: float,
    clip: Clip = (0.0, 1.0),
) -> Tensor:
    """`pgd_step` written into x_adv, which is returned. For attacks: no new memory, but for a strided x_adv, such as a
    crop, whose copy is written back.

    If a gradient is needed, autograd records the call as any in-place op of torch, at the price of two copies.
    Errors: those of `pgd_step`; ValueError for an x_adv that shares elements (expanded), and for grad, x or eps that
    overlaps x_adv without being the same.
    """
    tensors, scalars, channels = _checked(x_adv, grad, x, eps, alpha, clip)
    if tensors[0] is not x_adv:  # a copy of strided images
        checks.unshared("x_adv", x_adv)
        return x_adv.copy_(pgd_step(x_adv, grad, x, eps, alpha, clip))
    for name, value in zip(("grad", "x", "eps"), tensors[1:], strict=True):
        refuse_overlap(name, value, x_adv)
    if checks.transformed() or (torch.is_grad_enabled() and _asks_gradient(*tensors)):
        # The backward reads x_adv as it was, also where it is another argument too.
        kept = x_adv.clone()
        grad, x, eps = (kept if t is x_adv else t for t in (grad, x, eps))  # type: ignore[assignment]
        return x_adv.copy_(pgd_step(kept, grad, x, eps, alpha, clip))
    _pgd_step_(*tensors, *scalars)
    if channels is not None:
        x_adv.clamp_(*channels)
    if not torch.compiler.is_compiling():
        # So that autograd refuses to use a value that was saved before it was overwritten here.
        torch.autograd.graph.increment_version(x_adv)
    return x_adv


def _clipped(result: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clipped per channel; exactly on a bound the gradient is the result's, of which torch.clamp gives half."""
    if not (checks.transformed() or result.requires_grad):
        return torch.clamp(result, low, high)
    return torch.where(result < low, low, torch.where(result > high, high, result))


def _asks_gradient(x_adv: Tensor, grad: Tensor, x: Tensor, eps: Tensor | None) -> bool:
    return x_adv.requires_grad or grad.requires_grad or x.requires_grad or (eps is not None and eps.requires_grad)


def refuse_overlap(name: str, value: Tensor | None, x_adv: Tensor) -> None:
    """`value` shares no memory with x_adv, or is the same elements: an in-place kernel reads and writes one by one."""
    if value is None or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return  # a graph that is traced or transformed has no memory yet, and writes last
    if value.untyped_storage()._cdata != x_adv.untyped_storage()._cdata or x_adv.numel() == 0:
        return
    spans = []
    for t in (value, x_adv):
        extent = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
        spans.append((t.storage_offset() * t.element_size(), (t.storage_offset() + extent) * t.element_size()))
    (start, end), (x_adv_start, x_adv_end) = spans
    same = start == x_adv_start and value.stride() == x_adv.stride() and value.dtype == x_adv.dtype
    if start < x_adv_end and x_adv_start < end and not same:
        raise BadValueError(
            f"{name} must not overlap x_adv in part, got bytes {start} to {end} and {x_adv_start} to {x_adv_end}"
        )


def _checked(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: Any, alpha: Any, clip: Any
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], tuple[float, ...], tuple[Tensor, Tensor] | None]:
    """(tensors, scalars) of the raw op, and the bounds of a clip per channel, which comes after it."""
    x_adv, grad, x = checks.images("x_adv", x_adv), checks.images("grad", grad), checks.images("x", x)
    checks.alike("grad", grad, "x_adv", x_adv, dtype=False)
    checks.alike("x", x, "x_adv", x_adv)
    eps, eps_high, eps_low = eps_arguments(eps, x_adv)
    alpha = checks.number("alpha", alpha)
    low, high = checks.clip_range(clip, x_adv)
    tensors = x_adv, checks.same_format(grad, x_adv), checks.same_format(x, x_adv), eps
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        # Rounding keeps order: rounding and then clipping to rounded bounds is clipping and then rounding.
        return tensors, (eps_high, eps_low, alpha, -math.inf, math.inf), (low, high)
    return tensors, (eps_high, eps_low, alpha, low, high), None
