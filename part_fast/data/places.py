"""Where data sets are looked for, and how a missing one is downloaded."""

from __future__ import annotations

import os
import tarfile
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from part_fast.data.memory import Dataset
from part_fast.errors import BadValueError, MissingFileError
from part_fast.optional import needs
from part_fast.reading import first_line


def dataset_of(
    name: str, split: str, images: Tensor, labels: npt.NDArray[Any], classes: Sequence[str], source: Path
) -> Dataset:
    if not len(labels):
        raise BadValueError(f"{source} holds no {split} images")
    if int(images.max()) <= 1:
        warnings.warn(
            f"the {split} images of {name} in {source} hold no gray level above 1 of 255, as where images in [0,1] are "
            "saved as integers: multiply them by 255 first",
            stacklevel=4,
        )
    return Dataset(
        images, torch.from_numpy(labels.astype(np.int64)), len(classes), tuple(classes), name, split, str(source)
    )


def _cache() -> Path:
    return Path(os.environ.get("PART_FAST_DATA") or "~/.cache/part_fast").expanduser()


def roots(root: Path | None) -> list[Path]:
    if root is not None:
        return [root]
    named = [_cache()] if os.environ.get("PART_FAST_DATA") else []
    return list(dict.fromkeys([*named, Path("data"), Path("~/.cache/part_fast").expanduser()]))


def first_found(places: Sequence[Path], find: Callable[[Path], list[Path] | None]) -> list[Path] | None:
    return next((files for place in places if (files := find(place)) is not None), None)


def not_found(name: str, wanted: str, places: Sequence[Path], install: str) -> MissingFileError:
    return MissingFileError(
        f"{name} not found: looked for {wanted} in {listed(places)}; "
        f"{install}set PART_FAST_DATA or root to the folder that holds it, or fetch it with download=True (--download)"
    )


def say_if_partial(name: str, split: str, count: int, published: int, source: Path) -> None:
    if count != published:
        warnings.warn(f"{name} {split} in {source} has {count} images, the published set {published}", stacklevel=4)


def listed(places: Sequence[Path]) -> str:
    return ", ".join(str(place) for place in places)


def download_class(torchvision_name: str, root: Path | None) -> Path:
    # Both splits lie in the files that one call fetches.
    return download_by(
        torchvision_name, root, lambda datasets, target: getattr(datasets, torchvision_name)(str(target), download=True)
    )


def download_archive(torchvision_name: str, root: Path | None) -> Path:
    """The archive of that class of torchvision, its checksum compared, unpacked here: no name in it leads elsewhere."""

    def fetch(datasets: Any, target: Path) -> None:
        kind = getattr(datasets, torchvision_name)
        datasets.utils.download_url(kind.url, str(target), kind.filename, kind.tgz_md5)
        try:
            with tarfile.open(target / kind.filename) as archive:
                archive.extractall(target, filter="data")
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise OSError(f"{target / kind.filename} cannot be unpacked: {first_line(error)}") from error

    return download_by(torchvision_name, root, fetch)


def download_by(title: str, root: Path | None, fetch: Callable[[Any, Path], object]) -> Path:
    target = root if root is not None else _cache()
    with needs("torchvision", "download"):
        from torchvision import datasets
    try:
        fetch(datasets, target)
    except (OSError, RuntimeError) as error:
        raise OSError(f"download of {title} to {target} failed: {first_line(error)}") from error
    return target
