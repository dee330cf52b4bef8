"""winograd: 3x3 convolutions with a quarter of the products, which PackedConv2d calls on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from part_fast import backends

# Polynomials are multiplied at these points and at infinity. With the usual 1 and 2 in place of 3/4 and 3/2 float32
# loses three times as much.
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
# Columns of the transformed weights that lie together.
PANEL = 64
# The C++ goes through channels by vectors, and reads all weights for however few tiles.
CHANNELS = 16
FEWEST_TILES = {torch.float32: 8, torch.bfloat16: 16}


def takes(conv: nn.Conv2d) -> bool:
    """Whether a convolution is one of those: 3x3, stride, padding and dilation 1, channels in sixteens, no groups."""
    ones = conv.stride, conv.padding, conv.dilation
    return (
        conv.kernel_size == (3, 3)
        and all(pair == (1, 1) for pair in ones)
        and conv.groups == 1
        and conv.in_channels % CHANNELS == conv.out_channels % CHANNELS == 0
    )


def pays(x: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the C++ is there and takes less time in float32 than oneDNN in `dtype`, for inputs (N,C,H,W)."""
    tiles = len(x) * ((x.shape[2] + 3) // 4) * ((x.shape[3] + 3) // 4)
    return x.device.type == "cpu" and tiles >= FEWEST_TILES[dtype] and backends.current_backend("cpu") == "cpp"


def transform_(u: Tensor | None, weight: Tensor, transposed: bool) -> Tensor:
    """Weights (O,I,3,3) as `convolve` takes them, (36, I*O), written into `u` if there is one.

    transposed: those of the convolution that turns gradients of the output into gradients of the input.
    """
    u = weight.new_empty(36, weight.shape[0] * weight.shape[1]) if u is None else u
    _winograd_weight_(u, weight, transposed)
    return u


def convolve(
    x: Tensor,
    u: Tensor,
    channels: int,
    bias: Tensor | None = None,
    other: Tensor | None = None,
    *,
    relu: bool = False,
    x_positive: Tensor | None = None,
    other_positive: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`relu(F.conv2d(x, weight, bias, padding=1) + other)`, (N,channels,H,W) channels_last, for `transform_(weight)`.

    x, other: float32 (N,C,H,W). x_positive, other_positive: their values count as 0 where these are 0 or less, as in
    the backward of a ReLU that gave these. out: channels_last, where the result goes.

    Source: Winograd's minimal filtering as in Lavin and Gray, CVPR 2016, F(4x4, 3x3): a tile of 4x4 outputs takes
    6x6 products of transformed inputs and weights in place of 16x9, and each of the 36 is a product of matrices over
    tiles and channels.
    Rounding: the error of an output is relative to the largest input of its 6x6 tile; that of a direct sum is relative
    to the nine that the output sees. With inputs of one size it is two to three times as large; next to an input of the
    tile that is 100 times as large and not seen, 40 times, and so on. With I channels it stays below
    2**-24 (I + 30) 205 max|x| sum|w|, of the tile's inputs and the output's weights, which counts all roundings as of
    one sign; seen are less than 2**-21 max|x| sum|w|.
    """
    x_positive, other, other_positive = (
        value if value is None else value.contiguous(memory_format=torch.channels_last)
        for value in (x_positive, other, other_positive)
    )
    x = x.contiguous(memory_format=torch.channels_last)
    out = empty(x, channels) if out is None else out
    _winograd_(out, x, x_positive, u, bias, other, other_positive, relu)
    return out


def empty(x: Tensor, channels: int) -> Tensor:
    """Room for what `convolve` makes of x."""
    shape = len(x), channels, *x.shape[2:]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _matrices(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B (6,6), G (6,3), A (4,6)): outputs are A [(G g) * (B d)] of six inputs d and three weights g."""
    points = torch.tensor(POINTS, dtype=torch.float64)
    inputs, weights = like.new_zeros(6, 6, dtype=torch.float64), like.new_zeros(6, 3, dtype=torch.float64)
    outputs = like.new_zeros(4, 6, dtype=torch.float64)
    for i, point in enumerate(points):
        others = torch.cat([points[:i], points[i + 1 :]])
        inputs[i, :5] = _with_roots(others)
        weights[i] = point ** torch.arange(3) / (point - others).prod()
        outputs[:, i] = point ** torch.arange(4)
    inputs[5], weights[5, 2], outputs[3, 5] = _with_roots(points), 1.0, 1.0  # infinity
    return inputs.to(like), weights.to(like), outputs.to(like)


def _with_roots(roots: Tensor) -> Tensor:
    """Coefficients, the constant first, of the polynomial with these roots."""
    product = roots.new_ones(1)
    for root in roots:
        product = F.pad(product, (1, 0)) - root * F.pad(product, (0, 1))
    return product


def _reference_weight_(u: Tensor, weight: Tensor, transposed: bool) -> None:
    weight = weight.flip(2, 3).transpose(0, 1) if transposed else weight
    _, g, _ = _matrices(weight)
    full = torch.einsum("ay,bx,oiyx->abio", g, g, weight).flatten(0, 1)
    u.copy_(torch.cat([panel.flatten(1) for panel in full.split(PANEL, 2)], 1))


def _reference_(
    y: Tensor,
    x: Tensor,
    x_positive: Tensor | None,
    u: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    other_positive: Tensor | None,
    relu: bool,
) -> None:
    channels = y.shape[1]
    x = x if x_positive is None else x.masked_fill(x_positive <= 0, 0)
    c, h, w = x.shape[1:]
    b, _, a = _matrices(x)
    x = F.pad(x, (1, 1 + -w % 4, 1, 1 + -h % 4))
    d = torch.einsum("ay,bx,ncijyx->abnijc", b, b, x.unfold(2, 6, 4).unfold(3, 6, 4))
    widths = [min(PANEL, channels - start) for start in range(0, channels, PANEL)]
    panels = u.split([c * width for width in widths], 1)
    full = torch.cat([panel.view(36, c, width) for panel, width in zip(panels, widths, strict=True)], 2)
    products = torch.bmm(d.reshape(36, -1, c), full).view(*d.shape[:-1], channels)
    out = torch.einsum("ya,xb,abnijk->nkiyjx", a, a, products).flatten(4, 5).flatten(2, 3)[:, :, :h, :w]
    out = out if bias is None else out + bias[:, None, None]
    if other is not None:
        out = out + (other if other_positive is None else other.masked_fill(other_positive <= 0, 0))
    y.copy_(out.relu() if relu else out)


_winograd_weight_ = backends.define(
    "_winograd_weight_(Tensor(a!) u, Tensor weight, bool transposed) -> ()",
    _reference_weight_,
    lambda u, weight, transposed: None,
)
_winograd_ = backends.define(
    "_winograd_(Tensor(a!) y, Tensor x, Tensor? x_positive, Tensor u, Tensor? bias, Tensor? other, "
    "Tensor? other_positive, bool relu) -> ()",
    _reference_,
    lambda *_: None,
)
