"""bank_start: against the perturbation moved by hand, for every crop and flip; forms, dtypes, layouts; errors."""

import itertools

import numpy as np
import pytest
import torch
from conftest import (
    BAD_EPS,
    BAD_IMAGES,
    EPS,
    STRIDED,
    assert_error,
    assert_format,
    assert_same,
    compute_dtype,
    dtypes,
    image_shapes,
    lay,
    make_eps,
    neighbours_untouched,
    on_device,
    pairs,
    strided,
    with_nan,
)
from torch import Tensor

import part_fast
from part_fast import bank_start
from part_fast.data.memory import Augmentation
from part_fast.ops.bank_start import _bank_start

SCALE = 10 / 255


def make_bank(shape, device, samples=None):
    """(bank, places): a bank of a few samples more than images, and for each image another sample, crop and flip."""
    n, c, h, w = shape
    samples = n + 2 if samples is None else samples
    bank = torch.randint(-127, 128, (samples, c, h, w), dtype=torch.int8, device=device)
    dy = torch.randint(-min(h, 4), min(h, 4) + 1, (n,))
    dx = torch.randint(-min(w, 4), min(w, 4) + 1, (n,))
    places = torch.stack([torch.randperm(samples)[:n], dy, dx, torch.arange(n) % 2], 1)
    return bank, places.to(device)


def moved_by_hand(bank, places):
    """The stored values of each image as numpy moves them: padded with zeros, cropped at (dy, dx), flipped."""
    values, rows = bank.cpu().numpy(), places.cpu().tolist()
    height, width = values.shape[2:]
    out = np.zeros((len(rows), *values.shape[1:]), dtype=values.dtype)
    for n, (sample, dy, dx, flip) in enumerate(rows):
        wide = np.pad(values[sample], ((0, 0), (2 * height + 2,) * 2, (2 * width + 2,) * 2))
        top, left = 2 * height + 2 + dy, 2 * width + 2 + dx
        crop = wide[:, top : top + height, left : left + width]
        out[n] = crop[:, :, ::-1] if flip else crop
    return out


def oracle(x, bank, places, eps, scale=SCALE, clip=(0.0, 1.0)):
    """The definition in numpy: float32 (float64 for float64) throughout, rounded once at the end."""
    compute = compute_dtype(x.dtype)
    kind = np.float64 if compute == torch.float64 else np.float32
    natural, e = (t.cpu().to(compute).numpy() for t in (x, eps))
    delta = moved_by_hand(bank, places).astype(kind) * kind(scale / 127)
    with np.errstate(invalid="ignore"):
        result = natural + np.minimum(np.maximum(delta, -e), e)
        if clip is not None:
            low, high = (np.asarray(bound, dtype=kind).reshape(-1, 1, 1) for bound in clip)
            result = np.minimum(np.maximum(result, low), high)
    assert result.dtype == kind
    return torch.from_numpy(np.asarray(result)).to(x.device, x.dtype)


@pytest.mark.thin(7)
@pairs
def test_matches_numpy_bit_for_bit(backend, dtype, layout, eps_form):
    for shape in image_shapes(backend, dtype, layout, eps_form):
        eps, dense = make_eps(eps_form, shape, backend.device)
        x = lay(torch.rand(shape, device=backend.device).to(dtype), layout)
        bank, places = make_bank(shape, backend.device)
        result = bank_start(x, bank, places, eps, scale=SCALE)
        assert_same(result, oracle(x, bank, places, dense), shape)
        assert_format(result, x)
        assert neighbours_untouched(x)


def every_place(height, width):
    """Each crop that leaves a pixel, the nearest that leave none, and each flip."""
    shifts = itertools.product(range(-height - 1, height + 2), range(-width - 1, width + 2), (0, 1))
    return torch.tensor([(0, *drawn) for drawn in shifts])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("eps_form", ["float", "(N,1,H,W)", "PackedEpsilon M=C"])
def test_every_crop_and_flip_is_that_of_the_images(backend, layout, eps_form):
    places = every_place(3, 4)[:: 13 if backend.interpreted else 1].to(backend.device)
    shape = (len(places), 2, 3, 4)
    eps, dense = make_eps(eps_form, shape, backend.device)
    bank = torch.randint(-127, 128, (1, 2, 3, 4), dtype=torch.int8, device=backend.device)
    x = lay(torch.rand(shape, device=backend.device), layout)
    result = bank_start(x, bank, places, eps, scale=SCALE)
    assert_same(result, oracle(x, bank, places, dense))
    drawn = Augmentation(places[:, 1], places[:, 2], places[:, 3] != 0)
    delta = drawn.apply(bank[places[:, 0]].float() * (SCALE / 127))
    bound = dense.float()
    assert_same(result, torch.clamp(x + torch.clamp(delta, -bound, bound), 0, 1))


