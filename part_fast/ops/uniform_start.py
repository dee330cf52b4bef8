"""uniform_start: an attack's start, uniform noise within each pixel's own eps, made in the kernel from a seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from part_fast import backends, checks
from part_fast.checks import Clip
from part_fast.ops.packed_epsilon import PackedEpsilon, dense_eps, eps_arguments

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox(counters: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four random words from four counter words and two key words, each 32 bits in an int64."""
    a, b, c, d = counters
    for turn in range(10):
        k0, k1 = ((word + turn * step) & _WORD for word, step in zip(key, _KEY_STEPS, strict=True))
        # A product of 64 bits may wrap to a negative one; its bits are right, and so are both halves.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> 32 & _WORD) ^ b ^ k0,
            second & _WORD,
            (first >> 32 & _WORD) ^ d ^ k1,
            first & _WORD,
        )
    return a, b, c, d


def uniform(like: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """u in [0,1) for each element of a dense tensor, in the order of its memory: 24 bits, exact in float32."""
    blocks = torch.arange(-(-like.numel() // 4), device=like.device)
    zero = torch.zeros_like(blocks)
    words = philox((blocks & _WORD, blocks >> 32, zero, zero), (seed & _WORD, seed >> 32))
    flat = torch.stack(words, 1).flatten()[: like.numel()] >> 8
    return (flat.to(dtype) * 2.0**-24).as_strided(like.shape, like.stride())


def _reference(
    x: Tensor, eps: Tensor | None, eps_high: float, eps_low: float, scale: float, seed: int,
    clip_low: float, clip_high: float,
) -> Tensor:  # fmt: skip
    dtype = checks.compute_dtype(x)
    bound = torch.as_tensor(dense_eps(eps, eps_high, eps_low, x), dtype=dtype, device=x.device)
    noise = (2 * uniform(x, seed, dtype) - 1) * (bound * scale)
    return checks.rounded(torch.clamp(x.to(dtype) + noise, clip_low, clip_high), x.dtype)


_uniform_start = backends.define(
    "_uniform_start(Tensor x, Tensor? eps, float eps_high, float eps_low, float scale, SymInt seed, "
    "float clip_low, float clip_high) -> Tensor",
    _reference,
    lambda x, *args: torch.empty_like(x),
    kernels="uniform_start",
    by_place=True,
)


def uniform_start(
    x: Tensor,
    eps: float | Tensor | PackedEpsilon,
    scale: float = 1.0,
    clip: Clip = (0.0, 1.0),
    *,
    seed: int,
) -> Tensor:
    """Images moved by uniform noise in [-scale * eps, scale * eps), each pixel by its own eps, and clipped.

    x: images (N,C,H,W). What is neither contiguous nor channels_last is copied.
    eps: image units (8/255); a float, a tensor that broadcasts to the images, or a PackedEpsilon.
    scale: what eps is multiplied by, >= 0: 2 for N-FGSM.
    clip: (low, high), or None for no clip; each a number or one per channel, as in `pgd_step`.
    seed: from 0 to 2**63 - 1. The same seed, shape and memory format give the same noise on every backend; take a new
        one for each batch, such as `int(torch.randint(2**63 - 1, ()))`, which torch.manual_seed reproduces. So
        torch.vmap gives every sample the same noise, that of its own call in contiguous memory.
    Returns a new tensor like x. NaN in x or eps stays NaN. No derivative: the result does not require grad.

    The noise is never in memory: element i of x, as it lies in memory, takes word i % 4 of block i // 4 of
    Philox4x32-10 keyed by the seed, and u is the word's upper 24 bits as a fraction.
    Equivalent to: `torch.clamp(x + (2 * torch.rand_like(x) - 1) * (scale * eps), *clip)` with u for rand_like, computed
    in float32 and rounded once: every backend returns the same bits.
    Source: Wong et al., "Fast is better than free: Revisiting adversarial training", ICLR 2020, algorithm 3; the
    generator is that of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    Errors: TypeError or ValueError that names the argument, before anything is computed.
    """
    x = checks.images("x", x).detach()
    bound, eps_high, eps_low = eps_arguments(eps, x)
    bound = None if bound is None else bound.detach()
    scale, seed = checks.number("scale", scale, 0), checks.seed("seed", seed)
    low, high = checks.clip_range(clip, x)
    if isinstance(low, Tensor):
        # As in pgd_step: rounding keeps order.
        free = _uniform_start(x, bound, eps_high, eps_low, scale, seed, -math.inf, math.inf)
        return torch.clamp(free, low, high)
    return _uniform_start(x, bound, eps_high, eps_low, scale, seed, low, high)
