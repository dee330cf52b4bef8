"""AutoAttack through pyautoattack: its budget, that it repeats and leaves no trace; at length on a trained model."""

import dataclasses
import math
import subprocess
import sys
import warnings

import pytest
import torch
from golden_attack import EXPECTED, assert_untouched, golden_net, snapshot
from safetensors.torch import load_file

from part_fast import pgd
from part_fast.attacks.autoattack import autoattack
from part_fast.config import PRESETS
from part_fast.evaluation.accuracy import evaluate
from part_fast.training.loop import train

pytest.importorskip("pyautoattack", reason="the package pyautoattack is not installed")
X = EXPECTED["x"]


@pytest.mark.slow
def test_stays_within_eps_beats_pgd_repeats_and_leaves_no_trace():
    net = golden_net()
    y = net(X).argmax(1)
    before = snapshot(net)
    x_adv = autoattack(net, X, y, eps=0.03, seed=1)
    assert_untouched(before, net)
    assert (x_adv - X).abs().max() <= 0.03 + 1e-6
    robust = net(x_adv).argmax(1) == y
    assert robust.sum() <= (net(pgd(net, X, y, 0.03, 0.0075, 20)).argmax(1) == y).sum()
    assert torch.equal(autoattack(net, X, y, eps=0.03, seed=1), x_adv)


@pytest.mark.slow
def test_a_trained_model_on_64_images_repeats_and_is_no_better_than_under_pgd(tmp_path):
    """Real images, an adversarially trained network, the evaluation as a user calls it."""
    config = dataclasses.replace(
        PRESETS["demo"], method="at", train_size=2000, epochs=3, warmup_epochs=0, lr_drops=(2,)
    )
    train(config, tmp_path / "run", log=lambda line: None)
    for out in ("first", "again"):
        evaluate(tmp_path / "run", ("natural", "pgd20", "aa"), n=64, batch_size=32, out=tmp_path / out)
    first, again = (load_file(tmp_path / out / "evaluation_images.safetensors") for out in ("first", "again"))
    assert torch.equal(first["aa"], again["aa"])
    assert not (first["aa"] & ~first["natural"]).any(), "what is wrong without an attack is not right under one"
    assert 0.1 < first["aa"].float().mean() < first["natural"].float().mean()
    # One image is 1.6 points; two standard errors of a paired difference of a few images are about three images.
    assert first["aa"].sum() <= first["pgd20"].sum() + 3


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes(classes, monkeypatch):
    import pyautoattack

    net = torch.nn.Sequential(golden_net(), torch.nn.Linear(10, classes))
    y = net(X).argmax(1)
    ran = []
    run = pyautoattack.AutoAttack.run_standard_evaluation

    def short(self, *args, **kwargs):
        for attack in (self.apgd, self.apgd_targeted, self.fab):
            attack.n_iter = 3
        self.square.n_queries = 5
        ran.extend(self.attacks_to_run)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", short)
    # So small an eps that images are left for every attack.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x_adv = autoattack(net, X, y, eps=1e-4)
    said = [str(w.message) for w in caught if "AutoAttack" in str(w.message)]
    assert (x_adv - X).abs().max() <= 1e-4 + 1e-6
    if classes < 4:
        assert ran == ["apgd-ce", "fab-t", "square"]
        text = f"AutoAttack runs without targeted APGD, whose loss is not defined for {classes} classes: it takes 4"
        assert said == [text]
    else:
        assert ran == ["apgd-ce", "apgd-t", "fab-t", "square"]
        assert said == []


class ChannelsLast(torch.nn.Module):
    """Its gradient is in that format, as a GPU gives that of a network in it."""

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad.contiguous(memory_format=torch.channels_last)

    def forward(self, x):
        return self.Identity.apply(x)


