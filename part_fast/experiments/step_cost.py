"""What a training step costs by several configurations: seconds, timed in turn in one process, and memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from part_fast import backends
from part_fast.attacks.catalogue import ATTACKS
from part_fast.bench.clocks import Progress, clock_for, silent, time_in_turn
from part_fast.budgets.cam import CamBudget
from part_fast.budgets.perturbations import PerturbationBank
from part_fast.config import TrainConfig, find_device
from part_fast.data.memory import Dataset, to_float
from part_fast.methods import METHODS
from part_fast.ops.bank_view import BankView
from part_fast.training.engine import Engine
from part_fast.training.step import batch_attack, batch_epsilon, batch_loss, train_step

WARM_UP = 2  # steps of each that are not timed: they allocate, pack weights and compile


@dataclass(frozen=True)
class Cost:
    """Of a step: seconds for an image, the median over rounds; bytes: the most that it holds besides what lasts.

    bank: bytes for an image that last, where an attack remembers its perturbation.
    """

    seconds: float
    bytes: int
    bank: int


def step_costs(
    configs: Mapping[str, TrainConfig],
    data: Dataset,
    rounds: int,
    *,
    without_kernels: str | None = None,
    progress: Progress = silent,
) -> dict[str, Cost]:
    """name -> what a step on the first batch of `data` costs, not augmented; each round runs every configuration once.

    without_kernels: a name more, of the first configuration in plain torch: ops by their references, attacks on the
        model itself.
    """
    steps: dict[str, Callable[[], Tensor]] = {}
    banks: dict[str, int] = {}
    first = next(iter(configs.values()))
    for name, config in configs.items():
        steps[name], banks[name] = _step(config, data, _with_kernels)
    if without_kernels is not None:
        steps[without_kernels], banks[without_kernels] = _step(first, data, _without_kernels)
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    clock = clock_for(find_device(first.device))
    seconds, _ = time_in_turn(steps, clock, rounds, progress)
    costs = {}
    for name, step in steps.items():
        images = min(configs.get(name, first).batch_size, len(data))
        costs[name] = Cost(statistics.median(seconds[name]) / images, clock.peak_bytes(step), banks[name])
    return costs


Epsilon = float | Tensor | CamBudget
Train = Callable[[Engine, Tensor, Tensor, Epsilon, BankView | None], Tensor]


def _step(config: TrainConfig, data: Dataset, train: Train) -> tuple[Callable[[], Tensor], int]:
    """(a training step that can be repeated, bytes of a bank's image)."""
    device = find_device(config.device)
    with torch.random.fork_rng(devices=[]):
        engine = Engine(config, data.num_classes, device, load=False)
    engine.model.train()
    images = data.images[: config.batch_size].to(device)
    x, y = to_float(images), data.labels[: len(images)].to(device)
    indices = torch.arange(len(x), device=device)
    budget = engine.budget if METHODS[config.method].weighted else None
    epsilon = batch_epsilon(config.method, budget, None, indices, None, config)
    view, size = None, 0
    if ATTACKS[config.attack].remembers:
        bank = PerturbationBank(len(x), x.shape[1:], config.eps, device)
        view, size = bank.at(indices, None), bank.values[0].numel()
    return lambda: train(engine, x, y, epsilon, view), size


def _with_kernels(engine: Engine, x: Tensor, y: Tensor, epsilon: Epsilon, view: BankView | None) -> Tensor:
    return train_step(engine, engine.config.method, x, y, epsilon, view=view).loss


def _without_kernels(engine: Engine, x: Tensor, y: Tensor, epsilon: Epsilon, view: BankView | None) -> Tensor:
    """As `train_step`, in plain torch."""
    config = engine.config
    with backends.backend("reference"):
        engine.begin(0, len(x), 0)
        with engine.collecting():
            attacked = batch_attack(config.method, engine.model, x, y, epsilon, config, view)
            loss = batch_loss(config.method, engine.trained, x, attacked, y, config).loss
            engine.backward(loss, len(x))
        engine.end()
    return loss.detach()
