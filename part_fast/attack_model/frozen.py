"""`frozen_copy` copies any module, in eval mode and without gradients of parameters; helpers for its memory format."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from part_fast.errors import BadValueError
from part_fast.eval_mode import check_weights, modules_of


class _CopiesResults(TorchFunctionMode):
    """copy.deepcopy copies results of autograd too, detached; it refuses them elsewhere.

    Models keep them on themselves: activations of the last forward, a weight that a pre-forward hook computes.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), tensor.detach().clone())


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode whose parameters require no gradient.

    Errors: ValueError naming `model` where it cannot be copied, as sharded weights, locks and open files cannot, where
    its weights are not there, or where TorchScript hides them.
    """
    modules = modules_of(model)
    check_weights(modules)
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        raise BadValueError(
            "model must be of Python modules to be copied and followed, got TorchScript: attack the model itself, or "
            "give it as it was before torch.jit"
        )
    try:
        with torch.inference_mode(False), torch.no_grad(), _CopiesResults():
            module = copy.deepcopy(model)
    except Exception as error:  # copying an arbitrary object may raise anything
        why = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise BadValueError(
            f"model must be one that copy.deepcopy copies, got {why}: attack the model itself"
        ) from error
    return module.eval().requires_grad_(False)


def lay_(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Put every parameter and buffer of four dimensions in that memory format; Module.to refuses models that have some
    of five."""
    module._apply(lambda tensor: tensor.contiguous(memory_format=memory_format) if tensor.ndim == 4 else tensor)


def is_of_view(error: RuntimeError) -> bool:
    """Whether it is what `.view` raises for memory that is not contiguous: run, or traced by torch.compile."""
    return "view size is not compatible" in str(error) or "Cannot view a tensor" in str(error)
