"""What one process of the battery finds: lines of results.jsonl, printed too; and what its checks share."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

RESULTS = "results.jsonl"
CASES_FAILED = 3  # the exit code of a process whose cases failed and said so; Python's own for a crash is 1
EPS, EPS_LOW, ALPHA = 8 / 255, 7 / 255, 2 / 255

T = TypeVar("T")


class MissingError(RuntimeError):
    """A case needs something that this machine does not have; the message says what."""


def append(out: Path, row: Mapping[str, Any]) -> None:
    """Add a line to the results in one write, since several processes do it at once."""
    line = (json.dumps(row, default=str) + "\n").encode()
    file = os.open(out / RESULTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line)
    finally:
        os.close(file)


def one_line(error: BaseException) -> str:
    """Type and message of an error, without line breaks, at most 400 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that every process of the battery gets."""
    result = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    result.add_argument("--out", type=Path, required=True, help="the folder of results.jsonl")
    result.add_argument("--part", help="the part that its rows are of")
    result.add_argument("--device", default="cuda", help="cuda or cpu")
    result.add_argument("--until", type=float, default=math.inf, help="Unix time after which no case begins")
    result.add_argument("--dry-run", action="store_true", help="everything tiny, on a CPU")
    return result


class Recorder:
    """Runs the cases of one process and writes a row for each.

    A row has part, kind, name, and what belongs to its kind: "ok" (seconds), "failed" (error, trace), "late" (it was
    not begun, for want of time), "skipped" (why), "value" (numbers).
    """

    def __init__(self, part: str, arguments: argparse.Namespace) -> None:
        self.part: str = arguments.part or part
        self.out, self.until = arguments.out, float(arguments.until)
        self.device = torch.device(arguments.device)
        self.dry: bool = arguments.dry_run
        self.failures = 0

    def line(self, kind: str, name: str, **values: Any) -> None:
        """Write one row."""
        append(self.out, {"part": self.part, "kind": kind, "name": name, **values})

    def value(self, name: str, **values: Any) -> None:
        """A measurement: numbers, or short texts, by what they are."""
        self.line("value", name, **values)
        shown = (f"{key} {of:.5g}" if isinstance(of, float) else f"{key} {of}" for key, of in values.items())
        print(f"  {name}: {', '.join(shown)}", flush=True)

    def skip(self, name: str, why: str) -> None:
        """A case that cannot run here."""
        self.line("skipped", name, why=why)
        print(f"  skipped {name}: {why}", flush=True)

    @property
    def late(self) -> bool:
        return time.time() > self.until

    def case(
        self, name: str, function: Callable[..., T], *arguments: Any, quiet: bool = False, **keywords: Any
    ) -> T | None:
        """Run one case; its result, or None where it failed, which stops no other case.

        Errors: SystemExit after a failure that has left the CUDA context unusable, as an illegal access does: every
        case after it would fail too.
        """
        if self.late:
            self.line("late", name)
            return None
        begin = time.perf_counter()
        try:
            result = function(*arguments, **keywords)
            synchronize(self.device)  # else a kernel's failure is the next case's
        except MissingError as missing:
            self.skip(name, str(missing))
            return None
        except Exception as error:
            self.fail(name, error)
            try:
                synchronize(self.device)
            except RuntimeError as lost:
                self.line("failed", f"everything after {name}", error=f"the device is lost: {one_line(lost)}")
                sys.exit(CASES_FAILED)
            return None
        self.line("ok", name, seconds=round(time.perf_counter() - begin, 4))
        if not quiet:
            print(f"  ok {name} ({time.perf_counter() - begin:.2f} s)", flush=True)
        return result

    def fail(self, name: str, error: BaseException) -> None:
        """A case that raised."""
        self.failures += 1
        trace = "".join(traceback.format_exception(error))[-3000:]
        self.line("failed", name, error=one_line(error), trace=trace)
        print(f"  FAILED {name}: {one_line(error)}", flush=True)

    @property
    def code(self) -> int:
        """The exit code of the process."""
        return CASES_FAILED if self.failures else 0


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def require(condition: object, text: str) -> None:
    """Errors: AssertionError with the text, unless the condition holds; unlike `assert`, under `python -O` too."""
    if not condition:
        raise AssertionError(text)


def differing(a: Tensor, b: Tensor) -> int:
    """How many values differ; NaN equals NaN. Errors: AssertionError for another shape or dtype."""
    require(a.shape == b.shape, f"shape {tuple(a.shape)}, not {tuple(b.shape)}")
    require(a.dtype == b.dtype, f"{a.dtype}, not {b.dtype}")
    a, b = a.detach(), b.detach()
    if a.device != b.device:
        a, b = a.cpu(), b.cpu()
    different = a != b
    if a.is_floating_point():
        different &= ~(a.isnan() & b.isnan())
    return int(different.sum())


def share_differing(a: Tensor, b: Tensor) -> float:
    """The share of values that differ, from 0 to 1."""
    return differing(a, b) / max(1, a.numel())


def timed(
    call: Callable[[], object], device: torch.device, rounds: int = 5, calls: int = 1, warm: int = 1
) -> tuple[float, float, float]:
    """(median, least, most) seconds of a call over the rounds; `calls` are timed together, after `warm` calls.

    Between two CUDA events; on a CPU by the wall clock.
    """
    from part_fast.bench.clocks import clock_for

    clock = clock_for(device)
    for _ in range(warm):
        call()
    times = [clock.seconds(call, calls) / calls for _ in range(rounds)]
    return statistics.median(times), min(times), max(times)
