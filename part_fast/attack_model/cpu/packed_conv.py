"""PackedConv2d: a frozen convolution on the CPU that keeps its weights as Winograd or oneDNN multiplies them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from part_fast import checks
from part_fast.attack_model.cpu import onednn, winograd
from part_fast.errors import CannotRunError

# Of one tensor of the images that a residual block works on at once: 2 MB, of which each of two threads reads half.
CACHED_VALUES = 1 << 19


class PackedConv2d(nn.Conv2d):
    """`nn.Conv2d` whose weights stay what they are until `repack` is called: the same result in less time.

    What a convolution on the CPU does to its weights first, in every forward and in every backward, is done once for
    each here, in the first forward and backward after `repack`. 3x3 convolutions of stride 1 on enough pixels are
    multiplied by `winograd` in float32, with a quarter of the products, and errors relative to the largest input of
    a 6x6 tile: two to three times torch's where inputs are of one size, see `winograd.convolve`; all others by oneDNN
    in `dtype`, bit for bit what torch does. Gradients are for the input alone.

    Equivalent to: `nn.Conv2d` with `requires_grad_(False)` weights.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype = torch.float32) -> None:
        """conv: `takes(conv)`; its parameters are shared. dtype: float32 is computed in where oneDNN has no `dtype`."""
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
        self.by_winograd = winograd.takes(self) and self.weight.dtype == torch.float32
        self.dtype = self.weight.dtype
        # Images are not cast: their convolution has few operations, and the cast costs more than it gains.
        if onednn.works(dtype) and self.dtype == torch.float32 and self.in_channels >= winograd.CHANNELS:
            self.dtype = dtype
        self.packs = True
        self._transformed: dict[bool, Tensor] = {}  # memory that is kept; by whether it is for the backward
        self.version = 0  # of the weights
        self.repack()

    @staticmethod
    def takes(conv: nn.Module) -> bool:
        """Whether `conv` can be packed: of nn.Conv2d itself, padded with zeros, on a CPU on which oneDNN multiplies in
        its dtype."""
        if type(conv) is not nn.Conv2d or conv.weight.device.type != "cpu":
            return False
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return False
        return onednn.works(conv.weight.dtype)

    def repack(self) -> None:
        """To be called after the weights have changed. A backward through the old ones raises then."""
        self.version += 1
        self._forward: tuple[Tensor, Tensor | None] | None = None
        self._backward: Tensor | None = None
        self._fresh: set[bool] = set()  # which of `_transformed` are of the present weights

    def unpack(self) -> None:
        """From now on convolve as nn.Conv2d does, whose output is contiguous where input and weights are."""
        self.packs = self.by_winograd = False
        self._transformed = {}
        self.repack()

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights cannot be copied or pickled.
        return {**self.__dict__, "_forward": None, "_backward": None, "_fresh": set(), "_transformed": {}}

    def forward(self, x: Tensor) -> Tensor:
        """Like nn.Conv2d's; x of float32 or bfloat16 is brought to the dtype that is computed in."""
        return self.with_relu(x, None, relu=False)

    def with_relu(self, x: Tensor, other: Tensor | None = None, *, relu: bool = True) -> Tensor:
        """`relu(self(x) + other)` in one pass, which rounds once; without `other` or without ReLU, the rest of it."""
        x = x.to(self.computes_in(x))
        unpacked = not self.packs or torch.compiler.is_compiling() or checks.transformed()
        if x.dtype not in (torch.float32, self.dtype):  # torch's own error, unless autocast is on
            return self._plain(x, self.weight, self.bias, other, relu)
        if unpacked or x.device.type != "cpu" or x.numel() == 0:
            bias = self.bias if self.bias is None else self.bias.to(x.dtype)
            return self._plain(x, self.weight.to(x.dtype), bias, other, relu)
        return _Convolve.apply(x, other if other is None else other.to(x.dtype), self, relu)

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, relu: bool) -> Tensor:
        out = self._conv_forward(x, weight, bias)
        out = out if other is None else out + other
        return F.relu(out) if relu else out

    def computes_in(self, x: Tensor) -> torch.dtype:
        """The dtype that x is brought to: float32 and bfloat16 to each other, others stay what they are."""
        if x.dtype not in (torch.float32, torch.bfloat16):
            return x.dtype
        return torch.float32 if self.winograd_takes(x) else self.dtype

    def convolve(self, x: Tensor, other: Tensor | None, relu: bool) -> Tensor:
        """`with_relu` without autograd."""
        if self.winograd_takes(x):
            return winograd.convolve(x, self.transformed(), self.out_channels, self.bias, other, relu=relu)
        sizes = self.padding, self.stride, self.dilation, self.groups
        if self._forward is None:
            weight = onednn.pack(self.weight.to(self.dtype), sizes, x.shape)
            self._forward = weight, self.bias if self.bias is None else self.bias.to(self.dtype)
        return onednn.convolve(_dense(x), *self._forward, sizes, other if other is None else _dense(other), relu)

    def input_gradient(self, grad_out: Tensor, size: torch.Size, positive: Tensor | None = None) -> Tensor:
        """The gradient for an input of that size: a transposed convolution with the same weights.

        positive: the output of a ReLU that came after, through which grad_out has not gone yet.
        """
        if grad_out.dtype == torch.float32 and self.winograd_takes(grad_out):
            return winograd.convolve(grad_out, self.transformed(True), self.in_channels, x_positive=positive)
        if positive is not None:
            grad_out = torch.ops.aten.threshold_backward(grad_out, positive, 0)
        # What a stride leaves over at the end of each dimension of the input.
        rest = [
            length - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
            for length, out, stride, padding, dilation, kernel in zip(
                size[2:], grad_out.shape[2:], self.stride, self.padding, self.dilation, self.kernel_size, strict=True
            )
        ]
        sizes = self.padding, self.stride, self.dilation, self.groups
        if self._backward is None:
            self._backward = onednn.pack_transposed(self.weight.to(self.dtype), sizes, rest, grad_out.shape)
        return onednn.convolve_transposed(_dense(grad_out), self._backward, sizes, rest)

    def winograd_takes(self, values: Tensor) -> bool:
        """Whether inputs, or gradients of outputs, are for `winograd` to multiply."""
        return self.by_winograd and winograd.pays(values, self.dtype)

    def transformed(self, backward: bool = False) -> Tensor:
        """The weights as `winograd.convolve` takes them, for the forward or for the input gradient."""
        if backward not in self._fresh:
            self._transformed[backward] = winograd.transform_(self._transformed.get(backward), self.weight, backward)
            self._fresh.add(backward)
        return self._transformed[backward]


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor | None, conv: PackedConv2d, relu: bool) -> Tensor:
        out = conv.convolve(x, other, relu)
        ctx.conv, ctx.size, ctx.relu = conv, x.shape, relu
        ctx.version = conv.version
        if relu:
            ctx.save_for_backward(out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        _check_version(ctx.conv, ctx.version)
        to_x, to_other, *_ = ctx.needs_input_grad
        positive = ctx.saved_tensors[0] if ctx.relu else None
        if to_other and positive is not None:
            grad_out, positive = torch.ops.aten.threshold_backward(grad_out, positive, 0), None
        grad_x = ctx.conv.input_gradient(grad_out, ctx.size, positive) if to_x else None
        return grad_x, grad_out if to_other else None, None, None


def _check_version(conv: PackedConv2d, version: int) -> None:
    if conv.version != version:
        raise CannotRunError(
            "the weights of a PackedConv2d have changed between its forward and its backward: "
            "take gradients before the model's next update, or run the forward again"
        )


def residual(first: PackedConv2d, second: PackedConv2d, x: Tensor) -> Tensor:
    """`relu(second(relu(first(x))) + x)`; where Winograd serves both, forward and backward are two passes each."""
    plain = torch.compiler.is_compiling() or checks.transformed()
    if first.winograd_takes(x) and second.winograd_takes(x) and not plain:
        return _Residual.apply(x.float(), first, second)
    return second.with_relu(first.with_relu(x), x)


class _Residual(torch.autograd.Function):
    """A few images at a time: what the one convolution writes is still in the cache when the other reads it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: PackedConv2d, second: PackedConv2d) -> Tensor:
        middle, out = winograd.empty(x, first.out_channels), winograd.empty(x, second.out_channels)
        for x_, middle_, out_ in _cached(x, middle, out):
            winograd.convolve(x_, first.transformed(), first.out_channels, first.bias, relu=True, out=middle_)
            winograd.convolve(middle_, second.transformed(), second.out_channels, second.bias, x_, relu=True, out=out_)
        ctx.first, ctx.second = first, second
        ctx.versions = first.version, second.version
        ctx.save_for_backward(middle, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        first, second = ctx.first, ctx.second
        _check_version(first, ctx.versions[0])
        _check_version(second, ctx.versions[1])
        grad_x = winograd.empty(grad_out, first.in_channels)
        for grad_, middle_, out_, to in _cached(grad_out, *ctx.saved_tensors, grad_x):
            within = winograd.convolve(grad_, second.transformed(True), second.in_channels, x_positive=out_)
            winograd.convolve(
                within, first.transformed(True), first.in_channels, None, grad_,
                x_positive=middle_, other_positive=out_, out=to,
            )  # fmt: skip
        return grad_x, None, None


def _cached(*batches: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same images of all these, so few that a core's share of one of them fits its second cache."""
    few = max(1, CACHED_VALUES // batches[0][:1].numel())
    return zip(*(batch.split(few) for batch in batches), strict=True)


def _dense(value: Tensor) -> Tensor:
    """`value`, copied if elements are shared or skipped, as in what pooling gives back: oneDNN goes by strides."""
    if value.is_contiguous() or value.is_contiguous(memory_format=torch.channels_last):
        return value
    return value.contiguous(memory_format=torch.channels_last)
