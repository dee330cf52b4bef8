"""Epoch: how far an epoch is and what it adds up, so that a run goes on in its middle; what stops or warns it."""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from part_fast import distributed
from part_fast.attacks.catalogue import ATTACKS
from part_fast.config import TrainConfig
from part_fast.data.memory import Dataset, batch_length, to_float
from part_fast.errors import BadValueError, CannotRunError
from part_fast.random_state import host_states
from part_fast.training.engine import Engine

# Updates of a GPU between two looks at the loss, each of which waits for it; a CPU has the number at once.
LOOK_EVERY = 50


@dataclass
class Epoch:
    """One epoch of this process, counted from 0.

    done: images of this process's share that are behind it. ended: whether its last update, and `Engine.end_epoch`,
    are. seconds: of training. agreement: of gradients in reduced precision, if measured.
    sums: float64 (3,) on the device, over batches: loss times images, images that were right, images whose loss was
        finite.
    first_bad: int64 () on the device: how many images were behind the process before the first batch whose loss was not
        finite; -1: none was.
    order_rng: the CPU generator's state before the order of the epoch was drawn.
    rng: as `get_rng` gives it, to be set once the order is drawn anew in a resumed epoch.
    """

    number: int
    device: torch.device
    done: int = 0
    ended: bool = False
    seconds: float = 0.0
    agreement: dict[str, float] = field(default_factory=dict)
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    first_bad: Tensor = field(default_factory=lambda: torch.full((), -1, dtype=torch.int64))
    order_rng: Tensor | None = None
    rng: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        self.sums, self.first_bad = self.sums.to(self.device), self.first_bad.to(self.device)

    @property
    def begun(self) -> bool:
        """Whether its order is drawn, and its masks are made."""
        return self.order_rng is not None

    def order(self, n: int, config: TrainConfig, extra: int = 0) -> Tensor:
        """The samples of the epoch, in the order in which this process takes them, as many in every process.

        n: images of the data set, as many as an epoch has. extra: how many follow them, of which a fraction of every
        batch is.

        Together the processes go over all samples: a batch of all of them is made of the batches of each. In a resumed
        epoch it is drawn from the state that it was drawn from before, and random numbers go on where they were.
        """
        self.order_rng = torch.get_rng_state() if self.order_rng is None else self.order_rng
        torch.set_rng_state(self.order_rng)
        order = epoch_order(n, config, self.number, extra)
        if self.rng is not None:
            set_rng(self.rng, self.device)
            self.rng = None
        return order

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """A batch: its mean loss (), logits (N,classes) of its adversarial images, labels. No GPU waits.

        labels: class indices (N,), or probabilities (N,classes), of which the most likely class counts.
        """
        labels = labels.argmax(1) if labels.is_floating_point() else labels
        finite = torch.isfinite(loss)
        self.first_bad.masked_fill_((self.first_bad < 0) & ~finite, self.done)
        hits = (logits.argmax(1) == labels).sum()
        self.sums += torch.stack([torch.where(finite, loss, 0.0) * len(labels), hits, finite * len(labels)])
        self.done += len(labels)

    def mean_loss(self) -> float:
        """Over the images of this process with a finite loss; waits for the device."""
        total, _, images = self.sums.tolist()
        return total / images if images else math.nan

    def state(self) -> dict[str, Any]:
        """What differs from process to process; `restored` reads it."""
        return {
            "done": self.done,
            "ended": self.ended,
            "seconds": self.seconds,
            "agreement": self.agreement,
            "sums": self.sums.cpu(),
            "first_bad": self.first_bad.cpu(),
            "order_rng": self.order_rng,
            "rng": get_rng(self.device),
        }

    @classmethod
    def restored(cls, number: int, state: Mapping[str, Any], device: torch.device) -> Epoch:
        """The epoch that `state` was made of; its order, or the next that is drawn, follows from torch's generators."""
        epoch = cls(number, device, **state)
        assert epoch.rng is not None
        set_rng(epoch.rng, device)
        if not epoch.begun:
            epoch.rng = None
        return epoch


def epoch_order(n: int, config: TrainConfig, epoch: int, extra: int = 0) -> Tensor:
    """The samples of an epoch, in the order in which this process takes them: see `Epoch.order`.

    With an attack that remembers, each process goes over the samples whose perturbations it keeps, and no others.
    """
    order = _order(n, config, epoch)
    return _with_extra(order, n, extra, config) if extra and config.extra_fraction else order


