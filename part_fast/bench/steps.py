"""Speed of whole training steps beside the loops of published code, and where their time goes: `part-fast bench step`.

What is measured. A step is everything between a batch of float images and the updated weights: mask, attack of 10
steps, loss, backward, SGD. Ours are the trainer's own lines on its `Engine`; the published ones are in
`bench_baselines`: fp32, contiguous. All run in one process, on 32x32 images; in each round every step is run once,
beginning with another one each time; on a GPU as often in a row, between two CUDA events, as takes half a second.
Reported are the median and the 20th and 80th percentile over the rounds.

    AT, TRADES           no mask
    PART, PART-T         the mask of every batch anew
    PART, refresh K      masks looked up in the MaskBank and cropped and flipped like their images ("PART, bank"), and
                         the time of a refresh, spread over the K epochs it serves
    AT fp32              AT in fp32 throughout, where the others may be in bf16
    published AT         parameter gradients in every attack step
    published PART       that, after masks one image at a time by hooks, PIL and matplotlib
    published PART-T     clean softmax recomputed with its graph in every attack step, clean batch forwarded twice,
                         masks as above
    input-gradient AT    PGD as attack libraries have it, gradients for the images only

Masks are by rule "released", the one that published code has.

Each pair is compared first, in float64, on the same network with fewer, smaller images and 3 attack steps from the same
start: adversarial images, masks, the loss and the update of all weights. A mismatch raises `MismatchError`, and nothing
is timed. That is of the eager fp32 code; tests hold what is compiled, captured or in bf16 to it.

FLOP are those of convolutions and matrix products by the formulas of torch.utils.flop_counter, counted while the step
runs, two for a multiplication and addition; a step that computes what nobody needs has more of them. Their share is of
the rate of a large matrix product in the step's precision, timed in the same rounds.

Peak memory is what one step has allocated at most above what was there before: weights, momentum, the batch, the copy
that is attacked; gradients count. It is PyTorch's allocator's, as in `bench`, plus the memory that a step's CUDA graphs
hold, which a replay needs and does not allocate: what PIL, numpy and the convolution library take for themselves is not
in it. The largest resident memory of a process would be, but that also has whatever
ran before, and grows in steps larger than what PART adds.

The cost of PART over AT is small beside what a busy machine does to either, so it is given twice: by the medians of
both steps, and by what PART adds timed alone (the mask; the lookup and the share of a refresh; for PART-T a mask with
its clean logits, less clean logits), over the median of the plain step.

Where the time goes is read from ranges that part_fast gives names to by `torch.profiler.record_function`; any profile
of a training shows them ("part_fast: attack forward"). On a CPU a part's time is that of its range, less what lies in
ranges inside it. On a GPU it is that of the kernels and copies which were launched in it, by whatever thread, and
"waiting" is when the device had none. The steps of an attack that are captured as a CUDA graph are one part, "CUDA
graph": a replay is one launch, and says nothing of what is in it. A profile without `--cuda-graph` does.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import dataclasses
import gc
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from part_fast.attack_model import PRECISIONS, AttackModel
from part_fast.attack_model.cpu import onednn
from part_fast.attack_model.graph import GraphedSteps
from part_fast.attacks import ascend as attacks
from part_fast.bench import published as bench_baselines
from part_fast.bench.ops import Clock, MismatchError, clock_for, environment_line, interleave, traced
from part_fast.budgets.bank import MaskBank
from part_fast.config import TrainConfig, find_device
from part_fast.data.memory import draw_augmentation
from part_fast.models.checkpoints import build_model
from part_fast.report import figures as report
from part_fast.training.engine import Engine
from part_fast.training.loop import batch_epsilon, train_step

MODELS = ("resnet18", "wrn-34-10")
BATCH, BATCHES, GPU_BATCH = 32, {"wrn-34-10": 4}, 128
METHODS = ("at", "part", "trades", "part-t", "mart", "part-m")
REFRESHES = (1, 10)  # epochs
SIZE = 32
# A refresh is timed on so many batches of images, and is the same work for each.
BANK_BATCHES = 8
PROFILE_ROUNDS = 3

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
MATMULS = 3  # timed together

Step = Callable[[], Any]
# Takes what is being done, and how many calls it takes; the result is called after each.
Progress = Callable[[str, int], Callable[[], object]]


@dataclasses.dataclass(frozen=True)
class Goal:
    """A row of the table: `step` compared with `other`.

    kind: "faster", other's time over the step's; "extra", the step's time over the other's, less one; "memory", the
    step's peak over the other's; "rate", the step's images a second, without an other. goals: by model, at the batch
    sizes of `default_batch`; on_gpu: where they are others on a GPU.
    """

    title: str
    kind: str
    step: str
    other: str | None
    goals: Mapping[str, float]
    on_gpu: Mapping[str, float] | None = None

    def due(self, model: str, batch: int, device: str) -> float | None:
        """The goal for a model at a batch size on a type of device, None where there is none."""
        if batch != default_batch(model, device):
            return None
        return (self.goals if device == "cpu" or self.on_gpu is None else self.on_gpu).get(model)


def default_batch(model: str, device: str) -> int:
    """The batch size for which there are goals, on "cpu" or "cuda"."""
    return GPU_BATCH if device == "cuda" else BATCHES.get(model, BATCH)


def _goals(resnet: float, wide: float) -> dict[str, float]:
    return dict(zip(MODELS, (resnet, wide), strict=True))


GOALS = (
    Goal("AT step", "faster", "AT", "published AT", _goals(3.3, 3.0)),
    Goal("PART step, refresh every batch", "faster", "PART", "published PART", _goals(3.8, 3.2)),
    Goal("PART-T step", "faster", "PART-T", "published PART-T", _goals(3.3, 3.0)),
    Goal("AT step, all fp32", "faster", "AT fp32", "input-gradient AT", _goals(1.12, 1.1)),
    Goal("PART over AT, refresh every batch", "extra", "PART", "AT", _goals(0.04, 0.04)),
    Goal("PART over AT, refresh 1", "extra", "PART, refresh 1", "AT", _goals(0.04, 0.04)),
    Goal("PART over AT, refresh 10", "extra", "PART, refresh 10", "AT", _goals(0.005, 0.005)),
    Goal("PART-T over TRADES", "extra", "PART-T", "TRADES", _goals(0.01, 0.01)),
    Goal("peak memory, PART over AT", "memory", "PART", "AT", _goals(1.05, 1.05)),
    # Of an H100, estimated by operations and bytes (docs/performance.md): with CUDA graphs, and compiled.
    Goal("AT, images/s", "rate", "AT", None, {}, _goals(7100, 1170)),
    Goal("PART, images/s, refresh every batch", "rate", "PART", None, {}, _goals(6800, 1100)),
)
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


# --- the steps --------------------------------------------------------------------------------------------------------


class Arena:
    """A model in our Engine, its twin for the published loops, a batch, and every step as a call without arguments.

    config: model, batch size, attack, precision. size: images are (batch,3,size,size). dtype: of weights and images.
    Both models start with the same weights and with the batch's own BatchNorm statistics.
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
            "clean logits": lambda: attacks.clean_logits(engine.attack_model, self.x),
            "lookup": lambda: batch_epsilon("part", engine.budget, self.bank, self.indices, self.drawn, config),
            "refresh": lambda: self.bank.fill(engine.budget, self.images),
        }

    def forget_graphs(self) -> None:
        """Let go of every CUDA graph and of its memory; the next steps capture theirs anew."""
        for engine in (self.engine, self.fp32):
            if engine.attack_model.graphs is not None:
                engine.attack_model.graphs = GraphedSteps()
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _ours(self, method: str, bank: MaskBank | None = None, engine: Engine | None = None) -> Step:
        return partial(self.our_step, engine or self.engine, method, bank)

    def our_step(self, engine: Engine, method: str, bank: MaskBank | None = None, x: Tensor | None = None) -> Tensor:
        """One update as `train` does it; the loss. x: default the arena's batch."""
        x = self.x if x is None else x
        epsilon = batch_epsilon(method, engine.budget, bank, self.indices, self.drawn, engine.config)
        return train_step(engine, method, x, self.y, epsilon)

    def published_step(self, name: str, start: Tensor | None = None) -> Tensor:
        """One update as published code does it; the loss."""
        config, model, x = self.config, self.published, self.x
        eps: Any = self.published_eps_map() if "PART" in name else config.eps
        given = (model, self.optimizer, x, self.y, eps, config.alpha, config.steps, start)
        if name == "published PART-T":
            return bench_baselines.trades_step(*given, config.beta)
        if name == "input-gradient AT":
            return bench_baselines.input_gradient_step(*given)
        return bench_baselines.madry_step(*given)

    def published_eps_map(self) -> Tensor:
        """The mask of the batch as published code makes it, with the published loops' model."""
        (name,) = [name for name, part in self.engine.attack_model.module.named_modules() if part is self._layer]
        layer = self.published.get_submodule(name)
        return bench_baselines.hooked_eps_map(self.published, layer, self.x, self.config.eps, self.config.eps_low)

    @property
    def _layer(self) -> nn.Module:
        layer = self.engine.budget.target_layer
        assert layer is not None  # a method of ours has one
        return layer


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


