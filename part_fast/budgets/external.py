"""Class activation maps from other code: a class of the grad-cam package, or any callable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from part_fast import checks
from part_fast.errors import BadValueError
from part_fast.eval_mode import grads_kept

Explain = Callable[[nn.Module, Tensor, Tensor], Tensor]


def check_method(method: object, native: Sequence[str]) -> None:
    """Errors: ValueError for what is neither a class of the grad-cam package nor a callable."""
    got = repr(method)
    if isinstance(method, type):
        if _is_of_grad_cam(method):
            return
        got = f"the class {method.__module__}.{method.__qualname__}"
    elif _is_of_grad_cam(type(method)):
        got = f"an instance of {type(method).__name__}: give the class itself, it is called with each batch"
    elif callable(method):
        return
    raise BadValueError(
        f"method must be one of {', '.join(native)}, a class of grad-cam or a callable(model, x, target) -> (N,h,w), "
        f"got {got}"
    )


def _is_of_grad_cam(kind: type) -> bool:
    return any(base.__module__.partition(".")[0] == "pytorch_grad_cam" for base in kind.__mro__)


def external_cam(
    method: type | Explain,
    model: nn.Module,
    layer: nn.Module | None,
    x: Tensor,
    target: Tensor,
    maps_of: Callable[[Tensor], Tensor],
) -> Tensor:
    """Maps (N,h,w), detached, of images x (N,C,H,W) for class indices target (N,).

    method: a class of the `grad-cam` package, whose own output (N,H,W) is taken; or callable(model, x, target).
    maps_of: the layer's output as maps (N,K,h,w), grad-cam's `reshape_transform`.
    Every parameter's .grad is put back afterwards, also after an exception.
    Errors: ValueError or TypeError for a result that is no map of every image.
    """
    with grads_kept(model), torch.enable_grad():
        if isinstance(method, type):
            maps = _grad_cam(method, model, layer, x, target, maps_of)
        else:
            maps = method(model, x, target)
    checks.tensor("the result of method", maps)
    if maps.ndim != 3 or maps.shape[0] != x.shape[0]:
        raise BadValueError(f"method must give maps ({x.shape[0]},h,w), got {tuple(maps.shape)}")
    return maps.detach().to(x.device)


def _grad_cam(
    method: Any,
    model: nn.Module,
    layer: nn.Module | None,
    x: Tensor,
    target: Tensor,
    maps_of: Callable[[Tensor], Tensor],
) -> Tensor:
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with method(model=model, target_layers=[layer], reshape_transform=maps_of) as explain:  # releases its hooks
        return torch.from_numpy(explain(input_tensor=x, targets=[ClassifierOutputTarget(c) for c in target.tolist()]))
