"""Signs that a robust accuracy is too good to be true: gradient masking, and attacks out of order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from part_fast.attacks.ascend import clean_logits
from part_fast.attacks.catalogue import attack_of_evaluation
from part_fast.attacks.objectives import cross_entropy, margin
from part_fast.attacks.pgd import pgd
from part_fast.eval_mode import eval_mode
from part_fast.precision import full_float32

# Directions tried by the random search, and restarts by the gradient attack: a gradient that says anything beats
# 100 random corners of the cube, and one start is as good as five where the loss is smooth.
CORNERS, RESTARTS = 100, 5


def order_flags(is_correct: Mapping[str, Tensor]) -> list[str]:
    """Warnings, with their evidence, about accuracies in an order that no sound attack gives.

    is_correct: by attack, whether each image was right, bool (N,), the same images for all. Warned about: an attack
    above a weaker one (`_is_stronger`) by more than twice the standard error of their difference.
    """
    pairs = [(weak, strong) for weak in is_correct for strong in is_correct if _is_stronger(strong, weak)]
    return [
        f"{strong} is above {weak}: {more}"
        for weak, strong in pairs
        if (more := excess(is_correct[strong], is_correct[weak])) is not None
    ]


def _is_stronger(strong: str, weak: str) -> bool:
    """Whether an attack fools a network that does not mislead it wherever another one, or none, does.

    Any attack beside none; AutoAttack beside any within eps; more steps of the same; 20 steps beside one.
    """
    (attack, steps), (other, fewer) = map(attack_of_evaluation, (strong, weak))
    if attack is other or not other.reads_model:
        return attack is not other or steps > fewer
    if not attack.reads_model or other.strongest or other.reach > 1:  # which goes further than eps
        return False
    return attack.strongest or (steps >= 20 and fewer == 1)


def gradient_flags(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, generator: torch.Generator
) -> tuple[list[str], dict[str, Any]]:
    """Warnings, with their evidence, about gradients that mislead attacks; and the figures behind them.

    x: images (N,C,H,W) in [0,1]. y: class indices (N,). eps, alpha: image units. generator: on the CPU, of the starts.
    Looked at: the share of images whose input gradient is exactly zero; PGD with five times the steps; five restarts;
    a search over random corners of the eps cube, without gradients.
    Source: Athalye et al., "Obfuscated Gradients Give a False Sense of Security", ICML 2018, section 3.1.
    """
    leaf = x.detach().clone().requires_grad_()
    with eval_mode(model), torch.enable_grad():
        (grad,) = torch.autograd.grad(cross_entropy(model(leaf), y).sum(), leaf)
    zero = float((grad == 0).flatten(1).all(1).float().mean())

    def start() -> Tensor:
        noise = torch.rand(x.shape, generator=generator).to(x.device) * 2 - 1
        return (x + noise * eps).clamp(0, 1)

    def attacked(steps: int) -> Tensor:
        x_adv = pgd(model, x, y, eps, alpha, steps, start=start())
        return margin(clean_logits(model, x_adv), y) < 0

    once, longer = attacked(20), attacked(100)
    restarted = once.clone()
    for _ in range(RESTARTS - 1):
        restarted &= attacked(20)
    searched = torch.ones_like(once)
    for _ in range(CORNERS):
        corner = (torch.rand(x.shape, generator=generator) < 0.5).to(x.device).float() * 2 - 1
        searched &= margin(clean_logits(model, (x + eps * corner).clamp(0, 1)), y) < 0
    figures = {
        "zero_gradients": zero,
        "pgd20": _share(once),
        "pgd100": _share(longer),
        f"pgd20_{RESTARTS}_restarts": _share(restarted),
        f"random_{CORNERS}_corners": _share(searched),
        "n": len(x),
    }
    flags = []
    if zero > 0.01:
        flags.append(f"{100 * zero:.1f}% of the images have an input gradient of exactly zero")
    if (more := excess(longer, once)) is not None:
        flags.append(f"PGD-100 is weaker than PGD-20: {more}")
    if _share(once) - _share(restarted) > 0.05 and (more := excess(once, restarted)) is not None:
        flags.append(f"one start of PGD-20 is weaker than {RESTARTS}, so the loss is rugged: {more}")
    if (more := excess(once, searched)) is not None:
        flags.append(f"random corners beat PGD-20: {more}")
    return flags, figures


def gradient_agreement(model: nn.Module, fast: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Compare input gradients of the cross-entropy, whose signs PGD reads, in reduced precision with those in float32.

    model: in float32; TF32 is off while it runs. fast: the same model in reduced precision, as training attacks it.
    x: images (N,C,H,W). y: class indices (N,).
    Returns: zero_gradients, the share of values that are exactly zero by `fast` and not by `model`; sign_agreement, the
    share of those that are not zero by `model` whose sign is the same.
    """

    def gradient(of: nn.Module) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        with eval_mode(of), torch.enable_grad():
            (grad,) = torch.autograd.grad(cross_entropy(of(leaf), y).sum(), leaf)
        return grad

    with full_float32():
        exact = gradient(model)
    reduced = gradient(fast)
    same = ((exact > 0) & (reduced > 0)) | ((exact < 0) & (reduced < 0))
    return {
        "zero_gradients": float(((reduced == 0) & (exact != 0)).float().mean()),
        "sign_agreement": float(same.sum() / (exact != 0).sum().clamp(min=1)),
    }


def agreement_warning(agreement: Mapping[str, float]) -> str | None:
    """A warning if gradients in reduced precision differ enough to weaken the attack, else None."""
    zero, same = agreement["zero_gradients"], agreement["sign_agreement"]
    if zero <= 0.05 and same >= 0.95:
        return None
    return (
        f"{100 * zero:.1f}% of the input gradients have become zero, and {100 * same:.1f}% of what is left points as "
        "in fp32: the attack is weaker than it looks"
    )


def _share(is_correct: Tensor) -> float:
    return float(is_correct.float().mean())


def excess(strong: Tensor, weak: Tensor) -> str | None:
    """By how much the accuracy `strong` exceeds `weak`, if that is more than noise."""
    difference = strong.double() - weak.double()
    mean, error = float(difference.mean()), float(difference.std(correction=0)) / math.sqrt(len(difference))
    if mean <= 2 * error:
        return None
    return f"by {100 * mean:.2f} points, twice the standard error is {200 * error:.2f}"
