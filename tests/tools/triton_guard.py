"""Checks every memory access of Triton kernels that the interpreter runs.

Imported in a TRITON_INTERPRET=1 process before any kernel runs, it lets a load, store or atomic operation raise
IndexError when an unmasked lane lies outside every tensor that was passed to the launch. Results are still computed.
It replaces methods of Triton's interpreter by name. It does not check atomic loads and stores, new in Triton 3.9.
"""

from collections.abc import Callable

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

from .ptx_cpu import memory

# (first byte, one past the last byte) of each tensor of the launch that runs.
ranges: list[tuple[int, int]] = []


def check(name: str, pointers, mask) -> None:
    addresses = np.asarray(pointers.data).astype(np.uint64)
    if mask is not None:
        addresses = addresses[np.broadcast_to(np.asarray(mask.data).astype(bool), addresses.shape)]
    size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
    outside = np.ones(addresses.shape, bool)
    for first, end in ranges:
        outside &= (addresses < first) | (addresses > max(end - size, 0))
    if outside.any():
        raise IndexError(f"{name}: {outside.sum()} lane(s) out of bounds, first at {int(addresses[outside][0]):#x}")


def checked(name: str, pointers_at: int, mask_at: int | None) -> Callable:
    original = getattr(interpreter.InterpreterBuilder, name)

    def method(self, *arguments, **options):
        check(name, arguments[pointers_at], None if mask_at is None else arguments[mask_at])
        return original(self, *arguments, **options)

    return method


for name, pointers_at, mask_at in (
    ("create_load", 0, None),
    ("create_store", 0, None),
    ("create_masked_load", 0, 1),
    ("create_masked_store", 0, 2),
    ("create_atomic_cas", 0, None),
    ("create_atomic_rmw", 1, 3),
):
    setattr(interpreter.InterpreterBuilder, name, checked(name, pointers_at, mask_at))

launch = interpreter.GridExecutor.__call__


def launch_with_ranges(self, *arguments, **options):
    before = len(ranges)
    for value in (*arguments, *options.values()):
        if isinstance(value, Tensor):
            ranges.append((value.data_ptr(), value.data_ptr() + memory(value).nbytes))
    try:
        return launch(self, *arguments, **options)
    finally:
        del ranges[before:]


interpreter.GridExecutor.__call__ = launch_with_ranges
