"""upsample_cam: against golden vectors, PIL, a float64 oracle and properties; gradients; errors."""

import math

import numpy as np
import pytest
import torch
from conftest import (
    BAD_MAPS,
    BAD_SIZES,
    DTYPES,
    assert_error,
    assert_same,
    compute_dtype,
    dtypes,
    keys_matrix,
    map_sizes,
    on_device,
    upsampled,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from part_fast import upsample_cam

SIZES = ("4x4_to_28x28", "4x4_to_32x32", "5x7_to_30x44", "8x8_to_32x32", "8x8_to_64x64")
# Sixteen products near 1 whose weights are float32 too; measured: at most 4e-7 against float64.
FLOAT32 = 2e-6


def maps(shape, dtype, device):
    """CAMs as they come: non-negative, partly exactly 0."""
    return torch.randn(shape, device=device).relu().to(dtype)


@pytest.mark.parametrize("key", SIZES)
def test_golden(golden, backend, key):
    g = golden("mask")
    some = [0, -1] if backend.interpreted else slice(None)
    cam = g[f"{key}.cam"][some].to(backend.device)
    size = tuple(int(n) for n in key.split("_to_")[1].split("x"))
    result = upsample_cam(cam, size)
    # The published pipeline takes float32 weights from PIL, which computes them in float64.
    torch.testing.assert_close(result.cpu(), g[f"{key}.upsampled"][some], rtol=0, atol=FLOAT32)
    # At the map's own size nothing is left but the min-max; one division that torch and the golden round alike.
    torch.testing.assert_close(
        upsample_cam(cam, cam.shape[1:]).cpu(), g[f"{key}.normalized"][some], rtol=0, atol=2**-23
    )


def test_pil(backend):
    for (n, h, w), size in map_sizes(backend):
        cam = maps((n, h, w), torch.float32, backend.device)
        result = upsample_cam(cam, size).cpu()
        for one, got in zip(cam.cpu().numpy(), result, strict=True):
            spread = np.ptp(one)
            scaled = (one - one.min()) / spread if spread > 0 else np.zeros_like(one)
            wanted = Image.fromarray(scaled, "F").resize((size[1], size[0]), Image.Resampling.BICUBIC)
            torch.testing.assert_close(got, torch.from_numpy(np.array(wanted)), rtol=0, atol=FLOAT32)


@dtypes
def test_float64_oracle(backend, dtype):
    tolerance = 1e-13 if dtype == torch.float64 else FLOAT32
    for shape, size in map_sizes(backend, dtype):
        cam = maps(shape, dtype, backend.device)
        result = upsample_cam(cam, size)
        assert result.dtype == dtype
        assert result.shape == (shape[0], *size)
        assert result.is_contiguous()
        # In the compute dtype first; what is stored is that, rounded once.
        wide = upsample_cam(cam.to(compute_dtype(dtype)), size)
        np.testing.assert_allclose(wide.cpu().numpy(), upsampled(cam, size), rtol=0, atol=tolerance)
        assert_same(result, wide.to(dtype), (shape, size))


@pytest.mark.thin(3)
@dtypes
def test_layouts_give_the_same_bits(backend, dtype):
    cam = maps((3, 4, 5), dtype, backend.device)
    expected = upsample_cam(cam, (9, 11))
    memory = torch.full((3 * 4 * 5 + 1,), float("nan"), dtype=dtype, device=backend.device)
    offset = memory[1:].view(3, 4, 5).copy_(cam)
    transposed = cam.transpose(0, 2).contiguous().transpose(0, 2)
    wide = torch.full((3, 8, 10), float("nan"), dtype=dtype, device=backend.device)
    strided = wide[:, ::2, ::2].copy_(cam)
    for other in (offset, transposed, strided):
        assert_same(upsample_cam(other, (9, 11)), expected)


def test_many_threads(backend):
    shape, size = ((5, 3, 3), (8, 8)) if backend.interpreted else ((67, 8, 8), (40, 41))
    cam = maps(shape, torch.float32, backend.device)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        np.testing.assert_allclose(upsample_cam(cam, size).cpu().numpy(), upsampled(cam, size), rtol=0, atol=FLOAT32)
    finally:
        torch.set_num_threads(before)


def test_size_forms(backend):
    cam = maps((2, 3, 3), torch.float32, backend.device)
    expected = upsample_cam(cam, (7, 7))
    for size in (7, [7, 7], torch.Size((7, 7)), (np.int64(7), np.int64(7))):
        assert_same(upsample_cam(cam, size), expected)


@pytest.mark.thin(3)
@dtypes
def test_flat_maps_give_zeros(backend, dtype):
    cam = (
        torch.tensor([0.0, 0.3, -2.0, 1e-4], dtype=dtype, device=backend.device)[:, None, None]
        .expand(4, 3, 4)
        .contiguous()
    )
    cam.requires_grad_()
    result = upsample_cam(cam, (8, 9))
    assert_same(result.detach(), torch.zeros(4, 8, 9, dtype=dtype, device=backend.device))
    (gradient,) = torch.autograd.grad(result.sum(), cam)
    assert_same(gradient, torch.zeros_like(cam))


def test_overshoot_is_kept(backend):
    cam = torch.tensor([[[0.0, 0.0, 1.0, 1.0, 0.0]]], device=backend.device)
    result = upsample_cam(cam, (1, 40))
    assert result.min() < -0.01
    assert result.max() > 1.01


@pytest.mark.thin(3)
@dtypes
def test_nan_and_infinity_stay_in_their_map(backend, dtype):
    cam = maps((4, 3, 3), dtype, backend.device)
    cam[1, 0, 2] = float("nan")
    cam[2, 1, 1] = float("inf")
    result = upsample_cam(cam, (6, 7))
    assert bool(result[1].isnan().all())
    assert bool(result[2].isnan().any())
    clean = upsample_cam(cam[[0, 3]], (6, 7))
    assert_same(result[[0, 3]], clean)
    assert bool(clean.isfinite().all())


draws = given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    more=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(list(DTYPES.values())),
)


