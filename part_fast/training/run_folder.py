"""The run folder: its files, what may be written there, and the state that a run goes on from."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from part_fast.budgets.bank import MaskBank
from part_fast.config import TrainConfig, read_config
from part_fast.errors import BadValueError
from part_fast.evaluation.accuracy import KEPT
from part_fast.models.checkpoints import own_copies
from part_fast.optional import needs
from part_fast.precision import full_float32
from part_fast.report import files
from part_fast.report.environment import environment
from part_fast.training.engine import Engine

with needs("safetensors", "train"):
    from safetensors.torch import save_file

STATE, WEIGHTS, AVERAGED = "training_state.pt", "model.safetensors", "averaged.safetensors"

RUN_FILES = ("config.json", "metrics.csv", WEIGHTS, STATE, "environment.json", "curves.png")

# Files that other commands make of a run, which are stale once it is overwritten.
DERIVED = (
    AVERAGED,
    "masks.safetensors",
    "sweep.json",
    "evaluation.json",
    "evaluation.csv",
    "evaluation_images.safetensors",
    *KEPT,
    "events.out.tfevents.*",
)

# Fields in which a resumed run may differ: it may be longer, and may go on on another machine.
MAY_CHANGE = ("epochs", "device", "root", "download")


def check_folder(config: TrainConfig, out: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that this run must not write to, before anything is written."""
    if resume and overwrite:
        raise BadValueError("resume and overwrite exclude each other")
    if out.exists() and not out.is_dir():
        raise BadValueError(f"out takes a folder, {out} is a file")
    present = [name for name in RUN_FILES if (out / name).exists()]
    if present and not (resume or overwrite):
        holds = ", ".join(present)
        raise BadValueError(f"{out} already holds a run ({holds}): --resume continues it, --overwrite replaces it")
    if resume:
        before, now = read_config(out).to_json(), config.to_json()
        different = [key for key in now if key not in MAY_CHANGE and before.get(key) != now[key]]
        if different:
            pairs = "; ".join(f"{key} {before.get(key)!r} there, {now[key]!r} here" for key in different)
            raise BadValueError(f"the run in {out} has another configuration: {pairs}")


def prepare_folder(config: TrainConfig, out: Path, resume: bool, overwrite: bool) -> None:
    """Make the folder, remove an overwritten run's files, and write the configuration and the environment."""
    out.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for pattern in RUN_FILES + DERIVED:
            for path in out.glob(pattern):
                path.unlink()
    with contextlib.nullcontext() if config.tf32 else full_float32():
        record = environment()
    if resume:
        first = json.loads((out / "environment.json").read_text())
        record = {**first, "resumed": [*first.get("resumed", []), record]}
    files.write_json(out / "environment.json", record)
    files.write_json(out / "config.json", config.to_json())


def save_state(out: Path, engine: Engine, rows: list[dict[str, Any]], bank: MaskBank | None) -> None:
    """After an epoch: everything that resuming needs, in one file, and then `export`."""
    state = {
        **engine.state_dict(),
        "rows": rows,
        "cpu_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "masks": None if bank is None else bank.bits,
    }
    with files.replacing(out / STATE) as temporary:
        torch.save(state, temporary)
    export(out, engine, rows)


def export(out: Path, engine: Engine, rows: list[dict[str, Any]]) -> None:
    """Write model.safetensors, averaged.safetensors if weights are averaged, and metrics.csv, for other programs."""
    models = {WEIGHTS: engine.model} | ({} if engine.averaged is None else {AVERAGED: engine.averaged.module})
    for name, model in models.items():
        with files.replacing(out / name) as temporary:
            save_file(own_copies(model), temporary)
    files.write_csv(out / "metrics.csv", rows)


def load_state(path: Path, engine: Engine, bank: MaskBank | None) -> list[dict[str, Any]]:
    """Restore what `save_state` saved; returns the rows so far, none if there is no file."""
    if not path.is_file():
        return []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file can raise nearly anything; the first line says what happened.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadValueError(f"{path} cannot be read: {reason}") from error
    engine.load_state_dict(state)
    torch.set_rng_state(state["cpu_rng"])
    # On a machine with other devices the run goes on with other random numbers.
    if len(state["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    if bank is not None:
        bank.load_bits(state["masks"])
    rows: list[dict[str, Any]] = state["rows"]
    return rows
