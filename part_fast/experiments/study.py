"""Does it matter which pixels keep the full eps? AT against PART with other maps in the CAM's place and other rules."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from part_fast import checks
from part_fast.config import PRESETS, TrainConfig, find_device
from part_fast.data.catalogue import load
from part_fast.errors import BadValueError
from part_fast.evaluation.trained import load_trained
from part_fast.experiments.arms import (
    MEASURES,
    OWN_SEEDS,
    Result,
    checked_results,
    differences,
    measured,
    other_warmups,
    summary,
    summary_table,
    train_arms,
)
from part_fast.experiments.compare import load_student_t
from part_fast.experiments.learned import learn_rule
from part_fast.report import figures, files
from part_fast.report.environment import environment

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
# On photographs. The attack of one step does not overfit catastrophically in so many epochs, as FGSM-RS can.
PHOTOGRAPHS = dataclasses.replace(
    PRESETS["fast-resnet18"],
    attack="n-fgsm",
    epochs=23,
    warmup_epochs=3,
    batch_size=256,
    average="ema:0.995",
    pgd_test_size=0,
)
# What is trained, by data set and scale: small networks for CPU cores, and ResNet-18, which takes a GPU.
CONFIGS = {
    "fashion-mnist": {
        "small": dataclasses.replace(
            PRESETS["demo"], dataset="fashion-mnist", train_size=6000, test_size=5000, epochs=5, lr_drops=(4,)
        )
    },
    "cifar10": {
        "small": dataclasses.replace(
            PHOTOGRAPHS, model="resnet-small", train_size=20_000, batch_size=128, weight_decay=2e-4
        ),
        "full": PHOTOGRAPHS,
    },
}


def study(
    out: Path,
    *,
    config: TrainConfig = CONFIGS["fashion-mnist"]["small"],
    arms: Mapping[str, Mapping[str, Any]] = ARMS,
    seeds: int = 5,
    only: Sequence[str] | None = None,
    results: Path | None = None,
    autoattack: bool = False,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train, or go on with, every arm with every seed, and say which differences exceed chance.

    Each seed has a warm-up of config.warmup_epochs of AT of its own, from which all arms go on for the rest of
    config.epochs. arms: name -> the fields of `config`, of method part, that it changes; "AT" and "PART" are among
    them. only: the arms that are trained now; the tables are of all that have results. autoattack: AT and PART are
    tested by AutoAttack too. results: the folder of one small file per arm and seed, default out/results; what has one
    is not trained again, whether or not its run folder is still in `out`.
    `out` then holds a run folder per warm-up and run, runs.csv, differences.csv, study.json and study.png.

    Returns: what study.json holds.

    Raises:
        ValueError: an argument is wrong, or a result or run has another configuration.
        FileNotFoundError: the data set is missing.
    """
    checks.count("seeds", seeds, 2)
    if not {"AT", "PART"} <= set(arms):
        raise BadValueError(f"arms must hold AT and PART, got {', '.join(arms)}")
    only = list(arms) if only is None else only
    if unknown := [name for name in only if name not in arms]:
        raise BadValueError(f"arms must be of {', '.join(arms)}, got {', '.join(unknown)}")
    load_student_t()  # a missing package is said before anything is written
    begin = time.perf_counter()
    kept = out / "results" if results is None else results
    train_arms(
        out,
        kept,
        config,
        {name: arms[name] for name in only},
        range(seeds),
        autoattack=("AT", "PART") if autoattack else (),
        prepare=_learned,
        log=log,
    )

    found = checked_results(kept, config, arms)
    measures = measured(found)
    table, compared, text = tables(found)
    runs = [
        {
            "arm": one.arm,
            "seed": one.seed,
            **{key: one.accuracy(key) if key in one.correct else None for key in measures},
        }
        for one in found
    ]
    record = {
        "table": table,
        "differences": compared,
        "text": text,
        "runs": runs,
        "arms": {name: dict(changes) for name, changes in arms.items()},
        "config": config.to_json(),
        "seconds": time.perf_counter() - begin,
        "environment": environment(),
    }
    out.mkdir(parents=True, exist_ok=True)
    files.write_csv(out / "runs.csv", runs)
    files.write_csv(
        out / "differences.csv",
        [{**row, "seeds": " ".join(map(str, row["seeds"])), "per_seed": _cells(row["per_seed"])} for row in compared],
    )
    files.write_json(out / "study.json", record)
    if compared:
        figures.draw_intervals(
            out / "study.png",
            {title: rows for key, title in measures.items() if (rows := [d for d in compared if d["measure"] == key])},
        )
    drawn = ", differences.csv and study.png" if compared else " and differences.csv"
    log(f"{text}\n\nstudy.json, runs.csv{drawn} are in {out}")
    return record


def tables(results: Sequence[Result]) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Of results in the order of their arms: (`summary`, `differences` from AT and of PART, both as text)."""
    names = list(dict.fromkeys(result.arm for result in results))
    pairs = [("AT", name) for name in names if name != "AT"]
    pairs += [(name, "PART") for name in names if name not in ("AT", "PART")]
    table, compared = summary(results), differences(results, pairs)
    means = summary_table(table, measured(results))
    notes = "".join(f"\n{line}" for line in other_warmups(results))
    return table, compared, f"{means}\nmean ± standard deviation of the seeds{notes}\n\n{_differences(compared)}"


def _learned(config: TrainConfig, warm: Path) -> TrainConfig:
    """For the learned arm, learn where the warm-up's network is hurt most, on the images that it was trained on."""
    if config.rule != LEARNED:
        return config
    file = warm.with_name(f"learned-seed{config.seed}.safetensors")
    config = dataclasses.replace(config, rule=f"{LEARNED}:{file}")
    if not file.exists():
        device = find_device(config.device)
        data = load(config.dataset, "train", config.root, config.download)
        data = (data if config.train_size is None else data.subset(config.train_size, name="train_size")).to(device)
        model = load_trained(warm, 1, model=config.model, root=config.root, device=str(device)).model
        learn_rule(model, data, config, LEARNED_MEAN).save(file)
    return config


def _differences(differences: Sequence[Mapping[str, Any]]) -> str:
    """A line for each pair of arms, a column for each measure."""
    if not differences:
        return "no differences: they take two arms with two seeds each"
    by = {(row["difference"], row["measure"]): row for row in differences}
    measures = list(dict.fromkeys(row["measure"] for row in differences))
    rows = []
    for name in dict.fromkeys(row["difference"] for row in differences):
        found = [by.get((name, measure)) for measure in measures]
        rows.append((name, *("-" if row is None else _interval(row) for row in found)))
    return (
        f"{files.table(('difference', *(f'{MEASURES[measure]}, points' for measure in measures)), rows)}\n"
        f"± 95 % interval of the difference alone; in brackets, of all {len(differences)} at once; "
        "*: it excludes 0, which exceeds chance;\n"
        f"n: seeds that both have; with fewer than {OWN_SEEDS} the variance is of all arms, and none has a *"
    )


def _interval(row: Mapping[str, Any]) -> str:
    mean, alone, of_all = (100 * row[name] for name in ("mean", "half_width", "half_width_all"))
    return f"{mean:+.2f} ± {alone:.2f} (± {of_all:.2f}) n={len(row['seeds'])}{'*' if row['significant'] else ' '}"


def _cells(values: Sequence[float]) -> str:
    return " ".join(f"{value:.5f}" for value in values)