@pytest.mark.parametrize("shift", [2**31, 2**62, 2**63 - 1, -(2**31), -(2**62), -(2**63)])
def test_any_shift_is_outside(backend, shift):
    x = torch.rand(4, 1, 3, 4, device=backend.device)
    bank = torch.full((1, 1, 3, 4), 100, dtype=torch.int8, device=backend.device)
    places = torch.tensor([(0, *drawn) for drawn in ((shift, 0, 0), (0, shift, 0), (0, shift, 1), (shift, shift, 1))])
    assert_same(bank_start(x, bank, places.to(backend.device), EPS, scale=SCALE), x)


@pytest.mark.thin(3)
@pytest.mark.parametrize("clip", [(0.25, 0.5), None, ([0.1, 0.2, 0.3], [0.6, 0.7, 0.8])], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 0.5, 100])
@dtypes
def test_scale_and_clip(backend, dtype, scale, clip):
    shape = (2, 3, 5, 7)
    eps, dense = make_eps("(N,1,H,W)", shape, backend.device)
    x = torch.rand(shape, device=backend.device).to(dtype)
    bank, places = make_bank(shape, backend.device)
    bank[:, 0, 0, 0] = -128  # never stored, but a value like all others
    result = bank_start(x, bank, places, eps, clip, scale=scale)
    assert_same(result, oracle(x, bank, places, dense, scale, clip))


