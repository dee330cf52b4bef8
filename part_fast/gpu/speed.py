"""Speed on this card: `ops` and `step`, by part_fast's own benchmarks; and `settings`: ceilings, then training steps
in every setting, beside the published loops.

Rows of `settings`, in settings.csv: a step begins with stored uint8 images, as in training, and is timed in blocks
between two CUDA events; the median, the least and the most of the blocks' means. FLOP are counted as in
`part_fast.bench.steps`, and percent_of_matmul is of a large bf16 matrix product, timed here first: what the step would
take if it were nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from part_fast.attacks.objectives import cross_entropy
from part_fast.bench import cases as op_cases
from part_fast.bench import ops as bench_ops
from part_fast.bench import published, step_cases, steps
from part_fast.bench.step_cases import StepCases
from part_fast.data.memory import draw_augmentation
from part_fast.gpu.page import PROFILED
from part_fast.gpu.record import ALPHA, EPS, Recorder, parser, synchronize, timed
from part_fast.ops.pgd_step import pgd_step_
from part_fast.report import files
from part_fast.training.engine import Engine

Step = Callable[[], object]
# Kinds of kernels, by words in their names; the first that fits.
KERNELS = {
    "part_fast": ("part_fast", "pgd_step", "project_linf", "cam_", "epsilon", "upsample"),
    # Before the others: Inductor names a kernel by the ops in it, cuDNN those that change layouts by itself.
    "compiled by Inductor": ("triton_",),
    "layout, casts": ("nchwtonhwc", "nhwctonchw", "copy", "memcpy", "memset"),
    "BatchNorm": ("batch_norm", "bn_"),
    "convolution, matrix product": (
        "xmma",
        "cudnn",
        "conv",
        "sm90",
        "sm80",
        "cutlass",
        "gemm",
        "wgrad",
        "dgrad",
        "nvjet",
    ),
    "optimizer, foreach": ("multi_tensor", "foreach"),
    "reductions, softmax": ("reduce", "softmax", "nll"),
    "elementwise": ("elementwise", "vectorized"),
}


# --- ops --------------------------------------------------------------------------------------------------------------


def ops(recorder: Recorder, rounds: int) -> None:
    """`bench.measure` of one case after another, the quick ones first, those with published code last; ops.csv."""
    every = op_cases.all_cases()
    bare = [dataclasses.replace(case, published=None) for case in every]
    chosen = [case for case in bare if case.quick] + [case for case in bare if not case.quick]
    chosen += [case for case in every if case.published is not None]
    if recorder.dry:
        chosen = [op_cases.step_case("pgd_step", (2, 3, 8, 8), torch.float32, False, quick=True)]
    rows: list[dict[str, Any]] = []
    for case in chosen:
        name = f"{case.name}{' beside published code' if case.published is not None else ''}"
        providers = None
        if recorder.dry:  # compiling takes seconds
            providers = [p for p in op_cases.providers_of(case, recorder.device) if p.name != "torch.compile"]
        found = recorder.case(name, bench_ops.measure, case, recorder.device, rounds, providers)
        if found is not None:
            rows += found
            files.write_csv(recorder.out / "ops.csv", rows)
    for row in bench_ops.ratios(rows):
        recorder.line("value", "times faster", **row)


# --- step -------------------------------------------------------------------------------------------------------------


def step(recorder: Recorder, models: list[str], batch: int | None, rounds: int) -> None:
    """`part-fast bench step` with bf16 and CUDA graphs, one network after the other; step*.csv of those done."""
    cuda = recorder.device.type == "cuda"
    given: dict[str, Any] = {"device": str(recorder.device), "rounds": rounds, "quick": recorder.dry}
    given |= {"precision": "bf16" if cuda else "fp32", "cuda_graph": cuda, "batch_size": batch}
    found: dict[str, list[str]] = {}
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            recorder.case(model, partial(steps.steps, Path(folder), models=(model,), **given))
            # One table for all networks: the header once.
            for name in ("step.csv", "step_ratios.csv", "step_profile.csv"):
                path = Path(folder) / name
                if path.exists():
                    lines = path.read_text().splitlines()
                    found[name] = found.get(name, lines[:1]) + lines[1:]
                    with files.replacing(recorder.out / name) as temporary:
                        temporary.write_text("\n".join(found[name]) + "\n")


# --- settings: ceilings -----------------------------------------------------------------------------------------------


def ceilings(recorder: Recorder) -> float:
    """Rates that bound a step: matrix products, a copy, the networks' convolutions; FLOP/s of the bf16 product."""
    device, dry = recorder.device, recorder.dry
    n = 64 if dry else 8192
    rates = {}
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        with _switched(torch.backends.cuda.matmul, "allow_tf32", tf32):
            seconds, _, _ = timed(partial(torch.mm, a, b), device, calls=3, warm=3)
        rates[name] = 2 * n**3 / seconds
        recorder.value(f"matrix product {n}, {name}", tflops=rates[name] / 1e12)
    copy, inputs = bench_ops.copy_provider(2**16 if dry else 2**31)
    seconds, _, _ = timed(partial(copy.run, *inputs(device)), device, calls=5, warm=2)
    recorder.value("copy", tb_per_s=(2**16 if dry else 2**31) / seconds / 1e12)
    shapes = (
        [(2, 8, 8)] if dry else [(128, c, side) for c, side in ((64, 32), (160, 32), (320, 16), (640, 8), (512, 4))]
    )
    for shape in shapes:
        recorder.case(f"convolution {shape}", convolution, recorder, *shape)
    return rates["bf16"]


