"""The named image data sets: where each may lie, in which files, and what it holds.

`load` reads one whole into memory; what is done with the images there is in `data_memory`, the files are read by
`data_files`.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from part_fast.data.files import (
    IMAGE_SUFFIXES,
    first_line,
    image_size,
    read_cifar_binary,
    read_cifar_pickle,
    read_idx,
    read_images,
    read_lines,
    read_mat,
)
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
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FINE_CLASSES = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
    "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
    "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard "
    "lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear "
    "pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal "
    "shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank "
    "telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)
CIFAR100_CLASSES = tuple(_FINE_CLASSES.split())
SVHN_CLASSES = tuple("0123456789")

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
DEMO_FILE = Path(__file__).parents[1] / "assets" / "fashion-mnist-demo.npz.xz"
DEMO_SHA256 = "e4fdb7f30402130a263384057821a6b51670d184434067a217b37f6c0856fb22"


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
        name: one of `DATASETS`, or folder:PATH.
        split: "train" or "test".
        root: the only folder to look in; without it $PART_FAST_DATA, ./data, ~/.cache/part_fast and Debian's path.
        download: fetch with torchvision, into root (or $PART_FAST_DATA, or ~/.cache/part_fast), what is nowhere.
            There is no such download of tinyimagenet.

    Raises:
        FileNotFoundError: the data set is nowhere; names every place looked and how to get it.
        ValueError: unknown name or split, or a damaged file.
        OSError: the download failed.
    """
    folder = name.removeprefix("folder:")
    if name not in DATASETS and (folder == name or not folder):
        raise ValueError(f"data set takes one of {', '.join(DATASETS)}, folder:PATH, got {name!r}")
    if split not in ("train", "test"):
        raise ValueError(f"split takes 'train' or 'test', got {split!r}")
    read = DATASETS[name] if name in DATASETS else partial(_load_folder, folder)
    return read(split, None if root is None else Path(root).expanduser(), download)


def _load_demo(split: str, root: Path | None, download: bool) -> Dataset:
    if not DEMO_FILE.is_file():
        raise FileNotFoundError(f"the demo images are missing at {DEMO_FILE}: reinstall part_fast")
    packed = DEMO_FILE.read_bytes()
    digest = hashlib.sha256(packed).hexdigest()
    if digest != DEMO_SHA256:
        raise ValueError(f"{DEMO_FILE} is damaged: sha256 {digest}, expected {DEMO_SHA256}; reinstall part_fast")
    with np.load(io.BytesIO(lzma.decompress(packed)), allow_pickle=False) as arrays:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    return _dataset("demo", split, _pad_gray(images), labels, FASHION_MNIST_CLASSES, DEMO_FILE)


