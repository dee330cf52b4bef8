"""The rows of PART's published tables: each a training run and its evaluation, printed beside what was published."""

from __future__ import annotations

import dataclasses
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from part_fast import checks
from part_fast.attacks.catalogue import load_attacks
from part_fast.config import TrainConfig, preset
from part_fast.data.catalogue import DATASETS
from part_fast.errors import BadValueError
from part_fast.evaluation.accuracy import check_attacks, evaluate
from part_fast.report import files
from part_fast.training.engine import Engine
from part_fast.training.loop import train
from part_fast.training.run_folder import begun_or_not
from part_fast.training.step import batch_epsilon, train_step

# Zhang et al., ICML 2024, as on its poster: natural, PGD-20, MMA, AutoAttack, in %.
MEASURES = ("natural", "pgd20", "mma", "aa")
POSTER: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "cifar10": {
        "AT": (82.58, 43.69, 41.80, 41.63),
        "PART (s=1)": (83.42, 43.65, 41.98, 41.74),
        "PART (s=10)": (83.77, 43.36, 41.83, 41.41),
        "TRADES": (78.16, 48.28, 45.00, 45.05),
        "PART-T (s=1)": (79.36, 48.90, 45.90, 45.97),
        "PART-T (s=10)": (80.13, 48.72, 45.59, 45.60),
        "MART": (76.82, 49.86, 45.42, 45.10),
        "PART-M (s=1)": (78.67, 50.26, 45.53, 45.19),
        "PART-M (s=10)": (80.00, 49.71, 45.14, 44.61),
    },
    "svhn": {
        "AT": (91.06, 49.83, 47.68, 45.48),
        "PART (s=1)": (93.14, 50.34, 48.08, 45.67),
        "PART (s=10)": (93.75, 50.21, 48.00, 45.61),
        "TRADES": (88.91, 58.74, 53.29, 52.21),
        "PART-T (s=1)": (91.35, 59.33, 54.04, 53.07),
        "PART-T (s=10)": (91.94, 59.01, 53.80, 52.61),
        "MART": (89.76, 58.52, 52.42, 49.10),
        "PART-M (s=1)": (91.42, 58.85, 52.45, 49.92),
        "PART-M (s=10)": (93.20, 58.41, 52.18, 49.25),
    },
    "tinyimagenet": {
        "AT": (43.51, 11.70, 10.66, 10.53),
        "PART (s=1)": (44.87, 11.93, 10.96, 10.76),
        "PART (s=10)": (45.59, 11.81, 10.91, 10.68),
        "TRADES": (43.05, 13.86, 12.62, 12.55),
        "PART-T (s=1)": (44.31, 14.08, 13.01, 12.84),
        "PART-T (s=10)": (45.16, 13.98, 12.88, 12.72),
        "MART": (42.68, 14.77, 13.58, 13.42),
        "PART-M (s=1)": (43.75, 14.93, 13.76, 13.68),
        "PART-M (s=10)": (45.02, 14.65, 13.41, 13.37),
    },
}
PRESET = {"cifar10": "cifar10-resnet18", "svhn": "svhn-resnet18", "tinyimagenet": "tinyimagenet-wrn34-10"}
SCALES = ("full", "small")
# What differs in --scale small from the demo's preset: enough to run every row on two CPU cores.
SMALL: dict[str, Any] = {
    "epochs": 3,
    "warmup_epochs": 1,
    "steps": 3,
    "lr_drops": (2,),
    "train_size": 1000,
    "test_size": 32,
}


@dataclass(frozen=True)
class Row:
    """One run of one row: its name in the published table, how it is trained, where it is kept."""

    name: str
    config: TrainConfig
    folder: str

    def command(self, out: Path) -> str:
        """The same training as a command line."""
        base = preset(self.config.preset)
        changed = [
            field.name
            for field in dataclasses.fields(base)
            if field.name != "preset" and getattr(self.config, field.name) != getattr(base, field.name)
        ]
        flags = [flag for name in changed for flag in _flag(name, getattr(self.config, name))]
        return shlex.join(
            ["part-fast", "train", "--preset", self.config.preset, *flags, "--out", str(out / self.folder)]
        )


def plan(table: str, seeds: int | None = None, scale: str = "full") -> list[Row]:
    """Every run of a table, its rows in order, the seeds of a row together; seeds: default 3, small 1.

    Errors: ValueError for an unknown table or scale, listing the known.
    """
    if table not in POSTER:
        raise BadValueError(f"table must be one of {', '.join(POSTER)}, got {table!r}")
    if scale not in SCALES:
        raise BadValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    if seeds is None:
        seeds = 3 if scale == "full" else 1
    base = preset(PRESET[table]) if scale == "full" else dataclasses.replace(preset("demo"), **SMALL)
    rows = []
    for name in POSTER[table]:
        method, _, s = name.lower().removesuffix(")").partition(" (s=")
        # Small runs are over before a tenth epoch: their rare refresh is every second one.
        refresh = ("2" if scale == "small" and s == "10" else s) or "batch"
        for seed in range(checks.count("seeds", seeds, 1)):
            config = dataclasses.replace(base, method=method, refresh=refresh, seed=seed)
            rows.append(Row(name, config, f"{method}{f'-s{s}' if s else ''}-seed{seed}"))
    return rows


