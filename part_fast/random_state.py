"""Torch's random generators, which are the process's: left as they were, without a race with other threads."""

from __future__ import annotations

import contextlib
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Whoever sets a generator holds it, so that two of them in two threads take turns.
_turn = threading.RLock()
# Whether a model's eval-mode forward draws, of those that were run; unknown at first.
_draws: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


class Draws(TorchDispatchMode):
    """Notes whether an operation of this thread draws from a generator of torch's."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation."""
        self.seen |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def generators_put_back(device: torch.device) -> Iterator[None]:
    """The CPU's generator, and those of all CUDA devices, are after the block as before it; such blocks take turns.

    What another thread draws meanwhile comes from what the block makes of the generators, and is drawn again after it.
    Before CUDA has started its generators have no state yet: they then start with the CPU's seed, as after
    torch.manual_seed.
    """
    seed = torch.initial_seed()
    with _turn, torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        try:
            yield
        finally:
            if torch.initial_seed() != seed and not torch.cuda.is_initialized():  # the block has called manual_seed
                torch.cuda.manual_seed_all(seed)


def host_states() -> tuple[object, ...]:
    """States of Python's and numpy's generators, of numbers and containers alone, which can be compared and kept."""
    return random.getstate(), _plain(numpy.random.get_state(legacy=False))


def _plain(value: Any) -> Any:
    """Arrays in dictionaries as lists, which numpy takes back; processes cannot send each other uint32 tensors."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, numpy.ndarray) else value


@contextlib.contextmanager
def draws_put_back(model: nn.Module, device: torch.device, forward: Callable[[], object]) -> Iterator[None]:
    """What `model` draws in the block, which runs its forward, is put back as by `generators_put_back`.

    Of a model that draws nothing no generator is touched, so that other threads draw on undisturbed. A generator that
    has moved is another thread's doing or the model's: `forward` is run once more then, to see whether that draws.
    """
    if _draws.get(model) is False:
        before = _states(device)
        try:
            yield
        finally:
            if _moved(before, device) and _seen_to_draw(model, device, forward):
                _put_back(before, device)
        return
    with _turn:
        before = _states(device)
        try:
            yield
        finally:
            moved = _moved(before, device)
            if not moved:
                _draws[model] = False
            elif _draws.get(model) or _seen_to_draw(model, device, forward):
                _put_back(before, device)


def _seen_to_draw(model: nn.Module, device: torch.device, forward: Callable[[], object]) -> bool:
    with Draws() as draws, contextlib.suppress(Exception):  # which the block has raised, or has not
        forward()
    _draws[model] = seen = bool(draws.seen)
    return seen


def _states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _moved(before: list[Tensor], device: torch.device) -> bool:
    return not all(map(torch.equal, before, _states(device)))


def _put_back(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
