"""pgd_step, pgd_step_: against golden vectors, a numpy oracle and properties; gradients; in-place semantics."""

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
    TENSOR_EPS_FORMS,
    UNLIKE_IMAGES,
    assert_error,
    assert_format,
    assert_same,
    assert_same_bits,
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

from part_fast import PackedEpsilon, pgd_step, pgd_step_

ALPHA = 2 / 255


def oracle(x_adv, grad, x, eps, alpha=ALPHA, clip=(0.0, 1.0)):
    """The definition in numpy: float32 (float64 for float64) throughout, rounded once at the end."""
    compute = compute_dtype(x_adv.dtype)
    kind = np.float64 if compute == torch.float64 else np.float32
    a, n, e = (t.cpu().to(compute).numpy() for t in (x_adv, x, eps))
    g = grad.cpu().double().numpy()
    with np.errstate(invalid="ignore"):
        sign = (g > 0).astype(kind) - (g < 0).astype(kind)
        moved = (a + kind(alpha) * sign) - n
        result = n + np.minimum(np.maximum(moved, -e), e)
        low, high = (np.asarray(bound, dtype=kind).reshape(-1, 1, 1) for bound in clip)
        result = np.minimum(np.maximum(result, low), high)
    assert result.dtype == kind
    return torch.from_numpy(np.asarray(result)).to(x_adv.device, x_adv.dtype)


def test_golden(golden, backend):
    g = {name: value.to(backend.device) for name, value in golden("pgd_step").items()}
    result = pgd_step(g["x_adv"], g["grad"], g["x"], g["eps"], ALPHA)
    assert_same_bits(result, g["out"])
    assert pgd_step_(g["x_adv"], g["grad"], g["x"], g["eps"], ALPHA) is g["x_adv"]
    assert_same_bits(g["x_adv"], g["out"])


@pytest.mark.thin(5)
@eps_forms
@layouts
@dtypes
def test_matches_numpy_bit_for_bit(backend, dtype, layout, eps_form):
    for shape in image_shapes(backend, dtype, layout, eps_form):
        eps, dense = make_eps(eps_form, shape, backend.device)
        x_adv, grad, x = (lay(t, layout) for t in make_images(shape, dtype, backend.device, dense))
        expected = oracle(x_adv, grad, x, dense)
        result = pgd_step(x_adv, grad, x, eps, ALPHA)
        assert_same(result, expected, shape)
        assert_format(result, x_adv)
        before, address = x_adv._version, x_adv.data_ptr()
        assert pgd_step_(x_adv, grad, x, eps, ALPHA) is x_adv
        assert_same(x_adv, expected, shape)
        assert x_adv._version > before
        assert x_adv.data_ptr() == address
        assert all(neighbours_untouched(t) for t in (x_adv, grad, x))


@pytest.mark.thin(3)
@pytest.mark.parametrize("grad_dtype", DTYPES.values(), ids=DTYPES.keys())
@dtypes
def test_any_pair_of_dtypes(backend, dtype, grad_dtype):
    for shape in image_shapes(backend, dtype, grad_dtype):
        for eps_dtype in DTYPES.values():
            eps, dense = make_eps("(N,1,H,W)", shape, backend.device, eps_dtype)
            x_adv, grad, x = make_images(shape, dtype, backend.device, dense, grad_dtype)
            assert_same(pgd_step(x_adv, grad, x, eps, ALPHA), oracle(x_adv, grad, x, dense), (shape, eps_dtype))


@pytest.mark.thin(3)
@pytest.mark.parametrize("clip", [(0.0, 1.0), (0.25, 0.5), (-1, 1), (0.5, 0.5), None], ids=str)
@pytest.mark.parametrize("alpha", [ALPHA, -ALPHA, 0, 1.0], ids=str)
def test_alpha_and_clip(backend, alpha, clip):
    shape = (2, 3, 5, 7)
    eps, dense = make_eps("(N,C,H,W)", shape, backend.device)
    x_adv, grad, x = make_images(shape, torch.float32, backend.device, dense)
    expected = oracle(x_adv, grad, x, dense, alpha, clip or (-np.inf, np.inf))
    assert_same(pgd_step(x_adv, grad, x, eps, alpha, clip), expected)
    assert_same(pgd_step_(x_adv, grad, x, eps, alpha, clip=clip), expected)