def _order(n: int, config: TrainConfig, epoch: int) -> Tensor:
    """The order of the data set's own n images."""
    if distributed.size() == 1:
        return torch.randperm(n)
    # Every process draws its own augmentation and starts, and the same ones when it is resumed here.
    seed_generators(((config.seed * 1_000_003 + epoch) * 1009 + distributed.rank()) % 2**63)
    longest = -(-n // distributed.size())
    if ATTACKS[config.attack].remembers:
        own = torch.arange(n)[distributed.shares(n)]
        return own[torch.randperm(len(own))][torch.arange(longest) % len(own)]
    order = distributed.same_(torch.randperm(n))
    every = longest * distributed.size()
    return order[torch.arange(every) % n][distributed.shares(every)]


def _with_extra(order: Tensor, n: int, extra: int, config: TrainConfig) -> Tensor:
    """A process's order with samples from n to n + extra in the place of a fraction of it, evenly spread.

    Each of them stands in one place of all orders, unless there are fewer of them than places.
    """
    # How many stand in front of each place; 0.7 * 90 is a little below 63.
    before = (torch.arange(len(order) + 1, dtype=torch.float64) * config.extra_fraction + 1e-9).floor()
    replaced = before[1:] > before[:-1]
    if ATTACKS[config.attack].remembers:
        kept = torch.arange(n + extra)[distributed.shares(n + extra)]
        own = kept[kept >= n]
        own = own[torch.randperm(len(own))]
    else:
        own = n + distributed.same_(torch.randperm(extra))[distributed.shares(extra)]
    return order.masked_scatter(replaced, own[torch.arange(int(replaced.sum())) % len(own)])


def seed_generators(seed: int) -> None:
    """Seed torch's generators, from which training draws, and Python's and numpy's, from which networks of users may.

    seed: any that torch takes; numpy's takes 32 bits of it.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def get_rng(device: torch.device) -> tuple[Any, ...]:
    """States of the generators of `seed_generators`: torch's for the CPU and for the GPU, Python's, numpy's.

    They are tensors, numbers and containers, which a file holds without code.
    """
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), gpu, *host_states()


def set_rng(states: tuple[Any, ...], device: torch.device) -> None:
    """Where a state is missing, as a GPU's of a run that began on a CPU, that generator stays as it is."""
    cpu, gpu, python, numpy = (*states, None, None)[:4]  # states of before end with the GPU's
    torch.set_rng_state(cpu)
    if device.type == "cuda" and gpu is not None:
        torch.cuda.set_rng_state(gpu, device)
    if python is not None:
        random.setstate(python)
    if numpy is not None:
        np.random.set_state(numpy)


@contextlib.contextmanager
def same_rng(device: torch.device) -> Iterator[None]:
    """Whatever is drawn in the block, the generators are after it as before: a test changes nothing of training."""
    states = get_rng(device)
    try:
        yield
    finally:
        set_rng(states, device)


def refuse_bad_loss(epoch: Epoch, order: Tensor, config: TrainConfig, checkpoint: str) -> None:
    """Errors: RuntimeError if a loss was not finite: the step, the images, the checkpoint. Waits for the device."""
    bad = int(epoch.first_bad)
    if bad < 0 or config.on_nonfinite == "skip":
        return
    length = batch_length(len(order) - bad, config.batch_size)
    indices = order[bad : bad + length].tolist()
    shown = ", ".join(map(str, indices[:8])) + (f", ... ({length} images)" if length > 8 else "")
    raise CannotRunError(
        f"training diverged in epoch {epoch.number + 1}: the loss is not finite in step "
        f"{bad // config.batch_size + 1}, on training images {shown}; {checkpoint}"
    )


def refuse_bad_weights(engine: Engine, epoch: int, checkpoint: str) -> None:
    """Errors: RuntimeError if a weight, statistic or average is not finite, which names it. Waits for the device."""
    averaged = {} if engine.averaged is None else engine.averaged.module.state_dict()
    for what, tensors in (("weights", engine.model.state_dict()), ("averaged weights", averaged)):
        for name, value in tensors.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise CannotRunError(
                    f"training diverged in epoch {epoch + 1}: the {what} {name} are not finite; {checkpoint}"
                )


def epoch_row(epoch: Epoch, engine: Engine, method: str, images: int) -> dict[str, Any]:
    """What training itself says of an epoch of `images` in all processes: the first columns of metrics.csv.

    Errors: RuntimeError where no loss was finite.
    """
    loss, hits, finite = distributed.sum_(epoch.sums.clone()).tolist()
    if not finite:
        raise CannotRunError(f"training diverged in epoch {epoch.number + 1}: not one loss is finite; lower lr")
    return {
        "epoch": epoch.number + 1,
        "method": method,
        "lr": engine.config.lr_at(epoch.number + 0.5),  # in its middle
        "train_loss": loss / finite,
        "train_robust": int(hits) / images,
    }


def resets(config: TrainConfig, epoch: Epoch) -> bool:
    """Whether remembered perturbations are drawn anew before an epoch; those of the first one are new."""
    every = config.perturbation_reset
    return every > 0 and epoch.number > 0 and epoch.number % every == 0 and not epoch.begun


def refuse_uneven(config: TrainConfig, n: int, extra: int) -> None:
    """Errors: ValueError, before the first epoch, where processes cannot share the images as they must.

    n: images of the data set. extra: how many follow them, at least one for each process. With an attack that remembers
    no process may go over a sample twice in one batch, for which a bank has one place.
    """
    processes = distributed.size()
    if 0 < extra < processes:
        raise BadValueError(f"extra must hold an image for each of {processes} processes, got {extra}")
    if not ATTACKS[config.attack].remembers:
        return
    share = -(-n // processes)
    # Of samples that processes cannot share evenly, some of them go over one twice in an epoch.
    if n % processes and batch_length(share, config.batch_size) == share:
        raise BadValueError(
            f"train_size must be a multiple of the {processes} processes with attack {config.attack} and one "
            f"batch an epoch, got {n} images"
        )
    places = math.ceil(share * config.extra_fraction)
    if extra and extra // processes < places:
        raise BadValueError(
            f"extra must hold at least {places * processes} images, as many as an epoch takes of them, with attack "
            f"{config.attack}, got {extra}"
        )


def refuse_single_images(config: TrainConfig, model: nn.Module, data: Dataset) -> None:
    """Errors: ValueError, before the first epoch, where batches are single images and BatchNorm cannot take one."""
    if config.batch_size > 1 and len(data) > distributed.size():
        return
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(to_float(data.images[:1]))
    except ValueError as error:
        name = "batch_size" if config.batch_size == 1 else "train_size"
        size = "x".join(map(str, data.images.shape[2:]))
        raise BadValueError(f"{name} must be >= 2 for {config.model} on images of {size}: {error}") from error
