"""eps_step_: the step and the bank against numpy oracles, bit for bit; rounding by hand; in-place semantics; errors."""

import numpy as np
import pytest
import torch
from conftest import (
    BAD_EPS,
    BAD_IMAGES,
    DTYPES,
    EPS,
    EPS_FORMS,
    STRIDED,
    UNLIKE_IMAGES,
    assert_error,
    assert_format,
    assert_same,
    compute_dtype,
    dtypes,
    image_shapes,
    lay,
    layouts,
    make_eps,
    make_images,
    neighbours_untouched,
    on_device,
    pairs,
    strided,
    with_nan,
)
from hypothesis import given
from hypothesis import strategies as st
from test_bank_start import BAD_BANK, SCALE, every_place, make_bank
from torch import Tensor

from part_fast import bank_start, eps_step_, pgd_step
from part_fast.ops.eps_step import _eps_step_
from part_fast.ops.packed_epsilon import eps_arguments

FACTOR = 1.25
ALPHA = 2 / 255


def oracle(x_adv, grad, x, eps, factor=FACTOR, alpha=None, project=True, clip=(0.0, 1.0)):
    """The definition in numpy: float32 (float64 for float64) throughout, rounded once at the end."""
    compute = compute_dtype(x_adv.dtype)
    kind = np.float64 if compute == torch.float64 else np.float32
    a, n, e = (t.cpu().to(compute).numpy() for t in (x_adv, x, eps))
    g = grad.cpu().double().numpy()
    with np.errstate(invalid="ignore"):
        sign = (g > 0).astype(kind) - (g < 0).astype(kind)
        step = kind(factor) * e if alpha is None else kind(alpha)
        moved = (a + step * sign) - n
        result = n + (np.minimum(np.maximum(moved, -e), e) if project else moved)
        if clip is not None:
            low, high = (np.asarray(bound, dtype=kind).reshape(-1, 1, 1) for bound in clip)
            result = np.minimum(np.maximum(result, low), high)
    assert result.dtype == kind
    return torch.from_numpy(np.asarray(result)).to(x_adv.device, x_adv.dtype)


def stored_by_hand(bank, places, x_adv, x, scale=SCALE):
    """The bank after a step that left x_adv: levels flipped back, and put to where the crop was taken."""
    compute = compute_dtype(x.dtype)
    kind = np.float64 if compute == torch.float64 else np.float32
    new, natural = (t.cpu().to(compute).numpy() for t in (x_adv, x))
    with np.errstate(invalid="ignore"):
        level = np.rint((new - natural) * kind(127 / scale))
        level = np.where(np.isnan(level), 0, np.clip(level, -127, 127)).astype(np.int8)
    out = bank.cpu().numpy().copy()
    height, width = out.shape[2:]
    for n, (sample, dy, dx, flip) in enumerate(places.cpu().tolist()):
        wide = np.full((out.shape[1], 5 * height + 4, 5 * width + 4), 999)  # no level
        top, left = 2 * height + 2 + dy, 2 * width + 2 + dx
        wide[:, top : top + height, left : left + width] = level[n, :, :, ::-1] if flip else level[n]
        own = wide[:, 2 * height + 2 : 3 * height + 2, 2 * width + 2 : 3 * width + 2]
        out[sample] = np.where(own == 999, out[sample], own)
    return torch.from_numpy(out).to(bank.device)


def test_the_bank_of_images_that_are_x_adv_itself_is_the_step(backend):
    """With a clip per channel too, which comes after the step and before what is stored."""
    shape = (2, 3, 5, 7)
    x_adv, grad, _ = make_images(shape, torch.float32, backend.device, torch.full(shape, EPS, device=backend.device))
    images, (before, places) = x_adv.clamp(0, 1), make_bank(shape, backend.device)
    for clip in ((0.0, 1.0), ([0.0] * 3, [1.0] * 3)):
        x, bank = images.clone(), before.clone()
        eps_step_(x, grad, x, EPS, 1.0, clip, bank=bank, places=places, scale=EPS)
        assert_same(bank, stored_by_hand(before, places, x, images, EPS))


