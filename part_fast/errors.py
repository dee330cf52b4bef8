"""The errors that the caller can mend: whatever part_fast refuses, on purpose, is a `UsageError`.

Each is also the builtin type that such a mistake has in Python, so that `except ValueError` catches what it should:

    try:
        part_fast.pgd(model, x, y, eps=8 / 255, steps=-1)
    except part_fast.UsageError as error:  # or ValueError
        print(error)  # one line: the argument, what it takes, what it got

The command line prints a `UsageError` or an OSError as one line. Every other exception is a mistake of part_fast's own
and keeps its traceback.
"""

from __future__ import annotations


class UsageError(Exception):
    """part_fast refuses what it was given: one line that names the argument, what it takes and what it got."""


class BadValueError(UsageError, ValueError):
    """An argument has the right type, and a value that does not work."""


class BadTypeError(UsageError, TypeError):
    """An argument has the wrong type, dtype or layout."""


class CannotRunError(UsageError, RuntimeError):
    """What was asked for cannot run here, or not in this way: a backend, a CUDA graph, a training that diverges."""


class MissingFileError(UsageError, FileNotFoundError):
    """A file or folder is not where part_fast looked for it."""


class MissingPackageError(UsageError, ImportError):
    """A package that part_fast does not install by itself is needed; the line says how to install it."""
