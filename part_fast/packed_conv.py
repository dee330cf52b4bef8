"""PackedConv2d: a frozen convolution on the CPU that keeps its weights as oneDNN multiplies them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedConv2d(nn.Conv2d):
    """`nn.Conv2d` whose weights stay what they are until `repack` is called; the same bits, less time.

    A convolution on the CPU brings its weights into blocks first, in every forward and in every backward: for the wide
    layers of a WideResNet on small batches a fifth of the time. Here they are packed once for each, in the first
    forward and backward after `repack`. Gradients are for the input alone.

    Equivalent to: `nn.Conv2d` with `requires_grad_(False)` weights.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        """conv: `takes(conv)`; its parameters are shared."""
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            bias=conv.bias is not None,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.repack()

    @staticmethod
    def takes(conv: nn.Module) -> bool:
        """Whether `conv` can be packed: of this very class, on a CPU for which torch has oneDNN, padded with zeros."""
        if type(conv) is not nn.Conv2d or conv.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        dtypes = [torch.float32]
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            dtypes.append(torch.bfloat16)
        return conv.weight.dtype in dtypes and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)

    def repack(self) -> None:
        """To be called after the weights have changed."""
        self._forward: Tensor | None = None
        self._backward: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights cannot be copied or pickled.
        return {**self.__dict__, "_forward": None, "_backward": None}

    def forward(self, x: Tensor) -> Tensor:
        """Like nn.Conv2d's; x is brought to the weights' dtype."""
        return self.with_relu(x, None, relu=False)

    def with_relu(self, x: Tensor, other: Tensor | None = None, *, relu: bool = True) -> Tensor:
        """`relu(self(x) + other)` in one pass, which rounds once; without `other` or without ReLU, the rest of it."""
        x = x.to(self.weight.dtype)
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() == 0:
            out = super().forward(x)
            out = out if other is None else out + other
            return F.relu(out) if relu else out
        return _Convolve.apply(x, other if other is None else other.to(x.dtype), self, relu)

    def convolve(self, x: Tensor, other: Tensor | None, relu: bool) -> Tensor:
        """`with_relu` without autograd."""
        sizes = self.padding, self.stride, self.dilation, self.groups
        if self._forward is None:
            self._forward = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *sizes, x.shape)
        given = self._forward, self.bias, *sizes
        if other is None:
            last = "relu" if relu else "none"
            return torch.ops.mkldnn._convolution_pointwise(_dense(x), *given, last, [], "")
        # "add", then alpha; "relu", then what else an activation may need.
        add: tuple[Any, ...] = ("add", None, "relu" if relu else None, [], None)
        return torch.ops.mkldnn._convolution_pointwise.binary(_dense(x), _dense(other), *given, *add)

    def input_gradient(self, grad_out: Tensor, size: torch.Size) -> Tensor:
        """The gradient for an input of that size: a transposed convolution with the same weights."""
        # What a stride leaves over at the end of each dimension of the input.
        rest = [
            length - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
            for length, out, stride, padding, dilation, kernel in zip(
                size[2:], grad_out.shape[2:], self.stride, self.padding, self.dilation, self.kernel_size, strict=True
            )
        ]
        sizes = self.padding, rest, self.stride, self.dilation, self.groups
        if self._backward is None:
            pack = torch.ops.mkldnn._reorder_convolution_transpose_weight
            self._backward = pack(self.weight, *sizes, grad_out.shape)
        transposed = torch.ops.mkldnn._convolution_transpose_pointwise
        return transposed(_dense(grad_out), self._backward, None, *sizes, "none", [], "")


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor | None, conv: PackedConv2d, relu: bool) -> Tensor:
        out = conv.convolve(x, other, relu)
        ctx.conv, ctx.size, ctx.relu = conv, x.shape, relu
        if relu:
            ctx.save_for_backward(out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.relu:
            grad_out = torch.ops.aten.threshold_backward(grad_out, *ctx.saved_tensors, 0)
        grad_x = ctx.conv.input_gradient(grad_out, ctx.size) if ctx.needs_input_grad[0] else None
        return grad_x, grad_out if ctx.needs_input_grad[1] else None, None, None


def _dense(value: Tensor) -> Tensor:
    """`value`, copied if elements are shared or skipped, as in what pooling gives back: oneDNN goes by strides."""
    if value.is_contiguous() or value.is_contiguous(memory_format=torch.channels_last):
        return value
    return value.contiguous(memory_format=torch.channels_last)
