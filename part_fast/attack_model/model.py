"""AttackModel: a frozen eval-mode copy of a model, made to be attacked: the same logits, faster input gradients."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from part_fast import checks
from part_fast.attack_model.cpu.packed_conv import PackedConv2d
from part_fast.attack_model.fold import absorb, foldable, folded_weights, has_hooks
from part_fast.attack_model.follow import Watch
from part_fast.attack_model.frozen import frozen_copy, is_of_view, lay_, read
from part_fast.attack_model.graph import GraphedSteps
from part_fast.eval_mode import unwrapped

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
    second derivative then. A forward takes over the model's weights where they were changed in place since the last
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
        model = unwrapped(model)
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        device = next(itertools.chain(model.parameters(), model.buffers()), torch.zeros(0)).device
        if precision == "fp16" and device.type != "cuda":
            raise ValueError(f"precision fp16 needs a CUDA model, got one on {device.type}: take bf16 or fp32")
        if cuda_graph and device.type != "cuda":
            raise ValueError(f"cuda_graph needs a CUDA model, got one on {device.type}")
        self.precision = precision
        self._source = (model,)  # in a tuple: a submodule would be trained, saved and moved with this one
        self.module = frozen_copy(model)
        self._pairs = foldable(self.module)  # of the copy: in train mode a model may take another way
        for conv, bn in self._pairs:
            absorb(self.module, conv, bn)
        if not compile:  # Inductor knows torch's own convolutions
            _pack(self.module, PRECISIONS[precision])
        if precision != "fp32":
            for module in self.module.modules():
                # A packed convolution casts where it packs.
                if isinstance(module, (nn.Conv2d, nn.Linear)) and not isinstance(module, PackedConv2d):
                    module.to(PRECISIONS[precision])
        self._format = torch.channels_last
        lay_(self.module, self._format)
        self._fast: Callable[[Tensor], Tensor] = torch.compile(self.module) if compile else self.module
        self._padded = 0 if compile else None
        self.graphs = GraphedSteps() if cuda_graph else None
        self.eval()
        self.refresh()

    @property
    def folded(self) -> int:
        """How many BatchNorms are part of their convolution."""
        return len(self._pairs)

    @property
    def source(self) -> nn.Module:
        """The model that this is a copy of."""
        return self._source[0]

    @torch.no_grad()
    def refresh(self) -> AttackModel:
        """Take over the weights and statistics that the model has now, into the same memory; returns itself."""
        (model,) = self._source
        with read(model):
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
                weight, bias = folded_weights(theirs[f"{conv}.weight"], theirs.get(f"{conv}.bias"), norm)
                ours[f"{conv}.weight"].copy_(weight)
                ours[f"{conv}.bias"].copy_(bias)
        self._watch = Watch(model)
        for part in self.module.modules():
            if isinstance(part, PackedConv2d):
                part.repack()
        return self

    def refresh_if_changed(self) -> None:
        """`refresh`, if any weight was written in place since the last one."""
        if self._watch.changed():
            self.refresh()

    def train(self, mode: bool = True) -> AttackModel:
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N,classes), float32 (float64 for a float64 model), of images (N,C,H,W) in [0,1]."""
        self.refresh_if_changed()
        n = len(x)
        # A forward that is not differentiated to its input may have CamBudget's hook in it, and is not compiled.
        run, fast = self.module, torch.is_grad_enabled() and x.requires_grad
        if fast:
            run = self._fast  # type: ignore[assignment]
            if self._padded is not None:
                self._padded = max(self._padded, n)
                x = torch.cat([x, x.new_zeros(self._padded - n, *x.shape[1:])]) if n < self._padded else x
        if self.precision == "fp32":
            return checks.logits(self._run(run, x), x)[:n]
        # No cache: the weights are in their dtype already, and what is cached here would outlive `refresh`.
        with torch.autocast(x.device.type, PRECISIONS[self.precision], cache_enabled=False):
            logits = checks.logits(self._run(run, x), x)[:n].float()
        return _scaled(logits) if self.precision == "fp16" else logits

    def _run(self, run: Callable[[Tensor], Any], x: Tensor) -> Any:
        """The copy's output; from the first `.view` on that channels_last does not allow, in contiguous memory."""
        try:
            return run(x.contiguous(memory_format=self._format))
        except RuntimeError as error:
            if self._format is torch.contiguous_format or not is_of_view(error):
                raise
        warnings.warn(
            f"{type(self._source[0]).__name__} flattens by .view, which channels_last memory does not allow: its "
            "AttackModel runs in contiguous memory, unpacked; torch.flatten or .reshape is faster",
            stacklevel=3,
        )
        self._format = torch.contiguous_format
        lay_(self.module, self._format)
        for part in self.module.modules():
            if isinstance(part, PackedConv2d):
                part.unpack()
        return run(x.contiguous())


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


def _pack(module: nn.Module, dtype: torch.dtype) -> None:
    """PackedConv2d in the place of every convolution of `module` that can be one and has nothing hung on it."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if PackedConv2d.takes(child, dtype) and not has_hooks(child):
                setattr(parent, name, PackedConv2d(child, dtype))  # type: ignore[arg-type]


def _copy(to: list[Tensor], of: list[Tensor]) -> None:
    groups: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for ours, theirs in zip(to, of, strict=True):
        pair = groups.setdefault((ours.dtype, theirs.dtype), ([], []))
        pair[0].append(ours)
        pair[1].append(theirs)
    for ours_, theirs_ in groups.values():
        torch._foreach_copy_(ours_, theirs_)
