"""What a forward and the hooks on it keep besides tensors of modules: containers, looked at before and put back after.

While torch.fx traces a forward, its names for tensors may end in any list, dict, set, deque or closure that the forward
reaches; the next real forward would find them there.
"""

from __future__ import annotations

import collections
import gc
import math
import operator
import types
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

# How many items a container may have that the forward shares with others, to be looked at; in larger ones what the
# tracer has left is still found, by who refers to it.
MOST = 10_000
_CONTAINERS = (list, tuple, dict, set, collections.deque)
_CODE = (types.ModuleType, types.FunctionType, types.MethodType)


class Contents:
    """What lists, dicts, sets and deques hold that the forward of a model or a hook on it may reach.

    The model's own are put back as they were. Those that it shares with others, which its classes have, its functions
    close over or find by a global name, are put back where they hold something of torch.fx's.
    """

    def __init__(self, model: nn.Module) -> None:
        parts = list(model.modules())
        attributes = [value for part in parts for value in part.__dict__.values()]
        classes = {kind for part in parts for kind in type(part).__mro__ if not kind.__module__.startswith("torch.")}
        of_classes = [value for kind in classes - {object} for value in vars(kind).values()]
        hooks = [hook for part in parts for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())]
        functions = [getattr(value, "__func__", value) for value in (*attributes, *of_classes, *hooks)]
        functions = [value for value in functions if isinstance(value, types.FunctionType)]
        tables = list({id(function.__globals__): function.__globals__ for function in functions}.values())
        cells = [cell for function in functions for cell in function.__closure__ or ()]
        self._cells = [(cell, value) for cell in cells for value in _value_of(cell)]
        around = [*of_classes, *(value for _, value in self._cells), *(v for table in tables for v in _parts(table))]
        self._own = [(held, _copy(held)) for held in _containers(attributes)]
        self._shared = [(held, _copy(held)) for held in (*tables, *_containers(around, MOST))]

    def put_back(self) -> None:
        """Give all of them what they held."""
        for held, before in self._own:
            _put_back(held, before)
        for held, before in self._shared:
            if _holds_proxy(held):
                _put_back(held, before, proxies_alone=True)
        for cell, value in self._cells:
            if any(map(_holds_proxy, _value_of(cell))):
                cell.cell_contents = value


def drop(values: list[Any]) -> None:
    """Take the values, and what is made of them, out of whatever keeps them."""
    for _ in range(8):  # tuples in tuples
        ids = {id(value) for value in values}
        around: list[Any] = []
        for holder in gc.get_referrers(*values):
            if holder is values or isinstance(holder, types.FrameType):
                continue
            if isinstance(holder, (tuple, Proxy)):
                around.append(holder)
            elif isinstance(holder, types.CellType):
                holder.cell_contents = None
            elif isinstance(holder, (list, set, collections.deque)):
                _put_back(holder, [part for part in holder if id(part) not in ids])
            else:
                table = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
                for key in [key for key, part in table.items() if id(part) in ids]:
                    del table[key]
        if not around:
            return
        values = around


def _value_of(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # of a variable that has none
        return []


def _copy(held: Any) -> Any:
    return dict(held) if isinstance(held, dict) else set(held) if isinstance(held, set) else list(held)


def _parts(held: Any) -> list[Any]:
    return list(held.values() if isinstance(held, dict) else held)  # at once: other threads may write to it


def _containers(values: list[Any], most: float = math.inf) -> list[Any]:
    """The containers among the values, and in these, but for those of more than `most` items.

    Without that, what objects among them have as attributes, too.
    """
    found: dict[int, Any] = {}
    values = list(values)
    while values:
        value = values.pop()
        if isinstance(value, _CONTAINERS) and id(value) not in found and len(value) <= most:
            found[id(value)] = value
            values.extend(_parts(value))
        elif most == math.inf and not isinstance(value, (*_CONTAINERS, nn.Module, Tensor, type, *_CODE)):
            values.extend([vars(value)] if isinstance(getattr(value, "__dict__", None), dict) else [])
    return [value for value in found.values() if not isinstance(value, tuple)]


def _holds_proxy(value: Any) -> bool:
    """Itself, in its items, or in tuples among them; other containers among them are looked at for themselves."""
    if not isinstance(value, _CONTAINERS):
        return isinstance(value, Proxy)
    return any(_holds_proxy(part) if isinstance(part, tuple) else isinstance(part, Proxy) for part in _parts(value))


def _put_back(held: Any, before: Any, proxies_alone: bool = False) -> None:
    if isinstance(held, dict):
        for key, value in list(held.items()):
            if proxies_alone and not _holds_proxy(value):
                continue
            if key not in before:
                del held[key]
            elif before[key] is not value:
                held[key] = before[key]
        if not proxies_alone:
            held.update((key, value) for key, value in before.items() if key not in held)
    elif len(held) != len(before) or any(map(operator.is_not, held, before)):
        held.clear()
        (held.update if isinstance(held, set) else held.extend)(before)
