"""epsilon_map: from a small class activation map to each pixel's eps, fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from part_fast import backends, checks
from part_fast.errors import BadValueError
from part_fast.ops.cam_mask import RULES, _cam_mask, parse_rule
from part_fast.ops.cam_mask import reference as mask_reference
from part_fast.ops.packed_epsilon import PackedEpsilon, eps_pair, refuse_columns
from part_fast.ops.upsample_cam import _upsample_cam, no_forward_mode, upsample_gradient
from part_fast.ops.upsample_cam import reference as upsample_reference


def _reference(cam: Tensor, height: int, width: int, rule: int, k: int, eps: float, eps_low: float) -> Tensor:
    dtype = checks.compute_dtype(cam)
    if RULES[rule] == "soft":
        weight = upsample_reference(cam, height, width).clamp(0, 1)[:, None]
        return eps_low + (eps - eps_low) * weight
    high, low = (torch.full((), value, dtype=dtype, device=cam.device) for value in (eps, eps_low))
    return torch.where(mask_reference(cam, height, width, rule, k), high, low)


_epsilon_map = backends.define(
    "_epsilon_map(Tensor cam, SymInt height, SymInt width, int rule, SymInt k, float eps, float eps_low) -> Tensor",
    _reference,
    lambda cam, height, width, rule, k, eps, eps_low: cam.new_empty(
        (cam.shape[0], 3 if RULES[rule] == "released" else 1, height, width), dtype=checks.compute_dtype(cam)
    ),
    kernels="epsilon_map",
)


class _SoftWeight(torch.autograd.Function):
    """eps_low + (eps - eps_low) * clamp(upsample_cam(cam), 0, 1) as (N,1,H,W), by the fused op."""

    @staticmethod
    def forward(cam: Tensor, height: int, width: int, eps: float, eps_low: float) -> Tensor:
        return _epsilon_map(cam, height, width, RULES.index("soft"), 0, eps, eps_low)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        cam, ctx.height, ctx.width, eps, eps_low = inputs
        ctx.spread, ctx.backend = eps - eps_low, backends.chosen()
        ctx.save_for_backward(cam)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (cam,) = ctx.saved_tensors
        wide = cam.to(checks.compute_dtype(cam))
        # On a bound the gradient passes, as in project_linf; torch's own clamp differs between its forms.
        u = _upsample_cam.on(ctx.backend, wide.detach(), ctx.height, ctx.width)
        grad = torch.where((u >= 0) & (u <= 1), grad_out[:, 0] * ctx.spread, torch.zeros_like(u))
        return upsample_gradient(ctx.backend, grad, wide).to(cam.dtype), None, None, None, None


class _SoftWeightTransformed(_SoftWeight):
    """With what torch.func asks for, and torch.compile refuses."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        raise NotImplementedError(no_forward_mode('epsilon_map(rule="soft")'))


def epsilon_map(
    cam: Tensor, size: tuple[int, int], eps: float | Tensor, eps_low: float | Tensor, rule: str = "zscore"
) -> Tensor:
    """Each pixel's eps from maps (N,h,w): float32 (float64 for float64) (N,M,H,W), in one pass over each small map.

    size: (H, W), neither smaller than the map's. eps, eps_low: image units, 0 <= eps_low <= eps; or tensors that
    broadcast to (N,M,H,W), whose values are not checked.
    rule: those of `cam_mask` ("zscore", "released" with M = 3, "quantile:q"), or "soft", M = 1:
    eps_low + (eps - eps_low) * clamp(u, 0, 1) with u = upsample_cam(cam, size), which is differentiable in cam, in
    reverse, to any order (forward mode is refused: NotImplementedError).
    Every rule is differentiable in a tensor eps and eps_low. A flat map gives eps_low everywhere.

    Equivalent to: `torch.where(cam_mask(cam, size, rule), eps, eps_low)`.
    Source: Zhang et al., ICML 2024 (PART), arXiv 2406.00685, section 3.2.
    Errors: TypeError or ValueError that names the argument; an unknown rule lists the known ones.
    """
    cam = checks.maps("cam", cam)
    height, width = checks.size_of(size, cam)
    number, k, channels = parse_rule(rule, height, width, soft=True)
    learned = isinstance(eps, Tensor) or isinstance(eps_low, Tensor)
    if learned:
        shape = (cam.shape[0], channels, height, width)
        eps, eps_low = (_budget(name, value, shape, cam) for name, value in (("eps", eps), ("eps_low", eps_low)))
        high, low = 1.0, 0.0
    else:
        high, low = eps_pair(eps, eps_low)
    if RULES[number] == "soft" and checks.transformed():
        result = _SoftWeightTransformed.apply(cam, height, width, high, low)
    elif RULES[number] == "soft" and torch.is_grad_enabled() and cam.requires_grad:
        result = _SoftWeight.apply(cam, height, width, high, low)
    else:
        result = _epsilon_map(cam.detach(), height, width, number, k, high, low)
    if not learned:
        return result
    if RULES[number] == "soft":
        return eps_low + (eps - eps_low) * result
    return torch.where(result > 0, eps, eps_low)


def packed_epsilon_map(
    cam: Tensor, size: tuple[int, int], eps: float, eps_low: float, rule: str = "zscore"
) -> PackedEpsilon:
    """`epsilon_map` as a PackedEpsilon, the bits written by the same fused pass; every rule but "soft".

    Equivalent to: `PackedEpsilon.pack(cam_mask(cam, size, rule), eps, eps_low)`.
    Errors: those of `epsilon_map`.
    """
    cam = checks.maps("cam", cam)
    height, width = checks.size_of(size, cam)
    number, k, _ = parse_rule(rule, height, width, soft=False)
    high, low = eps_pair(eps, eps_low)
    return PackedEpsilon(_cam_mask(cam.detach(), height, width, number, k, True), (height, width), high, low)


def _budget(name: str, value: Any, shape: tuple[int, ...], cam: Tensor) -> Tensor | float:
    if not isinstance(value, Tensor):
        return checks.number(name, value, 0)
    checks.tensor(name, value)
    if value.device != cam.device:
        raise BadValueError(f"{name} must be on the device of cam, {cam.device}, got {value.device}")
    refuse_columns(name, value, shape[3])
    dims = zip(reversed(value.shape), reversed(shape), strict=False)
    if value.ndim > 4 or any(d not in (1, full) for d, full in dims):
        raise BadValueError(f"{name} must broadcast to (N,M,H,W), {shape}, got {tuple(value.shape)}")
    return value.to(checks.compute_dtype(cam))
