"""AT against PART in a few minutes: one warm-up, both from it with several seeds, a table, curves and a mask grid."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from part_fast.config import PRESETS, TrainConfig
from part_fast.errors import BadValueError
from part_fast.evaluation.accuracy import evaluate
from part_fast.evaluation.masks import masks
from part_fast.experiments.compare import MEASURES, accuracy_table, difference, is_correct, mean_and_spread
from part_fast.report import figures, files
from part_fast.report.environment import environment
from part_fast.training.loop import train
from part_fast.training.run_folder import WEIGHTS, check_folder

METHODS = {"AT": "at", "PART": "part"}
FILES = ("results.json", "results.csv", "curves.png", "masks.png", "masks.json")


def demo(
    out: Path,
    *,
    overwrite: bool = False,
    config: TrainConfig = PRESETS["demo"],
    seeds: Sequence[int] = (0, 1, 2),
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train, evaluate and compare; everything printed is in results.json too, which is returned.

    config.warmup_epochs of AT come first, once; from there AT and PART each train the rest of config.epochs with each
    seed, which sets the order of the images and the random starts. `out` holds a run folder per model, results.json,
    results.csv (a row per model), curves.png and masks.png.

    Raises:
        ValueError: `out` holds a demo or a run already, not overwrite.
    """
    present = [name for name in (*FILES, "warmup") if (out / name).exists()]
    if present and not overwrite:
        raise BadValueError(f"{out} already holds a demo ({', '.join(present)}): --overwrite replaces it")
    begin = time.perf_counter()
    rest = config.epochs - config.warmup_epochs
    log(
        f"{config.dataset} images, {config.model}: {config.warmup_epochs} epochs of AT, then {rest} of AT and of PART "
        f"with {len(seeds)} seeds; PGD-{config.steps}, eps {255 * config.eps:g}/255, "
        f"PART's eps_low {255 * config.eps_low:g}/255, alpha {255 * config.alpha:g}/255"
    )
    warm = dataclasses.replace(config, method="at", epochs=config.warmup_epochs)
    check_folder(warm, out / "warmup", resume=False, overwrite=overwrite)  # before anything is removed
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    warm_rows = train(warm, out / "warmup", overwrite=overwrite)

    runs: list[dict[str, Any]] = []
    warm_curve = {row["epoch"]: [row["test_natural"]] for row in warm_rows}
    curves: dict[str, dict[int, list[float]]] = {"warm-up (AT)": warm_curve}
    hits: dict[str, dict[str, list[Tensor]]] = {name: {key: [] for key in MEASURES} for name in METHODS}
    for seed in seeds:
        for name, method in METHODS.items():
            folder = out / f"{method}-seed{seed}"
            log(f"{name}, seed {seed}")
            branch = config.after_warmup(out / "warmup" / WEIGHTS, method=method, seed=seed)
            rows = train(branch, folder, overwrite=overwrite)
            tested = evaluate(folder, tuple(MEASURES))
            line = curves.setdefault(name, {config.warmup_epochs: [warm_rows[-1]["test_natural"]]})
            for row in rows:
                line.setdefault(config.warmup_epochs + row["epoch"], []).append(row["test_natural"])
            for key in MEASURES:
                hits[name][key].append(is_correct(folder, key))
            accuracies = {key: tested["results"][key]["accuracy"] for key in MEASURES}
            errors = {f"{key}_standard_error": tested["results"][key]["standard_error"] for key in MEASURES}
            speed = statistics.mean(row["images_per_second"] for row in rows)
            runs.append({"method": name, "seed": seed, **accuracies, **errors, "images_per_second": speed})

    results = {name: {key: [float(r.float().mean()) for r in hits[name][key]] for key in MEASURES} for name in METHODS}
    summary = {name: {key: mean_and_spread(values) for key, values in by.items()} for name, by in results.items()}
    differences = {key: difference(hits["AT"][key], hits["PART"][key]) for key in MEASURES}
    figures.draw_comparison(out / "curves.png", curves, results)
    masks(out / f"part-seed{seeds[0]}", out / "masks.png")
    verdicts = [_verdict(MEASURES[key], d) for key, d in differences.items()]
    table = accuracy_table("method", summary, len(seeds))
    text = "\n".join(["", f"{table}, one warm-up", _made_with(), "", *verdicts])
    record = {
        "table": summary,
        "differences": differences,
        "text": text,
        "runs": runs,
        "config": config.to_json(),
        "seconds": time.perf_counter() - begin,
        "environment": environment(),
    }
    files.write_csv(out / "results.csv", runs)
    files.write_json(out / "results.json", record)
    log(text)
    log(f"\n{record['seconds']:.0f} s; results.json, results.csv, curves.png and masks.png are in {out}")
    return record


def _made_with() -> str:
    """What the last digits depend on besides the seeds."""
    count = torch.get_num_threads()
    threads = "1 thread" if count == 1 else f"{count} threads"
    return f"made with {threads}: other numbers of threads, and other processors, round otherwise and give other digits"


def _verdict(measure: str, d: Mapping[str, Any]) -> str:
    says = "exceeds both" if d["significant"] else "does not exceed both, so nothing follows from it"
    return (
        f"PART - AT, {measure}: {100 * d['mean']:+.2f} points; spread over seeds {100 * d['spread']:.2f}, twice the "
        f"standard error of the test images {200 * d['standard_error']:.2f}: the difference {says}"
    )