# --- the same result --------------------------------------------------------------------------------------------------


def silent(what: str, total: int) -> Step:
    """A Progress that shows nothing."""
    return lambda: None


def check(config: TrainConfig, device: torch.device, progress: Progress = silent) -> list[dict[str, Any]]:
    """Compare every pair on the config's model; a row for each with what was found.

    Columns: step, published; images_off, masks_off, shares of values that differ, and masked, share of mask values with
    the full eps (both None without a mask); update_off, the length of the difference of both updates over an update's
    length; loss_off.
    Errors: MismatchError, naming the pair and what differs.
    """
    # Steps so large that three of them meet the bounds of eps, from TRADES's start beside the images too.
    changed: dict[str, Any] = {"batch_size": 3, "steps": 3, "alpha": 4 / 255, "precision": "fp32"}
    small = dataclasses.replace(config, **changed, compile=False, cuda_graph=False)
    tick = progress("comparing", len(PAIRS))
    rows = []
    for pair in PAIRS:
        rows.append(compare(Arena(small, device, 16, torch.float64), *pair))
        tick()
    return rows


def compare(arena: Arena, step: str, published: str) -> dict[str, Any]:
    """One pair, from the same start; the row of `check`. Both models are updated."""
    method = {"AT fp32": "at", "PART": "part", "PART-T": "part-t"}[step]
    x, config = arena.x, arena.config
    eps: Any = config.eps if method == "at" else arena.engine.budget(x)
    row: dict[str, Any] = {"step": step, "published": published, "masks_off": None, "masked": None}
    if method != "at":
        row["masked"] = float((eps == eps.max()).double().mean())
        row["masks_off"] = float((arena.published_eps_map() != eps).double().mean())

    # Ours draws its start by itself: this is the same draw.
    torch.manual_seed(0)
    if method == "part-t":
        start = x + 0.001 * torch.randn_like(x)
    else:
        start = (x + (2 * torch.rand_like(x) - 1) * eps).clamp(0, 1)
    torch.manual_seed(0)
    ours = _outcome(arena.engine.model, x, partial(arena.our_step, arena.engine, method))
    theirs = _outcome(arena.published, x, partial(arena.published_step, published, start))
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


