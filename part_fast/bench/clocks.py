"""Clocks for CPU and GPU: the seconds and the peak memory of calls, how many are timed together, rounds in turn."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from part_fast import backends
from part_fast.bench.cases import Provider
from part_fast.errors import CannotRunError

LAUNCHED_SETS = 8  # of inputs, for what a GPU is given from Python

Pass = Callable[[], Any]
# Takes what is being done, and how many calls it takes; the result is called after each.
Progress = Callable[[str, int], Callable[[], object]]


def silent(what: str, total: int) -> Callable[[], object]:
    """A Progress that shows nothing."""
    return lambda: None


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
        return float(start.elapsed_time(end)) / 1e3

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
                raise CannotRunError(f"{provider.name} takes no time: {passes} passes of its calls took {taken:g} s")
            passes = min(100 * passes, math.ceil(passes * 1.2 * clock.seconds_at_least / max(taken, 1e-9)))

    def sample() -> float:
        with torch.no_grad(), backends.backend(provider.backend):
            return clock.seconds(one_pass, passes) / (passes * len(inputs))

    return sample, passes * len(inputs)


def calls_per_sample(clock: Clock, call: Pass) -> int:
    """How often in a row a whole step is timed, so that its first launches, for which a GPU waits, count for little."""
    if clock.step_seconds_at_least == 0:
        return 1
    return min(100, math.ceil(clock.step_seconds_at_least / clock.seconds(call, 1)))


def time_in_turn(
    calls: Mapping[str, Pass], clock: Clock, rounds: int, progress: Progress = silent
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """(seconds of one call, a value for each round; how many calls a round times together), both by name.

    The calls have run before, so that nothing is compiled or allocated for the first time.
    """
    times = {name: calls_per_sample(clock, call) for name, call in calls.items()}
    samples = {name: partial(clock.seconds, call, times[name]) for name, call in calls.items()}
    values = interleave(ticking(samples, progress, f"{rounds} rounds", rounds), rounds)
    return {name: [value / times[name] for value in found] for name, found in values.items()}, times


@contextlib.contextmanager
def threads_of(count: int) -> Iterator[None]:
    """So many threads for torch's and part_fast's work on a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ticking(
    samples: Mapping[str, Callable[[], float]], progress: Progress, what: str, rounds: int
) -> dict[str, Callable[[], float]]:
    """The samples, each of which says when it is done."""
    tick = progress(what, len(samples) * rounds)

    def run(sample: Callable[[], float]) -> float:
        value = sample()
        tick()
        return value

    return {name: partial(run, sample) for name, sample in samples.items()}
