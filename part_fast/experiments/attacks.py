"""Which attack to train with: all of them for as many epochs, and for as many seconds, and what each comes to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from part_fast import checks
from part_fast.config import PRESETS, TrainConfig
from part_fast.data.catalogue import load
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
# No average: of so few updates it lags, by more for an attack that is given fewer epochs.
CONFIG = dataclasses.replace(
    PRESETS["fast-resnet18"],
    method="at",
    warmup_epochs=0,
    model="resnet-small",
    epochs=10,
    train_size=10_000,
    pgd_test_size=0,
    average="none",
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
    results: Path | None = None,
    autoattack: bool = True,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train, or go on with, `config` by every attack, for as many epochs and for as many seconds, and compare them.

    arms: name -> the fields of `config` that it changes, the slowest one last. equal: "epochs", config.epochs of each
    attack; "seconds", as many epochs of each as take the time of config.epochs of the last one. The times are those of
    training steps, timed in turn in this process. results: the folder of one small file per network, default
    out/results, and of epochs.json, the epochs of as many seconds; what has a file is not trained again. autoattack:
    test by AutoAttack too, on 1,000 images.
    `out` then holds run folders, attacks.json and attacks.csv.

    Returns: what attacks.json holds.
    Errors: ValueError for an unknown `equal`; what `train` and `evaluate` raise.
    """
    checks.count("seeds", seeds, 1)
    if not equal or set(equal) - set(EQUAL):
        raise BadValueError(f"equal must be of {', '.join(EQUAL)}, got {', '.join(equal) or 'none'}")
    data = load(config.dataset, "train", config.root, config.download)
    data = data if config.train_size is None else data.subset(config.train_size, name="train_size")
    configs = {name: dataclasses.replace(config, **changes) for name, changes in arms.items()}
    for each in configs.values():  # before anything is timed or written
        each.check()
    log(f"{len(arms)} attacks: timing training steps")
    costs = step_costs(configs, data, ROUNDS)
    kept = out / "results" if results is None else results
    epochs = {"epochs": dict.fromkeys(arms, config.epochs)}
    if "seconds" in equal:
        epochs["seconds"] = _as_long(config.epochs, costs, kept / "epochs.json")
    networks = {  # one that both tables have is trained once
        _network(name, count): {**arms[name], "epochs": count} for kind in equal for name, count in epochs[kind].items()
    }
    train_arms(out, kept, config, networks, range(seeds), autoattack=networks if autoattack else (), log=log)
    found = [one for one in read_results(kept, networks) if one.seed < seeds]
    rows: list[dict[str, Any]] = []
    text: list[str] = []
    for kind in equal:
        of_kind = [_row(name, count, found, costs[name], len(data)) for name, count in epochs[kind].items()]
        rows += [{"equal": kind, **row} for row in of_kind]
        text += [f"{EQUAL[kind]}:", _table(of_kind, measured(found), seeds), ""]
    record = {
        "seeds": seeds,
        "config": config.to_json(),
        "environment": environment(),
        "rows": rows,
        "text": "\n".join(text).rstrip(),
    }
    out.mkdir(parents=True, exist_ok=True)
    files.write_csv(out / "attacks.csv", [_flat(row) for row in rows])
    files.write_json(out / "attacks.json", record)
    log(f"{record['text']}\n\nattacks.json and attacks.csv are in {out}")
    return record


def _network(attack: str, epochs: int) -> str:
    """What a network is called among the results."""
    return f"{attack}, {epochs} epochs"


def _as_long(epochs: int, costs: Mapping[str, Cost], kept: Path) -> dict[str, int]:
    """Attack -> as many epochs as take the time of the last one's; timings differ, so they are kept in a file."""
    last = list(costs)[-1]
    if kept.is_file():
        found: dict[str, int] = read_json(kept)
        if list(found) != list(costs) or not all(type(number) is int and number > 0 for number in found.values()):
            raise BadValueError(f"{kept} must hold a number of epochs for each of {', '.join(costs)}, got {found}")
        if found[last] != epochs:
            raise BadValueError(
                f"{kept} is of {found[last]} epochs of {last}, got epochs {epochs}: take another folder"
            )
        return found
    seconds = costs[last].seconds * epochs
    found = {name: max(1, round(seconds / cost.seconds)) for name, cost in costs.items()}
    kept.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(kept, found)
    return found


def _row(attack: str, epochs: int, results: Sequence[Result], cost: Cost, images: int) -> dict[str, Any]:
    """Memory is that of a step, and of a bank for all training images where there is one."""
    of_network = [one for one in results if one.arm == _network(attack, epochs)]
    (accuracies,) = summary(of_network).values()
    return {
        "attack": attack,
        "epochs": epochs,
        "seconds": cost.seconds * images * epochs,
        "trained_seconds": mean_and_spread([one.seconds for one in of_network])["mean"],
        "step_bytes": cost.bytes,
        "bank_bytes": cost.bank * images,
        **{key: value for key, value in accuracies.items() if key != "seeds"},
    }


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
