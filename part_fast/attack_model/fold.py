"""BatchNorm folding: which BatchNorms can be part of the convolution before them, and the weights that do it."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from part_fast.attack_model.trace import Trace, traced

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


def trace(model: nn.Module) -> Trace | str:
    """The forward of `model`, in eval mode, with its convolutions and BatchNorms as nodes; or why there is none."""
    return traced(model, lambda module: isinstance(module, (nn.Conv2d, Folded, FoldedAct)) or _is_batch_norm(module))


def foldable(forward: Trace | str) -> tuple[list[tuple[str, str]], str | None]:
    """Names of (convolution, BatchNorm) where the one's output goes to the other alone, and neither is used elsewhere.

    forward: what `trace` gives. The second result says why there are none of them though there are BatchNorms, or is
    None.

    Refused: layers called twice or never; convolutions whose weights are shared, parametrized, or read by name; layers
    with hooks; and BatchNorms that are perhaps chosen among several, as a forward does that draws random numbers, or
    that calls some of the model's BatchNorms and not others of the same size. These others do not count where a whole
    part of the model is left out, convolution and BatchNorm, such as a classifier for training alone.
    """
    if isinstance(forward, str):
        return [], forward
    model, prefix, graph = forward.model, forward.prefix, forward.graph
    modules = dict(model.named_modules())
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    calls = collections.Counter(str(node.target) for node in nodes)
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    # By module, of which one may have several names.
    owners = collections.Counter(id(p) for module in modules.values() for p in module._parameters.values())
    norms = {name: module for name, module in modules.items() if isinstance(module, BATCH_NORMS)}
    used = {*calls, *read}
    idle = {
        norm.num_features for name, norm in norms.items() if name not in used and not _is_apart(name, modules, used)
    }
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


def _is_apart(name: str, modules: dict[str, nn.Module], used: set[str]) -> bool:
    """Whether a BatchNorm that the forward leaves out has a convolution beside it, and nothing around it is used.

    Were it chosen another time, it would be with its own convolution, not after one that is folded.
    """
    parent = name.rpartition(".")[0]
    return (
        bool(parent)
        and not any(f"{other}.".startswith(f"{parent}.") for other in used)
        and any(
            isinstance(part, nn.Conv2d) and part.out_channels == getattr(modules[name], "num_features", None)
            for part in modules[parent].children()
        )
    )


def still_folded(forward: Trace | str, pairs: list[tuple[str, str]]) -> bool:
    """Whether the forward of a model that `absorb` was called on for `pairs` still leads from each one's convolution to
    where its BatchNorm was, and nowhere else."""
    if isinstance(forward, str):
        return False
    prefix, graph = forward.prefix, forward.graph
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    calls = collections.Counter(prefix + str(node.target) for node in nodes)
    found = {
        (prefix + str(node.args[0].target), prefix + str(node.target))
        for node in nodes
        if node.args and isinstance(node.args[0], Node) and len(node.args[0].users) == 1
    }
    return all(pair in found and calls[pair[0]] == calls[pair[1]] == 1 for pair in pairs)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks, parametrizations or a forward of its own hang on the layer, which must see it as it is."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module) or torch.nn.utils.parametrize.is_parametrized(module)


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


def restore(module: nn.Module, plain: nn.Module, conv: str, bn: str) -> None:
    """Undo `absorb`, with the BatchNorm of `plain`, another copy; the convolution's values stay the folded ones."""
    convolution, norm, theirs = module.get_submodule(conv), module.get_submodule(bn), plain.get_submodule(bn)
    if plain.get_submodule(conv).bias is None:
        convolution.bias = None  # type: ignore[assignment]
    norm.__class__ = type(theirs)
    norm._parameters.update(theirs._parameters)
    norm._buffers.update(theirs._buffers)


def turn(module: nn.Module, conv: str, bn: str) -> None:
    """Give what the convolution gives another size and sign, and have its BatchNorm undo that.

    By powers of two, so that a model in which the one leads to the other, and nowhere else, computes the same bits.
    """
    convolution, norm = module.get_submodule(conv), module.get_submodule(bn)
    mean, var, weight = (getattr(norm, name) for name in ("running_mean", "running_var", "weight"))
    scale = 2.0 if weight is None else -2.0
    for name, value in list(convolution._parameters.items()):
        if value is not None:
            convolution._parameters[name] = nn.Parameter(value * scale, requires_grad=False)
    norm._buffers["running_mean"], norm._buffers["running_var"] = mean * scale, var * scale**2
    norm.eps = float(norm.eps) * scale**2  # type: ignore[arg-type, assignment]
    if weight is not None:
        norm._parameters["weight"] = nn.Parameter(-weight, requires_grad=False)


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
