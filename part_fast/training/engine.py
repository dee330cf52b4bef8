"""Engine: the objects of a training step: model, the copy that is attacked, optimizer, averaged weights, processes."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.profiler import record_function

from part_fast import distributed
from part_fast.attack_model import PRECISIONS, AttackModel
from part_fast.attack_model.follow import Watch
from part_fast.attack_model.graph import Capture, Graphs, Replay, surroundings
from part_fast.awp import awp
from part_fast.budgets.cam import CamBudget
from part_fast.config import TrainConfig
from part_fast.data.memory import Dataset, batch_length, to_float
from part_fast.errors import CannotRunError
from part_fast.methods import METHODS
from part_fast.models.catalogue import build_model
from part_fast.models.checkpoints import load_weights
from part_fast.models.external import check_network, is_external
from part_fast.random_state import generators_put_back, host_states

# At the end of an epoch an average by "ema" takes its BatchNorm statistics from so many batches: by torch's momentum
# 0.9^50, half a percent, is then left of what was before them.
AVERAGE_BATCHES = 50


class Engine:
    """A model in training as `config` says, on `device`.

    model: the weights. trained: what the loss forwards, the model or its DistributedDataParallel. attack_model: its
    copy that attacks and CAMs run on. averaged: torch's AveragedModel, or None. classes: how many the model tells
    apart. graphs: where loss and backward are captured, with config.cuda_graph; None of several processes, whose
    gradients are exchanged in between. load: whether config.init is read.

    Errors: ValueError for a network without a layer that CAMs can explain, if the method needs one.
    """

    def __init__(self, config: TrainConfig, num_classes: int, device: torch.device, *, load: bool = True) -> None:
        config = config.on(device)
        self.config, self.device, self.classes = config, device, num_classes
        model = build_model(config.model, num_classes)
        if config.init is not None and load:
            load_weights(model, config.init)
        # The memory format of the attacked copy, in which GPUs multiply half precision.
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.attack_model = AttackModel(
            self.model, precision=config.precision, compile=config.compile, cuda_graph=bool(config.cuda_graph)
        )
        if METHODS[config.method].weighted:
            _ = self.budget
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
            fused=True,
        )
        if config.momentum:
            # Torch makes these at the first step, and leaves them as the memory was if that step is skipped.
            for parameter in self.model.parameters():
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.averaged = None if config.averaging[0] == "none" else AveragedModel(self.model, use_buffers=True)
        # Whether the optimizer left the last update out, 1.0 or 0.0 on the device; None where it never does.
        self._left_out: Tensor | None = None
        self.optimizer.register_step_post_hook(self._note_what_was_left_out)
        if self.averaged is not None and (self._skips or self.scaler.is_enabled()):
            self.averaged.n_averaged = self.averaged.n_averaged.to(device)  # no GPU waits to count updates
        self.trained: nn.Module = self.model
        if distributed.size() > 1:
            # Methods forward twice before one backward; broadcasting buffers in between would break it. From torch 2.14
            # on the argument has another name, of which a FutureWarning tells.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                self.trained = DistributedDataParallel(
                    self.model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
                )
        self.graphs = None
        if config.cuda_graph and self.trained is self.model:
            self.graphs = Graphs("this network's training", _Recorder(self.model))
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # updates, by on_nonfinite "skip"
        self._before: list[Tensor] = []
        self._group = 0
        self._last = True
        self._measures = False  # whether the average's BatchNorm statistics are of its own forwards now

    @property
    def at_update(self) -> bool:
        """Whether the last batch was the last one of an update, so that no gradients wait for another."""
        return self._last

    @functools.cached_property
    def budget(self) -> CamBudget:
        """The eps map of images."""
        config = self.config
        return CamBudget(
            self.attack_model,
            config.eps,
            min(config.eps, config.eps_low),  # a plain method does not use it, and its eps may be smaller
            method=config.cam,
            rule=config.mask_rule,
            target_layer=config.target_layer,
            control=config.mask_control,
        )

    def try_network(self, data: Dataset) -> None:
        """Errors: ValueError where a network of others does not take the images, or its layer has no CAM of them."""
        config = self.config
        if is_external(config.model):
            x = to_float(data.images[:2])
            check_network(self.model, config.model, x, data.num_classes, trains=len(x) > 1)
            if METHODS[config.method].weighted:
                self.budget(x)

    @record_function("part_fast: optimizer")
    def begin(self, done: int, total: int, epoch: int) -> None:
        """Before a batch; `done` of this process's `total` images of the epoch are behind it."""
        every = self.config.batch_size * self.config.accumulate
        if done % every == 0:
            # What is captured adds to gradients where they lie.
            self.optimizer.zero_grad(set_to_none=self.graphs is None)
            self._group = batch_length(total - done, self.config.batch_size, self.config.accumulate)
            if self._skips:
                self._before = [buffer.clone() for buffer in self.buffers()]
        left, size = total - done, self.config.batch_size
        self._measures = self.config.averaging[0] == "ema" and batch_length(left, size, AVERAGE_BATCHES) == left
        batch = batch_length(left, size)
        self._last = (done + batch) % every == 0 or done + batch == total
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(epoch + (done + batch / 2) / total)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """The context of a batch's loss and backward: autocast; processes share gradients in an update's last batch."""
        dtype = PRECISIONS[self.config.precision]
        quiet = isinstance(self.trained, DistributedDataParallel) and not self._last
        with (
            self.trained.no_sync() if quiet else contextlib.nullcontext(),  # type: ignore[operator]
            torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32),
        ):
            yield

    def perturbed(self, loss: Callable[[], Tensor], epoch: int) -> contextlib.AbstractContextManager[None]:
        """The context of a batch's loss and backward at perturbed weights, if config.awp asks for it in that epoch.

        loss: gives the training loss by a forward of `model`.
        """
        if not self.config.awp or epoch < self.config.awp_warmup:
            return contextlib.nullcontext()
        return awp(self.model, self.config.awp, lambda: self.scaler.scale(loss()))  # fp16 has no smaller gradients

    def backward(self, loss: Tensor, images: int) -> None:
        """Add the gradients of a mean loss over so many images, weighted by their share of the update's images."""
        with record_function("part_fast: training backward"), torch.autocast(self.device.type, enabled=False):
            self.scaler.scale(loss * (images / self._group)).backward()

    def learn(self, key: Hashable, loss: Callable[..., Sequence[Tensor]], *batch: Tensor) -> Sequence[Tensor]:
        """What `loss(*batch)` gives, detached, after `backward` of the first, a mean over the images; one launch where
        that is captured. key: what else decides what `loss` does.

        The first step of all is not captured: it makes the gradients' memory, and leaves out weights without one.
        Errors: RuntimeError for a network that cannot be captured, or that a graph would freeze.
        """
        images = len(batch[0])

        def run(*batch: Tensor) -> list[Tensor]:
            found = loss(*batch)
            self.backward(found[0], images)
            return [value.detach() for value in found]

        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        if self.graphs is None or not gradients:
            return run(*batch)
        modes = tuple(module.training for module in self.model.modules())
        places = tuple(gradient.data_ptr() for gradient in gradients)
        key = (key, images / self._group, modes, places, surroundings(self.model, self.device))
        with record_function("part_fast: training graph"):
            return self.graphs(key, run, *batch, changes=[*self.model.buffers(), *gradients])

    @torch.no_grad()
    def measure(self, x_adv: Tensor) -> None:
        """In an epoch's last batches let the averaged model forward what the model trains on, so that its BatchNorm
        statistics are of its own activations. Each of its modules is in the mode of the model's; random generators are
        as before.

        Errors: whatever the network raises.
        """
        if self.averaged is None or not self._measures:
            return
        average = self.averaged.module
        average.train()
        for module, own in zip(self.model.modules(), average.modules(), strict=True):
            own.training = module.training  # frozen BatchNorm stays frozen
        with generators_put_back(self.device):
            average(x_adv)

    @record_function("part_fast: optimizer")
    def end(self) -> None:
        """After a batch: update the weights, if it was the last batch of an update."""
        if not self._last:
            return
        if self._skips:
            self._skip_if_not_finite()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.attack_model.tell()
        kind, decay = self.config.averaging
        if self.averaged is not None and kind == "ema":
            count, weight = self.averaged.n_averaged, 1 - decay
            if self._left_out is None:
                _move(self.averaged.module.parameters(), self.model.parameters(), weight if count else 1.0)
                count += 1  # it lies on the CPU
            else:
                made = self._left_out == 0
                weights = torch.where(count > 0, weight, 1.0) * made
                _move(self.averaged.module.parameters(), self.model.parameters(), weights)
                count += made
            if not self._measures:
                _move(self.averaged.module.buffers(), self.model.buffers(), 1.0)

    @property
    def _skips(self) -> bool:
        """Whether updates are skipped here; in fp16 the scaler does that, as a matter of course."""
        return self.config.on_nonfinite == "skip" and not self.scaler.is_enabled()

    def _note_what_was_left_out(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """After a step of the fused optimizer, which `_skip_if_not_finite` and a GradScaler tell by this attribute."""
        self._left_out = getattr(optimizer, "found_inf", None)

    @torch.no_grad()
    def _skip_if_not_finite(self) -> None:
        """Where a gradient is not finite, the optimizer leaves everything as it is, and so do BatchNorm's statistics.

        The fused optimizer reads `found_inf` on the device, as a GradScaler sets it, so that no GPU waits.
        """
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        bad = ~torch.isfinite(torch.nn.utils.get_total_norm(gradients, float("inf")))
        self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self.skipped += bad
        for buffer, before in zip(self.buffers(), self._before, strict=True):
            buffer.copy_(torch.where(bad, before, buffer))

    def end_epoch(self, epoch: int) -> None:
        """After the epoch's last update: the first process's BatchNorm statistics go to all, and SWA averages."""
        for buffer in self.buffers():  # each process has averaged its own
            distributed.same_(buffer)
        kind, since = self.config.averaging
        if self.averaged is not None and kind == "swa":
            if epoch + 1 <= since:
                self.averaged.n_averaged.zero_()  # until the mean has begun the average is the model
            average, weight = self.averaged.module, 1 / (1 + int(self.averaged.n_averaged))
            for means, now in (
                (average.parameters(), self.model.parameters()),
                (average.buffers(), self.model.buffers()),
            ):
                _move(means, now, weight)
            self.averaged.n_averaged += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "skipped": self.skipped,
        }

    def buffers(self) -> list[Tensor]:
        """BatchNorm's statistics and such, the average's too: until an epoch ends, each process has its own."""
        return [*self.model.buffers(), *(() if self.averaged is None else self.averaged.buffers())]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.skipped.copy_(state["skipped"])


