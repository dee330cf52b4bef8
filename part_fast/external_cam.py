"""Class activation maps that others compute: a class of the grad-cam package, or any callable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from part_fast import checks

Explain = Callable[[nn.Module, Tensor, Tensor], Tensor]


def external_cam(method: type | Explain, model: nn.Module, layer: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Maps (N,h,w), detached, of images x (N,C,H,W) for class indices target (N,).

    method: a class of the `grad-cam` package, whose own output (N,H,W) is taken; or callable(model, x, target).
    Every parameter's .grad is as before, whatever the method does to it, also after an exception.
    Errors: ValueError or TypeError for a result that is no map of every image.
    """
    parameters = list(model.parameters())
    grads = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None  # so that a backward inside adds to nothing of ours
    try:
        with torch.enable_grad():
            maps = _grad_cam(method, model, layer, x, target) if isinstance(method, type) else method(model, x, target)
    finally:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
    checks.tensor("the result of method", maps)
    if maps.ndim != 3 or maps.shape[0] != x.shape[0]:
        raise ValueError(f"method must give maps ({x.shape[0]},h,w), got {tuple(maps.shape)}")
    return maps.detach().to(x.device)


def _grad_cam(method: Any, model: nn.Module, layer: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with method(model=model, target_layers=[layer]) as explain:  # releases its hooks
        return torch.from_numpy(explain(input_tensor=x, targets=[ClassifierOutputTarget(c) for c in target.tolist()]))
