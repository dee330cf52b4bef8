"""What an attack increases: callable(logits, y, *extra) -> (N,)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from part_fast import checks
from part_fast.errors import BadValueError

Loss = Callable[..., Tensor]

LOSSES = ("ce", "kl", "margin")


def objective(loss: str | Loss, clean: Tensor | None = None) -> tuple[Loss, tuple[Tensor, ...]]:
    """The attack loss of that name as callable(logits, y, *extra) -> (N,), and its extra; "kl" is against `clean`."""
    if callable(loss):
        return loss, ()
    if loss == "kl":
        if clean is None:
            raise BadValueError("clean must be the clean logits for loss 'kl', got None")
        return divergence, (widened(clean.detach()).softmax(1),)
    if loss == "ce":
        return cross_entropy, ()
    if loss == "margin":
        return margin, ()
    raise BadValueError(f"loss must be one of {', '.join(LOSSES)} or callable(logits, y), got {loss!r}")


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each image, (N,); y are class indices (N,) or probabilities (N,classes)."""
    logits = widened(logits)
    return F.cross_entropy(logits, as_target(y, logits), reduction="none")


def widened(logits: Tensor) -> Tensor:
    """Logits as losses compute with them: float64 for float64, else float32."""
    return logits.to(checks.compute_dtype(logits))


def as_target(y: Tensor, logits: Tensor) -> Tensor:
    """Labels for `F.cross_entropy`: probabilities in the logits' dtype."""
    return y.to(logits.dtype) if y.is_floating_point() else y


def divergence(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """KL divergence of the probabilities `target` (N,classes) from each image's softmax, (N,); y is not used.

    Source: Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019, equation 5.
    """
    return F.kl_div(widened(logits).log_softmax(1), target, reduction="none").sum(1)


def towards(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """-max(z_y - z_target + 50, 0) of each image's logits z, (N,); y and `target` are class indices (N,).

    Source: Gao et al., "Fast and Reliable Evaluation of Adversarial Robustness with Minimum-Margin Attack", ICML 2022.
    """
    return -(logit_of(logits, y) - logit_of(logits, target) + 50).clamp(min=0)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Largest wrong logit minus the right one, (N,); positive where the model is wrong."""
    logits = widened(logits)
    right = logits.gather(1, y[:, None])
    wrong = logits.scatter(1, y[:, None], -torch.inf)
    return wrong.amax(1) - right[:, 0]


def logit_of(logits: Tensor, index: Tensor) -> Tensor:
    return widened(logits).gather(1, index[:, None])[:, 0]
