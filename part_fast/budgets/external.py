"""Class activation maps from other code: classes and objects of grad-cam and torchcam, or any callable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from part_fast import checks
from part_fast.attack_model import AttackModel
from part_fast.errors import BadValueError
from part_fast.eval_mode import eval_mode, grads_kept, unwrapped

Explain = Callable[[nn.Module, Tensor, Tensor], Tensor]


def check_method(method: object, native: Sequence[str]) -> None:
    """Errors: ValueError for what is neither a class of grad-cam or torchcam nor a callable."""
    if callable(method) and (not isinstance(method, type) or _package(method)):
        return
    got = f"the class {method.__module__}.{method.__qualname__}" if isinstance(method, type) else repr(method)
    raise BadValueError(
        f"method must be one of {', '.join(native)}, a class or an object of grad-cam or torchcam, or a "
        f"callable(model, x, target) -> (N,h,w), got {got}"
    )


def _package(kind: type) -> str | None:
    """The package that makes a class one that explains models."""
    packages = {base.__module__.partition(".")[0] for base in kind.__mro__}
    return next((name for name in ("pytorch_grad_cam", "torchcam") if name in packages), None)


def external_cam(
    method: type | Explain,
    model: nn.Module,
    layer: nn.Module | None,
    x: Tensor,
    target: Tensor,
    maps_of: Callable[[Tensor], Tensor],
) -> Tensor:
    """Maps (N,h,w), detached, of images x (N,C,H,W) for class indices target (N,).

    method: a class of grad-cam or torchcam, whose object is made for `model` and `layer` and closed afterwards; an
    object of theirs, which explains its own layers of the same model; or callable(model, x, target). Of both packages
    the maps are what their objects give.
    maps_of: the layer's output as maps (N,K,h,w), the `reshape_transform` of both packages.
    Every parameter's .grad is put back afterwards, also after an exception.
    Errors: ValueError or TypeError for a result that is no map of every image, for an object of another model, and
    for an object together with a layer.
    """
    package = _package(method if isinstance(method, type) else type(method))
    explained = _explained(model) if package else model
    with grads_kept(explained), eval_mode(explained), torch.enable_grad():
        if isinstance(method, type):
            layers = [layer] if package == "pytorch_grad_cam" else layer
            with method(explained, layers, reshape_transform=maps_of) as explain:  # which releases its hooks
                maps = _maps(package, explain, x, target)
        elif package:
            _check_object(method, explained, layer)
            maps = _maps(package, method, x, target)
        else:
            maps = method(model, x, target)
    checks.tensor("the result of method", maps)
    if maps.ndim != 3 or maps.shape[0] != x.shape[0]:
        raise BadValueError(f"method must give maps ({x.shape[0]},h,w), got {tuple(maps.shape)}")
    return maps.detach().to(x.device)


def _explained(model: nn.Module) -> nn.Module:
    """The user's own network: an AttackModel's source, without wrappers."""
    model = unwrapped(model)
    return _explained(model.source) if isinstance(model, AttackModel) else model


def _check_object(method: Any, explained: nn.Module, layer: nn.Module | None) -> None:
    name = type(method).__name__
    if _explained(method.model) is not explained:
        raise BadValueError(
            f"method must explain the budget's model, got a {name} of another {type(method.model).__name__}"
        )
    if layer is not None:
        raise BadValueError(
            f"target_layer must be None with an object as method, got one beside a {name}, which has its own"
        )


def _maps(package: str | None, explain: Any, x: Tensor, target: Tensor) -> Tensor:
    """Maps (N,h,w) by an object of grad-cam or torchcam; of several layers as their package joins them."""
    if package == "torchcam":
        fused: Tensor = explain.fuse_cams(explain(target.tolist(), explain.model(x)))
        return fused
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    return torch.from_numpy(explain(input_tensor=x, targets=[ClassifierOutputTarget(c) for c in target.tolist()]))
