"""pgd and PGD: golden attacks, budgets obeyed, no trace left behind, starts, losses, errors."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import STRIDED, strided
from golden_attack import EXPECTED, Failing, Net, assert_untouched, golden_net, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import part_fast
from part_fast import PGD, PackedEpsilon, mma, pgd, pgd_step
from part_fast.attacks.objectives import margin

X, Y, EPS = EXPECTED["x"], EXPECTED["y"], EXPECTED["eps"]
START = EXPECTED["start_uniform"]


def published_pgd(model, x, y, eps, alpha, steps, x_adv, loss):
    """The loop as published AT code writes it: fp32, gradients of everything, clamps by min and max."""
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        loss(model(x_adv), model(x), y).backward()
        x_adv = x_adv.detach() + alpha * x_adv.grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv


def test_golden_ce():
    x_adv = pgd(golden_net(), X, Y, EPS, 2 / 255, 10, start=START)
    # The convolutions of another CPU round otherwise, and a sign may turn where a gradient is about 0.
    assert (x_adv != EXPECTED["pgd_ce"]).float().mean() < 1e-3


def test_golden_kl():
    x_adv = pgd(golden_net(), X, Y, EPS, 2 / 255, 10, start=EXPECTED["start_normal"], loss="kl")
    # As above; at this start, 0.001 from x, the divergence has gradients of rounding size: more signs turn.
    assert (x_adv != EXPECTED["pgd_kl"]).float().mean() < 5e-3


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_equals_the_published_loop(loss):
    losses = {
        "ce": lambda adv, clean, y: F.cross_entropy(adv, y),
        "kl": lambda adv, clean, y: F.kl_div(adv.log_softmax(1), clean.softmax(1), reduction="sum"),
    }
    expected = published_pgd(golden_net(), X, Y, EPS, 2 / 255, 5, START.clone(), losses[loss])
    got = pgd(golden_net(), X, Y, EPS, 2 / 255, 5, start=START, loss=loss)
    # x + clamp(x_adv - x) and clamp to x +- eps differ by a rounding; a sign may turn.
    assert ((got - expected).abs() > 1e-6).float().mean() < 5e-3


@pytest.mark.parametrize(
    "eps",
    [
        8 / 255,
        0.0,
        torch.linspace(0, 0.1, 8).view(8, 1, 1, 1),
        EPS[:, :1],
        EPS,
        PackedEpsilon.pack(EPS[:, :1] > 7.5 / 255, 8 / 255, 0.0),
        PackedEpsilon.pack(EPS > 7.5 / 255, 8 / 255, 0.0),
    ],
    ids=["float", "zero", "per-image", "per-pixel", "dense", "packed", "packed3"],
)
@pytest.mark.parametrize("start", ["uniform", "zero"])
def test_obeys_every_pixels_budget(eps, start):
    x_adv = pgd(golden_net(), X, Y, eps, 0.03, 3, start=start)
    bound = eps.dense() if isinstance(eps, PackedEpsilon) else torch.as_tensor(eps)
    # One rounding of x + delta, delta <= eps.
    assert ((x_adv - X).abs() <= bound + 1.2e-7).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    if bool((bound > 0).any()):
        assert not torch.equal(x_adv, X)


@given(seed=st.integers(0, 1000), eps=st.floats(0, 0.3), low=st.floats(0, 0.4), high=st.floats(0.6, 1))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_uniform_start_fills_the_clipped_ball(seed, eps, low, high):
    torch.manual_seed(seed)
    x = torch.rand(2, 3, 8, 8).clamp(low, high)
    start = pgd(golden_net(), x, Y[:2], eps, 0.0, 0, clip=(low, high))
    assert (start - x).abs().max() <= eps + 1.2e-7
    assert start.min() >= torch.tensor(low)
    assert start.max() <= torch.tensor(high)
    if eps > 0.01:
        assert (start - x).abs().max() > 0.5 * eps


def test_uniform_start_is_uniform_within_the_budget():
    torch.manual_seed(0)
    x = torch.full((4, 3, 64, 64), 0.5)
    noise = (pgd(golden_net(), x, Y[:4], 0.2, steps=0) - x) / 0.2
    # 49,152 draws: the mean of U(-1,1) has standard error 0.0026 and its variance, 1/3, 0.0013; five of each.
    assert abs(noise.mean()) < 0.013
    assert abs(noise.var() - 1 / 3) < 0.0067


def test_seed_reproduces():
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(pgd(golden_net(), X, Y, 8 / 255))
    assert torch.equal(*results)


def test_start_tensor_is_used_as_given_and_not_overwritten():
    outside = X + 0.5
    kept = outside.clone()
    assert torch.equal(pgd(golden_net(), X, Y, 0.1, steps=0, start=outside), outside)
    pgd(golden_net(), X, Y, 0.1, steps=2, start=outside)
    assert torch.equal(outside, kept)


def test_images_and_eps_are_not_overwritten():
    x, eps = X.clone(), EPS.clone()
    pgd(golden_net(), x, Y, eps, start="zero")
    assert torch.equal(x, X)
    assert torch.equal(eps, EPS)


@pytest.mark.parametrize("loss", ["ce", "kl", "margin", lambda logits, y: F.cross_entropy(logits, y)])
def test_every_loss_is_increased(loss):
    net = golden_net()
    clean = net(X).detach()

    def value(logits):
        return {
            "kl": lambda: F.kl_div(logits.log_softmax(1), clean.softmax(1), reduction="sum"),
            "margin": lambda: margin(logits, Y).sum(),
        }.get(loss, lambda: F.cross_entropy(logits, Y))()

    x_adv = pgd(net, X, Y, 0.1, 0.02, 5, start=START, loss=loss)
    assert value(net(x_adv)) > value(net(START)) + 1e-3


@pytest.mark.parametrize("loss", ["ce", "kl", "margin"])
def test_float64_is_attacked_in_float64(loss):
    """Where float32 takes the right class for certain, so that its gradient is 0 and another one's alone counts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 5)).double()
    with torch.no_grad():
        model[3].weight.mul_(200)
    x = torch.rand(64, 3, 4, 4, dtype=torch.float64)
    y, clean = model(x).argmax(1), model(x).softmax(1).detach()
    start = x_adv = (x + 1e-3 * torch.randn_like(x)).clamp(0, 1)
    for _ in range(10):
        leaf = x_adv.detach().requires_grad_()
        logits = model(leaf)
        right = logits.gather(1, y[:, None])[:, 0]
        increased = {
            "ce": F.cross_entropy(logits, y),
            "kl": F.kl_div(logits.log_softmax(1), clean, reduction="sum"),
            "margin": (logits.scatter(1, y[:, None], -torch.inf).amax(1) - right).sum(),
        }[loss]
        x_adv = pgd_step(x_adv.detach(), torch.autograd.grad(increased, leaf)[0], x, 0.05, 0.01)
    assert torch.equal(pgd(model, x, y, 0.05, 0.01, 10, start=start, loss=loss), x_adv)


