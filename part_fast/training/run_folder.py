"""The run folder: its files, its lock, what may be written there, and the state that a run goes on from."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from part_fast import distributed
from part_fast.atomic import naming
from part_fast.budgets.bank import MaskBank
from part_fast.budgets.perturbations import PerturbationBank
from part_fast.config import TrainConfig, read_config
from part_fast.data.memory import Dataset
from part_fast.errors import BadValueError, CannotRunError, UsageError
from part_fast.evaluation.accuracy import KEPT
from part_fast.models.checkpoints import own_copies
from part_fast.models.weights_file import read_about, write_weights
from part_fast.precision import full_float32
from part_fast.reading import first_line, read_json
from part_fast.report import files
from part_fast.report.environment import environment
from part_fast.training.checkpoint import PREVIOUS, STATE, write_state
from part_fast.training.engine import Engine
from part_fast.training.epoch import Epoch, refuse_bad_weights, same_rng
from part_fast.training.mask_history import MASKS, keep_masks
from part_fast.training.measures import best_epoch

WEIGHTS, AVERAGED, BEST = "model.safetensors", "averaged.safetensors", "best.safetensors"
FILES = {"plain": WEIGHTS, "averaged": AVERAGED}
LOCK = "run.lock"

RUN_FILES = ("config.json", "metrics.csv", WEIGHTS, STATE, PREVIOUS, "environment.json", "curves.png")

# Files of some runs, and those that other commands make of a run, which are stale once it is overwritten.
DERIVED = (
    AVERAGED,
    MASKS,
    "sweep.json",
    BEST,
    "evaluation.json",
    "evaluation.csv",
    "evaluation_images.safetensors",
    *KEPT,
    "events.out.tfevents.*",
)

# Fields in which a resumed run may differ: it may be longer, may go on on another machine, and after it diverged. What
# the file of extra images holds is compared by its checksums.
MAY_CHANGE = ("epochs", "device", "cuda_graph", "root", "download", "extra", "on_nonfinite")


def begun_or_not(folder: Path) -> tuple[bool, bool]:
    """(resume, overwrite) with which `train` begins a run, or goes on with what one that was stopped has left.

    What was stopped before its first state is begun anew; weights without a state are somebody's, and refused.
    """
    resume = (folder / STATE).exists()
    return resume, not resume and not (folder / WEIGHTS).exists()


def check_folder(config: TrainConfig, out: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that this run must not write to, before anything is written."""
    if resume and overwrite:
        raise BadValueError("resume and overwrite exclude each other")
    if out.exists() and not out.is_dir():
        raise BadValueError(f"out takes a folder, {out} is a file")
    if (out / LOCK).is_file() and distributed.rank() == 0:
        with locked(out):
            pass
    if not resume and not overwrite:
        refuse_run(out)
    if resume:
        different = _different(read_config(out).to_json(), config.to_json(), "there", "here")
        if different:
            raise BadValueError(f"the run in {out} has another configuration: {different}")


def refuse_edited(config: TrainConfig, out: Path, state: dict[str, Any], extra: dict[str, int] | None) -> None:
    """Errors: ValueError where config.json, which `config` is of, is not what the state was trained with, or where the
    extra images are others: extra, as `data.extra.checksums`."""
    before = TrainConfig.from_json(state["config"], str(out / state["file"])).to_json()
    if different := _different(before, config.to_json(), "in the state", "in config.json"):
        raise BadValueError(
            f"{out / 'config.json'} was edited since the run stopped: {different}; put it back, or start another run"
        )
    # A state of before checksums were kept tells only whether there were any.
    same = state["extra"] == extra if "extra" in state else (before["extra"] is None) == (extra is None)
    if not same:
        what = "no file" if config.extra is None else f"other ones in {config.extra}"
        had = "none" if before["extra"] is None else f"those of {before['extra']}"
        raise BadValueError(f"extra must be the images that the run was begun with, {had}, got {what}")


def _different(before: dict[str, Any], now: dict[str, Any], there: str, here: str) -> str:
    """The fields that must be alike and are not, with both values; nothing where all are."""
    return "; ".join(
        f"{key} {before.get(key)!r} {there}, {now[key]!r} {here}"
        for key in now
        if key not in MAY_CHANGE and before.get(key) != now[key]
    )


