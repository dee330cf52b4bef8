"""AttackModel: a frozen eval-mode copy of a model, made to be attacked: the same logits, faster input gradients."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils._python_dispatch import _disable_current_modes

from part_fast import checks
from part_fast.attack_model.batch_sizes import BatchSizes
from part_fast.attack_model.cpu.packed_conv import PackedConv2d
from part_fast.attack_model.fold import (
    BATCH_NORMS,
    absorb,
    foldable,
    folded_weights,
    has_hooks,
    restore,
    still_folded,
    trace,
    turn,
)
from part_fast.attack_model.follow import Change, Watch, flat
from part_fast.attack_model.frozen import deep_copy, frozen_copy, is_of_view, lay_, reclosed, running_alone, shared
from part_fast.attack_model.fuse import fuse, fused_convolutions, unfuse
from part_fast.attack_model.graph import Graphs, capturing
from part_fast.attack_model.trace import Trace, host_draws_put_back
from part_fast.errors import BadTypeError, BadValueError
from part_fast.eval_mode import eval_mode, switches, unwrapped
from part_fast.random_state import generators_put_back

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# float16 has no gradients below 6e-8. A factor on all of them leaves their signs, and this one keeps sums finite.
FP16_SCALE = 1024.0
# Of the first batch, how many images show whether the copy is the model.
FEW = 4


class AttackModel(nn.Module):
    """A copy of `model` for attacks: `pgd(AttackModel(model), x, y, eps)` finds what `pgd(model, x, y, eps)` finds.

    model: any nn.Module (N,C,H,W) -> (N,classes), which keeps its mode, weights and gradients.
    precision: "fp32", "bf16" or "fp16": of convolutions and linear layers, by autocast with weights that are cast
        once; images, other layers' parameters and the returned logits stay float32. On a CPU bf16 leaves those
        convolutions in float32 that are faster in it (see PackedConv2d), all of them where it cannot multiply bf16.
    compile: run forward and backward of the attack by torch.compile, for few batch sizes: smaller batches are filled up
        with images that are thrown away, so that nothing is compiled anew for the last batch of an epoch; not where
        BatchNorm has no running statistics. Not for other models in which images of a batch depend on each other.
    cuda_graph: capture the steps of an attack once per shape and replay them; CUDA models only.

    The copy is in eval mode, asks for no parameter gradients, computes in channels_last, and has each BatchNorm that
    follows a convolution folded into it (as torch.fx finds them): `folded` says how many, and a warning says why
    where it is none. Submodules keep their names, so CamBudget finds the target layer in it too; a
    convolution's output is then what its BatchNorm's was. DistributedDataParallel, torch.compile and AttackModel around
    `model` are taken off first. On a CPU, where it is not compiled, weights are packed too and 3x3 convolutions take a
    quarter of the products, for which they keep eight times their weights and round more (see PackedConv2d); sums and
    ReLUs after convolutions are computed in their pass (as torch.fx finds them, see `fuse`): `fused` says of how many
    convolutions. Gradients have no second derivative then. Under torch.func transforms and forward-mode AD it computes
    plainly, as the model does, with every derivative.

    The copy follows the model. Once an attack, and once in every forward outside of one, it takes over weights, buffers
    and plain attributes that have changed: by an optimizer, fused or not, in place, through `p.data = ...`, by new
    tensors in their place (`load_state_dict(assign=True)`), or by `model.to(...)`. It is made anew when the model got
    other modules, shapes, dtypes or another device; what was captured or compiled is then lost, and modules that were
    taken from it are no longer its own. On a GPU all weights are copied each time, by at most 12 calls of torch.
    Not noticed is what a CPU model gets through `.data` in place where 16 values in the middle of each tensor stay what
    they were; a list or dict of the model's that is changed deeper than its own items; what changes within plain
    objects among its attributes; and attributes of its class. PART_FAST_CHECK=1 compares every weight, and `refresh`
    takes over all. Hooks are those that the model had when it was copied. Modules that the model keeps without
    registering them, in a tuple say, are the model's own in the copy too, in the mode that they are in.

    Functions among its attributes, and hooks, that close over the model run the copy. In the first forward after it was
    made or made anew a few images show whether the copy runs modules of the model in any other way, which is refused,
    and whether torch.fx has seen the forward that runs: nothing is folded, with a warning, where it has not.

    It is no part of a module that it becomes an attribute of: its weights are not among that one's parameters and not
    in its `state_dict`. It moves with the model: `.to()` and `.double()` of it alone raise at the next forward.
    A deepcopy follows the model too, or the model's copy where that was copied along.

    Equivalent to: `model.eval()` with every `p.requires_grad_(False)`, up to rounding.
    Errors: TypeError or ValueError that names the argument; also in a forward, of the model.
    """

    module: nn.Module

    def __init__(
        self, model: nn.Module, *, precision: str = "fp32", compile: bool = False, cuda_graph: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise BadTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        model = _unwrapped(model)
        if precision not in PRECISIONS:
            raise BadValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        device = next(itertools.chain(model.parameters(), model.buffers()), torch.zeros(0)).device
        if precision == "fp16" and device.type != "cuda":
            raise BadValueError(f"precision fp16 needs a CUDA model, got one on {device.type}: take bf16 or fp32")
        if cuda_graph and device.type != "cuda":
            raise BadValueError(f"cuda_graph needs a CUDA model, got one on {device.type}")
        self.precision = precision
        self.compiled, self.cuda_graph = compile, cuda_graph
        self._source = (model,)  # in a tuple: a submodule would be trained, saved and moved with this one
        self._copied_in: dict[int, Any] | None = None
        self._moved_to: tuple[torch.dtype, torch.device] | None = None
        self._stale = False
        self.eval()
        why_not = self._build()
        if why_not is not None:
            warnings.warn(why_not, stacklevel=2)

    @torch.inference_mode(False)
    def _build(self) -> str | None:
        """Copy the model, fold, pack, cast and compile; says why no BatchNorm could be folded, if there are any."""
        model = self.source
        if self.precision != "fp32" and (dtype := _whereabouts(model)[0]) == torch.float64:
            raise BadValueError(
                f"precision {self.precision} needs a float32 model, got {dtype}: take fp32, which keeps it"
            )
        module, self._special = frozen_copy(model)
        self._switches = any(map(switches, model.modules()))
        # Of the copy: in train mode a model may take another way.
        forward = trace(module)
        self._pairs, why_not = foldable(forward)
        norms = sum(isinstance(part, BATCH_NORMS) for part in module.modules())
        for conv, bn in self._pairs:
            absorb(module, conv, bn)
        if not self.compiled:  # Inductor knows torch's own convolutions
            _pack(module, PRECISIONS[self.precision])
        if self.precision != "fp32":
            for part in module.modules():
                # A packed convolution casts where it packs.
                if isinstance(part, (nn.Conv2d, nn.Linear)) and not isinstance(part, PackedConv2d):
                    part.to(PRECISIONS[self.precision])
        module.eval()
        self._format = torch.channels_last
        lay_(module, self._format)
        self.__dict__["module"] = module  # not as a submodule: it is nobody's to save, to train and to move
        self._hooks = _hooks(module)
        self._set_up(forward)
        self._watch: Watch | None = None
        self._proven, self._stale = False, False
        self.refresh()
        if why_not is None or norms == 0:
            return None
        which = f"none of the {norms} BatchNorms of {type(model).__name__}"
        return f"AttackModel folded {which}, and is slower for it: {why_not}"

    def _set_up(self, forward: Trace | str | None = None) -> None:
        """What cannot be copied or pickled. forward: the copy's, where it has been traced already."""
        if self._packs:
            unfuse(self.module)  # what was copied along
            fuse(forward or trace(self.module))
        # Sizes are few, and each is faster than one for all.
        self.__dict__["_fast"] = torch.compile(self.module, dynamic=False) if self.compiled else self.module
        self.batch_sizes = BatchSizes() if self.compiled and not any(map(_mixes, self.module.modules())) else None
        self.graphs = Graphs() if self.cuda_graph else None

    @property
    def source(self) -> nn.Module:
        """The model that is followed."""
        if self._copied_in is not None:
            # What deepcopy had not come to yet when it copied this.
            self._source = (self._copied_in.get(id(self._source[0]), self._source[0]),)
            self._copied_in = None
        return self._source[0]

    @property
    def folded(self) -> int:
        """How many BatchNorms are part of their convolution."""
        return len(self._pairs)

    @property
    def fused(self) -> int:
        """How many convolutions compute what is added to them, or their ReLU, in their own pass; on a CPU alone."""
        return fused_convolutions(self.module)

    @property
    def _packs(self) -> bool:
        return any(isinstance(part, PackedConv2d) for part in self.module.modules())

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> AttackModel:
        """Take over the weights, statistics and attributes that the model has now; returns itself.

        What has changed unnoticed too, such as what is within a plain object, and attributes of its class.

        They go into the same memory, unless the model has another structure, shapes, dtype or device. What was captured
        is captured anew; within a capture only what is noticed is taken over.
        """
        if self._stale:
            self._build()
            return self
        with self._reading():
            if self._watch is None:
                self._watch = Watch(self.source)
                self._plan()
            else:
                change, attributes = self._watch.ask()
                everything = not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
                if change is Change.STRUCTURE or not self._set(attributes, everything):
                    self._rebuild()
                    return self
                self._plan()
            self._take_values()
        return self

    @torch.inference_mode(False)
    def refresh_if_changed(self) -> None:
        """`refresh`, if the model may have changed since; what an attack asks first."""
        if self._moved_to is not None:
            self._check_moved(*self._moved_to)
        if self._watch is None:
            self.refresh()
            return
        with record_function("part_fast: refresh of AttackModel"), self._reading():
            change, attributes = self._watch.ask()
            if change is Change.STRUCTURE or not self._set(attributes):
                self._rebuild()
            elif change is Change.VALUES:
                if self._planned_for != self._watch.objects_taken:  # else its tensors are the same ones, as in training
                    self._plan()
                self._take_values()
            elif self._watch.unread:
                self._take_values(noticed=False)

    def _reading(self) -> contextlib.AbstractContextManager[None]:
        """Held while the model is read: eval mode, where that changes more than a flag, as where LoRA is merged."""
        return eval_mode(self.source) if self._switches else contextlib.nullcontext()

    def tell(self) -> None:
        """Say that the weights have changed, in a way that leaves no mark: the next forward takes them over."""
        if self._watch is not None:
            self._watch.tell()

    @torch.no_grad()
    def _plan(self) -> None:
        """Which of the model's tensors go where."""
        assert self._watch is not None
        model, self._planned_for = self.source, self._watch.objects_taken
        # Under all their names: of a tensor that has two, the copy may have lost the first with a BatchNorm.
        every = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
        theirs = dict(itertools.chain(*every))
        ours = dict(itertools.chain(self.module.named_parameters(), self.module.named_buffers()))
        folded = [f"{conv}.{kind}" for kind in ("weight", "bias") for conv, _ in self._pairs]
        plain = [name for name in ours if name not in set(folded)]
        # Tensors that are plain attributes are copied like buffers, of lists and dicts the items made anew.
        kept, self._holding = [], []
        for (name, key), value in self._watch.attributes.items():
            mine = getattr(self.module.get_submodule(name), key, None)
            if isinstance(value, Tensor) and isinstance(mine, Tensor) and value.shape == mine.shape:
                kept.append((mine, value))
            elif any(isinstance(part, Tensor) for part in flat(value)):
                self._holding.append((name, key))
        self._taken = [*(mine for mine, _ in kept), *(ours[name] for name in (*plain, *folded))]
        # The same memory, of which torch does not count what is written.
        self._memory = [tensor.data for tensor in self._taken]
        self._theirs = [*(value for _, value in kept), *(theirs[name] for name in plain)]
        self._to_fold = (
            [theirs[f"{conv}.weight"] for conv, _ in self._pairs],
            [theirs.get(f"{conv}.bias") for conv, _ in self._pairs],
            [model.get_submodule(bn) for _, bn in self._pairs],
        )
        self._packed = [part for part in self.module.modules() if isinstance(part, PackedConv2d)]

    @torch.no_grad()
    def _take_values(self, noticed: bool = True) -> None:
        """noticed: whether the weights are others for certain; a backward through the old ones then raises."""
        assert self._watch is not None
        if noticed:
            self._set(self._holding)
        weights, biases = folded_weights(*self._to_fold)
        _copy(self._memory, [*self._theirs, *weights, *biases])
        if noticed:
            torch.autograd.graph.increment_version(self._taken)
            for part in self._packed:
                part.repack()
            self._watch.take_values()

    def _set(self, attributes: list[tuple[str, str]], everything: bool = False) -> bool:
        """Give the copy the model's plain attributes; whether it then still runs as it was folded.

        everything: and what may have changed without being among them.
        """
        assert self._watch is not None
        decides = everything
        if everything:
            self._set_objects()
        if (attributes or everything) and self.graphs is not None:
            self.graphs = Graphs()  # what was captured has the old ones
        for name, key in attributes:
            part = self.module.get_submodule(name)
            if (name, key) in self._watch.attributes:
                values = getattr(part, key, None), self._watch.attributes[name, key]
                decides |= not all(any(isinstance(item, Tensor) for item in flat(value)) for value in values)
                setattr(part, key, reclosed(_detached(values[1]), self._twins()))
            else:
                decides = True
                part.__dict__.pop(key, None)
        if not decides or not (self._pairs or self._packs):
            return True
        self._proven &= not self._pairs
        unfuse(self.module)
        forward = trace(self.module)
        fuse(forward)
        return not self._pairs or still_folded(forward, self._pairs)

    def _set_objects(self) -> None:
        """Give the copy copies of all attributes that are looked into no deeper than their items, or not at all."""
        assert self._watch is not None
        twins = self._twins()
        memo = shared(list(self.source.modules())) | twins
        for (name, key), value in self._watch.attributes.items():
            theirs, ours = self.source.get_submodule(name), self.module.get_submodule(name)
            own = type(theirs) is type(ours) and not type(theirs).__module__.startswith("torch.nn.")
            if own and not isinstance(value, (Tensor, nn.Module, bool, int, float, str)):
                setattr(ours, key, reclosed(deep_copy(value, memo), twins))

    def _twins(self) -> dict[int, Any]:
        """The copy's modules, by id of the model's."""
        ours = dict(self.module.named_modules())
        return {id(part): ours[name] for name, part in self.source.named_modules() if name in ours}

    def _wrongly_folded(self, x: Tensor) -> nn.Module | None:
        """A copy that nothing was done to, if folding has changed what it computes.

        Seen by the forward of another copy, with what shows whether each convolution leads to its BatchNorm and nowhere
        else (see `turn`), which is exact: how folding itself rounds does not count.
        """

        def logits(turned: bool = False) -> tuple[nn.Module, Any]:
            module, _ = frozen_copy(self.source)
            for pair in self._pairs if turned else ():
                turn(module, *pair)
            images = x.clone()
            with contextlib.ExitStack() as around:
                # Whoever watches what is computed, by a mode of torch's, watches the forward after these.
                unseen = torch._C.DisableTorchFunction(), _disable_current_modes()
                alone = generators_put_back(x.device), host_draws_put_back(), running_alone(self.source)
                for context in (*alone, *unseen):
                    around.enter_context(context)
                return module, module(images)

        plain, expected = logits()
        if not self._pairs or not isinstance(expected, Tensor):
            return None
        far = _far(logits(turned=True)[1], expected)
        # Some kernels do not give the same bits twice.
        return None if far == 0 or far <= 4 * _far(logits()[1], expected) else plain

    @torch.inference_mode(False)
    @torch.no_grad()
    def _prove(self, x: Tensor) -> None:
        """Refuse a model whose copy runs the model's own modules; unfold what torch.fx has seen otherwise than it runs.

        Whatever a few images raise, all of them are tried; what these raise the forward after this raises too.
        """
        for images in (x[:FEW], x):
            try:
                plain = self._wrongly_folded(images.detach())
                break
            except BadValueError:
                raise
            except Exception:  # of the model
                continue
        else:
            return
        if plain is None:
            return
        warnings.warn(
            f"{type(self.source).__name__} computes something else where torch.fx traces it: AttackModel folds none of "
            "its BatchNorms, and is slower for it",
            stacklevel=7,
        )
        for pair in self._pairs:
            restore(self.module, plain, *pair)
        self._pairs = []
        self._set_up()
        self._plan()
        self._take_values()

    def _rebuild(self) -> None:
        model = self.source
        if _hooks(self.module) != self._hooks:
            raise BadValueError(
                f"model, the {type(model).__name__} of this AttackModel, has other modules, shapes, dtypes or another "
                "device now, and hooks hang on its copy, which would be lost: make a new AttackModel"
            )
        self._build()

    def train(self, mode: bool = True) -> AttackModel:
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, x: Tensor, *, follow: bool = True, kind: Hashable = None) -> Tensor:
        """Logits (N,classes), float32 (float64 for a float64 model), of images (N,C,H,W) in [0,1].

        follow: whether to ask first for what changed in the model. kind: of attack, see BatchSizes.
        """
        x = checks.images("x", x)
        if follow:
            self.refresh_if_changed()
        unknown = checks.transformed() or torch.compiler.is_compiling() or len(x) == 0 or capturing(x)
        unknown |= type(x) not in (Tensor, nn.Parameter)  # such as a fake one
        if self._proven or unknown:
            return self._logits(x, kind)
        self._prove(x)
        logits = self._logits(x, kind)
        self._proven = True
        return logits

    def _logits(self, x: Tensor, kind: Hashable) -> Tensor:
        n = len(x)
        # A forward that is not differentiated to its input may have CamBudget's hook in it, and is not compiled.
        transformed = checks.transformed()
        run, fast = self.module, torch.is_grad_enabled() and x.requires_grad and n > 0 and not transformed
        if fast:
            run = self.__dict__["_fast"]
            if self.batch_sizes is not None and (missing := self.batch_sizes(n, kind) - n):
                x = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
        if self.precision == "fp32":
            return checks.logits(self._run(run, x), x)[:n]
        # No cache: the weights are in their dtype already, and what is cached here would outlive `refresh`.
        with torch.autocast(x.device.type, PRECISIONS[self.precision], cache_enabled=False):
            logits = checks.logits(self._run(run, x), x)[:n].float()
        return _scaled(logits) if self.precision == "fp16" and not transformed else logits

    def _run(self, run: Callable[[Tensor], Any], x: Tensor) -> Any:
        """The copy's output; from the first `.view` on that channels_last does not allow, in contiguous memory."""
        try:
            # Transforms of torch.func know no memory format.
            return run(x if checks.transformed() else x.contiguous(memory_format=self._format))
        except RuntimeError as error:
            if self._format is torch.contiguous_format or not is_of_view(error):
                raise
        warnings.warn(
            f"{type(self.source).__name__} flattens by .view, which channels_last memory does not allow: its "
            "AttackModel runs in contiguous memory, unpacked; torch.flatten or .reshape is faster",
            stacklevel=3,
        )
        self._format = torch.contiguous_format
        lay_(self.module, self._format)
        for part in self._packed:
            part.unpack()
        self._plan()
        return run(x.contiguous())

    # The copy's modules are this one's, and not those of a module that this one is an attribute of.

    follows_a_model = True

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """This one and, where it is asked itself and not by its parent, those of the copy, named `module.*`."""
        outermost = memo is None
        yield from super().named_modules(memo, prefix, remove_duplicate)
        if outermost:
            inner = f"{prefix}.module" if prefix else "module"
            yield from self.module.named_modules(None, inner, remove_duplicate)

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        """Nothing is loaded, and what an older version saved is not unexpected."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AttackModel:
        """`.to()` and the like: it is the model that moves, before or after this one."""
        dtype, device = _whereabouts(self.source)
        after = fn(torch.empty(0, dtype=dtype, device=device))
        self._moved_to = after.dtype, after.device
        return self

    def _check_moved(self, dtype: torch.dtype, device: torch.device) -> None:
        at = _whereabouts(self.source)
        if at != (dtype, device):
            raise BadValueError(
                f"model must be moved, and its AttackModel follows: the model is {at[0]} on {at[1]}, "
                f"and the AttackModel was to become {dtype} on {device}"
            )
        self._moved_to = None

    def extra_repr(self) -> str:
        """What is shown of it."""
        return f"{type(self.source).__name__}, precision={self.precision}, folded={self.folded}, fused={self.fused}"

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_source": (self.source,), "_watch": None}
        for name in (
            "_fast",
            "batch_sizes",
            "graphs",
            "_taken",
            "_memory",
            "_theirs",
            "_to_fold",
            "_holding",
            "_packed",
        ):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._set_up()

    def __deepcopy__(self, memo: dict[int, Any]) -> AttackModel:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        state = self.__getstate__()
        source = state.pop("_source")
        # A deepcopy of what `frozen_copy` does more than deepcopy is to be built anew, when it is known what to follow.
        more = {"_source": source, "_copied_in": memo, "_stale": self._special or self._stale}
        copied.__setstate__({**copy.deepcopy(state, memo), **more})
        return copied


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        return grad_out * FP16_SCALE


def _scaled(logits: Tensor) -> Tensor:
    """The logits; gradients that go back through here are FP16_SCALE times as large."""
    scaled: Tensor = _Scaled.apply(logits)
    return scaled


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model in what only says how to run, train, average or attack it."""
    while (inner := model.source if isinstance(model, AttackModel) else unwrapped(model)) is not model:
        model = inner
    return model