@dtypes
def test_nan_reaches_the_output(backend, dtype):
    shape = (2, 3, 5, 7)
    eps = with_nan(make_eps("(N,1,H,W)", shape, backend.device)[0])
    x = with_nan(torch.rand(shape, device=backend.device).to(dtype))
    bank, places = make_bank(shape, backend.device)
    result = bank_start(x, bank, places, eps, scale=SCALE)
    assert torch.equal(result.isnan(), x.isnan() | eps.isnan().expand(shape))
    assert_same(result, oracle(x, bank, places, eps.expand(shape)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("eps_form", ["float", "(N,1,H,W)", "PackedEpsilon M=C"])
@dtypes
def test_unknown_samples_are_nan_and_read_nothing(backend, dtype, layout, eps_form):
    """What a GPU does, where the values of places are not read before."""
    shape = (5, 3, 5, 7)
    eps, _ = make_eps(eps_form, shape, backend.device)
    x = lay(torch.rand(shape, device=backend.device).to(dtype), layout)
    bank, places = make_bank(shape, backend.device)
    for row, sample in ((0, -1), (2, len(bank)), (3, 2**62)):
        places[row, 0] = sample
    arguments = part_fast.ops.packed_epsilon.eps_arguments(eps, x)
    result = _bank_start(x, bank, places, *arguments, SCALE / 127, 0.0, 1.0)
    assert result[[0, 2, 3]].isnan().all()
    assert not result[[1, 4]].isnan().any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_threads(backend, layout):
    shape = (1, 3, 8, 129) if backend.interpreted else (3, 3, 61, 127)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for eps_form in ("float", "(N,1,H,W)", "PackedEpsilon M=1", "PackedEpsilon M=C"):
            eps, dense = make_eps(eps_form, shape, backend.device)
            x = lay(torch.rand(shape, device=backend.device), layout)
            bank, places = make_bank(shape, backend.device)
            result = bank_start(x, bank, places, eps, scale=SCALE)
            assert_same(result, oracle(x, bank, places, dense), eps_form)
    finally:
        torch.set_num_threads(before)


def test_a_bank_of_nothing(backend):
    bank = torch.zeros(0, 3, 4, 4, dtype=torch.int8, device=backend.device)
    x, places = torch.rand(0, 3, 4, 4, device=backend.device), torch.zeros(0, 4, dtype=torch.int64)
    assert bank_start(x, bank, places.to(backend.device), EPS, scale=SCALE).shape == (0, 3, 4, 4)
    one = torch.rand(1, 3, 4, 4, device=backend.device)
    places = torch.zeros(1, 4, dtype=torch.int64, device=backend.device)
    assert _bank_start(one, bank, places, None, EPS, 0.0, SCALE / 127, 0.0, 1.0).isnan().all()


def test_a_new_tensor_without_derivative(backend):
    shape = (2, 3, 5, 7)
    bank, places = make_bank(shape, backend.device)
    x = torch.rand(shape, device=backend.device, requires_grad=True)
    eps = torch.full((2, 1, 1, 1), EPS, device=backend.device, requires_grad=True)
    kept = bank.clone()
    result = bank_start(x, bank, places, eps, scale=SCALE)
    assert not result.requires_grad
    assert result.data_ptr() != x.data_ptr()
    assert torch.equal(bank, kept)


def test_strided_arguments(backend):
    shape = (2, 3, 5, 7)
    eps, dense = make_eps("(N,1,H,W)", shape, backend.device)
    bank, places = make_bank(shape, backend.device)
    columns = places.t().contiguous().t()
    for kind in STRIDED:
        x = strided(kind, shape, backend.device)
        assert_same(bank_start(x, bank, columns, eps, scale=SCALE), oracle(x, bank, places, dense), kind)


def good(device="cpu"):
    bank, places = make_bank((2, 3, 4, 4), device)
    return {"x": torch.rand(2, 3, 4, 4, device=device), "bank": bank, "places": places, "eps": EPS, "scale": SCALE}


def rows(*places: tuple[int, ...]) -> Tensor:
    return torch.tensor(places)


BAD_BANK = [
    ("bank", None, TypeError, "NoneType"),
    ("bank", torch.zeros(4, 3, 4, 4), TypeError, "torch.float32"),
    ("bank", torch.zeros(4, 3, 4, 4, dtype=torch.uint8), TypeError, "torch.uint8"),
    ("bank", torch.zeros(4, 3, 4, 4, dtype=torch.int8).to_sparse(), TypeError, "torch.sparse_coo"),
    ("bank", torch.zeros(4, 1, 4, 4, dtype=torch.int8), ValueError, "(4, 1, 4, 4)"),
    ("bank", torch.zeros(4, 3, 4, 5, dtype=torch.int8), ValueError, "(4, 3, 4, 5)"),
    ("bank", torch.zeros(3, 4, 4, dtype=torch.int8), ValueError, "(3, 4, 4)"),
    ("bank", torch.zeros(4, 4, 4, 3, dtype=torch.int8).permute(0, 3, 1, 2), ValueError, "strides (48, 1, 12, 3)"),
    ("bank", torch.zeros(4, 3, 4, 4, dtype=torch.int8, device="meta"), ValueError, "meta"),
    ("places", None, TypeError, "NoneType"),
    ("places", torch.zeros(2, 4), TypeError, "torch.float32"),
    ("places", torch.zeros(2, 4, dtype=torch.int32), TypeError, "torch.int32"),
    ("places", torch.zeros(2, 3, dtype=torch.int64), ValueError, "(2, 3)"),
    ("places", torch.zeros(3, 4, dtype=torch.int64), ValueError, "(3, 4)"),
    ("places", torch.zeros(2, 4, dtype=torch.int64, device="meta"), ValueError, "meta"),
    ("places", rows((0, 0, 0, 0), (4, 0, 0, 0)), ValueError, "from 0 to 4"),
    ("places", rows((-1, 0, 0, 0), (0, 0, 0, 0)), ValueError, "from -1 to 0"),
    ("places", rows((0, 0, 0, 2), (1, 0, 0, 0)), ValueError, "from 0 to 2"),
    ("places", rows((0, 0, 0, 0), (1, 0, 0, -1)), ValueError, "from -1 to 0"),
    ("scale", None, TypeError, "NoneType"),
    ("scale", 0.0, ValueError, "got 0"),
    ("scale", -1.0, ValueError, "-1"),
    ("scale", float("inf"), ValueError, "inf"),
]


@pytest.mark.parametrize(
    ("argument", "value", "error", "got"),
    [
        *[("x", *row) for row in BAD_IMAGES],
        *[("eps", *row) for row in BAD_EPS],
        *BAD_BANK,
        ("clip", (1.0, 0.0), ValueError, "(1.0, 0.0)"),
    ],
)
def test_bad_input(backend, monkeypatch, argument, value, error, got):
    monkeypatch.setenv("PART_FAST_CHECK", "1")
    arguments = {**good(backend.device), argument: on_device(value, backend.device)}
    assert_error(lambda: bank_start(**arguments), argument, error, got)


def test_refused_inside_transforms():
    arguments = good()
    assert_error(
        lambda: torch.vmap(lambda x: bank_start(**{**arguments, "x": x}))(arguments["x"][None]),
        "bank",
        RuntimeError,
        "",
    )
