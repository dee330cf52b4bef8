"""eps_step_: an attack's step by a factor of each pixel's own eps, which also stores the perturbation in a bank."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from part_fast import backends, checks
from part_fast.checks import Clip
from part_fast.errors import BadTypeError, BadValueError, CannotRunError
from part_fast.ops.bank_start import bank_arguments, sources
from part_fast.ops.packed_epsilon import PackedEpsilon, dense_eps, eps_arguments
from part_fast.ops.pgd_step import refuse_overlap
from part_fast.ops.project_linf import clamped


def _reference_(
    x_adv: Tensor, grad: Tensor, x: Tensor, eps: Tensor | None, eps_high: float, eps_low: float,
    step: float, of_eps: bool, project: bool, clip_low: float, clip_high: float,
    bank: Tensor | None, places: Tensor | None, levels: float,
) -> None:  # fmt: skip
    dtype = checks.compute_dtype(x_adv)
    bound = torch.as_tensor(dense_eps(eps, eps_high, eps_low, x_adv), dtype=dtype, device=x_adv.device)
    # Not torch.sign: its value for NaN differs between devices, and a NaN gradient must move nothing.
    sign = (grad > 0).to(dtype) - (grad < 0).to(dtype)
    natural = x.to(dtype)
    moved = x_adv.to(dtype) + (bound * step if of_eps else step) * sign - natural
    result = natural + (clamped(moved, bound) if project else moved)
    result = checks.rounded(torch.clamp(result, clip_low, clip_high), x_adv.dtype)
    if bank is not None and places is not None:
        store_(bank, places, result.to(dtype) - natural, levels)
    x_adv.copy_(result)


def store_(bank: Tensor, places: Tensor, moved: Tensor, levels: float) -> None:
    """Write perturbations (N,C,H,W) to the stored pixels that they belong to, in units of 1/levels."""
    if bank.numel() == 0 or moved.numel() == 0:
        return
    q = torch.nan_to_num(moved * levels, nan=0.0).round().clamp(-127, 127).to(torch.int8).flatten(2)
    # One place more takes what lies outside.
    index, inside = sources(places, moved.shape[2], moved.shape[3])
    index = torch.where(inside, index, q.shape[2]).expand_as(q)
    # A row whose sample is unknown stands for the first that is known: written twice, and no GPU waits for a count.
    known = (places[:, 0] >= 0) & (places[:, 0] < len(bank))
    rows = torch.where(known, torch.arange(len(places), device=places.device), known.to(torch.int8).argmax())
    sample = torch.where(known.any(), places[rows, 0], 0)
    before = bank.flatten(2)[sample]
    after = torch.nn.functional.pad(before, (0, 1)).scatter(2, index[rows], q[rows])[..., :-1]
    bank[sample] = torch.where(known.any(), after, before).view(len(sample), *bank.shape[1:])


_eps_step_ = backends.define(
    "_eps_step_(Tensor(a!) x_adv, Tensor grad, Tensor x, Tensor? eps, float eps_high, float eps_low, float step, "
    "bool of_eps, bool project, float clip_low, float clip_high, Tensor(b!)? bank, Tensor? places, float levels) -> ()",
    _reference_,
    lambda x_adv, *args: None,
    kernels="eps_step",
)


def eps_step_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float | Tensor | PackedEpsilon,
    factor: float | None = None,
    clip: Clip = (0.0, 1.0),
    *,
    alpha: float | None = None,
    project: bool = True,
    bank: Tensor | None = None,
    places: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One step along the sign of grad by factor * eps of the pixel's own eps, in place; x_adv is returned.

    x_adv, x: images (N,C,H,W) of one dtype. grad: their shape, any floating dtype.
        x or grad in another format than x_adv's is copied; so is a strided x_adv, such as a crop, and written back.
    eps: image units (8/255); a float, a tensor that broadcasts to the images, or a PackedEpsilon.
    factor: how many times its own eps a pixel moves; negative to descend. In its place
    alpha: a step in image units, the same for every pixel, as in `pgd_step`.
    clip: (low, high), or None for no clip; each a number or one per channel, as in `pgd_step`.
    project: back into each pixel's eps ball around x; False leaves the step as it is, as N-FGSM does.
    bank, places, scale: as in `bank_start`, all three or none. The same launch writes the perturbation x_adv - x, as
        rounded and clipped, to the stored pixel that each pixel came from, as the nearest of its 255 levels (half to
        even). A perturbation past scale is stored as scale, NaN as 0; what was cropped away keeps what was stored.
    A zero or NaN in grad moves nothing; NaN in x_adv, x or (where it is used) eps stays NaN.
    No derivative: under autograd, arguments that require a gradient are refused.

    Equivalent to: `x_adv.copy_(torch.clamp(x + torch.clamp(x_adv + (factor * eps) * grad.sign() - x, -eps, eps),
    *clip))`, and for a bank, image by image and where the crop did not cut, to
    `bank[sample] = torch.round((x_adv - x) * (127 / scale)).clamp(-127, 127)`, moved back as the image was augmented;
    computed in float32 in this order and rounded once: every backend writes the same bits.
    Source: Wong et al., "Fast is better than free: Revisiting adversarial training", ICLR 2020; de Jorge et al., "Make
    some noise: reliable and efficient single-step adversarial training", NeurIPS 2022; the bank is that of Jia et al.,
    ECCV 2022.
    Errors: those of `pgd_step_` and `bank_start`, before anything is written. ValueError where two images of a batch
        are one sample, if values may be read; elsewhere it is not said whose perturbation is stored.
    """
    if checks.transformed():
        raise CannotRunError("eps_step_ must be used outside of torch.func transforms and forward-mode AD")
    given = x_adv
    x_adv, grad, x = checks.images("x_adv", x_adv), checks.images("grad", grad), checks.images("x", x)
    checks.alike("grad", grad, "x_adv", x_adv, dtype=False)
    checks.alike("x", x, "x_adv", x_adv)
    bound, eps_high, eps_low = eps_arguments(eps, x_adv)
    if (factor is None) == (alpha is None):
        raise BadValueError(f"factor must be given or alpha, one of the two, got {factor} and {alpha}")
    step = checks.number("factor", factor) if alpha is None else checks.number("alpha", alpha)
    low, high = checks.clip_range(clip, x_adv)
    if not isinstance(project, bool):
        raise BadTypeError(f"project must be True or False, got {project!r}")
    levels = _levels(bank, places, scale, x_adv)
    grad, x = checks.same_format(grad, x_adv), checks.same_format(x, x_adv)
    for name, value in (("x_adv", x_adv), ("grad", grad), ("x", x), ("eps", bound)):
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise BadTypeError(f"{name} must not require a gradient, which eps_step_ has not: detach it, or no_grad()")
    if x_adv is not given:  # a copy of strided images
        checks.unshared("x_adv", given)
    else:
        for name, value in (("grad", grad), ("x", x), ("eps", bound)):
            refuse_overlap(name, value, x_adv)
    places = None if places is None else places.contiguous()
    settings = bound, eps_high, eps_low, step, alpha is None, project
    if isinstance(low, Tensor):
        # The bank gets what is left after the clip, of images that may be x_adv itself.
        natural = x if bank is None else x.clone()
        _eps_step_(x_adv, grad, x, *settings, -math.inf, math.inf, None, None, 0.0)
        x_adv.clamp_(low, high)
        if bank is not None and places is not None:
            dtype = checks.compute_dtype(x_adv)
            store_(bank, places, x_adv.to(dtype) - natural.to(dtype), levels)
    else:
        _eps_step_(x_adv, grad, x, *settings, low, high, bank, places, levels)
    if not torch.compiler.is_compiling():
        # So that autograd refuses to use a value that was saved before it was overwritten here.
        torch.autograd.graph.increment_version(x_adv if bank is None else (x_adv, bank))
    return x_adv if x_adv is given else given.copy_(x_adv)


def _levels(bank: Any, places: Any, scale: Any, x_adv: Tensor) -> float:
    """Levels of a bank per image unit, 0 without a bank; checks the three arguments of one."""
    given = {"bank": bank, "places": places, "scale": scale}
    if all(value is None for value in given.values()):
        return 0.0
    for name, value in given.items():
        if value is None:
            raise BadTypeError(f"{name} must be given, as bank, places and scale belong together, got None")
    levels = 127 / bank_arguments(bank, places, scale, "x_adv", x_adv)
    if checks.readable(places):
        drawn = places[:, 0].unique().numel()
        if drawn < len(places):
            raise BadValueError(f"places must have a sample per image, got {drawn} samples for {len(places)} images")
    return levels
