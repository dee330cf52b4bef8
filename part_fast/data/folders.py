"""TinyImageNet, and images in a folder per class."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from part_fast.data.files import IMAGE_SUFFIXES, image_size, read_images, read_lines
from part_fast.data.memory import Dataset
from part_fast.data.places import dataset_of, first_found, listed, roots, say_if_partial
from part_fast.errors import BadValueError, MissingFileError


def load_tinyimagenet(split: str, root: Path | None, download: bool) -> Dataset:
    def find(folder: Path) -> list[Path] | None:
        return [folder] if (folder / "wnids.txt").is_file() else None

    places = [place for base in roots(root) for place in (base / "tiny-imagenet-200", base)]
    found = first_found(places, find)
    if found is None:
        raise MissingFileError(
            f"tinyimagenet not found: looked for wnids.txt, train and val in {listed(places)}; unzip "
            f"tiny-imagenet-200.zip in one of these or set PART_FAST_DATA or root to the folder that holds it "
            f"(torchvision has no download of it)"
        )
    folder = found[0]
    wnids = sorted({line.strip() for line in read_lines(folder / "wnids.txt")})
    for wnid in wnids:
        if wnid != Path(wnid).name or wnid == ".." or "\0" in wnid:  # of a path that leads elsewhere
            raise BadValueError(f"{folder / 'wnids.txt'} must hold names of folders, got {wnid[:80]!r}")
    of = {wnid: label for label, wnid in enumerate(wnids)}
    if split == "train":
        _no_others(folder / "train", wnids, "wnids.txt")
        files = [(path, of[wnid]) for wnid in wnids for path in _images_in(folder / "train" / wnid / "images")]
    else:
        files = _val_files(folder / "val", of)
    if not files:
        raise BadValueError(f"{folder} holds no {split} images")
    say_if_partial("tinyimagenet", split, len(files), 100_000 if split == "train" else 10_000, folder)
    size = image_size(files[0][0])
    images = read_images([path for path, _ in files], size, hint=f" as {files[0][0].name}: all images share one size")
    labels = np.array([label for _, label in files])
    return dataset_of("tinyimagenet", split, images, labels, _words(folder / "words.txt", wnids), folder)


def _val_files(val: Path, of: dict[str, int]) -> list[tuple[Path, int]]:
    """Images and labels of val as published, or sorted into a folder per class, as scripts for ImageFolder leave it."""
    together, classes = _images_in(val / "images"), [name for name in _subfolders(val) if name != "images"]
    if classes:
        if together:
            raise BadValueError(f"{val} holds both {classes[0]} and {len(together)} images in images, sort all or none")
        _no_others(val, [*of, "images"], "wnids.txt")
        return [(path, of[wnid]) for wnid in classes for path in _images_in(val / wnid, deep=True)]
    annotated = _val_annotations(val / "val_annotations.txt", of)
    for path in together:
        if path.name not in annotated:
            raise BadValueError(f"{path} has no line in val_annotations.txt")
    return [(path, annotated[path.name]) for path in together]


def _val_annotations(path: Path, of: dict[str, int]) -> dict[str, int]:
    if not path.is_file():
        raise MissingFileError(
            f"tinyimagenet takes its test images' labels from {path}, which is missing, or from folders named by their "
            f"wnids in {path.parent}"
        )
    annotated: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), start=1):
        name, *rest = line.split("\t")
        wnid = rest[0].strip() if rest else ""
        if wnid not in of:
            raise BadValueError(f"{path}, line {number}: takes a file and a wnid of wnids.txt, got {line[:80]!r}")
        if annotated.setdefault(name, of[wnid]) != of[wnid]:
            raise BadValueError(f"{path}, line {number}: a second label for {name!r}")
    return annotated


def _words(path: Path, wnids: Sequence[str]) -> list[str]:
    """The first of each wnid's names; the wnid itself where words.txt has none."""
    lines = read_lines(path) if path.is_file() else []
    names = {wnid: names.split(",")[0].strip() for wnid, _, names in (line.partition("\t") for line in lines)}
    return [names.get(wnid) or wnid for wnid in wnids]


def load_folder(path: str, split: str, root: Path | None, download: bool) -> Dataset:
    name = f"folder:{path}"
    sized = re.fullmatch(r"(.+)@(\d+)", path)
    plain, size = sized.groups() if sized else (path, "")
    if sized and not int(size):
        raise BadValueError(f"{name}: a size takes an integer >= 1, got {size}")
    base = Path(plain).expanduser()
    base = base if root is None else root / base
    places = [base / "train"] if split == "train" else [base / "test", base / "val"]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise MissingFileError(
            f"{name} not found: looked for a folder of images per class in {listed(places)}; "
            f"give the folder that holds train and test (or val), nothing is downloaded"
        )
    of_train = base / "train" if (base / "train").is_dir() else folder
    classes = _subfolders(of_train)
    _no_others(folder, classes, str(of_train))
    files = [(image, i) for i, c in enumerate(classes) for image in _images_in(folder / c, deep=True)]
    if not files:
        raise BadValueError(f"{folder} holds no {split} images: takes a folder of images per class")
    if sized:
        side = (int(size), int(size))
        images = read_images([image for image, _ in files], side, fit=True)
    else:
        first = next((image for c in classes for image in _images_in(of_train / c, deep=True)), files[0][0])
        side = image_size(first)
        hint = f" as {first}: all images share one size, {name}@{min(side)} scales and crops them"
        images = read_images([image for image, _ in files], side, hint=hint)
    return dataset_of(name, split, images, np.array([label for _, label in files]), classes, folder)


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _no_others(folder: Path, classes: Sequence[str], where: str) -> None:
    others = [name for name in _subfolders(folder) if name not in classes]
    if others:
        raise BadValueError(f"{folder / others[0]} is a class that is not in {where}")


def _images_in(folder: Path, deep: bool = False) -> list[Path]:
    """The image files of `folder`, and with `deep` of the folders in it, sorted; hidden ones are left out.

    Links to folders are followed, as subsets are made by them, but not into a folder that holds the link: there is no
    end to that.
    """
    found: list[Path] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if deep and not _leads_back(Path(parent, name), folder)]
        images = (file for file in files if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES)
        found += [Path(parent, file) for file in images if not file.startswith(".")]
    return sorted(found)


def _leads_back(path: Path, top: Path) -> bool:
    """Whether `path`, below `top`, is a link to a folder that it was reached by, or to one that holds those."""
    if not path.is_symlink():
        return False
    real = path.resolve()
    return any(above.resolve().is_relative_to(real) for above in path.parents if above.is_relative_to(top))