# --- times ------------------------------------------------------------------------------------------------------------


def auto_precision(device: torch.device) -> tuple[str, str]:
    """The precision of our steps where nobody chose one, and why: bf16 where the hardware multiplies in it."""
    if device.type == "cuda":
        return "bf16", "a CUDA device"
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return "bf16", "the CPU has AVX512_BF16 or AMX"
    return "fp32", "the CPU has neither AVX512_BF16 nor AMX"


def matmul(precision: str, device: torch.device) -> tuple[Step, float]:
    """A large matrix product, and its FLOP."""
    n = MATMUL_SIZE["cuda" if device.type == "cuda" else "cpu"]
    a, b = (torch.randn(n, n, device=device).to(PRECISIONS[precision]) for _ in range(2))
    result = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=result), 2.0 * n**3


def _packed_flop(x: Tensor, *args: Any, out_val: Tensor) -> int:
    (weight,) = (arg for arg in args if isinstance(arg, Tensor) and arg.is_mkldnn)
    return conv_flop_count(list(x.shape), list(weight.shape), list(out_val.shape))


def _packed_transposed_flop(x: Tensor, weight: Tensor, *args: Any, out_val: Tensor) -> int:
    return conv_flop_count(list(x.shape), list(weight.shape), list(out_val.shape), transposed=True)


def _winograd_flop(y: Tensor, x: Tensor, *args: Any, out_val: None) -> int:
    # The model's, as for every other convolution; what is multiplied is a quarter of it.
    return conv_flop_count(list(x.shape), [y.shape[1], x.shape[1], 3, 3], list(y.shape))


# What PackedConv2d calls, which torch has no formulas for.
_PACKED_FLOP: dict[str, Callable[..., int]] = {
    "part_fast::_winograd_": _winograd_flop,
    **dict.fromkeys(onednn.FORWARD_OPS, _packed_flop),
    **dict.fromkeys(onednn.BACKWARD_OPS, _packed_transposed_flop),
}


class FlopCount(TorchDispatchMode):
    """`with FlopCount() as count`: count.total, FLOP of the convolutions and matrix products that ran in the block.

    Torch's own FlopCounterMode also says in which module, for which it hooks into backward passes and refuses gradients
    for inputs alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = _PACKED_FLOP.get(func.name(), flop_registry.get(func.overloadpacket))
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def count_flop(config: TrainConfig, device: torch.device, progress: Progress = silent) -> dict[str, float]:
    """FLOP of each step and piece of an Arena at the config's batch size, counted on one image."""
    eager = dataclasses.replace(config, batch_size=1, compile=False, cuda_graph=False)
    arena = Arena(eager, device)
    found = {}
    counted = {**arena.steps(), **arena.pieces()}
    tick = progress("counting FLOP", len(counted))
    for name, step in counted.items():
        with FlopCount() as count:
            step()
        tick()
        found[name] = float(count.total * config.batch_size)
    return found


