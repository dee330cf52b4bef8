"""What kernels over images share: tiles of rows, the eps of a pixel in each of its forms, split gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from part_fast.kernels import block_size, narrow, widen

# Where a pixel's eps comes from. The images are `rows` times `span` positions, and a position stands for
# `repeat` elements that share the eps (the channels of a pixel), so that each eps is read once.
SCALAR = tl.constexpr(0)  # eps_high

LIKE = tl.constexpr(1)  # a tensor laid out in memory as the images

IMAGE = tl.constexpr(2)  # one per image; a row is an image

PIXEL = tl.constexpr(3)  # (N,1,H,W) for NCHW images; a row is an image, a position a pixel with its channels

STRIDED = tl.constexpr(4)  # any other strides; a row is an image

BITS = tl.constexpr(5)  # packed, NCHW: a row is an image with its channels (M = 1) or one channel (M = C)

BITS_LAST = tl.constexpr(6)  # packed, channels_last; a row is an image

WARPS = 4


@dataclasses.dataclass(frozen=True)
class Walk:
    """How the programs of one launch cover the images: the common arguments and constexprs."""

    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]


def walk(
    images: Tensor, eps: Tensor | None, eps_high: float, eps_low: float, narrowest: int, by_image: bool = False
) -> Walk:
    """The walk over `images` (N,C,H,W) with `eps` as raw ops take it; `narrowest`: bytes of the shortest element.

    by_image: no row goes over two images, for `row_tile_of`.
    """
    n, channels, height, width = images.shape
    pixels, numel = height * width, images.numel()
    last = not images.is_contiguous()
    rows, span, repeat = n, channels * pixels, 1
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if eps is None:
        source, rows, span = SCALAR, 1, numel
    elif eps.dtype == torch.uint8:
        planes = eps.shape[1]
        strides = (planes * eps.shape[2], eps.shape[2] if planes > 1 else 0, 0, 0)
        source = BITS_LAST if last else BITS
        if not last and planes == 1:
            span, repeat = pixels, channels
        elif not last:
            rows, span, strides = n * channels, pixels, (eps.shape[2], 0, 0, 0)
    else:
        stored, own = _strides(eps), _strides(images)
        strides = stored
        if stored == own:
            source, rows, span = LIKE, 1, numel
        elif stored[1:] == (0, 0, 0):
            source = IMAGE
        elif not last and stored[1:] == (0, *own[2:]):
            source, span, repeat = PIXEL, pixels, channels
        else:
            source = STRIDED
    if by_image and source in (SCALAR, LIKE):
        rows, span = n, channels * pixels
    # Sixteen bytes of the shortest element a thread; at least a whole byte of bits for a program.
    block = max(8, block_size(32 * WARPS * 16 // narrowest, span))
    tiles = triton.cdiv(span, block)
    return Walk(
        programs=rows * tiles,
        arguments={
            "eps": eps, "eps_high": eps_high, "eps_low": eps_low,
            "span": span, "tiles": tiles, "pixels": pixels, "width": width,
            "stride_n": strides[0], "stride_c": strides[1], "stride_h": strides[2], "stride_w": strides[3],
        },
        constants={
            "SOURCE": source.value, "CHANNELS": channels, "REPEAT": repeat, "CHANNELS_LAST": last,
            # Of the end of the last block, which may lie beyond the images.
            "INDEX": tl.int64 if numel > 2**31 - 1 - block else tl.int32, "BLOCK": block,
            "DTYPE": tl.float64 if images.dtype == torch.float64 else tl.float32,
        },
    )  # fmt: skip


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides, 0 along dimensions of size 1."""
    return tuple(stride if size > 1 else 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


@triton.jit
def tile_of(tiles, SOURCE: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """(row, first position in the row) of this program's tile."""
    program = tl.program_id(0)
    if (SOURCE == SCALAR) | (SOURCE == LIKE):
        # One row: known to be 0, so that every tile is known to start at a multiple of 16 elements.
        row, tile = program * 0, program
    else:
        row, tile = program // tiles, program % tiles
    return row.to(INDEX), tile.to(INDEX) * BLOCK


@triton.jit
def row_tile_of(tiles, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """The same of a walk by images."""
    program = tl.program_id(0)
    return (program // tiles).to(INDEX), (program % tiles).to(INDEX) * BLOCK


@triton.jit
def bound_of(
    budget, row, start, span, inside,
    SOURCE: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """eps of a tile's positions in DTYPE: a block, or a scalar where all have the same. `inside`: mask or None."""
    eps, eps_high, eps_low, pixels, width, stride_n, stride_c, stride_h, stride_w = budget
    if SOURCE == SCALAR:
        bound = tl.full((1,), eps_high, DTYPE)
    elif SOURCE == IMAGE:
        bound = widen(tl.load(eps + row.to(tl.int64) * stride_n + tl.arange(0, 1))).to(DTYPE)
    else:
        eps += row.to(tl.int64) * stride_n
        position = start + tl.arange(0, BLOCK)
        if CHANNELS_LAST:
            pixel, channel = position // CHANNELS, position % CHANNELS
        else:
            pixel, channel = position % pixels, position // pixels
        if (SOURCE == LIKE) | (SOURCE == PIXEL):
            bound = widen(tl.load(eps + position, mask=inside)).to(DTYPE)
        elif SOURCE == STRIDED:
            place = channel.to(tl.int64) * stride_c + (pixel // width).to(tl.int64) * stride_h
            place += (pixel % width).to(tl.int64) * stride_w
            bound = widen(tl.load(eps + place, mask=inside)).to(DTYPE)
        else:
            if SOURCE == BITS:
                # Eight neighbours share a byte, which their thread loads once.
                byte = start // 8 + tl.arange(0, BLOCK // 8)
                group = tl.load(eps + byte, mask=byte * 8 < span, other=0).to(tl.int32)
                bit = tl.reshape((group[:, None] >> tl.arange(0, 8)[None, :]) & 1, (BLOCK,))
            else:
                group = tl.load(eps + channel * stride_c + pixel // 8, mask=inside).to(tl.int32)
                bit = (group >> (pixel % 8).to(tl.int32)) & 1
            # The two values are float32 whatever is computed in, as in the dense map.
            high, low = tl.full((1,), eps_high, tl.float32), tl.full((1,), eps_low, tl.float32)
            bound = tl.where(bit != 0, high, low).to(DTYPE)
    return bound


@triton.jit
def split_gradient(grad_out, above, below, grad_x_adv, grad_x, grad_eps, place, inside):
    """Write what of grad_out (as stored) goes to x_adv, to x and, where `grad_eps` is not None, to eps."""
    zero = tl.zeros_like(grad_out)
    outside = above | below
    tl.store(grad_x_adv + place, tl.where(outside, zero, grad_out).to(grad_x_adv.dtype.element_ty), mask=inside)
    tl.store(grad_x + place, tl.where(outside, grad_out, zero).to(grad_x.dtype.element_ty), mask=inside)
    if grad_eps is not None:
        own = tl.where(above, grad_out, tl.where(below, -grad_out, zero))
        tl.store(grad_eps + place, narrow(own, grad_eps.dtype.element_ty), mask=inside)


Gradients = tuple[Tensor, Tensor, Tensor]


def gradients_like(grad_out: Tensor, eps: Tensor | None) -> Gradients:
    """Room for (grad_x_adv, grad_x, grad_eps); the last is empty where eps has no derivative."""
    dense = eps is not None and eps.dtype != torch.uint8
    grad_eps = torch.empty_like(grad_out, dtype=eps.dtype) if dense else grad_out.new_empty(0)  # type: ignore[union-attr]
    return torch.empty_like(grad_out), torch.empty_like(grad_out), grad_eps
