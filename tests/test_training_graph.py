"""Loss and backward of a training step, captured, on an imagined GPU: the same weights as without, or an error."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from conftest import TINY_RUN
from fake_gpu import Net, net

from part_fast.training import engine as engines
from part_fast.training.engine import Engine
from part_fast.training.step import train_step

CUDA = torch.device("cuda", 0)
N, STEPS = 4, 5
EPS = 8 / 255


class Unused(Net):
    """With weights that no loss depends on."""

    def __init__(self):
        super().__init__(10)
        self.spare = torch.nn.Linear(3, 3)


class Draws(Net):
    """Whose forward draws from one of the generators of the host."""

    def __init__(self, draw):
        super().__init__(10)
        self.draw = draw

    def forward(self, x):
        return super().forward(x) * (1 + self.draw() * self.training)


class Counts(Net):
    """Whose forward counts."""

    def __init__(self):
        super().__init__(10)
        self.forwards = 0

    def forward(self, x):
        self.forwards += self.training
        return super().forward(x) * (1 + self.forwards)


def engine_of(gpu, model, monkeypatch, **changes):
    config = dataclasses.replace(TINY_RUN, **{"model": "net", "method": "at", "precision": "fp32", **changes})
    monkeypatch.setattr(engines, "build_model", lambda *_: gpu.put(model))
    engine = Engine(config, 10, CUDA)
    engine.model.train()
    return engine


def trained(gpu, model, monkeypatch, method="at", lengths=(N,) * STEPS, **changes):
    """(Engine, losses and logits) after a step on each of the batches, which are one epoch."""
    engine = engine_of(gpu, model, monkeypatch, method=method, **changes)
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    found, done = [], 0
    for n in lengths:
        x, y = gpu.put(torch.rand(n, 3, 16, 16, generator=draw)), gpu.put(torch.randint(0, 10, (n,), generator=draw))
        found.append(train_step(engine, method, x, y, EPS, done, sum(lengths)))
        done += n
    return engine, found


def values(engine):
    return {name: value.inner for name, value in engine.model.state_dict().items()}


@pytest.mark.parametrize(
    ("changes", "captured"),
    [
        ({}, 2),
        ({"method": "trades"}, 2),
        ({"attack": "mma"}, 2),
        ({"label_smoothing": 0.1, "average": "ema:0.9"}, 2),
        ({"awp": 0.005}, 2),
        ({"lengths": (N, N, N, N - 1)}, 2),
        # Of two batches to an update, the first of all makes the gradients; alone at the end one weighs twice as much.
        ({"accumulate": 2, "batch_size": N}, 3),
    ],
    ids=str,
)
def test_the_weights_are_those_without_a_graph(gpu, monkeypatch, changes, captured):
    plain, expected = trained(gpu, net(10), monkeypatch, **{"batch_size": N, **changes}, cuda_graph=False)
    assert not gpu.graphs
    engine, found = trained(gpu, net(10), monkeypatch, **{"batch_size": N, **changes}, cuda_graph=True)
    assert len(gpu.graphs) == captured
    assert len(engine.graphs) == captured - len(engine.attack_model.graphs)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.loss.inner, other.loss.inner)
        assert torch.equal(one.logits.inner, other.logits.inner)
    right = values(plain)
    assert any(not torch.equal(value, net(10).state_dict()[name]) for name, value in right.items())
    for name, value in values(engine).items():
        assert torch.equal(value, right[name]), name


def test_weights_without_a_gradient_stay(gpu, monkeypatch):
    """Zeros in the place of no gradient would let weight decay move them."""
    with torch.random.fork_rng([]):
        model = Unused()
    before = model.spare.weight.detach().clone()
    engine, _ = trained(gpu, model, monkeypatch, cuda_graph=True, weight_decay=0.1)
    assert len(engine.graphs) == 1
    assert torch.equal(engine.model.spare.weight.inner, before)


def test_frozen_batch_norm_is_captured_anew(gpu, monkeypatch):
    engine, _ = trained(gpu, net(10), monkeypatch, batch_size=N, cuda_graph=True)
    engine.model.stem[1].eval()
    kept = engine.model.stem[1].running_mean.inner.clone()
    x, y = gpu.put(torch.rand(N, 3, 16, 16)), gpu.put(torch.arange(N))
    train_step(engine, "at", x, y, EPS)
    assert len(engine.graphs) == 2
    assert torch.equal(engine.model.stem[1].running_mean.inner, kept)


@pytest.mark.filterwarnings("ignore:AttackModel folded none")
@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand())], ids=["Python", "numpy"])
def test_a_network_that_draws_on_the_host_is_refused(gpu, monkeypatch, draw):
    with torch.random.fork_rng([]):
        model = Draws(draw)
    with pytest.raises(RuntimeError, match="must be off for this network, which draws from Python's or numpy's gen"):
        trained(gpu, model, monkeypatch, cuda_graph=True)


def test_a_network_whose_forward_changes_it_is_refused(gpu, monkeypatch):
    with torch.random.fork_rng([]):
        model = Counts()
    with pytest.raises(RuntimeError, match="must be off for this network, whose forward changes its forwards"):
        trained(gpu, model, monkeypatch, cuda_graph=True)
