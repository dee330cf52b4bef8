"""The data sets by name: `load` reads one whole into memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from part_fast.data.cifar import CIFAR10, CIFAR100, load_cifar
from part_fast.data.fashion_mnist import load_demo, load_fashion_mnist
from part_fast.data.folders import load_folder, load_tinyimagenet
from part_fast.data.memory import Dataset
from part_fast.data.places import roots
from part_fast.data.svhn import load_svhn
from part_fast.errors import BadValueError


def load(name: str, split: str, root: str | os.PathLike[str] | None = None, download: bool = False) -> Dataset:
    """Read a whole data set into memory.

    demo: 6,000 training and 1,000 test images of Fashion-MNIST that come with the package; needs no root.
    fashion-mnist: idx files, packed or not, in root/FashionMNIST/raw, root, or Debian's dataset-fashion-mnist.
    cifar10, cifar100: root/cifar-10-batches-py, root/cifar-100-python, read without running what is pickled in them, or
        root/cifar-10-batches-bin, root/cifar-100-binary, or any of these as root; cifar100 has its 100 fine classes.
    svhn: train_32x32.mat and test_32x32.mat in root/svhn or root; class i is the digit i.
    tinyimagenet: root/tiny-imagenet-200 or root, as unzipped: wnids.txt, train/WNID/images, and for the test split
        val/images with val/val_annotations.txt (the published test images have no labels), or val sorted into folders
        WNID. Classes are the sorted wnids, named by words.txt.
    folder:PATH: PATH/train and PATH/test (or PATH/val) with a folder of images per class, at any depth; a relative PATH
        starts at root. Classes are the sorted folders of train, or of the split itself where there is no train. All
        images share one size; folder:PATH@64 scales them (bicubic) to cover 64x64 and crops them at the centre.

    Gray images become three equal channels, Fashion-MNIST's 28x28 is padded with zeros to 32x32. A folder in the right
    layout with fewer images than the published set loads too, with a warning that says how many there are.

    Args:
        name: one of `DATASETS`, with a path in the place of PATH.
        split: "train" or "test".
        root: the only folder to look in; without it $PART_FAST_DATA, ./data, ~/.cache/part_fast and Debian's path.
        download: fetch with torchvision, into root (or $PART_FAST_DATA, or ~/.cache/part_fast), if it is not found.
            There is no such download of tinyimagenet.

    Raises:
        FileNotFoundError: the data set is not found; names every place that was searched and how to get it.
        ValueError: unknown name or split, or a damaged file.
        OSError: the download failed.
    """
    kind, _, path = name.partition(":")
    row = DATASETS.get(f"{kind}:PATH" if path else name)
    if row is None:
        raise BadValueError(f"data set takes one of {', '.join(DATASETS)}, got {name!r}")
    if split not in ("train", "test"):
        raise BadValueError(f"split takes 'train' or 'test', got {split!r}")
    read = partial(row.read, path) if path else row.read
    return read(split, None if root is None else Path(root).expanduser(), download)


def root_anywhere(data: Dataset, root: str | None) -> str | None:
    """The `root` with which `load` finds again, started from any folder, the data set that it has found by `root`.

    An absolute path; None for a data set that needs no root, since it was found without one and under no relative path.
    """
    if root is not None:
        return str(Path(root).expanduser().absolute())
    source = Path(data.source)
    if source.is_absolute():
        return None
    if ":" in data.name:  # folder:PATH
        return str(Path.cwd())
    return next((str(base.absolute()) for base in roots(None) if source.is_relative_to(base)), None)


@dataclass(frozen=True)
class Source:
    """One data set, or with a name that ends in :PATH all those that lie in a folder.

    help: what it is, for help texts. read: callable(split, root, download) -> Dataset, after the path if there is one.
    train_images, size, classes: of the published set, height and width in pixels; None where the folder says it.
    downloads: whether `download` fetches it.
    """

    help: str
    read: Callable[..., Dataset]
    train_images: int | None
    size: int | None
    classes: int | None
    downloads: bool = True


DATASETS: dict[str, Source] = {
    "demo": Source("in the package", load_demo, 6_000, 32, 10, downloads=False),
    "fashion-mnist": Source("", load_fashion_mnist, 60_000, 32, 10),
    "cifar10": Source("", partial(load_cifar, CIFAR10), 50_000, 32, 10),
    "cifar100": Source("", partial(load_cifar, CIFAR100), 50_000, 32, 100),
    "svhn": Source("", load_svhn, 73_257, 32, 10),
    "tinyimagenet": Source("", load_tinyimagenet, 100_000, 64, 200, downloads=False),
    "folder:PATH": Source("or folder:PATH@SIZE", load_folder, None, None, None, downloads=False),
}