@pytest.mark.thin(5)
@dtypes
@layouts
def test_mixed_memory_formats_follow_x_adv(backend, layout, dtype):
    shape = (2, 3, 5, 7)
    eps, dense = make_eps("(N,1,H,W)", shape, backend.device)
    x_adv, grad, x = make_images(shape, dtype, backend.device, dense)
    expected = oracle(x_adv, grad, x, dense)
    for others in LAYOUTS:
        result = pgd_step(lay(x_adv, layout), lay(grad, others), lay(x, others), eps, ALPHA)
        assert_same(result, expected, others)
        assert_format(result, lay(x_adv, layout))


@pytest.mark.thin(5)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@dtypes
def test_many_threads(backend, dtype, layout):
    # Past what one thread is given, and no multiple of a vector.
    shape = (1, 3, 8, 129) if backend.interpreted else (3, 3, 131, 127)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for eps_form in ("float", "(N,1,H,W)", "PackedEpsilon M=1", "PackedEpsilon M=C"):
            eps, dense = make_eps(eps_form, shape, backend.device)
            x_adv, grad, x = (lay(t, layout) for t in make_images(shape, dtype, backend.device, dense))
            expected = oracle(x_adv, grad, x, dense)
            assert_same(pgd_step(x_adv, grad, x, eps, ALPHA), expected, eps_form)
            assert_same(pgd_step_(x_adv, grad, x, eps, ALPHA), expected, eps_form)
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
        x_adv, grad, x = make_images(shape, dtype, backend.device, dense)
        x_adv, grad, x = lay(with_nan(x_adv), layout), lay(grad, layout), lay(with_nan(x), layout)
        expected = x_adv.isnan() | x.isnan() | dense.isnan()
        result = pgd_step(x_adv, grad, x, eps, ALPHA)
        assert torch.equal(result.isnan(), expected)
        assert_same(result, oracle(x_adv, grad, x, dense), shape)
        assert_same(pgd_step_(x_adv, grad, x, eps, ALPHA), result, shape)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@dtypes
def test_special_gradients_by_hand(backend, dtype, layout):
    values = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 6e-8, -6e-8, 3.0]
    grad = lay(torch.tensor(values, dtype=dtype, device=backend.device).view(1, 1, 1, 8), layout)
    x = torch.full_like(grad, 0.5)
    result = pgd_step(x, grad, x, 0.25, 0.125)
    assert result.flatten().tolist() == [0.5, 0.5, 0.5, 0.625, 0.375, 0.625, 0.375, 0.625]


@pytest.mark.parametrize("form", ["float", "tensor", "packed"])
def test_infinite_images(backend, form):
    inf = float("inf")
    x_adv = torch.tensor([inf, -inf, 0.5, inf], device=backend.device).view(1, 1, 2, 2)
    x = torch.tensor([0.5, 0.5, inf, inf], device=backend.device).view(1, 1, 2, 2)
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=backend.device)
    eps = {"float": 0.25, "tensor": torch.full_like(x, 0.25), "packed": PackedEpsilon.pack(mask, 0.25, 0.0)}[form]
    result = pgd_step(x_adv, torch.zeros_like(x), x, eps, 0.1, None).flatten().tolist()
    assert result[:3] == [0.75, 0.25, inf]
    assert np.isnan(result[3])  # inf - inf


def test_bits_past_the_last_pixel_are_not_read(backend):
    shape = (2, 3, 5, 5)  # 25 pixels: seven bits of the last byte mean nothing
    eps, dense = make_eps("PackedEpsilon M=C", shape, backend.device)
    bits = eps.bits.clone()
    bits[..., -1] |= 0b11111110
    dirty = PackedEpsilon(bits, eps.size, eps.eps, eps.eps_low)
    x_adv, grad, x = make_images(shape, torch.float32, backend.device, dense)
    assert_same(pgd_step(x_adv, grad, x, dirty, ALPHA), oracle(x_adv, grad, x, dense))


images = st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
draws = given(
    shape=images,
    seed=st.integers(0, 2**31),
    eps_form=st.sampled_from(EPS_FORMS),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(list(DTYPES.values())),
)


