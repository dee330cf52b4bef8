"""Warnings about gradient masking: silent for an honest model, loud for each planted kind of masking."""

import pytest
import torch
from golden_attack import EXPECTED, golden_net
from torch import nn

from part_fast.evaluation.sanity import gradient_flags, order_flags

X = EXPECTED["x"]


def right(*ones, n=200):
    result = torch.zeros(n, dtype=torch.bool)
    result[list(ones)] = True
    return result


def test_order():
    few, many = right(*range(60)), right(*range(120))
    assert order_flags({"natural": many, "pgd20": few, "aa": few}) == []
    (flag,) = order_flags({"natural": few, "pgd20": many})
    assert flag.startswith("pgd20 is above natural: by 30.00 points")
    (flag,) = order_flags({"natural": many, "pgd20": few, "aa": right(*range(100))})
    assert flag.startswith("aa is above pgd20: by 20.00 points")
    assert order_flags({"natural": many, "pgd20": few, "aa": right(*range(61))}) == []  # one image is noise


@pytest.mark.parametrize(
    ("weak", "strong", "ordered"),
    [
        ("natural", "n-fgsm", True),
        ("pgd5", "pgd20", True),
        ("pgd20", "pgd100", True),
        ("fgsm", "pgd20", True),
        ("fgsm-rs", "mma", True),
        ("mma", "aa", True),
        ("fgsm", "aa", True),
        ("fgsm", "pgd2", False),  # two steps of alpha need not reach eps
        ("n-fgsm", "pgd20", False),  # which stays within eps
        ("n-fgsm", "aa", False),
        ("mma", "pgd20", False),
        ("pgd20", "mma", False),
    ],
)
def test_which_attack_is_stronger(weak, strong, ordered):
    few, many = right(*range(60)), right(*range(120))
    assert order_flags({weak: many, strong: few}) == []
    flags = order_flags({weak: few, strong: many})
    assert flags == (
        [f"{strong} is above {weak}: by 30.00 points, twice the standard error is 6.48"] if ordered else []
    )
    assert order_flags({strong: many, weak: few}) == flags


def flags_of(model, eps=0.02):
    y = model(X).argmax(1).detach()
    return gradient_flags(model.eval(), X, y, eps, eps / 4, torch.Generator().manual_seed(0))


def test_honest_model_raises_no_flag():
    flags, figures = flags_of(golden_net())
    assert flags == []
    assert figures["zero_gradients"] == 0
    assert figures["pgd20"] <= figures["random_100_corners"]


class Staircase(nn.Module):
    """Rounds its input, so that no gradient passes though the output moves."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((x * 64).round() / 64)


class Backwards(nn.Module):
    """Passes the gradient with the wrong sign."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(2 * x.detach() - x)


def test_zero_gradients_are_seen():
    flags, figures = flags_of(Staircase(golden_net()))
    assert figures["zero_gradients"] == 1
    assert any("input gradient of exactly zero" in flag for flag in flags)


def test_random_search_that_beats_the_gradient_is_seen():
    net = golden_net()
    y = net(X).argmax(1)
    x, eps = X.repeat(8, 1, 1, 1), 0.1
    flags, figures = gradient_flags(Backwards(net), x, y.repeat(8), eps, eps / 4, torch.Generator().manual_seed(0))
    assert figures["pgd20"] > figures["random_100_corners"]
    assert any(flag.startswith("random corners beat PGD-20") for flag in flags)


@pytest.mark.parametrize("training", [True, False])
def test_model_gets_its_mode_back(training):
    net = golden_net().train(training)
    gradient_flags(net, X, EXPECTED["y"], 0.02, 0.005, torch.Generator().manual_seed(0))
    assert net.training == training
    assert all(parameter.grad is None for parameter in net.parameters())