def test_margin():
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    assert margin(logits, torch.tensor([0, 1])).tolist() == [-1.0, 2.0]


@pytest.mark.parametrize("training", [True, False])
def test_leaves_no_trace(training):
    net = Net().train(training)
    net.bn2.eval()
    net(X).sum().backward()
    before = snapshot(net)
    pgd(net, X, Y, 8 / 255, start="zero")
    assert_untouched(before, net)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_leaves_no_trace_when_the_model_raises(loss):
    net = Net().train()
    net.dropout = Failing(after=2)
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="planted failure"):
        pgd(net, X, Y, 8 / 255, start="zero", loss=loss)
    assert_untouched(before, net)


def test_model_runs_in_eval_mode():
    modes = []
    net = Net().train()
    net.conv1.register_forward_hook(lambda module, args, out: modes.append(module.training))
    pgd(net, X, Y, 8 / 255, steps=3, loss="kl")
    assert modes == [False] * 4  # the clean softmax once, then the steps


def test_no_parameter_gradient_is_computed():
    net = golden_net()
    touched = []
    net.conv2.weight.register_hook(lambda grad: touched.append(1))
    pgd(net, X, Y, 8 / 255)
    assert touched == []
    assert all(parameter.grad is None for parameter in net.parameters())


def test_each_image_is_attacked_alone():
    """The step of one image must not depend on its batch, however confident the others are."""
    net = golden_net()
    whole = pgd(net, X, Y, EPS, start=START)
    single = torch.cat([pgd(net, X[i : i + 1], Y[i : i + 1], EPS[i : i + 1], start=START[i : i + 1]) for i in range(8)])
    assert (whole != single).float().mean() < 1e-3  # convolutions may round otherwise at another batch size


