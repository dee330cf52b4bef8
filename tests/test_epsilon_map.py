"""epsilon_map, packed_epsilon_map: against cam_mask and a float64 oracle; learned budgets; gradients; errors."""

import math

import numpy as np
import pytest
import torch
from conftest import (
    BAD_MAPS,
    BAD_SIZES,
    DTYPES,
    EPS,
    EPS_LOW,
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
from test_cam_mask import BAD_RULES, RULES, SIZES, maps

from part_fast import PackedEpsilon, cam_mask, epsilon_map, packed_epsilon_map

rules = pytest.mark.parametrize("rule", RULES)


@pytest.mark.parametrize("rule", ["zscore", "released"])
@pytest.mark.parametrize("key", SIZES)
def test_golden(golden, backend, key, rule):
    if not backend.exact:
        pytest.skip(f"{backend.name} may sum in float32; test_cam_mask.py bounds where its masks differ")
    g = golden("mask")
    size = tuple(int(n) for n in key.split("_to_")[1].split("x"))
    mask = g[f"{key}.mask_{rule}"].bool().to(backend.device)
    cam = g[f"{key}.cam"].to(backend.device)
    assert_same(epsilon_map(cam, size, EPS, EPS_LOW, rule), torch.where(mask, EPS, EPS_LOW))
    assert_same(packed_epsilon_map(cam, size, EPS, EPS_LOW, rule).mask(), mask)


@pytest.mark.thin(5)
@rules
@dtypes
def test_chooses_by_cam_mask(backend, dtype, rule):
    for shape, size in map_sizes(backend, dtype, rule):
        cam = maps(shape, dtype, backend.device)
        mask = cam_mask(cam, size, rule)
        result = epsilon_map(cam, size, EPS, EPS_LOW, rule)
        high, low = (
            torch.full((), value, dtype=compute_dtype(dtype), device=backend.device) for value in (EPS, EPS_LOW)
        )
        assert_same(result, torch.where(mask, high, low), (shape, size))
        assert result.is_contiguous()
        packed = packed_epsilon_map(cam, size, EPS, EPS_LOW, rule)
        assert_same(packed.bits, PackedEpsilon.pack(mask, EPS, EPS_LOW).bits, (shape, size))
        assert_same(packed.dense(), result.float(), (shape, size))
        assert (packed.size, packed.eps, packed.eps_low) == (size, EPS, EPS_LOW)


@dtypes
def test_soft_oracle(backend, dtype):
    # Relative to eps: the interpolation's own error, and two more roundings.
    tolerance = 1e-13 if dtype == torch.float64 else 3e-6
    for shape, size in map_sizes(backend, dtype):
        cam = maps(shape, dtype, backend.device)
        result = epsilon_map(cam, size, EPS, EPS_LOW, "soft")
        assert result.shape == (shape[0], 1, *size)
        assert result.dtype == compute_dtype(dtype)
        expected = EPS_LOW + (EPS - EPS_LOW) * np.clip(upsampled(cam, size), 0, 1)
        np.testing.assert_allclose(result[:, 0].cpu().numpy(), expected, rtol=0, atol=tolerance * EPS)
        assert_same(result, epsilon_map(cam.to(result.dtype), size, EPS, EPS_LOW, "soft"), (shape, size))


@pytest.mark.thin(5)
@pytest.mark.parametrize("rule", [*RULES, "soft"])
@dtypes
def test_a_flat_map_gives_eps_low(backend, dtype, rule):
    cam = torch.tensor([0.0, 0.7], dtype=dtype, device=backend.device)[:, None, None].expand(2, 3, 4).contiguous()
    result = epsilon_map(cam, (6, 8), EPS, EPS_LOW, rule)
    assert_same(result, torch.full_like(result, EPS_LOW))


@rules
def test_nan_in_a_map_gives_eps_low_there_alone(backend, rule):
    cam = maps((3, 3, 4), torch.float32, backend.device)
    cam[1, 1, 1] = float("nan")
    result = epsilon_map(cam, (6, 8), EPS, EPS_LOW, rule)
    assert_same(result[1], torch.full_like(result[1], EPS_LOW))
    assert_same(result[[0, 2]], epsilon_map(cam[[0, 2]], (6, 8), EPS, EPS_LOW, rule))


def test_nan_in_a_soft_map_reaches_the_output(backend):
    cam = maps((2, 3, 4), torch.float32, backend.device)
    cam[1, 1, 1] = float("nan")
    result = epsilon_map(cam, (6, 8), EPS, EPS_LOW, "soft")
    assert bool(result[1].isnan().all())
    assert not result[0].isnan().any()


@pytest.mark.thin(7)
@rules
@dtypes
def test_equal_and_zero_budgets(backend, dtype, rule):
    cam = maps((2, 3, 4), dtype, backend.device)
    for value in (0, EPS, 1.0):
        result = epsilon_map(cam, (6, 8), value, value, rule)
        assert_same(result, torch.full_like(result, value))


LEARNED = ("()", "(N,1,1,1)", "(N,1,H,W)", "(1,1,H,W)", "(H,W)", "(M,1,1)")


def learned(form, shape, dtype, device, low, high):
    sizes = dict(zip("NMHW1", (*shape, 1), strict=True))
    names = form.strip("()")
    dims = [sizes[name] for name in names.split(",")] if names else []
    return (torch.rand(dims, dtype=torch.float64, device=device) * (high - low) + low).to(dtype)


@pytest.mark.thin(37)
@pytest.mark.parametrize("form", LEARNED)
@pytest.mark.parametrize("rule", [*RULES, "soft"])
@pytest.mark.parametrize("eps_dtype", DTYPES.values(), ids=DTYPES.keys())
def test_tensor_budgets(backend, eps_dtype, rule, form):
    """Either or both a tensor; computed in float32 whatever the tensor's dtype."""
    for shape, size in map_sizes(backend, eps_dtype, rule, form)[:6]:
        cam = maps(shape, torch.float32, backend.device)
        full = (shape[0], 3 if rule == "released" else 1, *size)
        high = learned(form, full, eps_dtype, backend.device, 0.5, 1)
        low = learned(form, full, eps_dtype, backend.device, 0, 0.5)
        weight = epsilon_map(cam, size, 1.0, 0.0, rule)
        for eps, eps_low in ((high, low), (high, EPS_LOW), (1.0, low)):
            result = epsilon_map(cam, size, eps, eps_low, rule)
            top, bottom = (torch.as_tensor(value, device=backend.device).to(torch.float32) for value in (eps, eps_low))
            expected = bottom + (top - bottom) * weight if rule == "soft" else torch.where(weight > 0, top, bottom)
            assert result.dtype == torch.float32
            assert result.shape == full
            # A float's difference with a tensor may be taken in either order of rounding.
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-7 if rule == "soft" else 0)


