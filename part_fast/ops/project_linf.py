"""project_linf: back into the l-infinity ball of each pixel's own eps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from part_fast import backends, checks
from part_fast.ops.packed_epsilon import PackedEpsilon, dense_eps, eps_arguments


def clamped(moved: Tensor, bound: Tensor | float) -> Tensor:
    """`moved` within +-bound; NaN in either stays."""
    return torch.clamp(moved, -bound, bound)  # type: ignore[arg-type]  # torch's stubs know no Tensor | float


def _reference(x_adv: Tensor, x: Tensor, eps: Tensor | None, eps_high: float, eps_low: float) -> Tensor:
    dtype = checks.compute_dtype(x_adv)
    bound = dense_eps(eps, eps_high, eps_low, x_adv)
    natural = x.to(dtype)
    return checks.rounded(natural + clamped(x_adv.to(dtype) - natural, bound), x_adv.dtype)


def _reference_bwd(
    grad_out: Tensor, x_adv: Tensor, x: Tensor, eps: Tensor | None, eps_high: float, eps_low: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = checks.compute_dtype(x_adv)
    bound = dense_eps(eps, eps_high, eps_low, x_adv)
    moved = x_adv.to(dtype) - x.to(dtype)
    return split_gradient(grad_out, moved, bound, eps)


def split_gradient(
    grad_out: Tensor, moved: Tensor, bound: Tensor | float, eps: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x + clamp(moved, -bound, bound) for x_adv, x and eps, where moved = x_adv - x.

    Past the bound the value is x +- eps; on the bound (a tie) and for NaN it is x_adv's.
    The third is empty where eps has no derivative (a float, packed bits).
    """
    above, below = moved > bound, moved < -bound
    outside = above | below
    zero = torch.zeros((), dtype=grad_out.dtype, device=grad_out.device)
    if eps is None or eps.dtype == torch.uint8:
        grad_eps = grad_out.new_empty(0)
    else:
        grad_eps = torch.where(above, grad_out, torch.where(below, -grad_out, zero)).to(eps.dtype)
    return torch.where(outside, zero, grad_out), torch.where(outside, grad_out, zero), grad_eps


def split_tangent(
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None], moved: Tensor, bound: Tensor | float
) -> Tensor:
    """Forward-mode derivative of x + clamp(moved, -bound, bound) along those of x_adv, x and eps; None is zero."""
    x_adv, x, eps = (torch.zeros_like(moved) if t is None else t.to(moved.dtype) for t in tangents)
    return torch.where(moved > bound, x + eps, torch.where(moved < -bound, x - eps, x_adv))


def fake_bwd(grad_out: Tensor, eps: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of (grad_x_adv, grad_x, grad_eps)."""
    dense = eps is not None and eps.dtype != torch.uint8
    grad_eps = torch.empty_like(grad_out, dtype=eps.dtype) if dense else grad_out.new_empty(0)  # type: ignore[union-attr]
    return torch.empty_like(grad_out), torch.empty_like(grad_out), grad_eps


_project_linf = backends.define(
    "_project_linf(Tensor x_adv, Tensor x, Tensor? eps, float eps_high, float eps_low) -> Tensor",
    _reference,
    lambda x_adv, x, eps, eps_high, eps_low: torch.empty_like(x_adv),
    kernels="project_linf",
)
_project_linf_bwd = backends.define(
    "_project_linf_bwd(Tensor grad_out, Tensor x_adv, Tensor x, Tensor? eps, float eps_high, float eps_low)"
    " -> (Tensor, Tensor, Tensor)",
    _reference_bwd,
    lambda grad_out, x_adv, x, eps, eps_high, eps_low: fake_bwd(grad_out, eps),
    kernels="project_linf",
)


class _ProjectLinf(torch.autograd.Function):
    @staticmethod
    def forward(x_adv: Tensor, x: Tensor, eps: Tensor | None, eps_high: float, eps_low: float) -> Tensor:
        return _project_linf(x_adv, x, eps, eps_high, eps_low)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.eps_values, ctx.backend = inputs[3:], backends.chosen()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x_adv, x, eps = ctx.saved_tensors
        if checks.derivative_of_backward():
            gradients = _reference_bwd(grad_out, x_adv, x, eps, *ctx.eps_values)
        else:
            grad_out = checks.same_format(grad_out, x_adv)
            gradients = _project_linf_bwd.on(ctx.backend, grad_out, x_adv, x, eps, *ctx.eps_values)
        grad_x_adv, grad_x, grad_eps = gradients
        return grad_x_adv, grad_x, grad_eps if ctx.needs_input_grad[2] else None, None, None


class _ProjectLinfTransformed(_ProjectLinf):
    """With what torch.func and forward-mode AD ask for, and torch.compile refuses."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _ProjectLinf.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def jvp(ctx: Any, x_adv_t: Tensor | None, x_t: Tensor | None, eps_t: Tensor | None, *_: None) -> Tensor:
        x_adv, x, eps = ctx.saved_tensors
        dtype = checks.compute_dtype(x_adv)
        moved = x_adv.to(dtype) - x.to(dtype)
        eps_high, eps_low = ctx.eps_values
        bound = dense_eps(eps, eps_high, eps_low, x_adv)
        return split_tangent((x_adv_t, x_t, eps_t), moved, bound).to(x_adv.dtype)


def project_linf(x_adv: Tensor, x: Tensor, eps: float | Tensor | PackedEpsilon) -> Tensor:
    """Project x_adv onto the l-infinity ball of radius eps around x, each pixel with its own eps.

    x_adv, x: images (N,C,H,W) of one dtype. What is neither contiguous nor channels_last is copied, and an x in
        another format than x_adv's too.
    eps: image units (8/255); a float, a tensor that broadcasts to the images, or a PackedEpsilon.
    Returns a new tensor like x_adv. Differentiable in x_adv, x and a tensor eps, forward and in reverse, to any order;
    exactly on the bound the gradient belongs to x_adv. torch.vmap maps it over any dimension.

    Equivalent to: `x + torch.clamp(x_adv - x, -eps, eps)`, computed in float32 and rounded once.
    Errors: TypeError or ValueError that names the argument, before anything is computed.
    """
    x_adv, x = checks.images("x_adv", x_adv), checks.images("x", x)
    checks.alike("x", x, "x_adv", x_adv)
    arguments = eps_arguments(eps, x_adv)
    x = checks.same_format(x, x_adv)
    if checks.transformed():
        return _ProjectLinfTransformed.apply(x_adv, x, *arguments)
    if torch.is_grad_enabled() and (
        x_adv.requires_grad or x.requires_grad or (arguments[0] is not None and arguments[0].requires_grad)
    ):
        return _ProjectLinf.apply(x_adv, x, *arguments)
    return _project_linf(x_adv, x, *arguments)
