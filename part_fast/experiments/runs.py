"""Run folders, read back as they are: what each holds, what it lacks, and which are seeds of one and the same thing."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from part_fast.attacks.catalogue import attack_of_evaluation
from part_fast.choices import check_choice
from part_fast.config import TrainConfig, read_config
from part_fast.errors import BadValueError, MissingFileError
from part_fast.evaluation.sweep import SWEEP, read_sweep
from part_fast.methods import METHODS
from part_fast.reading import check_numbers, check_share, check_texts, missing_or_wrong, read_json
from part_fast.training.mask_history import MaskHistory, read_masks
from part_fast.training.run_folder import AVERAGED, BEST, WEIGHTS

# Fields in which the runs of a group may differ: they change nothing in what is trained but the random numbers.
OF_A_RUN = ("seed", "root", "download", "device", "init")
SHARE, AMOUNT = (0, 1), (0, math.inf)
# Columns of metrics.csv, and what a number in them may be.
COLUMNS: dict[str, tuple[float, float] | None] = {
    "epoch": AMOUNT,
    "method": None,
    "lr": AMOUNT,
    "train_loss": (-math.inf, math.inf),
    **dict.fromkeys(
        (
            *("train_robust", "train_pgd10", "test_natural", "test_pgd20", "averaged_natural", "averaged_pgd20"),
            *("validation_pgd20", "validation_averaged_pgd20", "zero_gradients", "sign_agreement"),
        ),
        SHARE,
    ),
    **dict.fromkeys(("skipped", "seconds", "images_per_second"), AMOUNT),
}
# Not measured in every epoch of every run.
MAY_BE_EMPTY = (
    *("test_natural", "test_pgd20", "averaged_natural", "averaged_pgd20"),
    *("validation_pgd20", "validation_averaged_pgd20", "train_pgd10", "zero_gradients", "sign_agreement"),
)
# As Python writes them; float() takes more, such as 1_0.
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-][0-9]+)?|nan|-?inf")


@dataclass(frozen=True)
class Run:
    """One run folder. A file that is not there is None; rows: those of metrics.csv, None where a cell is empty."""

    folder: Path
    config: TrainConfig
    rows: Sequence[Mapping[str, Any]]
    environment: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None
    sweep: Mapping[str, Any] | None
    masks: MaskHistory | None
    weights: Mapping[str, str]
    """Files of weights, by their SHA-256."""

    @property
    def name(self) -> str:
        return self.folder.name

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether an evaluation or a sweep is of weights that are in the folder."""
        return record["sha256"] in self.weights

    def starts_from(self, other: Run) -> bool:
        """Whether this run began with the weights that `other` left in its folder, or in one moved together."""
        if self.config.init is None:
            return False
        init = Path(self.config.init)
        beside = self.folder.parent / init.parent.name
        return init.name == WEIGHTS and other.folder in (init.parent.resolve(), beside)


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed, ascending in it, under a name that no other group has."""

    name: str
    runs: Sequence[Run]

    @property
    def config(self) -> TrainConfig:
        return self.runs[0].config


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in the folders, each once: a folder is a run, or holds some.

    Raises:
        FileNotFoundError: there is no such folder, or no run in it.
        ValueError: no folder is named; or a file cannot be read.
    """
    if not folders:
        raise BadValueError("runs must be at least one run folder, got none")
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise MissingFileError(f"there is no run folder at {folder}")
        here = [folder] if (folder / "config.json").is_file() else []
        within = here or sorted(path.parent for path in folder.glob("*/config.json"))
        if not within:
            raise MissingFileError(f"{folder} holds no run: there is no config.json in it or in a folder in it")
        found |= dict.fromkeys(path.resolve() for path in within)
    return [read_run(folder) for folder in found]