@draws
def test_stays_in_the_ball_and_in_the_clip(backend, shape, seed, eps_form, layout, dtype):
    torch.manual_seed(seed)
    eps, dense = make_eps(eps_form, shape, backend.device)
    x_adv, grad, x = (lay(t, layout) for t in make_images(shape, dtype, backend.device, dense))
    result = pgd_step(x_adv, grad, x, eps, ALPHA)
    assert bool(((result >= 0) & (result <= 1)).all())
    # Half a unit in the last place of a number up to 2, in float32 (float64) and again in the storage dtype.
    slack = torch.finfo(dtype).eps + torch.finfo(compute_dtype(dtype)).eps
    assert bool(((result.double() - x.double()).abs() <= dense + slack).all())


@draws
def test_samples_do_not_meet(backend, shape, seed, eps_form, layout, dtype):
    torch.manual_seed(seed)
    eps, dense = make_eps(eps_form, shape, backend.device)
    x_adv, grad, x = (lay(t, layout) for t in make_images(shape, dtype, backend.device, dense))
    order = torch.randperm(shape[0], device=backend.device)
    per_sample = isinstance(eps, PackedEpsilon) or (isinstance(eps, Tensor) and eps.ndim == 4 and eps.shape[0] > 1)
    shuffled = pgd_step(x_adv[order], grad[order], x[order], eps[order] if per_sample else eps, ALPHA)
    assert_same(shuffled, pgd_step(x_adv, grad, x, eps, ALPHA)[order])


@draws
def test_gradient_scale_does_not_matter(backend, shape, seed, eps_form, layout, dtype):
    torch.manual_seed(seed)
    eps, dense = make_eps(eps_form, shape, backend.device)
    x_adv, grad, x = (lay(t, layout) for t in make_images(shape, dtype, backend.device, dense))
    assert_same(pgd_step(x_adv, grad * 8, x, eps, ALPHA), pgd_step(x_adv, grad, x, eps, ALPHA))


def away_from_ties(eps_form, device, dtype=torch.float64):
    """(x_adv, grad, x, eps) whose every pixel is at least 0.01 from where the derivative jumps, and of every kind:
    inside, above, below, clipped at 0 and at 1. alpha is 0.125."""
    shape = (2, 3, 2, 3)
    eps, _ = make_eps(eps_form, shape, device)
    if isinstance(eps, Tensor):
        eps = ((torch.rand(eps.shape, dtype=torch.float64, device=device) + 1) / 4).to(dtype)  # 0.25 to 0.5
        dense = eps.double().expand(shape)
    elif isinstance(eps, PackedEpsilon):
        eps = PackedEpsilon(eps.bits, eps.size, 0.5, 0.25)
        dense = eps.dense().double().expand(shape)
    else:
        eps, dense = 0.375, torch.full(shape, 0.375, dtype=torch.float64, device=device)
    grad = torch.randn(shape, dtype=torch.float64, device=device)
    x = torch.rand(shape, dtype=torch.float64, device=device)
    relative = torch.where(torch.rand(shape, device=device) < 0.5, 0.4, 1.4) + 0.3 * torch.rand(shape, device=device)
    moved = relative * dense * torch.randn(shape, device=device).sign()
    result = x + moved.clamp(-dense, dense)
    # Shift both images where the result would lie close to 0 or 1.
    shift = torch.where((result.abs() < 0.03) | ((result - 1).abs() < 0.03), 0.1, 0.0)
    x = x + shift
    x_adv = x + moved - 0.125 * grad.sign()
    return x_adv.to(dtype), grad.to(dtype), x.to(dtype), eps


@pytest.mark.thin(5)
@pytest.mark.parametrize("eps_form", EPS_FORMS)
def test_gradcheck(backend, eps_form):
    x_adv, grad, x, eps = away_from_ties(eps_form, backend.device)
    leaves = [t.requires_grad_() for t in (x_adv, x, eps) if isinstance(t, Tensor)]
    result = pgd_step(x_adv, grad, x, eps, 0.125)
    assert bool((result == 0).any() and (result == 1).any())  # the sample has clipped pixels

    fast = backend.interpreted or eps_form != "(N,1,H,W)"

    def step(x_adv, x, eps=eps):
        return pgd_step(x_adv, grad, x, eps, 0.125)

    assert torch.autograd.gradcheck(step, leaves, fast_mode=fast, check_undefined_grad=not backend.interpreted)


