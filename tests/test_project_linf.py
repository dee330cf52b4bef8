"""project_linf: against a numpy oracle and properties; gradients away from ties and at them; errors."""

import numpy as np
import pytest
import torch
from conftest import (
    BAD_EPS,
    BAD_IMAGES,
    DTYPES,
    EPS,
    EPS_FORMS,
    LAYOUTS,
    STRIDED,
    UNLIKE_IMAGES,
    assert_error,
    assert_format,
    assert_same,
    compute_dtype,
    dtypes,
    eps_forms,
    image_shapes,
    lay,
    layouts,
    make_eps,
    make_images,
    neighbours_untouched,
    on_device,
    strided,
    with_nan,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from part_fast import PackedEpsilon, pgd_step, project_linf


def oracle(x_adv, x, eps):
    """The definition in numpy: float32 (float64 for float64) throughout, rounded once at the end."""
    a, n, e = (t.cpu().to(compute_dtype(x_adv.dtype)).numpy() for t in (x_adv, x, eps))
    with np.errstate(invalid="ignore"):
        result = n + np.minimum(np.maximum(a - n, -e), e)
    assert result.dtype == n.dtype
    return torch.from_numpy(np.asarray(result)).to(x_adv.device, x_adv.dtype)


@eps_forms
@layouts
@dtypes
def test_matches_numpy_bit_for_bit(backend, dtype, layout, eps_form):
    for shape in image_shapes(backend, dtype, layout, eps_form):
        eps, dense = make_eps(eps_form, shape, backend.device)
        x_adv, _, x = (lay(t, layout) for t in make_images(shape, dtype, backend.device, dense))
        before = x_adv.clone()
        result = project_linf(x_adv, x, eps)
        assert_same(result, oracle(x_adv, x, dense), shape)
        assert_format(result, x_adv)
        assert_same(x_adv, before)
        assert neighbours_untouched(x_adv)
        assert neighbours_untouched(x)


@pytest.mark.parametrize("eps_dtype", DTYPES.values(), ids=DTYPES.keys())
@dtypes
def test_any_pair_of_dtypes(backend, dtype, eps_dtype):
    for shape in image_shapes(backend, dtype, eps_dtype):
        eps, dense = make_eps("(N,1,H,W)", shape, backend.device, eps_dtype)
        x_adv, _, x = make_images(shape, dtype, backend.device, dense)
        assert_same(project_linf(x_adv, x, eps), oracle(x_adv, x, dense), shape)


@pytest.mark.thin(5)
@dtypes
@layouts
def test_mixed_memory_formats_follow_x_adv(backend, layout, dtype):
    shape = (2, 3, 5, 7)
    eps, dense = make_eps("(N,1,H,W)", shape, backend.device)
    x_adv, _, x = make_images(shape, dtype, backend.device, dense)
    for others in LAYOUTS:
        result = project_linf(lay(x_adv, layout), lay(x, others), eps)
        assert_same(result, oracle(x_adv, x, dense), others)
        assert_format(result, lay(x_adv, layout))


@dtypes
def test_many_threads(backend, dtype):
    # Past what one thread is given, and no multiple of a vector.
    shape = (1, 3, 8, 129) if backend.interpreted else (3, 3, 131, 127)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for eps_form in ("float", "(N,1,H,W)", "PackedEpsilon M=1", "PackedEpsilon M=C"):
            for layout in ("contiguous", "channels_last"):
                eps, dense = make_eps(eps_form, shape, backend.device)
                x_adv, _, x = (lay(t, layout) for t in make_images(shape, dtype, backend.device, dense))
                assert_same(project_linf(x_adv, x, eps), oracle(x_adv, x, dense), (eps_form, layout))
    finally:
        torch.set_num_threads(before)


@pytest.mark.thin(5)
@pytest.mark.parametrize("eps_form", ["float", "(N,1,H,W)", "(N,C,H,W)", "PackedEpsilon M=1"])
@layouts
@dtypes
def test_nan_reaches_the_output(backend, dtype, layout, eps_form):
    for shape in image_shapes(backend, dtype, layout, eps_form):
        eps, dense = make_eps(eps_form, shape, backend.device)
        if isinstance(eps, Tensor):
            eps = with_nan(eps)
            dense = eps.double().expand(shape)
        x_adv, _, x = make_images(shape, dtype, backend.device, dense)
        x_adv, x = lay(with_nan(x_adv), layout), lay(with_nan(x), layout)
        result = project_linf(x_adv, x, eps)
        assert torch.equal(result.isnan(), x_adv.isnan() | x.isnan() | dense.isnan())
        assert_same(result, oracle(x_adv, x, dense), shape)


draws = given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**31),
    eps_form=st.sampled_from(EPS_FORMS),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(list(DTYPES.values())),
)


