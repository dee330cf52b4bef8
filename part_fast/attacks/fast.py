"""Fast attacks with a budget per pixel: one step from noise, or few from the perturbation of an epoch ago."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from part_fast import checks
from part_fast.attacks.ascend import LastStep, Model, attack, starting_point
from part_fast.attacks.objectives import Loss
from part_fast.checks import Clip
from part_fast.errors import BadTypeError, BadValueError
from part_fast.ops.bank_view import BankView
from part_fast.ops.packed_epsilon import PackedEpsilon
from part_fast.ops.uniform_start import uniform_start


def fgsm_rs(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor | PackedEpsilon,
    factor: float = 1.25,
    *,
    start: str | Tensor = "uniform",
    loss: str | Loss = "ce",
    clip: Clip = (0.0, 1.0),
) -> Tensor:
    """FGSM from a random start: adversarial images like x, one step of `factor` times each pixel's own eps.

    Arguments, modes and errors as in `pgd`. factor: the step in units of the pixel's own eps; after it the pixel is
    projected back into its eps, and clipped. start "uniform": noise within each pixel's own eps, then clipped, made by
    `uniform_start` from a seed that torch's CPU generator gives, so that `torch.manual_seed` reproduces it on every
    device and no GPU waits. As a training attack it can overfit catastrophically: it is then resisted, and PGD is not.
    The authors' code trains with attacks in train mode; here the model is in eval mode, as in `pgd`.

    Equivalent to, besides modes and gradients:
        x_adv = (x + (2 * torch.rand_like(x) - 1) * eps).clamp(*clip).requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
        x_adv = (x + (x_adv.detach() + factor * eps * grad.sign() - x).clamp(-eps, eps)).clamp(*clip)
    Source: Wong et al., "Fast is better than free: Revisiting adversarial training", ICLR 2020, algorithm 3.
    """
    begin = functools.partial(_noisy, eps=eps, scale=1.0, start=start, clip=clip)
    return attack(model, x, y, eps, 0.0, 1, begin, loss, clip, last=LastStep(factor))


def n_fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor | PackedEpsilon,
    factor: float = 1.0,
    *,
    noise: float = 2.0,
    start: str | Tensor = "uniform",
    loss: str | Loss = "ce",
    clip: Clip = (0.0, 1.0),
) -> Tensor:
    """N-FGSM, a step from strong noise that is not projected: images like x, moved by up to (noise + factor) eps.

    Arguments, modes and errors as in `pgd`, random numbers as in `fgsm_rs`. noise: of the start "uniform", in units of
    each pixel's own eps. factor: the step, likewise. The noisy images are clipped before the gradient is taken, as in
    the authors' code, and again after the step. A start that is given is used as it is.

    Equivalent to, besides modes and gradients:
        noisy = (x + (2 * torch.rand_like(x) - 1) * noise * eps).clamp(*clip).requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(noisy), y), noisy)
        x_adv = (noisy.detach() + factor * eps * grad.sign()).clamp(*clip)
    Source: de Jorge et al., "Make Some Noise: Reliable and Efficient Single-Step Adversarial Training", NeurIPS 2022,
    algorithm 1, with the defaults of section 4: noise 2, factor 1, no projection.
    """
    scale = checks.number("noise", noise, 0)
    begin = functools.partial(_noisy, eps=eps, scale=scale, start=start, clip=clip)
    return attack(model, x, y, eps, 0.0, 1, begin, loss, clip, last=LastStep(factor, project=False))


def pgi(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor | PackedEpsilon,
    factor: float = 1.0,
    *,
    start: BankView,
    loss: str | Loss = "ce",
    clip: Clip = (0.0, 1.0),
) -> Tensor:
    """FGSM-PGI, the step from the perturbation that each sample had an epoch ago: adversarial images like x.

    Arguments, modes and errors as in `pgd`. start: `bank.at(indices, augmentation)` of a PerturbationBank, whose eps is
    the largest that eps may hold; what was stored is cut to each pixel's own eps of now. factor: the step, in units of
    each pixel's own eps. The new perturbation is written back to the bank by the launch that makes the step.

    Equivalent to, besides modes and gradients, with `begin = start.start(x, eps, clip)`:
        (grad,) = torch.autograd.grad(F.cross_entropy(model(begin), y), begin)
        x_adv = (x + (begin + factor * eps * grad.sign() - x).clamp(-eps, eps)).clamp(*clip)
    and x_adv - x is stored. Training that follows the paper takes `begin` before the attack, and adds
    `10 * F.mse_loss(model(x_adv), model(begin))` to its loss, with gradients through both.
    Source: Jia et al., "Prior-Guided Adversarial Initialization for Fast Adversarial Training", ECCV 2022: FGSM-EP,
    the perturbation of the epoch before, equations 4 and 8.
    Errors: also ValueError for an eps larger than the bank's, and what `part_fast.ops.bank_start` raises.
    """
    begin = functools.partial(_stored, eps=eps, start=start, clip=clip)
    return attack(model, x, y, eps, 0.0, 1, begin, loss, clip, last=LastStep(factor, store=start))


def warm(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor | PackedEpsilon,
    alpha: float = 2 / 255,
    steps: int = 2,
    *,
    start: BankView,
    loss: str | Loss = "ce",
    clip: Clip = (0.0, 1.0),
) -> Tensor:
    """PGD of `steps` steps from the perturbation that each sample had an epoch ago: adversarial images like x.

    Arguments, modes and errors as in `pgd`; start, and its errors, as in `pgi`. steps: at least 1. The new perturbation
    is written back to the bank by the last step.

    Equivalent to: `pgd(model, x, y, eps, alpha, steps, start=start.start(x, eps, clip), loss=loss, clip=clip)`, whose
    result less x is stored.
    Source: Zheng et al., "Efficient Adversarial Training with Transferable Adversarial Examples", CVPR 2020 (ATTA).
    """
    begin = functools.partial(_stored, eps=eps, start=start, clip=clip)
    checks.count("steps", steps, 1)
    return attack(model, x, y, eps, alpha, steps, begin, loss, clip, last=LastStep(alpha=alpha, store=start))


def _noisy(x: Tensor, eps: float | Tensor | PackedEpsilon, scale: float, start: str | Tensor, clip: Clip) -> Tensor:
    """Where one step begins: `start`, whose "uniform" noise is within scale * eps."""
    if isinstance(start, Tensor) or start != "uniform":
        return starting_point(x, eps, start, clip)
    seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    return uniform_start(x, eps, scale, clip, seed=seed)


def _stored(x: Tensor, eps: float | Tensor | PackedEpsilon, start: BankView, clip: Clip) -> Tensor:
    """Where the perturbation of an epoch ago leads."""
    if not isinstance(start, BankView):
        raise BadTypeError(f"start must be what PerturbationBank.at gives, got {type(start).__name__}")
    if not isinstance(eps, Tensor) or checks.readable(eps):
        largest = eps.eps if isinstance(eps, PackedEpsilon) else float(eps.max()) if isinstance(eps, Tensor) else eps
        rounding = torch.finfo(eps.dtype if isinstance(eps, Tensor) else torch.float32).eps
        if largest > start.scale * (1 + 2 * rounding):
            raise BadValueError(f"eps must be at most that of the bank, {start.scale:g}, got {largest:g}")
    return start.start(x, eps, clip)