def expected_gradients(weight, x_adv, grad, x, dense, alpha, clip):
    """Gradients of (weight * pgd_step).sum() for x_adv, x and each pixel's eps, by cases, in numpy."""
    kind = np.float64 if x_adv.dtype == torch.float64 else np.float32
    a, n, e = (t.detach().cpu().to(compute_dtype(x_adv.dtype)).numpy() for t in (x_adv, x, dense))
    g, out = grad.cpu().double().numpy(), weight.cpu().double().numpy()
    sign = (g > 0).astype(kind) - (g < 0).astype(kind)
    moved = (a + kind(alpha) * sign) - n
    result = n + np.minimum(np.maximum(moved, -e), e)
    out = np.where((result < kind(clip[0])) | (result > kind(clip[1])), 0, out)
    above, below = moved > e, moved < -e
    split = (
        np.where(above | below, 0, out),
        np.where(above | below, out, 0),
        np.where(above, out, 0) - np.where(below, out, 0),
    )
    return [torch.from_numpy(part) for part in split]


@pytest.mark.thin(5)
@eps_forms
@layouts
@dtypes
def test_gradients_by_cases(backend, dtype, layout, eps_form):
    for shape in image_shapes(backend, dtype, layout, eps_form)[:4]:
        eps, dense = make_eps(eps_form, shape, backend.device)
        x_adv, grad, x = (lay(t, layout) for t in make_images(shape, dtype, backend.device, dense))
        weight = torch.randn(shape, device=backend.device).to(dtype)
        grad.requires_grad_()
        leaves = [t.requires_grad_() for t in (x_adv, x, eps) if isinstance(t, Tensor)]
        result = pgd_step(x_adv, grad, x, eps, ALPHA)
        assert_same(result.detach(), oracle(x_adv.detach(), grad.detach(), x.detach(), dense))
        # The gradient arrives in the other memory format than the images'.
        other = lay(weight, "contiguous" if layout.endswith("channels_last") else "channels_last")
        got = torch.autograd.grad(result, [*leaves, grad], other)
        expected = expected_gradients(weight, x_adv, grad.detach(), x, dense, ALPHA, (0, 1))
        for value, wanted, leaf in zip(got[:2], expected[:2], leaves[:2], strict=True):
            assert_same(value, wanted.to(backend.device, dtype), shape)
            assert_format(value, leaf)
        if isinstance(eps, Tensor):
            summed = expected[2].to(backend.device).sum_to_size(eps.shape)
            torch.testing.assert_close(
                got[2], summed.to(eps.dtype), rtol=1e-5, atol=1e-5
            )  # a float32 sum of terms near 1
        assert_same(got[-1], torch.zeros_like(grad), shape)


@dtypes
def test_on_the_bound_the_gradient_is_x_advs(backend, dtype):
    # Multiples of 1/16, exact in every dtype: two pixels on the bound, two on the clip, one NaN.
    x = torch.tensor([0.5, 0.5, 0.25, 0.75, float("nan"), 0.5], dtype=dtype, device=backend.device).view(1, 1, 2, 3)
    x_adv = torch.tensor([0.75, 0.25, 0.0, 1.0, 0.5, 0.875], dtype=dtype, device=backend.device).view(1, 1, 2, 3)
    eps = torch.full((), 0.25, dtype=dtype, device=backend.device)
    x_adv, x, eps = (t.requires_grad_() for t in (x_adv, x, eps))
    result = pgd_step(x_adv, torch.zeros_like(x), x, eps, 0.125)
    g_adv, g_x, g_eps = torch.autograd.grad(result, (x_adv, x, eps), torch.ones_like(result))
    assert g_adv.flatten().tolist() == [1, 1, 1, 1, 1, 0]
    assert g_x.flatten().tolist() == [0, 0, 0, 0, 0, 1]
    assert g_eps.item() == 1


