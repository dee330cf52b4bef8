"""cam in Triton: one pass over activations and gradients, a program per sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from part_fast.kernels import INTERPRETED, Launch, divide, widen

GRADCAM, XGRADCAM, LAYERCAM = (tl.constexpr(method) for method in range(3))  # hirescam is the last

# Elements of one tensor that a program holds at a time: 4 a thread; with 8, xgradcam's registers leave half of a
# multiprocessor's warps without room.
TILE = 2048
WARPS = 16


@triton.jit
def cam_kernel(
    activation, gradient, out, channels, pixels, tiles, stride_n, stride_k, stride_p,
    METHOD: tl.constexpr, WHOLE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """CHANNELS by PIXELS is the tile; WHOLE: it spans all pixels of the sample, so each input is read once."""
    sample = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * PIXELS
    activation += sample.to(tl.int64) * stride_n
    gradient += sample.to(tl.int64) * stride_n
    pixel = first + tl.arange(0, PIXELS)
    total = tl.zeros((CHANNELS, PIXELS), DTYPE)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        place = channel[:, None] * stride_k + pixel[None, :] * stride_p
        inside = (channel < channels)[:, None] & (pixel < pixels)[None, :]
        a = widen(tl.load(activation + place, mask=inside, other=0))
        g = widen(tl.load(gradient + place, mask=inside, other=0))
        if (METHOD == GRADCAM) | (METHOD == XGRADCAM):
            if WHOLE:
                weight = channel_weights(a, g, inside, pixels, METHOD)
            else:
                weight = channel_weights_far(
                    activation, gradient, channel, channels, pixels, stride_k, stride_p, METHOD, CHANNELS, PIXELS, DTYPE
                )
            # Channels past the last would be 0 / 0 in xgradcam.
            weighted = tl.where((channel < channels)[:, None], weight[:, None] * a, tl.zeros_like(a))
        elif METHOD == LAYERCAM:
            weighted = tl.where(g <= 0, tl.zeros_like(g), g) * a
        else:
            weighted = g * a
        total += weighted
    result = tl.sum(total, 0)
    result = tl.where(result <= 0, tl.zeros_like(result), result)
    tl.store(out + sample.to(tl.int64) * pixels + pixel, result, mask=pixel < pixels)


@triton.jit
def channel_weights(a, g, inside, pixels, METHOD: tl.constexpr):
    """Weights of the tile's channels from all their pixels."""
    if METHOD == GRADCAM:
        # Not `pixels.to`: Triton makes a constant of an argument of 1, here of a map of one pixel, which has none.
        weight = divide(tl.sum(g, 1), tl.full((1,), pixels, a.dtype))
    else:
        shifted = a + tl.full((1, 1), 1e-8, a.dtype)
        weight = divide(tl.sum(g * a, 1), tl.sum(tl.where(inside, shifted, tl.zeros_like(a)), 1))
    return weight


@triton.jit
def channel_weights_far(
    activation, gradient, channel, channels, pixels, stride_k, stride_p,
    METHOD: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The same for maps larger than a tile: every program of the sample reads all of its channels."""
    above = tl.zeros((CHANNELS,), DTYPE)
    below = tl.zeros((CHANNELS,), DTYPE)
    for start in range(0, pixels, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        place = channel[:, None] * stride_k + pixel[None, :] * stride_p
        inside = (channel < channels)[:, None] & (pixel < pixels)[None, :]
        g = widen(tl.load(gradient + place, mask=inside, other=0))
        if METHOD == GRADCAM:
            above += tl.sum(g, 1)
        else:
            a = widen(tl.load(activation + place, mask=inside, other=0))
            above += tl.sum(g * a, 1)
            below += tl.sum(tl.where(inside, a + tl.full((1, 1), 1e-8, DTYPE), tl.zeros_like(a)), 1)
    if METHOD == GRADCAM:
        below += tl.full((1,), pixels, DTYPE)
    return divide(above, below)


def cam_launch(activation: Tensor, gradient: Tensor, method: int, out: Tensor) -> Launch:
    n, channels, height, width = activation.shape
    pixels = height * width
    contiguous = activation.is_contiguous()
    # The interpreter pays by the operation, not by the element.
    tile = 1 << 18 if INTERPRETED else TILE
    wide = min(triton.next_power_of_2(pixels), tile)
    tall = min(triton.next_power_of_2(channels), max(1, tile // wide))
    tiles = triton.cdiv(pixels, wide)
    return Launch(
        cam_kernel, n * tiles,
        {
            "activation": activation, "gradient": gradient, "out": out,
            "channels": channels, "pixels": pixels, "tiles": tiles, "stride_n": channels * pixels,
            "stride_k": pixels if contiguous else 1, "stride_p": 1 if contiguous else channels,
        },
        {
            "METHOD": method, "WHOLE": tiles == 1, "CHANNELS": tall, "PIXELS": wide,
            "DTYPE": tl.float64 if activation.dtype == torch.float64 else tl.float32,
        },
        WARPS, fuse=True,
    )  # fmt: skip


def cam(activation: Tensor, gradient: Tensor, method: int) -> Tensor:
    dtype = torch.float64 if activation.dtype == torch.float64 else torch.float32
    out = activation.new_empty((activation.shape[0], *activation.shape[2:]), dtype=dtype)
    cam_launch(activation, gradient, method, out).run()
    return out
