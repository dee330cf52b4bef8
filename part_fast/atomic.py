"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """A temporary file to write, which takes the place of `path` when the block ends: no reader meets half a file.

    If the block raises, `path` stays as it was and the temporary file is removed; an OSError names `path`. Writers in C
    or Rust have errors of their own for a full disk, which become that OSError. synced: the file is on the disk before
    it takes that place, and the folder is afterwards, so that a power cut takes neither. Who may read the file is what
    the umask says, as for a file that `open` makes, whoever writes it: safetensors, for one, lets its owner alone read
    it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        mode = _mode_of_new_file(temporary)
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            temporary.chmod(mode)
        if synced:
            _sync(temporary)
        os.replace(temporary, path)
        if synced:
            _sync(path.parent)
    except OSError as error:
        if str(error.filename) == str(temporary) and error.filename2 is None:  # the folder may not be written to
            error.filename = None
        _name(error, path)
        raise
    except Exception as error:
        if type(error).__name__ != "SafetensorError" and "inline_container.cc" not in str(error):  # torch.save's
            raise
        raise OSError(f"{path} cannot be written: {_why_unwritable(temporary)}") from error
    finally:
        with contextlib.suppress(OSError):  # of a folder that may not be written to
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError in the block that names no file, as that of a write to a full disk, names `path`."""
    try:
        yield
    except OSError as error:
        _name(error, path)
        raise


def _name(error: OSError, path: Path) -> None:
    if error.errno is not None and error.filename is None:
        error.filename = str(path)


def _mode_of_new_file(path: Path) -> int:
    """The permissions that a new file at `path` gets; asked of the file system, since reading the umask changes it."""
    path.unlink(missing_ok=True)  # of a process that was killed
    path.touch()
    try:
        return stat.S_IMODE(path.stat().st_mode)
    finally:
        path.unlink()


def _why_unwritable(path: Path) -> str:
    """What the file system says to some bytes at the end of `path`, where a writer did not say it in a line."""
    try:
        with path.open("ab") as file:
            file.write(bytes(2**16))
    except OSError as error:
        return error.strerror or "unknown reason"
    return "its writer failed, as on a disk that is full"


def _sync(path: Path) -> None:
    """Wait until what was written to a file, or renamed in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
