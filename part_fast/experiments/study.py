"""Does it matter which pixels keep the full eps? AT against PART with other maps in the CAM's place and other rules."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from part_fast import checks
from part_fast.config import PRESETS, TrainConfig, find_device
from part_fast.data.catalogue import load
from part_fast.errors import BadValueError
from part_fast.evaluation.accuracy import evaluate
from part_fast.evaluation.trained import load_trained
from part_fast.experiments.compare import (
    MEASURES,
    accuracy_table,
    interval,
    is_correct,
    load_student_t,
    mean_and_spread,
)
from part_fast.experiments.learned import learn_rule
from part_fast.report import figures, files
from part_fast.report.environment import environment
from part_fast.training.checkpoint import STATE
from part_fast.training.loop import train
from part_fast.training.run_folder import WEIGHTS

# The rule of an arm whose maps are learned from the warm-up; the mean weight of its images.
LEARNED, LEARNED_MEAN = "learned", 0.5
# The arms that are trained after the warm-up; the others are compared with the first.
ARMS: dict[str, dict[str, Any]] = {
    "AT": {"method": "at"},
    "PART": {},
    "permuted": {"control": "permuted"},
    "random": {"control": "random"},
    "inverted": {"control": "inverted"},
    "uniform": {"control": "uniform"},
    "rule released": {"rule": "released"},
    "rule quantile": {"rule": "quantile:0.5"},
    # Each image's mean eps is that of AT.
    "budget-matched": {"rule": "budget-matched:8/255", "eps": 9 / 255, "eps_low": 7 / 255},
    "ensemble": {"cam": "ensemble"},
    "region": {"rule": "region:centre"},
    "eps 12 and 8": {"eps": 12 / 255, "eps_low": 8 / 255},
    # Maps per class, learned once from each seed's warm-up; each image's mean eps is that of AT.
    "learned": {"rule": LEARNED, "eps": 9 / 255, "eps_low": 7 / 255},
}
CONFIG = dataclasses.replace(
    PRESETS["demo"], dataset="fashion-mnist", train_size=6000, test_size=5000, epochs=5, lr_drops=(4,)
)


def study(
    out: Path,
    *,
    config: TrainConfig = CONFIG,
    arms: Mapping[str, Mapping[str, Any]] = ARMS,
    seeds: int = 5,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train, or go on with, every arm with every seed, and say which differences exceed chance.

    Each seed has a warm-up of config.warmup_epochs of AT of its own, from which all arms go on for the rest of
    config.epochs. arms: name -> the fields of `config`, of method part, that it changes; "AT" and "PART" are among
    them. Finished runs and evaluations in `out` are kept. It then holds a run folder per warm-up and run, runs.csv,
    differences.csv, study.json and study.png.

    Returns: what study.json holds.

    Raises:
        ValueError: an argument is wrong, or a run in `out` has another configuration.
        FileNotFoundError: the data set is missing.
    """
    checks.count("seeds", seeds, 2)
    if not {"AT", "PART"} <= set(arms):
        raise BadValueError(f"arms must hold AT and PART, got {', '.join(arms)}")
    load_student_t()  # a missing package is said before anything is written
    begin = time.perf_counter()
    runs: list[dict[str, Any]] = []
    hits: dict[str, dict[str, list[Tensor]]] = {key: {name: [] for name in arms} for key in MEASURES}
    for seed in range(seeds):
        warm = out / f"warmup-seed{seed}"
        log(f"warm-up, seed {seed}")
        _train(dataclasses.replace(config, method="at", epochs=config.warmup_epochs, seed=seed), warm)
        for name, changes in arms.items():
            folder = out / f"{name.lower().replace(' ', '-')}-seed{seed}"
            log(f"{name}, seed {seed}")
            changes = {"method": "part", "seed": seed, **changes}
            if changes.get("rule") == LEARNED:
                file = out / f"{folder.name}.safetensors"
                changes["rule"] = f"{LEARNED}:{file}"
                if not file.exists():
                    _learn(dataclasses.replace(config, **changes), warm, file)
            _train(config.after_warmup(warm / WEIGHTS, **changes), folder)
            # Whatever eps the arm trained with.
            evaluate(folder, tuple(MEASURES), eps=config.eps, model=config.model, resume=True)
            for key in MEASURES:
                hits[key][name].append(is_correct(folder, key))
            accuracies = {key: float(hits[key][name][-1].float().mean()) for key in MEASURES}
            runs.append({"arm": name, "seed": seed, **accuracies})

    table = {
        name: {key: mean_and_spread([run[key] for run in runs if run["arm"] == name]) for key in MEASURES}
        for name in arms
    }
    pairs = [("AT", name) for name in arms if name != "AT"]
    pairs += [(name, "PART") for name in arms if name not in ("AT", "PART")]
    differences = [
        {
            "difference": f"{after} - {before}",
            "measure": key,
            **interval(hits[key][before], hits[key][after], len(pairs) * len(MEASURES)),
        }
        for before, after in pairs
        for key in MEASURES
    ]
    text = f"{accuracy_table('arm', table, seeds)}\n\n{_differences(differences)}"
    record = {
        "table": table,
        "differences": differences,
        "text": text,
        "runs": runs,
        "arms": {name: dict(changes) for name, changes in arms.items()},
        "config": config.to_json(),
        "seeds": seeds,
        "seconds": time.perf_counter() - begin,
        "environment": environment(),
    }
    files.write_csv(out / "runs.csv", runs)
    files.write_csv(out / "differences.csv", [{**row, "per_seed": _cells(row["per_seed"])} for row in differences])
    files.write_json(out / "study.json", record)
    figures.draw_intervals(
        out / "study.png",
        {MEASURES[key]: [d for d in differences if d["measure"] == key] for key in MEASURES},
    )
    log(f"{text}\n\nstudy.json, runs.csv, differences.csv and study.png are in {out}")
    return record


def _learn(config: TrainConfig, warm: Path, file: Path) -> None:
    """Learn where the warm-up's network is hurt most, on the images that it was trained on, and keep it in a file."""
    device = find_device(config.device)
    data = load(config.dataset, "train", config.root, config.download)
    data = (data if config.train_size is None else data.subset(config.train_size)).to(device)
    model = load_trained(warm, 1, model=config.model, root=config.root, device=str(device)).model
    learn_rule(model, data, config, LEARNED_MEAN).save(file)


def _train(config: TrainConfig, folder: Path) -> None:
    train(config, folder, resume=(folder / STATE).exists(), overwrite=not (folder / STATE).exists())


def _differences(differences: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            row["difference"],
            MEASURES[row["measure"]],
            f"{100 * row['mean']:+.2f}",
            f"± {100 * row['half_width']:.2f}",
            f"± {100 * row['half_width_all']:.2f}",
            "yes" if row["significant"] else "no",
        )
        for row in differences
    ]
    header = ("difference", "measure", "points", "95 %", f"95 % for all {len(rows)}", "exceeds chance")
    return files.table(header, rows)


def _cells(values: Sequence[float]) -> str:
    return " ".join(f"{value:.5f}" for value in values)