def measure(
    config: TrainConfig, device: torch.device, rounds: int, progress: Progress = silent
) -> list[dict[str, Any]]:
    """One row for each step, piece and matrix product of the config's model; nothing is compared here.

    Columns: model, batch, device (cpu, cuda), kind (step, piece, matmul), name, precision, median_s, p20_s, p80_s,
    images_per_s, gflop, gflop_per_s, percent_of_matmul, peak_bytes (None where it was not measured), rounds, calls
    (timed together in a round), seconds (of every round).
    """
    flop = count_flop(config, device, progress)
    arena, clock = Arena(config, device), clock_for(device)
    steps, pieces = arena.steps(), arena.pieces()
    ours = {"PART", "AT", "PART, bank", "TRADES", "PART-T"}
    precisions = {name: config.precision if name in ours or name in pieces else "fp32" for name in (*steps, *pieces)}
    # Momentum is allocated, and what is compiled is compiled, before anything is measured.
    for name in ("AT", "AT fp32", "published AT"):
        if name in steps:
            steps[name]()
    arena.bank.fill(arena.engine.budget, arena.images)
    peaks = {}
    tick = progress("peak memory", len(steps))
    for name, step in steps.items():
        arena.forget_graphs()
        # The second counts. The profiler subtracts what is freed only where it saw it allocated, and a step frees what
        # the last one kept, such as packed weights; and a CUDA graph is captured in the first.
        for _ in range(2):
            for optimizer in (arena.engine.optimizer, arena.fp32.optimizer, arena.optimizer):
                optimizer.zero_grad()
            peaks[name] = clock.peak_bytes(step)
        peaks[name] += graph_pool_bytes(device)
        tick()
    # Captured again, all of them, before anything is timed.
    for step in steps.values() if config.cuda_graph else ():
        step()

    products = {f"matmul {precision}": matmul(precision, device) for precision in sorted(set(precisions.values()))}
    calls = {name: together(clock, step) for name, step in {**steps, **pieces}.items()} | dict.fromkeys(
        products, MATMULS
    )

    def alone(name: str) -> float:
        pieces["clean logits"]()  # takes over the last step's weights, and finds caches as that left them
        return clock.seconds(pieces[name], calls[name])

    samples: dict[str, Callable[[], float]] = {
        name: partial(clock.seconds, step, calls[name]) for name, step in steps.items()
    }
    samples |= {name: partial(alone, name) for name in pieces}
    samples |= {name: partial(clock.seconds, product, MATMULS) for name, (product, _) in products.items()}
    times = interleave(_ticking(samples, progress, f"{rounds} rounds", rounds), rounds)
    seconds = {name: np.array(values) / calls[name] for name, values in times.items()}
    for name in products:
        flop[name] = products[name][1]
        precisions[name] = name.split()[1]
    # A refresh is of BANK_BATCHES batches; each step pays for its own images, once in `every` epochs.
    for every in REFRESHES:
        name = f"PART, refresh {every}"
        seconds[name] = seconds["PART, bank"] + seconds["refresh"] / BANK_BATCHES / every
        flop[name] = flop["PART, bank"] + flop["refresh"] / BANK_BATCHES / every
        precisions[name], calls[name] = config.precision, calls["PART, bank"]
    if "AT fp32" not in seconds:
        seconds["AT fp32"], flop["AT fp32"] = seconds["AT"], flop["AT"]
        precisions["AT fp32"], peaks["AT fp32"], calls["AT fp32"] = "fp32", peaks["AT"], calls["AT"]

    refreshed = [f"PART, refresh {every}" for every in REFRESHES]
    order = ["AT", "AT fp32", "PART", "PART, bank", *refreshed, *(name for name in steps if name not in ("AT", "PART"))]
    kinds = dict.fromkeys(order, "step") | dict.fromkeys(pieces, "piece") | dict.fromkeys(products, "matmul")
    rates = {name.split()[1]: count / float(np.median(seconds[name])) for name, (_, count) in products.items()}
    rows = []
    for name, kind in kinds.items():
        p20, median, p80 = (float(value) for value in np.percentile(seconds[name], (20, 50, 80)))
        images = None if kind == "matmul" else len(arena.images) if name == "refresh" else config.batch_size
        rows.append(
            {
                "model": config.model,
                "batch": config.batch_size,
                "device": device.type,
                "kind": kind,
                "name": name,
                "precision": precisions[name],
                "median_s": median,
                "p20_s": p20,
                "p80_s": p80,
                "images_per_s": None if images is None else images / median,
                "gflop": flop[name] / 1e9,
                "gflop_per_s": flop[name] / 1e9 / median,
                "percent_of_matmul": 100 * flop[name] / median / rates[precisions[name]],
                "peak_bytes": peaks.get(name),
                "rounds": rounds,
                "calls": calls[name],
                "seconds": seconds[name].tolist(),
            }
        )
    return rows


