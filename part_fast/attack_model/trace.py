"""A model's forward as a graph, by torch.fx, which computes nothing; and of which modules it is the forward.

`fold` reads the graph to find BatchNorms, which it takes for what the forward does. `fuse` runs parts of it in place of
forwards, and needs more of it: that running them does all that the forward does. So the calls of modules are kept apart
here in which torch.fx sees everything.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import dis
import gc
import inspect
import itertools
import random
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from part_fast.attack_model.contents import Contents, drop
from part_fast.random_state import Draws

# While it traces, torch.fx has a function of its own in the place of nn.Module.__call__, for the whole process: one
# thread traces at a time, and calls in others go where they would (see `_Tracer.call_module`).
_turn = threading.RLock()

# Modules that do what the module in them does.
WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)


@dataclasses.dataclass
class Call:
    """A call of a module, whose forward is the nodes of the graph from number `first` up to `end`."""

    name: str
    first: int
    args: tuple[Any, ...]
    out: Any = None
    end: int = 0
    modes: object = None  # of torch, where the call began
    whole: bool = True  # whether the graph has all that it does


@dataclasses.dataclass
class Trace:
    """The graph of a forward of one argument.

    model: what was traced, without wrappers; prefix: its name in them, with a dot. Names in the graph are the model's.
    calls: those calls, of modules that are called once, in which the forward takes and gives tensors alone, and does
    nothing but what the graph has: none where tensors are kept or attributes set; not those that raise for some inputs,
    and not those that set torch's modes (no_grad, autocast, checkpointing, an autograd.Function) for a part of it.
    """

    model: nn.Module
    prefix: str
    graph: Graph
    calls: list[Call]


def traced(model: nn.Module, is_layer: Callable[[nn.Module], bool]) -> Trace | str:
    """The model's forward as a graph in which modules that `is_layer`, and torch's own, are one node; or why not.

    Not where the forward may be another one the next time: where it draws random numbers, or changes what decides about
    it, numbers and flags that the model keeps. The model and all random generators are left as they were, and nothing
    of the tracer's stays where the forward or a hook has kept it.
    """
    contents, tracer = Contents(model), _Tracer(is_layer)
    try:
        return _traced(model, tracer)
    finally:
        contents.put_back()
        tracer.forget()


def _traced(model: nn.Module, tracer: _Tracer) -> Trace | str:
    prefix = ""
    while isinstance(model, WRAPPERS):
        model, prefix = model.module, f"{prefix}module."
    if "forward" in vars(model):
        return "its forward is not its class's, which alone torch.fx sees"
    parts = list(model.modules())
    before = [dict(part.__dict__) for part in parts]
    buffers = [(part._buffers, dict(part._buffers)) for part in parts if type(part._buffers) is dict]
    randoms = _random_states()
    optional = {
        name: parameter.default
        for name, parameter in list(inspect.signature(type(model).forward).parameters.items())[2:]
        if parameter.default is not parameter.empty
    }
    draws = Draws()
    try:
        with _turn, draws, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of hooks and the like, that they see no tensors
            graph = tracer.trace(model, optional)
        after = [dict(part.__dict__) for part in parts]
        keeps = tracer.keeps_proxies() or not all(_same_objects(kept, held) for held, kept in buffers)
    except Exception as error:  # whatever a forward does that cannot be traced
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    finally:
        for part, attributes in zip(parts, before, strict=True):
            part.__dict__.clear()
            part.__dict__.update(attributes)
        for held, kept in buffers:
            held.clear()
            held.update(kept)
        # Torch's generator may have moved because another thread drew from it.
        drawn = draws.seen or not all(map(_same_state, randoms[1:], _random_states()[1:]))
        if drawn:
            _set_random_states(randoms)
    changed = any(
        isinstance(new[key], (bool, int, float, str)) and old[key] is not new[key] and old[key] != new[key]
        for old, new in zip(before, after, strict=True)
        for key in old.keys() & new.keys()
    )
    if drawn or changed:
        return "its forward draws random numbers or changes numbers that the model keeps"
    sets = not all(map(_same_objects, before, after))
    return Trace(model, prefix, graph, [] if keeps or sets else tracer.whole_calls())


def is_normalize(module: nn.Module) -> bool:
    """Whether it is torchvision's `transforms.Normalize`, v1 or v2.

    Both ask what kind of object their input is: v1 raises for what torch.fx passes, v2 gives it back as it was.
    """
    kind = type(module)
    return kind.__name__ == "Normalize" and kind.__module__ in (
        "torchvision.transforms.transforms",
        "torchvision.transforms.v2._misc",
    )


def _same_objects(old: dict[str, Any], new: dict[str, Any]) -> bool:
    # Where torch.fx meets a tensor that is nobody's attribute, it keeps it under this name.
    new = {key: value for key, value in new.items() if not key.startswith("_tensor_constant")}
    return old.keys() == new.keys() and all(value is new[key] for key, value in old.items())


class _Tracer(Tracer):
    """Traces through wrappers, takes every layer as one call, and passes checks of the input."""

    proxy_buffer_attributes = True

    def __init__(self, is_layer: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self._is_layer = is_layer
        self._thread = threading.get_ident()
        self._calls: list[Call] = []
        self._open: list[Call] = []  # that the forward is in
        self._proxies: list[weakref.ref[Proxy]] = []
        self._of_attributes: dict[str, Any] = {}  # torch.fx's names for tensors of modules

    def whole_calls(self) -> list[Call]:
        """Of modules called once: those of tensors alone of which the graph has everything, the model's among them."""
        times = collections.Counter(call.name for call in self._calls)
        return [
            call
            for call in self._calls
            if call.whole and times[call.name] == 1 and all(isinstance(node, Node) for node in (*call.args, call.out))
        ]

    def keeps_proxies(self) -> bool:
        """Whether the forward has kept a tensor anywhere: on a module, in a list, in a global."""
        return any(proxy() is not None for proxy in self._proxies)

    def forget(self) -> None:
        """Take what is still kept of the forward's tensors out of the containers and objects that keep it."""
        if self.keeps_proxies():
            gc.collect(1)  # what only waits for that, and is young; a collection of everything would take long
        if self.keeps_proxies():
            drop([proxy for kept in self._proxies if (proxy := kept()) is not None])

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        """The graph of `root`'s forward."""
        call = self._begin("", ())
        graph = super().trace(root, concrete_args)
        self._of_attributes.clear()  # what torch.fx keeps is not what the forward keeps
        nodes = list(graph.nodes)
        call.args = (next(node for node in nodes if node.op == "placeholder"),)
        self._end(call, len(nodes) - 1, nodes[-1].args[0])
        return graph

    def _begin(self, name: str, args: tuple[Any, ...]) -> Call:
        self._open.append(Call(name, len(self.graph.nodes) if name else 0, args, modes=_modes()))
        return self._open[-1]

    def _end(self, call: Call, end: int, out: Any) -> None:
        call.end, call.out = end, out
        self._calls.append(call)
        self._open.pop()

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        """The model's arguments; what comes after them is its forward."""
        made = super().create_args_for_root(*args, **kwargs)
        self._open[0].first = len(self.graph.nodes)
        return made

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        """A node. Where torch's modes are others than when a call began, the call has set them."""
        modes = _modes()
        for call in self._open:
            call.whole &= call.modes == modes
        return super().create_node(*args, **kwargs)

    def proxy(self, node: Node) -> Proxy:
        """The forward's name for a node."""
        made = super().proxy(node)
        self._proxies.append(weakref.ref(made))
        return made

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the module is one node."""
        return self._is_layer(m) or is_normalize(m) or super().is_leaf_module(m, module_qualified_name)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """In the place of nn.Module.__getattr__, for all threads: the others get what they asked for."""
        if threading.get_ident() != self._thread:
            return attr_val
        self._of_attributes = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The call of a module as a node, or as the nodes of its forward, which are noted."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if isinstance(m, WRAPPERS):
            return m.module(*args, **kwargs)
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        call = self._begin(name, tuple(arg.node if isinstance(arg, Proxy) else None for arg in args))
        out = super().call_module(m, forward, args, kwargs)
        call.whole &= not kwargs
        self._end(call, len(self.graph.nodes), out.node if isinstance(out, Proxy) else None)
        return out

    def to_bool(self, obj: Proxy) -> bool:
        """A condition in whose one case the forward raises has the other value."""
        frame = inspect.currentframe()
        while frame is not None and frame.f_code.co_filename in _OF_THE_TRACER:
            frame = frame.f_back
        value = None if frame is None else _value_that_goes_on(frame)
        if value is None:
            return super().to_bool(obj)
        for call in self._open:
            call.whole = False
        return value


_OF_THE_TRACER = {__file__, inspect.getfile(Proxy), inspect.getfile(Tracer)}


def _value_that_goes_on(frame: FrameType) -> bool | None:
    """Of the condition that the frame is at: the value with which it does not raise at once; None if both go on."""
    steps = list(dis.get_instructions(frame.f_code))
    at = next(i for i, step in enumerate(steps) if step.offset >= frame.f_lasti)
    jump = next((i for i in range(at, min(at + 3, len(steps))) if "JUMP" in steps[i].opname), None)
    if jump is None or not steps[jump].opname.endswith(("IF_TRUE", "IF_FALSE")):
        return None
    target = next(i for i, step in enumerate(steps) if step.offset == steps[jump].argval)
    goes_on, jumps_on = not _raises(steps, jump + 1), not _raises(steps, target)
    if goes_on == jumps_on:
        return None
    return jumps_on == steps[jump].opname.endswith("IF_TRUE")


def _raises(steps: list[dis.Instruction], at: int) -> bool:
    for step in itertools.islice(steps, at, None):
        if step.opname == "RAISE_VARARGS":
            return True
        if "JUMP" in step.opname or step.opname.startswith(("RETURN", "STORE", "YIELD")):
            return False
    return False


def _modes() -> object:
    """What decides about how torch computes and what it records, and is set around a block of code."""
    torch.autocast_increment_nesting()
    autocasts = torch.autocast_decrement_nesting()
    saves = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocasts, saves


def _random_states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return torch.get_rng_state(), random.getstate(), None if numpy is None else numpy.random.get_state()


def _set_random_states(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    if states[2] is not None:
        sys.modules["numpy"].random.set_state(states[2])


@contextlib.contextmanager
def host_draws_put_back() -> Iterator[None]:
    """Python's and numpy's generators are after the block as before it."""
    states = _random_states()
    try:
        yield
    finally:
        _set_random_states((torch.get_rng_state(), *states[1:]))


def _same_state(old: Any, new: Any) -> bool:
    if isinstance(old, tuple):
        return all(map(_same_state, old, new))
    return bool((old == new).all()) if hasattr(old, "all") else old == new