def test_only_asked_gradients(backend):
    x_adv, grad, x, eps = away_from_ties("(N,1,H,W)", backend.device)
    named = {"x_adv": x_adv, "grad": grad, "x": x, "eps": eps}
    for name, leaf in named.items():
        tensors = {**named, name: leaf.clone().requires_grad_()}
        result = pgd_step(**tensors, alpha=0.125)
        assert result.requires_grad
        (got,) = torch.autograd.grad(result.sum(), tensors[name])
        assert got.shape == leaf.shape
        assert bool((got != 0).any()) == (name != "grad")
        with torch.no_grad():
            assert not pgd_step(**tensors, alpha=0.125).requires_grad
    assert not pgd_step(**named, alpha=0.125).requires_grad


def test_second_derivative_by_cases(backend):
    x_adv, grad, x, eps = away_from_ties("float", backend.device)
    x_adv.requires_grad_()
    result = pgd_step(x_adv, grad, x, eps, 0.125)
    (first,) = torch.autograd.grad((result * result).sum(), x_adv, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x_adv)
    assert_same(second, torch.where(first.detach() != 0, 2.0, 0.0).to(second.dtype))  # that of a square, where it moves
    assert second.unique().numel() == 2


def small(device, requires_grad=()):
    x_adv, grad, x, eps = away_from_ties("(N,1,H,W)", device, torch.float32)
    return [
        t.requires_grad_(name in requires_grad)
        for name, t in zip(("x_adv", "grad", "x", "eps"), (x_adv, grad, x, eps), strict=True)
    ]


def test_in_place_under_no_grad_voids_saved_values(backend):
    x_adv, grad, x, eps = small(backend.device)
    leaf = x_adv.clone().requires_grad_()
    product = leaf * 1
    loss = (product * product).sum()  # saves product
    with torch.no_grad():
        pgd_step_(product, grad, x, eps, ALPHA)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_records_its_gradient(backend):
    def gradients(step):
        x_adv, grad, x, eps = small(backend.device, requires_grad=("x_adv", "grad", "x", "eps"))
        copy = x_adv * 1
        result = step(copy, grad, x, eps, 0.125)
        return result, copy, torch.autograd.grad((result * result).sum(), (x_adv, grad, x, eps))

    torch.manual_seed(1)
    result, _, expected = gradients(pgd_step)
    torch.manual_seed(1)
    written, copy, got = gradients(pgd_step_)
    assert written is copy
    assert_same(written.detach(), result.detach())
    for actual, wanted in zip(got, expected, strict=True):
        assert_same(actual, wanted)


def test_in_place_gradient_through_x_alone(backend):
    x_adv, grad, x, eps = small(backend.device, requires_grad=("x",))
    address = x_adv.data_ptr()
    assert pgd_step_(x_adv, grad, x, eps, 0.125) is x_adv
    assert x_adv.requires_grad
    assert x_adv.data_ptr() == address
    (got,) = torch.autograd.grad(x_adv.sum(), x)
    assert set(got.flatten().tolist()) == {0.0, 1.0}


def test_in_place_on_a_leaf_is_refused(backend):
    x_adv, grad, x, eps = small(backend.device, requires_grad=("x_adv",))
    before = x_adv.detach().clone()
    with pytest.raises(RuntimeError, match="leaf Variable"):
        pgd_step_(x_adv, grad, x, eps, ALPHA)
    assert_same(x_adv.detach(), before)
    with torch.no_grad():
        pgd_step_(x_adv, grad, x, eps, ALPHA)
    assert not torch.equal(x_adv.detach(), before)


def test_in_place_in_inference_mode(backend):
    with torch.inference_mode():
        x_adv, grad, x, eps = small(backend.device)
        expected = pgd_step(x_adv, grad, x, eps, ALPHA)
        assert_same(pgd_step_(x_adv, grad, x, eps, ALPHA), expected)


def test_in_place_where_arguments_are_one_tensor(backend):
    x_adv, grad, x, eps = small(backend.device)
    expected = pgd_step(x, grad, x, eps, ALPHA)
    assert_same(pgd_step_(x, grad, x, eps, ALPHA), expected)
    expected = pgd_step(x_adv, x_adv, x, eps, ALPHA)
    assert_same(pgd_step_(x_adv, x_adv, x, eps, ALPHA), expected)


