"""SVHN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from part_fast.data.files import read_mat
from part_fast.data.memory import Dataset
from part_fast.data.places import dataset_of, download_by, first_found, not_found, roots, say_if_partial
from part_fast.errors import BadValueError

SVHN_CLASSES = tuple("0123456789")


def load_svhn(split: str, root: Path | None, download: bool) -> Dataset:
    file = f"{split}_32x32.mat"

    def find(folder: Path) -> list[Path] | None:
        return [folder / file] if (folder / file).is_file() else None

    def fetch(datasets: Any, target: Path) -> None:
        # torchvision's class would read what it has fetched, which needs scipy.
        url, name, md5 = datasets.SVHN.split_list[split]
        datasets.utils.download_url(url, str(target), name, md5)

    places = [place for base in roots(root) for place in (base / "svhn", base)]
    files = first_found(places, find)
    if files is None and download:
        places = [download_by("SVHN", root, fetch)]
        files = first_found(places, find)
    if files is None:
        raise not_found("svhn", file, places, "")
    arrays = read_mat(files[0], "X", "y")
    pixels, digits = arrays["X"], arrays["y"].ravel()
    if len(digits) != max(arrays["y"].shape):
        raise BadValueError(f"{files[0]}: y takes a label per image (N,1), got {arrays['y'].shape}")
    # MATLAB drops the last dimension of a single image.
    pixels = pixels[..., np.newaxis] if pixels.ndim == 3 else pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3):
        raise BadValueError(f"{files[0]}: X takes uint8 (32,32,3,N), got {pixels.dtype} {arrays['X'].shape}")
    if pixels.shape[3] != len(digits):
        raise BadValueError(f"{files[0]} holds {pixels.shape[3]} images but {len(digits)} labels")
    wrong = digits[~np.isin(digits, np.arange(1, 11))]
    if len(wrong):
        raise BadValueError(f"{files[0]}: y takes integers from 1 to 10 (the digit 0), got {wrong[0]}")
    say_if_partial("svhn", split, len(digits), 73_257 if split == "train" else 26_032, files[0].parent)
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)))
    return dataset_of("svhn", split, images, digits % 10, SVHN_CLASSES, files[0])
