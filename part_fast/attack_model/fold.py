"""BatchNorm folding: which BatchNorms can be part of the convolution before them, and the weights that do it."""

from __future__ import annotations

import collections
import dis
import inspect
import itertools
import random
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

# Modules that do what the module in them does.
WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class Folded(nn.Identity):
    """What a BatchNorm becomes that its convolution has absorbed: the same object, under all its names."""


class FoldedAct(nn.Module):
    """The same for timm's BatchNormAct2d, of which dropout and activation stay."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """act(drop(x))."""
        out: Tensor = self.act(self.drop(x))
        return out


def foldable(model: nn.Module) -> tuple[list[tuple[str, str]], str | None]:
    """Names of (convolution, BatchNorm) where the one's output goes to the other alone, and neither is used elsewhere.

    model: in eval mode; its forward is traced by torch.fx, which computes nothing, and it is left as it was. The second
    result says why there are none of them though there are BatchNorms, or is None.

    Refused: layers called twice or never; convolutions whose weights are shared, parametrized, or read by name; layers
    with hooks; and BatchNorms that are perhaps chosen among several, as a forward does that draws random numbers, or
    that calls some of the model's BatchNorms and not others of the same size.
    """
    prefix = ""
    while isinstance(model, WRAPPERS):
        model, prefix = model.module, f"{prefix}module."
    try:
        graph = trace(model)
    except Exception as error:  # whatever a forward does that cannot be traced; it is then copied as it is
        return [], f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    if graph is None:
        return [], "its forward draws random numbers or changes numbers that the model keeps"
    modules = dict(model.named_modules())
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    calls = collections.Counter(str(node.target) for node in nodes)
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    # By module, of which one may have several names.
    owners = collections.Counter(id(p) for module in modules.values() for p in module._parameters.values())
    norms = {name: module for name, module in modules.items() if isinstance(module, BATCH_NORMS)}
    idle = {norm.num_features for name, norm in norms.items() if not calls[name] and name not in read}
    pairs = []
    for node in nodes:
        bn, before = str(node.target), node.args[0] if node.args else None
        if not isinstance(before, Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        conv = str(before.target)
        convolution, norm = modules[conv], modules[bn]
        if (
            type(convolution) is nn.Conv2d
            and _is_batch_norm(norm)
            and norm.running_mean is not None
            and norm.num_features not in idle
            and calls[bn] == calls[conv] == 1
            and not {conv, bn} & read
            and all(owners[id(parameter)] == 1 for parameter in convolution.parameters())
            and not (has_hooks(convolution) or has_hooks(norm))
        ):
            pairs.append((prefix + conv, prefix + bn))
    if pairs or not norms:
        return pairs, None
    return [], (
        "its forward leaves out BatchNorms that it may choose another time"
        if idle
        else "none of them is all that a convolution of its own leads to"
    )


def still_folded(model: nn.Module, pairs: list[tuple[str, str]]) -> bool:
    """Whether a forward of `model`, which `absorb` was called on for `pairs`, still leads from each one's convolution
    to where its BatchNorm was, and nowhere else."""
    prefix = ""
    while isinstance(model, WRAPPERS):
        model, prefix = model.module, f"{prefix}module."
    try:
        graph = trace(model)
    except Exception:
        graph = None
    if graph is None:
        return False
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    calls = collections.Counter(prefix + str(node.target) for node in nodes)
    found = {
        (prefix + str(node.args[0].target), prefix + str(node.target))
        for node in nodes
        if node.args and isinstance(node.args[0], Node) and len(node.args[0].users) == 1
    }
    return all(pair in found and calls[pair[0]] == calls[pair[1]] == 1 for pair in pairs)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks or parametrizations hang on the layer, which must see it as it is."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or torch.nn.utils.parametrize.is_parametrized(module)


def absorb(module: nn.Module, conv: str, bn: str) -> None:
    """Give the convolution a bias for the BatchNorm's shift, and have the BatchNorm do nothing.

    The BatchNorm stays the object that it is, which the model may know by several names.
    """
    convolution, norm = module.get_submodule(conv), module.get_submodule(bn)
    assert isinstance(convolution, nn.Conv2d)
    if convolution.bias is None:
        convolution.bias = nn.Parameter(convolution.weight.new_zeros(convolution.out_channels), requires_grad=False)
    norm._parameters.clear()
    norm._buffers.clear()
    norm.__class__ = Folded if type(norm) in BATCH_NORMS else FoldedAct


def folded_weights(
    weights: list[Tensor], biases: list[Tensor | None], norms: list[Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of the convolutions that give what their BatchNorms give in eval mode; a few launches."""
    if not norms:
        return [], []
    scales = torch._foreach_add([norm.running_var for norm in norms], [float(norm.eps) for norm in norms])
    torch._foreach_rsqrt_(scales)
    _each(torch._foreach_mul_, scales, [norm.weight for norm in norms])
    shifts = torch._foreach_neg([norm.running_mean for norm in norms])
    _each(torch._foreach_add_, shifts, biases)
    torch._foreach_mul_(shifts, scales)
    _each(torch._foreach_add_, shifts, [norm.bias for norm in norms])
    return list(torch._foreach_mul(weights, [scale.view(-1, 1, 1, 1) for scale in scales])), list(shifts)


