"""What PART computes, without part_fast: plain, slow, an image at a time; PIL enlarges, matplotlib colours.

Written from the papers and from what the published code was seen to do; nothing of part_fast is imported.
"""

from __future__ import annotations

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn


def cam(activation: Tensor, gradient: Tensor, method: str = "gradcam") -> Tensor:
    """Class activation maps (N,h,w), float64, of activations and gradients (N,K,h,w)."""
    a, g = activation.double(), gradient.double()
    weights = {
        "gradcam": lambda: g.mean((2, 3), keepdim=True),
        "xgradcam": lambda: (g * a).sum((2, 3), keepdim=True) / (a + 1e-8).sum((2, 3), keepdim=True),
        "layercam": lambda: g.clamp_min(0),
        "hirescam": lambda: g,
    }
    return (weights[method]() * a).sum(1).clamp_min(0)


def normalised(cam: Tensor) -> Tensor:
    """A map (h,w) from 0 to 1; zeros where it is flat."""
    low, high = cam.min(), cam.max()
    return (cam - low) / (high - low) if high > low else torch.zeros_like(cam)


def enlarged(cam: Tensor, size: tuple[int, int]) -> Tensor:
    """A normalised map (h,w), enlarged by PIL: bicubic, float32 (H,W)."""
    image = Image.fromarray(cam.float().numpy())
    return torch.from_numpy(np.array(image.resize((size[1], size[0]), Image.Resampling.BICUBIC)))


def zscore_mask(cam: Tensor, size: tuple[int, int]) -> Tensor:
    """The paper's mask, bool (1,H,W), of a normalised map (h,w): more than a deviation above the mean."""
    u = enlarged(cam, size).double()
    deviation = u.std(correction=0)
    return ((u - u.mean()) / deviation > 1)[None] if deviation > 0 else torch.zeros(1, *size, dtype=torch.bool)


def released_mask(cam: Tensor, size: tuple[int, int]) -> Tensor:
    """The published code's mask, bool (3,H,W), of a normalised map (h,w): the same of the coloured map's values."""
    if not cam.max() > cam.min():
        return torch.zeros(3, *size, dtype=torch.bool)
    rgb = matplotlib.colormaps["jet"](enlarged(cam, size).numpy() ** 2)[:, :, :3]
    return torch.from_numpy((rgb - rgb.mean()) / rgb.std() > 1).permute(2, 0, 1)


def activation_and_gradient(model: nn.Module, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer puts out, and the gradient of each image's largest logit in it; eval mode."""
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(model.eval()(x).amax(1).sum(), kept)
    finally:
        handle.remove()
    return kept[0].detach(), gradient


def pgd_step(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: Tensor, alpha: float, clip: tuple[float, float] | None = (0.0, 1.0)
) -> Tensor:
    """One step along the sign, back into the ball, clipped; `project_linf` with alpha 0 and clip None.

    By numpy, in float32 (float64 for float64 images), rounded once. A NaN in the gradient moves nothing. eps is each
    pixel's own.
    """
    kind = np.float64 if x_adv.dtype == torch.float64 else np.float32
    wide = torch.float64 if kind is np.float64 else torch.float32
    start, natural, bound = (value.to(wide).numpy() for value in (x_adv, x, eps))
    direction = grad.double().numpy()
    with np.errstate(invalid="ignore"):
        sign = (direction > 0).astype(kind) - (direction < 0).astype(kind)
        offset = start + kind(alpha) * sign - natural
        result = natural + np.minimum(np.maximum(offset, -bound), bound)
        if clip is not None:
            result = np.minimum(np.maximum(result, kind(clip[0])), kind(clip[1]))
    return torch.from_numpy(np.asarray(result)).to(x_adv.dtype)


def pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, start: Tensor, steps: int, alpha: float) -> Tensor:
    """PGD on the cross-entropy, from `start` as it is."""
    model.eval()
    x_adv = start.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
        moved = x_adv.detach() + alpha * grad.sign()
        x_adv = (x + (moved - x).clamp(-eps, eps)).clamp(0, 1)
    return x_adv.detach()
