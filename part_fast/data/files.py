"""Readers of the files that data sets come in: idx, CIFAR's two, MATLAB's .mat, images. None of them runs code.

Every reader raises one ValueError that names the file and what is wrong with it.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from part_fast.errors import BadValueError
from part_fast.optional import needs

__all__ = ["image_size", "read_cifar_binary", "read_cifar_pickle", "read_idx", "read_images", "read_lines", "read_mat"]

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp"))

# MATLAB's numeric storage types, and the classes of its arrays that hold plain numbers (double to uint64).
_MAT_STORAGE = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
}  # fmt: skip
_MAT_NUMERIC = range(6, 16)
_MAT_MATRIX, _MAT_COMPRESSED = 14, 15


def first_line(error: Exception) -> str:
    """What `error` says, without the lines that follow."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, empty ones left out."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise BadValueError(f"{path} is not a text file: {first_line(error)}") from error


def read_idx(path: Path, dims: int) -> npt.NDArray[np.uint8]:
    """The idx format: two zero bytes, type 8 (uint8), the number of dimensions, their big-endian sizes, the values."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise BadValueError(f"{path} is not a whole gzip file: {error}") from error
    header = 4 + 4 * dims
    if len(content) < header or content[:4] != bytes((0, 0, 8, dims)):
        start = content[:4].hex(" ")
        raise BadValueError(f"{path} is not an idx file of uint8 with {dims} dimensions: it starts {start}")
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    expected = header + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise BadValueError(f"{path} has {len(content)} bytes, its header {shape} says {expected}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_cifar_binary(path: Path, title: str, label_bytes: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pixels (N,3072) and labels (N,): records of `label_bytes`, the last of which is the label, and 3072 pixels."""
    content, record = path.read_bytes(), label_bytes + 3072
    if not content or len(content) % record:
        raise BadValueError(
            f"{path} has {len(content)} bytes, {title}'s binary files hold images of {record} bytes each"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return records[:, label_bytes:].copy(), records[:, label_bytes - 1].astype(np.int64)


class _PickledDtype:
    """Stands in for numpy.dtype: takes what a pickle says and accepts uint8 alone."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        text = name.decode("ascii") if isinstance(name, bytes) else name
        if text not in ("u1", "|u1", "uint8"):
            raise pickle.UnpicklingError(f"an array of {text!r}, expected uint8")

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and alignment, which uint8 does not have."""


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
    """Reads dictionaries, lists, numbers, strings and uint8 arrays; any global but the classes above is an error.

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


def read_cifar_pickle(
    path: Path, title: str, field: str, classes: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pixels (N,3072) and labels (N,) of a pickled batch: its array `data` and its list `field`."""
    try:
        # The published files are Python 2 pickles: their strings are bytes.
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    # A damaged pickle can raise nearly any exception, none of which ran anything but the stand-ins above.
    except Exception as error:
        raise BadValueError(f"{path} is not a {title} batch: {first_line(error)}") from error
    items = batch.items() if isinstance(batch, dict) else ()
    fields = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in items}
    data, labels = fields.get("data"), fields.get(field)
    if not isinstance(data, _PickledArray) or not isinstance(labels, list):
        raise BadValueError(f"{path} is not a {title} batch: it takes an array 'data' and a list '{field}'")
    if data.shape != (len(labels), 3072) or len(data.content) != 3072 * len(labels):
        raise BadValueError(
            f"{path} is not a {title} batch: {len(labels)} labels, data {data.shape} in {len(data.content)} bytes"
        )
    if not all(type(label) is int and 0 <= label < classes for label in labels):
        raise BadValueError(f"{path} is not a {title} batch: {field} takes integers from 0 to {classes - 1}")
    return np.frombuffer(data.content, np.uint8).reshape(data.shape), np.array(labels, dtype=np.int64)


def read_mat(path: Path, *names: str) -> dict[str, npt.NDArray[Any]]:
    """The numeric arrays `names` of a MATLAB 5 to 7 file, packed or not, of either byte order.

    Arrays keep MATLAB's shape (at least two dimensions) and storage type, in Fortran order.

    Source: MathWorks, "MAT-File Format", level 5.
    """
    content = memoryview(path.read_bytes())
    order = {b"IM": "<", b"MI": ">"}.get(bytes(content[126:128]))
    if order is None:
        hdf5 = " (version 7.3 is HDF5: save it as version 7)" if bytes(content[:10]) == b"MATLAB 7.3" else ""
        raise BadValueError(f"{path} is not a MATLAB 5 file{hdf5}")
    found: dict[str, npt.NDArray[Any]] = {}
    try:
        if struct.unpack_from(f"{order}H", content, 124)[0] != 0x0100:
            raise BadValueError("another version than 5 to 7 (save it as version 7)")
        for kind, element in _mat_elements(content[128:], order):
            inner = _mat_elements(zlib.decompress(element), order) if kind == _MAT_COMPRESSED else [(kind, element)]
            for inner_kind, matrix in inner:
                if inner_kind == _MAT_MATRIX:
                    found.update(_mat_array(matrix, order, names))
    except (ValueError, struct.error, zlib.error) as error:
        raise BadValueError(f"{path} is a damaged MATLAB file: {first_line(error)}") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise BadValueError(f"{path} has no numeric array {' and no '.join(missing)}")
    return found