@draws
def test_properties(backend, shape, more, seed, dtype):
    torch.manual_seed(seed)
    cam = maps(shape, dtype, backend.device)
    size = (shape[1] + more[0], shape[2] + more[1])
    result = upsample_cam(cam, size)
    # Min-max undoes a power of two, and float16's subnormals begin far below these values.
    assert_same(upsample_cam(cam * 8, size), result)
    order = torch.randperm(shape[0], device=backend.device)
    assert_same(upsample_cam(cam[order], size), result[order])
    # Mirroring commutes up to the order of summation.
    tolerance = 2 * FLOAT32 + 4 * torch.finfo(dtype).eps
    mirrored = upsample_cam(cam.flip(1, 2), size).flip(1, 2)
    torch.testing.assert_close(mirrored, result, rtol=0, atol=tolerance)
    if more == (0, 0):
        low, high = (bound.to(result.dtype) for bound in (result.amin((1, 2)), result.amax((1, 2))))
        flat = cam.amax((1, 2)) == cam.amin((1, 2))
        assert bool((low == 0).all())
        assert torch.equal(high == 1, ~flat)


def plain(cam, size):
    """The definition, for torch's autograd."""
    low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
    rows, columns = (
        torch.from_numpy(keys_matrix(*sizes)).to(cam.device) for sizes in zip(cam.shape[1:], size, strict=True)
    )
    return rows @ ((cam - low) / (high - low)) @ columns.T


def test_gradcheck(backend):
    for shape, size in [((2, 3, 4), (7, 9)), ((1, 1, 5), (2, 8)), ((2, 2, 2), (2, 2))][
        : 1 if backend.interpreted else 3
    ]:
        # A permutation: the extremes are unique, and far from the others.
        cam = torch.stack([torch.randperm(math.prod(shape[1:])).view(shape[1:]) for _ in range(shape[0])])
        cam = cam.double().to(backend.device).requires_grad_()
        modes = {"fast_mode": True, "check_undefined_grad": False} if backend.interpreted else {}
        assert torch.autograd.gradcheck(lambda c, size=size: upsample_cam(c, size), cam, **modes)


@dtypes
def test_gradients_with_ties(backend, dtype):
    """Against torch's own derivative of amin and amax, which shares evenly between ties."""
    # The float32 backward sums up to 65*130 terms; relative to the largest gradient.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for shape, size in map_sizes(backend, dtype):
        if shape[1] * shape[2] == 1:
            continue
        cam = torch.randint(0, 4, shape, device=backend.device).to(dtype)
        cam[:, 0, 0], cam[:, -1, -1] = 0, 3  # not flat
        weight = torch.randn(shape[0], *size, device=backend.device).to(dtype)
        (got,) = torch.autograd.grad(upsample_cam(cam.requires_grad_(), size), cam, weight)
        wide = cam.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(plain(wide, size), wide, weight.double())
        assert got.dtype == dtype
        if shape[0]:
            scale = float(expected.abs().max())
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=2 * tolerance * scale)


def test_ties_by_hand(backend):
    cam = torch.tensor(
        [[[0.0, 0.0, 1.0, 2.0, 2.0, 2.0]]], dtype=torch.float64, device=backend.device, requires_grad=True
    )
    weight = torch.tensor([[[0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]], dtype=torch.float64, device=backend.device)
    (gradient,) = torch.autograd.grad(upsample_cam(cam, (1, 6)), cam, weight)
    # u = (c - min) / (max - min): 1/2 for c itself, -1/4 over two minima, -1/4 over three maxima.
    expected = torch.tensor([-1 / 8, -1 / 8, 1 / 2, -1 / 12, -1 / 12, -1 / 12], dtype=torch.float64)
    torch.testing.assert_close(gradient.flatten().cpu(), expected, rtol=0, atol=1e-15)


def test_gradient_arrives_in_any_layout(backend):
    cam = maps((1, 3, 4), torch.float64, backend.device).requires_grad_()
    weight = torch.randn(1, 8, 9, dtype=torch.float64, device=backend.device)
    (expected,) = torch.autograd.grad(upsample_cam(cam, (8, 9)), cam, weight)
    (transposed,) = torch.autograd.grad(upsample_cam(cam, (8, 9)), cam, weight.mT.contiguous().mT)
    assert_same(transposed, expected)
    (summed,) = torch.autograd.grad(upsample_cam(cam, (8, 9)).sum(), cam)  # an expanded scalar
    (ones,) = torch.autograd.grad(upsample_cam(cam, (8, 9)), cam, torch.ones_like(weight))
    assert_same(summed, ones)


BAD = [*[("cam", *row) for row in BAD_MAPS], *[("size", *row) for row in BAD_SIZES]]


@pytest.mark.parametrize(("argument", "value", "error", "got"), BAD)
def test_bad_input(backend, argument, value, error, got):
    arguments = {"cam": torch.rand(2, 3, 4, device=backend.device), "size": (32, 32)}
    arguments[argument] = on_device(value, backend.device)
    assert_error(lambda: upsample_cam(**arguments), argument, error, got)
