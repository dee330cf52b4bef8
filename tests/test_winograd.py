"""Tests of attack_model.cpu.winograd: a convolution and its input gradient, against torch's in float64."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

import part_fast
from part_fast import backends
from part_fast.attack_model.cpu import winograd

BUILT = backends.why_not("cpp", "cpu")
cpp = pytest.mark.skipif(BUILT is not None, reason=str(BUILT))
# One tile and less, rows and columns left over, whole tiles; few tiles and many; panels of 16, 48, 64 and more.
SHAPES = [
    (1, 16, 16, 1, 1),
    (2, 16, 48, 5, 7),
    (3, 32, 80, 4, 4),
    (5, 48, 144, 9, 6),
    (32, 16, 64, 12, 8),
    (7, 64, 32, 33, 31),
    (2, 128, 16, 16, 16),
]


def made(n, c_in, c_out, h, w, dtype=torch.float32):
    """x as after a ReLU, weight, bias, and what may be added."""
    torch.manual_seed(0)
    x = torch.randn(n, c_in, h, w).relu()
    weight = torch.randn(c_out, c_in, 3, 3) / (3 * c_in**0.5)
    other = torch.randn(n, c_out, h, w)
    tensors = (value.to(dtype, memory_format=torch.channels_last) for value in (x, weight, other))
    return *tensors, torch.randn(c_out).to(dtype)


def error(value, exact):
    return float((value.double() - exact).abs().max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_a_convolution(shape):
    x, weight, other, bias = made(*shape, torch.float64)
    with part_fast.backend("reference"):
        u = winograd.transform_(None, weight, False)
        out = winograd.convolve(x, u, shape[2], bias, other, relu=True)
        torch.testing.assert_close(out, (F.conv2d(x, weight, bias, padding=1) + other).relu(), rtol=0, atol=1e-12)
        back = winograd.convolve(other, winograd.transform_(None, weight, True), shape[1])
        torch.testing.assert_close(back, F.conv_transpose2d(other, weight, padding=1), rtol=0, atol=1e-12)


@cpp
@pytest.mark.parametrize("weight_layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpp_rounds_little_more_than_torch(shape, weight_layout):
    x, weight, other, _ = made(*shape)
    weight = weight.contiguous(memory_format=weight_layout)
    pairs = {
        False: (x, F.conv2d, shape[2]),
        True: (other, F.conv_transpose2d, shape[1]),
    }
    for transposed, (values, convolution, channels) in pairs.items():
        exact = convolution(values.double(), weight.double(), padding=1)
        out = torch.full_like(exact, torch.nan, dtype=torch.float32)  # of what is not written something stays
        out = out.contiguous(memory_format=torch.channels_last)
        found = winograd.convolve(values, winograd.transform_(None, weight, transposed), channels, out=out)
        assert found is out
        # Direct sums lose 1 to 3 roundings of the largest term; with 5 of it every wrong value is seen.
        assert error(found, exact) < 5 * error(convolution(values, weight, padding=1), exact) + 1e-6


def spread(x, weight):
    """What is added up to each output, all of it positive: |A| [(|G| |w| |G|) * (|B| |x| |B|)] |A|, and the largest
    input of its tile."""
    b, g, a = (matrix.abs() for matrix in winograd._matrices(torch.zeros(1, dtype=torch.float64)))
    h, w = x.shape[2:]
    tiles = F.pad(x.abs().double(), (1, 1 + -w % 4, 1, 1 + -h % 4)).unfold(2, 6, 4).unfold(3, 6, 4)
    inputs = torch.einsum("ay,bx,ncijyx->ncijab", b, b, tiles)
    weights = torch.einsum("ay,bx,ocyx->ocab", g, g, weight.abs().double())
    sums = torch.einsum("ya,xb,ncijab,ocab->noiyjx", a, a, inputs, weights).flatten(4, 5).flatten(2, 3)
    largest = tiles.amax((1, 4, 5)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    return sums[:, :, :h, :w], largest[:, None, :h, :w]


def spiky(scale, channels=64):
    """Inputs up to `scale`, and in every fourth tile one of 1 that the tile's first output does not see."""
    x, weight, *_ = made(2, channels, 32, 16, 16)
    x = x * scale
    x[:, :, 2::8, 2::8] = 1.0
    return x, weight


@cpp
@pytest.mark.parametrize("channels", [16, 64, 256])
@pytest.mark.parametrize("scale", [None, 0.1, 0.01, 0.001])
def test_rounding_stays_below_its_bound(scale, channels):
    x, weight = made(2, channels, 32, 16, 16)[:2] if scale is None else spiky(scale, channels)
    found = winograd.convolve(x, winograd.transform_(None, weight, False), 32)
    errors = (found.double() - F.conv2d(x.double(), weight.double(), padding=1)).abs()
    sums, largest = spread(x, weight)
    unit = 2.0**-24
    assert (errors <= unit * (channels + 30) * sums).all()
    # A number in the place of the sums, and what is left of it where roundings are of both signs.
    total = largest * weight.abs().double().sum((1, 2, 3))[:, None, None]
    assert (sums <= 205 * total).all()
    assert (errors <= 8 * unit * total).all()