@contextlib.contextmanager
def locked(out: Path) -> Iterator[TextIO]:
    """Nobody else writes to the run in the folder `out` inside the block; the system lets go of it if we are killed.

    Errors: RuntimeError where another process does, with its number.
    """
    with (out / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise CannotRunError(
                f"{out} is being written to by another run, {file.read().strip() or 'of an unknown process'}: "
                "wait until it ends, or choose another --out"
            ) from None
        yield file


@contextlib.contextmanager
def opened(config: TrainConfig, out: Path, resume: bool, overwrite: bool) -> Iterator[None]:
    """In the block the folder is this run's alone, an overwritten run's files are gone, configuration and environment
    are written. Only the first process writes; in others the block changes nothing."""
    if distributed.rank() > 0:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with locked(out) as lock:
        with naming(out / LOCK):
            lock.truncate(0)
            os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())  # no rest to flush
        if not resume and not overwrite:  # another one may have begun since it was checked
            refuse_run(out)
        if overwrite:
            for pattern in RUN_FILES + DERIVED:
                for path in out.glob(pattern):
                    path.unlink()
        with contextlib.nullcontext() if config.tf32 else full_float32():
            record = environment()
        if resume:
            first = _first_environment(out)
            record = {**first, "resumed": [*first.get("resumed", []), record]}
        # The configuration first: killed between the two, a run without it could neither go on nor begin.
        files.write_json(out / "config.json", config.to_json())
        files.write_json(out / "environment.json", record)
        yield


def refuse_run(out: Path) -> None:
    """Errors: ValueError where the folder holds a run."""
    if present := [name for name in RUN_FILES if (out / name).exists()]:
        raise BadValueError(
            f"{out} already holds a run ({', '.join(present)}): --resume continues it, --overwrite replaces it"
        )


def _first_environment(out: Path) -> dict[str, Any]:
    """What the run began on. Errors: ValueError where its record is damaged."""
    path = out / "environment.json"
    try:
        record = read_json(path) if path.is_file() else {}
    except ValueError as error:
        raise BadValueError(f"{error}; without it the run goes on") from error
    if not isinstance(record.get("resumed", []), list):
        raise BadValueError(f"{path} is no record of an environment; without it the run goes on")
    return record


class Checkpoints:
    """Writes the state of a run, everything that resuming needs, into the folder `out`; of finite numbers alone.

    minutes: between two of them within an epoch. rows: those of metrics.csv so far, to which the run adds. remembered:
        perturbations, of which each process has its own. extra: `data.extra.checksums` of the extra images.
    """

    def __init__(
        self,
        out: Path,
        engine: Engine,
        bank: MaskBank | None,
        rows: list[dict[str, Any]],
        minutes: float,
        remembered: PerturbationBank | None = None,
        extra: dict[str, int] | None = None,
    ) -> None:
        self.out, self.engine, self.bank, self.rows = out, engine, bank, rows
        self.remembered, self.extra = remembered, extra
        self.minutes, self.saved = minutes, time.monotonic()
        self.last = "nothing is saved yet"  # for messages

    @property
    def due(self) -> bool:
        return time.monotonic() - self.saved >= 60 * self.minutes

    def save(self, epoch: Epoch) -> None:
        """The first process writes what it gathers of all.

        Errors: OSError that names the file; RuntimeError where a weight is not finite.
        """
        refuse_bad_weights(self.engine, epoch.number, self.last)
        own = epoch.state()
        if distributed.size() > 1:
            own["buffers"] = [buffer.cpu() for buffer in self.engine.buffers()]
        if self.remembered is not None:
            own["perturbations"] = self.remembered.values.cpu()
        processes = distributed.gathered(own)
        if processes:
            state = {
                **self.engine.state_dict(),
                "config": self.engine.config.to_json(),
                "rows": self.rows,
                "extra": self.extra,
                "masks": None if self.bank is None else self.bank.bits,
                "epoch": epoch.number,
                "processes": processes,
            }
            write_state(self.out, state)
        self.saved = time.monotonic()
        self.note(epoch)

    def note(self, epoch: Epoch) -> None:
        """The newest state is of this place in the run."""
        self.last = (
            f"the last good state is in {self.out / STATE}, of epoch {epoch.number + 1} after {epoch.done} images of "
            "each process: --resume --on-nonfinite skip goes on from it, or train anew with a lower lr"
        )


