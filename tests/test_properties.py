"""Public functions over any shape, stride and value: equal on the C++ backend and the reference, or one clear error."""

import functools
import inspect
import warnings
from pathlib import Path

import hypothesis
import pytest
import torch
from conftest import assert_same
from golden_attack import assert_untouched, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import part_fast
from part_fast import AttackModel, CamBudget, PackedEpsilon
from part_fast.attacks.autoattack import autoattack
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
    large = agree(lambda: part_fast.upsample_cam(cam, size))
    # NaN takes its own map and no other; without it and without infinite extents all is finite.
    low, high = (cam.float() if dtype != torch.float64 else cam).flatten(1).aminmax(dim=1)
    assert bool(large[(high - low).isfinite()].isfinite().all())
    assert bool(large[high.isnan()].isnan().all())
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


# Large enough for inf in float16 alone; nothing that overflows in sums, whose order is free.
MANY_KINDS = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-39, 1e9, float("nan"), float("inf"), -float("inf")])


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4)),
    seed=SEEDS,
    dtype=st.sampled_from(DTYPES),
    forms=st.tuples(*[st.sampled_from(FORMS[:-1])] * 2),  # without the expanded, whose shared elements are refused
    method=st.sampled_from(METHODS),
)
def test_class_activation_maps_of_special_values_are_those_of_plain_torch(shape, seed, dtype, forms, method):
    """Where an exact sum is infinite or NaN, so is every backend's; elsewhere they are near to float64's."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        chosen = torch.randint(0, len(MANY_KINDS), shape, generator=generator)
        rare = torch.rand(shape, generator=generator) < 0.1
        return torch.where(rare, MANY_KINDS[chosen], torch.rand(shape, generator=generator) * 2 - 1).to(dtype)

    activation, gradient = (strided(draw(), form) for form in forms)
    a, g = activation.double(), gradient.double()
    weights = {
        "gradcam": g.mean((2, 3), keepdim=True),
        "xgradcam": (g * a).sum((2, 3), keepdim=True) / (a + 1e-8).sum((2, 3), keepdim=True),
        "layercam": g.clamp(min=0),
        "hirescam": g,
    }[method]
    exact = (weights * a).sum(1).clamp(min=0)
    # What is added up, whatever cancels: roundings are as large as it is.
    sizes = {
        "gradcam": g.abs().mean((2, 3), keepdim=True),
        "xgradcam": (g * a).abs().sum((2, 3), keepdim=True) / (a + 1e-8).sum((2, 3), keepdim=True).abs(),
        "layercam": g.clamp(min=0),
        "hirescam": g.abs(),
    }
    size = (sizes[method] * a.abs()).sum(1)
    # A quotient by a sum that nearly cancels says nothing of float32.
    narrow = (a + 1e-8).sum((2, 3)).abs() < 1e-3 * (a + 1e-8).abs().sum((2, 3))
    hypothesis.assume(method != "xgradcam" or not bool(narrow.any()))
    for backend in ("reference", "cpp"):
        found = outcome(lambda: part_fast.cam(activation, gradient, method), backend).double()
        assert bool((found.isnan() == exact.isnan()).all())
        assert bool((found.isinf() == exact.isinf()).all())
        finite = exact.isfinite()
        assert bool(((found - exact).abs() <= 1e-3 * size + 1e-40)[finite].all())


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


class Block(nn.Module):
    """Convolution, BatchNorm or none, ReLU or none, and a shortcut or none."""

    def __init__(self, conv, norm, relu, shortcut):
        super().__init__()
        self.conv, self.norm, self.relu, self.shortcut = conv, norm, nn.ReLU() if relu else None, shortcut

    def forward(self, x):
        out = self.conv(x)
        out = out if self.norm is None else self.norm(out)
        out = out + x if self.shortcut else out
        return out if self.relu is None else self.relu(out)


class Drawn(nn.Module):
    def __init__(self, blocks, channels):
        super().__init__()
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(channels, 5)

    def forward(self, x):
        return self.fc(self.blocks(x).mean((2, 3)))


LAYER = st.tuples(
    st.sampled_from([1, 2, 4, 7, 16, 32]),  # channels: with the next 3x3 convolution's, enough for Winograd or not
    st.sampled_from([(1, 1, 0, 1), (3, 1, 1, 1), (3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 2), (5, 1, 2, 1)]),
    st.booleans(),  # bias
    st.booleans(),  # depthwise or grouped where the channels allow it
    st.sampled_from([None, nn.BatchNorm2d]),
    st.booleans(),  # ReLU
    st.booleans(),  # shortcut
)


def drawn_network(layers, inputs):
    blocks, norms = [], 0
    for channels, (size, stride, padding, dilation), bias, grouped, norm, relu, shortcut in layers:
        groups = inputs if grouped and channels % inputs == 0 else 1
        conv = nn.Conv2d(inputs, channels, size, stride, padding=padding, dilation=dilation, groups=groups, bias=bias)
        keeps = channels == inputs and stride == 1 and 2 * padding == dilation * (size - 1)
        blocks.append(Block(conv, None if norm is None else norm(channels), relu, shortcut and keeps))
        norms += norm is not None
        inputs = channels
    net = Drawn(blocks, inputs)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in (
                (module.weight, -1.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.2, 2.0),
            ):
                nn.init.uniform_(value, low, high)
    return net.eval(), norms


def note_smallest(into, module, given):
    """How near an input is to 0, of the largest."""
    (x,) = given
    into.append(float((x.abs().amin() / x.abs().amax().clamp(min=1e-300)).detach()))


def logits_and_gradient(model, x, weights):
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    logits = model(leaf)
    return logits.detach(), torch.autograd.grad((logits * weights).sum(), leaf)[0]


ATTACK_MODELS = {
    "layers": st.lists(LAYER, min_size=1, max_size=4),
    "shape": st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 3]), st.integers(3, 9), st.integers(3, 9)),
    "seed": SEEDS,
    "dtype": st.sampled_from([torch.float32, torch.float32, torch.float64]),
    "form": st.sampled_from(FORMS),
    "training": st.booleans(),
    "change": st.sampled_from(["none", "in place", "another tensor", "statistics", "load"]),
}


def logits_and_gradients_are_the_models(layers, shape, seed, dtype, form, training, change):
    torch.manual_seed(seed)
    net, norms = drawn_network(layers, shape[1])
    net = net.to(dtype)
    x = strided(torch.rand(shape), form).to(dtype)
    weights = torch.rand(shape[0], 5, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # networks without a BatchNorm to fold say so
        fast = AttackModel(net.train(training))
    assert fast.folded == norms
    for round_ in range(2):
        if round_ and change != "none":
            with torch.no_grad():
                if change == "in place":
                    net.blocks[0].conv.weight.mul_(1.5)
                elif change == "another tensor":
                    net.fc.weight = nn.Parameter(torch.rand_like(net.fc.weight))
                elif change == "statistics" and norms:
                    next(b.norm for b in net.blocks if b.norm is not None).running_mean.add_(0.25)
                elif change == "load":
                    net.load_state_dict(
                        {k: v * 1.25 if v.is_floating_point() else v for k, v in net.state_dict().items()}
                    )
        before = snapshot(net)
        logits, gradient = logits_and_gradient(fast, x, weights)
        assert_untouched(before, net)
        plain = net.double()
        near: list[float] = []
        note = functools.partial(note_smallest, near)
        handles = [m.register_forward_pre_hook(note) for m in plain.modules() if isinstance(m, nn.ReLU)]
        expected = logits_and_gradient(plain.eval(), x.double(), weights.double())
        for handle in handles:
            handle.remove()
        net.to(dtype).train(training)
        # The gradient jumps where a ReLU's input turns its sign by rounding.
        hypothesis.assume(min(near, default=1.0) > 1e-5)
        for found, exact in zip((logits, gradient), expected, strict=True):
            assert found.dtype == dtype
            # A dozen roundings of sums over up to 32 * 25 products, and Winograd's own.
            bound = (2e-4 if dtype == torch.float32 else 1e-12) * float(exact.abs().amax())
            assert float((found.double() - exact).abs().amax()) <= bound


@settings(max_examples=10)
@given(**ATTACK_MODELS)
def test_an_attack_model_has_the_logits_and_gradients_of_the_model(**drawn):
    logits_and_gradients_are_the_models(**drawn)


AUTOATTACKS = {
    "shape": st.tuples(st.integers(1, 3), st.just(3), st.integers(3, 6), st.integers(3, 6)),
    "classes": st.integers(2, 5),
    "seed": SEEDS,
    "form": st.sampled_from(FORMS),
    "eps": st.sampled_from([0.0, 1e-3, 8 / 255, 0.3, 1.0]),
    "clip": st.sampled_from([(0.0, 1.0), (-2.0, 2.0), (0.25, 0.5)]),
    "training": st.booleans(),
    "edge": st.booleans(),
}


def autoattack_in_the_ball_without_a_trace(few_steps, shape, classes, seed, form, eps, clip, training, edge):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(NET, nn.BatchNorm1d(5), nn.Linear(5, classes)).train(training)
    x = values(generator, shape, torch.float32, False)
    x = strided((x.round() if edge else x) * (clip[1] - clip[0]) + clip[0], form).clamp(*clip)
    before = snapshot(net)
    net.eval()
    right = net(x).argmax(1)
    net.train(training)
    y = torch.where(torch.rand(len(x), generator=generator) < 0.8, right, torch.zeros_like(right))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few classes leave the targeted attack out
        x_adv = autoattack(net, x, y, eps, seed, clip=clip)
        again = autoattack(net, x, y, eps, seed, clip=clip)
    assert_untouched(before, net)
    assert x_adv.shape == x.shape
    assert bool(((x_adv >= clip[0]) & (x_adv <= clip[1])).all())
    assert bool(((x_adv - x).abs() <= eps + 1e-6 * (clip[1] - clip[0])).all())
    assert_same(again, x_adv)
    assert_same(x_adv[right != y], x[right != y].contiguous())  # nothing to do: they are given back


@settings(max_examples=6)
@given(**AUTOATTACKS)
def test_autoattack_stays_in_the_ball_and_leaves_no_trace(few_steps, **drawn):
    autoattack_in_the_ball_without_a_trace(few_steps, **drawn)


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


@pytest.mark.parametrize("n", [70_000, 1_000_000])
def test_very_many_images_of_one_pixel(n):
    """More than a 16-bit grid's, each with its own result; plain formulas in place of the reference."""
    torch.manual_seed(n)
    x = torch.rand(n, 1, 1, 1)
    x_adv, grad, eps = (x + 0.25 * torch.rand(x.shape)).clamp(0, 1), torch.rand(x.shape) - 0.5, torch.rand(x.shape) / 4
    step = (x_adv + 0.1 * grad.sign() - x).clamp(-eps, eps)
    assert_same(part_fast.pgd_step(x_adv, grad, x, eps, 0.1), (x + step).clamp(0, 1))
    assert_same(part_fast.project_linf(x_adv, x, eps), x + (x_adv - x).clamp(-eps, eps))
    maps = part_fast.cam(x, grad, "hirescam")
    assert_same(maps, (x * grad)[:, 0].relu())
    assert_same(part_fast.upsample_cam(maps, (1, 1)), torch.zeros(n, 1, 1))  # each is flat
    assert_same(part_fast.cam_mask(maps, (1, 1)), torch.zeros(n, 1, 1, 1, dtype=torch.bool))
    mask = torch.rand(n, 1, 1, 1) < 0.5
    packed = PackedEpsilon.pack(mask, 0.5, 0.25)
    dense = torch.where(mask, 0.5, 0.25)
    assert_same(packed.mask(), mask)
    assert_same(packed.dense(), dense)
    assert_same(part_fast.project_linf(x_adv, x, packed), x + (x_adv - x).clamp(-dense, dense))
    last = packed.index_select(torch.tensor([n - 1, 0, 65_536]))
    assert_same(last.mask(), mask[[n - 1, 0, 65_536]])