@cpp
def test_rounding_of_outputs_that_do_not_see_a_spike():
    """What the docstring says: two to three times torch's without spikes, 40 times with those of 100."""
    x, weight, *_ = made(2, 64, 32, 16, 16)
    ratios = []
    for values, where in ((x, slice(None)), (spiky(0.01)[0], slice(0, None, 8))):
        exact = F.conv2d(values.double(), weight.double(), padding=1)
        u = winograd.transform_(None, weight, False)
        ours, torchs = winograd.convolve(values, u, 32), F.conv2d(values, weight, padding=1)
        of_ours, of_torchs = ((out.double() - exact)[..., where, where].square().mean() for out in (ours, torchs))
        ratios.append(float((of_ours / of_torchs).sqrt()))
    assert 1.5 < ratios[0] < 4
    assert 20 < ratios[1] < 80


@cpp
def test_bias_sum_relu_and_gates():
    x, weight, other, bias = made(3, 32, 48, 9, 6)
    u = winograd.transform_(None, weight, False)
    gate_x, gate_other = torch.randn_like(x), torch.randn_like(other)
    for gate in (gate_x, gate_other):
        gate[0, 0], gate[0, 1] = 0, torch.nan  # as in a ReLU's backward: 0 stops, NaN does not
    for add, relu, gated in ((False, False, True), (True, False, False), (True, True, True), (False, True, False)):
        kwargs = {"relu": relu}
        exact_x, exact_other = x.double(), other.double() * add
        if gated:
            kwargs["x_positive"] = gate_x
            exact_x = torch.where(gate_x <= 0, 0.0, exact_x)
        if gated and add:
            kwargs["other_positive"] = gate_other
            exact_other = torch.where(gate_other <= 0, 0.0, exact_other)
        exact = F.conv2d(exact_x, weight.double(), bias.double(), padding=1) + exact_other
        out = winograd.convolve(x, u, 48, bias, other if add else None, **kwargs)
        torch.testing.assert_close(out.double(), exact.relu() if relu else exact, rtol=0, atol=3e-5)


@cpp
def test_nan_reaches_the_tiles_that_see_it_and_no_others():
    x, weight, _, _ = made(2, 16, 16, 16, 16)
    u = winograd.transform_(None, weight, False)
    clean = winograd.convolve(x, u, 16, relu=True)
    x[0, 3, 5, 5] = torch.nan
    out = winograd.convolve(x, u, 16, relu=True)
    assert out[0, :, 4:7, 4:7].isnan().all()
    assert torch.equal(out[1], clean[1])
    assert torch.equal(out[0, :, 8:], clean[0, :, 8:])


@cpp
@pytest.mark.parametrize("shape", [(16, 32, 48, 12, 12), (9, 64, 64, 4, 4)], ids=str)
def test_an_image_has_the_same_bits_in_every_batch_on_any_number_of_threads(shape):
    x, weight, other, bias = made(*shape)
    u = winograd.transform_(None, weight, False)
    threads = torch.get_num_threads()
    together = winograd.convolve(x, u, shape[2], bias, other, relu=True)
    alone = [winograd.convolve(x[i : i + 1], u, shape[2], bias, other[i : i + 1], relu=True) for i in range(len(x))]
    assert torch.equal(together, torch.cat(alone))
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(winograd.convolve(x, u, shape[2], bias, other, relu=True), together)
    finally:
        torch.set_num_threads(threads)


@cpp
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_is_written_beside_the_output(shape):
    n, _, channels, h, w = shape
    x, weight, _, _ = made(*shape)
    room = torch.full((n + 2, h, w, channels), 7.0).permute(0, 3, 1, 2)
    winograd.convolve(x, winograd.transform_(None, weight, False), channels, out=room[1:-1])
    assert (room[0] == 7).all()
    assert (room[-1] == 7).all()
    assert not (room[1:-1] == 7).any()


@cpp
def test_weights_are_written_where_they_were():
    _, weight, _, _ = made(1, 16, 32, 4, 4)
    u = winograd.transform_(None, weight, False)
    before = u.clone()
    assert winograd.transform_(u, weight * 2, False) is u
    torch.testing.assert_close(u, before * 2, rtol=1e-6, atol=0)


@cpp
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_instruction_sets(capability):
    """ATEN_CPU_CAPABILITY, which torch goes by, and we too: these tests again, on what older CPUs have."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "cpp or gates or bits or nan"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


@cpp
def test_opcheck():
    x, weight, other, bias = made(2, 16, 32, 5, 6)
    u, y = winograd.transform_(None, weight, False), winograd.empty(x, 32)
    tests = ["test_schema", "test_faketensor"]
    torch.library.opcheck(torch.ops.part_fast._winograd_weight_.default, (u, weight, True), test_utils=tests)
    torch.library.opcheck(
        torch.ops.part_fast._winograd_.default, (y, x, None, u, bias, other, other, True), test_utils=tests
    )


def test_what_it_takes_and_when_it_pays():
    assert winograd.takes(nn.Conv2d(16, 32, 3, padding=1))
    refused = {
        "other channels": nn.Conv2d(16, 24, 3, padding=1),
        "images": nn.Conv2d(3, 16, 3, padding=1),
        "another kernel": nn.Conv2d(16, 16, 5, padding=1),
        "a stride": nn.Conv2d(16, 16, 3, 2, padding=1),
        "no padding": nn.Conv2d(16, 16, 3),
        "dilation": nn.Conv2d(16, 16, 3, padding=1, dilation=2),
        "groups": nn.Conv2d(16, 16, 3, padding=1, groups=2),
    }
    for what, conv in refused.items():
        assert not winograd.takes(conv), what
    x = torch.rand(2, 16, 8, 8)
    assert winograd.pays(x) == (BUILT is None)
    assert not winograd.pays(x[:1])  # four tiles
    assert not winograd.pays(x, torch.bfloat16)  # of which oneDNN multiplies twice as many
    with part_fast.backend("reference"):
        assert not winograd.pays(x)