@pytest.mark.thin(7)
@pairs
def test_matches_numpy_bit_for_bit(backend, dtype, layout, eps_form):
    for shape in image_shapes(backend, dtype, layout, eps_form):
        eps, dense = make_eps(eps_form, shape, backend.device)
        x_adv, grad, x = (lay(t, layout) for t in make_images(shape, dtype, backend.device, dense))
        bank, places = make_bank(shape, backend.device)
        expected = oracle(x_adv, grad, x, dense)
        stored = stored_by_hand(bank, places, expected, x)
        for kept in ({}, {"bank": bank, "places": places, "scale": SCALE}):
            laid = lay(x_adv, layout)
            versions, address = (laid._version, bank._version), laid.data_ptr()
            assert eps_step_(laid, grad, x, eps, FACTOR, **kept) is laid
            assert_same(laid, expected, shape)
            assert laid._version > versions[0]
            assert (bank._version > versions[1]) == bool(kept)
            assert laid.data_ptr() == address
            assert all(neighbours_untouched(t) for t in (laid, grad, x))
        assert_same(bank, stored, shape)


@pytest.mark.thin(3)
@pytest.mark.parametrize("grad_dtype", DTYPES.values(), ids=DTYPES.keys())
@dtypes
def test_any_pair_of_dtypes(backend, dtype, grad_dtype):
    for shape in image_shapes(backend, dtype, grad_dtype):
        eps, dense = make_eps("(N,1,H,W)", shape, backend.device, grad_dtype)
        x_adv, grad, x = make_images(shape, dtype, backend.device, dense, grad_dtype)
        expected = oracle(x_adv, grad, x, dense)
        bank, places = make_bank(shape, backend.device)
        stored = stored_by_hand(bank, places, expected, x)
        assert_same(eps_step_(x_adv.clone(), grad, x, eps, FACTOR), expected, shape)
        assert_same(eps_step_(x_adv, grad, x, eps, FACTOR, bank=bank, places=places, scale=SCALE), expected, shape)
        assert_same(bank, stored, shape)


CLIPS = [(0.0, 1.0), (0.25, 0.5), None, ([0.1, 0.2, 0.3], [0.6, 0.7, 0.8])]