def test_inside_no_grad_and_inference_mode():
    expected = pgd(golden_net(), X, Y, EPS, start=START)
    with torch.no_grad():
        assert torch.equal(pgd(golden_net(), X, Y, EPS, start=START), expected)
        assert not torch.is_grad_enabled()
    net = golden_net()
    with torch.inference_mode():
        assert torch.equal(pgd(net, X + 0, Y + 0, EPS, start=START + 0), expected)


def test_result_carries_no_graph():
    x_adv = pgd(golden_net(), X.clone().requires_grad_(), Y, EPS.clone().requires_grad_())
    assert not x_adv.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_and_memory_formats_are_kept(dtype):
    net = golden_net().to(dtype)
    x = X.to(dtype).to(memory_format=torch.channels_last)
    x_adv = pgd(net, x, Y, EPS)
    assert x_adv.dtype == dtype
    assert x_adv.is_contiguous(memory_format=torch.channels_last)


def test_autocast_gives_another_gradient_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        x_adv = pgd(golden_net(), X, Y, EPS, start=START)
    assert x_adv.dtype == torch.float32
    assert (x_adv == EXPECTED["pgd_ce"]).float().mean() > 0.9  # bfloat16 keeps 8 bits: signs of small gradients turn


def test_empty_batch():
    x_adv = pgd(golden_net(), X[:0], Y[:0], 8 / 255)
    assert x_adv.shape == (0, 3, 16, 16)


def test_plain_function_as_model():
    net = golden_net()
    assert torch.equal(pgd(lambda x: net(x), X, Y, EPS, start=START), pgd(net, X, Y, EPS, start=START))


def test_golden_mma():
    x_adv = mma(golden_net(), X, Y, EPS, 2 / 255, 5, k=3, start=START.clamp(0, 1))
    # As for the cross-entropy above.
    assert (x_adv != EXPECTED["mma"]).float().mean() < 1e-3


@pytest.mark.parametrize("eps", [0.05, EPS, EPS[:, :1], PackedEpsilon.pack(EPS > 7.5 / 255, 8 / 255, 0.0)])
def test_mma_equals_one_attack_per_class(eps):
    net = golden_net()
    start = START.clamp(0, 1)
    wrong = net(X).detach().scatter(1, Y[:, None], -math.inf).topk(4).indices
    best, expected = torch.full((8,), -math.inf), X.clone()
    for c in wrong.T:

        def towards(logits, y, c=c):
            return -(logits.gather(1, y[:, None]) - logits.gather(1, c[:, None]) + 50).clamp(min=0)

        x_adv = pgd(net, X, Y, eps, 2 / 255, 4, start=start, loss=towards)
        logits = net(x_adv).detach()
        gain = (logits.gather(1, c[:, None]) - logits.gather(1, Y[:, None]))[:, 0]
        expected = torch.where((gain > best)[:, None, None, None], x_adv, expected)
        best = torch.maximum(best, gain)
    got = mma(net, X, Y, eps, 2 / 255, 4, k=4, start=start)
    assert (got != expected).float().mean() < 1e-3  # convolutions may round otherwise at another batch size