def load_state(
    state: dict[str, Any], engine: Engine, bank: MaskBank | None, remembered: PerturbationBank | None = None
) -> tuple[list[dict[str, Any]], Epoch]:
    """Restore what `Checkpoints` saved; returns the rows so far, and the epoch to go on with.

    Errors: ValueError where an epoch was begun by another number of processes, or the state is not of such a run.
    """
    try:
        return _load_state(state, engine, bank, remembered)
    except UsageError:
        raise
    # What the file lacks, or holds instead of what `Checkpoints` writes, can raise nearly anything.
    except Exception as error:
        raise BadValueError(
            f"{state['file']} does not fit this run: {type(error).__name__}, {first_line(error)}"
        ) from error


def _load_state(
    state: dict[str, Any], engine: Engine, bank: MaskBank | None, remembered: PerturbationBank | None
) -> tuple[list[dict[str, Any]], Epoch]:
    processes, number = state["processes"], distributed.size()
    own = dict(processes[distributed.rank() if len(processes) == number else 0])
    if len(processes) != number and own["order_rng"] is not None:
        raise BadValueError(
            f"the run was stopped within epoch {state['epoch'] + 1}, which {len(processes)} processes share: "
            f"start as many, got {number}"
        )
    engine.load_state_dict(state)
    if bank is not None:
        bank.load_bits(state["masks"])
    if remembered is not None:
        remembered.load([process["perturbations"] for process in processes])
    own.pop("perturbations", None)
    with torch.no_grad():
        for buffer, value in zip(engine.buffers(), own.pop("buffers", []), strict=False):
            buffer.copy_(value)
    return state["rows"], Epoch.restored(state["epoch"], own, engine.device)


def export(out: Path, engine: Engine, rows: list[dict[str, Any]], test: Dataset) -> None:
    """After an epoch write what other programs read.

    masks.safetensors (of images of `test`, see `keep_masks`), model.safetensors, averaged.safetensors if weights are
    averaged, best.safetensors if weights of this epoch are the best so far, which says which, and metrics.csv.
    """
    with same_rng(engine.device):
        keep_masks(out, engine, test, len(rows) - 1)
    models = {"plain": engine.model} | ({} if engine.averaged is None else {"averaged": engine.averaged.module})
    for weights, model in models.items():
        write_weights(out / FILES[weights], own_copies(model), epoch=len(rows))
    best = best_epoch(rows)
    if best is not None and best.epoch == len(rows):
        write_weights(out / BEST, own_copies(models[best.weights]), **best._asdict())
    files.write_csv(out / "metrics.csv", rows)


def mend(
    out: Path,
    engine: Engine,
    rows: list[dict[str, Any]],
    test: Dataset,
    epoch: Epoch,
    warn: Callable[[str], object],
) -> None:
    """On resume make the files for other programs those of the state: the run may have been killed before it wrote
    them, or may go on from an older state."""
    if rows and not epoch.begun:
        export(out, engine, rows, test)
    elif rows:
        files.write_csv(out / "metrics.csv", rows)
    else:
        for name in ("metrics.csv", WEIGHTS, AVERAGED, BEST):
            (out / name).unlink(missing_ok=True)
    best = best_epoch(rows)
    if best is not None:
        try:
            about = read_about(out / BEST) if (out / BEST).is_file() else None
        except Exception:  # a damaged file raises nearly anything
            about = None
        if about is None or (about.get("epoch"), about.get("weights", "plain")) != best:  # of before: plain
            (out / BEST).unlink(missing_ok=True)
            warn(
                f"warning: {out / BEST} does not hold the {best.weights} weights of epoch {best.epoch}, the best so "
                "far: better ones take its place"
            )
