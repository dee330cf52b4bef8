"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write, which takes the place of `path` when the block ends: no reader meets half a file.

    If the block raises, `path` stays as it was and the temporary file is removed. Who may read the file is what the
    umask says, as for a file that `open` makes, whoever writes it: safetensors, for one, lets its owner alone read it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    mode = _mode_of_new_file(temporary)
    try:
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _mode_of_new_file(path: Path) -> int:
    """The permissions that a new file at `path` gets; asked of the file system, since reading the umask changes it."""
    path.unlink(missing_ok=True)  # of a process that was killed
    path.touch()
    try:
        return stat.S_IMODE(path.stat().st_mode)
    finally:
        path.unlink()
