"""Run a model in eval mode and put it back as it was; take its gradients, with errors that name the model."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from part_fast.errors import BadValueError

# Errors of torch while a model is differentiated to its input, and what they mean in terms of the model.
MEANT = {
    "use_reentrant": "model must checkpoint with use_reentrant=False, got a reentrant checkpoint",
    "a leaf Variable that requires grad": "model must not write into its input, got an in-place operation on it",
}


@contextlib.contextmanager
def eval_mode(model: Callable[..., Any]) -> Iterator[None]:
    """Every module of `model` in eval mode inside the block; each gets its own mode back, also after an exception.

    The modules behind a functools.partial, a bound method or a decorated function are found (see `modules_of`); any
    other callable has no mode and is left alone. A module that defines its own train(), such as one that merges weights
    for eval mode, is switched by it both ways. Its weights are then put back bit for bit, because merging and splitting
    rounds them twice.
    Errors: ValueError naming `model` where its weights are not there yet or record no gradient, where it overwrites its
    input, and for reentrant checkpoints, which cannot do without the gradients of parameters.
    """
    modules = modules_of(model)
    check_weights(modules)
    training = [(module, getattr(module, "training", False)) for module in modules]  # frozen TorchScript has no mode
    if not any(mode for _, mode in training):
        with _named_errors():
            yield
        return
    kept = {tensor: tensor.detach().clone() for module in modules if switches(module) for tensor in _tensors(module)}
    try:
        for root in _roots(model):
            root.eval()
        for module, mode in training:
            if mode and switches(module) and module.training and _ignores_mode(module):
                raise BadValueError(
                    f"model must set `training` in its train(), got a {type(module).__name__} that leaves it as it is: "
                    "call super().train(mode) there"
                )
        with _named_errors():
            yield
    finally:
        for module, mode in training:
            if switches(module):  # whatever its own flag says; a parent before its children, whose modes it may change
                module.train(mode)
        for module, mode in training:
            if getattr(module, "training", mode) != mode:
                module.training = mode
        for tensor, value in kept.items():
            tensor.data.copy_(value)  # .data: a graph that holds the tensor stays valid, as its values are the same


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        for said, meant in MEANT.items():
            if said in str(error):
                raise BadValueError(meant) from error
        raise


def switches(module: nn.Module) -> bool:
    """Whether the module does more in train() or eval() than to set a flag."""
    kind = type(module)
    return kind.train is not nn.Module.train or kind.eval is not nn.Module.eval


def _ignores_mode(module: nn.Module) -> bool:
    """Whether train() leaves `training` alone, which then does not tell the mode; some always set it, as for dropout
    that stays on."""
    module.training = False
    module.train(False)
    ignored = not module.training
    module.training = True
    return ignored


def modules_of(model: Callable[..., Any]) -> list[nn.Module]:
    """Every module that `model` runs, parents first: a module's own; those a functools.partial was given; that of a
    bound method; those behind a function that was decorated with functools.wraps, as torch.compile's are."""
    return list(dict.fromkeys(module for root in _roots(model) for module in root.modules()))


def _roots(model: Any) -> list[nn.Module]:
    if isinstance(model, nn.Module):
        return [model]
    if isinstance(model, functools.partial):
        parts = [model.func, *model.args, *model.keywords.values()]
        return [root for part in parts for root in _roots(part)]
    if inspect.ismethod(model):
        return _roots(model.__self__)
    return _roots(model.__wrapped__) if inspect.isfunction(model) and hasattr(model, "__wrapped__") else []


def unwrapped(model: nn.Module) -> nn.Module:
    """What a wrapper runs that gives the same numbers without it: of torch.compile, DataParallel,
    DistributedDataParallel or AveragedModel. A wrapper that has hooks of its own stays."""
    while not (model._forward_hooks or model._forward_pre_hooks):
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            break
    return model


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def check_weights(modules: list[nn.Module]) -> None:
    """Refuse lazy modules before their first forward, weights on the meta device and weights of inference mode."""
    for module in modules:
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
            raise BadValueError(
                f"model must have its weights, got a {type(module).__name__} before its first forward: run it once"
            )
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            if tensor.is_meta:
                raise BadValueError("model must have its weights, got some on the meta device: load them first")
            if tensor.is_inference():
                raise BadValueError(
                    "model must record gradients, got weights made under torch.inference_mode: "
                    "take copy.deepcopy(model) outside of it"
                )


def input_gradient(of: Tensor, to: Tensor) -> Tensor | None:
    """Gradient of the scalar `of` for `to`, and for nothing else; None where the one does not lead to the other."""
    return torch.autograd.grad(of, to, allow_unused=True)[0] if of.requires_grad else None


@contextlib.contextmanager
def grads_kept(model: Callable[..., Any]) -> Iterator[None]:
    """Every parameter's .grad is as before the block, whatever a backward in it adds, also after an exception."""
    parameters = list(dict.fromkeys(parameter for root in _roots(model) for parameter in root.parameters()))
    grads = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None  # so that a backward adds nothing to the user's gradients
    try:
        yield
    finally:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad


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
