"""Where a training step's time goes: by the ranges that part_fast names in a trace of torch's profiler."""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.profiler import record_function

from part_fast.bench.clocks import Progress, interleave, silent, ticking, traced
from part_fast.bench.step_cases import METHODS, StepCases
from part_fast.config import TrainConfig
from part_fast.data.memory import draw_augmentation

PREFIX = "part_fast: "  # of the names that the library gives to its ranges

PARTS = (
    "augmentation",
    "CAM",
    "refresh of AttackModel",
    "attack graph",
    "attack forward",
    "attack backward",
    "pgd_step",
    "training graph",
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
    cases = StepCases(config, device)
    laps: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}

    def step(method: str) -> None:
        with named_forward(cases.engine.trained, "training forward"), record_function(PREFIX + "other"):
            with record_function(PREFIX + "augmentation"):
                drawn = draw_augmentation(config.batch_size, device=device)
                x = drawn.apply(cases.images[cases.indices])
            cases.our_step(cases.engine, method, None, x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def run(method: str) -> float:
        seconds = part_seconds(traced(partial(step, method), device=device))
        laps[method].append({**seconds, "total": sum(seconds.values())})
        return laps[method][-1]["total"]

    for method in METHODS:
        step(method)
    samples = {method: partial(run, method) for method in METHODS}
    interleave(ticking(samples, progress, "profile", rounds), rounds)
    rows = []
    for method, found in laps.items():
        median = {part: float(np.median([lap[part] for lap in found])) for part in (*PARTS, "total")}
        for part, value in median.items():
            share = {"median_s": value, "percent": 100 * value / median["total"], "rounds": rounds}
            rows.append({"model": config.model, "batch": config.batch_size, "method": method, "part": part, **share})
    return rows


def parts_there(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The parts that took time in some step of `profile`'s rows: a CPU has no CUDA graph and never waits."""
    there = {row["part"] for row in rows if row["median_s"] > 0}
    return [part for part in PARTS if part in there]