def read_run(folder: Path) -> Run:
    """The run in `folder`. Errors: FileNotFoundError if there is none; ValueError for a file that cannot be read."""
    config = read_config(folder)
    config.check()
    weights = [folder / name for name in (WEIGHTS, AVERAGED, BEST) if (folder / name).is_file()]
    return Run(
        folder,
        config,
        read_rows(folder / "metrics.csv"),
        _if_there(read_json, folder / "environment.json"),
        _if_there(_read_evaluation, folder / "evaluation.json"),
        _if_there(read_sweep, folder / SWEEP),
        read_masks(folder),
        {hashlib.sha256(path.read_bytes()).hexdigest(): path.name for path in weights},
    )


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """The runs by what was trained, groups in the order of their first runs.

    A group has the name that its folders have in common without their seed, as in part-seed0; where they have none, or
    two groups the same, the folder above, or what its configuration has of its own, tells them apart.
    """
    together: dict[str, list[Run]] = {}
    for run in runs:
        together.setdefault(json.dumps(_trained(run.config), sort_keys=True), []).append(run)
    members = [sorted(group, key=lambda run: (run.config.seed, str(run.folder))) for group in together.values()]
    names = [_stem(group) or group[0].config.method for group in members]
    if len(set(names)) < len(names):
        names = [f"{group[0].folder.parent.name}/{name}" for group, name in zip(members, names, strict=True)]
    if len(set(names)) < len(names):
        trained = [_trained(group[0].config) for group in members]
        different = [key for key in trained[0] if len({str(values[key]) for values in trained}) > 1]
        said = [", ".join(f"{key} {values[key]}" for key in different) for values in trained]
        names = [f"{name} ({what})" for name, what in zip(names, said, strict=True)]
    return [Group(name, group) for name, group in zip(names, members, strict=True)]


def differing_fields(configs: Sequence[TrainConfig]) -> list[str]:
    """The fields of the configurations that are not the same in all, but for those of single runs."""
    names = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in OF_A_RUN]
    return [name for name in names if len({str(getattr(config, name)) for config in configs}) > 1]


def _trained(config: TrainConfig) -> dict[str, Any]:
    """What makes two runs the same but for their seed.

    Each seed of a study has files of its own, whose names have the seed in them: a warm-up, a learned rule.
    """
    values = {key: value for key, value in config.to_json().items() if key not in OF_A_RUN}
    files = {"rule": config.rule, "init": config.init or "random weights"}
    return values | {key: re.sub(rf"seed{config.seed}\b", "seed", file) for key, file in files.items()}


def _stem(runs: Sequence[Run]) -> str | None:
    """What the folders' names have in common, without their seeds; None if they differ in more."""
    stems = {re.sub(rf"[-_.]?seed[-_]?{run.config.seed}$", "", run.name) or run.name for run in runs}
    return stems.pop() if len(stems) == 1 else None


def _if_there(read: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any] | None:
    return read(path) if path.is_file() else None


def _read_evaluation(path: Path) -> dict[str, Any]:
    values = read_json(path)
    try:
        for name, row in values["results"].items():
            attack_of_evaluation(name)
            check_share(row)
            check_numbers(row["seconds"])
        if not values["results"]:
            raise BadValueError("no results")
        check_numbers(*(values[name] for name in ("eps", "alpha", "n", "seed")))
        check_texts(values["warnings"])
        check_texts([values["sha256"], values["dataset"]])
        if not isinstance(values["environment"], dict):
            raise BadValueError("an environment is no object")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadValueError(f"{path} is no evaluation: {missing_or_wrong(error)}") from error
    return values


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.csv, in which a number that is not finite is None as an empty cell is; none without it.

    Errors: ValueError that names the file: it is cut off, a column is unknown or missing, a number is none or out of
    its range, or epochs are not 1, 2, 3, ...
    """
    if not path.is_file():
        return []
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if not text.endswith("\n"):
            raise BadValueError("its last line is cut off")
        header, *lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        for name in header:
            check_choice("a column", name, COLUMNS)
        if not lines or len(set(header)) < len(header) or any(len(cells) != len(header) for cells in lines):
            raise BadValueError("rows take a cell for each column, and each column once")
        rows = [dict(zip(header, map(_cell, header, cells), strict=True)) for cells in lines]
        if [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
            raise BadValueError("epochs are not 1, 2, 3, ...")
        for row in rows:
            for key in ("method", "train_loss", "test_natural", "seconds", "images_per_second"):
                row[key]
    except (KeyError, ValueError, csv.Error) as error:
        raise BadValueError(f"{path} is no table of epochs: {missing_or_wrong(error)}") from error
    return rows


def _cell(column: str, text: str) -> str | float | None:
    bounds = COLUMNS[column]
    if bounds is None:
        return check_choice(column, text, METHODS)
    if not text and column in MAY_BE_EMPTY:
        return None
    if not NUMBER.fullmatch(text):
        raise BadValueError(f"{column} is {text[:40]!r}, no number")
    value = float(text)
    if not math.isfinite(value):
        return None
    if not bounds[0] <= value <= bounds[1]:
        raise BadValueError(f"{column} must be from {bounds[0]} to {bounds[1]}, got {text}")
    return value
