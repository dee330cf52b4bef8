"""The raw ops as Triton kernels, a module per op; `Launch` and the arithmetic that several of them share."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from part_fast.backends import INTERPRETED

INTERPRETER = tl.constexpr(INTERPRETED)
# Threads of a warp: AMD's data-centre GPUs have twice as many.
LANES = 64 if torch.version.hip else 32


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch: all that a GPU needs, also for a test that compiles and runs it elsewhere.

    arguments: by name, in the kernel's order; tensors, ints, floats (float64 in the kernel) or None.
    constants: the kernel's constexprs. num_warps: of 32 threads.
    fuse: whether a*b+c may become one fma, which changes bits.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    fuse: bool = False

    def warps(self, lanes: int = LANES) -> int:
        """Warps of `lanes` threads that make the same block: Triton cannot gather from fewer elements than threads."""
        return max(1, self.num_warps * 32 // lanes)

    def run(self) -> None:
        """Launch on the current stream of the arguments' device; nothing for no programs. Never waits."""
        if self.programs == 0:
            return
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[(self.programs,)](
                **self.arguments, **self.constants, num_warps=self.warps(), enable_fp_fusion=self.fuse
            )


def block_size(on_gpu: int, span: int) -> int:
    """Elements a program takes of `span`: `on_gpu`, or as many as there are where each program costs milliseconds."""
    return triton.next_power_of_2(max(1, min(span, 1 << 18))) if INTERPRETED else on_gpu


@triton.jit
def widen(value):
    """To what is computed in: float64 stays, anything shorter becomes float32."""
    return value if value.dtype == tl.float64 else value.to(tl.float32)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """Round to a storage dtype; from float64 to 16 bits by way of float32, as PyTorch does."""
    if value.dtype == tl.float64 and dtype.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    if dtype == tl.bfloat16 and INTERPRETER:
        # The interpreter truncates; round to nearest, ties to even, as a GPU does.
        bits = value.to(tl.int32, bitcast=True)
        bits = tl.where(value != value, 0x7FC0, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF)
        result = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(dtype)
    return result


@triton.jit
def clamp(value, low, high):
    """torch.clamp: the lower bound first; NaN in the value or in a bound reaches the result."""
    value = tl.where((value < low) | (low != low), low, value)
    return tl.where((value > high) | (high != high), high, value)


@triton.jit
def divide(a, b):
    """a / b, correctly rounded."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def divide_by(a, b, reciprocal):
    """a / b, correctly rounded, from 1 / b correctly rounded; of a size where nothing under- or overflows.

    The quotient by the reciprocal is less than two units off. A correction with the exact remainder makes it less than
    one, and a second one then rounds right (Markstein, 1990). A division has a branch and a call, which cost registers.
    """
    if INTERPRETER:
        # There an fma rounds twice.
        result = divide(a, b)
    else:
        result = a * reciprocal
        result = tl.fma(tl.fma(-result, b, a), reciprocal, result)
        result = tl.fma(tl.fma(-result, b, a), reciprocal, result)
    return result
