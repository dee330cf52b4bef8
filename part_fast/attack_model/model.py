"""AttackModel: a frozen eval-mode copy of a model, made to be attacked: the same logits, faster input gradients."""

from __future__ import annotations

import collections
import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from part_fast import checks
from part_fast.attack_model.cpu.packed_conv import PackedConv2d
from part_fast.attack_model.graph import GraphedSteps

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# float16 has no gradients below 6e-8. A factor on all of them leaves their signs, and this one keeps sums finite.
FP16_SCALE = 1024.0


class AttackModel(nn.Module):
    """A copy of `model` for attacks: `pgd(AttackModel(model), x, y, eps)` finds what `pgd(model, x, y, eps)` finds.

    model: any nn.Module (N,C,H,W) -> (N,classes), which keeps its mode, weights and gradients.
    precision: "fp32", "bf16" or "fp16": of convolutions and linear layers, by autocast with weights that are cast
        once; images, other layers' parameters and the returned logits stay float32. On a CPU bf16 leaves those
        convolutions in float32 that are faster in it (see PackedConv2d).
    compile: run forward and backward of the attack by torch.compile. A smaller batch than the largest so far is filled
        up with images that are thrown away, so that nothing is compiled anew for the last batch of an epoch.
    cuda_graph: capture the steps of an attack once per shape and replay them; CUDA models only.

    The copy is in eval mode, asks for no parameter gradients, computes in channels_last, and has each BatchNorm that
    follows a convolution folded into it (as torch.fx finds them; a model that it cannot trace keeps all): `folded` says
    how many. Submodules keep their names, so CamBudget finds the target layer in it too; a convolution's output is
    then what its BatchNorm's was. On a CPU, where it is not compiled, weights are packed too and 3x3 convolutions take
    a quarter of the products, for which they keep eight times their weights (see PackedConv2d); gradients have no
    second derivative then. Under torch.func transforms and forward-mode AD it computes plainly, as the model does, with
    every derivative. A forward takes over the model's weights where they were changed in place since the last
    one, as optimizers do; after parameters were replaced, or written through `.data`, call `refresh`.

    Equivalent to: `model.eval()` with every `p.requires_grad_(False)`, up to rounding.
    Errors: TypeError or ValueError that names the argument.
    """

    def __init__(
        self, model: nn.Module, *, precision: str = "fp32", compile: bool = False, cuda_graph: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        device = next(itertools.chain(model.parameters(), model.buffers()), torch.zeros(0)).device
        if precision == "fp16" and device.type != "cuda":
            raise ValueError(f"precision fp16 needs a CUDA model, got one on {device.type}: take bf16 or fp32")
        if cuda_graph and device.type != "cuda":
            raise ValueError(f"cuda_graph needs a CUDA model, got one on {device.type}")
        self.precision = precision
        self._source = (model,)  # in a tuple: a submodule would be trained, saved and moved with this one
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._pairs = _foldable(self.module)  # of the copy: in train mode a model may take another way
        for conv, bn in self._pairs:
            _absorb(self.module, conv, bn)
        if not compile:  # Inductor knows torch's own convolutions
            _pack(self.module, PRECISIONS[precision])
        if precision != "fp32":
            for module in self.module.modules():
                # A packed convolution casts where it packs.
                if isinstance(module, (nn.Conv2d, nn.Linear)) and not isinstance(module, PackedConv2d):
                    module.to(PRECISIONS[precision])
        self.module.to(memory_format=torch.channels_last)
        self._fast: Callable[[Tensor], Tensor] = torch.compile(self.module) if compile else self.module
        self._padded = 0 if compile else None
        self.graphs = GraphedSteps() if cuda_graph else None
        self.eval()
        self.refresh()

    @property
    def folded(self) -> int:
        """How many BatchNorms are part of their convolution."""
        return len(self._pairs)

    @torch.no_grad()
    def refresh(self) -> AttackModel:
        """Take over the weights and statistics that the model has now, into the same memory; returns itself."""
        (model,) = self._source
        self._watched = [*model.parameters(), *model.buffers()]
        self._versions = [tensor._version for tensor in self._watched]
        # Under all their names: of a tensor that has two, the copy may have lost the first with a BatchNorm.
        every = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
        theirs = dict(itertools.chain(*every))
        ours = dict(itertools.chain(self.module.named_parameters(), self.module.named_buffers()))
        folded = {f"{conv}.{kind}" for conv, _ in self._pairs for kind in ("weight", "bias")}
        plain = [name for name in ours if name not in folded]
        _copy([ours[name] for name in plain], [theirs[name] for name in plain])
        for conv, bn in self._pairs:
            norm = model.get_submodule(bn)
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = (norm.running_var + norm.eps).rsqrt()
            scale = scale if norm.weight is None else scale * norm.weight
            bias = theirs.get(f"{conv}.bias")
            shift = -norm.running_mean * scale if bias is None else (bias - norm.running_mean) * scale
            ours[f"{conv}.weight"].copy_(theirs[f"{conv}.weight"] * scale[:, None, None, None])
            ours[f"{conv}.bias"].copy_(shift if norm.bias is None else shift + norm.bias)
        for part in self.module.modules():
            if isinstance(part, PackedConv2d):
                part.repack()
        return self

    def refresh_if_changed(self) -> None:
        """`refresh`, if any weight was written in place since the last one."""
        if [tensor._version for tensor in self._watched] != self._versions:
            self.refresh()

    def train(self, mode: bool = True) -> AttackModel:
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N,classes), float32 (float64 for a float64 model), of images (N,C,H,W) in [0,1]."""
        self.refresh_if_changed()
        n = len(x)
        # A forward that is not differentiated to its input may have CamBudget's hook in it, and is not compiled.
        transformed = checks.transformed()
        run, fast = self.module, torch.is_grad_enabled() and x.requires_grad and not transformed
        if fast:
            run = self._fast  # type: ignore[assignment]
            if self._padded is not None:
                self._padded = max(self._padded, n)
                x = torch.cat([x, x.new_zeros(self._padded - n, *x.shape[1:])]) if n < self._padded else x
        if not transformed:  # which knows no memory format
            x = x.contiguous(memory_format=torch.channels_last)
        if self.precision == "fp32":
            return run(x)[:n]
        # No cache: the weights are in their dtype already, and what is cached here would outlive `refresh`.
        with torch.autocast(x.device.type, PRECISIONS[self.precision], cache_enabled=False):
            logits = run(x)[:n].float()
        return _scaled(logits) if self.precision == "fp16" and not transformed else logits


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        return grad_out * FP16_SCALE


def _scaled(logits: Tensor) -> Tensor:
    """The logits; gradients that go back through here are FP16_SCALE times as large."""
    return _Scaled.apply(logits)


def _foldable(model: nn.Module) -> list[tuple[str, str]]:
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
            and not (_is_more(modules[conv]) or _is_more(norm))
        ):
            pairs.append((conv, bn))
    return pairs


def _is_more(module: nn.Module) -> bool:
    """Whether somebody hung something on the layer that must see it as it is."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return bool(hooked) or torch.nn.utils.parametrize.is_parametrized(module)


def _absorb(module: nn.Module, conv: str, bn: str) -> None:
    """Room for the BatchNorm's shift in the convolution, nothing in its own place."""
    convolution = module.get_submodule(conv)
    assert isinstance(convolution, nn.Conv2d)
    if convolution.bias is None:
        convolution.bias = nn.Parameter(convolution.weight.new_zeros(convolution.out_channels), requires_grad=False)
    parent, _, leaf = bn.rpartition(".")
    setattr(module.get_submodule(parent), leaf, nn.Identity())


def _pack(module: nn.Module, dtype: torch.dtype) -> None:
    """PackedConv2d in the place of every convolution of `module` that can be one and has nothing hung on it."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if PackedConv2d.takes(child, dtype) and not _is_more(child):
                setattr(parent, name, PackedConv2d(child, dtype))  # type: ignore[arg-type]


def _copy(to: list[Tensor], of: list[Tensor]) -> None:
    groups: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for ours, theirs in zip(to, of, strict=True):
        pair = groups.setdefault((ours.dtype, theirs.dtype), ([], []))
        pair[0].append(ours)
        pair[1].append(theirs)
    for ours_, theirs_ in groups.values():
        torch._foreach_copy_(ours_, theirs_)