def _load_fashion_mnist(split: str, root: Path | None, download: bool) -> Dataset:
    stem = "train" if split == "train" else "t10k"
    names = (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte")

    def find(folder: Path) -> list[Path] | None:
        found = [path for name in names for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
        images = [path for path in found if path.name.startswith(names[0])]
        labels = [path for path in found if path.name.startswith(names[1])]
        return [images[0], labels[0]] if images and labels else None

    places = [place for base in _roots(root) for place in (base / "FashionMNIST" / "raw", base)]
    if root is None:
        places.append(DEBIAN_FASHION_MNIST)
    files = _first(places, find)
    if files is None and download:
        target = _download_class("FashionMNIST", root)
        places = [target / "FashionMNIST" / "raw"]
        files = _first(places, find)
    if files is None:
        raise _not_found(
            "fashion-mnist", f"{names[0]}[.gz] with {names[1]}[.gz]", places, "install Debian's dataset-fashion-mnist, "
        )
    images, labels = read_idx(files[0], 3), read_idx(files[1], 1)
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{files[0]} holds images of {images.shape[1]}x{images.shape[2]}, Fashion-MNIST has 28x28")
    if len(images) != len(labels):
        raise ValueError(f"{files[0].parent} holds {len(images)} {split} images but {len(labels)} labels")
    _say_if_partial("fashion-mnist", split, len(labels), 60_000 if split == "train" else 10_000, files[0].parent)
    return _dataset("fashion-mnist", split, _pad_gray(images), labels, FASHION_MNIST_CLASSES, files[0].parent)


@dataclass(frozen=True)
class _Cifar:
    """What tells CIFAR-10 and CIFAR-100 apart."""

    name: str
    title: str
    layouts: tuple[str, str]
    stems: dict[str, tuple[str, ...]]
    field: str
    label_bytes: int
    classes: tuple[str, ...]


_CIFAR10 = _Cifar(
    "cifar10",
    "CIFAR-10",
    ("cifar-10-batches-py", "cifar-10-batches-bin"),
    {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
    "labels",
    1,
    CIFAR10_CLASSES,
)
_CIFAR100 = _Cifar(
    "cifar100",
    "CIFAR-100",
    ("cifar-100-python", "cifar-100-binary"),
    {"train": ("train",), "test": ("test",)},
    "fine_labels",
    2,
    CIFAR100_CLASSES,
)


def _load_cifar(cifar: _Cifar, split: str, root: Path | None, download: bool) -> Dataset:
    stems = cifar.stems[split]

    def find(folder: Path) -> list[Path] | None:
        layouts = (
            [path for stem in stems if (path := folder / f"{stem}{suffix}").is_file()] for suffix in ("", ".bin")
        )
        return next((files for files in layouts if files), None)

    places = [place for base in _roots(root) for place in (*(base / layout for layout in cifar.layouts), base)]
    files = _first(places, find)
    if files is None and download:
        places = [_download_class(cifar.title.replace("-", ""), root) / cifar.layouts[0]]
        files = _first(places, find)
    if files is None:
        wanted = " to ".join(dict.fromkeys((stems[0], stems[-1])))
        raise _not_found(cifar.name, f"{wanted} (or .bin)", places, "")
    parts = [
        read_cifar_binary(path, cifar.title, cifar.label_bytes)
        if path.suffix == ".bin"
        else read_cifar_pickle(path, cifar.title, cifar.field, len(cifar.classes))
        for path in files
    ]
    pixels = np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts])
    folder = files[0].parent
    _say_if_partial(cifar.name, split, len(labels), 50_000 if split == "train" else 10_000, folder)
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32))
    return _dataset(cifar.name, split, images, labels, cifar.classes, folder)


def _load_svhn(split: str, root: Path | None, download: bool) -> Dataset:
    file = f"{split}_32x32.mat"

    def find(folder: Path) -> list[Path] | None:
        return [folder / file] if (folder / file).is_file() else None

    def fetch(datasets: Any, target: Path) -> None:
        # torchvision's class would read what it has fetched, which needs scipy.
        url, name, md5 = datasets.SVHN.split_list[split]
        datasets.utils.download_url(url, str(target), name, md5)

    places = [place for base in _roots(root) for place in (base / "svhn", base)]
    files = _first(places, find)
    if files is None and download:
        places = [_download("SVHN", root, fetch)]
        files = _first(places, find)
    if files is None:
        raise _not_found("svhn", file, places, "")
    arrays = read_mat(files[0], "X", "y")
    pixels, digits = arrays["X"], arrays["y"].ravel()
    # MATLAB drops the last dimension of a single image.
    pixels = pixels[..., np.newaxis] if pixels.ndim == 3 else pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3):
        raise ValueError(f"{files[0]}: X takes uint8 (32,32,3,N), got {pixels.dtype} {arrays['X'].shape}")
    if pixels.shape[3] != len(digits):
        raise ValueError(f"{files[0]} holds {pixels.shape[3]} images but {len(digits)} labels")
    wrong = digits[~np.isin(digits, np.arange(1, 11))]
    if len(wrong):
        raise ValueError(f"{files[0]}: y takes integers from 1 to 10 (the digit 0), got {wrong[0]}")
    _say_if_partial("svhn", split, len(digits), 73_257 if split == "train" else 26_032, files[0].parent)
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)))
    return _dataset("svhn", split, images, digits % 10, SVHN_CLASSES, files[0])


