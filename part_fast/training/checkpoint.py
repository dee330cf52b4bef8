"""State files: what a run goes on from, with a checksum, the newest one and the one before it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from part_fast.atomic import replacing
from part_fast.errors import BadValueError
from part_fast.reading import first_line, read_torch

STATE, PREVIOUS = "training_state.pt", "training_state.previous.pt"

# A file of torch.save, and behind it these bytes and its SHA-256. Torch reads the file as if they were not there; by
# itself it compares nothing with the checksums of its zip format.
MARK = b"part_fast state sha256 "
VERSION = 1


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Make `state` the newest one in `folder`, and the newest one so far the one before it.

    At every moment of it, one of them is there and whole, and whatever has been renamed is on the disk.
    Errors: OSError that names the file, where the disk is full or may not be written; the newest one is then as it was.
    """
    newest = folder / STATE
    with replacing(newest, synced=True) as temporary:
        with temporary.open("wb") as file:
            hashing = _Hashing(file)
            try:
                torch.save({"version": VERSION, **state}, hashing)  # type: ignore[arg-type]
            except Exception as error:
                if hashing.error is not None and error is not hashing.error:
                    raise hashing.error from None  # torch's own says "unexpected pos"
                raise
            file.write(MARK + hashing.sha256.digest())
        if newest.is_file():
            with replacing(folder / PREVIOUS, synced=True) as link:
                try:
                    os.link(newest, link)
                except OSError:  # a file system without links
                    shutil.copyfile(newest, link)


def read_state(folder: Path, warn: Callable[[str], object]) -> dict[str, Any] | None:
    """The newest state in `folder` that is whole, its tensors on the CPU; None where there is none at all.

    A damaged newest one is named by `warn`, and the one before it is taken; under "file" the state says which it is.
    Errors: ValueError where no state is whole.
    """
    newest, previous = folder / STATE, folder / PREVIOUS
    damaged = []
    for path in (newest, previous):
        if not path.is_file():
            continue
        try:
            state = _read(path)
        except BadValueError as error:
            damaged.append(str(error))
            continue
        if damaged:
            warn(f"warning: {damaged[0]}; the run goes on from the state before it, {previous.name}")
        return {**state, "file": path.name}
    if damaged:
        raise BadValueError(f"{'; '.join(damaged)}: nothing is left to go on from, --overwrite starts anew")
    return None


def promote_previous(folder: Path) -> None:
    """Let the state before the newest, which is damaged, take its place, or the next one would replace both."""
    with replacing(folder / STATE, synced=True) as copy:
        shutil.copyfile(folder / PREVIOUS, copy)


def _read(path: Path) -> dict[str, Any]:
    """The state in a file. Errors: ValueError where it is damaged."""
    with path.open("rb") as file:
        length = path.stat().st_size - len(MARK) - 32
        digest = hashlib.sha256()
        left = max(length, 0)
        while left and (chunk := file.read(min(left, 1 << 22))):
            digest.update(chunk)
            left -= len(chunk)
        end = file.read()
    if length < 0 or end[: len(MARK)] != MARK:
        raise BadValueError(f"{path} is damaged: it does not end in a checksum")
    if end[len(MARK) :] != digest.digest():
        raise BadValueError(f"{path} is damaged: it does not have the checksum that it was written with")
    try:
        state = read_torch(path)
    # A file that was made to look like one of ours can raise nearly anything.
    except Exception as error:
        raise BadValueError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        version = state.get("version") if isinstance(state, dict) else None
        raise BadValueError(f"{path} is of another version of part_fast: state {str(version)[:20]}, not {VERSION}")
    missing = [name for name in ("config", "rows", "epoch", "processes", "model") if name not in state]
    if missing:
        raise BadValueError(f"{path} is damaged: it lacks {', '.join(missing)}")
    if not isinstance(state["config"], dict) or not isinstance(state["rows"], list):
        raise BadValueError(f"{path} is damaged: it takes a configuration and the rows of metrics.csv")
    return state


class _Hashing:
    """What torch.save writes to: the file, the SHA-256 of what went there, and the error that stopped it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()