def reproduce(
    table: str,
    out: Path,
    *,
    seeds: int | None = None,
    scale: str = "full",
    attacks: Sequence[str] = MEASURES,
    dry_run: bool = False,
    root: str | None = None,
    download: bool = False,
    device: str = "auto",
    log: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Run, or go on with, every row of a table, and print ours beside what was published.

    table: one of `POSTER`. scale: full, the poster's setting; small, the same rows on the demo's images
    and small network with 32 test images, whose numbers are not comparable with the published ones. Finished runs and
    evaluations are kept.
    dry_run: print the commands and an estimate of their time from a measured step, and do nothing.
    `out` then holds a run folder per row and seed, and reproduce.json and reproduce.csv, which is returned.

    Errors: ValueError for an unknown table, scale or attack; what `train` and `evaluate` raise.
    """
    rows = plan(table, seeds, scale)
    seeds = len({row.config.seed for row in rows})
    check_attacks(attacks)
    places: dict[str, Any] = {"root": root, "download": download, "device": device}
    rows = [dataclasses.replace(row, config=dataclasses.replace(row.config, **places)) for row in rows]
    if dry_run:
        for row in rows:
            log(row.command(out))
        log(_estimate(rows))
        return []
    load_attacks(attacks)  # a missing package is said before anything is written
    found: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        log(f"{row.name}, seed {row.config.seed}")
        folder = out / row.folder
        resume, overwrite = begun_or_not(folder)
        trained = train(row.config, folder, resume=resume, overwrite=overwrite)
        evaluation = evaluate(folder, tuple(attacks), resume=True, device=device)
        results = evaluation["results"]
        took = {key: results[key]["seconds"] for key in attacks}
        log(f"{row.name}, seed {row.config.seed}: {_seconds(trained, took)}")
        found.setdefault(row.name, []).append({key: 100 * results[key]["accuracy"] for key in attacks})
    records = list(_records(POSTER[table], found, attacks))
    text = comparison(records, attacks, seeds, scale)
    files.write_csv(out / "reproduce.csv", records)
    files.write_json(
        out / "reproduce.json",
        {"table": table, "scale": scale, "seeds": seeds, "rows": records, "text": text, "runs": found},
    )
    log(text)
    return records


def _seconds(epochs: Sequence[dict[str, Any]], attacks: Mapping[str, float]) -> str:
    parts = {"training": sum(epoch["seconds"] for epoch in epochs), **attacks}
    return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items())


Poster = dict[str, tuple[float, float, float, float]]


def _records(
    poster: Poster, found: dict[str, list[dict[str, float]]], attacks: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for name, runs in found.items():
        record: dict[str, Any] = {"method": name}
        for key in attacks:
            values = [run[key] for run in runs]
            record[key] = statistics.mean(values)
            record[f"{key}_spread"] = statistics.stdev(values) if len(values) > 1 else None
            published = dict(zip(MEASURES, poster[name], strict=True)).get(key)
            record[f"{key}_poster"] = published
            record[f"{key}_difference"] = None if published is None else record[key] - published
        yield record


def comparison(records: Sequence[dict[str, Any]], attacks: Sequence[str], seeds: int, scale: str) -> str:
    """The table as text: ours with its spread over seeds, the published one, and the difference."""
    lines = []
    for record in records:
        cells = [record["method"]]
        for key in attacks:
            spread = "" if record[f"{key}_spread"] is None else f" ± {record[f'{key}_spread']:.2f}"
            cells.append(f"{record[key]:.2f}{spread}")
            published = record[f"{key}_poster"]
            cells.append("-" if published is None else f"{published:.2f} ({record[f'{key}_difference']:+.2f})")
        lines.append(tuple(cells))
    header = ("method", *(cell for key in attacks for cell in (f"{key} %", "published (ours - it)")))
    below = f"ours: mean{' ± standard deviation' if seeds > 1 else ''} of {seeds} seed{'s' if seeds > 1 else ''}"
    if scale == "small":
        below += "; small scale, on other images and a smaller network: not comparable with the published ones"
    return f"{files.table(header, lines)}\n{below}"


def _estimate(rows: Sequence[Row]) -> str:
    """Hours of training, from one measured step of each method on a small batch, in proportion to the images."""
    per_image: dict[str, float] = {}
    total = 0.0
    for row in rows:
        config = row.config
        if config.method not in per_image:
            per_image[config.method] = _seconds_per_image(config)
        total += per_image[config.method] * config.epochs * _images(config)
    return (
        f"{len(rows)} runs, about {total / 3600:.1f} hours of training on this machine's CPU, from a measured step on "
        "4 images per method; evaluation is not in it"
    )


def _images(config: TrainConfig) -> int:
    images = config.train_size or DATASETS[config.dataset].train_images
    assert images is not None  # a table's images are no folder's
    return images


def _seconds_per_image(config: TrainConfig) -> float:
    source = DATASETS[config.dataset]
    side, classes = source.size, source.classes
    assert side is not None and classes is not None  # noqa: PT018 - as above
    with torch.random.fork_rng():
        engine = Engine(dataclasses.replace(config, batch_size=4), classes, torch.device("cpu"))
        x, y = torch.rand(4, 3, side, side), torch.randint(0, classes, (4,))
        taken = []
        for _ in range(2):  # the first one allocates
            begin = time.perf_counter()
            epsilon = batch_epsilon(config.method, engine.budget, None, torch.arange(4), None, config)
            train_step(engine, config.method, x, y, epsilon)
            taken.append(time.perf_counter() - begin)
    return taken[-1] / len(x)


def _flag(name: str, value: object) -> list[str]:
    """A field as the command line takes it."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
