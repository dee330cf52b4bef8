"""Readers of the files that data sets come in: idx, CIFAR's two, MATLAB's .mat, images. None of them runs code.

Every reader raises one ValueError that names the file and what is wrong with it. What is packed is unpacked as far as
the header says that it goes, and never beyond `UNPACKED_LIMIT`.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from part_fast.errors import BadValueError
from part_fast.optional import needs
from part_fast.reading import first_line

__all__ = ["image_size", "read_cifar_binary", "read_cifar_pickle", "read_idx", "read_images", "read_lines", "read_mat"]

UNPACKED_LIMIT = 2**31  # bytes; the largest of the published sets, SVHN's extra images, has 1.6e9
PIXEL_LIMIT = 2**26  # of one image

# What an image may be, whatever its name ends in. Pillow knows more, some of which it hands to other programs.
IMAGE_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp"))

# MATLAB's numeric storage types, and the classes of its arrays that hold plain numbers (double to uint64).
_MAT_STORAGE = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
}  # fmt: skip
_MAT_NUMERIC = range(6, 16)
_MAT_MATRIX, _MAT_COMPRESSED = 14, 15


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, empty ones left out."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise BadValueError(f"{path} is not a text file: {first_line(error)}") from error


def read_idx(path: Path, dims: int) -> npt.NDArray[np.uint8]:
    """The idx format: two zero bytes, type 8 (uint8), the number of dimensions, their big-endian sizes, the values."""
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            return _read_idx(gzip.GzipFile(fileobj=raw) if packed else raw, path, dims)
        except (OSError, EOFError, zlib.error) as error:
            raise BadValueError(f"{path} is not a whole {'gzip ' * packed}file: {first_line(error)}") from error


def _read_idx(file: gzip.GzipFile | IO[bytes], path: Path, dims: int) -> npt.NDArray[np.uint8]:
    header = file.read(4 + 4 * dims)
    if len(header) < 4 + 4 * dims or header[:4] != bytes((0, 0, 8, dims)):
        start = header[:4].hex(" ")
        raise BadValueError(f"{path} is not an idx file of uint8 with {dims} dimensions: it starts {start}")
    shape = tuple(int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4))
    expected = math.prod(shape)
    if expected > UNPACKED_LIMIT:
        raise BadValueError(f"{path} says that it holds {shape}, which are more than {UNPACKED_LIMIT} bytes")
    values = file.read(expected)
    # To read on finds the end of what is packed, where the checksum is compared.
    if (size := len(values) + len(file.read(2**20))) != expected:
        sizes = f"{len(header) + size} bytes, its header {shape} says {len(header) + expected}"
        raise BadValueError(f"{path} has {sizes}")
    return np.frombuffer(values, np.uint8).reshape(shape)


def read_cifar_binary(
    path: Path, title: str, label_bytes: int, classes: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pixels (N,3072) and labels (N,): records of `label_bytes`, the last of which is the label, and 3072 pixels."""
    content, record = path.read_bytes(), label_bytes + 3072
    if not content or len(content) % record:
        raise BadValueError(
            f"{path} has {len(content)} bytes, {title}'s binary files hold images of {record} bytes each"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    labels = records[:, label_bytes - 1].astype(np.int64)
    if int(labels.max()) >= classes:
        raise BadValueError(f"{path}: labels takes values from 0 to {classes - 1}, got {labels.max()}")
    return records[:, label_bytes:].copy(), labels


class _PickledDtype:
    """Stands in for numpy.dtype: takes what a pickle says and accepts uint8 alone."""

    def __init__(self, name: object, *_: object) -> None:
        text = name.decode("ascii") if isinstance(name, bytes) else name
        if text not in ("u1", "|u1", "uint8"):
            of = repr(text[:40]) if isinstance(text, str) else type(text).__name__
            raise pickle.UnpicklingError(f"an array of {of}, expected uint8")

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and alignment, which uint8 does not have; but a dtype's they must be."""
        if not isinstance(state, tuple) or len(state) != 8 or state[0] != 3 or {*map(type, state[5:])} != {int}:
            raise pickle.UnpicklingError("a dtype whose state is none")


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
        # A message about them prints them: few, and no tuples of tuples, of which there are soon more than end.
        if len(shape) > 4 or not all(type(extent) is int and 0 <= extent < 2**40 for extent in shape):
            raise pickle.UnpicklingError("an array of another shape than images by values")
        if not isinstance(content, bytes | bytearray):
            raise pickle.UnpicklingError("an array without its bytes")
        self.shape, self.content = shape, bytes(content)


def _reconstruct(kind: object, shape: tuple[object, ...], dtype: object) -> _PickledArray:
    # An empty array of int8, as numpy always begins; its state says what it is.
    if kind is not _PickledArray or shape != (0,) or type(shape[0]) is not int or dtype not in ("b", b"b"):
        raise pickle.UnpicklingError("an array that is made in another way than numpy's")
    return _PickledArray()


def _from_buffer(content: object, dtype: object, shape: object, order: object) -> _PickledArray:
    array = _PickledArray()
    array._take(content, dtype, shape, order)
    return array


def _encode_latin1(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes that are not encoded as latin1")
    return text.encode("latin1")


# The instructions of a pickle that make plain values, find and call a global, and remember what was made.
_PICKLED_VALUES = (
    *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.NONE),
    *(pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.LONG, pickle.LONG1, pickle.LONG4, pickle.FLOAT, pickle.BINFLOAT),
    *(pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.UNICODE, pickle.BINUNICODE),
    *(pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_DICT),
    *(pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE),
    *(pickle.GET, pickle.BINGET, pickle.LONG_BINGET, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
)


class _ArraysOnly(pickle._Unpickler):
    """Reads dictionaries, lists, numbers, strings and uint8 arrays; any global but the classes above is an error.

    Even numpy's own constructors are not called: what a file names is only looked up in this table. The base is
    Python's unpickler in Python: the one in C makes room for as many memos as five bytes of a file ask for, up to
    64 GiB. Of its instructions only those that make such values are followed.
    """

    # As `load` of the base makes them.
    stack: list[Any]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]
    _unframer: Any

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
            named = f"{module}.{name}"[:80]
            raise pickle.UnpicklingError(f"it names {named}, which is not a part of an image batch") from None

    def _frame(self) -> None:
        """A frame begins, of so many bytes; the base goes on where it has fewer."""
        size = int.from_bytes(self.read(8), "little")
        self._unframer.load_frame(min(size, UNPACKED_LIMIT))
        if self._unframer.current_frame.getbuffer().nbytes != size:
            raise pickle.UnpicklingError("a part that is cut off")

    def _build(self) -> None:
        """An array or dtype gets its state. Anything else that has attributes is a stand-in itself."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _PickledArray | _PickledDtype):
            raise pickle.UnpicklingError("a state of what is no array")
        self.stack[-1].__setstate__(state)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _set_items(self, items: list[Any] | None = None) -> None:
        """A dictionary gets items. Tuples are no keys: of tuples of the same tuples the hash never ends."""
        items = self.pop_mark() if items is None else items
        filled = self.stack[-1]
        if not all(isinstance(key, str | bytes | int) for key in items[::2]) or type(filled) is not dict:
            raise pickle.UnpicklingError("a dictionary whose keys are not strings")
        expected = len(filled) + len(items) // 2
        filled.update(zip(items[::2], items[1::2], strict=True))
        if len(filled) < expected:
            raise pickle.UnpicklingError("a dictionary in which a key stands twice")

    def _dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set_items(items)

    def _bytearray(self) -> None:
        """A bytearray of bytes that are there: room for as many as the file announces may be more than there is."""
        size = int.from_bytes(self.read(8), "little")
        self.stack.append(bytearray(self.read(min(size, UNPACKED_LIMIT))))

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in _PICKLED_VALUES},
        pickle.FRAME[0]: _frame,
        pickle.BUILD[0]: _build,
        pickle.BYTEARRAY8[0]: _bytearray,
        pickle.DICT[0]: _dict,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
    }


def read_cifar_pickle(
    path: Path, title: str, field: str, classes: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pixels (N,3072) and labels (N,) of a pickled batch: its array `data` and its list `field`."""
    try:
        # The published files are Python 2 pickles: their strings are bytes.
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    # A damaged pickle can raise nearly any exception, none of which ran anything but the stand-ins above.
    except Exception as error:
        reason = "an instruction that makes no images" if isinstance(error, KeyError) else first_line(error)
        raise BadValueError(f"{path} is not a {title} batch: {reason}") from error
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
            inner = _mat_elements(_unpacked(element, order), order) if kind == _MAT_COMPRESSED else [(kind, element)]
            for inner_kind, matrix in inner:
                if inner_kind != _MAT_MATRIX:
                    raise BadValueError(f"an element of type {inner_kind} where an array stands")
                array = _mat_array(matrix, order, names)
                if found.keys() & array.keys():
                    raise BadValueError(f"{' and '.join(array)} stands there twice")
                found |= array
    except (ValueError, struct.error, zlib.error) as error:
        raise BadValueError(f"{path} is a damaged MATLAB file: {first_line(error)}") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise BadValueError(f"{path} has no numeric array {' and no '.join(missing)}")
    return found


def _unpacked(element: memoryview, order: str) -> bytes:
    """The element that lies packed in a compressed one, as long as its own tag says."""
    unpack = zlib.decompressobj()
    tag = unpack.decompress(element, 8)
    if len(tag) < 8:
        raise BadValueError("a packed element without its type and size")
    _, size = struct.unpack(f"{order}II", tag)
    if size > UNPACKED_LIMIT:
        raise BadValueError(f"an element of {size} bytes, more than {UNPACKED_LIMIT}")
    # A byte more than it may have, with its padding: what is longer than it says is refused as an element is.
    content = unpack.decompress(unpack.unconsumed_tail, size + 8) if size else b""
    if not unpack.eof and unpack.decompress(unpack.unconsumed_tail, 1):
        raise BadValueError(f"a packed element of more than the {size} bytes that it says")
    if not unpack.eof:
        raise BadValueError("a packed element that is cut off")
    return tag + content


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
    if [kind for kind, _ in parts[:3]] != [6, 5, 1]:  # as MATLAB and scipy write flags, dimensions and name
        raise BadValueError(f"{name} begins otherwise than an array")
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
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            _refuse_too_large(image.size)
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
    try:
        out = np.empty((len(paths), 3, *size), np.uint8)
    except (MemoryError, ValueError) as error:
        raise BadValueError(
            f"{len(paths)} images of {size[0]}x{size[1]}, as {paths[0]} has, do not fit in memory"
        ) from error
    for i, path in enumerate(tqdm(paths, desc="images", unit="img", disable=None, leave=False, delay=1)):
        out[i] = _read_rgb(path, size, fit, hint).transpose(2, 0, 1)
    return torch.from_numpy(out)


def _read_rgb(path: Path, size: tuple[int, int], fit: bool, hint: str) -> npt.NDArray[np.uint8]:
    with needs("pillow", "train"):
        from PIL import Image, ImageOps
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            _refuse_too_large(image.size)
            # Modes I and F hold more than 8 bits a pixel, which a conversion would silently clip.
            if image.mode[0] in "IF":
                raise BadValueError(f"its pixels are of mode {image.mode}, not of 8 bits")
            found = image.size
            # The header tells the size, before anything is unpacked.
            rgb = image.convert("RGB") if fit or found == size[::-1] else None
    except Exception as error:
        raise BadValueError(f"{path} is not an image that can be read: {first_line(error)}") from error
    if rgb is None:
        sizes = f"{found[1]}x{found[0]} (height x width), expected {size[0]}x{size[1]}"
        raise BadValueError(f"{path} is {sizes}{hint}")
    if fit:
        rgb = ImageOps.fit(rgb, size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(rgb)


def _refuse_too_large(size: tuple[int, int]) -> None:
    if size[0] * size[1] > PIXEL_LIMIT:
        raise BadValueError(f"it says that it has {size[0] * size[1]} pixels, more than {PIXEL_LIMIT}")
