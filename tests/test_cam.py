"""cam: against golden vectors, a float64 oracle with an error bound, and properties; errors."""

import numpy as np
import pytest
import torch
from conftest import BAD_IMAGES, DTYPES, assert_error, assert_same, compute_dtype, dtypes, lay, layouts, on_device
from hypothesis import given
from hypothesis import strategies as st

from part_fast import cam

METHODS = ("gradcam", "xgradcam", "layercam", "hirescam")
methods = pytest.mark.parametrize("method", METHODS)


def shapes(backend):
    """(N,K,h,w): target layers in use, odd ones, one place, one channel, no image."""
    if backend.interpreted:
        return [(2, 5, 4, 4), (1, 33, 3, 5), (0, 4, 2, 2)]
    usual = [(2, 512, 4, 4), (1, 640, 8, 8), (3, 16, 7, 7)]
    return [*usual, (2, 33, 5, 3), (1, 1, 31, 1), (2, 5, 1, 1), (1, 1, 1, 1), (5, 3, 1, 33), (0, 8, 4, 4)]


def features(shape, dtype, device):
    """Activations as after a ReLU, some exactly 0, and gradients of both signs."""
    return torch.randn(shape, device=device).relu().to(dtype), torch.randn(shape, device=device).to(dtype)


def oracle(activation, gradient, method):
    """(map, bound on the error of any float32 summation order of it), in float64 numpy."""
    a, g = (t.double().cpu().numpy() for t in (activation, gradient))
    places = a.shape[2] * a.shape[3]
    unit = torch.finfo(compute_dtype(activation.dtype)).eps / 2
    if method == "gradcam":
        w, w_error = g.mean((2, 3), keepdims=True), np.abs(g).mean((2, 3), keepdims=True) * (places + 1)
    elif method == "xgradcam":
        # The sum of a ReLU's outputs has no cancellation, so its relative error is that of its terms.
        with np.errstate(invalid="ignore", divide="ignore"):
            total = (a + 1e-8).sum((2, 3), keepdims=True)
            w = (g * a).sum((2, 3), keepdims=True) / total
            w_error = np.abs(g * a).sum((2, 3), keepdims=True) / total * (2 * places + 4)
    else:
        w, w_error = (np.maximum(g, 0) if method == "layercam" else g), 0
    error = (w_error * np.abs(a) + np.abs(w * a) * (a.shape[1] + 1)).sum(1) * unit * 1.01
    return np.maximum((w * a).sum(1), 0), error


def assert_close(result, activation, gradient, method):
    expected, bound = oracle(activation, gradient, method)
    assert result.shape == expected.shape
    assert result.dtype == compute_dtype(activation.dtype)
    error = np.abs(result.double().cpu().numpy() - expected)
    assert (error <= bound).all(), f"error {error.max():.3g} over bound by up to {(error - bound).max():.3g}"


@methods
def test_golden(golden, backend, method):
    g = {name: value.to(backend.device) for name, value in golden("cam").items()}
    # Sums of 20 and 6 float32 terms near 1.
    torch.testing.assert_close(cam(g["activation"], g["gradient"], method), g[method], rtol=2e-6, atol=2e-6)


@methods
@layouts
@dtypes
def test_within_the_bound_of_float64(backend, dtype, layout, method):
    for shape in shapes(backend):
        activation, gradient = (lay(t, layout) for t in features(shape, dtype, backend.device))
        result = cam(activation, gradient, method)
        assert_close(result, activation, gradient, method)
        assert result.is_contiguous()
        assert bool((result >= 0).all())


@methods
def test_mixed_and_strided_layouts(backend, method):
    shape = (2, 6, 5, 4)
    activation, gradient = features(shape, torch.float32, backend.device)
    strided = torch.full((2, 6, 5, 8), float("nan"), device=backend.device)
    strided[..., ::2] = gradient
    transposed = gradient.transpose(2, 3).contiguous().transpose(2, 3)
    for other in (strided[..., ::2], transposed, lay(gradient, "channels_last"), gradient):
        for first in (
            activation,
            lay(activation, "channels_last"),
            activation.transpose(0, 3).contiguous().transpose(0, 3),
        ):
            assert_close(cam(first, other, method), activation, gradient, method)


@pytest.mark.thin(5)
@methods
def test_many_threads(backend, method):
    shape = (3, 17, 3, 3) if backend.interpreted else (37, 65, 8, 8)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for layout in ("contiguous", "channels_last"):
            activation, gradient = (lay(t, layout) for t in features(shape, torch.bfloat16, backend.device))
            assert_close(cam(activation, gradient, method), activation, gradient, method)
    finally:
        torch.set_num_threads(before)


