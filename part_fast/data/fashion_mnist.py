"""Fashion-MNIST, and the part of it that comes with the package."""

from __future__ import annotations

import hashlib
import io
import lzma
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from part_fast.data.files import read_idx
from part_fast.data.memory import Dataset
from part_fast.data.places import dataset_of, download_class, first_found, not_found, roots, say_if_partial
from part_fast.errors import BadValueError, MissingFileError

FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

DEMO_FILE = Path(__file__).parents[1] / "assets" / "fashion-mnist-demo.npz.xz"

DEMO_SHA256 = "e4fdb7f30402130a263384057821a6b51670d184434067a217b37f6c0856fb22"


def load_demo(split: str, root: Path | None, download: bool) -> Dataset:
    if not DEMO_FILE.is_file():
        raise MissingFileError(f"the demo images are missing at {DEMO_FILE}: reinstall part_fast")
    packed = DEMO_FILE.read_bytes()
    digest = hashlib.sha256(packed).hexdigest()
    if digest != DEMO_SHA256:
        raise BadValueError(f"{DEMO_FILE} is damaged: sha256 {digest}, expected {DEMO_SHA256}; reinstall part_fast")
    with np.load(io.BytesIO(lzma.decompress(packed)), allow_pickle=False) as arrays:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    return dataset_of("demo", split, _pad_gray(images), labels, FASHION_MNIST_CLASSES, DEMO_FILE)


def load_fashion_mnist(split: str, root: Path | None, download: bool) -> Dataset:
    stem = "train" if split == "train" else "t10k"
    names = (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte")

    def find(folder: Path) -> list[Path] | None:
        found = [path for name in names for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
        images = [path for path in found if path.name.startswith(names[0])]
        labels = [path for path in found if path.name.startswith(names[1])]
        return [images[0], labels[0]] if images and labels else None

    places = [place for base in roots(root) for place in (base / "FashionMNIST" / "raw", base)]
    if root is None:
        places.append(DEBIAN_FASHION_MNIST)
    files = first_found(places, find)
    if files is None and download:
        target = download_class("FashionMNIST", root)
        places = [target / "FashionMNIST" / "raw"]
        files = first_found(places, find)
    if files is None:
        raise not_found(
            "fashion-mnist", f"{names[0]}[.gz] with {names[1]}[.gz]", places, "install Debian's dataset-fashion-mnist, "
        )
    images, labels = read_idx(files[0], 3), read_idx(files[1], 1)
    if images.shape[1:] != (28, 28):
        raise BadValueError(f"{files[0]} holds images of {images.shape[1]}x{images.shape[2]}, Fashion-MNIST has 28x28")
    if len(images) != len(labels):
        raise BadValueError(f"{files[0].parent} holds {len(images)} {split} images but {len(labels)} labels")
    say_if_partial("fashion-mnist", split, len(labels), 60_000 if split == "train" else 10_000, files[0].parent)
    return dataset_of("fashion-mnist", split, _pad_gray(images), labels, FASHION_MNIST_CLASSES, files[0].parent)


def _pad_gray(images: npt.NDArray[np.uint8]) -> Tensor:
    out = torch.zeros(len(images), 3, 32, 32, dtype=torch.uint8)
    out[:, :, 2:30, 2:30] = torch.from_numpy(np.array(images)).unsqueeze(1)
    return out