class _Recorder(Capture):
    """Captures a network's training, unless a graph would freeze what changes from one forward to the next."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__("this network's training")
        self._model = model

    def __reduce__(self) -> tuple[Any, ...]:
        return _Recorder, (self._model,)

    def __call__(self, run: Callable[[], None]) -> Replay:
        watch, states = Watch(self._model), host_states()
        replay = super().__call__(run)
        if host_states() != states:
            raise CannotRunError(
                "cuda_graph must be off for this network, which draws from Python's or numpy's generator in a forward"
            )
        _, changed = watch.ask()
        if changed:
            name = ".".join(part for part in changed[0] if part)
            raise CannotRunError(f"cuda_graph must be off for this network, whose forward changes its {name}")
        return replay


@torch.no_grad()
def _move(means: Iterable[Tensor], now: Iterable[Tensor], weight: float | Tensor) -> None:
    """Move tensors by `weight` of the way to others; counters all of it. A tensor of a weight lies on their device.

    Not AveragedModel.update_parameters, which moves a number to the GPU for every tensor, and waits for it.
    """
    floating: tuple[list[Tensor], list[Tensor]] = ([], [])
    counters: tuple[list[Tensor], list[Tensor]] = ([], [])
    for mean, value in zip(means, now, strict=True):
        lists = floating if mean.is_floating_point() else counters
        lists[0].append(mean)
        lists[1].append(value)
    if floating[0]:
        if isinstance(weight, Tensor):
            for mean, value in zip(*floating, strict=True):
                mean.lerp_(value, weight.to(mean.dtype))
        else:
            torch._foreach_lerp_(*floating, weight)
    if counters[0]:
        torch._foreach_copy_(*counters)