def test_nan_in_a_tensor_budget_reaches_the_output(backend):
    cam = maps((1, 4, 4), torch.float32, backend.device)
    nan = torch.full((1, 1, 8, 8), float("nan"), device=backend.device)
    mask = cam_mask(cam, (8, 8))
    assert torch.equal(epsilon_map(cam, (8, 8), nan, 0.0).isnan(), mask)
    assert torch.equal(epsilon_map(cam, (8, 8), 1.0, nan).isnan(), ~mask)
    assert bool(epsilon_map(cam, (8, 8), nan, 0.0, "soft").isnan().all())


def plain_soft(cam, size, eps, eps_low):
    """The definition, for torch's autograd."""
    low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
    rows, columns = (
        torch.from_numpy(keys_matrix(*sizes)).to(cam.device) for sizes in zip(cam.shape[1:], size, strict=True)
    )
    u = rows @ ((cam - low) / (high - low)) @ columns.T
    inside = (u >= 0) & (u <= 1)  # a bound belongs to the inside, as in pgd_step; torch's clamp has changed its mind
    return eps_low + (eps - eps_low) * torch.where(inside, u, u.detach().clamp(0, 1))[:, None]


def test_gradcheck_soft(backend):
    shape, size = (2, 3, 4), (7, 9)
    # A permutation: the extremes are unique, and no interpolated value lies on a bound.
    cam = torch.stack([torch.randperm(math.prod(shape[1:])).view(shape[1:]) for _ in range(shape[0])])
    cam = cam.double().to(backend.device).requires_grad_()
    modes = {"fast_mode": True, "check_undefined_grad": not backend.interpreted}
    assert torch.autograd.gradcheck(lambda c: epsilon_map(c, size, 0.5, 0.25, "soft"), cam, **modes)
    if backend.interpreted:
        return  # what follows is torch around the same launch
    eps = torch.rand(2, 1, 1, 1, dtype=torch.float64, device=backend.device, requires_grad=True)
    eps_low = torch.rand(7, 9, dtype=torch.float64, device=backend.device, requires_grad=True)
    everything = (cam, eps, eps_low)
    assert torch.autograd.gradcheck(lambda c, e, low: epsilon_map(c, size, e, low, "soft"), everything, **modes)
    assert torch.autograd.gradcheck(lambda c, e: epsilon_map(c, size, e, 0.1, "soft"), everything[:2], **modes)


