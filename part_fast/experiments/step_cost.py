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
from part_fast.training.engine import AVERAGE_BATCHES, Engine
from part_fast.training.step import batch_attack, batch_epsilon, batch_loss, train_step

WARM_UP = 2  # steps of each that are not timed: they allocate, pack weights and compile


@dataclass(frozen=True)
class Cost:
    """Of a step: seconds for an image, medians over rounds; bytes: the most that it holds besides what lasts.

    seconds: with an average by "ema", also what its forward of an epoch's last batches comes to in each of the epoch's.
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

    configs: of one data set, of which `data` is an epoch's images, and of one network, batch size and average.
    without_kernels: a name more, of the first configuration in plain torch: ops by their references, attacks on the
        model itself.
    """
    first = next(iter(configs.values()))
    batch = data.subset(min(first.batch_size, len(data)))
    made = {name: _step(config, batch, _with_kernels) for name, config in configs.items()}
    if without_kernels is not None:
        made[without_kernels] = _step(first, batch, _without_kernels)
    steps = {name: step for name, (step, _) in made.items()}
    average, share = _average(first, batch), min(1.0, AVERAGE_BATCHES * len(batch) / len(data))
    timed = steps if average is None else {**steps, _AVERAGE: average}
    for step in timed.values():
        for _ in range(WARM_UP):
            step()
    clock = clock_for(find_device(first.device))
    taken, _ = time_in_turn(timed, clock, rounds, progress)
    seconds = {name: statistics.median(times) / len(batch) for name, times in taken.items()}
    beside = share * seconds.get(_AVERAGE, 0.0)
    return {name: Cost(seconds[name] + beside, clock.peak_bytes(step), made[name][1]) for name, step in steps.items()}


_AVERAGE = "the average's forward"
Epsilon = float | Tensor | CamBudget
Train = Callable[[Engine, Tensor, Tensor, Epsilon, BankView | None], Tensor]


def _step(config: TrainConfig, batch: Dataset, train: Train) -> tuple[Callable[[], Tensor], int]:
    """(a training step that can be repeated, bytes of a bank's image)."""
    engine, x, y = _begun(config, batch)
    indices = torch.arange(len(x), device=x.device)
    budget = engine.budget if METHODS[config.method].weighted else None
    epsilon = batch_epsilon(config.method, budget, None, indices, None, config)
    view, size = None, 0
    if ATTACKS[config.attack].remembers:
        bank = PerturbationBank(len(x), x.shape[1:], config.eps, x.device)
        view, size = bank.at(indices, None), bank.values[0].numel()
    return lambda: train(engine, x, y, epsilon, view), size


def _average(config: TrainConfig, batch: Dataset) -> Callable[[], None] | None:
    """The forward of the averaged model that an epoch's last steps have besides, if there is one."""
    if config.averaging[0] != "ema":
        return None
    engine, x, _ = _begun(config, batch)
    engine.begin(0, len(x), 0)
    return lambda: engine.measure(x)


def _begun(config: TrainConfig, batch: Dataset) -> tuple[Engine, Tensor, Tensor]:
    """(an engine in train mode, images, labels), on the device."""
    device = find_device(config.device)
    with torch.random.fork_rng(devices=[]):
        engine = Engine(config, batch.num_classes, device, load=False)
    engine.model.train()
    return engine, to_float(batch.images.to(device)), batch.labels.to(device)


def _with_kernels(engine: Engine, x: Tensor, y: Tensor, epsilon: Epsilon, view: BankView | None) -> Tensor:
    return train_step(engine, engine.config.method, x, y, epsilon, total=_long(engine), view=view).loss


def _without_kernels(engine: Engine, x: Tensor, y: Tensor, epsilon: Epsilon, view: BankView | None) -> Tensor:
    """As `train_step`, in plain torch."""
    config = engine.config
    with backends.backend("reference"):
        engine.begin(0, _long(engine), 0)
        with engine.collecting():
            attacked = batch_attack(config.method, engine.model, x, y, epsilon, config, view)
            loss = batch_loss(config.method, engine.trained, x, attacked, y, config).loss
            engine.backward(loss, len(x))
        engine.end()
    return loss.detach()


def _long(engine: Engine) -> int:
    """Images of an epoch whose first step is none of its last ones, which also have the average's forward."""
    return (AVERAGE_BATCHES + 2) * engine.config.batch_size
