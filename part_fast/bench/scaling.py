"""How the cost of a PART step grows with steps, width, resolution and batch: `part-fast bench scaling`.

Each row is one change to a training step of WRN-10-2 on 8 images of 32x32 with PGD-10 and the mask of its batch by rule
"released", as a ratio to the unchanged step. Predicted is the ratio of the two's FLOP in convolutions and matrix
products, counted while they run. Measured is the median, over the rounds, of the ratio of their times within a round;
with it the 20th and 80th percentile.

On a CPU the time is the processor's and not the clock's, so that other work on the machine disturbs less, and with one
thread unless others are asked for; with several, it is the sum of all threads'. On a GPU it is that between two CUDA
events, of as many steps in a row as take half a second.

The step is compared with the published loop first, in float64, on every network and image size with fewer images and 3
attack steps, as `bench step` compares its pairs; a mismatch raises `MismatchError`, and nothing is timed. In each round
every step is run once, beginning with another one each time.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from part_fast.bench.clocks import Clock, CpuClock, Pass, Progress, clock_for, silent, threads_of, time_in_turn
from part_fast.bench.command import (
    at_least_one,
    check_threads,
    current_device,
    environment_line,
    result_paths,
    write_results,
)
from part_fast.bench.flop import FlopCount
from part_fast.bench.step_cases import SMALL, StepCases, compare, configuration
from part_fast.config import TrainConfig, find_device
from part_fast.optional import needs
from part_fast.report import figures, files
from part_fast.report.environment import environment

FILES = ("scaling.csv", "scaling.png", "environment.json")

BASE = configuration("wrn-10-2", 8)
SIDE = 32

# What is changed of BASE, and the side of the images.
CHANGES: dict[str, tuple[dict[str, Any], int]] = {
    "steps 10 to 5": ({"steps": 5}, 32),
    "steps 10 to 20": ({"steps": 20}, 32),
    "width 2 to 1": ({"model": "wrn-10-1"}, 32),
    "width 2 to 4": ({"model": "wrn-10-4"}, 32),
    "32x32 to 16x16": ({}, 16),
    "32x32 to 64x64": ({}, 64),
    "batch 8 to 4": ({"batch_size": 4}, 32),
    "batch 8 to 32": ({"batch_size": 32}, 32),
}
QUICK = ("steps 10 to 5", "width 2 to 1", "32x32 to 16x16", "batch 8 to 4")


class ProcessorClock(CpuClock):
    """The processor time of all threads of this process."""

    def seconds(self, one_pass: Pass, passes: int) -> float:
        start = time.process_time()
        for _ in range(passes):
            one_pass()
        return time.process_time() - start


def part_step(config: TrainConfig, side: int, device: torch.device) -> Pass:
    """One PART step, with the mask of its batch, as `train` does it."""
    cases = StepCases(config, device, side)
    return partial(cases.our_step, cases.engine, "part")


def count(step: Pass) -> int:
    """FLOP of a step, the second one: the first also checks what AttackModel has fused."""
    step()
    with FlopCount() as counted:
        step()
    return int(counted.total)


def measure(
    base: TrainConfig,
    changes: Mapping[str, tuple[Mapping[str, Any], int]],
    device: torch.device,
    rounds: int,
    side: int = SIDE,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """One row for each change to the step of `base` on images of `side`.

    Columns: change, threads (of a CPU; None elsewhere), predicted, measured, p20, p80, base_ms, median_ms, rounds,
    calls (timed together in a round).
    Errors: MismatchError where a step computes something else than the published loop; nothing is timed then.
    """
    configs = {"base": (base, side)}
    configs |= {name: (dataclasses.replace(base, **change), at) for name, (change, at) in changes.items()}
    different = dict.fromkeys((config.model, at) for config, at in configs.values())
    tick = progress("comparing", len(different))
    for model, at in different:
        compare(StepCases(configuration(model, 3, **SMALL), device, at, torch.float64), "PART", "published PART")
        tick()
    steps = {name: part_step(config, at, device) for name, (config, at) in configs.items()}
    flop = {name: count(step) for name, step in steps.items()}
    clock: Clock = ProcessorClock() if device.type == "cpu" else clock_for(device)
    seconds, calls = time_in_turn(steps, clock, rounds, progress)
    rows = []
    for name in changes:
        ratios = np.array(seconds[name]) / np.array(seconds["base"])
        p20, median, p80 = (float(value) for value in np.percentile(ratios, (20, 50, 80)))
        rows.append(
            {
                "change": name,
                "threads": torch.get_num_threads() if device.type == "cpu" else None,
                "predicted": flop[name] / flop["base"],
                "measured": median,
                "p20": p20,
                "p80": p80,
                "base_ms": 1e3 * float(np.median(seconds["base"])),
                "median_ms": 1e3 * float(np.median(seconds[name])),
                "rounds": rounds,
                "calls": calls[name],
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Text of the rows of `measure`."""
    cells = []
    for row in rows:
        ratios = (f"{row[key]:.3f}" for key in ("predicted", "measured", "p20", "p80"))
        times = (f"{row[key]:.1f}" for key in ("base_ms", "median_ms"))
        cells.append((row["change"], "-" if row["threads"] is None else str(row["threads"]), *ratios, *times))
    return files.table(("change", "threads", "predicted", "measured", "p20", "p80", "ms before", "after"), cells)


