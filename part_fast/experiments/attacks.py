"""Which attack to train with: all of them for as many epochs, and for as many seconds, and what each comes to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from part_fast import checks
from part_fast.config import PRESETS, TrainConfig
from part_fast.data.catalogue import DATASETS, load
from part_fast.errors import BadValueError
from part_fast.experiments.arms import Result, measured, percent, read_results, summary, train_arms
from part_fast.experiments.compare import mean_and_spread
from part_fast.experiments.step_cost import Cost, step_costs
from part_fast.reading import read_json
from part_fast.report import files
from part_fast.report.environment import environment

# The attacks that are compared; the last one is what the others are measured by.
ARMS: dict[str, dict[str, Any]] = {
    "FGSM": {"attack": "fgsm"},
    "FGSM-RS": {"attack": "fgsm-rs"},
    "N-FGSM": {"attack": "n-fgsm"},
    "FGSM-PGI": {"attack": "pgi"},
    "warm, 1 step": {"attack": "warm", "steps": 1, "alpha": 8 / 255},
    "warm, 2 steps": {"attack": "warm", "steps": 2, "alpha": 4 / 255},
    "PGD-2": {"attack": "pgd", "steps": 2, "alpha": 4 / 255},
    "PGD-5": {"attack": "pgd", "steps": 5, "alpha": 2.5 / 255},
    "PGD-10": {"attack": "pgd", "steps": 10},
}
CONFIG = dataclasses.replace(
    PRESETS["fast-resnet18"],
    method="at",
    warmup_epochs=0,
    model="resnet-small",
    epochs=10,
    train_size=10_000,
    pgd_test_size=0,
)
EQUAL = {"epochs": "as many epochs", "seconds": "as many seconds"}
ROUNDS = 7  # of timed steps


def attacks(
    out: Path,
    *,
    config: TrainConfig = CONFIG,
    arms: Mapping[str, Mapping[str, Any]] = ARMS,
    seeds: int = 1,
    equal: Sequence[str] = tuple(EQUAL),
    autoattack: bool = True,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train, or go on with, `config` by every attack, for as many epochs and for as many seconds, and compare them.

    arms: name -> the fields of `config` that it changes, the slowest one last. equal: "epochs", config.epochs of each
    attack; "seconds", as many epochs of each as take the time of config.epochs of the last one. The times are those of
    training steps, timed in turn in this process. autoattack: test by AutoAttack too, on 1,000 images.
    `out` then holds run folders and results below epochs and seconds, attacks.json and attacks.csv.

    Returns: what attacks.json holds.
    Errors: ValueError for an unknown `equal`; what `train` and `evaluate` raise.
    """
    checks.count("seeds", seeds, 1)
    if not equal or set(equal) - set(EQUAL):
        raise BadValueError(f"equal must be of {', '.join(EQUAL)}, got {', '.join(equal) or 'none'}")
    data = load(config.dataset, "train", config.root, config.download).subset(config.batch_size)
    configs = {name: dataclasses.replace(config, **changes) for name, changes in arms.items()}
    log(f"{len(arms)} attacks: timing training steps")
    costs = step_costs(configs, data, ROUNDS)
    record: dict[str, Any] = {"seeds": seeds, "config": config.to_json(), "environment": environment()}
    rows: list[dict[str, Any]] = []
    text: list[str] = []
    for kind in equal:
        planned = {name: dict(changes) for name, changes in arms.items()}
        if kind == "seconds":
            planned = _as_long(config, planned, costs, out / kind / "epochs.json")
        names = list(planned) if autoattack else []
        train_arms(out / kind, out / kind / "results", config, planned, range(seeds), autoattack=names, log=log)
        results = [one for one in read_results(out / kind / "results", arms) if one.seed < seeds]
        found = _rows(results, costs, config)
        rows += [{"equal": kind, **row} for row in found]
        text += [f"{EQUAL[kind]}:", _table(found, measured(results), seeds), ""]
    record |= {"rows": rows, "text": "\n".join(text).rstrip()}
    files.write_csv(out / "attacks.csv", [_flat(row) for row in rows])
    files.write_json(out / "attacks.json", record)
    log(f"{record['text']}\n\nattacks.json and attacks.csv are in {out}")
    return record


def _as_long(
    config: TrainConfig, arms: Mapping[str, dict[str, Any]], costs: Mapping[str, Cost], kept: Path
) -> dict[str, dict[str, Any]]:
    """The arms with as many epochs as take the time of the last one's; timings differ, so they are kept in a file."""
    if kept.is_file():
        epochs = read_json(kept)
        if list(epochs) != list(arms) or not all(type(number) is int and number > 0 for number in epochs.values()):
            raise BadValueError(f"{kept} must hold a number of epochs for each of {', '.join(arms)}, got {epochs}")
    else:
        seconds = costs[list(arms)[-1]].seconds * config.epochs
        epochs = {name: max(1, round(seconds / costs[name].seconds)) for name in arms}
        kept.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(kept, epochs)
    return {name: {**changes, "epochs": epochs[name]} for name, changes in arms.items()}


def _rows(results: Sequence[Result], costs: Mapping[str, Cost], config: TrainConfig) -> list[dict[str, Any]]:
    """A row per attack; memory is that of a step, and of a bank for all training images where there is one."""
    images = config.train_size or DATASETS[config.dataset].train_images
    assert images is not None  # of a folder of images, of which no table is made
    rows = []
    for name, by in summary(results).items():
        of_arm = [one for one in results if one.arm == name]
        epochs = len(of_arm[0].rows)
        rows.append(
            {
                "attack": name,
                "epochs": epochs,
                "seconds": costs[name].seconds * images * epochs,
                "trained_seconds": mean_and_spread([one.seconds for one in of_arm])["mean"],
                "step_bytes": costs[name].bytes,
                "bank_bytes": costs[name].bank * images,
                **{key: value for key, value in by.items() if key != "seeds"},
            }
        )
    return rows


def _table(rows: Sequence[Mapping[str, Any]], measures: Mapping[str, str], seeds: int) -> str:
    lines = [
        (
            row["attack"],
            str(row["epochs"]),
            f"{row['seconds']:.0f}",
            f"{row['step_bytes'] / 2**20:.0f}" + (f" + {row['bank_bytes'] / 2**20:.0f}" if row["bank_bytes"] else ""),
            *(percent(row.get(key), seeds) for key in measures),
        )
        for row in rows
    ]
    titles = [f"{title} %" for title in measures.values()]
    return files.table(("attack", "epochs", "seconds", "MiB of a step + bank", *titles), lines)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Means and spreads in columns of their own."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        found |= {name: value["mean"], f"{name}_spread": value["spread"]} if isinstance(value, dict) else {name: value}
    return found