def test_in_place_beside_its_arguments(backend):
    memory = torch.rand(4, 2, 3, 4, 4, device=backend.device)
    x_adv, grad, x, eps = memory.clone()
    expected = pgd_step(x_adv, grad, x, eps, ALPHA)
    assert_same(pgd_step_(memory[0], *memory[1:], ALPHA), expected)


def test_in_place_gradient_where_arguments_are_one_tensor(backend):
    x_adv, grad, _, eps = small(backend.device, requires_grad=("x_adv", "eps"))
    copy = x_adv * 1
    got = torch.autograd.grad(pgd_step_(copy, grad, copy, eps, 0.5).square().sum(), (x_adv, eps))
    copy = x_adv * 1
    expected = torch.autograd.grad(pgd_step(copy, grad, copy, eps, 0.5).square().sum(), (x_adv, eps))
    for actual, wanted in zip(got, expected, strict=True):
        assert_same(actual, wanted)


@pytest.mark.parametrize("argument", ["grad", "x", "eps"])
def test_in_place_where_arguments_overlap_in_part(backend, argument):
    memory = torch.rand(3, 3, 4, 4, device=backend.device)
    arguments = {name: torch.rand(2, 3, 4, 4, device=backend.device) for name in ("grad", "x", "eps")}
    arguments[argument] = memory[1:]
    before, version = memory.clone(), memory._version
    with pytest.raises(ValueError, match=f"^{argument} must"):
        pgd_step_(memory[:2], **arguments, alpha=ALPHA)
    assert_same(memory, before)
    assert memory._version == version


LOW, HIGH = [0.0, 0.25, 0.5], [0.75, 0.5, 1.0]
CLIP_FORMS = {
    "lists": lambda device: (LOW, HIGH),
    "arrays": lambda device: (np.array(LOW), np.array(HIGH)),
    "(C,)": lambda device: tuple(torch.tensor(bound, device=device) for bound in (LOW, HIGH)),
    "(C,1,1)": lambda device: tuple(torch.tensor(bound, device=device).view(3, 1, 1) for bound in (LOW, HIGH)),
    "(1,C,1,1)": lambda device: tuple(torch.tensor(bound, device=device).view(1, 3, 1, 1) for bound in (LOW, HIGH)),
    "float64": lambda device: tuple(torch.tensor(b, device=device, dtype=torch.float64) for b in (LOW, HIGH)),
}


@pytest.mark.thin(3)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("form", CLIP_FORMS)
def test_clip_per_channel(backend, form, layout):
    shape = (2, 3, 5, 7)
    eps, dense = make_eps("(N,C,H,W)", shape, backend.device)
    x_adv, grad, x = (lay(t, layout) for t in make_images(shape, torch.float32, backend.device, dense))
    clip = CLIP_FORMS[form](backend.device)
    expected = oracle(x_adv, grad, x, dense, clip=(LOW, HIGH))
    result = pgd_step(x_adv, grad, x, eps, ALPHA, clip)
    assert_same(result, expected)
    assert_format(result, x_adv)
    assert_same(pgd_step(x_adv, grad, x, eps, ALPHA, (clip[0], 0.5)), oracle(x_adv, grad, x, dense, clip=(LOW, 0.5)))
    version = x_adv._version
    assert pgd_step_(x_adv, grad, x, eps, ALPHA, clip) is x_adv
    assert_same(x_adv, expected)
    assert x_adv._version > version


@pytest.mark.thin(3)
@dtypes
def test_clip_per_channel_rounds_as_two_numbers_do(backend, dtype):
    """Bounds that no dtype holds: clipped in float32 and rounded once, or rounded and then clipped, is the same."""
    low, high = (0.1, 0.3, 0.29), (0.7, 0.31, 0.9)
    for shape in image_shapes(backend, dtype):
        if shape[1] == 3:
            eps, dense = make_eps("(N,C,H,W)", shape, backend.device)
            x_adv, grad, x = make_images(shape, dtype, backend.device, dense)
            result = pgd_step(with_nan(x_adv), grad, x, eps, ALPHA, (low, high))
            for c in range(3):
                one = [t[:, c : c + 1].contiguous() for t in (x_adv, grad, x, eps)]
                expected = pgd_step(*one, ALPHA, (low[c], high[c]))
                known = ~result[:, c : c + 1].isnan()
                assert_same(result[:, c : c + 1][known], expected[known])
            assert_same(
                pgd_step(x_adv, grad, x, eps, ALPHA, ([0.1] * 3, [0.7] * 3)),
                pgd_step(x_adv, grad, x, eps, ALPHA, (0.1, 0.7)),
            )


