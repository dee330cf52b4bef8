"""What an attack increases: callable(logits, y, *extra) -> (N,)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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
        return divergence, (clean.detach().float().softmax(1),)
    if loss == "ce":
        return cross_entropy, ()
    if loss == "margin":
        return margin, ()
    raise BadValueError(f"loss must be one of {', '.join(LOSSES)} or callable(logits, y), got {loss!r}")


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each image, (N,); y are class indices (N,) or probabilities (N,classes)."""
    return F.cross_entropy(logits.float(), as_target(y), reduction="none")


def as_target(y: Tensor) -> Tensor:
    """Labels for `F.cross_entropy` with float32 logits: probabilities become float32."""
    return y.float() if y.is_floating_point() else y


def divergence(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """KL divergence of each image's softmax from the probabilities `target` (N,classes), (N,)."""
    return F.kl_div(logits.float().log_softmax(1), target, reduction="none").sum(1)


def towards(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The minimum-margin attack's loss towards the classes `target` (N,), (N,)."""
    return -(logit_of(logits, y) - logit_of(logits, target) + 50).clamp(min=0)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Largest wrong logit minus the right one, (N,); positive where the model is wrong."""
    right = logits.gather(1, y[:, None])
    wrong = logits.scatter(1, y[:, None], -torch.inf)
    return wrong.amax(1) - right[:, 0]


def logit_of(logits: Tensor, index: Tensor) -> Tensor:
    return logits.float().gather(1, index[:, None])[:, 0]