def together(clock: Clock, call: Step) -> int:
    """How often in a row a step is timed, so that its first launches, for which a GPU waits, count for little."""
    if clock.step_seconds_at_least == 0:
        return 1
    return min(100, math.ceil(clock.step_seconds_at_least / clock.seconds(call, 1)))


def graph_pool_bytes(device: torch.device) -> int:
    """Memory of a GPU that CUDA graphs hold for their replays, which no allocation shows."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    own = [each for each in torch.cuda.memory_snapshot() if each["device"] == index]
    return sum(each["total_size"] for each in own if tuple(each["segment_pool_id"]) != (0, 0))


def _ticking(
    samples: Mapping[str, Callable[[], float]], progress: Progress, what: str, rounds: int
) -> dict[str, Callable[[], float]]:
    """The samples, each of which says when it is done."""
    tick = progress(what, len(samples) * rounds)

    def run(sample: Callable[[], float]) -> float:
        value = sample()
        tick()
        return value

    return {name: partial(run, sample) for name, sample in samples.items()}


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The goals' table from the rows of `measure`: one row for each goal and model.

    Columns: model, batch, what, kind, value (of the medians), p20, p80 (of the rounds' own ratios; None for memory),
    by_parts (an extra cost from what was timed alone), goal and met (None at another batch or model). A rate is of a
    GPU only, for which alone it has goals.
    """
    found = []
    for (model, batch, device), group in itertools.groupby(rows, lambda r: (r["model"], r["batch"], r["device"])):
        row_of = {row["name"]: row for row in group}
        median = {name: row["median_s"] for name, row in row_of.items()}
        added = {
            "PART": median["mask"],
            "PART-T": median["mask"] - median["clean logits"],
            **{f"PART, refresh {k}": median["lookup"] + median["refresh"] / BANK_BATCHES / k for k in REFRESHES},
        }
        for goal in GOALS:
            if goal.kind == "rate" and device == "cpu":
                continue
            step, other = row_of[goal.step], row_of[goal.other or goal.step]
            spread: list[float | None] = [None, None]
            by_parts = None
            if goal.kind == "memory":
                value = step["peak_bytes"] / other["peak_bytes"]
            elif goal.kind == "rate":
                value = step["images_per_s"]
                spread = [float(p) for p in np.percentile(batch / np.array(step["seconds"]), (20, 80))]
            else:
                each = np.array(other["seconds"]) / np.array(step["seconds"])
                value = other["median_s"] / step["median_s"]
                if goal.kind == "extra":
                    each, value = 1 / each - 1, 1 / value - 1
                    by_parts = added[goal.step] / other["median_s"]
                spread = [float(p) for p in np.percentile(each, (20, 80))]
            due = goal.due(model, batch, device)
            more = goal.kind in ("faster", "rate")
            reached = due is not None and (value >= due if more else value <= due)
            found.append(
                {
                    "model": model,
                    "batch": batch,
                    "what": goal.title,
                    "kind": goal.kind,
                    "value": value,
                    "p20": spread[0],
                    "p80": spread[1],
                    "by_parts": by_parts,
                    "goal": due,
                    "met": None if due is None else reached,
                }
            )
    return found


# --- where a step's time goes -----------------------------------------------------------------------------------------

PREFIX = "part_fast: "  # of the names that the library gives to its ranges
PARTS = (
    "augmentation",
    "CAM",
    "refresh of AttackModel",
    "CUDA graph",
    "attack forward",
    "attack backward",
    "pgd_step",
    "training forward",
    "training backward",
    "optimizer",
    "other",
    "waiting",
)
# Categories of a trace's events: what a GPU does, and what makes it do that.
_ON_GPU, _LAUNCHES = ("kernel", "gpu_memcpy", "gpu_memset"), ("cuda_runtime", "cuda_driver")


