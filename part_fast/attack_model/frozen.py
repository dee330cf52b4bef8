"""`frozen_copy` copies any module, in eval mode and without gradients of parameters; helpers for its memory format.

copy.deepcopy leaves two things of a model that would then not be the copy's, or not the model's any more:

Functions are not copied. One that closes over a module of the model, as a lambda made in its __init__ or a hook does,
would run that module, in whatever mode it is in. `reclosed` makes it a function that closes over the copy's. What is
reached in other ways, by a global name, say, is not found here but when the copy runs, by `running_alone`.

Modules that are kept in a tuple, list, dict or plain object and nowhere registered are copied, but have no names by
which their weights could be followed, and `model.eval()` does not reach them either. They are the model's own in the
copy too.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import operator
import threading
import types
from collections.abc import Iterator
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


def frozen_copy(model: nn.Module) -> tuple[nn.Module, bool]:
    """A copy of `model` in eval mode whose parameters require no gradient; and whether it is more than a deepcopy.

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
    memo = shared(modules)
    special = bool(memo)
    module: nn.Module = deep_copy(model, memo)
    twins = {id(part): memo[id(part)] for part in modules if id(part) in memo}
    for part in module.modules():
        tables: list[dict[Any, Any]] = [part.__dict__, *_hooks(part)]
        for table in tables:
            for key, value in list(table.items()):
                if (new := reclosed(value, twins)) is not value:
                    table[key] = new
                    special = True
    return module.eval().requires_grad_(False), special


def deep_copy(value: Any, memo: dict[int, Any]) -> Any:
    """What copy.deepcopy gives of a model or a part of it, of tensors that are results of autograd too."""
    try:
        with torch.inference_mode(False), torch.no_grad(), _CopiesResults():
            return copy.deepcopy(value, memo)
    except Exception as error:  # copying an arbitrary object may raise anything
        why = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise BadValueError(
            f"model must be one that copy.deepcopy copies, got {why}: attack the model itself"
        ) from error


def _hooks(module: nn.Module) -> list[dict[Any, Any]]:
    return [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]


def shared(modules: list[nn.Module]) -> dict[int, Any]:
    """For copy.deepcopy to leave as they are, by id: of modules that are reached from these and registered in none, the
    parts that have none of these in them; and the tensors of other parts."""
    registered = {id(part) for part in modules}
    tensors = {id(tensor) for part in modules for tensor in _tensors(part)}
    memo: dict[int, Any] = {}
    # Not of an AttackModel, which is a copy itself and follows a model of its own.
    owners = [part for part in modules if not hasattr(type(part), "follows_a_model")]
    for module in _reached([value for part in owners for value in part.__dict__.values()]):
        for part in [] if id(module) in registered else module.modules():
            if registered.isdisjoint(map(id, part.modules())):
                memo[id(part)] = part
            elif id(part) not in registered:
                memo.update((id(tensor), tensor) for tensor in _tensors(part) if id(tensor) not in tensors)
    return memo


def _tensors(module: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]


def _reached(values: list[Any]) -> Iterator[nn.Module]:
    """The modules among these values, in containers and in attributes of plain objects."""
    seen: dict[int, Any] = {}
    while values:
        value = values.pop()
        if id(value) in seen or isinstance(value, (Tensor, type, types.ModuleType, types.FunctionType)):
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, dict):
            values.extend(value.values())
        elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
            values.extend(value)
        elif isinstance(value, types.MethodType):
            values.append(value.__self__)
        elif isinstance(value, functools.partial):
            values.extend((*value.args, *value.keywords.values()))
        elif isinstance(attributes := getattr(value, "__dict__", None), dict):
            values.extend(attributes.values())


def reclosed(value: Any, twins: dict[int, Any]) -> Any:
    """The value with twins in the place of modules in it; `value` itself where there are none.

    In lists, tuples, dicts and functools.partial, in bound methods, and in what functions close over. Other objects
    stay what they are. twins: by id of a module; what is met is added.
    """
    if id(value) in twins:
        return twins[id(value)]
    if isinstance(value, types.FunctionType):
        twins[id(value)] = value  # where it closes over itself
        twins[id(value)] = _reclosed_function(value, twins)
        return twins[id(value)]
    if isinstance(value, types.MethodType):
        parts = reclosed([value.__func__, value.__self__], twins)
        same = parts[0] is value.__func__ and parts[1] is value.__self__
        return value if same else types.MethodType(*parts)
    if type(value) is functools.partial:
        func, args, keywords = (reclosed(part, twins) for part in (value.func, value.args, value.keywords))
        same = func is value.func and args is value.args and keywords is value.keywords
        return value if same else functools.partial(func, *args, **keywords)
    if type(value) in (list, tuple):
        items = [reclosed(item, twins) for item in value]
        return value if all(map(operator.is_, items, value)) else type(value)(items)
    if type(value) is dict:
        items = [reclosed(item, twins) for item in value.values()]
        return value if all(map(operator.is_, items, value.values())) else dict(zip(value, items, strict=True))
    return value


def _reclosed_function(function: types.FunctionType, twins: dict[int, Any]) -> types.FunctionType:
    defaults = function.__defaults__, function.__kwdefaults__
    new_defaults = [reclosed(part, twins) for part in defaults]
    cells = function.__closure__ or ()
    new_cells = tuple(_reclosed_cell(cell, twins) for cell in cells)
    if all(map(operator.is_, (*cells, *defaults), (*new_cells, *new_defaults))):
        return function
    new = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, new_defaults[0], function.__closure__ and new_cells
    )
    new.__kwdefaults__, new.__qualname__, new.__doc__ = new_defaults[1], function.__qualname__, function.__doc__
    new.__annotations__, new.__module__ = function.__annotations__, function.__module__
    new.__dict__.update(reclosed(dict(function.__dict__), twins))
    return new


def _reclosed_cell(cell: types.CellType, twins: dict[int, Any]) -> types.CellType:
    if id(cell) not in twins:
        try:
            kept = cell.cell_contents
        except ValueError:  # of a variable that has no value yet
            return cell
        new = reclosed(kept, twins)
        # Functions that share a variable still do.
        twins[id(cell)] = cell if new is kept else types.CellType(new)
    found: types.CellType = twins[id(cell)]
    return found


@contextlib.contextmanager
def running_alone(model: nn.Module) -> Iterator[None]:
    """While a copy of `model` runs in the block, none of the model's own modules may in this thread.

    Errors: ValueError naming `model` where one does, also where the copy's forward passes over it.
    """
    thread, found = threading.get_ident(), list[BadValueError]()

    def refuse(module: nn.Module, _: object) -> None:
        if threading.get_ident() == thread:
            found.append(
                BadValueError(
                    "model must not reach its own modules through a closure, a global or an object that is not copied, "
                    f"got a {type(model).__name__} whose copy runs its {type(module).__name__}: attack the model itself"
                )
            )
            raise found[0]

    hooks = [part.register_forward_pre_hook(refuse) for part in model.modules()]
    try:
        yield
    except Exception:
        if not found:
            raise
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        raise found[0]


def lay_(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Put every parameter and buffer of four dimensions in that memory format; Module.to refuses models that have some
    of five."""
    module._apply(lambda tensor: tensor.contiguous(memory_format=memory_format) if tensor.ndim == 4 else tensor)


def is_of_view(error: RuntimeError) -> bool:
    """Whether it is what `.view` raises for memory that is not contiguous: run, or traced by torch.compile."""
    return "view size is not compatible" in str(error) or "Cannot view a tensor" in str(error)