def test_by_hand(backend):
    activation = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]], device=backend.device)  # (1,2,1,2)
    gradient = torch.tensor([[[[1.0, 3.0]], [[-1.0, -0.5]]]], device=backend.device)
    results = {
        method: cam(activation, gradient, method).flatten().tolist() for method in ("gradcam", "layercam", "hirescam")
    }
    assert results["gradcam"] == [0.0, 1.0]  # 2 A_1 - 0.75 A_2 = -0.25, 1
    assert results["layercam"] == [1.0, 6.0]
    assert results["hirescam"] == [0.0, 4.0]  # 1 - 3, 6 - 2
    assert cam(activation, gradient).flatten().tolist() == results["gradcam"]
    # w = 7/3, -5/7
    expected = [7 / 3 - 15 / 7, 14 / 3 - 20 / 7]
    assert cam(activation, gradient, "xgradcam").flatten().tolist() == pytest.approx(expected, rel=1e-5)


@methods
@dtypes
def test_nan_reaches_the_output(backend, dtype, method):
    activation, gradient = features((3, 4, 3, 3), dtype, backend.device)
    activation[0, 1, 0, 2] = float("nan")
    gradient[1, 2, 1, 1] = float("nan")
    nan = cam(activation, gradient, method).isnan()
    assert not nan[2].any()
    if method in ("gradcam", "xgradcam"):
        assert nan[1].all()  # in a channel's weight, so everywhere
    else:
        assert nan[1].sum() == 1
        assert bool(nan[1, 1, 1])
    if method == "xgradcam":
        assert nan[0].all()
    else:
        assert nan[0].sum() == 1
        assert bool(nan[0, 0, 2])


@methods
def test_no_gradient_is_recorded(backend, method):
    activation, gradient = features((2, 3, 4, 4), torch.float32, backend.device)
    expected = cam(activation, gradient, method)
    result = cam(activation.requires_grad_(), gradient.requires_grad_(), method)
    assert not result.requires_grad
    assert_same(result, expected)


draws = given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 2**31),
    method=st.sampled_from(METHODS),
    layout=st.sampled_from(["contiguous", "channels_last", "offset"]),
    dtype=st.sampled_from(list(DTYPES.values())),
)


@draws
def test_samples_do_not_meet(backend, shape, seed, method, layout, dtype):
    torch.manual_seed(seed)
    activation, gradient = (lay(t, layout) for t in features(shape, dtype, backend.device))
    whole = cam(activation, gradient, method)
    for i in range(shape[0]):
        # One sample alone may be summed in another order.
        alone = cam(activation[i : i + 1], gradient[i : i + 1], method)
        assert_close(alone, activation[i : i + 1], gradient[i : i + 1], method)
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-4, atol=1e-5)
    order = torch.randperm(shape[0], device=backend.device)
    assert_close(cam(activation[order], gradient[order], method), activation[order], gradient[order], method)


@draws
def test_scaling_the_gradient_scales_the_map(backend, shape, seed, method, layout, dtype):
    """Every method is linear in the gradient for positive factors; powers of two lose nothing."""
    torch.manual_seed(seed)
    activation, gradient = (lay(t, layout) for t in features(shape, dtype, backend.device))
    assert_same(cam(activation, gradient * 4, method), cam(activation, gradient, method) * 4)


BAD = [
    *[(name, *row) for name in ("activation", "gradient") for row in BAD_IMAGES],
    *[
        (name, value.expand(2, 3, 4, 4), ValueError, got)  # any strides will do, but sharing elements
        for name in ("activation", "gradient")
        for value, got in (
            (torch.zeros(2, 1, 4, 4), "strides (16, 0, 4, 1)"),
            (torch.zeros(1, 3, 4, 4), "strides (0, 16, 4, 1)"),
        )
    ],
    *[
        (name, torch.zeros(shape), ValueError, str(shape))
        for name in ("activation", "gradient")
        for shape in [(2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)]
    ],
    ("gradient", torch.zeros(2, 3, 4, 5), ValueError, "(2, 3, 4, 5)"),
    ("gradient", torch.zeros(1, 3, 4, 4), ValueError, "(1, 3, 4, 4)"),
    ("gradient", torch.zeros(2, 3, 4, 4, device="meta"), ValueError, "meta"),
    ("gradient", torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16), TypeError, "torch.bfloat16"),
    ("method", "scorecam", ValueError, "'scorecam'"),
    ("method", "GradCAM", ValueError, "'GradCAM'"),
    ("method", None, ValueError, "None"),
]


@pytest.mark.parametrize(("argument", "value", "error", "got"), BAD)
def test_bad_input(backend, argument, value, error, got):
    arguments = {name: torch.rand(2, 3, 4, 4, device=backend.device) for name in ("activation", "gradient")}
    arguments[argument] = on_device(value, backend.device)
    assert_error(lambda: cam(**arguments), argument, error, got)


def test_unknown_method_lists_the_known(backend):
    activation = torch.rand(1, 1, 1, 1, device=backend.device)
    assert_error(lambda: cam(activation, activation, "x"), "method", ValueError, ", ".join(METHODS))
