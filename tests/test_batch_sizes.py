"""Tests of part_fast.attack_model.batch_sizes: compiled for few sizes, and little computed in vain."""

import functools

import pytest
import torch
from torch import nn

from part_fast import AttackModel, mma, pgd
from part_fast.attack_model.batch_sizes import MANY, MOST, BatchSizes


def test_the_last_batch_of_an_epoch_is_filled_up():
    sizes = BatchSizes()
    for _ in range(10):
        assert [sizes(n) for n in (128, 128, 40)] == [128, 128, 128]
    assert len(sizes) == 1


def test_every_kind_of_attack_has_its_own_size():
    sizes = BatchSizes()
    assert sizes(24, "mma") == 24
    assert sizes(8, "pgd") == 8
    assert sizes(24, "mma") == 24
    assert sizes(5, "pgd") == 8
    assert sizes(5, "kl") == 5  # the first of its kind


def test_a_size_that_goes_on_is_compiled():
    sizes = BatchSizes()
    assert sizes(256) == 256
    assert [sizes(128) for _ in range(MANY)] == [256] * MANY
    assert sizes(128) == 128
    assert sizes(100) == 128


def test_sizes_are_bounded_but_for_larger_ones():
    sizes = BatchSizes()
    assert sizes(1000) == 1000
    for n in range(1, 200):
        sizes(n, n)
    assert len(sizes) == MOST
    assert sizes(150, "another") == 1000
    assert sizes(1001) == 1001


def test_an_mma_before_costs_a_pgd_nothing(monkeypatch):
    torch._dynamo.reset()
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(48, 5)

        def forward(self, x):
            return self.fc(x.flatten(1))

    def recording(module, **kwargs):
        def run(x):
            seen.append(len(x))
            return module(x)

        return run

    monkeypatch.setattr(torch, "compile", recording)
    torch.manual_seed(0)
    fast = AttackModel(Net(), compile=True)
    x, y = torch.rand(8, 3, 4, 4), torch.arange(8) % 5
    mma(fast, x, y, 8 / 255, 2 / 255, 2, k=3)
    assert seen == [24, 24]
    seen.clear()
    found = pgd(fast, x, y, 8 / 255, steps=2, start="zero")
    assert seen == [8, 8]
    assert torch.equal(pgd(fast, x[:3], y[:3], 8 / 255, steps=2, start="zero"), found[:3])
    assert seen == [8, 8, 8, 8]


def test_each_size_is_compiled_once(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    fast = AttackModel(model, compile=True)
    fast(torch.rand(6, 3, 8, 8, requires_grad=True), kind="a")
    fast(torch.rand(4, 3, 8, 8, requires_grad=True), kind="b")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (6, 4, 5, 3, 1):
            x = torch.rand(n, 3, 8, 8, requires_grad=True)
            torch.testing.assert_close(fast(x, kind="a"), model(x))
            assert fast(x[:0]).shape == (0, 4)


@pytest.mark.parametrize("n", [1, 3])
def test_a_size_of_its_own_is_not_filled_up(n):
    assert BatchSizes()(n) == n