def part_seconds(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by part of PARTS, from the events of a trace.

    Where ranges nest, an inner one's time is not its outer one's; but all within a CAM is the CAM's, refreshing apart.
    With events of a GPU the time is that of what was launched in a range, and "waiting" is the rest of the time from
    the first of them to the last one's end.
    """
    ranges, launched, on_gpu = [], {}, []
    for event in events:
        kind, name = event.get("cat"), str(event.get("name"))
        if kind == "user_annotation" and name.startswith(PREFIX):
            ranges.append((float(event["ts"]), float(event["ts"]) + float(event["dur"]), name.removeprefix(PREFIX)))
        elif kind in _LAUNCHES and "correlation" in event.get("args", {}):
            launched[event["args"]["correlation"]] = float(event["ts"])
        elif kind in _ON_GPU:
            on_gpu.append((float(event["ts"]), float(event["dur"]), event["args"]["correlation"]))
    stretches = _stretches(ranges)
    seconds = dict.fromkeys(PARTS, 0.0)
    if not on_gpu:
        for begin, end, part in stretches:
            seconds[part] += (end - begin) / 1e6
        return seconds
    begins = [begin for begin, _, _ in stretches]
    busy, until = 0.0, -math.inf
    for begin, took, correlation in sorted(on_gpu):
        place = bisect.bisect_right(begins, launched.get(correlation, -math.inf)) - 1
        inside = place >= 0 and launched[correlation] < stretches[place][1]
        seconds[stretches[place][2] if inside else "other"] += took / 1e6
        busy += max(0.0, begin + took - max(begin, until))
        until = max(until, begin + took)
    seconds["waiting"] = max(0.0, until - min(on_gpu)[0] - busy) / 1e6
    return seconds


def _stretches(ranges: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """(begin, end, part) of time between the edges of nested ranges (begin, end, name), in order."""
    # At one time ranges end before others begin, inner ones first, and outer ones begin first.
    lasting = [(begin, end, name) for begin, end, name in ranges if end > begin]
    edges = [(begin, 1, -end, name) for begin, end, name in lasting]
    edges += [(end, 0, -begin, name) for begin, end, name in lasting]
    found: list[tuple[float, float, str]] = []
    open_: list[str] = []
    since = 0.0
    for at, begins, _, name in sorted(edges):
        if open_ and at > since:
            part = "CAM" if "CAM" in open_ and open_[-1] != "refresh of AttackModel" else open_[-1]
            found.append((since, at, part if part in PARTS else "other"))
        since = at
        if begins:
            open_.append(name)
        else:
            open_.pop()
    return found


@contextlib.contextmanager
def named_forward(module: nn.Module, name: str) -> Iterator[None]:
    """Every forward of the module is a range of that name."""
    ranges: list[record_function] = []

    def begin(*_: object) -> None:
        ranges.append(record_function(PREFIX + name))
        ranges[-1].__enter__()

    handles = [
        module.register_forward_pre_hook(begin),
        module.register_forward_hook(lambda *_: ranges.pop().__exit__(None, None, None)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def profile(
    config: TrainConfig, device: torch.device, rounds: int, progress: Progress = silent
) -> list[dict[str, Any]]:
    """Where the time of one step of every method goes: a row for each method and part, and "total".

    A step here begins with uint8 images. Columns: model, batch, method, part, median_s, percent (of the total), rounds.
    """
    arena = Arena(config, device)
    laps: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}

    def step(method: str) -> None:
        with named_forward(arena.engine.trained, "training forward"), record_function(PREFIX + "other"):
            with record_function(PREFIX + "augmentation"):
                drawn = draw_augmentation(config.batch_size, device=device)
                x = drawn.apply(arena.images[arena.indices])
            arena.our_step(arena.engine, method, None, x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def run(method: str) -> float:
        seconds = part_seconds(traced(partial(step, method), device=device))
        laps[method].append({**seconds, "total": sum(seconds.values())})
        return laps[method][-1]["total"]

    for method in METHODS:
        step(method)
    samples = {method: partial(run, method) for method in METHODS}
    interleave(_ticking(samples, progress, "profile", rounds), rounds)
    rows = []
    for method, found in laps.items():
        median = {part: float(np.median([lap[part] for lap in found])) for part in (*PARTS, "total")}
        for part, value in median.items():
            share = {"median_s": value, "percent": 100 * value / median["total"], "rounds": rounds}
            rows.append({"model": config.model, "batch": config.batch_size, "method": method, "part": part, **share})
    return rows


def _parts_there(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The parts that took time in some step of `profile`'s rows: a CPU has no CUDA graph and never waits."""
    there = {row["part"] for row in rows if row["median_s"] > 0}
    return [part for part in PARTS if part in there]


# --- the command ------------------------------------------------------------------------------------------------------

FILES = ("step.csv", "step_ratios.csv", "step_profile.csv", "step.json", "step.md", "step.png")


def steps(
    out: Path,
    *,
    models: Sequence[str] = (),
    batch_size: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    compile: bool = False,
    cuda_graph: bool = False,
    quick: bool = False,
    rounds: int | None = None,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Measure the steps, print the tables, and write FILES to the folder `out`.

    models: names for `build_model`, default MODELS; with quick resnet-small. batch_size: default 32, for wrn-34-10 4;
    on a GPU 128.
    precision: of our steps, fp32, bf16, fp16 or auto, which is `auto_precision`. compile, cuda_graph: as in training,
    of our attacks. rounds: 7, quick 3; of the profile at most PROFILE_ROUNDS.
    Returns: the rows of step.csv, see `measure`.
    Errors: MismatchError where a published step computes something else; ValueError for rounds or batch_size < 1, what
    no training takes either, and for a folder that holds results already, unless `overwrite`. Nothing is written then,
    but of the models before one with a mismatch.
    """
    from tqdm import tqdm

    rounds = (3 if quick else 7) if rounds is None else rounds
    for argument, value in (("rounds", rounds), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{argument} must be >= 1, got {value}")
    where = find_device(device)
    chosen, why = auto_precision(where) if precision == "auto" else (precision, "as asked")
    names = tuple(models) or (("resnet-small",) if quick else MODELS)
    configs = [
        configuration(
            name,
            batch_size or default_batch(name, where.type),
            precision=chosen,
            compile=compile,
            cuda_graph=cuda_graph,
        )
        for name in names
    ]
    for config in configs:
        config.check()
        with torch.device("meta"):
            build_model(config.model)
    AttackModel(nn.Linear(1, 1, device=where), precision=chosen, cuda_graph=cuda_graph)  # whether the device can
    files = [out / name for name in FILES]
    there = [path.name for path in files if path.exists()]
    if there and not overwrite:
        raise ValueError(f"out must be a folder without results, got {out} with {', '.join(there)}: use --overwrite")
    out.mkdir(parents=True, exist_ok=True)

    record = report.environment()
    settings = f"precision {chosen} ({why}){', compiled' if compile else ''}{', CUDA graphs' if cuda_graph else ''}"
    heading = f"{environment_line(record, where)}\n{settings}; medians of {rounds} interleaved rounds"
    print(heading)
    record["bench"] = {
        "device": str(where),
        "models": list(names),
        "batches": [config.batch_size for config in configs],
        "precision": chosen,
        "precision_because": why,
        "compile": compile,
        "cuda_graph": cuda_graph,
        "quick": quick,
        "rounds": rounds,
        "profile_rounds": min(rounds, PROFILE_ROUNDS),
        "attack_steps": configs[0].steps,
    }
    rows: list[dict[str, Any]] = []
    checked: list[dict[str, Any]] = []
    profiled: list[dict[str, Any]] = []
    current = torch.cuda.device(where) if where.type == "cuda" else contextlib.nullcontext()
    with current, tqdm(unit="step", leave=False, disable=None) as bar:

        def progress(what: str, total: int) -> Step:
            bar.reset(total)
            bar.set_description(f"{config.model}, {what}")
            return bar.update

        for config in configs:
            checked += [{"model": config.model, **row} for row in check(config, where, progress)]
            of_model = measure(config, where, rounds, progress)
            of_profile = profile(config, where, min(rounds, PROFILE_ROUNDS), progress)
            rows += of_model
            profiled += of_profile
            for title, header, cells in _tables(of_model, of_profile):
                bar.write(f"\n{title}\n{report.table(header, cells)}")
            # After each model: the next one may take half an hour.
            compared = ratios(rows)
            report.write_csv(files[0], [{key: value for key, value in row.items() if key != "seconds"} for row in rows])
            report.write_csv(files[1], compared)
            report.write_csv(files[2], profiled)
            report.write_json(
                files[3], {**record, "checked": checked, "steps": rows, "ratios": compared, "profile": profiled}
            )
            with report.replacing(files[4]) as temporary:
                temporary.write_text(markdown(heading, rows, compared, profiled))
            draw(files[5], rows, profiled, heading)
    title, header, cells = _ratio_table(ratios(rows))
    print(f"\n{title}\n{report.table(header, cells)}")
    print(f"\nwritten: {', '.join(map(str, files))}")
    return rows


Table = tuple[str, Sequence[str], list[tuple[str, ...]]]


def _tables(rows: Sequence[Mapping[str, Any]], profiled: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Of one model: its steps, what masks add, and the parts of a step."""
    model = f"{rows[0]['model']}, batch {rows[0]['batch']}"
    return [
        (f"{model}: a step", *_step_cells([row for row in rows if row["kind"] == "step"])),
        (f"{model}: what masks add, and a matrix product", *_step_cells([r for r in rows if r["kind"] != "step"])),
        (f"{model}: where a step's time goes, ms (%)", *_profile_cells(profiled)),
    ]


def _step_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    header = ("", "precision", "median ms", "p20", "p80", "images/s", "GFLOP", "GFLOP/s", "% of matmul", "peak MiB")
    cells = []
    for row in rows:
        times = (f"{1e3 * row[key]:.1f}" for key in ("median_s", "p20_s", "p80_s"))
        rate = "-" if row["images_per_s"] is None else f"{row['images_per_s']:.1f}"
        flop = (f"{row[key]:.1f}" for key in ("gflop", "gflop_per_s", "percent_of_matmul"))
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        cells.append((row["name"], row["precision"], *times, rate, *flop, peak))
    return header, cells


def _profile_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    of = {(row["part"], row["method"]): row for row in rows}
    cells = []
    for part in (*_parts_there(rows), "total"):
        shown = (of[part, method] for method in METHODS)
        cells.append((part, *(f"{1e3 * row['median_s']:.1f} ({row['percent']:.2f})" for row in shown)))
    return ("part", *METHODS), cells


def _ratio_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    header = ("", "model", "batch", "measured", "p20", "p80", "by parts", "goal", "met")
    cells = []
    for row in rows:

        def text(key: str, row: Mapping[str, Any] = row) -> str:
            value = row[key]
            if value is None:
                return "-"
            if row["kind"] == "rate":
                return f"{value:.0f}"
            return f"{100 * value:.2f}%" if row["kind"] == "extra" else f"{value:.3f}x"

        met = "-" if row["met"] is None else "yes" if row["met"] else "no"
        numbers = (text(key) for key in ("value", "p20", "p80", "by_parts", "goal"))
        cells.append((row["what"], row["model"], str(row["batch"]), *numbers, met))
    return "Against the goals: times faster than the published step; extra cost; memory; images/s", header, cells


def markdown(
    heading: str,
    rows: Sequence[Mapping[str, Any]],
    compared: Sequence[Mapping[str, Any]],
    profiled: Sequence[Mapping[str, Any]],
) -> str:
    """Every table that was printed, for docs/performance.md."""
    tables = [_ratio_table(compared)]
    for model, group in itertools.groupby(rows, lambda row: row["model"]):
        tables += _tables(list(group), [row for row in profiled if row["model"] == model])
    text = [heading.replace("\n", "; ") + "."]
    for title, header, cells in tables:
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
        text.append(f"**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(text) + "\n"


_PART_COLOURS = {
    "augmentation": "#F0E442",
    "CAM": report.VERMILION,
    "refresh of AttackModel": "#000000",
    "attack forward": report.BLUE,
    "attack backward": "#56B4E9",
    "pgd_step": "#CC79A7",
    "training forward": report.GREEN,
    "training backward": "#66CCAA",
    "optimizer": report.ORANGE,
    "CUDA graph": "#8C6BB1",
    "other": report.GRAY,
    "waiting": "#DDDDDD",
}
_OURS, _PUBLISHED = "#44546A", "#B8B8B8"  # of whole steps: colours that no part has


def draw(path: Path, rows: Sequence[Mapping[str, Any]], profiled: Sequence[Mapping[str, Any]], caption: str) -> None:
    """A PNG: for each model the time of every step, and the parts of a step of every method, stacked.

    Each column has a legend of its own: left ours and the published ones, right the parts.
    """
    from matplotlib.patches import Patch

    models = list(dict.fromkeys((row["model"], row["batch"]) for row in rows))
    theirs = {published for _, published in PAIRS}
    parts = _parts_there(profiled)
    with report.drawing(path, (14, 4 * len(models) + 1.5), "constrained") as figure:
        panels: Any = figure.subplots(len(models), 2, squeeze=False)
        for (model, batch), (left, right) in zip(models, panels, strict=True):
            shown = [row for row in rows if row["model"] == model and row["kind"] == "step"]
            for y, row in enumerate(shown):
                colour = _PUBLISHED if row["name"] in theirs else _OURS
                errors = [[row["median_s"] - row["p20_s"]], [row["p80_s"] - row["median_s"]]]
                left.barh(y, row["median_s"], xerr=errors, color=colour)
                left.text(row["p80_s"], y, f" {row['median_s']:.3g} s", va="center", fontsize=7)
            left.set_yticks(range(len(shown)), [row["name"] for row in shown], fontsize=8)
            left.invert_yaxis()
            left.set_xlim(0, 1.15 * max(row["p80_s"] for row in shown))
            left.set(xlabel="seconds a step (20th to 80th percentile)", title=f"{model}, batch {batch}")
            of = {(row["method"], row["part"]): row["median_s"] for row in profiled if row["model"] == model}
            for y, method in enumerate(METHODS):
                at = 0.0
                for part in parts:
                    right.barh(y, of[method, part], left=at, color=_PART_COLOURS[part])
                    at += of[method, part]
            right.set_yticks(range(len(METHODS)), METHODS, fontsize=8)
            right.invert_yaxis()
            right.set(xlabel="seconds", title="where a step's time goes")
        steps_legend = [Patch(color=_OURS, label="part_fast"), Patch(color=_PUBLISHED, label="published loops")]
        parts_legend = [Patch(color=_PART_COLOURS[part], label=part) for part in parts]
        for axes, handles in zip(panels[-1], (steps_legend, parts_legend), strict=True):
            axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=5, fontsize=8)
        figure.suptitle(f"Training steps, 32x32, PGD-10\n{caption}", fontsize=9)