def convolution(recorder: Recorder, n: int, channels: int, side: int) -> None:
    """TFLOP/s of a 3x3 convolution as the networks have it, with and without cuDNN's choice by timing; and fused."""
    calls = 1 if recorder.dry else 10
    for name, dtype, memory_format in (
        ("bf16 channels_last", torch.bfloat16, torch.channels_last),
        ("tf32 contiguous", torch.float32, torch.contiguous_format),
    ):
        x = torch.randn(n, channels, side, side, device=recorder.device).to(dtype, memory_format=memory_format)
        w = torch.randn(channels, channels, 3, 3, device=recorder.device).to(dtype, memory_format=memory_format)
        grad, flop = torch.randn_like(x), 2 * x.numel() * channels * 9

        def backward(mask: list[bool], grad: Tensor = grad, x: Tensor = x, w: Tensor = w) -> object:
            ones = [1, 1]
            return torch.ops.aten.convolution_backward(grad, x, w, None, ones, ones, ones, False, [0, 0], 1, mask)

        passes: dict[str, Step] = {
            "forward": partial(F.conv2d, x, w, padding=1),
            "to_input": partial(backward, [True, False, False]),
            "to_weight": partial(backward, [False, True, False]),
        }
        for chosen in (False, True):
            with _switched(torch.backends.cudnn, "benchmark", chosen):
                seconds = {key: timed(call, recorder.device, calls=calls, warm=3)[0] for key, call in passes.items()}
            title = f"convolution {channels}x{side}x{side} {name}{', cudnn.benchmark' if chosen else ''}"
            recorder.value(title, **{f"{key}_tflops": flop / value / 1e12 for key, value in seconds.items()})
        if dtype == torch.bfloat16 and recorder.device.type == "cuda":
            fused(recorder, x, w)


def fused(recorder: Recorder, x: Tensor, w: Tensor) -> None:
    """relu(conv(x) + bias) and relu(conv(x) + bias + z): torch's kernels one after another beside cuDNN's one."""
    bias, z = torch.randn(len(w), device=x.device).to(x.dtype), torch.randn_like(x)
    ones = ([1, 1], [1, 1], [1, 1], 1)
    pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "conv, bias, relu": (
            lambda: F.relu(F.conv2d(x, w, bias, padding=1)),
            lambda: torch.cudnn_convolution_relu(x, w, bias, *ones),
        ),
        "conv, bias, add, relu": (
            lambda: F.relu(F.conv2d(x, w, bias, padding=1) + z),
            lambda: torch.cudnn_convolution_add_relu(x, w, z, 1.0, bias, *ones),
        ),
    }
    for name, (apart, together) in pairs.items():
        one, other = apart(), together()
        recorder.value(
            f"{name} {tuple(x.shape[1:])}",
            us=1e6 * timed(apart, x.device, calls=20, warm=3)[0],
            fused_us=1e6 * timed(together, x.device, calls=20, warm=3)[0],
            off=float((one.float() - other.float()).norm() / one.float().norm()),
            channels_last=other.is_contiguous(memory_format=torch.channels_last),
        )


