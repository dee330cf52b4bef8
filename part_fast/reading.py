"""JSON and tensors that others may have written: read without running anything, in bounded memory, or refused.

A file that cannot be read is one ValueError, one line, that names it and says what is wrong.
"""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from part_fast.errors import BadValueError, MissingFileError
from part_fast.optional import needs

JSON_LIMIT = 2**26  # bytes; what part_fast writes has some thousand


def first_line(error: BaseException) -> str:
    """What `error` says, without the lines that follow."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a UTF-8 JSON file, with or without a byte order mark.

    Stricter than json.loads: a name that stands twice in an object, NaN and numbers that no float holds are refused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, not an object, or nested too deeply.
    """
    if not path.is_file():
        raise MissingFileError(f"there is no file at {path}")
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise BadValueError(f"it has more than {JSON_LIMIT} bytes")
        text = path.read_bytes().decode("utf-8-sig")
        values = json.loads(
            text, object_pairs_hook=_each_once, parse_constant=_finite, parse_float=_finite, parse_int=_integer
        )
    # The reader recurses where the file nests.
    except (ValueError, RecursionError) as error:
        raise BadValueError(f"{path} is not JSON that can be read: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise BadValueError(f"{path} must hold an object, got a {type(values).__name__}")
    return values


def check_numbers(*values: Any) -> None:
    """Errors: ValueError unless each value, read from JSON, is a finite number."""
    for value in values:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise BadValueError(f"a number is {value!r}"[:100])


def check_share(row: dict[str, Any]) -> None:
    """Errors: ValueError, KeyError unless a row's accuracy is that of so many right of n, with a standard error."""
    share, error, hits, n = (row[name] for name in ("accuracy", "standard_error", "correct", "n"))
    check_numbers(share, error)
    if not all(0 <= value <= 1 for value in (share, error)):
        raise BadValueError(f"a share is not in [0, 1]: {share}, {error}")
    if not (type(hits) is int and type(n) is int and n > 0 and hits / n == share):
        raise BadValueError(f"an accuracy of {share} is not {hits!r} of {n!r}"[:100])


def check_texts(values: Any) -> None:
    """Errors: ValueError unless it is a list of texts."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise BadValueError(f"a text is {values!r}"[:100])


def missing_or_wrong(error: Exception) -> str:
    """What an error says of a record that lacks something, or holds something else: one line."""
    return f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadValueError(f"{twice!r} stands twice in one object")
    return values


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadValueError(f"{text[:20]} is not a finite number")
    return value


def _integer(text: str) -> int:
    _finite(text)
    return int(text)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or a bool in it is neither 0 nor 1.
    """
    if not path.is_file():
        raise MissingFileError(f"there is no file at {path}")
    with needs("safetensors", "train"):
        from safetensors.torch import load_file
    try:
        tensors = load_file(path)
    # Its exceptions are many; the first line of any of them says what happened.
    except Exception as error:
        raise BadValueError(f"{path} is not a safetensors file that can be read: {first_line(error)}") from error
    for name, tensor in tensors.items():
        # Comparisons of such a tensor would give anything.
        if tensor.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
            raise BadValueError(f"{path} is damaged: {name!r} holds bools that are neither 0 nor 1")
    return tensors


def read_torch(path: Path) -> Any:
    """What a file of torch.save holds, on the CPU; tensors, containers and numbers alone, as `weights_only` allows.

    The checksums that torch.save writes, and torch.load does not look at, are compared.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its contents are packed or damaged.
        Exception: nearly any, as torch.load raises it for a file that it cannot or must not read.
    """
    if not path.is_file():
        raise MissingFileError(f"there is no file at {path}")
    with path.open("rb") as file:
        packed = file.read(4) == b"PK\x03\x04"  # else written by torch before 1.6
    if packed:
        _check_archive(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_archive(path: Path) -> None:
    """Refuse an archive that is larger unpacked than packed, and one whose parts do not have their checksums."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if len({part.filename for part in parts}) < len(parts):
            raise BadValueError("a part of the archive stands there twice")
        packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
        if packed or sum(part.file_size for part in parts) > path.stat().st_size:
            raise BadValueError("its parts are compressed, which torch.save never does: unpack it and save it again")
        if any(part.external_attr & 0x10 for part in parts):  # which torch reads as if it were empty
            raise BadValueError("a part of the archive is a folder")
        for part in parts:
            if part.CRC:  # 0 under torch.serialization.set_crc32_options(False)
                with archive.open(part) as file:
                    while file.read(2**20):  # the last one raises if the sums differ
                        pass