def test_mma_takes_every_wrong_class_where_there_are_fewer_than_k():
    net = golden_net()
    few = torch.nn.Sequential(net, torch.nn.Linear(10, 2))
    assert mma(few, X, Y % 2, 0.05, 0.01, 2, k=3).shape == X.shape
    assert mma(few, X[:0], Y[:0], 0.05, 0.01, 2).shape == (0, 3, 16, 16)
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        mma(net, X, Y, 0.05, 0.01, 2, k=0)
    with pytest.raises(ValueError, match=r"y must be class indices in \[0, 2\)"):
        mma(few, X, Y % 2 + 1, 0.05, 0.01, 2)


def test_pgd_class_is_pgd():
    net = golden_net()
    torch.manual_seed(0)
    expected = pgd(net, X, Y, 8 / 255, 2 / 255, 10)
    torch.manual_seed(0)
    assert torch.equal(PGD(net)(X, Y), expected)
    expected = pgd(net, X, Y, EPS, 1 / 255, 3, start="zero")
    assert torch.equal(PGD(net, EPS, 1 / 255, 3, random_start=False)(X, Y), expected)
    assert repr(PGD(net)) == "PGD(eps=0.03137, alpha=0.007843, steps=10, random_start=True)"


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_backends_agree(backend):
    expected = pgd(golden_net(), X, Y, EPS, start=START)
    with part_fast.backend(backend):
        assert torch.equal(pgd(golden_net(), X, Y, EPS, start=START), expected)


class Headless(nn.Module):
    def forward(self, x):
        return torch.zeros(len(x), 10, requires_grad=True) * 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: pgd(net, X * 255, Y, 0.1), r"x must be in \[0, 1\], got values from"),
        (lambda net: pgd(net, X.byte(), Y, 0.1), "x must be float32, .*got torch.uint8"),
        (lambda net: pgd(net, X[0], Y, 0.1), r"x must have shape \(N,C,H,W\)"),
        (lambda net: pgd(net, X, Y + 10, 0.1), r"y must be class indices in \[0, 10\), got values from"),
        (lambda net: pgd(net, X, Y - 10, 0.1), "y must be class indices >= 0"),
        (lambda net: pgd(net, X, Y[:4], 0.1), r"y must have shape \(8,\)"),
        (lambda net: pgd(net, X, Y.to("meta"), 0.1), "y must be on the device of x"),
        (lambda net: pgd(net, X, Y.int(), 0.1), "y must be an int64 tensor"),
        (lambda net: pgd(net, X, Y, -0.1), "eps must be finite and >= 0, got -0.1"),
        (lambda net: pgd(net, X, Y, math.nan), "eps must be finite and >= 0, got nan"),
        (lambda net: pgd(net, X, Y, -EPS), "eps must be finite and >= 0, got values from"),
        (lambda net: pgd(net, X, Y, EPS * math.nan), "eps must be finite and >= 0, got values from nan"),
        (lambda net: pgd(net, X, Y, EPS[:3]), "eps must broadcast to the images"),
        (lambda net: pgd(net, X, Y, "8/255"), "eps must be a number, got str"),
        (lambda net: pgd(net, X, Y, 0.1, math.inf), "alpha must be finite"),
        (lambda net: pgd(net, X, Y, 0.1, steps=-1), "steps must be >= 0, got -1"),
        (lambda net: pgd(net, X, Y, 0.1, steps=1.5), "steps must be a whole number, got float"),
        (lambda net: pgd(net, X, Y, 0.1, start="normal"), "start must be one of uniform, zero or a tensor"),
        (lambda net: pgd(net, X, Y, 0.1, start=X[:2]), "start must have the shape of x"),
        (lambda net: pgd(net, X, Y, 0.1, loss="dlr"), "loss must be one of ce, kl, margin or callable"),
        (lambda net: pgd(net, X, Y, 0.1, clip=(1, 0)), "clip must be two numbers, low <= high"),
        (lambda net: pgd(Headless(), X, Y, 0.1), "model must lead from its input to the loss"),
        (lambda net: pgd(nn.Conv2d(3, 3, 1), X, Y, 0.1), r"model must give logits \(8, classes\)"),
        (lambda net: PGD(net, steps="10"), "steps must be a whole number, got str"),
        (lambda net: pgd(None, X, Y, 0.1), "model must be callable, images to logits, got NoneType"),
        (lambda net: mma("resnet18", X, Y, 0.1), "model must be callable, images to logits, got str"),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        call(golden_net())
    assert "\n" not in str(error.value)


