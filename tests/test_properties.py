"""Public functions over any shape, stride and value: equal on the C++ backend and the reference, or one clear error."""

import pytest
import torch
from conftest import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import part_fast
from part_fast import CamBudget, PackedEpsilon
from part_fast.ops.cam import METHODS

SPECIAL = [0.0, -0.0, 1.0, 0.5, 0.5 + 2**-5, 0.5 - 2**-5, 1e-45, -1e-45, 1e-39, 3.4e38, float("nan"), float("inf")]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORMS = ["whole", "transposed", "sliced", "channels_last", "flipped halves", "expanded"]
SEEDS = st.integers(0, 2**31)
SHAPES = st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 6), st.integers(0, 6))


def values(generator, shape, dtype, special):
    """Values in [0,1], or with every special one among them."""
    x = torch.rand(shape, generator=generator)
    if special:
        chosen = torch.randint(0, len(SPECIAL), shape, generator=generator)
        x = torch.where(torch.rand(shape, generator=generator) < 0.5, torch.tensor(SPECIAL)[chosen], x)
    return x.to(dtype)


def strided(x, form):
    """The same values in another layout, or, expanded, the first image for all."""
    if form == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if form == "sliced":
        wide = x.new_full((*x.shape[:3], 2 * x.shape[3] + 1), float("nan"))
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if form == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if form == "flipped halves":
        return x.flip(0).contiguous().flip(0)
    if form == "expanded" and len(x):
        return x[:1].expand(x.shape)
    return x


def outcome(call, backend):
    """The result, or the error's type and line."""
    with part_fast.backend(backend):
        try:
            return call()
        except part_fast.UsageError as error:
            return type(error), str(error)


def agree(call):
    reference, fast = (outcome(call, backend) for backend in ("reference", "cpp"))
    if isinstance(reference, tuple):
        assert fast == reference
        assert "\n" not in reference[1]
    else:
        assert_same(fast, reference)
    return reference


@given(
    shape=SHAPES,
    seed=SEEDS,
    dtype=st.sampled_from(DTYPES),
    forms=st.lists(st.sampled_from(FORMS), min_size=4, max_size=4),
    eps=st.sampled_from([0.0, 2**-5, 1e-45, 1.0, 1e30, "map", "image"]),
    alpha=st.sampled_from([0.0, -0.1, 2**-6, 1e-45, 1e30]),
)
def test_steps_and_projections_are_those_of_the_reference(shape, seed, dtype, forms, eps, alpha):
    generator = torch.Generator().manual_seed(seed)
    x_adv, grad, x, dense = (strided(values(generator, shape, dtype, True), form) for form in forms)
    if eps == "map":
        eps = dense.abs()
    elif eps == "image":
        eps = values(generator, (shape[0], 1, 1, 1), dtype, False)
    for call in (
        lambda: part_fast.pgd_step(x_adv, grad, x, eps, alpha),
        lambda: part_fast.project_linf(x_adv, x, eps),
    ):
        kept = [t.clone() for t in (x_adv, grad, x)]
        result = agree(call)
        assert isinstance(result, torch.Tensor)
        for before, after in zip(kept, (x_adv, grad, x), strict=True):
            assert_same(after.contiguous(), before.contiguous())
    step = part_fast.pgd_step(x_adv, grad, x, eps, alpha)
    seen = torch.as_tensor(eps).isnan() if isinstance(eps, torch.Tensor) else torch.zeros(())
    finite = ~(x.isnan() | x_adv.isnan() | seen.bool())
    inside = (step >= 0) & (step <= 1)
    # NaN comes of NaN, of an infinite x less itself, and of nothing else.
    assert bool((inside | ~finite | x.isinf() | x_adv.isinf()).all())


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(1, 6)),
    more=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    seed=SEEDS,
    dtype=st.sampled_from(DTYPES),
    special=st.booleans(),
    turned=st.booleans(),
    rule=st.sampled_from(["zscore", "released", "quantile:0.3", "quantile:0.999", "soft"]),
)
def test_maps_and_masks_are_those_of_the_reference(shape, more, seed, dtype, special, turned, rule):
    generator = torch.Generator().manual_seed(seed)
    cam = values(generator, shape, dtype, special)
    cam = cam.transpose(1, 2).contiguous().transpose(1, 2) if turned else cam
    size = (shape[1] + more[0], shape[2] + more[1])
    agree(lambda: part_fast.upsample_cam(cam, size)) if not special else None
    result = agree(lambda: part_fast.epsilon_map(cam, size, 0.5, 0.25, rule))
    assert isinstance(result, torch.Tensor)
    if rule != "soft":
        mask = agree(lambda: part_fast.cam_mask(cam, size, rule))
        packed = part_fast.packed_epsilon_map(cam, size, 0.5, 0.25, rule)
        assert_same(packed.mask(), mask)
        assert_same(result.float(), torch.where(mask, 0.5, 0.25))
        assert_same(PackedEpsilon.pack(mask, 0.5, 0.25).dense(), packed.dense())


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 7), st.integers(1, 5), st.integers(1, 5)),
    seed=SEEDS,
    dtype=st.sampled_from([torch.float32, torch.float64]),
    forms=st.tuples(*[st.sampled_from(FORMS[:4])] * 2),
    method=st.sampled_from(METHODS),
)
def test_class_activation_maps_are_those_of_the_reference(shape, seed, dtype, forms, method):
    generator = torch.Generator().manual_seed(seed)
    activation, gradient = (strided(values(generator, shape, dtype, False), form) for form in forms)
    reference, fast = (
        outcome(lambda: part_fast.cam(activation, gradient - 0.5, method), backend) for backend in ("reference", "cpp")
    )
    torch.testing.assert_close(fast, reference, rtol=1e-4, atol=1e-5)  # sums in another order
    assert bool((fast >= 0).all())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer4, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.layer4(x).relu().mean((2, 3)))


