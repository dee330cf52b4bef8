"""Time to accuracy: seconds of training until a network is as accurate as published training made it, or more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from part_fast import checks
from part_fast.choices import check_choice
from part_fast.config import PRESETS, TrainConfig
from part_fast.data.catalogue import load
from part_fast.errors import MissingFileError
from part_fast.evaluation.accuracy import evaluate
from part_fast.experiments.arms import (
    ACCURACIES,
    MEASURES,
    Result,
    has_result,
    how_tested,
    measured,
    over_seeds,
    percent,
    read_results,
    slug,
    summary,
    train_arms,
)
from part_fast.experiments.compare import is_correct, mean_and_spread
from part_fast.experiments.step_cost import step_costs
from part_fast.report import files
from part_fast.report.environment import environment


@dataclass(frozen=True)
class Scale:
    """What is trained, and how accurate it shall be, from 0 to 1, on natural images and under PGD-20.

    goal: where these two numbers are from. runs: as many as are trained if nobody says. autoattack: whether they are
    tested by it too.
    """

    config: TrainConfig
    natural: float
    pgd20: float
    goal: str
    runs: int
    autoattack: bool


# One step, from noise: FGSM-RS where natural accuracy is the harder half of the goal, N-FGSM where robust accuracy is.
# An average that follows in half an epoch is ahead of the weights where the learning rate is high, and one with decay
# 0.999 is behind them at the end of so few epochs. A GPU takes fewer seconds for an epoch of larger batches.
FAST = dataclasses.replace(
    PRESETS["fast-resnet18"],
    method="at",
    warmup_epochs=0,
    attack="fgsm-rs",
    epochs=23,
    batch_size=256,
    label_smoothing=0.0,
    average="ema:0.995",
)
SCALES = {
    "full": Scale(FAST, 0.8258, 0.4369, "the row AT of PART's published table", 3, True),
    "small": Scale(
        dataclasses.replace(
            FAST,
            attack="n-fgsm",
            model="resnet-small",
            train_size=20_000,
            test_size=2000,
            epochs=28,
            batch_size=128,
            weight_decay=2e-4,
        ),
        0.5445,
        0.3295,
        "what 30 epochs of AT by PGD-10 came to, with a learning rate that drops twice",
        1,
        False,
    ),
}
WHOLE = "speedrun"
# What makes it fast, and what is trained without each: the rest stays.
PARTS: dict[str, dict[str, Any]] = {
    "fast attack": {"attack": "pgd", "steps": 10},
    "schedule": {"schedule": "piecewise"},
}
# An average changes nothing of training: a run without one is the run by its own weights.
OWN = "without averaged weights"
KERNELS = "kernels"
ROUNDS = 7  # of timed steps


def speedrun(
    out: Path,
    *,
    scale: str = "full",
    runs: int | None = None,
    parts: bool = False,
    autoattack: bool | None = None,
    root: str | None = None,
    download: bool = False,
    device: str = "auto",
    scales: Mapping[str, Scale] = SCALES,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train `runs` networks, or go on with them, and say how long each took and how accurate it is.

    scale: full, ResNet-18 on all of CIFAR-10; small, a small network on 20,000 of its images, for two CPU cores.
    parts: train as many without each of `PARTS` too, and time a step without part_fast's kernels.
    autoattack: test by AutoAttack too, on 1,000 images; default: at full scale.
    Seconds are those of training: tests, and reading data, are left out. `out` holds a run folder per run, a small file
    of results of each in results, speedrun.json and speedrun.csv.

    Returns: what speedrun.json holds.
    Errors: ValueError for an unknown scale; what `train` and `evaluate` raise.
    """
    chosen = scales[check_choice("scale", scale, scales)]
    runs = checks.count("runs", chosen.runs if runs is None else runs, 1)
    config = dataclasses.replace(chosen.config, root=root, download=download, device=device)
    arms = {WHOLE: {}, **({f"without {name}": _without(config, name) for name in PARTS} if parts else {})}
    kept = out / "results"
    judged = chosen.autoattack if autoattack is None else autoattack
    if parts:  # before anything is trained
        _refuse_lost_weights(out, kept, config, range(runs))
    train_arms(out, kept, config, arms, range(runs), autoattack=[WHOLE] if judged else [], log=log)
    whole = [one for one in read_results(kept, [WHOLE]) if one.seed < runs]
    rows = [_row(one, chosen) for one in whole]
    text = [
        f"goal: {100 * chosen.natural:.2f} % natural and {100 * chosen.pgd20:.2f} % under PGD-20, {chosen.goal}",
        "",
        _runs_table(rows, measured(whole)),
    ]
    record: dict[str, Any] = {"scale": scale, "goal": {"natural": chosen.natural, "pgd20": chosen.pgd20}, "runs": rows}
    if parts:
        data = load(config.dataset, "train", config.root, config.download)
        data = data if config.train_size is None else data.subset(config.train_size, name="train_size")
        costs = step_costs({WHOLE: config}, data, ROUNDS, without_kernels=KERNELS)
        for one in whole:
            _test_own_weights(one, out, kept, config)
        results = [one for one in read_results(kept, [*arms, OWN]) if one.seed < runs]
        record["parts"] = _parts(results, chosen, costs[KERNELS].seconds / costs[WHOLE].seconds)
        text += ["", _parts_table(record["parts"])]
    record |= {"text": "\n".join(text), "config": config.to_json(), "environment": environment()}
    files.write_csv(out / "speedrun.csv", rows)
    files.write_json(out / "speedrun.json", record)
    log(record["text"])
    log(f"\nspeedrun.json and speedrun.csv are in {out}")
    return record