# ---- images of other ranges, strides and labels ----------------------------------------------------------------

MEAN, STD = torch.tensor([0.49, 0.48, 0.45]).view(3, 1, 1), torch.tensor([0.25, 0.24, 0.26]).view(3, 1, 1)


class Normalised(nn.Module):
    """The golden network on images that were normalised before."""

    def __init__(self, mean, std):
        super().__init__()
        self.net, self.mean, self.std = golden_net(), mean, std

    def forward(self, x):
        return self.net(x * self.std + self.mean)


def attacks(net, x, y, eps, alpha, clip, start):
    return {
        "pgd": lambda: pgd(net, x, y, eps, alpha, 3, start=start, clip=clip),
        "kl": lambda: pgd(net, x, y, eps, alpha, 3, start=start, clip=clip, loss="kl"),
        "margin": lambda: pgd(net, x, y, eps, alpha, 3, start=start, clip=clip, loss="margin"),
        "mma": lambda: mma(net, x, y, eps, alpha, 3, start=start, clip=clip),
        "PGD": lambda: PGD(net, eps, alpha, 3, random_start=False, clip=clip)(x, y),
    }


@pytest.mark.parametrize("attack", ["pgd", "kl", "margin", "mma", "PGD"])
@pytest.mark.parametrize("channels", [False, True])
def test_an_attack_on_normalised_images_is_the_attack_on_images(attack, channels):
    """With one scale for all channels, eps and alpha scale too; with a mean per channel so does the clip."""
    mean, std = (MEAN, 0.25) if channels else (0.5, 0.25)
    start = X if attack == "PGD" else START.clamp(0, 1)
    expected = attacks(golden_net(), X, Y, 0.05, 0.02, (0, 1), start)[attack]()
    low, high = (0 - mean) / std, (1 - mean) / std
    net, x, begin = Normalised(mean, std), (X - mean) / std, (start - mean) / std
    got = attacks(net, x, Y, 0.05 / std, 0.02 / std, (low, high), begin)[attack]()
    assert (got >= torch.as_tensor(low)).all()
    assert (got <= torch.as_tensor(high)).all()
    # Scaling rounds; where a gradient is about 0 a sign may turn, and then the pixel goes the other way.
    assert ((got * std + mean - expected).abs() > 1e-5).float().mean() < 0.02


def test_uniform_start_is_clipped_per_channel():
    low, high = (0 - MEAN) / STD, (1 - MEAN) / STD
    x = (X - MEAN) / STD
    start = pgd(Normalised(MEAN, STD), x, Y, 0.5, steps=0, clip=(low, high))
    assert (start >= low).all()
    assert (start <= high).all()
    assert ((start == low) | (start == high)).float().mean() > 0.05
    with pytest.raises(ValueError, match=r"x must be in \[-1.96, 2.04\] in channel 0, got values from -1.9.* to 2.5"):
        pgd(Normalised(MEAN, STD), x.where(torch.arange(16) != 3, 2.5), Y, 0.5, clip=(low, high))