def _each(op: Callable[..., Any], to: list[Tensor] | tuple[Tensor, ...], of: list[Tensor | None]) -> None:
    """`op` on those of the two lists that are there in both."""
    present = [(ours, theirs) for ours, theirs in zip(to, of, strict=True) if theirs is not None]
    if present:
        op(*map(list, zip(*present, strict=True)))


def _is_batch_norm(module: nn.Module) -> bool:
    kind = type(module)
    return kind in BATCH_NORMS or (kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm."))


def trace(model: nn.Module) -> Graph | None:
    """The graph of the model's forward of one argument; None if it may be another one the next time.

    That is when the forward draws random numbers or changes what decides about it: numbers and flags that the model
    keeps. The model and all random generators are left as they were. What cannot be traced raises.
    """
    parts = list(model.modules())
    before = [dict(part.__dict__) for part in parts]
    buffers = [(part._buffers, dict(part._buffers)) for part in parts if type(part._buffers) is dict]
    randoms = _random_states()
    optional = {
        name: parameter.default
        for name, parameter in list(inspect.signature(type(model).forward).parameters.items())[2:]
        if parameter.default is not parameter.empty
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of hooks and the like, that they see no tensors
            graph = _Tracer().trace(model, optional)
        after = [dict(part.__dict__) for part in parts]
    finally:
        for part, attributes in zip(parts, before, strict=True):
            part.__dict__.clear()
            part.__dict__.update(attributes)
        for held, kept in buffers:
            held.clear()
            held.update(kept)
    drawn = not all(map(_same_state, randoms, _random_states()))
    if drawn:
        _set_random_states(randoms)
    for old, new in zip(before, after, strict=True):
        for key in old.keys() & new.keys():
            if isinstance(new[key], (bool, int, float, str)) and old[key] is not new[key] and old[key] != new[key]:
                return None
    return None if drawn else graph


class _Tracer(Tracer):
    """Traces through wrappers, takes every layer of torch as one call, and passes checks of the input."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, (nn.Conv2d, Folded, FoldedAct)) or _is_batch_norm(m)
        return leaf or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if isinstance(m, WRAPPERS):
            return m.module(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def to_bool(self, obj: Proxy) -> bool:
        """A condition in whose one case the forward raises has the other value."""
        frame = inspect.currentframe()
        while frame is not None and frame.f_code.co_filename in _OF_THE_TRACER:
            frame = frame.f_back
        value = None if frame is None else _value_that_goes_on(frame)
        return super().to_bool(obj) if value is None else value


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


def _random_states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return random.getstate(), torch.get_rng_state(), None if numpy is None else numpy.random.get_state()


def _set_random_states(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    torch.set_rng_state(states[1])
    if states[2] is not None:
        sys.modules["numpy"].random.set_state(states[2])


def _same_state(old: Any, new: Any) -> bool:
    if isinstance(old, tuple):
        return all(map(_same_state, old, new))
    return bool((old == new).all()) if hasattr(old, "all") else old == new
