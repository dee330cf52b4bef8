"""How the cost of a PART step grows with steps, width, resolution and batch: measured, beside the count of operations.

    python benchmarks/scaling.py [--rounds 5] [--out scaling.csv]

Each row is one change to a step of WRN-10-2 on 8 images of 32x32 with PGD-10, as a ratio of CPU time to the unchanged
step, both measured in turn in one process with one thread; medians. Predicted is the ratio of the two's FLOP in
convolutions and matrix products. CPU time, not the clock's, so that other work on the machine disturbs less.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from part_fast.bench.flop import FlopCount
from part_fast.config import TrainConfig
from part_fast.report import files
from part_fast.training.engine import Engine
from part_fast.training.step import train_step

BASE = TrainConfig(model="wrn-10-2", method="part", steps=10, batch_size=8)
CHANGES = {
    "steps 10 to 5": ({"steps": 5}, 32),
    "steps 10 to 20": ({"steps": 20}, 32),
    "width 2 to 1": ({"model": "wrn-10-1"}, 32),
    "width 2 to 4": ({"model": "wrn-10-4"}, 32),
    "32x32 to 16x16": ({}, 16),
    "32x32 to 64x64": ({}, 64),
    "batch 8 to 4": ({"batch_size": 4}, 32),
    "batch 8 to 32": ({"batch_size": 32}, 32),
}


def step_of(config: TrainConfig, side: int) -> Callable[[], object]:
    """One training step on random images of that side."""
    engine = Engine(config, 10, torch.device("cpu"))
    engine.model.train()
    x, y = torch.rand(config.batch_size, 3, side, side), torch.randint(0, 10, (config.batch_size,))

    return lambda: train_step(engine, "part", x, y, engine.budget)


def flop(step: Callable[[], object]) -> int:
    with FlopCount() as count:
        step()
    return count.total


def seconds(step: Callable[[], object]) -> float:
    begin = time.process_time()
    step()
    return time.process_time() - begin


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = step_of(BASE, 32)
    base_flop = flop(base)
    rows = []
    for name, (change, side) in CHANGES.items():
        step = step_of(dataclasses.replace(BASE, **change), side)
        predicted = flop(step) / base_flop
        step()
        ratios = [seconds(step) / seconds(base) for _ in range(options.rounds)]
        rows.append({"change": name, "predicted": round(predicted, 3), "measured": round(statistics.median(ratios), 3)})
    print(files.table(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))
    if options.out:
        files.write_csv(options.out, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
