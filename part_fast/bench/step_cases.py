"""The training steps that `bench step` times, ours and published ones, on one network and batch; whether ours compute
what the published ones do; and the FLOP of each."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from part_fast import methods
from part_fast.attacks.ascend import clean_logits
from part_fast.bench.cases import MismatchError
from part_fast.bench.clocks import Progress, silent
from part_fast.bench.flop import FlopCount
from part_fast.budgets.bank import MaskBank
from part_fast.config import TrainConfig
from part_fast.data.memory import draw_augmentation
from part_fast.optional import needs
from part_fast.training.engine import Engine
from part_fast.training.step import batch_epsilon, train_step

with needs("pillow", "train"):
    from part_fast.bench import published

MODELS = ("resnet18", "wrn-34-10")

BATCH, BATCHES, GPU_BATCH = 32, {"wrn-34-10": 4}, 128

METHODS = tuple(methods.METHODS)

REFRESHES = (1, 10)  # epochs

SIZE = 32

# A refresh is timed on so many batches of images, and is the same work for each.
BANK_BATCHES = 8

Step = Callable[[], Any]

# Which published loop computes what ours does.
PAIRS = (
    ("AT fp32", "published AT"),
    ("AT fp32", "input-gradient AT"),
    ("PART", "published PART"),
    ("PART-T", "published PART-T"),
)

# In float64 both sides round differently in the 16th digit: a pixel moves otherwise only where a gradient is as good as
# zero. PIL resizes in float32, so a mask value may differ on its threshold, and what follows from it. Our losses take
# logits as float32, so what is learned from the same images agrees to some 1e-7.
NEAR, LEARNED, AWAY = 1e-9, 1e-5, 1e-3

# Of what is compared: steps so large that three of them meet the bounds of eps, also from TRADES's start beside the
# images.
SMALL: dict[str, Any] = {"steps": 3, "alpha": 4 / 255, "precision": "fp32"}


class StepCases:
    """A network in our Engine, its twin for the published loops, a batch, and every step as a call without arguments.

    config: model, batch size, attack, precision. size: images are (batch,3,size,size). dtype: of weights and images.
    Both networks start with the same weights and with the batch's own BatchNorm statistics.
    """

    def __init__(self, config: TrainConfig, device: torch.device, size: int = SIZE, dtype: torch.dtype = torch.float32):
        self.config, self.device = config, device
        torch.compiler.reset()  # what earlier ones compiled counts against the limit of recompilations
        torch.manual_seed(config.seed)
        self.images = torch.randint(0, 256, (BANK_BATCHES * config.batch_size, 3, size, size), dtype=torch.uint8)
        self.images = self.images.to(device)
        self.indices = torch.arange(config.batch_size, device=device)
        self.drawn = draw_augmentation(config.batch_size, device=device)
        self.x = self.drawn.apply(self.images[self.indices]).to(dtype)
        self.y = torch.randint(0, 10, (config.batch_size,)).to(device)
        with _default_dtype(dtype):
            self.engine = Engine(config, 10, device)
            settle(self.engine.model, self.x)
            self.fp32 = self.engine
            if config.precision != "fp32":
                self.fp32 = Engine(dataclasses.replace(config, precision="fp32"), 10, device)
                self.fp32.model.load_state_dict(self.engine.model.state_dict())
        for engine in (self.engine, self.fp32):
            engine.model.train()
        self.published = copy.deepcopy(self.engine.model).to(memory_format=torch.contiguous_format)
        self.optimizer = torch.optim.SGD(
            self.published.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        budget = self.engine.budget
        self.bank = MaskBank(len(self.images), (size, size), budget.channels, config.eps, config.eps_low, device)

    def steps(self) -> dict[str, Step]:
        """Every step by its name; "PART, bank" is what "PART, refresh K" does between two refreshes."""
        ours = {"AT": self._ours("at"), "PART": self._ours("part"), "PART, bank": self._ours("part", bank=self.bank)}
        if self.fp32 is not self.engine:
            ours["AT fp32"] = self._ours("at", engine=self.fp32)
        ours |= {"TRADES": self._ours("trades"), "PART-T": self._ours("part-t")}
        names = dict.fromkeys(published for _, published in PAIRS)
        return ours | {name: partial(self.published_step, name) for name in names}

    def pieces(self) -> dict[str, Step]:
        """What the masks add to a step, each alone, on weights that the copy for attacks has taken over."""
        engine, config = self.engine, self.config
        return {
            "mask": lambda: engine.budget(self.x),
            "clean logits": lambda: clean_logits(engine.attack_model, self.x),
            "lookup": lambda: batch_epsilon("part", engine.budget, self.bank, self.indices, self.drawn, config),
            "refresh": lambda: self.bank.fill(engine.budget, self.images),
        }

    def forget_graphs(self) -> None:
        """Let go of every CUDA graph and of its memory; the next steps capture theirs anew."""
        for engine in (self.engine, self.fp32):
            for graphs in (engine.attack_model.graphs, engine.graphs):
                if graphs is not None:
                    graphs.clear()
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _ours(self, method: str, bank: MaskBank | None = None, engine: Engine | None = None) -> Step:
        return partial(self.our_step, engine or self.engine, method, bank)

    def our_step(self, engine: Engine, method: str, bank: MaskBank | None = None, x: Tensor | None = None) -> Tensor:
        """One update as `train` does it; the loss. x: default: the batch of all."""
        x = self.x if x is None else x
        epsilon = batch_epsilon(method, engine.budget, bank, self.indices, self.drawn, engine.config)
        return train_step(engine, method, x, self.y, epsilon).loss

    def published_step(self, name: str, start: Tensor | None = None) -> Tensor:
        """One update as published code does it; the loss."""
        config, model, x = self.config, self.published, self.x
        eps: Any = self.published_eps_map() if "PART" in name else config.eps
        given = (model, self.optimizer, x, self.y, eps, config.alpha, config.steps, start)
        if name == "published PART-T":
            return published.trades_step(*given, config.beta)
        if name == "input-gradient AT":
            return published.input_gradient_step(*given)
        return published.madry_step(*given)

    def published_eps_map(self) -> Tensor:
        """The mask of the batch as published code makes it, with the published loops' model."""
        (name,) = [name for name, part in self.engine.attack_model.module.named_modules() if part is self._layer]
        layer = self.published.get_submodule(name)
        return published.hooked_eps_map(self.published, layer, self.x, self.config.eps, self.config.eps_low)

    @property
    def _layer(self) -> nn.Module:
        layer = self.engine.budget.target_layer
        assert layer is not None  # a method of ours has one
        return layer