def _load_tinyimagenet(split: str, root: Path | None, download: bool) -> Dataset:
    def find(folder: Path) -> list[Path] | None:
        return [folder] if (folder / "wnids.txt").is_file() else None

    places = [place for base in _roots(root) for place in (base / "tiny-imagenet-200", base)]
    found = _first(places, find)
    if found is None:
        raise FileNotFoundError(
            f"tinyimagenet not found: looked for wnids.txt, train and val in {_listed(places)}; unzip "
            f"tiny-imagenet-200.zip in one of these or set PART_FAST_DATA or root to the folder that holds it "
            f"(torchvision has no download of it)"
        )
    folder = found[0]
    wnids = sorted({line.strip() for line in read_lines(folder / "wnids.txt")})
    of = {wnid: label for label, wnid in enumerate(wnids)}
    if split == "train":
        _no_others(folder / "train", wnids, "wnids.txt")
        files = [(path, of[wnid]) for wnid in wnids for path in _images_in(folder / "train" / wnid / "images")]
    else:
        files = _val_files(folder / "val", of)
    if not files:
        raise ValueError(f"{folder} holds no {split} images")
    _say_if_partial("tinyimagenet", split, len(files), 100_000 if split == "train" else 10_000, folder)
    size = image_size(files[0][0])
    images = read_images([path for path, _ in files], size, hint=f" as {files[0][0].name}: all images share one size")
    labels = np.array([label for _, label in files])
    return _dataset("tinyimagenet", split, images, labels, _words(folder / "words.txt", wnids), folder)


def _val_files(val: Path, of: dict[str, int]) -> list[tuple[Path, int]]:
    """Images and labels of val as published, or sorted into a folder per class, as scripts for ImageFolder leave it."""
    together, classes = _images_in(val / "images"), [name for name in _subfolders(val) if name != "images"]
    if classes:
        if together:
            raise ValueError(f"{val} holds both {classes[0]} and {len(together)} images in images, sort all or none")
        _no_others(val, [*of, "images"], "wnids.txt")
        return [(path, of[wnid]) for wnid in classes for path in _images_in(val / wnid, deep=True)]
    annotated = _val_annotations(val / "val_annotations.txt", of)
    for path in together:
        if path.name not in annotated:
            raise ValueError(f"{path} has no line in val_annotations.txt")
    return [(path, annotated[path.name]) for path in together]


def _val_annotations(path: Path, of: dict[str, int]) -> dict[str, int]:
    if not path.is_file():
        raise FileNotFoundError(
            f"tinyimagenet takes its test images' labels from {path}, which is missing, or from folders named by their "
            f"wnids in {path.parent}"
        )
    annotated: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), start=1):
        name, *rest = line.split("\t")
        wnid = rest[0].strip() if rest else ""
        if wnid not in of:
            raise ValueError(f"{path}, line {number}: takes a file and a wnid of wnids.txt, got {line[:80]!r}")
        if annotated.setdefault(name, of[wnid]) != of[wnid]:
            raise ValueError(f"{path}, line {number}: a second label for {name!r}")
    return annotated


def _words(path: Path, wnids: Sequence[str]) -> list[str]:
    """The first of each wnid's names; the wnid itself where words.txt has none."""
    lines = read_lines(path) if path.is_file() else []
    names = {wnid: names.split(",")[0].strip() for wnid, _, names in (line.partition("\t") for line in lines)}
    return [names.get(wnid) or wnid for wnid in wnids]