@draws
def test_stays_in_the_ball(backend, shape, seed, eps_form, layout, dtype):
    torch.manual_seed(seed)
    eps, dense = make_eps(eps_form, shape, backend.device)
    x_adv, _, x = (lay(t, layout) for t in make_images(shape, dtype, backend.device, dense))
    result = project_linf(x_adv, x, eps)
    # Half a unit in the last place of a number up to 2, in float32 (float64) and again in the storage dtype.
    slack = torch.finfo(dtype).eps + torch.finfo(compute_dtype(dtype)).eps
    assert bool(((result.double() - x.double()).abs() <= dense + slack).all())
    assert_same(result, pgd_step(x_adv, torch.zeros_like(x), x, eps, 1.0, clip=None))


@draws
def test_twice_is_once_and_inside_nothing_moves(backend, shape, seed, eps_form, layout, dtype):
    """On multiples of 1/64 up to 2 every operation is exact, in every dtype."""
    torch.manual_seed(seed)

    def grid(value):
        return (value * 64).round() / 64

    eps, dense = make_eps(eps_form, shape, backend.device)
    if isinstance(eps, PackedEpsilon):
        eps = PackedEpsilon(eps.bits, eps.size, 0.25, 0.125)
        dense = eps.dense().double().expand(shape)
    elif isinstance(eps, Tensor):
        eps = grid(eps * 8)
        dense = eps.double().expand(shape)
    else:
        eps, dense = 0.25, torch.full(shape, 0.25, dtype=torch.float64, device=backend.device)
    x = grid(torch.rand(shape, device=backend.device))
    x_adv = grid(x + torch.rand(shape, device=backend.device) - 0.5)
    x_adv, x = lay(x_adv.to(dtype), layout), lay(x.to(dtype), layout)
    once = project_linf(x_adv, x, eps)
    inside = (x_adv.double() - x.double()).abs() <= dense
    assert torch.equal(once[inside], x_adv[inside])
    assert bool(((once.double() - x.double()).abs() == dense)[~inside].all())
    assert_same(project_linf(once, x, eps), once)


@draws
def test_samples_do_not_meet(backend, shape, seed, eps_form, layout, dtype):
    torch.manual_seed(seed)
    eps, dense = make_eps(eps_form, shape, backend.device)
    x_adv, _, x = (lay(t, layout) for t in make_images(shape, dtype, backend.device, dense))
    order = torch.randperm(shape[0], device=backend.device)
    per_sample = isinstance(eps, PackedEpsilon) or (isinstance(eps, Tensor) and eps.ndim == 4 and eps.shape[0] > 1)
    shuffled = project_linf(x_adv[order], x[order], eps[order] if per_sample else eps)
    assert_same(shuffled, project_linf(x_adv, x, eps)[order])


@pytest.mark.thin(5)
@eps_forms
def test_gradcheck(backend, eps_form):
    shape = (2, 3, 2, 3)
    eps, dense = make_eps(eps_form, shape, backend.device)
    if isinstance(eps, Tensor):
        eps = (torch.rand(eps.shape, dtype=torch.float64, device=backend.device) + 1).requires_grad_()
        dense = eps.detach().expand(shape)
    x = torch.rand(shape, dtype=torch.float64, device=backend.device)
    # At least 0.2 of eps away from the bound, on either side of it.
    relative = torch.where(torch.rand_like(x) < 0.5, 0.5, 1.2) + 0.3 * torch.rand_like(x)
    x_adv = x + relative * dense * torch.randn_like(x).sign()
    leaves = [t.requires_grad_() for t in (x_adv, x, eps) if isinstance(t, Tensor)]
    fast = backend.interpreted or eps_form != "(N,1,H,W)"

    def project(x_adv, x, eps=eps):
        return project_linf(x_adv, x, eps)

    assert torch.autograd.gradcheck(project, leaves, fast_mode=fast, check_undefined_grad=not backend.interpreted)


