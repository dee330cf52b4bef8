"""Speed of every op, by every provider that can run it here: `part-fast bench ops`.

What is measured. A case is an op at one shape, dtype, memory format and form of eps or rule. Its providers are
`reference` (part_fast's plain PyTorch), `torch.compile` (of the expression a user would write, with all constants
computed before), the backends `cpp`, `triton` and `cuda` where the device has them, for maps also `vectorised` (that
expression, not compiled) and `published` (one image at a time through PIL and matplotlib), and `copy`: a tensor
copied into another one that is there already, half of the case's bytes read and half written. On a CPU each case is
measured with every number of threads that was asked for.

Every provider's result is compared with the reference's before any of them is timed; a mismatch raises
`MismatchError`. Then rounds: in each one every provider is timed once, starting with another one each time, so that
what disturbs the machine meets all alike. A time is that of one call, its result allocated anew (but for
`pgd_step_`), on inputs that all providers share; many calls are timed together where one is short. Reported are the
median and the 20th and 80th percentile over the rounds.

Bytes, one formula for every op: each input tensor read once, plus each result written once. GB/s is bytes / median
/ 1e9, and % of copy is the median of `copy` over that of the provider.

On a CPU the clock is the wall's, and inputs lie in whatever cache holds them. On a GPU it is a pair of CUDA events
around a CUDA graph, replayed: the graph calls the provider on so many sets of inputs in turn that what they read and
write is at least twice the L2 cache. `reference` and `published` also work on the host, so they are launched from
Python between the events, on at most LAUNCHED_SETS sets: they wait for the host, not for memory, and masks by PIL take
seconds on the sets that fill a cache. The column `timing` says which it was.

On Linux's usual C library freed memory is kept for the next result. Otherwise a call pays the system for new pages, or
not, by what other providers have freed before it.

Peak memory is what one call has allocated at most, above what was there before it and with its result, by PyTorch's
allocator: `torch.cuda.max_memory_allocated`, or on a CPU the profiler's record of every allocation. The memory of PIL
and numpy and a thread's scratch memory in C++ are not in it, so `published` has none.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from part_fast import backends
from part_fast.bench.published import published_epsilon_map
from part_fast.config import find_device
from part_fast.ops import (
    PackedEpsilon,
    cam,
    cam_mask,
    epsilon_map,
    packed_epsilon_map,
    pgd_step,
    pgd_step_,
    project_linf,
    upsample_cam,
)
from part_fast.ops.cam_mask import jet
from part_fast.ops.upsample_cam import keys_taps
from part_fast.report import figures as report

EPS, EPS_LOW, ALPHA = 8 / 255, 7 / 255, 2 / 255
OWN = ("cpp", "triton", "cuda")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LAUNCHED_SETS = 8


class MismatchError(RuntimeError):
    """A provider computes something else than the reference, so its speed means nothing."""


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    run: the call, with the case's inputs as arguments. backend: the part_fast backend it runs on, if any.
    exact: whether its result must be the reference's, bit for bit. captured: whether a CUDA graph can hold it.
    """

    name: str
    run: Callable[..., Any]
    backend: str | None = None
    exact: bool = False
    captured: bool = True


