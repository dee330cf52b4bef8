"""Runs compiled PTX on the CPU. What that shows and what it cannot is in the README beside this folder."""

from .kernel import Kernel, memory
from .parse import PtxError, UnsupportedError

__all__ = ["Kernel", "PtxError", "UnsupportedError", "memory"]