def draw(path: Path, rows: Sequence[Mapping[str, Any]], caption: str) -> None:
    """A PNG: measured over predicted ratios on logarithmic axes; on the line the cost follows the count."""
    with figures.drawing(path, (6.5, 6), "constrained") as figure:
        axes: Any = figure.subplots()
        ends = [min(row["predicted"] for row in rows), max(row["predicted"] for row in rows)]
        axes.plot(ends, ends, color=figures.GRAY, linestyle=":")
        for row in rows:
            errors = [[row["measured"] - row["p20"]], [row["p80"] - row["measured"]]]
            axes.errorbar(row["predicted"], row["measured"], yerr=errors, color=figures.BLUE, marker="o", capsize=2)
            threads = "" if row["threads"] is None else f" ({row['threads']})"
            axes.annotate(f" {row['change']}{threads}", (row["predicted"], row["measured"]), fontsize=7)
        axes.set(xscale="log", yscale="log", xlabel="predicted by FLOP", ylabel="measured (20th to 80th percentile)")
        axes.margins(x=0.25)
        figure.suptitle(f"Cost of a PART step, after over before a change\n{caption}", fontsize=8)


def scaling(
    out: Path,
    *,
    device: str = "auto",
    quick: bool = False,
    rounds: int | None = None,
    threads: Sequence[int] = (),
    overwrite: bool = False,
    base: TrainConfig = BASE,
) -> list[dict[str, Any]]:
    """Measure the changes, print the table, and write FILES to the folder `out`.

    quick: those of QUICK. rounds: 5, quick 3. threads: of a CPU, default 1; all changes are measured with each number.
    base: the step that is changed.
    Returns: the rows of scaling.csv, see `measure`.
    Errors: MismatchError where a step computes something else than published; ValueError for an unknown device, rounds
    or threads < 1, threads on a GPU, and for a folder that holds results already, unless `overwrite`. Nothing is
    written then.
    """
    with needs("tqdm", "train"):
        from tqdm import tqdm

    rounds = (3 if quick else 5) if rounds is None else rounds
    at_least_one("rounds", rounds)
    where = find_device(device)
    check_threads(threads, where)
    paths = result_paths(out, FILES, overwrite)
    changes = {name: change for name, change in CHANGES.items() if name in QUICK or not quick}

    record = environment()
    heading = environment_line(record, where)
    print(heading)
    rows: list[dict[str, Any]] = []
    with current_device(where), tqdm(unit="step", leave=False, disable=None) as bar:

        def progress(what: str, total: int) -> Callable[[], object]:
            bar.reset(total)
            bar.set_description(what)
            update: Callable[[], object] = bar.update
            return update

        for number in threads or (1,):
            with threads_of(number):
                rows += measure(base, changes, where, rounds, progress=progress)
    print(f"\nA PART step of {base.model} on {base.batch_size} images, after over before a change\n{table(rows)}")

    record["bench"] = {
        "device": str(where),
        "model": base.model,
        "batch": base.batch_size,
        "quick": quick,
        "rounds": rounds,
        "threads": list(dict.fromkeys(row["threads"] for row in rows)),
    }
    write_results(paths, rows, draw, heading, record)
    return rows
