"""TF32 and the choice of algorithms: settings of torch for the whole process, which are put back after a block."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch


def tf32() -> dict[str, bool]:
    """Whether float32 is multiplied in TF32 on CUDA, with 10 bits of mantissa in place of 23.

    Torch's default is TF32 for convolutions and none for matrix products.
    """
    convolutions, products = (setting.fp32_precision == "tf32" for setting in _settings())
    return {"convolutions": convolutions, "matrix_products": products}


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Float32 is multiplied in float32 inside the block, on CUDA too."""
    settings = _settings()
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def _settings() -> tuple[Any, Any]:
    # Not allow_tf32, which raises where the caller used these.
    return torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]


@contextlib.contextmanager
def algorithms(device: torch.device, *, tf32: bool, deterministic: bool) -> Iterator[None]:
    """Set, inside the block, the algorithms and precision of a training on `device`.

    On CUDA cuDNN times its algorithms and takes the fastest (`torch.backends.cudnn.benchmark`), unless `deterministic`,
    here or set by the caller: then only algorithms run that repeat their results, and an operation that has none
    raises. tf32: False multiplies float32 in float32; True leaves torch's setting as it is.
    """
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, workspace = torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    try:
        if deterministic:
            torch.use_deterministic_algorithms(True)
            if device.type == "cuda" and workspace is None:
                os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without which cuBLAS is not
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
        with contextlib.nullcontext() if tf32 else full_float32():
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(was_deterministic, warn_only=warn_only)
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
