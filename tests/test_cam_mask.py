"""cam_mask: against golden masks, independent oracles (PIL's bicubic, numpy, matplotlib) and properties; errors."""

import math
from fractions import Fraction

import matplotlib
import numpy as np
import pytest
import torch
from conftest import (
    BAD_MAPS,
    BAD_SIZES,
    DTYPES,
    assert_error,
    assert_same,
    dtypes,
    map_sizes,
    on_device,
    upsampled,
)
from hypothesis import given
from hypothesis import strategies as st

import part_fast
from part_fast import available_backends, cam_mask, upsample_cam

SIZES = ("4x4_to_28x28", "4x4_to_32x32", "5x7_to_30x44", "8x8_to_32x32", "8x8_to_64x64")
RULES = ("zscore", "released", "quantile:0.3")
rules = pytest.mark.parametrize("rule", RULES)


def maps(shape, dtype, device):
    """CAMs as they come: non-negative, partly exactly 0."""
    return torch.randn(shape, device=device).relu().to(dtype)


def zscores(u, rule):
    """z of every mask value (M,H,W) and where float32 may legitimately take another colour (H,W), from u (H,W)."""
    if rule == "zscore":
        return ((u - u.mean()) / u.std())[None], np.zeros(u.shape, bool)
    square = u.astype(np.float64) ** 2
    colours = matplotlib.colormaps["jet"](square)[..., :3]
    entry = square * 256
    between = np.abs(entry - entry.round().clip(1, 255)) < 1e-3
    return np.moveaxis((colours - colours.mean()) / colours.std(), 2, 0), between


@pytest.mark.thin(3)
@pytest.mark.parametrize("rule", ["zscore", "released"])
@pytest.mark.parametrize("key", SIZES)
def test_golden(golden, backend, key, rule):
    g = golden("mask")
    size = tuple(int(n) for n in key.split("_to_")[1].split("x"))
    some = [0, -1] if backend.interpreted else slice(None)
    mask = cam_mask(g[f"{key}.cam"][some].to(backend.device), size, rule).cpu()
    differs = mask != g[f"{key}.mask_{rule}"][some].bool()
    if backend.exact:
        assert differs.sum() == 0
    for u, off in zip(g[f"{key}.upsampled"][some].double().numpy(), differs.numpy(), strict=True):
        if u.any():
            z, between = zscores(u, rule)
            assert (np.abs(z - 1)[off] < 1e-5).all() or between.any()
        else:
            assert not off.any()
    assert not mask[-1].any()  # the flat one


@pytest.mark.parametrize("rule", ["zscore", "released"])
@dtypes
def test_independent_zscore(backend, dtype, rule):
    compared = left_out = 0
    for shape, size in map_sizes(backend, dtype, rule):
        cam = maps(shape, dtype, backend.device)
        mask = cam_mask(cam, size, rule)
        assert mask.dtype == torch.bool
        assert mask.shape == (shape[0], 3 if rule == "released" else 1, *size)
        assert mask.is_contiguous()
        for one, u in zip(mask.cpu().numpy(), upsampled(cam, size), strict=True):
            if not u.any():
                assert not one.any()
                continue
            z, between = zscores(u, rule)
            # The threshold, and what a colour or two more or less does to the mean and deviation of all.
            near = (np.abs(z - 1) < 1e-5 + 0.1 * between.mean()) | between
            assert ((z > 1) == one)[~near].all()
            compared += near.size
            left_out += near.sum()
    assert left_out < 0.1 * compared