torch.manual_seed(0)
NET = Net()
IMAGES = st.tuples(st.integers(1, 3), st.just(3), st.integers(1, 6), st.integers(1, 6))


@given(
    shape=IMAGES,
    seed=SEEDS,
    form=st.sampled_from(FORMS),
    eps=st.sampled_from([0.0, 1e-45, 8 / 255, 0.5, 1.0, "map", "packed", "cam"]),
    steps=st.integers(0, 3),
    start=st.sampled_from(["uniform", "zero"]),
    loss=st.sampled_from(["ce", "kl", "margin"]),
    edge=st.booleans(),
)
def test_attacks_and_losses_stay_in_the_ball_and_finite(shape, seed, form, eps, steps, start, loss, edge):
    generator = torch.Generator().manual_seed(seed)
    x = values(generator, shape, torch.float32, False)
    x = strided(x.round() if edge else x, form)  # exactly on the bounds of clip
    y = torch.randint(0, 5, (shape[0],), generator=generator)
    if eps == "cam":
        eps = CamBudget(NET, 0.5, 0.25)(x)
        assert set(eps.unique().tolist()) <= {0.25, 0.5}
    elif eps == "map":
        eps = torch.rand((shape[0], 1, *shape[2:]), generator=generator)
    elif eps == "packed":
        eps = PackedEpsilon.pack(torch.rand((shape[0], 1, *shape[2:]), generator=generator) < 0.5, 0.5, 0.0)
    bound = eps.dense() if isinstance(eps, PackedEpsilon) else torch.as_tensor(eps)
    for x_adv in (
        part_fast.pgd(NET, x, y, eps, 0.1, steps, start=start, loss=loss),
        part_fast.mma(NET, x, y, eps, 0.1, steps, start=start),
        part_fast.PGD(NET, eps, 0.1, steps, start == "uniform")(x, y),
    ):
        assert x_adv.shape == x.shape
        assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
        assert bool(((x_adv - x).abs() <= bound + 1.2e-7).all())  # a rounding of x + delta
    for name in ("trades_loss", "mart_loss"):
        value = getattr(part_fast, name)(NET, x, y, None, 0.1, eps, steps)
        assert value.shape == ()
        assert bool(torch.isfinite(value))


@given(shape=IMAGES, seed=SEEDS, bad=st.sampled_from([float("nan"), float("inf"), -float("inf"), -1e-3, 1.001, 255.0]))
def test_images_out_of_range_are_named_with_the_remedy(shape, seed, bad):
    x = values(torch.Generator().manual_seed(seed), shape, torch.float32, False)
    x.view(-1)[seed % x.numel()] = bad
    y = torch.zeros(shape[0], dtype=torch.int64)
    remedy = "divide 8-bit images by 255" if bad == 255 else "; "
    for call in (
        lambda: part_fast.pgd(NET, x, y, 0.1),
        lambda: part_fast.PGD(NET)(x, y),
        lambda: part_fast.mma(NET, x, y, 0.1, 0.1, 1),
        lambda: CamBudget(NET)(x),
        lambda: CamBudget(NET).packed(x),
        lambda: part_fast.trades_loss(NET, x, y, None),
        lambda: part_fast.mart_loss(NET, x, y, None),
    ):
        with pytest.raises(ValueError, match=r"^x(_natural)? must be .*in \[0, 1\], got values from ") as caught:
            call()
        assert remedy in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_number_that_no_float_holds_is_refused():
    x = torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match=r"^alpha must be finite, got inf$"):
        part_fast.pgd_step(x, x, x, 0.1, 10**400)


DRAWN = [
    test_steps_and_projections_are_those_of_the_reference,
    test_maps_and_masks_are_those_of_the_reference,
    test_class_activation_maps_are_those_of_the_reference,
    test_attacks_and_losses_stay_in_the_ball_and_finite,
    test_images_out_of_range_are_named_with_the_remedy,
]


@pytest.mark.slow
@pytest.mark.parametrize("test", DRAWN, ids=lambda test: test.__name__)
def test_many_more_inputs(test):
    settings(max_examples=2000, derandomize=False)(test)()