def needs_gigabytes(needed):
    (kib,) = [line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line]
    if int(kib) < needed * 2**20:
        pytest.skip(f"needs {needed} GiB of memory, {int(kib) // 2**20} are free")


@pytest.mark.slow
def test_more_masks_than_an_int32_counts():
    """2**31 pixels and some more, of maps that come again every seventh time."""
    needs_gigabytes(9)
    period, size = 7, (64, 64)
    n = 2**31 // 64**2 + 2 * period
    n -= n % period
    few = torch.rand(period, 4, 4)
    cam = few.repeat(n // period, 1, 1)
    for rule in ("zscore", "quantile:0.3"):
        expected = part_fast.cam_mask(few, size, rule)
        mask = part_fast.cam_mask(cam, size, rule)
        assert mask.numel() > 2**31
        for group in mask.view(-1, period, *expected.shape[1:]).split(4096):
            assert bool((group == expected).all())
        packed = part_fast.packed_epsilon_map(cam, size, 0.5, 0.25, rule)
        bits = packed.bits.view(-1, period, *packed.bits.shape[1:])
        assert bool((bits == PackedEpsilon.pack(expected, 0.5, 0.25).bits).all())
        assert_same(PackedEpsilon.pack(mask, 0.5, 0.25).bits, packed.bits)
        del mask


@pytest.mark.slow
def test_more_pixels_than_an_int32_counts():
    """Images of 2**31 values and some more in bfloat16, that come again, and eps packed, mapped and one for all."""
    needs_gigabytes(12)
    period, shape = 7, (3, 32, 32)
    n = 2**31 // 3072 + 2 * period
    n -= n % period
    few = torch.rand(period, *shape).to(torch.bfloat16)
    x = few.repeat(n // period, 1, 1, 1)
    assert x.numel() > 2**31
    mask = torch.rand(period, 1, 32, 32) < 0.5
    several = PackedEpsilon.pack(mask, 0.5, 0.25)
    packed = PackedEpsilon(several.bits.repeat(n // period, 1, 1), several.size, 0.5, 0.25)
    for eps, few_eps in ((0.25, 0.25), (packed, several)):
        expected = part_fast.pgd_step(few, few, few, few_eps, 0.75)
        step = part_fast.pgd_step(x, x, x, eps, 0.75)
        for group in step.view(-1, period, *shape).split(1024):
            assert bool((group == expected).all())
        del step
    activation = x.view(n, 3, 32, 32)
    expected = part_fast.cam(few, few)
    maps = part_fast.cam(activation, activation).view(-1, period, 32, 32)
    for group in maps.split(1024):
        assert bool((group == expected).all())


MANY_ATTACK_MODELS = given(**ATTACK_MODELS)(logits_and_gradients_are_the_models)
MANY_AUTOATTACKS = given(**AUTOATTACKS)(autoattack_in_the_ball_without_a_trace)
DRAWN = [
    test_steps_and_projections_are_those_of_the_reference,
    test_maps_and_masks_are_those_of_the_reference,
    test_class_activation_maps_are_those_of_the_reference,
    test_class_activation_maps_of_special_values_are_those_of_plain_torch,
    test_attacks_and_losses_stay_in_the_ball_and_finite,
    MANY_ATTACK_MODELS,
    MANY_AUTOATTACKS,
    test_images_out_of_range_are_named_with_the_remedy,
]


# Of what takes a second.
FEWER = {MANY_AUTOATTACKS: 150, MANY_ATTACK_MODELS: 500}


@pytest.mark.slow
@pytest.mark.parametrize("test", DRAWN, ids=lambda test: test.__name__)
def test_many_more_inputs(test, request):
    fixtures = [request.getfixturevalue("few_steps")] if "few_steps" in inspect.signature(test).parameters else []
    settings(max_examples=FEWER.get(test, 2000), derandomize=False)(test)(*fixtures)