def normalised_and_back(x):
    """By CIFAR-10's usual mean and deviation."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]))
    return (x - mean) / std * std + mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rounding_outside_the_range_is_accepted_and_the_result_within_it(dtype):
    u = torch.zeros(8, 3, 16, 16)
    u[:, :, :8] = 1
    x = normalised_and_back(u).to(dtype)
    assert dtype != torch.float32 or x.min() < 0
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 1 + 9e-7, -9e-7
    net = golden_net().to(dtype)
    for attack in ("pgd", "kl", "mma"):
        for start in ("zero", "uniform"):
            kept = x.clone()
            x_adv = attacks(net, x, Y, 0.03, 0.01, (0, 1), start)[attack]()
            assert torch.equal(x, kept)
            assert x_adv.min() >= 0
            assert x_adv.max() <= 1
            assert (x_adv - x).abs().max() <= 0.03 + (1e-6 if dtype != torch.bfloat16 else 2**-8)
    assert pgd(net, x, Y, 0.03, steps=0, start="zero").min() >= 0
    assert (pgd(net, x, Y, 0.0, start="zero") - x).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("value", "shown"), [(1 + 2e-6, "to 1.0000020"), (-2e-6, "from -2e-06"), (1 + 3e-3, "to 1.003"), (math.nan, "nan")]
)
def test_a_refusal_shows_what_is_outside(value, shown):
    x = X.clone()
    x[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"x must be in \[0, 1\], got values from") as error:
        pgd(golden_net(), x, Y, 0.1)
    assert shown in str(error.value)


def test_the_rounding_accepted_grows_with_the_range():
    x = X * 255
    x[0, 0, 0, 0] = 255.0001
    net = Normalised(0.0, 1 / 255)
    assert pgd(net, x, Y, 8.0, 2.0, 1, clip=(0, 255)).max() <= 255
    x[0, 0, 0, 0] = 255.001
    with pytest.raises(ValueError, match=r"x must be in \[0, 255\], got values from .* to 255.001"):
        pgd(net, x, Y, 8.0, 2.0, 1, clip=(0, 255))


@pytest.mark.parametrize(
    ("eps", "clip", "warns"),
    [
        (8, (0, 1), True),
        (8.0, (0, 1), True),
        (torch.full((8, 1, 1, 1), 8.0), (0, 1), True),
        (PackedEpsilon.pack(EPS[:, :1] > 7.5 / 255, 8.0, 7.0), (0, 1), True),
        (3.0, (-1, 1), True),
        (8.0, ([0.0] * 3, [1.0] * 3), True),
        (1.0, (0, 1), False),
        (2.0, (-1, 1), False),
        (8.0, (0, 255), False),
        (8.0, None, False),
        (8.0, ([0.0] * 3, [255.0] * 3), False),
    ],
)
def test_eps_in_gray_levels_warns(eps, clip, warns):
    calls = {
        "pgd": lambda: pgd(golden_net(), X, Y, eps, 0.01, 0, clip=clip),
        "mma": lambda: mma(golden_net(), X, Y, eps, 0.01, 0, clip=clip),
    }
    for call in calls.values():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        said = [w for w in caught if "eps is in the units of the images" in str(w.message)]
        assert len(said) == warns
        assert all(w.filename == __file__ for w in said)  # where the user wrote it


def test_eps_of_one_per_image_needs_its_dimensions():
    for shape in ((8,), (16,), (8, 1)):
        with pytest.raises(ValueError, match=r"eps must broadcast .*\(N,1,1,1\) for one per image.*got \(") as error:
            pgd(golden_net(), X, Y, torch.full(shape, 0.1))
        assert str(shape) in str(error.value)
    square = X[..., :8]  # W is N
    with pytest.raises(ValueError, match=r"\(N,1,1,1\) for one per image"):
        part_fast.project_linf(square, square, torch.rand(8))
    assert pgd(golden_net(), X, Y, torch.tensor([0.1]), steps=1).shape == X.shape  # one for all


@pytest.mark.parametrize("attack", ["pgd", "kl", "margin", "mma", "PGD"])
@pytest.mark.parametrize("kind", STRIDED)
def test_strided_images_are_copied(attack, kind):
    x = strided(kind, (8, 3, 16, 16))
    whole = x.contiguous(memory_format=torch.channels_last if "channels_last" in kind else torch.contiguous_format)
    got, expected = (attacks(golden_net(), t, Y, 0.05, 0.02, (0, 1), "zero")[attack]() for t in (x, whole))
    assert torch.equal(got, expected)
    assert got.stride() == expected.stride()
    assert torch.equal(x, whole)
    assert torch.equal(
        pgd(golden_net(), whole, Y, 0.05, 0.02, 2, start=x), pgd(golden_net(), whole, Y, 0.05, 0.02, 2, start=whole)
    )


SOFT = 0.7 * F.one_hot(Y, 10) + 0.3 * F.one_hot((Y + 3) % 10, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_hot_labels_are_class_indices(dtype):
    net = golden_net()
    expected = pgd(net, X, Y, EPS, start=START)
    assert (pgd(net, X, F.one_hot(Y, 10).to(dtype), EPS, start=START) != expected).float().mean() < 1e-3
    expected = pgd(net, X, Y, EPS, start=START, loss="kl")
    assert torch.equal(pgd(net, X, SOFT, EPS, start=START, loss="kl"), expected)  # reads no label


def test_mixed_labels_weigh_the_losses_of_both():
    net = golden_net()

    def mixed(logits, y):
        return 0.7 * F.cross_entropy(logits, Y, reduction="none") + 0.3 * F.cross_entropy(
            logits, (Y + 3) % 10, reduction="none"
        )

    expected = pgd(net, X, Y, EPS, start=START, loss=mixed)
    assert (pgd(net, X, SOFT, EPS, start=START) != expected).float().mean() < 5e-3  # a sign of rounding size may turn
    assert (pgd(net, X, Y, EPS, start=START) != expected).float().mean() > 0.01
    seen = []
    pgd(net, X, SOFT, EPS, steps=1, loss=lambda logits, y: seen.append(y) or F.cross_entropy(logits, y))
    assert torch.equal(seen[0], SOFT)
    torch.manual_seed(0)
    one = PGD(net, EPS)(X, SOFT)
    torch.manual_seed(0)
    assert torch.equal(one, pgd(net, X, SOFT, EPS))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (SOFT * 2, "y must have rows that sum to 1, got sums from 2 to 2"),
        (SOFT * math.nan, "y must be finite and >= 0, got values from nan"),
        (SOFT - 0.01, "y must be finite and >= 0, got values from -0.01"),
        (SOFT[:, :9] / SOFT[:, :9].sum(1, keepdim=True), r"y must have shape \(8, 10\) if it holds probabilities"),
        (SOFT[:4], r"y must have shape \(8, classes\) if it holds probabilities"),
        (SOFT[0], r"y must have shape \(8, classes\) if it holds probabilities"),
        (SOFT.to("meta"), "y must be on the device of x"),
        (F.one_hot(Y, 10), r"y must have shape \(8,\), one class per image"),
        (Y.float(), r"y must have shape \(8, classes\) if it holds probabilities"),
    ],
)
def test_soft_label_errors(y, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        pgd(golden_net(), X, y, 0.1, steps=1)
    assert "\n" not in str(error.value)


def test_margins_take_class_indices_alone():
    with pytest.raises(TypeError, match=r"y must be an int64 tensor of class indices, got torch\.float32"):
        pgd(golden_net(), X, SOFT, 0.1, loss="margin")
    with pytest.raises(TypeError, match=r"y must be an int64 tensor of class indices, got torch\.float32"):
        mma(golden_net(), X, SOFT, 0.1)


def test_inside_a_torch_func_transform_an_attack_is_refused():
    net = golden_net()
    with pytest.raises(ValueError, match=r"x must be a tensor outside torch\.func transforms"):
        torch.func.grad(lambda x: pgd(net, x, Y, 0.1, steps=1).sum())(X)
    with pytest.raises(ValueError, match=r"x must be a tensor outside torch\.func transforms"):
        torch.vmap(lambda x, y: pgd(net, x[None], y[None], 0.1, steps=1))(X, Y)