def test_clip_per_channel_has_the_gradients_of_two_numbers(backend):
    results = []
    for clip in ((0.125, 0.75), ([0.125] * 3, [0.75] * 3)):
        torch.manual_seed(0)
        inputs = [t.requires_grad_() for t in small(backend.device)]
        result = pgd_step(*inputs, 0.125, clip)
        results.append(torch.autograd.grad((result * result).sum(), inputs))
    for one, other in zip(*results, strict=True):
        assert_same(other, one)


def test_clip_per_channel_gives_gradients_on_its_bounds_to_x_adv(backend):
    black_and_white = torch.randint(0, 2, (1, 3, 4, 4), device=backend.device).float()
    zero = torch.zeros_like(black_and_white)
    clip = ([0.0] * 3, [1.0] * 3)

    def step(x_adv):
        return pgd_step(x_adv, zero, black_and_white, 8 / 255, 2 / 255, clip)

    (gradient,) = torch.autograd.grad(step(leaf := black_and_white.clone().requires_grad_()).sum(), leaf)
    assert (gradient == 1).all()
    tangent = torch.func.jvp(step, (black_and_white,), (torch.ones_like(zero),))[1]
    assert (tangent == 1).all()
    in_place = black_and_white.clone().requires_grad_()
    pgd_step_(in_place * 1, zero, black_and_white, 8 / 255, 2 / 255, clip).sum().backward()
    assert (in_place.grad == 1).all()
    assert step(torch.full_like(zero, torch.nan)).isnan().all()
    leaf = torch.full_like(zero, torch.nan).requires_grad_()
    assert step(leaf).isnan().all()


@pytest.mark.parametrize("kind", STRIDED)
def test_strided_images_are_copied(backend, kind):
    shape = (2, 3, 5, 7)
    eps, dense = make_eps("(N,1,H,W)", shape, backend.device)
    x_adv, grad, x = (strided(kind, shape, backend.device) for _ in range(3))
    grad = grad - 0.5 if kind != "gray, expanded" else (grad[:, :1] - 0.5).expand(shape)
    expected = oracle(x_adv, grad, x, dense)
    assert_same(pgd_step(x_adv, grad, x, eps, ALPHA), expected)
    for i in range(3):
        mixed = [t.contiguous() if i == j else t for j, t in enumerate((x_adv, grad, x))]
        assert_same(pgd_step(*mixed, eps, ALPHA), expected)
    assert pgd_step(x_adv, grad, x, eps, ALPHA).is_contiguous(
        memory_format=torch.channels_last if kind == "crop of channels_last" else torch.contiguous_format
    )
    if "expanded" in kind:
        before, version = x_adv.clone(), x_adv._version
        assert_error(lambda: pgd_step_(x_adv, grad, x, eps, ALPHA), "x_adv", ValueError, f"strides {x_adv.stride()}")
        assert_same(x_adv, before)
        assert x_adv._version == version
    else:
        address, stride = x_adv.data_ptr(), x_adv.stride()
        assert pgd_step_(x_adv, grad, x, eps, ALPHA) is x_adv
        assert_same(x_adv, expected)
        assert (x_adv.data_ptr(), x_adv.stride()) == (address, stride)


def test_in_place_writes_a_crop_and_nothing_beside_it(backend):
    whole = torch.rand(2, 3, 8, 8, device=backend.device)
    kept = whole.clone()
    crop, grad = whole[..., 2:6, 1:7], torch.randn(2, 3, 4, 6, device=backend.device)
    expected = pgd_step(crop.clone(), grad, crop.clone(), EPS, ALPHA)
    assert_same(pgd_step_(crop, grad, crop, EPS, ALPHA), expected)  # x is x_adv
    kept[..., 2:6, 1:7] = expected
    assert_same(whole, kept)
    leaf = torch.full((2, 1, 1, 1), ALPHA / 2, device=backend.device, requires_grad=True)
    pgd_step_(crop, grad, crop.clone(), leaf, ALPHA)
    assert torch.autograd.grad(whole.sum(), leaf)[0].abs().sum() > 0


