"""Rules: by name and as functions, against the ops, a bisection and values worked out by hand; ensembles; learning."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_attack import EXPECTED, golden_net
from torch import nn

import part_fast
from part_fast import CamBudget
from part_fast.budgets.bank import MaskBank
from part_fast.budgets.rules import RULES, LearnedRule, budget_matched, ensemble, find_rule, fixed_mean, region
from part_fast.config import TrainConfig

X, Y = EXPECTED["x"], EXPECTED["y"]
EPS, LOW = 8 / 255, 2 / 255


def budget(rule, eps=EPS, eps_low=LOW, **kwargs):
    return CamBudget(golden_net(), eps, eps_low, rule=rule, target_layer="relu2", **kwargs)


def test_a_function_that_repeats_soft_gives_soft():
    def soft(cam, size):
        return part_fast.upsample_cam(cam, size).clamp(0, 1)[:, None]

    # eps_low + w * (eps - eps_low) rounds otherwise than interpolation does.
    torch.testing.assert_close(budget(soft)(X), budget("soft")(X), atol=1e-8, rtol=1e-6)


def test_a_function_that_repeats_a_mask_gives_the_mask_bit_for_bit():
    def zscore(cam, size):
        return part_fast.cam_mask(cam, size).float()

    assert torch.equal(budget(zscore)(X), budget("zscore")(X))


def test_a_function_per_channel_and_with_the_class():
    seen = {}

    def red(cam, size, target):
        seen.update(cam=cam, size=size, target=target)
        weights = cam.new_zeros(len(cam), 3, *size)
        weights[:, 0] = 1
        return weights

    eps = budget(red)(X, Y)
    assert seen["size"] == (16, 16)
    assert torch.equal(seen["cam"], budget("soft").evidence(X, Y)[0])
    assert torch.equal(seen["target"], Y)
    assert torch.equal(eps[:, 0], torch.full((8, 16, 16), EPS))
    assert torch.equal(eps[:, 1:], torch.full((8, 2, 16, 16), LOW))
    net = golden_net()
    budget(red)(X)
    assert torch.equal(seen["target"], net(X).argmax(1))


@pytest.mark.parametrize("control", ["permuted", "random", "inverted", "uniform"])
def test_controls_of_a_function(control):
    function = budget(lambda cam, size: part_fast.cam_mask(cam, size).float(), control=control)
    name = budget("zscore", control=control)
    torch.manual_seed(0)
    got = function(X)
    torch.manual_seed(0)
    assert torch.equal(got, name(X))


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (lambda cam, size: cam, ValueError, r"rule must give weights \(8,1,16,16\) or \(8,3,16,16\), got \(8, "),
        (lambda cam, size: torch.full((8, 1, 16, 16), 1.5), ValueError, r"the result of rule must be in \[0, 1\], got"),
        (lambda cam, size: torch.full((8, 1, 16, 16), torch.nan), ValueError, "the result of rule must be in"),
        (lambda cam, size: torch.ones(8, 1, 16, 16, dtype=torch.bool), TypeError, "the result of rule must be float32"),
        (lambda cam, size: None, TypeError, "the result of rule must be a Tensor, got None"),
    ],
)
def test_functions_that_give_no_weights(rule, error, message):
    with pytest.raises(error, match=message):
        budget(rule)(X)


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (
            "nope",
            ValueError,
            r"zscore, released, quantile:q .*soft, budget-matched:MEAN, region:NAME, learned:FILE, or a function",
        ),
        ("budget-matched", ValueError, "budget-matched:MEAN"),
        ("budget-matched:9/255", ValueError, r"must have eps_low <= MEAN <= eps, .*got 'budget-matched:9/255'"),
        ("budget-matched:7.5/", ValueError, "must have eps_low <= MEAN <= eps"),
        ("budget-matched:x", ValueError, "must have eps_low <= MEAN <= eps"),
        ("region:middle", ValueError, "region must be one of top-left, .*centre, got 'middle'"),
        (3, TypeError, r"rule must be a name or a function \(cam, size\) -> weights, got 3"),
        (LearnedRule, TypeError, "rule must be a name or a function"),
    ],
)
def test_unknown_rules(rule, error, message):
    with pytest.raises(error, match=message):
        budget(rule)


@pytest.mark.parametrize("rule", ["soft", "budget-matched:5/255", "region:centre", lambda cam, size: None])
def test_rules_without_bits_are_refused_before_anything_is_cleared(rule):
    images = (X * 255).round().to(torch.uint8)
    bank = MaskBank(8, (16, 16), 1, EPS, LOW)
    bank.fill(budget("zscore"), images)
    bits = bank.bits.clone()
    for call in (lambda: budget(rule).packed(X), lambda: bank.fill(budget(rule), images)):
        with pytest.raises((TypeError, ValueError), match=r"rule must be one of zscore, released, quantile:q"):
            call()
    assert torch.equal(bank.bits, bits)
    assert bits.any()


def bisection(weights, mean):
    low, high = -2 * torch.ones(len(weights), 1, 1, 1).double(), 2 * torch.ones(len(weights), 1, 1, 1).double()
    for _ in range(60):
        c = (low + high) / 2
        more = (weights.double() + c).clamp(0, 1).mean((1, 2, 3), keepdim=True) < mean
        low, high = torch.where(more, c, low), torch.where(more, high, c)
    return (weights.double() + (low + high) / 2).clamp(0, 1)


@pytest.mark.parametrize("mean", [0.0, 0.01, 0.25, 0.5, 0.9, 1.0])
def test_fixed_mean_against_bisection(mean):
    torch.manual_seed(0)
    weights = torch.rand(6, 1, 5, 7)
    weights[1] = weights[1] ** 8
    weights[2, :, :3] = 0
    weights[3] = (weights[3] > 0.7).float()
    weights[4] = 0.3
    got = fixed_mean(weights, mean)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double().mean((1, 2, 3)), torch.full((6,), mean).double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(got.double(), bisection(weights, mean), atol=1e-7, rtol=0)
    assert torch.allclose(got[4], torch.full((1, 5, 7), mean))


def test_fixed_mean_by_hand():
    # 0, 1/4, 1 with mean 3/4: raised by c, clamped at 1: c + (1/4 + c) + 1 = 9/4, so c = 1/2.
    got = fixed_mean(torch.tensor([0.0, 0.25, 1.0]).view(1, 1, 1, 3), 0.75)
    torch.testing.assert_close(got.flatten(), torch.tensor([0.5, 0.75, 1.0]))
    assert fixed_mean(torch.empty(0, 1, 2, 2), 0.5).shape == (0, 1, 2, 2)
    with pytest.raises(ValueError, match=r"mean must be in \[0, 1\], got 1.5"):
        fixed_mean(torch.zeros(1, 1, 2, 2), 1.5)


def test_fixed_mean_derivative():
    torch.manual_seed(0)
    weights = torch.rand(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: fixed_mean(w, 0.6), weights)


def test_budget_matched_has_the_mean_of_plain_training():
    eps = budget("budget-matched:5/255")(X)
    torch.testing.assert_close(eps.mean((1, 2, 3)), torch.full((8,), 5 / 255), atol=1e-7, rtol=1e-5)
    assert (eps >= LOW).all()
    assert (eps <= EPS + 1e-9).all()
    # In the order of the CAM: whoever got more by the soft rule gets no less.
    soft = budget("soft")(X)
    order = soft.flatten(1).argsort(1)
    assert (eps.flatten(1).gather(1, order).diff(dim=1) >= -1e-9).all()
    assert torch.equal(eps, budget(budget_matched(0.5))(X))
    flat = budget_matched(0.3)(torch.ones(2, 4, 4), (8, 8))
    torch.testing.assert_close(flat, torch.full((2, 1, 8, 8), 0.3))
    nan = budget_matched(0.3)(torch.full((2, 4, 4), torch.nan), (8, 8))
    torch.testing.assert_close(nan, torch.full((2, 1, 8, 8), 0.3))
    assert torch.equal(budget("budget-matched:8/255", EPS, EPS)(X), torch.full((8, 1, 16, 16), EPS))


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("top-left", (0, 0)),
        ("top-right", (0, 4)),
        ("bottom-left", (4, 0)),
        ("bottom-right", (4, 4)),
        ("centre", (3, 3)),
    ],
)
def test_regions(name, pixels):
    weights = region(name)(torch.rand(2, 2, 2), (5, 5))
    row, column = pixels
    assert weights.shape == (2, 1, 5, 5)
    rows = {"t": 2, "b": 3, "c": 2}[name[0]]
    columns = {"left": 2, "right": 3}.get(name.rpartition("-")[2], 2)
    assert weights.sum() == 2 * rows * columns
    assert (
        weights[:, :, min(row, 2) if name == "centre" else row, min(column, 2) if name == "centre" else column] == 1
    ).all()
    eps = budget(f"region:{name}")(X)
    assert eps.unique().numel() == 2


def test_quarters_share_the_image_among_them():
    quarters = [region(f"{a}-{b}")(torch.rand(1, 2, 2), (7, 5)) for a in ("top", "bottom") for b in ("left", "right")]
    assert torch.equal(sum(quarters), torch.ones(1, 1, 7, 5))


def test_ensemble_by_hand():
    a = torch.tensor([[[0.0, 2.0], [4.0, 1.0]]])
    b = torch.tensor([[[3.0, 1.0], [1.0, 2.0]]])
    flat = torch.full((1, 2, 2), 5.0)
    expected = torch.tensor([[[0.0 + 1, 0.5 + 0], [1.0 + 0, 0.25 + 0.5]]])
    torch.testing.assert_close(ensemble([a, b]), expected / 2)
    torch.testing.assert_close(ensemble([a, b, flat]), expected / 3)
    with pytest.raises(ValueError, match=r"cams must be maps \(N,h,w\) of one shape"):
        ensemble([a, torch.zeros(1, 3, 3)])


def test_method_ensemble_is_the_mean_of_its_members():
    members = ("gradcam", "xgradcam", "layercam", "hirescam")
    maps = [budget("soft", method=member).evidence(X)[0] for member in members]
    units = [(m - m.amin((1, 2), True)) / (m.amax((1, 2), True) - m.amin((1, 2), True)) for m in maps]
    got, _ = budget("soft", method="ensemble").evidence(X)
    torch.testing.assert_close(got, sum(units) / 4)
    two, _ = budget("soft", method="ensemble:layercam+gradcam").evidence(X)
    torch.testing.assert_close(two, (units[2] + units[0]) / 2)
    for method in ("ensemble:", "ensemble:gradcam+nope", "gradcam+layercam"):
        with pytest.raises(ValueError, match=r"method must be one of gradcam, .*ensemble"):
            budget("soft", method=method)


@pytest.mark.parametrize("classes", [None, 10])
def test_learned_rule_gets_gradients_through_the_ops(classes):
    torch.manual_seed(0)
    rule = LearnedRule((16, 16), classes)
    net = golden_net().eval()
    eps = CamBudget(net, EPS, LOW, rule=rule, target_layer="relu2")(X, Y)
    assert eps.requires_grad
    assert eps.shape == (8, 1, 16, 16)
    x_adv = part_fast.pgd(net, X, Y, eps, 2 / 255, 2)
    leaf = x_adv.detach().requires_grad_()
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(net(leaf), Y), leaf)
    last = part_fast.pgd_step(x_adv, grad, X, eps, 2 / 255)
    nn.functional.cross_entropy(net(last), Y).backward()
    assert rule.gain.grad != 0
    # Each class's map hears of its own images alone.
    moved = rule.place.grad.flatten(1).any(1)
    expected = torch.zeros(10, dtype=torch.bool).index_fill(0, Y, True) if classes else torch.ones(1, dtype=torch.bool)
    assert torch.equal(moved, expected)
    assert all(p.grad is None for p in golden_net().parameters())


def test_learned_rule_by_hand():
    rule = LearnedRule((2, 2), 3)
    with torch.no_grad():
        rule.place[1] = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
        rule.gain.fill_(2.0)
    cam = torch.tensor([[[0.0, 1.0], [1.0, 2.0]]])
    got = rule(cam, (2, 2), target=torch.tensor([1]))
    torch.testing.assert_close(got, torch.sigmoid(torch.tensor([[[[0.0, 2.0], [3.0, 5.0]]]])))
    with pytest.raises(ValueError, match=r"size must be \(2, 2\), of which the maps are learned, got \(4, 4\)"):
        rule(cam, (4, 4), target=torch.tensor([1]))
    fixed = LearnedRule((2, 2), mean=0.25)(cam, (2, 2), target=torch.tensor([1]))
    torch.testing.assert_close(fixed.mean(), torch.tensor(0.25))


def test_functions_on_no_images():
    for rule in (LearnedRule((16, 16), 10), "budget-matched:5/255", "region:centre"):
        assert budget(rule)(X[:0]).shape == (0, 1, 16, 16)


@pytest.mark.parametrize("rule", ["budget-matched:8/255", "region:top-left"])
def test_a_run_takes_the_names(rule):
    TrainConfig(rule=rule, eps=9 / 255).check()
    with pytest.raises(ValueError, match="refresh must be batch with rule"):
        TrainConfig(rule=rule, eps=9 / 255, refresh="2").check()
    with pytest.raises(ValueError, match="MEAN"):
        TrainConfig(rule="budget-matched:1/2").check()
    TrainConfig(cam="ensemble").check()
    with pytest.raises(ValueError, match="cam must be one of"):
        TrainConfig(cam="ensemble:nope").check()


def test_the_table_names_every_rule(tmp_path):
    examples = {
        "quantile:Q": "quantile:0.5",
        "budget-matched:MEAN": "budget-matched:5/255",
        "region:NAME": "region:centre",
        "learned:FILE": f"learned:{tmp_path / 'rule.safetensors'}",
    }
    LearnedRule((16, 16)).save(tmp_path / "rule.safetensors")
    for name, help in RULES.items():
        find_rule(examples.get(name, name), EPS, LOW)
        assert help


EXAMPLES = Path(__file__).parents[1] / "examples"


def said(name):
    """What an example prints, run as a user runs it."""
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_example_of_rules():
    text = said("rules")
    assert "its earlier form   eps from 8.00 to 12.00" in text
    assert "one region         eps from 8.00 to 12.00, mean 9.000" in text
    assert re.search(r"mean of 8/255 .* mean 8\.000", text)


@pytest.mark.slow
def test_example_of_a_learned_rule():
    before, after, mean, spread = map(
        float, re.search(r"before learning (\S+), after (\S+);.* (\S+)/255\n.* (\S+);", said("learned_rule")).groups()
    )
    assert after > before  # which it learns to do
    assert mean == 7.0  # 4 + 0.25 * (16 - 4)
    assert spread > 0


@pytest.mark.slow
def test_example_of_a_vision_transformer():
    pytest.importorskip("torchvision", reason="the torchvision package is not installed")
    text = said("train_vit")
    first, last = map(float, re.search(r"first ten steps (\S+), of the last ten (\S+)", text).groups())
    assert last < first
    assert "50 different masks for 50 images, 30% of the pixels" in text
