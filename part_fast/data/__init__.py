"""The named image data sets, in memory; crop and flip for images and masks alike."""

from part_fast.data.catalogue import DATASETS, load
from part_fast.data.memory import (
    Augmentation,
    Batch,
    Dataset,
    augment,
    balanced_indices,
    batch_length,
    draw_augmentation,
    to_float,
)

__all__ = [
    "DATASETS",
    "Augmentation",
    "Batch",
    "Dataset",
    "augment",
    "balanced_indices",
    "batch_length",
    "draw_augmentation",
    "load",
    "to_float",
]