@pytest.mark.thin(5)
@rules
def test_gradcheck_masks(backend, rule):
    cam = maps((2, 3, 4), torch.float64, backend.device)
    for form in LEARNED[: 1 if backend.interpreted else None]:
        full = (2, 3 if rule == "released" else 1, 6, 8)
        eps = learned(form, full, torch.float64, backend.device, 0.5, 1).requires_grad_()
        eps_low = learned(form, full, torch.float64, backend.device, 0, 0.5).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda e, low: epsilon_map(cam, (6, 8), e, low, rule),
            (eps, eps_low),
            fast_mode=True,
            check_undefined_grad=not backend.interpreted,
        )


@rules
def test_gradient_of_a_mask_counts_its_pixels(backend, rule):
    cam = maps((2, 3, 4), torch.float32, backend.device).requires_grad_()
    eps = torch.tensor(0.5, device=backend.device, requires_grad=True)
    eps_low = torch.tensor(0.25, device=backend.device, requires_grad=True)
    result = epsilon_map(cam, (6, 8), eps, eps_low, rule)
    high, low = torch.autograd.grad(result.sum(), (eps, eps_low))
    kept = int(cam_mask(cam, (6, 8), rule).sum())
    assert (high.item(), low.item()) == (kept, result.numel() - kept)
    assert not epsilon_map(cam, (6, 8), 0.5, 0.25, rule).requires_grad


@pytest.mark.thin(3)
@dtypes
def test_soft_gradients_with_ties(backend, dtype):
    """Against torch's own derivatives of amin and amax, in every dtype, at the map's own size too, where the
    extremes lie exactly on the clamp's bounds."""
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for shape, size in map_sizes(backend, dtype):
        if shape[1] * shape[2] == 1 or shape[0] == 0:
            continue
        cam = torch.randint(0, 4, shape, device=backend.device).to(dtype)
        cam[:, 0, 0], cam[:, -1, -1] = 0, 3
        exact = upsampled(cam, size)
        weight = torch.randn(shape[0], 1, *size, device=backend.device).to(compute_dtype(dtype))
        # Where rounding decides on which side of a bound a pixel falls there is nothing to compare.
        decided = (np.minimum(np.abs(exact), np.abs(exact - 1)) > 1e-6) | (size == shape[1:])
        weight *= torch.from_numpy(decided).to(backend.device)[:, None]
        (got,) = torch.autograd.grad(epsilon_map(cam.requires_grad_(), size, 0.75, 0.25, "soft"), cam, weight)
        wide = cam.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(plain_soft(wide, size, 0.75, 0.25), wide, weight.double())
        assert got.dtype == dtype
        # Relative to the largest gradient, but for what cancels in its sums.
        scale = max(float(expected.abs().max()), float(weight.abs().max()))
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=2 * tolerance * scale)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    more=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    pair=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 2**31),
    rule=st.sampled_from([*RULES, "soft"]),
    dtype=st.sampled_from(list(DTYPES.values())),
)
def test_properties(backend, shape, more, pair, seed, rule, dtype):
    torch.manual_seed(seed)
    cam = maps(shape, dtype, backend.device)
    size = (shape[1] + more[0], shape[2] + more[1])
    low, high = sorted(pair)
    result = epsilon_map(cam, size, high, low, rule)
    bounds = torch.tensor([low, high], dtype=result.dtype)
    slack = float(torch.finfo(result.dtype).eps) if rule == "soft" else 0  # of low + (high - low)
    assert bool(((result >= bounds[0].item() - slack) & (result <= bounds[1].item() + slack)).all())
    order = torch.randperm(shape[0], device=backend.device)
    assert_same(epsilon_map(cam[order], size, high, low, rule), result[order])
    assert_same(epsilon_map(cam * 8, size, high, low, rule), result)