@pytest.mark.parametrize("clip", [(0.0, 1.0), (-1.0, 1.0)])
@pytest.mark.parametrize("of", ["images", "network"])
def test_channels_last(of, clip, few_steps):
    """Targeted APGD takes views that such images have not; gradients in that format do no harm."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(128, 5))
    x = X[:4, :, :6, :6] * 2 - 1 if clip[0] < 0 else X[:4, :, :6, :6]
    y = net(x.contiguous()).argmax(1)
    plain = autoattack(net, x.contiguous(), y, 0.01, clip=clip)
    if of == "network":
        net = torch.nn.Sequential(ChannelsLast(), net)
    else:
        x = x.contiguous(memory_format=torch.channels_last)
    found = autoattack(net, x, y, 0.01, clip=clip)
    assert found.stride() == (x if of == "images" else x.contiguous()).stride()
    assert bool(((found - x).abs() <= 0.01 + 1e-6).all())
    # Roundings of another order of additions may turn a sign where a gradient is almost zero.
    assert torch.equal(net(found).argmax(1) == y, net(plain).argmax(1) == y)


def test_wrong_images_are_given_back():
    net = torch.nn.Sequential(golden_net(), torch.nn.Linear(10, 4))
    y = net(X).argmax(1)
    # Every image is wrong from the start: nothing to attack, but every check is made.
    assert torch.equal(autoattack(net, X, (y + 1) % 4, eps=0.03), X)
    scaled = torch.nn.Sequential(Shifted(), net)
    assert torch.equal(autoattack(scaled, X * 4 - 2, (y + 1) % 4, eps=0.1, clip=(-2, 2)), X * 4 - 2)


class Shifted(torch.nn.Module):
    def forward(self, x):
        return (x + 2) / 4


def test_images_of_another_range():
    net = golden_net()
    y = net(X).argmax(1)
    scaled = torch.nn.Sequential(Shifted(), net)
    x = X * 4 - 2
    x_adv = autoattack(scaled, x, y, eps=0.4, clip=(-2, 2))  # the first attack finds all
    assert (x_adv - x).abs().max() <= 0.4 + 2.4e-7  # one rounding of a number up to 4
    assert (x_adv - x).abs().max() > 0.39
    assert x_adv.min() >= -2
    assert x_adv.max() <= 2
    assert (scaled(x_adv).argmax(1) != y).all()


# In a process of its own, in which nothing has started CUDA. What it is to be given when it starts is in torch's list.
SEEDED = """
import torch
from part_fast.attacks import autoattack

def seed_of_cuda():
    queued = torch.cuda._lazy_seed_tracker.manual_seed_all_cb[0]
    return queued.__closure__[queued.__code__.co_freevars.index("seed")].cell_contents

torch.manual_seed(123)
before = seed_of_cuda()
net, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)), torch.rand(2, 3, 4, 4)
autoattack(net, x, net(x).argmax(1), 0.5, seed=7)  # an eps that fools it in the first of the attacks
assert not torch.cuda.is_initialized()
print(before, seed_of_cuda())
"""


def test_generators_of_cuda_that_has_not_started_keep_their_seed():
    """AutoAttack seeds every generator."""
    ran = subprocess.run([sys.executable, "-c", SEEDED], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["123", "123"]


def test_empty_batch():
    assert autoattack(golden_net(), X[:0], EXPECTED["y"][:0]).shape == (0, 3, 16, 16)


def test_errors(monkeypatch):
    net = golden_net()
    with pytest.raises(ValueError, match=r"x must be in \[0, 1\]"):
        autoattack(net, X * 2, EXPECTED["y"])
    with pytest.raises(ValueError, match="eps must be finite and >= 0"):
        autoattack(net, X, EXPECTED["y"], -1.0)
    with pytest.raises(TypeError, match="clip must be two numbers for AutoAttack: normalise inside the model"):
        autoattack(net, X, EXPECTED["y"], clip=([0.0] * 3, 1.0))
    with pytest.raises(TypeError, match="clip must be two numbers for AutoAttack"):
        autoattack(net, X, EXPECTED["y"], clip=None)
    with pytest.raises(ValueError, match="clip must be two finite numbers for AutoAttack, low < high"):
        autoattack(net, X, EXPECTED["y"], clip=(0, math.inf))
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(TypeError, match=f"x must be float32 for AutoAttack, .*, got {dtype}"):
            autoattack(golden_net().to(dtype), X.to(dtype), EXPECTED["y"])
    with pytest.raises(TypeError, match="y must be an int64 tensor of class indices"):
        autoattack(net, X, torch.full((8, 10), 0.1))
    with pytest.raises(ValueError, match="model must give at least 2 classes for AutoAttack, got 1"):
        autoattack(torch.nn.Sequential(net, torch.nn.Linear(10, 1)), X, EXPECTED["y"] * 0)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(
        ImportError,
        match=r"^part_fast needs the package pyautoattack for this .*: pip install pyautoattack, or .*\[aa\]",
    ):
        autoattack(net, X, EXPECTED["y"])
