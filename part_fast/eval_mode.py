"""Run a model in eval mode and hand it back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def eval_mode(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Every module of `model` in eval mode inside the block; each gets its own mode back, also after an exception.

    A callable that is no module has no mode and is left alone.
    """
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    if training:
        model.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def uncached_autocast() -> Iterator[None]:
    """Autocast without its cache of cast weights.

    Weights cast under no_grad carry no graph. From the cache they would go into the training forward of
    the same autocast block, whose backward then silently skips those parameters.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
