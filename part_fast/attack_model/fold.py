"""BatchNorm folding: which BatchNorms can be part of the convolution before them, and the weights that do it."""

from __future__ import annotations

import collections

import torch
from torch import Tensor, nn


def foldable(model: nn.Module) -> list[tuple[str, str]]:
    """Names of (convolution, BatchNorm) where the one's output goes to the other alone, neither used elsewhere too."""
    try:
        graph = torch.fx.Tracer().trace(model)
    except Exception:  # whatever a forward does that cannot be traced; it is then copied as it is
        return []
    modules = dict(model.named_modules())
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    calls = [str(node.target) for node in nodes]
    uses = collections.Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    pairs = []
    for node in nodes:
        bn, before = str(node.target), node.args[0] if node.args else None
        if not isinstance(before, torch.fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        conv = str(before.target)
        norm = modules[bn]
        if (
            type(modules[conv]) is nn.Conv2d
            and type(norm) is nn.BatchNorm2d
            and norm.running_mean is not None
            and calls.count(bn) == calls.count(conv) == 1
            and all(uses[id(parameter)] == 1 for parameter in modules[conv].parameters())
            and not (has_hooks(modules[conv]) or has_hooks(norm))
        ):
            pairs.append((conv, bn))
    return pairs


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks or parametrizations hang on the layer, which must see it as it is."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return bool(hooked) or torch.nn.utils.parametrize.is_parametrized(module)


def absorb(module: nn.Module, conv: str, bn: str) -> None:
    """Give the convolution a bias for the BatchNorm's shift, and put nn.Identity in the BatchNorm's place."""
    convolution = module.get_submodule(conv)
    assert isinstance(convolution, nn.Conv2d)
    if convolution.bias is None:
        convolution.bias = nn.Parameter(convolution.weight.new_zeros(convolution.out_channels), requires_grad=False)
    parent, _, leaf = bn.rpartition(".")
    setattr(module.get_submodule(parent), leaf, nn.Identity())


def folded_weights(conv_weight: Tensor, conv_bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that gives what the BatchNorm gives in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale if conv_bias is None else (conv_bias - norm.running_mean) * scale
    return conv_weight * scale[:, None, None, None], shift if norm.bias is None else shift + norm.bias
