"""Tells whether the copy of a model must be refreshed: whether its weights, modules or attributes have changed."""

from __future__ import annotations

import enum
import itertools
import operator
import os
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# How many values of each tensor are compared with their former values.
SAMPLE = 16
# Attributes of nn.Module itself, its mode and hooks, which say nothing about weights.
_OWN = frozenset(nn.Module().__dict__)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Change(enum.Enum):
    """What has changed since `Watch.taken`."""

    NOTHING = 0
    VALUES = 1  # numbers in tensors of the same shapes, dtypes and devices
    STRUCTURE = 2  # anything else: other modules, other shapes, another dtype or device


class Watch:
    """Remembers a model, and says what has changed in it since.

    `ask` sees, in this order: tensors, modules and plain attributes that are other objects; optimizers that stepped on
    its parameters (fused ones leave no mark on a tensor), and `tell`; other memory (`p.data = ...`); versions, which
    torch counts for every write in place; and a sample of the values of every CPU tensor, which sees what is written
    through `.data`, unless the sample stays what it was. Under PART_FAST_CHECK=1 every value is compared.
    Tensors on other devices are not read, which would wait for them: of those it cannot be known, see `unread`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self.attributes: dict[tuple[str, str], Any] = {}
        self.objects_taken = 0  # how often: whoever lists the model's objects does it anew
        self._listed_for, self._addresses = -1, list[int]()
        self.take()
        _listen(self)

    def take(self) -> None:
        """Remember the model as it is now."""
        self._other = False
        self._take_objects()
        self.take_values()

    def tell(self) -> None:
        """Record that the weights have changed, for changes that `ask` cannot see."""
        self._told = True

    @property
    def unread(self) -> bool:
        """Whether some weights may have changed in a way that `ask` cannot see."""
        return self._unread

    def ask(self) -> tuple[Change, list[tuple[str, str]]]:
        """What has changed since `take`, and which plain attributes: (module, attribute)."""
        change = Change.NOTHING
        attributes: list[tuple[str, str]] = []
        if not self._other and not self._same_objects():
            change, attributes = self._compare_objects()
            self._told |= change is Change.VALUES  # until they are taken
            self._other = change is Change.STRUCTURE
        if self._other:
            return Change.STRUCTURE, []
        if change is Change.NOTHING and self._values_changed():
            change = Change.VALUES
        return change, attributes

    def _take_objects(self) -> None:
        model = self._model()
        assert model is not None
        self.objects_taken += 1
        self._modules = dict(_modules(model))
        tables = [t for m in self._modules.values() for t in (m.__dict__, m._parameters, m._buffers, m._modules)]
        self.attributes = {
            (name, key): value
            for name, module in self._modules.items()
            for key, value in module.__dict__.items()
            if key not in _OWN and not _is_result(value)
        }
        # A list or dict that is changed in place stays the same object.
        lists = [value for value in self.attributes.values() if type(value) is list]
        dicts = [value for value in self.attributes.values() if type(value) is dict]
        self._walked: tuple[list[Any], list[Any]] = ([*tables, *dicts], lists)
        self._contents = {key: _content(value) for key, value in self.attributes.items()}
        # Held, so that none of them is another object at the same address.
        self._objects = list(self._now())
        self._registered = {
            (name, kind, key): value
            for name, module in self._modules.items()
            for kind in ("_parameters", "_buffers", "_modules")
            for key, value in getattr(module, kind).items()
        }
        self._kinds = {key: _kind(value) for key, value in self._registered.items()}
        every = flat([*self._registered.values(), *self.attributes.values()])
        tensors = [value for value in every if isinstance(value, Tensor) and not _is_result(value)]
        self._tensors = list({id(tensor): tensor for tensor in tensors}.values())

    def _now(self) -> Iterator[Any]:
        tables, lists = self._walked
        return itertools.chain(
            itertools.chain.from_iterable(map(dict.values, tables)), itertools.chain.from_iterable(lists)
        )

    def _same_objects(self) -> bool:
        size = sum(map(len, itertools.chain(*self._walked)))
        return size == len(self._objects) and all(map(operator.is_, self._now(), self._objects))

    def _compare_objects(self) -> tuple[Change, list[tuple[str, str]]]:
        before, contents, registered, kinds = self.attributes, self._contents, self._registered, self._kinds
        model = self._model()
        assert model is not None
        modules = dict(_modules(model))
        if modules.keys() != self._modules.keys() or any(modules[name] is not self._modules[name] for name in modules):
            return Change.STRUCTURE, []
        self._take_objects()
        if self._kinds != kinds:
            return Change.STRUCTURE, []
        change = Change.NOTHING
        if any(value is not registered[key] for key, value in self._registered.items()):
            change = Change.VALUES
        changed = [
            key
            for key in before.keys() | self.attributes.keys()
            if key not in before or key not in self.attributes or not _same(contents[key], self._contents[key])
        ]
        for key in changed:
            if any(isinstance(value, nn.Module) for value in flat(self.attributes.get(key))):
                return Change.STRUCTURE, []
            if type(self._modules[key[0]]).__module__.startswith("torch.nn.") and not isinstance(
                self.attributes.get(key), Tensor
            ):
                return Change.STRUCTURE, []  # such as a layer's stride, which the copy may have built in
        return change, changed

    def take_values(self) -> None:
        """Remember what the tensors hold now."""
        self._told = False
        # Once an update; lists of the same objects in the same memory are the same.
        if self._listed_for != self.objects_taken or self._marks()[1] != self._addresses:
            self._list()
            self._listed_for = self.objects_taken
        self._versions, self._addresses = self._marks()
        self._sampled = self._read()
        self._all = [tensor.detach().clone() for tensor in self._placed] if _thorough() else None

    def _list(self) -> None:
        self._versioned = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._placed = [tensor for tensor in self._tensors if _is_plain(tensor)]
        self._unread = any(tensor.device.type not in ("cpu", "meta") for tensor in self._tensors)
        parts: dict[torch.dtype, list[Tensor]] = {}
        for tensor in self._placed:
            if tensor.device.type == "cpu" and tensor.numel():
                parts.setdefault(tensor.dtype, []).append(_sample(tensor.detach()))
        self._parts = list(parts.values())

    def _marks(self) -> tuple[list[int], list[int]]:
        return [tensor._version for tensor in self._versioned], [tensor.data_ptr() for tensor in self._placed]

    def _read(self) -> list[Tensor]:
        read = [torch.cat(part) for part in self._parts]
        return [
            values.view(_BITS[values.element_size()]) if values.element_size() in _BITS else values for values in read
        ]

    def _values_changed(self) -> bool:
        if self._told or self._marks() != (self._versions, self._addresses):
            return True
        if not all(map(torch.equal, self._read(), self._sampled)):
            return True
        if not _thorough():
            return False
        return self._all is None or not all(
            bool(((now == then) | ((now != now) & (then != then))).all())
            for now, then in zip(self._placed, self._all, strict=True)
        )


_watches: weakref.WeakSet[Watch] = weakref.WeakSet()
_listening: list[object] = []


def _listen(watch: Watch) -> None:
    _watches.add(watch)
    if not _listening:
        _listening.append(register_optimizer_step_post_hook(_stepped))


def _stepped(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Called by torch after every step of every optimizer."""
    if torch.compiler.is_compiling() or not _watches:
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for watch in list(_watches):
        if not stepped.isdisjoint(map(id, watch._tensors)):
            watch.tell()


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` without the copies to attack among them, each of which follows its own model."""
    return ((name, module) for name, module in model.named_modules() if not hasattr(type(module), "follows_a_model"))


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor has memory of its own, whose address and version can be compared."""
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout == torch.strided and not tensor.is_meta


def _is_result(value: Any) -> bool:
    """Whether the value is a result of autograd that a forward has left on the module."""
    return isinstance(value, Tensor) and value.grad_fn is not None


def _sample(tensor: Tensor) -> Tensor:
    """SAMPLE values from the middle of a tensor's memory, which lie together to be read quickly; all of a small one."""
    size = tensor.numel()
    span = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    count = min(SAMPLE, size) if span == size else 1  # only the first value where memory has gaps or is shared
    return tensor.as_strided((count,), (1,), tensor.storage_offset() + (span - count) // 2 * (span == size))


def _kind(value: Any) -> object:
    """What must stay for the copy to have room for the value."""
    if isinstance(value, Tensor):
        return type(value) is nn.Parameter, value.shape, value.dtype, value.device
    return value if value is None else id(value)


def _content(value: Any) -> Any:
    return list(value) if type(value) is list else dict(value) if type(value) is dict else value


def flat(value: Any) -> Iterator[Any]:
    """The values in a list, tuple or dict, at any depth; a single value alone."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from flat(part)
    elif isinstance(value, dict):
        yield from flat(list(value.values()))
    else:
        yield value


def _same(old: Any, new: Any) -> bool:
    """Whether two values are one object, or are equal of a type whose comparison is quick and certain."""
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, (list, tuple)):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, dict):
        return old.keys() == new.keys() and all(_same(old[key], new[key]) for key in old)
    return isinstance(old, (bool, int, float, complex, str, bytes)) and old == new


def _thorough() -> bool:
    return os.environ.get("PART_FAST_CHECK") == "1"