@pytest.mark.thin(7)
@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("project", [True, False], ids=["projected", "free"])
@pytest.mark.parametrize("step", [{"factor": 1.0}, {"factor": -0.5}, {"alpha": ALPHA}, {"alpha": -0.1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_step_projection_and_clip(backend, dtype, step, project, clip):
    shape = (2, 3, 5, 7)
    eps, dense = make_eps("(N,C,H,W)", shape, backend.device)
    x_adv, grad, x = make_images(shape, dtype, backend.device, dense)
    bank, places = make_bank(shape, backend.device)
    expected = oracle(x_adv, grad, x, dense, project=project, clip=clip, **step)
    stored = stored_by_hand(bank, places, expected, x)
    assert_same(eps_step_(x_adv.clone(), grad, x, eps, **step, clip=clip, project=project), expected)
    kept = {"bank": bank, "places": places, "scale": SCALE}
    assert_same(eps_step_(x_adv, grad, x, eps, **step, clip=clip, project=project, **kept), expected)
    assert_same(bank, stored)


@pytest.mark.parametrize("eps_form", EPS_FORMS)
def test_with_alpha_it_is_pgd_step(backend, eps_form):
    shape = (2, 3, 5, 7)
    eps, dense = make_eps(eps_form, shape, backend.device)
    x_adv, grad, x = make_images(shape, torch.float32, backend.device, dense)
    expected = pgd_step(x_adv, grad, x, eps, ALPHA)
    assert_same(eps_step_(x_adv, grad, x, eps, alpha=ALPHA), expected)


@pytest.mark.thin(3)
@pytest.mark.parametrize("eps_form", ["float", "(N,1,H,W)", "PackedEpsilon M=1"])
@layouts
@dtypes
def test_nan_reaches_the_output_and_is_stored_as_0(backend, dtype, layout, eps_form):
    shape = (2, 3, 5, 7)
    eps, dense = make_eps(eps_form, shape, backend.device)
    if isinstance(eps, Tensor):
        eps = with_nan(eps)
        dense = eps.double().expand(shape)
    x_adv, grad, x = make_images(shape, dtype, backend.device, dense)
    x_adv, grad, x = lay(with_nan(x_adv), layout), lay(grad, layout), lay(with_nan(x), layout)
    expected = oracle(x_adv, grad, x, dense)
    assert torch.equal(expected.isnan(), x_adv.isnan() | x.isnan() | dense.isnan())
    bank, places = make_bank(shape, backend.device)
    stored = stored_by_hand(bank, places, expected, x)
    assert_same(eps_step_(x_adv, grad, x, eps, FACTOR, bank=bank, places=places, scale=SCALE), expected)
    assert_same(bank, stored)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@dtypes
def test_special_gradients_by_hand(backend, dtype, layout):
    values = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 6e-8, -6e-8, 3.0]
    grad = lay(torch.tensor(values, dtype=dtype, device=backend.device).view(1, 1, 1, 8), layout)
    x = torch.full_like(grad, 0.5)
    result = eps_step_(x.clone(), grad, x, 0.25, 0.5)
    assert result.flatten().tolist() == [0.5, 0.5, 0.5, 0.625, 0.375, 0.625, 0.375, 0.625]


def test_negative_zero(backend):
    """Images and gradients of -0 are those of 0, and a perturbation of -0 is stored as 0."""
    zero = torch.zeros(1, 1, 2, 4, device=backend.device)
    eps = torch.tensor([0.0, 0.25], device=backend.device).view(1, 1, 2, 1)
    for x_adv, grad, x in ((-zero, zero, -zero), (zero, -zero, -zero), (-zero, -zero, zero), (-zero, zero - 1, -zero)):
        bank = torch.full((1, 1, 2, 4), 9, dtype=torch.int8, device=backend.device)
        places = torch.zeros(1, 4, dtype=torch.int64, device=backend.device)
        result = eps_step_(x_adv.clone(), grad, x, eps, 1.0, None, bank=bank, places=places, scale=1.0)
        expected = torch.where(grad < 0, -eps, zero)
        assert_same(result, expected)
        assert_same(bank, torch.where(expected < 0, -32, 0).to(torch.int8))  # -0.25 * 127 is -31.75


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@dtypes
def test_halves_go_to_even_levels_by_hand(backend, dtype, layout):
    """Levels of 1/256: perturbations of whole, half and quarter levels, and past the last, none of them rounded."""
    halves = torch.arange(-260, 261, device=backend.device) / 2
    x_adv = torch.cat([halves / 256, torch.tensor([float("inf"), -float("inf"), float("nan")], device=backend.device)])
    x_adv = lay(x_adv.to(dtype).view(1, 1, 4, 131), layout)
    exact = dtype != torch.bfloat16  # which has no room for nine digits
    assert not exact or torch.equal(x_adv.flatten()[:521].double(), halves.double() / 256)
    x, grad = torch.zeros_like(x_adv), torch.zeros_like(x_adv)
    bank = torch.zeros(1, 1, 4, 131, dtype=torch.int8, device=backend.device)
    places = torch.zeros(1, 4, dtype=torch.int64, device=backend.device)
    given = [float(v) for v in x_adv.flatten()[:521]]
    eps_step_(x_adv, grad, x, 1e9, alpha=0.0, clip=None, project=False, bank=bank, places=places, scale=127 / 256)
    # Python rounds halves to even, too.
    assert bank.flatten().tolist() == [max(-127, min(127, round(v * 256))) for v in given] + [127, -127, 0]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("eps_form", ["float", "(N,1,H,W)", "PackedEpsilon M=C"])
def test_every_crop_and_flip_goes_back(backend, layout, eps_form):
    places = every_place(3, 4)[:: 13 if backend.interpreted else 1].to(backend.device)
    places[:, 0] = torch.arange(len(places)).flip(0)
    shape = (len(places), 2, 3, 4)
    eps, dense = make_eps(eps_form, shape, backend.device)
    bank = torch.randint(-127, 128, (len(places) + 1, *shape[1:]), dtype=torch.int8, device=backend.device)
    x_adv, grad, x = (lay(t, layout) for t in make_images(shape, torch.float32, backend.device, dense))
    expected = oracle(x_adv, grad, x, dense)
    stored = stored_by_hand(bank, places, expected, x)
    eps_step_(x_adv, grad, x, eps, FACTOR, bank=bank, places=places, scale=SCALE)
    assert_same(bank, stored)
    # What comes back is what was there, where the crop has it, within half a level.
    clear = [t.clone() for t in (x, x_adv)]
    back = bank_start(clear[0], bank, places, 1.0, None, scale=SCALE)
    inside = torch.from_numpy(
        np.array(
            [
                [[0 <= r + dy < 3 and 0 <= (3 - c if flip else c) + dx < 4 for c in range(4)] for r in range(3)]
                for _, dy, dx, flip in places.tolist()
            ]
        )
    ).to(backend.device)
    wanted = torch.where(inside[:, None], (x_adv - x).clamp(-SCALE, SCALE), 0.0)
    # Half a level, and two roundings of numbers below 2.
    assert ((back - x) - wanted).abs().max() <= SCALE / 254 + 2**-22


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("eps_form", ["float", "(N,1,H,W)", "PackedEpsilon M=C"])
@dtypes
def test_unknown_samples_write_nothing(backend, dtype, layout, eps_form):
    """What a GPU does, where the values of places are not read before; the step is taken all the same."""
    shape = (5, 3, 5, 7)
    eps, dense = make_eps(eps_form, shape, backend.device)
    x_adv, grad, x = (lay(t, layout) for t in make_images(shape, dtype, backend.device, dense))
    bank, places = make_bank(shape, backend.device)
    unknown = {0: -1, 2: len(bank), 3: 2**62}
    known = [row for row in range(5) if row not in unknown]
    expected = oracle(x_adv, grad, x, dense)
    stored = stored_by_hand(bank, places[known], expected[known], x[known])
    for row, sample in unknown.items():
        places[row, 0] = sample
    _eps_step_(
        x_adv, grad, x, *eps_arguments(eps, x), FACTOR, True, True, 0.0, 1.0, bank, places, 127 / SCALE
    )  # fmt: skip
    assert_same(x_adv, expected)
    assert_same(bank, stored)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@dtypes
def test_many_threads(backend, dtype, layout):
    shape = (1, 3, 8, 129) if backend.interpreted else (3, 3, 61, 127)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for eps_form in ("float", "(N,1,H,W)", "PackedEpsilon M=1", "PackedEpsilon M=C")[
            :: 3 if backend.interpreted else 1
        ]:
            eps, dense = make_eps(eps_form, shape, backend.device)
            x_adv, grad, x = (lay(t, layout) for t in make_images(shape, dtype, backend.device, dense))
            expected = oracle(x_adv, grad, x, dense)
            bank, places = make_bank(shape, backend.device)
            stored = stored_by_hand(bank, places, expected, x)
            eps_step_(x_adv, grad, x, eps, FACTOR, bank=bank, places=places, scale=SCALE)
            assert_same(x_adv, expected, eps_form)
            assert_same(bank, stored, eps_form)
    finally:
        torch.set_num_threads(before)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**31),
    eps_form=st.sampled_from(EPS_FORMS),
    layout=st.sampled_from(("contiguous", "channels_last")),
    dtype=st.sampled_from(list(DTYPES.values())),
)
def test_stays_in_the_ball_and_in_the_clip(backend, shape, seed, eps_form, layout, dtype):
    torch.manual_seed(seed)
    eps, dense = make_eps(eps_form, shape, backend.device)
    x_adv, grad, x = (lay(t, layout) for t in make_images(shape, dtype, backend.device, dense))
    bank, places = make_bank(shape, backend.device)
    others = torch.ones(len(bank), dtype=torch.bool, device=backend.device)
    others[places[:, 0]] = False
    kept = bank.clone()
    result = eps_step_(x_adv, grad, x, eps, FACTOR, bank=bank, places=places, scale=SCALE)
    assert bool(((result >= 0) & (result <= 1)).all())
    slack = torch.finfo(dtype).eps + torch.finfo(compute_dtype(dtype)).eps  # half a unit of a number up to 2, twice
    assert bool(((result.double() - x.double()).abs() <= dense + slack).all())
    assert torch.equal(bank[others], kept[others])


