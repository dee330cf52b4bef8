"""Packages that only parts of part_fast need: one that is missing is one line that says how to get it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from part_fast.errors import MissingPackageError


@contextlib.contextmanager
def needs(package: str, extra: str) -> Iterator[None]:
    """`with needs("tqdm", "train"): from tqdm import tqdm`.

    package: its name for pip. extra: that of part_fast which brings it.
    Errors: ImportError, one line, where the import in the block fails.
    """
    try:
        yield
    except ImportError as error:
        # A version of torchvision takes one version of torch alone: named, that one stays as it is.
        torch_too = f" torch=={torch.__version__.partition('+')[0]}" if package == "torchvision" else ""
        reason = " ".join(str(error).split())
        raise MissingPackageError(
            f"part_fast needs the package {package} for this ({reason}): pip install {package}{torch_too}, "
            f"or in a checkout of part_fast pip install '.[{extra}]'{torch_too}",
            name=error.name,
        ) from error
