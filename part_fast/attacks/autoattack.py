"""AutoAttack, standard version, by its authors' code in the package `pyautoattack`."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from part_fast import checks
from part_fast.attacks.ascend import check_images, plain
from part_fast.errors import BadTypeError, BadValueError
from part_fast.eval_mode import eval_mode, grads_kept, input_gradient
from part_fast.ops.project_linf import project_linf
from part_fast.optional import needs
from part_fast.random_state import generators_put_back


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float = 8 / 255,
    seed: int = 0,
    *,
    clip: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Adversarial images like x: APGD-CE, targeted APGD, targeted FAB, Square, each on the images
    that the ones before did not fool.

    x: images (N,C,H,W) within clip, float32. y: class indices (N,). eps: image units, one for all pixels. seed: of
        every attack.
    The attacks draw from the random generators of the process, which are put back; calls in several threads take turns.
    The model runs in eval mode and gets its mode back; no .grad is touched.
    clip: (low, high), two numbers. The attacks work in [0,1]: images and eps are scaled to it, and the result back.
    With fewer than ten classes the targeted attacks take every wrong one. With fewer than four there is no targeted
    APGD, whose loss divides by a difference from the third and fourth largest logit: the other three run, and a warning
    says so.

    Source: Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
    Parameter-free Attacks", ICML 2020.
    Errors: ImportError without pyautoattack, saying how to get it; TypeError or ValueError that names the argument.
    """
    kind = load_autoattack()
    checks.model(model)
    if not (isinstance(clip, (tuple, list)) and all(isinstance(bound, numbers.Real) for bound in clip)):
        raise BadTypeError(f"clip must be two numbers for AutoAttack: normalise inside the model, got {clip!r}")
    low, high = checks.clip_range(clip)
    span = high - low
    if not 0 < span < math.inf:
        raise BadValueError(f"clip must be two finite numbers for AutoAttack, low < high, got {clip!r}")
    x = check_images(x, checks.number("eps", eps, 0), (low, high))
    if x.dtype != torch.float32:
        raise BadTypeError(f"x must be float32 for AutoAttack, whose code computes in it, got {x.dtype}")
    checks.labels("y", y, x)
    if x.shape[0] == 0:
        return x.clone()
    scaled = (low, high) != (0.0, 1.0)
    attacked = (lambda z: model(z * span + low)) if scaled else model
    with generators_put_back(x.device), eval_mode(model), grads_kept(model), torch.inference_mode(False):
        x, y = plain(x), plain(y)
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            logits = checks.logits(model(leaf), x)
            if input_gradient(logits.sum(), leaf) is None:
                raise BadValueError("model must lead from its input to the logits, got logits that do not depend on x")
        classes = logits.shape[1]
        checks.labels("y", y, x, classes)
        if classes < 2:
            raise BadValueError("model must give at least 2 classes for AutoAttack, got 1")
        attack = kind(attacked, eps=eps / span, seed=seed, device=x.device)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
        if classes < 4:
            attack.attacks_to_run = [name for name in attack.attacks_to_run if name != "apgd-t"]
            warnings.warn(
                f"AutoAttack runs without targeted APGD, whose loss is not defined for {classes} classes: it takes 4",
                stacklevel=2,
            )
        z = ((x - low) / span if scaled else x).clamp(0, 1)  # x may lie outside by rounding
        z = z.contiguous()  # pyautoattack takes views that others have not
        z_adv: Tensor = attack.run_standard_evaluation(z.clone(), y.clone(), batch_size=x.shape[0])[0]
        if not scaled:
            return checks.same_format(z_adv, x)
        x_adv = torch.where(z_adv == z, x, z_adv * span + low)
        return checks.same_format(project_linf(x_adv, x, eps).clamp(low, high), x)  # scaling rounds


def load_autoattack() -> Any:
    """The class of pyautoattack. Errors: ImportError where it is missing, saying how to get it."""
    with needs("pyautoattack", "aa"):
        from pyautoattack import AutoAttack
    return AutoAttack