@dataclasses.dataclass(frozen=True)
class Case:
    """An op at one shape, dtype, memory format and form.

    inputs: makes the op's tensors (or PackedEpsilon) on a device, the same ones for the same seed; the first one is
    written if `in_place`. run: the public function of them. plain: makes, for a device, the expression to compile.
    raw: the raw op behind it. exact: the backends that promise the reference's bits.
    near: how far a value may be off where bits are not promised, as a share of the largest value; away: the
    share of values that may be further off (mask values that lie on their threshold).
    """

    op: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[torch.device, int], tuple[Any, ...]]
    run: Callable[..., Any]
    plain: Callable[[torch.device], Callable[..., Any]]
    raw: str
    exact: tuple[str, ...] = ()
    near: float = 0.0
    away: float = 0.0
    in_place: bool = False
    vectorised: bool = False
    published: Callable[..., Any] | None = None
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {dtype_name(self.dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the cases --------------------------------------------------------------------------------------------------------


def all_cases() -> list[Case]:
    """Every case of every op, in the order of the tables."""
    cases: list[Case] = []
    dtypes = (torch.float32, torch.bfloat16)
    for op in ("pgd_step", "pgd_step_", "project_linf"):
        sides = ((128, 32), (128, 64), (512, 128))
        for (n, side), dtype, packed, layout in itertools.product(sides, dtypes, (False, True), LAYOUTS):
            quick = side == 32 and not packed and layout == "contiguous"
            cases.append(step_case(op, (n, 3, side, side), dtype, packed, layout, quick))
    shapes = ((128, 512, 4, 4), (128, 640, 8, 8), (32, 640, 16, 16))
    for shape, dtype, layout in itertools.product(shapes, dtypes, LAYOUTS):
        cases.append(cam_case(shape, dtype, layout, quick=shape[1] == 512))
    sizes = (((128, 8, 8), (32, 32)), ((128, 4, 4), (32, 32)), ((128, 8, 8), (64, 64)), ((32, 7, 7), (224, 224)))
    for op, rule in (("upsample_cam", ""), ("cam_mask", "zscore"), ("epsilon_map", "zscore")):
        cases += [map_case(op, *each, rule, quick=each is sizes[0]) for each in sizes]
        if op != "upsample_cam":
            cases.append(map_case(op, *sizes[0], "released", quick=op == "epsilon_map"))
            cases.append(map_case(op, *sizes[0], "quantile:0.3"))
    cases.append(map_case("epsilon_map", *sizes[0], "soft"))
    cases.append(map_case("epsilon_map", *sizes[0], "zscore", packed=True))
    return cases


OPS = ("pgd_step", "pgd_step_", "project_linf", "cam", "upsample_cam", "cam_mask", "epsilon_map")


def step_case(
    op: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    packed: bool,
    layout: str = "contiguous",
    quick: bool = False,
) -> Case:
    """pgd_step, pgd_step_ or project_linf; eps is a float32 map (N,1,H,W), or the same in packed bits.

    All image tensors have `dtype` and `layout`. Inputs: x_adv, grad, x, eps; of project_linf: x_adv, x, eps.
    """
    size = shape[2:]

    def inputs(device: torch.device, seed: int) -> tuple[Any, ...]:
        draw = torch.Generator(device).manual_seed(seed)
        x = torch.rand(shape, generator=draw, device=device)
        grad = torch.randn(shape, generator=draw, device=device)
        mask = torch.rand((shape[0], 1, *size), generator=draw, device=device) < 0.3
        # Some pixels beyond their bound, some within.
        x_adv = (x + 1.2 * EPS * (2 * torch.rand(shape, generator=draw, device=device) - 1)).clamp(0, 1)
        eps = PackedEpsilon.pack(mask, EPS, EPS_LOW)
        images = (x_adv, x) if op == "project_linf" else (x_adv, grad, x)
        return (*(t.to(dtype, memory_format=LAYOUTS[layout]) for t in images), eps if packed else eps.dense())

    def plain(device: torch.device) -> Callable[..., Any]:
        place = 2 ** torch.arange(8, device=device, dtype=torch.uint8)

        def dense(eps: Any) -> Tensor:
            if not packed:
                return eps
            bits = (eps.bits[..., None] & place).flatten(2)[..., : size[0] * size[1]]
            return torch.where(bits.view(shape[0], 1, *size) != 0, EPS, EPS_LOW)

        def project(x_adv: Tensor, x: Tensor, eps: Any) -> Tensor:
            bound, natural = dense(eps), x.float()
            return (natural + torch.clamp(x_adv.float() - natural, -bound, bound)).to(dtype)

        def step(x_adv: Tensor, grad: Tensor, x: Tensor, eps: Any) -> Tensor:
            bound, natural = dense(eps), x.float()
            moved = x_adv.float() + ALPHA * grad.float().sign() - natural
            return torch.clamp(natural + torch.clamp(moved, -bound, bound), 0, 1).to(dtype)

        if op == "project_linf":
            return project
        return step if op == "pgd_step" else lambda x_adv, *others: x_adv.copy_(step(x_adv, *others))

    runs: dict[str, Callable[..., Any]] = {
        "project_linf": project_linf,
        "pgd_step": partial(pgd_step, alpha=ALPHA),
        "pgd_step_": partial(pgd_step_, alpha=ALPHA),
    }
    return Case(
        op=op,
        shape=f"{'x'.join(map(str, shape))} {layout}, eps {'packed' if packed else '(N,1,H,W)'}",
        dtype=dtype,
        inputs=inputs,
        run=runs[op],
        plain=plain,
        raw=f"_{op}",
        exact=OWN,
        near=2.0**-23 if dtype == torch.float32 else 2.0**-8,  # one rounding of a value near 1
        in_place=op == "pgd_step_",
        quick=quick,
    )


def cam_case(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str = "contiguous", quick: bool = False
) -> Case:
    """Grad-CAM. Inputs: activation, gradient, both `shape`, `dtype` and `layout`; float32 out."""

    def inputs(device: torch.device, seed: int) -> tuple[Any, ...]:
        draw = torch.Generator(device).manual_seed(seed)
        activation, gradient = (torch.randn(shape, generator=draw, device=device) for _ in range(2))
        lay = partial(torch.Tensor.to, dtype=dtype, memory_format=LAYOUTS[layout])
        return lay(activation.relu()), lay(gradient)

    def plain(device: torch.device) -> Callable[..., Any]:
        def gradcam(activation: Tensor, gradient: Tensor) -> Tensor:
            return (gradient.float().mean((2, 3), keepdim=True) * activation.float()).sum(1).relu()

        return gradcam

    name = f"{'x'.join(map(str, shape))} {layout}, gradcam"
    # Sums of up to 640 products in another order, whose own rounding is some 1e-7 of the largest.
    return Case("cam", name, dtype, inputs, cam, plain, "_cam", near=1e-5, quick=quick)


def map_case(
    op: str, maps: tuple[int, int, int], size: tuple[int, int], rule: str, packed: bool = False, quick: bool = False
) -> Case:
    """upsample_cam, cam_mask or epsilon_map. Input: cam, float32 (N,h,w), non-negative."""
    release = op == "epsilon_map" and rule in ("zscore", "released") and not packed

    def inputs(device: torch.device, seed: int) -> tuple[Any, ...]:
        draw = torch.Generator(device).manual_seed(seed)
        return (torch.randn(maps, generator=draw, device=device).relu(),)

    def run(cam: Tensor) -> Tensor:
        if op == "upsample_cam":
            return upsample_cam(cam, size)
        if op == "cam_mask":
            return cam_mask(cam, size, rule)
        if packed:
            return packed_epsilon_map(cam, size, EPS, EPS_LOW, rule).bits
        return epsilon_map(cam, size, EPS, EPS_LOW, rule)

    form = f" {rule}{' packed' if packed else ''}".rstrip()
    return Case(
        op=op,
        shape=f"{maps[0]} {maps[1]}x{maps[2]}->{size[0]}x{size[1]}{form}",
        dtype=torch.float32,
        inputs=inputs,
        run=run,
        plain=lambda device: plain_map(op, maps[1:], size, rule, packed, device),
        raw="_cam_mask" if packed else f"_{op}",
        exact=("cpp",) if rule not in ("", "soft") else (),
        near=2e-6,
        away=0.0 if rule in ("", "soft") else 1e-4,
        vectorised=True,
        published=partial(published_epsilon_map, size=size, rule=rule, eps=EPS, eps_low=EPS_LOW) if release else None,
        quick=quick,
    )


def plain_map(
    op: str, small: tuple[int, ...], size: tuple[int, int], rule: str, packed: bool, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """upsample_cam, cam_mask or epsilon_map as vectorised PyTorch: two matrix products, then means.

    The interpolation's weights and the colours are computed here, once, and not when it is called.
    """
    rows, columns = (_weights(a, b, device) for a, b in zip(small, size, strict=True))
    colours = jet().to(device, torch.float32)
    pixels = size[0] * size[1]
    place = 2 ** torch.arange(8, device=device, dtype=torch.uint8)

    def upsample(cam: Tensor) -> Tensor:
        low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
        return rows @ ((cam - low) / (high - low) @ columns.T)

    def above_one_sigma(values: Tensor) -> Tensor:
        # Not torch.std: several times slower on a CPU.
        deviation = values - values.mean(1, keepdim=True)
        return deviation > deviation.square().mean(1, keepdim=True).sqrt()

    def mask(u: Tensor) -> Tensor:
        if rule == "released":
            entry = (u * u * 256).clamp(max=255).int().flatten()
            rgb = colours.index_select(0, entry).view(len(u), -1)
            return above_one_sigma(rgb).view(-1, *size, 3).permute(0, 3, 1, 2).contiguous()
        if rule == "zscore":
            return above_one_sigma(u.flatten(1)).view(-1, 1, *size)
        keep = math.ceil(float(rule.partition(":")[2]) * pixels)
        flat = u.flatten(1)
        chosen = torch.zeros_like(flat, dtype=torch.bool).scatter(1, flat.topk(keep, sorted=False).indices, True)
        return chosen.view(-1, 1, *size)

    def plain(cam: Tensor) -> Tensor:
        u = upsample(cam)
        if op == "upsample_cam":
            return u
        if rule == "soft":
            return EPS_LOW + (EPS - EPS_LOW) * u.clamp(0, 1)[:, None]
        if op == "cam_mask":
            return mask(u)
        if packed:
            padded = torch.nn.functional.pad(mask(u).flatten(2), (0, -pixels % 8))
            return (padded.unflatten(2, (-1, 8)).to(torch.uint8) * place).sum(3, dtype=torch.uint8)
        return torch.where(mask(u), EPS, EPS_LOW)

    return plain


def _weights(size_in: int, size_out: int, device: torch.device) -> Tensor:
    """Keys bicubic interpolation as a matrix (size_out, size_in)."""
    index, weight = keys_taps(size_in, size_out, torch.float32, device)
    return weight.new_zeros(size_out, size_in).scatter_add_(1, index, weight)


# --- providers, bytes, correctness ------------------------------------------------------------------------------------


def names_of(case: Case, device: torch.device) -> list[str]:
    """Names of all providers but `copy` that can run the case on that device, the reference first."""
    baselines = {"reference": True, "published": case.published, "vectorised": case.vectorised, "torch.compile": True}
    own = [name for name in OWN if why_not(case.raw, name, device) is None]
    return [name for name, there in baselines.items() if there] + own


def providers_of(case: Case, device: torch.device) -> list[Provider]:
    """The providers of `names_of`."""
    plain = case.plain(device)
    baselines = {
        "reference": Provider("reference", case.run, "reference", captured=False),
        "published": Provider("published", case.published or plain, captured=False),
        "vectorised": Provider("vectorised", plain),
        "torch.compile": Provider("torch.compile", torch.compile(plain, fullgraph=True, dynamic=False)),
    }
    return [
        baselines.get(name) or Provider(name, case.run, name, exact=name in case.exact)
        for name in names_of(case, device)
    ]


def why_not(raw: str, backend: str, device: torch.device) -> str | None:
    """Why a backend's kernel for a raw op cannot be timed on a device; None if it can."""
    reason = backends.why_not(backend, device.type)
    if reason is None and backend == "triton" and device.type == "cpu":
        return "triton is interpreted on a CPU, and the interpreter's speed says nothing"
    if reason is not None:
        return reason
    # What a backend has no kernel for would run as the reference, under the backend's name.
    if backend == "triton":
        there = importlib.util.find_spec(f"part_fast.kernels.{raw.strip('_')}") is not None
    else:
        there = torch._C._dispatch_has_kernel_for_dispatch_key(
            f"part_fast::{raw}", "CPU" if backend == "cpp" else "CUDA"
        )
    return None if there else f"{backend} has no kernel of its own for part_fast::{raw}"


def tensor_bytes(value: Any) -> int:
    """Bytes of a tensor's elements or of a PackedEpsilon's bits."""
    return value.nbytes if isinstance(value, PackedEpsilon) else value.numel() * value.element_size()


def moved_bytes(inputs: Iterable[Any], result: Any) -> int:
    """The formula of every GB/s: each input read once, the result written once. In place, x_adv is both."""
    return sum(map(tensor_bytes, inputs)) + tensor_bytes(result)


def check(case: Case, providers: Sequence[Provider], device: torch.device) -> int:
    """Compare every provider with the first one; the case's bytes.

    Errors: MismatchError, naming the provider and how many values differ.
    """

    inputs = case.inputs(device, 0)

    def result_of(provider: Provider) -> Tensor:
        given = (inputs[0].clone(), *inputs[1:]) if case.in_place else inputs
        with torch.no_grad(), backends.backend(provider.backend):
            return provider.run(*given)

    wanted = result_of(providers[0])
    for provider in providers[1:]:
        got = result_of(provider)
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            is_, due = (f"{tuple(t.shape)} {dtype_name(t.dtype)}" for t in (got, wanted))
            raise MismatchError(f"{case.name}: {provider.name} returns {is_}, the reference {due}: not timed")
        right = wanted.double()
        near = 0.0 if provider.exact or wanted.numel() == 0 else case.near * float(right.abs().max())
        # Not `difference > near`: a NaN is a mismatch.
        wrong = int((~((got.double() - right).abs() <= near)).sum())
        if wrong > (0 if provider.exact else case.away * wanted.numel()):
            share = f"{wrong} of {wanted.numel()} values"
            raise MismatchError(f"{case.name}: {provider.name} differs from the reference in {share}: not timed")
    return moved_bytes(inputs, wanted)


# --- clocks -----------------------------------------------------------------------------------------------------------

Pass = Callable[[], Any]


def traced(call: Pass, *, device: torch.device | None = None, profile_memory: bool = False) -> list[dict[str, Any]]:
    """The events of torch's profiler while `call` runs, a GPU's too, as in Chrome's trace format."""
    # The profiler's library reports on stderr when it starts and stops, and that it sees no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device is not None and device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=profile_memory) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events: list[dict[str, Any]] = json.loads(trace.read_text())["traceEvents"]
    return events


class CpuClock:
    """Wall time of calls made from Python, on one set of inputs."""

    seconds_at_least = 0.002
    step_seconds_at_least = 0.0  # of a training step: long enough alone

    def sets(self, bytes_per_set: int, captured: bool) -> int:
        return 1

    def timing(self, captured: bool) -> str:
        return "wall"

    def one_pass(self, calls: Sequence[Pass], captured: bool) -> Pass:
        """What calls each once. Results live until all are there, so that no two are the same memory."""
        return lambda: [call() for call in calls]

    def seconds(self, one_pass: Pass, passes: int) -> float:
        start = time.perf_counter()
        for _ in range(passes):
            one_pass()
        return time.perf_counter() - start

    def peak_bytes(self, call: Pass) -> int:
        """The largest running sum of what one call allocates and frees, its result included."""
        kept: list[Any] = []  # until the profiler has stopped
        events = traced(lambda: kept.append(call()), profile_memory=True)
        steps = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
        return max(itertools.accumulate(step for _, step in steps), default=0)


class CudaClock:
    """Time between two CUDA events; passes are CUDA graphs, over enough sets of inputs to leave none in L2."""

    seconds_at_least = 0.001
    step_seconds_at_least = 0.5  # the first launches after an event find a device that waits for them

    def __init__(self, device: torch.device):
        self.device = device
        self.l2 = torch.cuda.get_device_properties(device).L2_cache_size

    def sets(self, bytes_per_set: int, captured: bool) -> int:
        """How many sets of inputs leave none in L2; fewer for what is launched from Python."""
        enough = max(2, math.ceil(2 * self.l2 / max(1, bytes_per_set)))
        return enough if captured else min(enough, LAUNCHED_SETS)

    def timing(self, captured: bool) -> str:
        return "graph" if captured else "launched"

    def one_pass(self, calls: Sequence[Pass], captured: bool) -> Pass:
        """Calls each once; kept results give each call its own memory to write, also inside a graph."""
        if not captured:
            return lambda: [call() for call in calls]
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            calls[0]()
        torch.cuda.current_stream(self.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]

        def replay() -> list[Any]:
            graph.replay()
            return kept

        return replay

    def seconds(self, one_pass: Pass, passes: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        for _ in range(passes):
            one_pass()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak_bytes(self, call: Pass) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        kept = call()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del kept
        return peak


Clock = CpuClock | CudaClock


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


# --- measuring --------------------------------------------------------------------------------------------------------


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """From here on glibc's malloc gives this process's memory back to the system no more; others are left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_MAX, 0)


def interleave(samples: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every sample once a round, each round beginning with the next one; all values by name."""
    names = list(samples)
    values: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            values[name].append(samples[name]())
    return values


def sampler(provider: Provider, inputs: Sequence[tuple[Any, ...]], clock: Clock) -> tuple[Callable[[], float], int]:
    """(a function that gives the seconds of one call, how many calls it times together), warmed up.

    Errors: RuntimeError where a million passes are not long enough to time, as of a graph that captured nothing.
    """
    with torch.no_grad(), backends.backend(provider.backend):
        one_pass = clock.one_pass([partial(provider.run, *each) for each in inputs], provider.captured)
        # First calls take new memory and wake threads, so that one may look long enough to be timed alone.
        warm = 0.0
        for _ in range(100):
            if warm >= 20 * clock.seconds_at_least:
                break
            warm += clock.seconds(one_pass, 1)
        passes = 1
        while (taken := min(clock.seconds(one_pass, passes) for _ in range(3))) < clock.seconds_at_least:
            if passes >= 10**6:
                raise RuntimeError(f"{provider.name} takes no time: {passes} passes of its calls took {taken:g} s")
            passes = min(100 * passes, math.ceil(passes * 1.2 * clock.seconds_at_least / max(taken, 1e-9)))

    def sample() -> float:
        with torch.no_grad(), backends.backend(provider.backend):
            return clock.seconds(one_pass, passes) / (passes * len(inputs))

    return sample, passes * len(inputs)


@contextlib.contextmanager
def threads_of(count: int) -> Iterator[None]:
    """So many threads for torch's and part_fast's work on a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def copy_provider(nbytes: int) -> tuple[Provider, Callable[[torch.device], tuple[Tensor, Tensor]]]:
    """A copy that reads nbytes / 2 and writes nbytes / 2, into memory that is there; and what makes its tensors."""

    def inputs(device: torch.device) -> tuple[Tensor, Tensor]:
        shape = (nbytes // 8,)
        return torch.ones(shape, device=device), torch.zeros(shape, device=device)

    return Provider("copy", lambda source, target: target.copy_(source)), inputs


def measure(
    case: Case, device: torch.device, rounds: int, providers: Sequence[Provider] | None = None
) -> list[dict[str, Any]]:
    """One row for each provider of the case, `copy` first; by default of all that the device has.

    Columns: op, shape, dtype, threads (of a CPU; None elsewhere), provider, timing, median_us,
    p20_us, p80_us, gb_per_s, percent_of_copy, peak_bytes (None where it is not known), bytes, rounds, calls (timed
    together in a round).
    Errors: MismatchError where a provider's result is wrong; nothing is timed then.
    """
    torch.compiler.reset()  # compiled graphs of earlier cases count against the limit of recompilations
    torch._inductor.config.compile_threads = 1  # its processes go on working beside what is timed
    keep_freed_memory()
    providers = list(providers_of(case, device) if providers is None else providers)
    nbytes = check(case, providers, device)
    clock = clock_for(device)
    copy, copy_inputs = copy_provider(nbytes)
    sets = {provider.name: clock.sets(nbytes, provider.captured) for provider in (copy, *providers)}
    inputs = [case.inputs(device, seed) for seed in range(max(sets.values()))]
    given: dict[str, list[Any]] = {provider.name: inputs[: sets[provider.name]] for provider in providers}
    given["copy"] = [copy_inputs(device) for _ in range(sets["copy"])]

    samples, calls, peaks = {}, {}, {}
    for provider in (copy, *providers):
        samples[provider.name], calls[provider.name] = sampler(provider, given[provider.name], clock)
        with torch.no_grad(), backends.backend(provider.backend):
            call = partial(provider.run, *given[provider.name][0])
            peaks[provider.name] = None if provider.name == "published" else clock.peak_bytes(call)
    seconds = {name: np.percentile(values, (20, 50, 80)) for name, values in interleave(samples, rounds).items()}
    rows = []
    for provider in (copy, *providers):
        p20, median, p80 = (float(value) for value in seconds[provider.name])
        rows.append(
            {
                "op": case.op,
                "shape": case.shape,
                "dtype": dtype_name(case.dtype),
                "threads": torch.get_num_threads() if device.type == "cpu" else None,
                "provider": provider.name,
                "timing": clock.timing(provider.captured),
                "median_us": 1e6 * median,
                "p20_us": 1e6 * p20,
                "p80_us": 1e6 * p80,
                "gb_per_s": nbytes / median / 1e9,
                "percent_of_copy": 100 * float(seconds["copy"][1]) / median,
                "peak_bytes": peaks[provider.name],
                "bytes": nbytes,
                "rounds": rounds,
                "calls": calls[provider.name],
            }
        )
    return rows


_KEY = ("op", "shape", "dtype", "threads")  # what tells a case's rows from the others


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each case how many times faster than each other provider the fastest backend of part_fast is, by medians."""
    found = []
    for key, group in itertools.groupby(rows, lambda row: tuple(row[name] for name in _KEY)):
        median = {row["provider"]: row["median_us"] for row in group}
        own = min((name for name in OWN if name in median), key=median.__getitem__, default=None)
        if own is not None:
            times = {name: median[name] / median[own] for name in median if name not in OWN}
            found.append({**dict(zip(_KEY, key, strict=True)), "backend": own, **times})
    return found


# --- the command ------------------------------------------------------------------------------------------------------


def ops(
    out: Path,
    *,
    only: Sequence[str] = (),
    device: str = "auto",
    quick: bool = False,
    rounds: int | None = None,
    threads: Sequence[int] = (),
    overwrite: bool = False,
    cases: Sequence[Case] | None = None,
) -> list[dict[str, Any]]:
    """Measure the ops, print a table for each, and write ops.csv, ratios.csv, ops.png, environment.json into `out`.

    only: names of ops, default all. quick: one or two cases of each op, and fewer rounds. rounds: 21, quick 7.
    threads: of a CPU; each case is measured with each number, default as many as torch has. cases: others than
    all_cases(). Files are written when every case was measured and every provider was right.
    Errors: MismatchError for a provider with a wrong result; ValueError for an unknown op or device, rounds or
    threads < 1, threads on a GPU, nothing to measure, and for a folder that holds results already, unless `overwrite`.
    """
    from tqdm import tqdm

    unknown = [name for name in only if name not in OPS]
    if unknown:
        raise ValueError(f"only must name ops among {', '.join(OPS)}, got {', '.join(unknown)}")
    rounds = (7 if quick else 21) if rounds is None else rounds
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    where = find_device(device)
    if any(count < 1 for count in threads):
        raise ValueError(f"threads must be >= 1, got {', '.join(map(str, threads))}")
    if threads and where.type != "cpu":
        raise ValueError(f"threads are a CPU's, got {', '.join(map(str, threads))} for {where}")
    files = [out / name for name in ("ops.csv", "ratios.csv", "ops.png", "environment.json")]
    there = [path.name for path in files if path.exists()]
    if there and not overwrite:
        raise ValueError(f"out must be a folder without results, got {out} with {', '.join(there)}: use --overwrite")
    chosen = list(all_cases()) if cases is None else list(cases)
    chosen = [case for case in chosen if (not only or case.op in only) and (case.quick or not quick)]
    if not chosen:
        raise ValueError("cases must hold one to measure, got none")
    out.mkdir(parents=True, exist_ok=True)

    record = report.environment()
    print(environment_line(record, where))
    for reason in dict.fromkeys(why_not(case.raw, name, where) for name in OWN for case in chosen):
        if reason:
            print(f"not measured: {reason}")
    rows: list[dict[str, Any]] = []
    current = torch.cuda.device(where) if where.type == "cuda" else contextlib.nullcontext()
    with current, tqdm(chosen, unit="case", leave=False) as progress:
        for op, group in itertools.groupby(progress, lambda case: case.op):
            of_op = []
            for case in group:
                progress.set_postfix_str(case.name)
                for count in threads or (torch.get_num_threads(),):
                    with threads_of(count):
                        of_op += measure(case, where, rounds)
            rows += of_op
            progress.write(f"\n{op}: bytes = every input read once + the result written once\n{speed_table(of_op)}")
    faster = ratios(rows)
    if faster:
        print(f"\nTimes faster than each other provider, by medians\n{ratio_table(faster)}")

    measured = [op for op in OPS if any(row["op"] == op for row in rows)]
    record["bench"] = {"device": str(where), "quick": quick, "rounds": rounds, "ops": measured}
    record["bench"]["threads"] = list(dict.fromkeys(row["threads"] for row in rows))
    report.write_csv(files[0], rows)
    report.write_csv(files[1], [{key: row.get(key) for key in _RATIO_COLUMNS} for row in faster])
    draw(files[2], rows, environment_line(record, where))
    report.write_json(files[3], record)
    print(f"\nwritten: {', '.join(map(str, files))}")
    return rows


def environment_line(record: Mapping[str, Any], device: torch.device) -> str:
    """Where the numbers come from, in one line."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{record['cpu']} ({record['cpu_capability']}), {record['threads']} threads"
    commit = f" ({record['commit'][:8]})" if record["commit"] else ""
    return f"part_fast {record['part_fast']}{commit}, torch {record['torch']}, {device}: {hardware}"


def speed_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Text of the rows of `measure`; times in microseconds, memory in MiB."""
    header = (
        "shape",
        "dtype",
        "threads",
        "provider",
        "timing",
        "median us",
        "p20",
        "p80",
        "GB/s",
        "% of copy",
        "peak MiB",
    )
    text = []
    for row in rows:
        times = (f"{row[key]:.1f}" for key in ("median_us", "p20_us", "p80_us"))
        rates = (f"{row[key]:.3g}" if row[key] < 100 else f"{row[key]:.0f}" for key in ("gb_per_s", "percent_of_copy"))
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.2f}"
        text.append((row["shape"], row["dtype"], _threads(row), row["provider"], row["timing"], *times, *rates, peak))
    return report.table(header, text)


_RATIO_COLUMNS = (*_KEY, "backend", "copy", "reference", "published", "vectorised", "torch.compile")


def _threads(row: Mapping[str, Any]) -> str:
    return "-" if row["threads"] is None else str(row["threads"])


def ratio_table(rows: Sequence[Mapping[str, Any]]) -> str:
    text = []
    for row in rows:
        numbers = (f"{row[key]:.2f}" if key in row else "-" for key in _RATIO_COLUMNS[5:])
        text.append((row["op"], row["shape"], row["dtype"], _threads(row), row["backend"], *numbers))
    return report.table(_RATIO_COLUMNS, text)


_COLOURS = {
    "reference": report.GRAY,
    "published": "#000000",
    "vectorised": "#CC79A7",
    "torch.compile": report.BLUE,
    "cpp": report.VERMILION,
    "triton": report.ORANGE,
    "cuda": report.GREEN,
}


def draw(path: Path, rows: Sequence[Mapping[str, Any]], caption: str) -> None:
    """A PNG of bars: a panel per op, a group per case, a bar per provider, as long as its share of the copy's speed.

    Of a CPU, only what was measured with the most threads.
    """
    report.load_matplotlib()
    from matplotlib.patches import Patch

    most = max((row["threads"] for row in rows if row["threads"] is not None), default=None)
    bars = [row for row in rows if row["provider"] != "copy" and row["threads"] == most]
    panels = [(op, list(group)) for op, group in itertools.groupby(bars, lambda row: row["op"])]
    # Two columns about equally tall; a panel's title and axis take the room of some bars.
    weight = [len(group) + 8 for _, group in panels]
    first = min(range(1, len(panels) + 1), key=lambda k: max(sum(weight[:k]), sum(weight[k:])))
    columns = [(panels[:first], weight[:first]), (panels[first:], weight[first:])]
    columns = [column for column in columns if column[0]]
    tallest = max(sum(heights) for _, heights in columns)
    with report.drawing(path, (8 * len(columns), 0.15 * tallest + 1), "constrained") as figure:
        sides: Any = figure.subfigures(1, len(columns), squeeze=False)
        for side, (shown, heights) in zip(sides[0], columns, strict=True):
            spare = tallest - sum(heights)  # so that a bar is as thick in both columns
            grid = side.subplots(
                len(shown) + bool(spare), 1, squeeze=False, height_ratios=heights + [spare] * bool(spare)
            )
            if spare:
                grid[-1, 0].axis("off")
            for axes, (op, group) in zip(grid[:, 0], shown, strict=False):
                _panel(axes, op, group)
        used = [name for name in _COLOURS if any(row["provider"] == name for row in bars)]
        handles = [Patch(color=_COLOURS[name]) for name in used]
        figure.legend(handles, used, loc="outside lower center", ncols=len(used))
        figure.suptitle(f"Speed of the ops, % of a copy of the same bytes\n{caption}", fontsize=10)


def _panel(axes: Any, op: str, rows: Sequence[Mapping[str, Any]]) -> None:
    y = 0.0
    ticks: list[tuple[float, str]] = []
    widest = max(row["percent_of_copy"] for row in rows)
    if widest > 40:  # else the copy's line would leave the bars no room
        widest = max(widest, 100.0)
        axes.axvline(100, color="black", linewidth=0.8, linestyle=":")
    for (shape, dtype), group in itertools.groupby(rows, lambda row: (row["shape"], row["dtype"])):
        start = y
        for row in group:
            value = row["percent_of_copy"]
            axes.barh(y, value, height=0.9, color=_COLOURS[row["provider"]])
            axes.text(value + 0.01 * widest, y, f"{value:.3g}", va="center", fontsize=6)
            y += 1
        ticks.append(((start + y - 1) / 2, f"{shape}\n{dtype}"))
        y += 0.8
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.set(xlim=(0, 1.12 * widest), ylim=(y - 0.5, -0.8))
    axes.set_xlabel("% of copy", fontsize=7)
    axes.set_title(op, fontsize=9, loc="left")
