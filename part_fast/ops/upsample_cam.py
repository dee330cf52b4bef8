"""upsample_cam: a small map, min-max normalised, enlarged by Keys bicubic interpolation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from part_fast import backends, checks


def keys_taps(size_in: int, size_out: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Source index and weight of the four taps of every output position, (size_out, 4) each.

    Keys 1981, a = -0.5, half-pixel centres; a tap outside the map weighs 0 and the rest are scaled to sum
    to 1. The phase comes from exact integers and every operation below is one rounding in `dtype`, in
    an order that the kernels repeat: all backends interpolate with the same bits.
    """
    out = torch.arange(size_out, device=device)
    centre = (2 * out + 1) * size_in - size_out  # times 2 * size_out
    left = torch.div(centre, 2 * size_out, rounding_mode="floor")
    remainder = (centre - left * (2 * size_out)).to(dtype)
    phase = (remainder / torch.full_like(remainder, 2 * size_out))[:, None]
    far, near = torch.cat([phase + 1, 2 - phase], 1), torch.cat([phase, 1 - phase], 1)
    outer = ((-0.5 * far + 2.5) * far - 4) * far + 2
    inner = (1.5 * near - 2.5) * near * near + 1
    weight = torch.stack([outer[:, 0], inner[:, 0], inner[:, 1], outer[:, 1]], 1)
    index = left[:, None] + torch.arange(-1, 3, device=device)
    weight = torch.where((index >= 0) & (index < size_in), weight, torch.zeros_like(weight))
    total = ((weight[:, 0] + weight[:, 1]) + weight[:, 2]) + weight[:, 3]
    return index.clamp(0, size_in - 1), weight / total[:, None]


def normalize(cam: Tensor) -> Tensor:
    """(N,h,w) to [0,1] by each map's minimum and maximum; a flat map gives zeros, NaN makes its map NaN."""
    low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
    return torch.where(high == low, torch.zeros_like(cam), (cam - low) / (high - low))


def reference(cam: Tensor, height: int, width: int) -> Tensor:
    """`upsample_cam` in plain PyTorch, in the compute dtype: rows first, then columns, as PIL does."""
    cam = normalize(cam.to(checks.compute_dtype(cam)))
    index, weight = keys_taps(cam.shape[2], width, cam.dtype, cam.device)
    rows = _weighted(cam[:, :, index], weight)
    index, weight = keys_taps(cam.shape[1], height, cam.dtype, cam.device)
    return _weighted(rows.transpose(1, 2)[:, :, index], weight).transpose(1, 2).contiguous()


def _weighted(taps: Tensor, weight: Tensor) -> Tensor:
    taps = taps * weight
    return ((taps[..., 0] + taps[..., 1]) + taps[..., 2]) + taps[..., 3]


def _reference_op(cam: Tensor, height: int, width: int) -> Tensor:
    return checks.rounded(reference(cam, height, width), cam.dtype)


def _reference_bwd(grad_out: Tensor, cam: Tensor) -> Tensor:
    dtype = checks.compute_dtype(cam)
    small = cam.to(dtype)
    height, width = grad_out.shape[1:]
    grad = _matrix(small.shape[1], height, small).T @ grad_out.to(dtype) @ _matrix(small.shape[2], width, small)
    low, high = small.amin((1, 2), keepdim=True), small.amax((1, 2), keepdim=True)
    flat = high == low
    spread = torch.where(flat, torch.ones_like(high), high - low)  # no division by 0, which derivatives would meet
    scaled = (small - low) / spread
    at_low, at_high = small == low, small == high
    # As torch differentiates amin and amax: shared evenly between ties.
    from_low = ((scaled - 1) * grad).sum((1, 2), keepdim=True) / at_low.sum((1, 2), keepdim=True)
    from_high = (-scaled * grad).sum((1, 2), keepdim=True) / at_high.sum((1, 2), keepdim=True)
    result = (grad + at_low * from_low + at_high * from_high) / spread
    return torch.where(flat, torch.zeros_like(result), result).to(cam.dtype)


def upsample_gradient(backend: str | None, grad_out: Tensor, cam: Tensor) -> Tensor:
    """Gradient for cam of `upsample_cam`: by a backend, or in plain PyTorch where its derivative may be asked for."""
    if checks.derivative_of_backward():
        return _reference_bwd(grad_out, cam)
    return _upsample_cam_bwd.on(backend, grad_out.contiguous(), cam)


def _matrix(size_in: int, size_out: int, like: Tensor) -> Tensor:
    """The taps as a matrix (size_out, size_in)."""
    index, weight = keys_taps(size_in, size_out, like.dtype, like.device)
    matrix = torch.zeros(size_out, size_in, dtype=like.dtype, device=like.device)
    return matrix.scatter_add_(1, index, weight)


_upsample_cam = backends.define(
    "_upsample_cam(Tensor cam, SymInt height, SymInt width) -> Tensor",
    _reference_op,
    lambda cam, height, width: cam.new_empty((cam.shape[0], height, width)),
    kernels="upsample_cam",
)
_upsample_cam_bwd = backends.define(
    "_upsample_cam_bwd(Tensor grad_out, Tensor cam) -> Tensor",
    _reference_bwd,
    lambda grad_out, cam: torch.empty_like(cam),
    kernels="upsample_cam",
)


class _UpsampleCam(torch.autograd.Function):
    @staticmethod
    def forward(cam: Tensor, height: int, width: int) -> Tensor:
        return _upsample_cam(cam, height, width)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.backend = backends.chosen()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (cam,) = ctx.saved_tensors
        return upsample_gradient(ctx.backend, grad_out, cam), None, None


class _UpsampleCamTransformed(_UpsampleCam):
    """With what torch.func asks for, and torch.compile refuses."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        raise NotImplementedError(no_forward_mode("upsample_cam"))


def no_forward_mode(op: str) -> str:
    return f"{op} has no forward-mode derivative: use reverse mode, such as torch.func.grad or jacrev, to any order"


def upsample_cam(cam: Tensor, size: tuple[int, int]) -> Tensor:
    """Normalise each map to [0,1] by its minimum and maximum, then enlarge it to `size`: (N,h,w) -> (N,H,W).

    cam: floating; a flat map gives zeros. size: (H, W), neither smaller than the map's; an int is both.
    Keys bicubic, a = -0.5, half-pixel centres, weights renormalised at the edges; overshoot past [0,1] is kept.
    Computed in float32 and rounded once to cam's dtype. Differentiable in reverse, to any order (forward mode
    is refused: NotImplementedError); ties at the minimum and maximum share their
    gradient evenly, as in `torch.amin`; a flat map gets zeros.

    Equivalent to: `PIL.Image.fromarray(normalized, "F").resize((W, H), PIL.Image.BICUBIC)`, map by map.
    Source: Keys, IEEE Trans. ASSP 29(6), 1981, eq. 15.
    Errors: TypeError or ValueError that names the argument.
    """
    cam = checks.maps("cam", cam)
    height, width = checks.size_of(size, cam)
    if checks.transformed():
        return _UpsampleCamTransformed.apply(cam, height, width)
    if torch.is_grad_enabled() and cam.requires_grad:
        return _UpsampleCam.apply(cam, height, width)
    return _upsample_cam(cam, height, width)
