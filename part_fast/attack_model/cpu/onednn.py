"""Convolutions by oneDNN with weights that it has packed: calls that torch keeps private, so each is tried first.

No other file names `torch.ops.mkldnn`. Where a call is gone, takes other arguments or gives another result than
torch's own convolution, `works` says no, and PackedConv2d is not used.

`sizes` are padding, stride, dilation and groups of the convolution.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

mkldnn = torch.ops.mkldnn
Sizes = tuple[Any, Any, Any, int]

# What a dispatch mode sees of the calls below.
FORWARD_OPS = ("mkldnn::_convolution_pointwise", "mkldnn::_convolution_pointwise.binary")
BACKWARD_OPS = ("mkldnn::_convolution_transpose_pointwise",)


def pack(weight: Tensor, sizes: Sizes, size: torch.Size) -> Tensor:
    """The weights (O,I/groups,h,w) as `convolve` takes them, in the order that is best for inputs of that size."""
    return mkldnn._reorder_convolution_weight(weight, *sizes, size)


def convolve(x: Tensor, packed: Tensor, bias: Tensor | None, sizes: Sizes, other: Tensor | None, relu: bool) -> Tensor:
    """`relu(conv2d(x) + other)`; without `other` or without ReLU, the rest of it."""
    given = packed, bias, *sizes
    if other is None:
        return mkldnn._convolution_pointwise(x, *given, "relu" if relu else "none", [], "")
    if other.shape[2:] == (1, 1):  # torch 2.10 cannot add where the result is one pixel
        out = mkldnn._convolution_pointwise(x, *given, "none", [], "") + other
        return out.relu_() if relu else out
    # "add", then alpha; "relu", then what else an activation may need.
    return mkldnn._convolution_pointwise.binary(x, other, *given, "add", None, "relu" if relu else None, [], None)


def pack_transposed(weight: Tensor, sizes: Sizes, rest: list[int], size: torch.Size) -> Tensor:
    """The same weights as `convolve_transposed` takes them, for gradients of that size."""
    padding, *others = sizes
    return mkldnn._reorder_convolution_transpose_weight(weight, padding, rest, *others, size)


def convolve_transposed(grad_out: Tensor, packed: Tensor, sizes: Sizes, rest: list[int]) -> Tensor:
    """The gradient for the input; rest: what a stride leaves over at the end of each dimension of it."""
    padding, *others = sizes
    return mkldnn._convolution_transpose_pointwise(grad_out, packed, None, padding, rest, *others, "none", [], "")


@functools.cache
def works(dtype: torch.dtype) -> bool:
    """Whether the calls above give torch's own results in `dtype` here. Each is tried once; a failure warns."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        if dtype == torch.bfloat16 and not mkldnn._is_mkldnn_bf16_supported():
            return False
        problem = _differs(dtype)
    except Exception as error:  # a call that this torch lacks, or that takes other arguments
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if problem is not None:
        warnings.warn(
            f"part_fast leaves {dtype} convolutions on the CPU to torch, which takes longer: the calls of oneDNN that "
            f"it knows do not work in torch {torch.__version__}: {problem}",
            stacklevel=2,
        )
    return problem is None


@torch.no_grad()
def _differs(dtype: torch.dtype) -> str | None:
    """Which of the calls gives another result than torch, or None."""

    def whole(*size: int) -> Tensor:
        # From -2 to 2, so that every sum below is a whole number under 256, which bfloat16 holds exactly.
        count = torch.arange(torch.Size(size).numel(), device="cpu")
        return (count * 7 % 5 - 2).to(dtype).view(size)

    x, weight, bias, other = whole(2, 4, 6, 7), whole(8, 4, 3, 3), whole(8), whole(2, 8, 3, 4)
    sizes: Sizes = (1, 1), (2, 2), (1, 1), 1
    out = F.conv2d(x, weight, bias, (2, 2), (1, 1))
    packed = pack(weight, sizes, x.shape)
    for add in (None, other):
        for relu in (False, True):
            expected = out if add is None else out + add
            expected = expected.relu() if relu else expected
            if not torch.equal(convolve(x, packed, bias, sizes, add, relu), expected):
                more = f"{'' if add is None else ' + tensor'}{' + ReLU' if relu else ''}"
                return f"a convolution{more} gives other values"
    rest = [1, 0]
    expected = F.conv_transpose2d(out, weight, None, (2, 2), (1, 1), tuple(rest))
    packed = pack_transposed(weight, sizes, rest, out.shape)
    if not torch.equal(convolve_transposed(out, packed, sizes, rest), expected):
        return "a transposed convolution gives other values"
    return None