def good(device="cpu", shape=(2, 3, 4, 4)):
    return {
        "x_adv": torch.rand(shape, device=device),
        "grad": torch.randn(shape, device=device),
        "x": torch.rand(shape, device=device),
        "eps": EPS,
        "alpha": ALPHA,
        "clip": (0.0, 1.0),
    }


BAD = [
    *[(name, *row) for name in ("x_adv", "grad", "x") for row in BAD_IMAGES],
    *[(name, *row) for name in ("grad", "x") for row in UNLIKE_IMAGES],
    ("x", torch.zeros(2, 3, 4, 4, dtype=torch.float64), TypeError, "torch.float64"),
    ("x", torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16), TypeError, "torch.bfloat16"),
    *[("eps", *row) for row in BAD_EPS],
    ("alpha", None, TypeError, "NoneType"),
    ("alpha", "0.1", TypeError, "str"),
    ("alpha", torch.tensor(0.1), TypeError, "shape ()"),
    ("alpha", float("nan"), ValueError, "nan"),
    ("alpha", float("inf"), ValueError, "inf"),
    ("clip", (1.0, 0.0), ValueError, "(1.0, 0.0)"),
    ("clip", (0.0, float("nan")), ValueError, "(0.0, nan)"),
    ("clip", (0.0, "1"), ValueError, "(0.0, '1')"),
    ("clip", (0.0,), TypeError, "(0.0,)"),
    ("clip", 1.0, TypeError, "1.0"),
    ("clip", "01", TypeError, "'01'"),
    ("clip", ([0.0, 0.0], 1.0), ValueError, "(2,)"),
    ("clip", (torch.zeros(3, 1), 1.0), ValueError, "(3, 1)"),
    ("clip", (torch.zeros(2, 3, 1, 1), 1.0), ValueError, "(2, 3, 1, 1)"),
    ("clip", (torch.zeros(4, 4), 1.0), ValueError, "(4, 4)"),
    ("clip", (["a", "b", "c"], 1.0), TypeError, "['a', 'b', 'c']"),
    ("clip", (torch.zeros(3, dtype=torch.complex64), 1.0), TypeError, "torch.complex64"),
    ("clip", (torch.zeros(3, requires_grad=True), 1.0), TypeError, "requires a gradient"),
    ("clip", (0.0, torch.ones(3, device="meta")), ValueError, "meta"),
]


@pytest.mark.parametrize("step", [pgd_step, pgd_step_])
@pytest.mark.parametrize(("argument", "value", "error", "got"), BAD)
def test_bad_input(backend, step, argument, value, error, got):
    arguments = {**good(backend.device), argument: on_device(value, backend.device)}
    x_adv = arguments["x_adv"]
    watched = isinstance(x_adv, Tensor) and not x_adv.is_sparse
    before = (x_adv.clone(), x_adv._version) if watched else None
    assert_error(lambda: step(**arguments), argument, error, got)
    if before:
        assert torch.equal(x_adv, before[0])
        assert x_adv._version == before[1]


def test_every_tensor_form_takes_a_gradient(backend):
    for form in TENSOR_EPS_FORMS:
        x_adv, grad, x, eps = away_from_ties(form, backend.device)
        eps.requires_grad_()
        (got,) = torch.autograd.grad(pgd_step(x_adv, grad, x, eps, 0.125).sum(), eps)
        assert got.shape == eps.shape
        assert bool((got != 0).any()), form


def test_clip_per_channel_out_of_order_on_a_cpu():
    clip = ([0.0, 0.6, 0.0], [1.0, 0.5, 1.0])
    assert_error(lambda: pgd_step(**{**good(), "clip": clip}), "clip", ValueError, "[0.0, 0.6, 0.0]")
    assert_error(lambda: pgd_step(**{**good(), "clip": ([float("nan")] * 3, 1.0)}), "clip", ValueError, "nan")