def small(device):
    eps, dense = make_eps("(N,1,H,W)", (2, 3, 5, 7), device)
    return *make_images((2, 3, 5, 7), torch.float32, device, dense), eps


def test_in_place_voids_saved_values(backend):
    _, grad, x, eps = small(backend.device)
    leaf = torch.rand_like(x).requires_grad_()
    product = leaf * 1
    loss = (product * product).sum()  # saves product
    with torch.no_grad():
        eps_step_(product, grad, x, eps, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("argument", ["x_adv", "grad", "x", "eps"])
def test_a_gradient_is_refused(backend, argument):
    given = dict(zip(("x_adv", "grad", "x", "eps"), small(backend.device), strict=True))
    given[argument] = given[argument].requires_grad_()
    kept = given["x_adv"].detach().clone()
    assert_error(lambda: eps_step_(**given, factor=1.0), argument, TypeError, "require a gradient")
    assert torch.equal(given["x_adv"], kept)
    with torch.no_grad():
        eps_step_(**given, factor=1.0)
    assert not torch.equal(given["x_adv"], kept)


def test_refused_inside_transforms():
    x_adv, grad, x, eps = small("cpu")
    with pytest.raises(RuntimeError, match=r"^eps_step_ must be used outside of torch\.func"):
        torch.vmap(lambda a: eps_step_(a, grad, x, eps, 1.0))(x_adv[None])


@dtypes
def test_in_place_where_arguments_are_one_tensor(backend, dtype):
    shape = (2, 3, 5, 7)
    x_adv, grad, x, eps = (t.to(dtype) for t in small(backend.device))
    dense = eps.double().expand(shape)
    for one, two, three in ((x, grad, x), (x_adv, x_adv, x)):
        bank, places = make_bank(shape, backend.device)
        expected = oracle(one, two, three, dense)
        stored = stored_by_hand(bank, places, expected, three)
        written = one.clone()
        two, three = (written if t is one else t for t in (two, three))
        eps_step_(written, two, three, eps, FACTOR, bank=bank, places=places, scale=SCALE)
        assert_same(written, expected)
        assert_same(bank, stored)


@pytest.mark.parametrize("argument", ["grad", "x", "eps"])
def test_in_place_where_arguments_overlap_in_part(backend, argument):
    memory = torch.rand(3, 3, 4, 4, device=backend.device)
    arguments = {name: torch.rand(2, 3, 4, 4, device=backend.device) for name in ("grad", "x", "eps")}
    arguments[argument] = memory[1:]
    before, version = memory.clone(), memory._version
    with pytest.raises(ValueError, match=f"^{argument} must"):
        eps_step_(memory[:2], **arguments, factor=1.0)
    assert_same(memory, before)
    assert memory._version == version


@pytest.mark.parametrize("kind", STRIDED)
def test_strided_images_are_written(backend, kind):
    shape = (2, 3, 5, 7)
    eps, dense = make_eps("(N,1,H,W)", shape, backend.device)
    x_adv, x = (strided(kind, shape, backend.device) for _ in range(2))
    grad = torch.randn(shape, device=backend.device)
    bank, places = make_bank(shape, backend.device)
    expected = oracle(x_adv, grad, x, dense)
    if "expanded" in kind:
        before, kept = x_adv.clone(), bank.clone()
        call = lambda: eps_step_(x_adv, grad, x, eps, FACTOR, bank=bank, places=places, scale=SCALE)  # noqa: E731
        assert_error(call, "x_adv", ValueError, f"strides {x_adv.stride()}")
        assert_same(x_adv, before)
        assert_same(bank, kept)
    else:
        stored = stored_by_hand(bank, places, expected, x)
        address, stride = x_adv.data_ptr(), x_adv.stride()
        assert eps_step_(x_adv, grad, x, eps, FACTOR, bank=bank, places=places, scale=SCALE) is x_adv
        assert_same(x_adv, expected)
        assert_same(bank, stored)
        assert (x_adv.data_ptr(), x_adv.stride()) == (address, stride)


def test_mixed_memory_formats_follow_x_adv(backend):
    x_adv, grad, x, eps = small(backend.device)
    expected = oracle(x_adv, grad, x, eps.double().expand(x.shape))
    for layout in ("contiguous", "channels_last"):
        for others in ("contiguous", "channels_last"):
            laid = lay(x_adv, layout)
            assert_same(eps_step_(laid, lay(grad, others), lay(x, others), eps, FACTOR), expected, (layout, others))
            assert_format(laid, lay(x_adv, layout))


def test_two_images_of_one_sample():
    arguments = good()
    arguments["places"][:, 0] = 1
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    assert_error(lambda: eps_step_(**arguments), "places", ValueError, "1 samples for 2 images")
    for name, value in before.items():
        assert_same(arguments[name], value, name)


def good(device="cpu"):
    bank, places = make_bank((2, 3, 4, 4), device)
    return {
        "x_adv": torch.rand(2, 3, 4, 4, device=device), "grad": torch.randn(2, 3, 4, 4, device=device),
        "x": torch.rand(2, 3, 4, 4, device=device), "eps": EPS, "factor": FACTOR,
        "bank": bank, "places": places, "scale": SCALE,
    }  # fmt: skip


BAD = [
    *[(name, *row) for name in ("x_adv", "grad", "x") for row in BAD_IMAGES],
    *[(name, *row) for name in ("grad", "x") for row in UNLIKE_IMAGES],
    ("x", torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16), TypeError, "torch.bfloat16"),
    *[("eps", *row) for row in BAD_EPS],
    *[row if row[1] is not None else (*row[:2], TypeError, "None") for row in BAD_BANK],
    ("factor", None, ValueError, "None and None"),
    ("factor", "1", TypeError, "str"),
    ("factor", float("nan"), ValueError, "nan"),
    ("project", 1, TypeError, "1"),
    ("clip", (1.0, 0.0), ValueError, "(1.0, 0.0)"),
    ("clip", (torch.zeros(4, 4), 1.0), ValueError, "(4, 4)"),
]


@pytest.mark.parametrize(("argument", "value", "error", "got"), BAD)
def test_bad_input(backend, monkeypatch, argument, value, error, got):
    monkeypatch.setenv("PART_FAST_CHECK", "1")
    arguments = {**good(backend.device), argument: on_device(value, backend.device)}
    kept = {name: t.clone() for name, t in arguments.items() if name in ("x_adv", "bank") and name != argument}
    assert_error(lambda: eps_step_(**arguments), argument, error, got)
    for name, before in kept.items():
        assert torch.equal(arguments[name], before)


def test_factor_and_alpha_are_not_given_both():
    assert_error(lambda: eps_step_(**good(), alpha=ALPHA), "factor", ValueError, f"{FACTOR} and {ALPHA}")


@pytest.mark.parametrize("value", [None, "0.1", float("inf")])
def test_bad_alpha(value):
    arguments = {**good(), "factor": None, "alpha": value}
    argument = "factor" if value is None else "alpha"
    error = TypeError if isinstance(value, str) else ValueError
    assert_error(lambda: eps_step_(**arguments), argument, error, str(value) if value != "0.1" else "str")