BAD_PAIRS = [
    ("eps", -0.1, ValueError, "-0.1"),
    ("eps", float("nan"), ValueError, "nan"),
    ("eps", float("inf"), ValueError, "inf"),
    ("eps", None, TypeError, "NoneType"),
    ("eps", "8/255", TypeError, "str"),
    ("eps_low", -0.1, ValueError, "-0.1"),
    ("eps_low", float("nan"), ValueError, "nan"),
    ("eps_low", None, TypeError, "NoneType"),
    ("eps_low", 0.5, ValueError, "0.5"),
]
BAD = [
    *[("cam", *row) for row in BAD_MAPS],
    *[("size", *row) for row in BAD_SIZES],
    *BAD_RULES,
    *BAD_PAIRS,
    *[
        (name, value, error, got)
        for name in ("eps", "eps_low")
        for value, error, got in [
            (torch.zeros(2), ValueError, "(2,)"),
            (torch.zeros(2, 3, 32, 32), ValueError, "(2, 3, 32, 32)"),
            (torch.zeros(1, 2, 1, 32, 32), ValueError, "(1, 2, 1, 32, 32)"),
            (torch.zeros(32, 32, dtype=torch.int64), TypeError, "torch.int64"),
            (torch.zeros(32, 32, device="meta"), ValueError, "meta"),
            (torch.zeros(32, 32).to_sparse(), TypeError, "torch.sparse_coo"),
        ]
    ],
]


def good(device):
    return {
        "cam": torch.rand(2, 3, 4, device=device),
        "size": (32, 32),
        "eps": 0.25,
        "eps_low": 0.125,
        "rule": "zscore",
    }


@pytest.mark.parametrize(("argument", "value", "error", "got"), BAD)
def test_bad_input(backend, argument, value, error, got):
    arguments = {**good(backend.device), argument: on_device(value, backend.device)}
    assert_error(lambda: epsilon_map(**arguments), argument, error, got)
    if argument == "rule":
        known = "zscore, released, quantile:q with 0 < q < 1, soft, got"
        assert_error(lambda: epsilon_map(**arguments), argument, error, known)


@pytest.mark.parametrize(
    ("argument", "value", "error", "got"),
    [
        *[("cam", *row) for row in BAD_MAPS],
        *[("size", *row) for row in BAD_SIZES],
        *BAD_RULES,
        ("rule", "soft", ValueError, "'soft'"),
        *BAD_PAIRS,
        ("eps", torch.tensor(0.5), TypeError, "shape ()"),
        ("eps_low", torch.tensor(0.1), TypeError, "shape ()"),
    ],
)
def test_bad_input_packed(backend, argument, value, error, got):
    arguments = {**good(backend.device), argument: on_device(value, backend.device)}
    assert_error(lambda: packed_epsilon_map(**arguments), argument, error, got)
