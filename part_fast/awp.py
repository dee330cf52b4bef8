"""Adversarial weight perturbation, AWP, as a context around the loss and the backward of a training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from part_fast import checks, distributed
from part_fast.errors import BadTypeError, BadValueError


@contextlib.contextmanager
def awp(model: nn.Module, gamma: float, loss: Callable[[], Tensor]) -> Iterator[None]:
    """In the block, `model` has the weights near its own that make `loss()` larger; after it, bit for bit its own.

    Forward and backward of the training loss stand in the block, so that their gradients are those at the perturbed
    weights; the optimizer's step stands behind it. Each weight of at least two dimensions moves by gamma times its own
    norm, along the gradient of `loss()` for it; biases and BatchNorm's parameters stay.

    model: in the mode that it trains in; without its DistributedDataParallel, whose hooks the extra forward would
        disturb. gamma: >= 0; published values are 0.005 to 0.01. loss: callable without arguments that forwards `model`
        and returns a scalar; it may be scaled by any factor > 0.
    The extra forward leaves buffers as they are, so that BatchNorm's statistics see a batch once, in the block; it
    draws random numbers as any forward. `.grad` is not touched. A weight without a finite gradient stays where it is.
    Where torch.distributed is initialised the gradient is the sum of those of all processes, each of which enters.

    Equivalent to, around `loss().backward()`:
        gradients = torch.autograd.grad(loss(), weights)
        for weight, gradient in zip(weights, gradients):
            weight += gamma * weight.norm() / gradient.norm() * gradient
    Source: Wu et al., "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020, eq. 8 to 10.
    Errors: TypeError or ValueError that names the argument.
    """
    if not isinstance(model, nn.Module):
        raise BadTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    gamma = checks.number("gamma", gamma, 0)
    weights = [weight for weight in model.parameters() if weight.requires_grad and weight.ndim > 1]
    buffers = list(model.buffers())
    kept = [buffer.clone() for buffer in buffers]
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.enable_grad():
            value = loss()
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise BadValueError(f"loss must give a scalar that depends on the weights, got {_shown(value)}")
        with torch.autocast(value.device.type, enabled=False):
            gradients = torch.autograd.grad(value, weights, allow_unused=True)
        with torch.no_grad():
            for buffer, own in zip(buffers, kept, strict=True):
                buffer.copy_(own)
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    weight.add_(_step(weight, distributed.sum_(gradient.contiguous()), gamma))
        torch.clear_autocast_cache()  # it holds casts of the weights as they were
        yield
    finally:
        with torch.no_grad():
            for weight, own in zip(weights, before, strict=True):
                weight.copy_(own)
        torch.clear_autocast_cache()


def _step(weight: Tensor, gradient: Tensor, gamma: float) -> Tensor:
    """How far a weight moves: gamma times its norm, along the gradient; zero where that is not finite, or is zero."""
    norm = gradient.norm()
    usable = torch.isfinite(norm) & (norm > 0)
    direction: Tensor = torch.where(usable, gradient, 0.0) / torch.where(usable, norm, 1.0)
    step: Tensor = gamma * weight.norm() * direction
    return step


def _shown(value: object) -> str:
    return f"a tensor {tuple(value.shape)} without a graph" if isinstance(value, Tensor) else type(value).__name__
