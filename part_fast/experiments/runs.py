"""Run folders, read back as they are: what each holds, what it lacks, and which are seeds of one and the same thing."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from part_fast.config import TrainConfig, read_config
from part_fast.errors import BadValueError, MissingFileError
from part_fast.evaluation.sweep import SWEEP
from part_fast.training.mask_history import MaskHistory, read_masks
from part_fast.training.run_folder import AVERAGED, WEIGHTS

# Fields in which the runs of a group may differ: they change nothing in what is trained but the random numbers.
OF_A_RUN = ("seed", "root", "download", "device", "init")
# Columns of metrics.csv that are no measurements.
TEXTS = ("method",)


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
    weights = [folder / name for name in (WEIGHTS, AVERAGED) if (folder / name).is_file()]
    return Run(
        folder,
        config,
        _read_rows(folder / "metrics.csv"),
        _read_json(folder / "environment.json"),
        _read_evaluation(folder / "evaluation.json"),
        _read_sweep(folder / SWEEP),
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
        together.setdefault(_identity(run.config), []).append(run)
    members = [sorted(group, key=lambda run: (run.config.seed, str(run.folder))) for group in together.values()]
    names = [_stem(group) or group[0].config.method for group in members]
    if len(set(names)) < len(names):
        names = [f"{group[0].folder.parent.name}/{name}" for group, name in zip(members, names, strict=True)]
    if len(set(names)) < len(names):
        different = differing_fields([group[0].config for group in members])
        said = [", ".join(f"{key} {getattr(group[0].config, key)}" for key in different) for group in members]
        names = [f"{name} ({what})" for name, what in zip(names, said, strict=True)]
    return [Group(name, group) for name, group in zip(names, members, strict=True)]


def differing_fields(configs: Sequence[TrainConfig]) -> list[str]:
    """The fields of the configurations that are not the same in all, but for those of single runs."""
    names = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in OF_A_RUN]
    return [name for name in names if len({str(getattr(config, name)) for config in configs}) > 1]


def _identity(config: TrainConfig) -> str:
    values = {key: value for key, value in config.to_json().items() if key not in OF_A_RUN}
    # Each seed of a study has a warm-up of its own, whose folder has the seed in its name.
    values["init"] = None if config.init is None else re.sub(rf"seed{config.seed}\b", "seed", config.init)
    return json.dumps(values, sort_keys=True)


def _stem(runs: Sequence[Run]) -> str | None:
    """What the folders' names have in common, without their seeds; None if they differ in more."""
    stems = {re.sub(rf"[-_.]?seed[-_]?{run.config.seed}$", "", run.name) or run.name for run in runs}
    return stems.pop() if len(stems) == 1 else None


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise BadValueError(f"{path} must hold an object, got {type(values).__name__}")
    return values


def _read_evaluation(path: Path) -> dict[str, Any] | None:
    values = _read_json(path)
    if values is not None:
        try:
            for row in values["results"].values():
                _share(row["accuracy"], row["standard_error"])
                _number(row["seconds"])
            _number(values["eps"], values["alpha"], values["n"], values["seed"])
            _texts(values["warnings"])
            _texts([values["sha256"], values["dataset"]])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise BadValueError(f"{path} is no evaluation: {_said(error)}") from error
    return values


def _read_sweep(path: Path) -> dict[str, Any] | None:
    values = _read_json(path)
    if values is not None:
        try:
            for kind, curve in values["curves"].items():
                for point in curve["points"]:
                    _share(point["accuracy"], point["standard_error"])
                    _number(point[kind])
                _texts(curve["warnings"])
            _number(values["eps"], values["alpha"], values["n"])
            _texts([values["sha256"]])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise BadValueError(f"{path} is no sweep: {_said(error)}") from error
    return values


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.csv, in which a number that is not finite is None as an empty cell is; none without it."""
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{key: _cell(key, text) for key, text in row.items()} for row in csv.DictReader(file)]
        if [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
            raise BadValueError("epochs are not 1, 2, 3, ...")
        for row in rows:
            for key in (*TEXTS, "train_loss", "test_natural", "seconds", "images_per_second"):
                row[key]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise BadValueError(f"{path} is no table of epochs: {_said(error)}") from error
    return rows


def _cell(key: str, text: str) -> str | float | None:
    if key in TEXTS:
        return str(text)
    value = float(text) if text else None
    return value if value is not None and math.isfinite(value) else None


def _number(*values: Any) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BadValueError(f"a number is {value!r}")


def _share(*values: Any) -> None:
    _number(*values)
    if not all(0 <= value <= 1 for value in values):
        raise BadValueError(f"a share is not in [0, 1]: {values}")


def _texts(values: Any) -> None:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise BadValueError(f"a text is {values!r}")


def _said(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