def _mat_elements(content: bytes | memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Type and data of each element; a tag is 8 bytes, or 4 where up to 4 bytes of data follow in its other half."""
    view, at = memoryview(content), 0
    while at < len(view):
        kind, size = struct.unpack_from(f"{order}II", view, at)
        if kind >> 16:
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        else:
            start = at + 8
            # All but packed elements are padded to 8 bytes; the last one of a file may go without.
            end = start + size + (0 if kind == _MAT_COMPRESSED else -size % 8)
        if start + size > min(end, len(view)):
            raise BadValueError(f"an element of {size} bytes where {len(view) - start} are left")
        yield kind, view[start : start + size]
        at = end


def _mat_array(matrix: memoryview, order: str, names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """The array by its name, or nothing if it is no numeric array or not one of `names`."""
    parts = list(_mat_elements(matrix, order))
    # Elements that are no plain array (opaque objects) may have fewer or other parts.
    if len(parts) < 4 or len(parts[0][1]) != 8 or parts[0][1][0 if order == "<" else 3] not in _MAT_NUMERIC:
        return {}
    name = bytes(parts[2][1]).decode("latin1")
    if name not in names:
        return {}
    dims = np.frombuffer(parts[1][1], f"{order}i4").tolist()
    kind, data = parts[3]
    if kind not in _MAT_STORAGE or len(parts) > 4:
        raise BadValueError(f"{name} is not an array of real numbers")
    values = np.frombuffer(data, f"{order}{_MAT_STORAGE[kind]}")
    if min(dims, default=-1) < 0 or math.prod(dims) != len(values):
        raise BadValueError(f"{name} is {'x'.join(map(str, dims))} but has {len(values)} values")
    return {name: values.reshape(dims, order="F")}


def image_size(path: Path) -> tuple[int, int]:
    """Height and width, from the header alone."""
    with needs("pillow", "train"):
        from PIL import Image
    try:
        with Image.open(path) as image:
            return image.height, image.width
    # Each format has its own exceptions for a damaged file; the first line of any of them says what happened.
    except Exception as error:
        raise BadValueError(f"{path} is not an image that can be read: {first_line(error)}") from error


def read_images(paths: Sequence[Path], size: tuple[int, int], *, fit: bool = False, hint: str = "") -> Tensor:
    """The images as one uint8 tensor (N,3,H,W) with (H,W) = `size`; gray ones get three equal channels.

    With `fit` an image of another size is scaled (bicubic) to cover `size` and cropped at its centre; without, it is
    refused, in a message that ends with `hint`. A progress bar appears where this takes more than a second.
    """
    with needs("tqdm", "train"):
        from tqdm import tqdm
    out = np.empty((len(paths), 3, *size), np.uint8)
    for i, path in enumerate(tqdm(paths, desc="images", unit="img", disable=None, leave=False, delay=1)):
        out[i] = _read_rgb(path, size, fit, hint).transpose(2, 0, 1)
    return torch.from_numpy(out)


def _read_rgb(path: Path, size: tuple[int, int], fit: bool, hint: str) -> npt.NDArray[np.uint8]:
    with needs("pillow", "train"):
        from PIL import Image, ImageOps
    try:
        with Image.open(path) as image:
            # Modes I and F hold more than 8 bits a pixel, which a conversion would silently clip.
            if image.mode[0] in "IF":
                raise BadValueError(f"its pixels are of mode {image.mode}, not of 8 bits")
            rgb = image.convert("RGB")
    except Exception as error:
        raise BadValueError(f"{path} is not an image that can be read: {first_line(error)}") from error
    height, width = size
    if fit:
        rgb = ImageOps.fit(rgb, (width, height), Image.Resampling.BICUBIC)
    if rgb.size != (width, height):
        raise BadValueError(f"{path} is {rgb.height}x{rgb.width} (height x width), expected {height}x{width}{hint}")
    return np.asarray(rgb)
