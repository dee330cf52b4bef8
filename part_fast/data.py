"""Image data sets that live in memory as uint8 tensors, and crop/flip as one gather over a whole batch."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import lzma
import os
import pickle
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = [
    "DATASETS",
    "Augmentation",
    "Batch",
    "Dataset",
    "augment",
    "balanced_indices",
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

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
DEMO_FILE = Path(__file__).parent / "assets" / "fashion-mnist-demo.npz.xz"
DEMO_SHA256 = "e4fdb7f30402130a263384057821a6b51670d184434067a217b37f6c0856fb22"


class Batch(NamedTuple):
    """Images (B,C,H,W) uint8, labels (B,) int64 and their positions (B,) int64 in the data set."""

    images: Tensor
    labels: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Dataset:
    """A whole data set in memory.

    Attributes:
        images: uint8 (N,C,H,W).
        labels: int64 (N,), each in [0, num_classes).
        class_names: one per class.
        name, split: what `load` was asked for.
        source: the file or folder it came from.

    Raises:
        ValueError: the tensors do not fit together, or a label is out of range.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    class_names: tuple[str, ...]
    name: str
    split: str
    source: str = ""

    def __post_init__(self) -> None:
        where = self.source or self.name
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ValueError(
                f"images takes a uint8 tensor (N,C,H,W), got {self.images.dtype} {tuple(self.images.shape)} ({where})"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels takes an int64 tensor ({len(self.images)},), one per image, "
                f"got {self.labels.dtype} {tuple(self.labels.shape)} ({where})"
            )
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names takes {self.num_classes} names, got {len(self.class_names)} ({where})")
        if len(self.labels):
            low, high = int(self.labels.min()), int(self.labels.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"labels takes values from 0 to {self.num_classes - 1}, got {low if low < 0 else high} ({where})"
                )

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Dataset:
        """The same data set with images and labels on `device`."""
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, n: int, seed: int = 0) -> Dataset:
        """n images at random, classes as equal in number as the data allows, in their original order.

        With one seed a smaller subset is part of a larger one.

        Raises:
            ValueError: n is not from 1 to len(self).
        """
        indices = balanced_indices(self.labels, n, seed)
        return dataclasses.replace(self, images=self.images[indices], labels=self.labels[indices])

    def batches(
        self,
        batch_size: int,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """One pass over the data set; the order is drawn when this is called. Images stay uint8.

        With drop_last a last batch smaller than batch_size is left out.

        Raises:
            ValueError: batch_size < 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size takes an integer >= 1, got {batch_size!r}")
        if shuffle:
            device = generator.device if generator is not None else None
            order = torch.randperm(len(self), generator=generator, device=device).to(self.images.device)
        else:
            order = torch.arange(len(self), device=self.images.device)
        end = len(self) // batch_size * batch_size if drop_last else len(self)
        chunks = (order[start : start + batch_size] for start in range(0, end, batch_size))
        return (Batch(self.images[indices], self.labels[indices], indices) for indices in chunks)


def balanced_indices(labels: Tensor, n: int, seed: int = 0) -> Tensor:
    """Positions (n,) int64, ascending, of n random samples with classes as equal in number as `labels` (N,) allows.

    Raises:
        ValueError: n is not from 1 to N.
    """
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= len(labels):
        raise ValueError(f"n takes an integer from 1 to {len(labels)}, the number of images, got {n!r}")
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    drawn = labels.cpu()[shuffled]
    by_class = torch.argsort(drawn, stable=True)
    counts = torch.bincount(drawn)
    first = torch.cumsum(counts, 0) - counts
    rank = torch.empty_like(by_class)
    rank[by_class] = torch.arange(len(labels)) - first[drawn[by_class]]
    # Everybody's first sample, then everybody's second, and so on: any prefix is as balanced as it can be.
    chosen = shuffled[torch.argsort(rank, stable=True)[:n]]
    return chosen.sort().values.to(labels.device)


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0,1]. Equivalent to: `images.float() / 255`."""
    return images.to(torch.float32).div_(255)


@dataclass(frozen=True)
class Augmentation:
    """A drawn crop and flip for each sample, to be applied to images and, the same way, to their masks.

    Attributes:
        dy, dx: int64 (N,), the shift: row y of the result is row y + dy of the source, columns alike.
        flip: bool (N,), whether the cropped sample is mirrored left to right.
    """

    dy: Tensor
    dx: Tensor
    flip: Tensor

    def apply(self, images: Tensor, fill: float = 0.0) -> Tensor:
        """Crop and flip (N,C,H,W); uint8 becomes float32 in [0,1], any other dtype is kept (masks, eps maps).

        `fill`, in units of the result, is what lies outside the source. The result is new and contiguous.
        Equivalent to, for each sample: pad with `fill`, crop at the drawn place, `flip(-1)` where drawn.

        Raises:
            ValueError: images is not (N,C,H,W) with the N that was drawn for.
        """
        if images.dim() != 4 or len(images) != len(self.dy):
            raise ValueError(f"images takes ({len(self.dy)},C,H,W), as many as were drawn, got {tuple(images.shape)}")
        n, channels, height, width = images.shape
        device = images.device
        dy, dx, flip = (t.to(device).unsqueeze(1) for t in (self.dy, self.dx, self.flip))
        columns = torch.arange(width, device=device)
        rows = torch.arange(height, device=device) + dy
        columns = torch.where(flip, width - 1 - columns, columns) + dx
        outside = ((rows < 0) | (rows >= height)).unsqueeze(2) | ((columns < 0) | (columns >= width)).unsqueeze(1)
        source = rows.clamp(0, height - 1).unsqueeze(2) * width + columns.clamp(0, width - 1).unsqueeze(1)
        index = source.view(n, 1, height * width).expand(n, channels, height * width)
        out = images.flatten(2).gather(2, index).view(images.shape)
        if out.dtype == torch.uint8:
            out = to_float(out)
        return out.masked_fill_(outside.unsqueeze(1), fill)


def draw_augmentation(
    n: int,
    *,
    crop_padding: int = 4,
    flip: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Augmentation:
    """Shifts uniform in -crop_padding..crop_padding and fair flips for n samples, on `device`.

    Drawn from `generator`, else from the default generator of `device`; `flip=False` flips none.

    Raises:
        ValueError: crop_padding < 0.
    """
    if isinstance(crop_padding, bool) or not isinstance(crop_padding, int) or crop_padding < 0:
        raise ValueError(f"crop_padding takes an integer >= 0, got {crop_padding!r}")
    drawn_on = generator.device if generator is not None else device
    shifts = torch.randint(-crop_padding, crop_padding + 1, (2, n), generator=generator, device=drawn_on).to(device)
    if flip:
        flips = torch.randint(0, 2, (n,), generator=generator, device=drawn_on).to(device).bool()
    else:
        flips = torch.zeros(n, dtype=torch.bool, device=shifts.device)
    return Augmentation(shifts[0], shifts[1], flips)


def augment(
    images: Tensor, crop_padding: int = 4, flip: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Random crop with zero padding and random flip of (N,C,H,W); uint8 comes back as float32 in [0,1].

    Equivalent to: `draw_augmentation(len(images), ...).apply(images)`; draw first where a mask must follow.
    """
    drawn = draw_augmentation(
        len(images), crop_padding=crop_padding, flip=flip, generator=generator, device=images.device
    )
    return drawn.apply(images)


def load(name: str, split: str, root: str | os.PathLike[str] | None = None, download: bool = False) -> Dataset:
    """Read a whole data set into memory.

    demo: 6,000 training and 1,000 test images of Fashion-MNIST that come with the package; needs no root.
    fashion-mnist: idx files, packed or not, in root/FashionMNIST/raw, root, or Debian's dataset-fashion-mnist.
    cifar10: root/cifar-10-batches-py, read without running what is pickled in it, or root/cifar-10-batches-bin, or
        either of them as root.

    Gray images become three equal channels and 28x28 is padded with zeros to 32x32. A folder in the right layout
    with fewer images than the published set loads too, with a warning that says how many there are.

    Args:
        name: a key of `DATASETS`.
        split: "train" or "test".
        root: the only folder to look in; without it $PART_FAST_DATA, ./data, ~/.cache/part_fast and Debian's path.
        download: fetch with torchvision, into root (or $PART_FAST_DATA, or ~/.cache/part_fast), what is nowhere.

    Raises:
        FileNotFoundError: the data set is nowhere; names every place looked and how to get it.
        ValueError: unknown name or split, or a damaged file.
        OSError: the download failed.
    """
    if name not in DATASETS:
        raise ValueError(f"data set takes one of {', '.join(DATASETS)}, got {name!r}")
    if split not in ("train", "test"):
        raise ValueError(f"split takes 'train' or 'test', got {split!r}")
    return DATASETS[name](split, None if root is None else Path(root).expanduser(), download)


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
        target = _download("FashionMNIST", root)
        places = [target / "FashionMNIST" / "raw"]
        files = _first(places, find)
    if files is None:
        raise _not_found(
            "fashion-mnist", f"{names[0]}[.gz] with {names[1]}[.gz]", places, "install Debian's dataset-fashion-mnist, "
        )
    images, labels = _read_idx(files[0], 3), _read_idx(files[1], 1)
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{files[0]} holds images of {images.shape[1]}x{images.shape[2]}, Fashion-MNIST has 28x28")
    if len(images) != len(labels):
        raise ValueError(f"{files[0].parent} holds {len(images)} {split} images but {len(labels)} labels")
    _say_if_partial("fashion-mnist", split, len(labels), 60_000 if split == "train" else 10_000, files[0].parent)
    return _dataset("fashion-mnist", split, _pad_gray(images), labels, FASHION_MNIST_CLASSES, files[0].parent)


def _load_cifar10(split: str, root: Path | None, download: bool) -> Dataset:
    stems = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]

    def find(folder: Path) -> list[Path] | None:
        suffix = ".bin" if folder.name.endswith("-bin") else ""
        return [path for stem in stems if (path := folder / f"{stem}{suffix}").is_file()] or None

    layouts = ("cifar-10-batches-py", "cifar-10-batches-bin")
    places = [place for base in _roots(root) for place in (base / layouts[0], base / layouts[1], base)]
    files = _first(places, find)
    if files is None and download:
        target = _download("CIFAR10", root)
        places = [target / layouts[0]]
        files = _first(places, find)
    if files is None:
        wanted = "data_batch_1 to data_batch_5" if split == "train" else "test_batch"
        raise _not_found("cifar10", f"{wanted} (.bin in -bin)", places, "")
    parts = [(_read_cifar_binary if path.suffix == ".bin" else _read_cifar_pickle)(path) for path in files]
    pixels = np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts])
    folder = files[0].parent
    _say_if_partial("cifar10", split, len(labels), 50_000 if split == "train" else 10_000, folder)
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32))
    return _dataset("cifar10", split, images, labels, CIFAR10_CLASSES, folder)


DATASETS: dict[str, Callable[[str, Path | None, bool], Dataset]] = {
    "demo": _load_demo,
    "fashion-mnist": _load_fashion_mnist,
    "cifar10": _load_cifar10,
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
    looked = ", ".join(str(place) for place in places)
    return FileNotFoundError(
        f"{name} not found: looked for {wanted} in {looked}; "
        f"{install}set PART_FAST_DATA or root to the folder that holds it, or fetch it with download=True (--download)"
    )


def _say_if_partial(name: str, split: str, count: int, published: int, source: Path) -> None:
    if count != published:
        warnings.warn(f"{name} {split} in {source} has {count} images, the published set {published}", stacklevel=4)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _download(torchvision_name: str, root: Path | None) -> Path:
    target = root if root is not None else _cache()
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(f"download=True needs torchvision (pip install torchvision): {error}") from error
    try:
        # Both splits lie in the files that one call fetches.
        getattr(datasets, torchvision_name)(str(target), download=True)
    except (OSError, RuntimeError) as error:
        raise OSError(f"download of {torchvision_name} to {target} failed: {_first_line(error)}") from error
    return target


def _read_idx(path: Path, dims: int) -> npt.NDArray[np.uint8]:
    """The idx format: two zero bytes, type 8 (uint8), the number of dimensions, their big-endian sizes, the values."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    header = 4 + 4 * dims
    if len(content) < header or content[:4] != bytes((0, 0, 8, dims)):
        start = content[:4].hex(" ")
        raise ValueError(f"{path} is not an idx file of uint8 with {dims} dimensions: it starts {start}")
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    expected = header + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise ValueError(f"{path} has {len(content)} bytes, its header {shape} says {expected}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_cifar_binary(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    content = path.read_bytes()
    if not content or len(content) % 3073:
        raise ValueError(f"{path} has {len(content)} bytes, CIFAR-10's binary files hold images of 3073 bytes each")
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return records[:, 1:].copy(), records[:, 0].astype(np.int64)


class _PickledDtype:
    """Stands in for numpy.dtype: takes what a pickle says and accepts uint8 alone."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        text = name.decode("ascii") if isinstance(name, bytes) else name
        if text not in ("u1", "|u1", "uint8"):
            raise pickle.UnpicklingError(f"an array of {text!r}, expected uint8")

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment: nothing to know of uint8."""


class _PickledArray:
    """Stands in for numpy.ndarray: keeps shape and bytes, to be checked before an array is made of them."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.content = b""

    def __setstate__(self, state: tuple[object, ...]) -> None:
        _, shape, dtype, fortran, content = state
        self._take(content, dtype, shape, "F" if fortran else "C")

    def _take(self, content: object, dtype: object, shape: object, order: object) -> None:
        if not isinstance(dtype, _PickledDtype) or not isinstance(shape, tuple) or order != "C":
            raise pickle.UnpicklingError("an array that is not uint8 in C order")
        if not isinstance(content, bytes | bytearray):
            raise pickle.UnpicklingError("an array without its bytes")
        self.shape, self.content = shape, bytes(content)


def _reconstruct(*_: object) -> _PickledArray:
    return _PickledArray()


def _from_buffer(content: object, dtype: object, shape: object, order: object) -> _PickledArray:
    array = _PickledArray()
    array._take(content, dtype, shape, order)
    return array


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Reads dictionaries, lists, numbers, strings and uint8 arrays; every global it meets is one of ours or an error.

    Even numpy's own constructors are not called: what a file names is only looked up in this table.
    """

    _STAND_INS: ClassVar[dict[str, Any]] = {
        "numpy.ndarray": _PickledArray,
        "numpy.dtype": _PickledDtype,
        "numpy.core.multiarray._reconstruct": _reconstruct,
        "numpy._core.multiarray._reconstruct": _reconstruct,
        "numpy.core.numeric._frombuffer": _from_buffer,
        "numpy._core.numeric._frombuffer": _from_buffer,
        "_codecs.encode": _encode_latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._STAND_INS[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not a part of an image batch") from None


def _read_cifar_pickle(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    try:
        # The published files are Python 2 pickles: their strings are bytes.
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    # A damaged pickle can raise nearly any exception, none of which ran anything but the stand-ins above.
    except Exception as error:
        raise ValueError(f"{path} is not a CIFAR-10 batch: {_first_line(error)}") from error
    items = batch.items() if isinstance(batch, dict) else ()
    fields = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in items}
    data, labels = fields.get("data"), fields.get("labels")
    if not isinstance(data, _PickledArray) or not isinstance(labels, list):
        raise ValueError(f"{path} is not a CIFAR-10 batch: it takes an array 'data' and a list 'labels'")
    if data.shape != (len(labels), 3072) or len(data.content) != 3072 * len(labels):
        raise ValueError(
            f"{path} is not a CIFAR-10 batch: {len(labels)} labels, data {data.shape} in {len(data.content)} bytes"
        )
    if not all(type(label) is int and 0 <= label < 10 for label in labels):
        raise ValueError(f"{path} is not a CIFAR-10 batch: labels takes integers from 0 to 9")
    return np.frombuffer(data.content, np.uint8).reshape(data.shape), np.array(labels, dtype=np.int64)
