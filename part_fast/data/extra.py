"""Extra training images from an .npz, such as the published sets of generated ones, behind those of a data set.

The file is read as a stream, straight into the memory that the data set then has: beside it one piece of 16 MiB is
held. Nothing in the file is run: an array of objects is refused by its header.
"""

from __future__ import annotations

import dataclasses
import math
import os
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from part_fast.data.memory import Dataset
from part_fast.errors import BadValueError, MissingFileError, UsageError
from part_fast.reading import first_line

PIECE = 2**24  # bytes that are read at once


def add_extra(data: Dataset, path: Path) -> Dataset:
    """`data` and behind it the images of `path`, an .npz with `image`, uint8 (N,H,W,3), and `label`, integers (N,).

    The result lies in memory once, on the device of `data`: 3 * H * W bytes an image, 3.1 GB for a million of 32x32.
    Other arrays of the file are not read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no .npz, damaged, of other names, sizes, types or labels, or does not fit into memory.
    """
    if not path.is_file():
        raise MissingFileError(f"extra: there is no file at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            return _add(data, path, archive)
    except UsageError:
        raise
    # Of a damaged archive the reader raises nearly anything.
    except Exception as error:
        raise BadValueError(f"extra: {path} is no .npz that can be read: {first_line(error)}") from error


def checksums(path: Path) -> dict[str, int]:
    """CRC-32 of both arrays of a file that `add_extra` has read, which has compared them: what tells it from others."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.getinfo(f"{name}.npy").CRC for name in ("image", "label")}


def _add(data: Dataset, path: Path, archive: zipfile.ZipFile) -> Dataset:
    names = [part.filename for part in archive.infolist()]
    for name in ("image", "label"):
        if names.count(f"{name}.npy") != 1:
            held = ", ".join(one.removesuffix(".npy") for one in names[:8]) or "nothing"
            raise BadValueError(f"extra: {path} must hold image and label, each once, got {held}")
    channels, height, width = data.images.shape[1:]
    with archive.open("label.npy") as file:
        shape, dtype = _header(file)
        if len(shape) != 1 or dtype.kind not in "iu":
            raise BadValueError(f"extra: label in {path} must be integers (N,), got {dtype} {shape}")
        count = shape[0]
        labels = torch.from_numpy(np.frombuffer(_read(file, count * dtype.itemsize, path), dtype).astype(np.int64))
        _check_end(file, path)
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < data.num_classes:
        wrong = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise BadValueError(f"extra: label in {path} takes values from 0 to {data.num_classes - 1}, got {wrong}")
    with archive.open("image.npy") as file:
        shape, dtype = _header(file)
        expected = (count, height, width, channels)
        if dtype != np.uint8 or shape != expected or not count:
            raise BadValueError(f"extra: image in {path} must be uint8 {expected}, N >= 1, got {dtype} {shape}")
        images = _room(data, count, path)
        images[: len(data)] = data.images
        _read_images(file, images[len(data) :], path)
        _check_end(file, path)
    return dataclasses.replace(data, images=images, labels=torch.cat([data.labels, labels.to(data.labels.device)]))


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an array in C order, of numpy's format."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise BadValueError(f"extra: an array is of version {version} of numpy's format, which is 1.0 or 2.0 here")
    shape, fortran, dtype = read[version](file)
    if fortran and len(shape) > 1:
        raise BadValueError(f"extra: an array {shape} must be in C order, got Fortran's")
    return shape, dtype


def _room(data: Dataset, count: int, path: Path) -> Tensor:
    """Memory for all images, on the device of `data`, if it has as much at all."""
    shape = (len(data) + count, *data.images.shape[1:])
    device = data.images.device
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[0]
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if math.prod(shape) > there:
        raise BadValueError(
            f"extra: {path} must fit into the memory of {device}, {there / 1e9:.1f} GB: with the others its {count} "
            f"images take {math.prod(shape) / 1e9:.1f} GB"
        )
    return torch.empty(shape, dtype=torch.uint8, device=device)


def _read_images(file: IO[bytes], into: Tensor, path: Path) -> None:
    """Images (N,H,W,C) of a stream into (N,C,H,W)."""
    channels, height, width = into.shape[1:]
    size = channels * height * width
    for part in into.split(max(PIECE // size, 1)):
        piece = torch.frombuffer(bytearray(_read(file, len(part) * size, path)), dtype=torch.uint8)
        part.copy_(piece.view(-1, height, width, channels).permute(0, 3, 1, 2))


def _read(file: IO[bytes], size: int, path: Path) -> bytes:
    """So many bytes. Errors: ValueError where the array ends before."""
    content = file.read(size)
    if len(content) < size:
        raise BadValueError(f"extra: {path} is damaged: an array is cut off")
    return content


def _check_end(file: IO[bytes], path: Path) -> None:
    """Read on to the end, where the checksum is compared. Errors: ValueError for more than the header says."""
    if file.read(1):
        raise BadValueError(f"extra: {path} is damaged: an array is longer than its header says")
