"""Labels that are probabilities: label smoothing."""

from __future__ import annotations

import torch
from torch import Tensor


def probabilities(labels: Tensor, classes: int) -> Tensor:
    """Class indices (N,) as probabilities (N,classes), float32; probabilities stay as they are. No GPU waits."""
    if labels.is_floating_point():
        return labels
    return (labels[:, None] == torch.arange(classes, device=labels.device)).float()


def smooth_labels(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Probabilities (N,classes), float32: `smoothing` of each label is shared evenly among all classes.

    labels: class indices (N,), or probabilities (N,classes).

    Equivalent to: `(1 - smoothing) * F.one_hot(labels, classes) + smoothing / classes`.
    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, section 7.
    """
    return (1 - smoothing) * probabilities(labels, classes) + smoothing / classes