def _mixes(module: nn.Module) -> bool:
    """Whether it normalises by the statistics of the batch in eval mode too."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and (
        module.running_mean is None and not isinstance(module, nn.modules.instancenorm._InstanceNorm)
    )


def _whereabouts(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of the first floating tensor of a model."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(0))
    return first.dtype, first.device


def _hooks(model: nn.Module) -> list[int]:
    """Names, unique in the process, of all hooks in a model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [key for module in model.modules() for kind in kinds for key in getattr(module, kind)]


def _far(found: Any, expected: Tensor) -> float:
    """How far two results are from each other, at most; infinite where they cannot be compared."""
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return math.inf
    same = (found == expected) | ((found != found) & (expected != expected))
    return float((found.double() - expected.double()).abs().nan_to_num(nan=math.inf).masked_fill(same, 0).max())


def _detached(value: Any) -> Any:
    """A plain attribute's value for the copy: tensors of its own; other objects are the model's."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(map(_detached, value))
    return {key: _detached(part) for key, part in value.items()} if type(value) is dict else value


def _pack(module: nn.Module, dtype: torch.dtype) -> None:
    """PackedConv2d in the place of every convolution of `module` that can be one and has nothing hung on it."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if PackedConv2d.takes(child) and not has_hooks(child):
                setattr(parent, name, PackedConv2d(child, dtype))  # type: ignore[arg-type]


def _copy(to: list[Tensor], of: list[Tensor]) -> None:
    groups: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for ours, theirs in zip(to, of, strict=True):
        pair = groups.setdefault((ours.dtype, theirs.dtype), ([], []))
        pair[0].append(ours)
        pair[1].append(theirs)
    for ours_, theirs_ in groups.values():
        torch._foreach_copy_(ours_, theirs_)