# --- settings: training steps -----------------------------------------------------------------------------------------


class Network:
    """One network: its steps in one setting after the other, and the rows measured so far."""

    def __init__(self, recorder: Recorder, model: str, batch: int, rate: float, rows: list[dict[str, Any]]) -> None:
        self.recorder, self.model, self.batch, self.rate, self.rows = recorder, model, batch, rate, rows
        self.device = recorder.device
        self.steps = 1 if recorder.dry else 10
        self.flop: dict[str, float] = {}
        self.until = recorder.until
        self.cases: StepCases | None = None
        self.settings: dict[str, Any] = {}

    def config(self, **changed: Any) -> Any:
        given = {"precision": "bf16", "cuda_graph": self.device.type == "cuda", "compile": False, **changed}
        return step_cases.configuration(self.model, self.batch, steps=self.steps, **given)

    def of(self, **changed: Any) -> StepCases:
        """The steps in bf16 with CUDA graphs, or as changed; only the last ones are kept."""
        if self.cases is None or self.settings != changed:
            self.cases = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.cases, self.settings = StepCases(self.config(**changed), self.device), changed
        return self.cases

    def ours(self, method: str, bank: bool = False, **changed: Any) -> Step:
        """A training step as the trainer does it, augmentation included."""
        cases = self.of(**changed)

        def step() -> object:
            cases.drawn = draw_augmentation(self.batch, device=self.device)
            x = cases.drawn.apply(cases.images[cases.indices])
            return cases.our_step(cases.engine, method, cases.bank if bank else None, x)

        return step

    def published(self, name: str) -> Step:
        cases = self.cases or self.of()
        if name != "published TRADES":
            return partial(cases.published_step, name)
        given = (cases.published, cases.optimizer, cases.x, cases.y, EPS, ALPHA, self.steps, None, cases.config.beta)
        return partial(published.trades_step, *given)

    def measure(self, setting: str, make: Callable[[], Step], counted: str | None = None, choose: bool = False) -> None:
        """A row: time a step in that setting. counted: the step of `count_flop` whose FLOP it takes. choose: with
        cudnn.benchmark, by which each convolution's algorithm is chosen by timing."""
        if time.time() > self.until:
            self.recorder.line("late", f"{self.model}: {setting}")
        else:
            self.recorder.case(f"{self.model}: {setting}", self._measure, setting, make, counted, choose, quiet=True)

    def _measure(self, setting: str, make: Callable[[], Step], counted: str | None, choose: bool) -> None:
        step = make()
        with _switched(torch.backends.cudnn, "benchmark", choose):
            begin = time.perf_counter()
            step()
            synchronize(self.device)
            first = time.perf_counter() - begin
            step()  # what later ones find in caches is there now
            once, _, _ = timed(step, self.device, rounds=1)
            calls = 1 if self.recorder.dry else max(1, min(20, int(0.5 / max(once, 1e-4))))
            median, least, most = timed(step, self.device, rounds=1 if self.recorder.dry else 4, calls=calls)
            begin = time.perf_counter()
            step()
            host = time.perf_counter() - begin
            synchronize(self.device)
        flop = self.flop.get(counted or "")
        row = {
            "model": self.model,
            "batch": self.batch,
            "setting": setting,
            "images_per_s": self.batch / median,
            "ms": 1e3 * median,
            "least_ms": 1e3 * least,
            "most_ms": 1e3 * most,
            "host_ms": 1e3 * host,
            "tflops": None if flop is None else flop / median / 1e12,
            "percent_of_matmul": None if flop is None else 100 * flop / self.rate / median,
            "first_s": first,
        }
        self.rows.append(row)
        files.write_csv(self.recorder.out / "settings.csv", self.rows)
        shown = f"{row['images_per_s']:.1f} images/s, {row['ms']:.2f} ms (host {row['host_ms']:.2f})"
        print(f"  {self.model} batch {self.batch}, {setting}: {shown}", flush=True)

    def refresh(self) -> None:
        """Images a second of a refresh of all masks."""
        cases = self.of()
        cases.bank.fill(cases.engine.budget, cases.images)
        seconds, _, _ = timed(lambda: cases.bank.fill(cases.engine.budget, cases.images), self.device, rounds=3)
        self.recorder.value(f"{self.model}: refresh of masks", images_per_s=len(cases.images) / seconds)

    def kernels(self, **changed: Any) -> None:
        """Kernels of one eager step of AT, by kind, and the longest by name."""
        step = self.ours("at", cuda_graph=False, **changed)
        step()
        synchronize(self.device)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            step()
            synchronize(self.device)
        found = kernels_in(profile.key_averages())
        kinds: dict[str, float] = {}
        for microseconds, _, name in found:
            kind = kernel_kind(name)
            kinds[kind] = kinds.get(kind, 0.0) + microseconds / 1e3
        title = f"{PROFILED}{self.model}, batch {self.batch}, AT bf16 eager{', compiled' if changed else ''}"
        total, launches = sum(kinds.values()), sum(count for _, count, _ in found)
        self.recorder.value(
            title, launches=launches, total_ms=total, **{f"{kind}_ms": ms for kind, ms in kinds.items()}
        )
        for microseconds, count, name in found[:45]:
            print(f"    {microseconds / 1e3:9.3f} ms {count:5d}x {name[:150]}")

    def whole_step(self, compile: bool) -> Step:
        """AT with attack, loss, backward and update in one CUDA graph: a bound, and not how part_fast trains."""
        cases = self.of(cuda_graph=False, compile=compile)
        engine: Engine = cases.engine
        fast, model = engine.attack_model, engine.model
        trained = torch.compile(model) if compile else model
        x, y = cases.x.clone(), cases.y.clone()
        autocast = partial(torch.autocast, self.device.type, torch.bfloat16, cache_enabled=False)

        def step() -> None:
            fast.refresh()
            x_adv = (x + (2 * torch.rand_like(x) - 1) * EPS).clamp_(0, 1)
            for _ in range(self.steps):
                leaf = x_adv.detach().requires_grad_()
                (grad,) = torch.autograd.grad(cross_entropy(fast(leaf), y).sum(), leaf)
                pgd_step_(x_adv, grad, x, EPS, ALPHA)
            with autocast():
                loss = F.cross_entropy(trained(x_adv), y)
            engine.optimizer.zero_grad(set_to_none=False)
            loss.backward()
            engine.optimizer.step()

        if self.device.type != "cuda":
            return step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def main_settings(self) -> None:
        """What needs no compiler, the main numbers first."""
        counted = self.recorder.case(
            f"{self.model}: FLOP", step_cases.count_flop, self.config(cuda_graph=False), self.device, quiet=True
        )
        self.flop = counted or {}
        measure, graph = self.measure, "" if self.device.type != "cuda" else ", graph"
        measure(f"AT bf16{graph}", lambda: self.ours("at"), "AT")
        measure("published AT", lambda: self.published("published AT"), "published AT")
        measure(f"PART bf16{graph}", lambda: self.ours("part"), "PART")
        measure(f"TRADES bf16{graph}", lambda: self.ours("trades"), "TRADES")
        measure("published TRADES", lambda: self.published("published TRADES"))
        measure(f"PART-T bf16{graph}", lambda: self.ours("part-t"), "PART-T")
        if not self.recorder.dry:
            self.recorder.case(f"{self.model}: refresh of masks", self.refresh, quiet=True)
        measure(f"PART, bank, bf16{graph}", lambda: self.ours("part", bank=True), "PART, bank")
        for method, attack in (("at", "fgsm-rs"), ("part", "n-fgsm")):
            measure(f"{method.upper()} {attack} bf16{graph}", partial(self.ours, method, attack=attack))
        measure("input-gradient AT", lambda: self.published("input-gradient AT"), "input-gradient AT")
        if self.recorder.dry:
            return
        measure("published AT, cudnn.benchmark", lambda: self.published("published AT"), "published AT", True)
        # `seed` makes steps of their own, whose graphs are captured with the algorithms chosen anew.
        measure(f"AT bf16{graph}, cudnn.benchmark", lambda: self.ours("at", seed=1), "AT", True)
        measure("AT bf16, eager", lambda: self.ours("at", cuda_graph=False), "AT")
        self.recorder.case(f"{self.model}: kernels", self.kernels, quiet=True)
        measure(f"AT fp32{graph}", lambda: self.ours("at", precision="fp32"), "AT")
        measure("AT bf16, whole step in one graph (experiment)", lambda: self.whole_step(False), "AT")

    def compiled_settings(self) -> None:
        """What is compiled; and published PART, which takes seconds a step."""
        if self.recorder.dry:
            return
        measure = self.measure
        measure("AT bf16, compiled, graph", lambda: self.ours("at", compile=True), "AT")
        measure("AT bf16, compiled, graph, cudnn.benchmark", lambda: self.ours("at", compile=True, seed=1), "AT", True)
        if time.time() < self.until:
            self.recorder.case(f"{self.model}: kernels, compiled", lambda: self.kernels(compile=True), quiet=True)
        measure("AT bf16, compiled, whole step in one graph (experiment)", lambda: self.whole_step(True), "AT")
        measure("published PART", lambda: self.published("published PART"), "published PART")