def _without(config: TrainConfig, part: str) -> dict[str, Any]:
    """The fields that change where a part is left out; a schedule by drops has them where two thirds and five sixths of
    the epochs are over."""
    drops = (2 * config.epochs // 3, 5 * config.epochs // 6)
    return PARTS[part] | ({"lr_drops": drops} if "schedule" in PARTS[part] else {})


def _row(result: Result, scale: Scale) -> dict[str, Any]:
    """A run: seconds in all, and until the goal was met, None if the last test does not meet it."""
    images = sum(row["seconds"] * row["images_per_second"] for row in result.rows)
    accuracies = {key: result.accuracy(key) for key in MEASURES if key in result.correct}
    return {
        "seed": result.seed,
        "epochs": len(result.rows),
        "seconds": result.seconds,
        "images_per_second": images / result.seconds,
        "seconds_to_goal": _to_goal(result, scale),
        **accuracies,
        "reached": _reached(result, scale),
    }


def _reached(result: Result, scale: Scale) -> bool:
    return result.accuracy("natural") >= scale.natural and result.accuracy("pgd20") >= scale.pgd20


def _to_goal(result: Result, scale: Scale) -> float | None:
    """As `seconds_to_goal`, where the last test, on more images, meets the goal too; all seconds where it alone does.

    A single epoch's few images meet the goal by chance now and then.
    """
    if not _reached(result, scale):
        return None
    seconds = seconds_to_goal(result, scale.natural, scale.pgd20)
    return result.seconds if seconds is None else seconds


def seconds_to_goal(result: Result, natural: float, pgd20: float) -> float | None:
    """Of training, until the end of the first epoch whose weights, or their average, are as accurate as that.

    Each epoch's accuracies are those on the test images of metrics.csv, fewer than the last ones are on.
    """
    seconds = 0.0
    for row in result.rows:
        seconds += float(row["seconds"])
        for model in ("averaged", "test"):  # whose columns of metrics.csv: those of the average, of the weights
            on_natural, attacked = row.get(f"{model}_natural"), row.get(f"{model}_pgd20")
            if on_natural is not None and attacked is not None and on_natural >= natural and attacked >= pgd20:
                return seconds
    return None


def _refuse_lost_weights(out: Path, kept: Path, config: TrainConfig, seeds: Sequence[int]) -> None:
    """Errors: FileNotFoundError where a run has its result, whose own weights are not tested yet, and no folder."""
    for seed in seeds:
        whole = dataclasses.replace(config, seed=seed)
        own = dataclasses.replace(whole, average="none")
        tested = has_result(kept, OWN, own, how_tested(config), ACCURACIES)
        folder = out / f"{slug(WHOLE)}-seed{seed}"
        if has_result(kept, WHOLE, whole, how_tested(config), ACCURACIES) and not tested and not folder.is_dir():
            raise MissingFileError(
                f"there is no run folder at {folder}, whose own weights are to be tested: put it back, or remove its "
                f"result from {kept}, and it is trained again"
            )


def _test_own_weights(whole: Result, out: Path, kept: Path, config: TrainConfig) -> None:
    """Leave a result of the run without its average, tested as the average is, if there is none yet."""
    plan = dataclasses.replace(config, seed=whole.seed, average="none")
    if has_result(kept, OWN, plan, how_tested(config), ACCURACIES):
        return
    folder = out / f"{slug(WHOLE)}-seed{whole.seed}"
    tested = folder / "last"
    asked: dict[str, Any] = {**how_tested(config), "device": config.device, "model": config.model, "weights": "last"}
    evaluate(folder, ACCURACIES, out=tested, resume=True, **asked)
    rows = [{name: value for name, value in row.items() if not name.startswith("averaged_")} for row in whole.rows]
    correct = {name: is_correct(tested, name) for name in ACCURACIES}
    own = dataclasses.replace(whole, arm=OWN, config={**whole.config, "average": "none"}, rows=rows, correct=correct)
    own.write(kept)


def _parts(results: Sequence[Result], scale: Scale, slower: float) -> list[dict[str, Any]]:
    """A row for all together and for each part that is left out. slower: a step without kernels, in those with them."""
    rows: list[dict[str, Any]] = []
    for name, accuracies in summary(results).items():
        of_arm = [one for one in results if one.arm == name]
        seconds = [found for one in of_arm if (found := _to_goal(one, scale)) is not None]
        rows.append(
            {
                "arm": name,
                "runs": len(of_arm),
                "seconds": mean_and_spread([one.seconds for one in of_arm])["mean"],
                "reached": len(seconds),
                "seconds_to_goal": mean_and_spread(seconds)["mean"] if seconds else None,
                "natural": accuracies["natural"],
                "pgd20": accuracies["pgd20"],
            }
        )
    whole = rows[0]
    to_goal = whole["seconds_to_goal"]
    rows.append(
        {
            **whole,
            "arm": f"without {KERNELS}",
            "seconds": slower * whole["seconds"],
            "seconds_to_goal": None if to_goal is None else slower * to_goal,
        }
    )
    return rows


def _runs_table(rows: Sequence[Mapping[str, Any]], measures: Mapping[str, str]) -> str:
    lines = [
        (
            str(row["seed"]),
            f"{row['seconds']:.1f}",
            f"{row['images_per_second']:.0f}",
            _seconds(row["seconds_to_goal"]),
            *(f"{100 * row[key]:.2f}" if key in row else "-" for key in measures),
            "yes" if row["reached"] else "no",
        )
        for row in rows
    ]
    if len(rows) > 1:
        spreads = [mean_and_spread([row[key] for row in rows]) for key in ("seconds", "images_per_second")]
        reached = [row["seconds_to_goal"] for row in rows if row["seconds_to_goal"] is not None]
        to_goal = mean_and_spread(reached) if reached else None
        lines.append(
            (
                "mean",
                f"{spreads[0]['mean']:.1f} ± {spreads[0]['spread']:.1f}",
                f"{spreads[1]['mean']:.0f} ± {spreads[1]['spread']:.0f}",
                "never" if to_goal is None else f"{to_goal['mean']:.1f} ± {to_goal['spread']:.1f}",
                *(percent(over_seeds([row[key] for row in rows if key in row]), len(rows)) for key in measures),
                f"{sum(row['reached'] for row in rows)} of {len(rows)}",
            )
        )
    titles = [f"{title} %" for title in measures.values()]
    return files.table(("seed", "seconds", "images/s", "seconds to the goal", *titles, "goal reached"), lines)


def _parts_table(rows: Sequence[Mapping[str, Any]]) -> str:
    whole = rows[0]["seconds_to_goal"]
    lines = [
        (
            row["arm"],
            f"{row['seconds']:.1f}",
            f"{row['reached']} of {row['runs']}",
            _seconds(row["seconds_to_goal"]),
            "-" if whole is None or row["seconds_to_goal"] is None else f"{row['seconds_to_goal'] / whole:.2f}",
            percent(row["natural"], row["runs"]),
            percent(row["pgd20"], row["runs"]),
        )
        for row in rows
    ]
    header = ("arm", "seconds", "goal reached", "seconds to the goal", "times as long", "natural %", "PGD-20 %")
    return (
        f"{files.table(header, lines)}\n"
        "as many epochs in each; the goal is reached if the last test, on all images, meets it, and since the first "
        f"epoch whose test, on fewer, does; {OWN}: the same run by its own weights; without {KERNELS}: the same run, "
        "its time by steps that were timed in turn with ours"
    )


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f}"