@pytest.mark.thin(5)
@eps_forms
@layouts
@dtypes
def test_gradients_by_cases(backend, dtype, layout, eps_form):
    for shape in image_shapes(backend, dtype, layout, eps_form)[:4]:
        eps, dense = make_eps(eps_form, shape, backend.device)
        x_adv, _, x = (lay(t, layout) for t in make_images(shape, dtype, backend.device, dense))
        compute = compute_dtype(dtype)
        moved, bound = x_adv.to(compute) - x.to(compute), dense.to(compute)
        above, below = moved > bound, moved < -bound
        weight = torch.randn(shape, device=backend.device).to(dtype)
        zero = torch.zeros_like(weight)
        leaves = [t.requires_grad_() for t in (x_adv, x, eps) if isinstance(t, Tensor)]
        # The gradient arrives in the other memory format than the images'.
        other = lay(weight, "contiguous" if layout.endswith("channels_last") else "channels_last")
        got = torch.autograd.grad(project_linf(x_adv, x, eps), leaves, other)
        assert_same(got[0], torch.where(above | below, zero, weight), shape)
        assert_same(got[1], torch.where(above | below, weight, zero), shape)
        assert_format(got[0], x_adv)
        assert_format(got[1], x)
        if isinstance(eps, Tensor):
            each = torch.where(above, weight, torch.where(below, -weight, zero)).double()
            # A float32 sum of at most a few hundred terms near 1.
            torch.testing.assert_close(got[2], each.sum_to_size(eps.shape).to(eps.dtype), rtol=1e-5, atol=1e-5)


@dtypes
def test_on_the_bound_the_gradient_is_x_advs(backend, dtype):
    # Multiples of 1/8, exact in every dtype: on either bound, no budget at all, NaN, outside on either side.
    x = torch.tensor([0.5, 0.5, 0.5, float("nan"), 0.5, 0.5], dtype=dtype, device=backend.device).view(1, 1, 2, 3)
    x_adv = torch.tensor([0.75, 0.25, 0.5, 0.5, 1.0, 0.0], dtype=dtype, device=backend.device).view(1, 1, 2, 3)
    eps = torch.tensor([0.25, 0.25, 0.0, 0.25, 0.25, 0.25], dtype=dtype, device=backend.device).view(1, 1, 2, 3)
    x_adv, x, eps = (t.requires_grad_() for t in (x_adv, x, eps))
    result = project_linf(x_adv, x, eps)
    g_adv, g_x, g_eps = torch.autograd.grad(result, (x_adv, x, eps), torch.ones_like(result))
    assert g_adv.flatten().tolist() == [1, 1, 1, 1, 0, 0]
    assert g_x.flatten().tolist() == [0, 0, 0, 0, 1, 1]
    assert g_eps.flatten().tolist() == [0, 0, 0, 0, 1, -1]


def test_a_budget_can_be_learned(backend):
    """Gradient descent through eps alone finds the radius that a target needs."""
    x = torch.full((1, 1, 1, 4), 0.5, device=backend.device)
    x_adv = x + 1
    eps = torch.full((1, 1, 1, 4), 0.1, device=backend.device, requires_grad=True)
    for _ in range(20):
        loss = (project_linf(x_adv, x, eps) - 0.75).square().sum()
        (gradient,) = torch.autograd.grad(loss, eps)
        eps = (eps - 0.25 * gradient).detach().requires_grad_()
    torch.testing.assert_close(eps.detach(), torch.full_like(eps, 0.25), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", STRIDED)
def test_strided_images_are_copied(backend, kind):
    shape = (2, 3, 5, 7)
    x_adv, x = (strided(kind, shape, backend.device) for _ in range(2))
    expected = project_linf(x_adv.contiguous(), x.contiguous(), EPS)
    assert_same(project_linf(x_adv, x, EPS), expected)
    assert_same(project_linf(x_adv.contiguous(), x, EPS), expected)
    assert_same(project_linf(x_adv, x.contiguous(), EPS), expected)
    leaf = x_adv.clone().requires_grad_()
    torch.autograd.grad(project_linf(leaf[..., ::2], x[..., ::2], EPS).sum(), leaf)


BAD = [
    *[(name, *row) for name in ("x_adv", "x") for row in BAD_IMAGES],
    *[("x", *row) for row in UNLIKE_IMAGES],
    ("x", torch.zeros(2, 3, 4, 4, dtype=torch.float16), TypeError, "torch.float16"),
    *[("eps", *row) for row in BAD_EPS],
]


@pytest.mark.parametrize(("argument", "value", "error", "got"), BAD)
def test_bad_input(backend, argument, value, error, got):
    arguments = {name: torch.rand(2, 3, 4, 4, device=backend.device) for name in ("x_adv", "x")} | {"eps": EPS}
    arguments[argument] = on_device(value, backend.device)
    assert_error(lambda: project_linf(**arguments), argument, error, got)