def _load_folder(path: str, split: str, root: Path | None, download: bool) -> Dataset:
    name = f"folder:{path}"
    sized = re.fullmatch(r"(.+)@(\d+)", path)
    plain, size = sized.groups() if sized else (path, "")
    if sized and not int(size):
        raise ValueError(f"{name}: a size takes an integer >= 1, got {size}")
    base = Path(plain).expanduser()
    base = base if root is None else root / base
    places = [base / "train"] if split == "train" else [base / "test", base / "val"]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"{name} not found: looked for a folder of images per class in {_listed(places)}; "
            f"give the folder that holds train and test (or val), nothing is downloaded"
        )
    of_train = base / "train" if (base / "train").is_dir() else folder
    classes = _subfolders(of_train)
    _no_others(folder, classes, str(of_train))
    files = [(image, i) for i, c in enumerate(classes) for image in _images_in(folder / c, deep=True)]
    if not files:
        raise ValueError(f"{folder} holds no {split} images: takes a folder of images per class")
    if sized:
        side = (int(size), int(size))
        images = read_images([image for image, _ in files], side, fit=True)
    else:
        first = next((image for c in classes for image in _images_in(of_train / c, deep=True)), files[0][0])
        side = image_size(first)
        hint = f" as {first}: all images share one size, {name}@{min(side)} scales and crops them"
        images = read_images([image for image, _ in files], side, hint=hint)
    return _dataset(name, split, images, np.array([label for _, label in files]), classes, folder)


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _no_others(folder: Path, classes: Sequence[str], where: str) -> None:
    others = [name for name in _subfolders(folder) if name not in classes]
    if others:
        raise ValueError(f"{folder / others[0]} is a class that is not in {where}")


def _images_in(folder: Path, deep: bool = False) -> list[Path]:
    """The image files of `folder`, and with `deep` of the folders in it, sorted; hidden ones are left out."""
    found = [
        Path(parent) / file
        for parent, folders, files in os.walk(folder, followlinks=True)
        if deep or Path(parent) == folder
        for file in files
        if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES and not file.startswith(".")
    ]
    return sorted(found)


DATASETS: dict[str, Callable[[str, Path | None, bool], Dataset]] = {
    "demo": _load_demo,
    "fashion-mnist": _load_fashion_mnist,
    "cifar10": partial(_load_cifar, _CIFAR10),
    "cifar100": partial(_load_cifar, _CIFAR100),
    "svhn": _load_svhn,
    "tinyimagenet": _load_tinyimagenet,
}


def _dataset(
    name: str, split: str, images: Tensor, labels: npt.NDArray[Any], classes: Sequence[str], source: Path
) -> Dataset:
    if not len(labels):
        raise ValueError(f"{source} holds no {split} images")
    return Dataset(
        images, torch.from_numpy(labels.astype(np.int64)), len(classes), tuple(classes), name, split, str(source)
    )


def _pad_gray(images: npt.NDArray[np.uint8]) -> Tensor:
    out = torch.zeros(len(images), 3, 32, 32, dtype=torch.uint8)
    out[:, :, 2:30, 2:30] = torch.from_numpy(np.array(images)).unsqueeze(1)
    return out


def _cache() -> Path:
    return Path(os.environ.get("PART_FAST_DATA") or "~/.cache/part_fast").expanduser()


def _roots(root: Path | None) -> list[Path]:
    if root is not None:
        return [root]
    named = [_cache()] if os.environ.get("PART_FAST_DATA") else []
    return list(dict.fromkeys([*named, Path("data"), Path("~/.cache/part_fast").expanduser()]))


def _first(places: Sequence[Path], find: Callable[[Path], list[Path] | None]) -> list[Path] | None:
    return next((files for place in places if (files := find(place)) is not None), None)


def _not_found(name: str, wanted: str, places: Sequence[Path], install: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{name} not found: looked for {wanted} in {_listed(places)}; "
        f"{install}set PART_FAST_DATA or root to the folder that holds it, or fetch it with download=True (--download)"
    )


def _say_if_partial(name: str, split: str, count: int, published: int, source: Path) -> None:
    if count != published:
        warnings.warn(f"{name} {split} in {source} has {count} images, the published set {published}", stacklevel=4)


def _listed(places: Sequence[Path]) -> str:
    return ", ".join(str(place) for place in places)


def _download_class(torchvision_name: str, root: Path | None) -> Path:
    # Both splits lie in the files that one call fetches.
    return _download(
        torchvision_name, root, lambda datasets, target: getattr(datasets, torchvision_name)(str(target), download=True)
    )


def _download(title: str, root: Path | None, fetch: Callable[[Any, Path], object]) -> Path:
    target = root if root is not None else _cache()
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(f"download=True needs torchvision (pip install torchvision): {error}") from error
    try:
        fetch(datasets, target)
    except (OSError, RuntimeError) as error:
        raise OSError(f"download of {title} to {target} failed: {first_line(error)}") from error
    return target