def default_batch(model: str, device: str) -> int:
    """The batch size that a network is measured at, and has goals for, on "cpu" or "cuda"."""
    return GPU_BATCH if device == "cuda" else BATCHES.get(model, BATCH)


def configuration(model: str, batch: int, **changed: Any) -> TrainConfig:
    """The published numbers, but an lr so small that training on random labels leaves weights finite."""
    plain: dict[str, Any] = {"precision": "fp32", "cuda_graph": False}
    return TrainConfig(model=model, batch_size=batch, rule="released", lr=1e-3, **{**plain, **changed})


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """Give every BatchNorm the statistics of the batch x: those of a new model would let eval-mode activations grow."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check(config: TrainConfig, device: torch.device, progress: Progress = silent) -> list[dict[str, Any]]:
    """Compare every pair on the config's model; a row for each with what was found.

    Columns: step, published; images_off, masks_off, shares of values that differ, and masked, share of mask values with
    the full eps (both None without a mask); update_off, the length of the difference of both updates over an update's
    length; loss_off.
    Errors: MismatchError, naming the pair and what differs.
    """
    small = dataclasses.replace(config, batch_size=3, compile=False, cuda_graph=False, **SMALL)
    tick = progress("comparing", len(PAIRS))
    rows = []
    for pair in PAIRS:
        rows.append(compare(StepCases(small, device, 16, torch.float64), *pair))
        tick()
    return rows


def compare(cases: StepCases, step: str, published: str) -> dict[str, Any]:
    """One pair, from the same start; the row of `check`. Both models are updated."""
    method = {"AT fp32": "at", "PART": "part", "PART-T": "part-t"}[step]
    x, config = cases.x, cases.config
    eps: Any = config.eps if method == "at" else cases.engine.budget(x)
    row: dict[str, Any] = {"step": step, "published": published, "masks_off": None, "masked": None}
    if method != "at":
        row["masked"] = float((eps == eps.max()).double().mean())
        row["masks_off"] = float((cases.published_eps_map() != eps).double().mean())

    # Ours draws its start by itself: this is the same draw.
    torch.manual_seed(0)
    if method == "part-t":
        start = x + 0.001 * torch.randn_like(x)
    else:
        start = (x + (2 * torch.rand_like(x) - 1) * eps).clamp(0, 1)
    torch.manual_seed(0)
    ours = _outcome(cases.engine.model, x, partial(cases.our_step, cases.engine, method))
    theirs = _outcome(cases.published, x, partial(cases.published_step, published, start))
    # Not `difference > NEAR`: a NaN is a mismatch.
    row["images_off"] = float((~((ours[0] - theirs[0]).abs() <= NEAR)).double().mean())
    row["update_off"] = float((ours[1] - theirs[1]).norm() / theirs[1].norm())
    row["loss_off"] = float((ours[2] - theirs[2]).abs())
    # What few pixels may change in the images, they change in what is learned from these.
    follows = LEARNED + (0 if row["images_off"] == 0 else 10 * AWAY)
    bounds = {"masks_off": AWAY, "images_off": AWAY, "update_off": follows, "loss_off": follows}
    for what, bound in bounds.items():
        if row[what] is not None and not row[what] <= bound:
            found = f"{what} {row[what]:.3g}, at most {bound:.3g} was due"
            raise MismatchError(f"{config.model}: {published} computes something else than {step}: {found}: not timed")
    return row


def _outcome(model: nn.Module, x: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Adversarial images that the model was trained on, the update of all its weights (P,), the loss."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training and not torch.equal(inputs[0], x):
            seen.append(inputs[0].detach().clone())

    before = [parameter.detach().clone() for parameter in model.parameters()]
    handle = model.register_forward_pre_hook(keep)
    try:
        loss = step()
    finally:
        handle.remove()
    update = torch.cat([(p.detach() - was).flatten() for p, was in zip(model.parameters(), before, strict=True)])
    return seen[-1], update, loss


def count_flop(config: TrainConfig, device: torch.device, progress: Progress = silent) -> dict[str, float]:
    """FLOP of each step and piece of StepCases at the config's batch size, counted on one image."""
    eager = dataclasses.replace(config, batch_size=1, compile=False, cuda_graph=False)
    cases = StepCases(eager, device)
    found = {}
    counted = {**cases.steps(), **cases.pieces()}
    tick = progress("counting FLOP", len(counted))
    for name, step in counted.items():
        step()  # before the first forward, an AttackModel compares what it runs fused
        with FlopCount() as count:
            step()
        tick()
        found[name] = float(count.total * config.batch_size)
    return found