@pytest.mark.thin(5)
@pytest.mark.parametrize("q", ["0.01", "0.1", "0.3", "0.5", "0.9", "0.999", "1/3"])
@dtypes
def test_independent_quantile(backend, dtype, q):
    for shape, size in map_sizes(backend, dtype, q):
        cam = maps(shape, dtype, backend.device)
        mask = cam_mask(cam, size, f"quantile:{q}")
        assert mask.shape == (shape[0], 1, *size)
        k = math.ceil(Fraction(q) * size[0] * size[1])
        for one, u in zip(mask.cpu().flatten(1).numpy(), upsampled(cam, size), strict=True):
            if not u.any():
                assert not one.any()
                continue
            assert one.sum() == k
            least_kept = np.sort(u.ravel())[-k]
            # Both oracle and op round; what lies further off than that from the last one kept is settled.
            settled = np.abs(u.ravel() - least_kept) > 2e-6
            assert (one == (u.ravel() > least_kept))[settled].all()
        if backend.exact and shape[0]:
            u = upsample_cam(cam.to(torch.float64 if dtype == torch.float64 else torch.float32), size)
            order = np.argsort(-u.flatten(1).cpu().numpy(), axis=1, kind="stable")[:, :k]
            chosen = np.zeros((shape[0], size[0] * size[1]), bool)
            np.put_along_axis(chosen, order, True, axis=1)
            chosen &= (cam.amax((1, 2)) > cam.amin((1, 2))).cpu().numpy()[:, None]
            assert (mask.cpu().flatten(1).numpy() == chosen).all()


@pytest.mark.thin(7)
@pytest.mark.parametrize("q", ["0.05", "0.2", "0.5", "0.75", "0.99"])
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 1, 31), (1, 16, 16)])
def test_quantile_ties_go_to_the_lower_index(backend, shape, q):
    if backend.interpreted:
        shape = tuple(min(n, 8) for n in shape)
    # At the map's own size the four values stay four values.
    cam = torch.randint(0, 4, shape, device=backend.device).float()
    cam[:, 0, 0], cam[:, -1, -1] = 0, 3
    pixels = shape[1] * shape[2]
    k = math.ceil(Fraction(q) * pixels)
    expected = np.zeros((shape[0], pixels), bool)
    order = np.argsort(-cam.view(shape[0], -1).cpu().numpy(), axis=1, kind="stable")[:, :k]
    np.put_along_axis(expected, order, True, axis=1)
    mask = cam_mask(cam, shape[1:], f"quantile:{q}")
    assert (mask.view(shape[0], -1).cpu().numpy() == expected).all()


def test_by_hand(backend):
    cam = torch.tensor(
        [[[0.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 1.0]], [[5.0, 5.0], [5.0, 5.0]]], device=backend.device
    )
    # One of four: z = 3/4 over sqrt(3)/4. Three of four: z = 1/4 over sqrt(3)/4, below 1.
    assert cam_mask(cam, (2, 2)).flatten(1).tolist() == [[False, False, False, True], [False] * 4, [False] * 4]
    quantile = cam_mask(cam, (2, 2), "quantile:0.5").flatten(1).tolist()
    assert quantile == [[True, False, False, True], [True, True, False, False], [False] * 4]
    # One of two: z is exactly 1, which is not above 1.
    assert not cam_mask(torch.tensor([[[0.0, 1.0]]], device=backend.device), (1, 2)).any()


