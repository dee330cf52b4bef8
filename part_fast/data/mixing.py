"""Labels that are probabilities: label smoothing, and CutMix, which mixes the images of a batch too."""

from __future__ import annotations

import math
from dataclasses import dataclass

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


@dataclass(frozen=True)
class CutMix:
    """A drawn box, in which each image of a batch shows another one of it; applied to images, eps maps and labels.

    partner: int64 (N,), whose pixels the box shows. rows, columns: the box, from the first up to the second, not
    included. area: the box's share of the image, which is the partner's share of the label.
    """

    partner: Tensor
    rows: tuple[int, int]
    columns: tuple[int, int]
    area: float

    def images(self, images: Tensor) -> Tensor:
        """(N,C,H,W) with the box of each one's partner; a new tensor. Eps maps are mixed alike."""
        mixed = images.clone()
        box = (slice(None), slice(None), slice(*self.rows), slice(*self.columns))
        mixed[box] = images[box][self.partner]
        return mixed

    def labels(self, labels: Tensor, classes: int) -> Tensor:
        """Probabilities (N,classes), float32, of class indices (N,): by the share of the pixels that each label has."""
        own = probabilities(labels, classes)
        return (1 - self.area) * own + self.area * own[self.partner]


def draw_cutmix(images: Tensor, probability: float) -> CutMix | None:
    """One box for a batch of images (N,C,H,W), with that probability; else None.

    The share that the box leaves is uniform in [0,1], which is Beta(1,1), its proportions are the image's, and its
    middle is uniform in the image; what lies outside is cut off. Drawn from the CPU's generator, the partners from that
    of the images' device.

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features",
    ICCV 2019, section 3.1; in adversarial training: Rebuffi et al., "Data Augmentation Can Improve Robustness",
    NeurIPS 2021.
    """
    chosen, share, middle_y, middle_x = torch.rand(4, dtype=torch.float64).tolist()
    if chosen >= probability:
        return None
    height, width = images.shape[2:]
    side = math.sqrt(1 - share)
    rows, columns = _cut(height, side, middle_y), _cut(width, side, middle_x)
    area = (rows[1] - rows[0]) * (columns[1] - columns[0]) / (height * width)
    return CutMix(torch.randperm(len(images), device=images.device), rows, columns, area)


def _cut(length: int, side: float, middle: float) -> tuple[int, int]:
    """The part of 0..length that a cut covers, `side` of it long, around `middle` of it."""
    half, at = int(length * side) // 2, int(length * middle)
    return max(at - half, 0), min(at + half, length)