def kernels_in(events: Iterable[Any]) -> list[tuple[float, int, str]]:
    """(microseconds, count, name) of each kernel, copy and memset of a profile's averages, the longest first.

    A named range, ours or the optimizer's, is among the device's events too, as long as all that ran in it; unlike a
    kernel it has the same name on the host.
    """
    averages = list(events)
    on_device = [event for event in averages if str(event.device_type).endswith("CUDA")]
    on_host = {event.key for event in averages if str(event.device_type).endswith("CPU")}
    kernels = [event for event in on_device if not event.is_user_annotation and event.key not in on_host]
    return sorted(((event.self_device_time_total, event.count, event.key) for event in kernels), reverse=True)


def kernel_kind(name: str) -> str:
    """Which of KERNELS a kernel's name says it is, else "other"."""
    lower = name.lower()
    return next((kind for kind, words in KERNELS.items() if any(word in lower for word in words)), "other")


def settings(recorder: Recorder, models: list[str], batch: int) -> None:
    """Ceilings, then every network in its main settings, then every network compiled; time is shared between these."""
    rate = recorder.case("ceilings", ceilings, recorder) or float("nan")
    rows: list[dict[str, Any]] = []
    networks = [Network(recorder, model, batch, rate, rows) for model in models]
    turns = list(itertools.product((Network.main_settings, Network.compiled_settings), networks))
    for i, (turn, network) in enumerate(turns):
        now = time.time()
        network.until = now + (recorder.until - now) / (len(turns) - i)
        turn(network)
        network.cases = None


@contextlib.contextmanager
def _switched(owner: Any, name: str, value: bool) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def main(arguments: list[str] | None = None) -> int:
    """One of the three."""
    flags = parser(__doc__)
    flags.add_argument("what", choices=("ops", "step", "settings"))
    flags.add_argument("--models", default="resnet18")
    flags.add_argument("--batch", type=int, default=128)
    flags.add_argument("--rounds", type=int, default=5)
    args: argparse.Namespace = flags.parse_args(arguments)
    models, batch, rounds = args.models.split(","), args.batch, args.rounds
    if args.dry_run:
        models, batch, rounds = ["resnet-small"], 2, 1
    recorder = Recorder("bench" if args.what == "ops" else args.what, args)
    if args.what == "ops":
        ops(recorder, rounds)
    elif args.what == "step":
        step(recorder, models, batch, rounds)
    else:
        settings(recorder, models, batch)
    return recorder.code


if __name__ == "__main__":
    sys.exit(main())