@pytest.mark.thin(5)
@pytest.mark.parametrize(
    ("q", "k"),
    [
        ("0.07", 7),
        ("0.071", 8),
        ("0.29", 29),
        ("1/100", 1),
        ("1e-9", 1),
        ("0.9999999999", 100),
        (" 0.5 ", 50),
        (".5", 50),
        ("29E-2", 29),
        ("7.5/100", 8),
        ("7/1e2", 7),
    ],
)
def test_quantile_counts_exactly(backend, q, k):
    """0.07 of 100 pixels is 7, though in binary 0.07 * 100 is above 7."""
    cam = torch.rand(1, 10, 10, device=backend.device)
    assert cam_mask(cam, (10, 10), f"quantile:{q}").sum() == k


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", available_backends("cpu"))
def test_a_map_whose_differences_are_flushed_to_zero_holds_no_evidence(name, rule):
    """On CPUs: what torch.set_flush_denormal sets concerns no GPU."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no flag that flushes denormals to zero, so that nothing can be flushed")
    try:
        cam = torch.tensor([[[1.20e-38, 1.30e-38], [1.25e-38, 1.22e-38]]])
        assert float(cam.max() - cam.min()) == 0
        with part_fast.backend(name):
            assert not cam_mask(cam, (4, 4), rule).any()
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.thin(11)
@rules
@dtypes
def test_no_evidence_gives_all_false(backend, dtype, rule):
    cam = maps((7, 3, 4), dtype, backend.device)
    cam[1], cam[2], cam[3] = 0.0, 0.1, -3.0
    cam[4, 2, 3], cam[5, 0, 0] = float("nan"), float("inf")
    for size in ((3, 4), (8, 12))[backend.interpreted :]:
        mask = cam_mask(cam, size, rule)
        assert not mask[1:6].any()
        assert mask[0].any()
        assert mask[6].any()
        # What one map is does not touch the others.
        assert_same(mask[[0, 6]], cam_mask(cam[[0, 6]], size, rule))


@pytest.mark.thin(3)
@dtypes
def test_the_least_evidence_counts(backend, dtype):
    cam = torch.full((1, 4, 4), 0.25, dtype=dtype, device=backend.device)
    cam[0, 2, 1] += 0.25 * torch.finfo(dtype).eps
    assert cam_mask(cam, (4, 4)).nonzero().tolist() == [[0, 0, 2, 1]]
    assert cam_mask(cam, (4, 4), "quantile:0.01").nonzero().tolist() == [[0, 0, 2, 1]]


@rules
def test_float16_maps_of_full_range(backend, rule):
    """The span of a float16 map need not fit float16."""
    cam = torch.randn(1, 4, 4, device=backend.device).clamp(-1, 1) * 65000
    cam[:, 0, 0], cam[:, 1, 1] = -65000, 65000
    half = cam.half()
    assert cam_mask(half, (8, 8), rule).any()
    assert_same(cam_mask(half, (8, 8), rule), cam_mask(half.float(), (8, 8), rule))


@pytest.mark.thin(5)
@rules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_dtypes_compute_in_float32(backend, dtype, rule):
    for shape, size in map_sizes(backend, dtype, rule):
        cam = maps(shape, dtype, backend.device)
        assert_same(cam_mask(cam, size, rule), cam_mask(cam.float(), size, rule), (shape, size))


@pytest.mark.thin(7)
@rules
@dtypes
def test_layouts_give_the_same_mask(backend, dtype, rule):
    n = 1 if backend.interpreted else 3
    cam = maps((n, 4, 5), dtype, backend.device)
    expected = cam_mask(cam, (9, 11), rule)
    memory = torch.full((n * 4 * 5 + 1,), float("nan"), dtype=dtype, device=backend.device)
    offset = memory[1:].view(n, 4, 5).copy_(cam)
    transposed = cam.transpose(0, 2).contiguous().transpose(0, 2)
    wide = torch.full((n, 8, 10), float("nan"), dtype=dtype, device=backend.device)
    strided = wide[:, ::2, ::2].copy_(cam)
    for other in (offset, transposed, strided):
        assert_same(cam_mask(other, (9, 11), rule), expected)


@pytest.mark.thin(5)
@rules
def test_many_threads(backend, rule):
    shape, size = ((2, 4, 4), (8, 8)) if backend.interpreted else ((67, 8, 8), (33, 32))
    cam = maps(shape, torch.float32, backend.device)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        mask = cam_mask(cam, size, rule)
    finally:
        torch.set_num_threads(before)
    assert_same(torch.cat([cam_mask(one[None], size, rule) for one in cam]), mask)


def test_no_gradient_is_recorded(backend):
    assert not cam_mask(torch.rand(1, 2, 2, device=backend.device, requires_grad=True), (4, 4)).requires_grad


def test_cpp_equals_reference_in_every_value(backend):
    """Also where a pixel lies on its threshold: few values and whole ratios make such pixels common."""
    if not backend.exact:
        pytest.skip(f"{backend.name} may sum in float32; only reference and cpp are promised equal")
    for seed in range(40):
        torch.manual_seed(seed)
        shape = (3, int(torch.randint(1, 9, ())), int(torch.randint(1, 9, ())))
        size = tuple(side * int(torch.randint(1, 5, ())) for side in shape[1:])
        cam = torch.randint(0, 4, shape).float() if seed % 2 else maps(shape, torch.float32, "cpu")
        for rule in (*RULES, "quantile:0.5", "quantile:0.9"):
            mask = cam_mask(cam, size, rule)
            from part_fast import backend as use

            with use("reference"):
                assert_same(mask, cam_mask(cam, size, rule), (seed, rule))


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
    order = torch.randperm(shape[0], device=backend.device)
    flat = cam.amax((1, 2)) == cam.amin((1, 2))
    for rule in [RULES[seed % 3]] if backend.interpreted else RULES:
        mask = cam_mask(cam, size, rule)
        assert_same(cam_mask(cam * 8, size, rule), mask, rule)
        assert_same(cam_mask(cam[order], size, rule), mask[order], rule)
        assert not mask[flat].any()
    # By Cantelli's inequality at most half of any values lie a deviation above their mean.
    assert bool((cam_mask(cam, size).flatten(1).double().mean(1) <= 0.5).all())


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    factor=st.integers(1, 4),
    shares=st.tuples(st.integers(1, 999), st.integers(1, 999)),
    seed=st.integers(0, 2**31),
)
def test_quantiles_nest_and_count(backend, shape, factor, shares, seed):
    torch.manual_seed(seed)
    if backend.interpreted:
        shape, factor = (1, *shape[1:]), 1
    size = (shape[1] * factor, shape[2] * factor)
    cam = maps(shape, torch.float32, backend.device)
    evidence = cam.amax((1, 2)) > cam.amin((1, 2))
    smaller, larger = (cam_mask(cam, size, f"quantile:{share / 1000}") for share in sorted(shares))
    assert not (smaller & ~larger).any()
    for mask, share in zip((smaller, larger), sorted(shares), strict=True):
        k = math.ceil(Fraction(share, 1000) * size[0] * size[1])
        assert torch.equal(mask.flatten(1).sum(1), evidence * k)


BAD_RULES = [
    ("rule", "mean", ValueError, "'mean'"),
    ("rule", "", ValueError, "''"),
    ("rule", "ZSCORE", ValueError, "'ZSCORE'"),
    ("rule", "zscore:1", ValueError, "'zscore:1'"),
    ("rule", "quantile", ValueError, "'quantile'"),
    ("rule", "quantile:", ValueError, "'quantile:'"),
    ("rule", "quantile:0", ValueError, "'quantile:0'"),
    ("rule", "quantile:1", ValueError, "'quantile:1'"),
    ("rule", "quantile:1.5", ValueError, "'quantile:1.5'"),
    ("rule", "quantile:-0.5", ValueError, "'quantile:-0.5'"),
    ("rule", "quantile:abc", ValueError, "'quantile:abc'"),
    ("rule", "quantile:nan", ValueError, "'quantile:nan'"),
    ("rule", "quantile:1/0", ValueError, "'quantile:1/0'"),
    ("rule", "quantile:1/2/3", ValueError, "'quantile:1/2/3'"),
    ("rule", "quantile:1e", ValueError, "'quantile:1e'"),
    ("rule", "quantile:.", ValueError, "'quantile:.'"),
    ("rule", "quantile:0.-5", ValueError, "'quantile:0.-5'"),
    ("rule", "quantile:1e-999999999", ValueError, "'quantile:1e-999999999'"),
    ("rule", None, TypeError, "NoneType"),
    ("rule", 0.5, TypeError, "float"),
]
BAD = [
    *[("cam", *row) for row in BAD_MAPS],
    *[("size", *row) for row in BAD_SIZES],
    *BAD_RULES,
    ("rule", "soft", ValueError, "'soft'"),
]


@pytest.mark.parametrize(("argument", "value", "error", "got"), BAD)
def test_bad_input(backend, argument, value, error, got):
    arguments = {"cam": torch.rand(2, 3, 4, device=backend.device), "size": (32, 32), "rule": "zscore"}
    arguments[argument] = on_device(value, backend.device)
    assert_error(lambda: cam_mask(**arguments), argument, error, got)
    if argument == "rule":
        known = "zscore, released, quantile:q with 0 < q < 1, got"
        assert_error(lambda: cam_mask(**arguments), argument, error, known)
