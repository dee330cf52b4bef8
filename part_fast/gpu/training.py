"""Short training runs on the device: it learns, goes on where it was killed, evaluates; every method; and, given the
data, rows of the published table in full.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from part_fast.config import TrainConfig, preset
from part_fast.evaluation.accuracy import evaluate
from part_fast.evaluation.masks import masks
from part_fast.gpu.record import MissingError, Recorder, parser, require
from part_fast.training.loop import train

SHOWN = ("train_loss", "test_natural", "test_pgd20", "zero_gradients", "sign_agreement", "images_per_second")


class OutOfTimeError(RuntimeError):
    """A run was stopped between two epochs; its folder holds all that was done."""


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv; none before its first epoch is done."""
    if not (folder / "metrics.csv").exists():
        return []
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


class Checks:
    """Runs of the demo's images in a folder of their own, with what is fastest on the device."""

    def __init__(self, recorder: Recorder, work: Path) -> None:
        self.recorder, self.work = recorder, work
        self.cuda = recorder.device.type == "cuda"

    def config(self, **changed: Any) -> TrainConfig:
        given: dict[str, Any] = {"epochs": 3, "warmup_epochs": 1, "method": "part", "pgd_test_size": 500}
        given |= {"device": str(self.recorder.device), "precision": "bf16" if self.cuda else "fp32"}
        given |= {"cuda_graph": self.cuda}
        if self.recorder.dry:
            given |= {"train_size": 64, "test_size": 20, "steps": 1, "pgd_test_size": 10, "epochs": 2}
        return dataclasses.replace(preset("demo"), **{**given, **changed})

    def straight(self) -> None:
        """Three epochs of PART: it learns, and the run's environment names the device."""
        train(self.config(), self.work / "straight", log=print)
        rows = rows_of(self.work / "straight")
        require(len(rows) == self.config().epochs, f"{len(rows)} epochs in metrics.csv")
        for row in rows:
            shown = {key: float(row[key]) for key in SHOWN if row.get(key)}
            self.recorder.value(f"epoch {row['epoch']}, {row['method']}", **shown)
        natural = float(rows[-1]["test_natural"])
        require(natural > 0.5 or self.recorder.dry, f"it does not learn: natural accuracy {natural:.3f}")

    def killed(self) -> None:
        """The same run in a process of its own, killed after its first epoch and resumed in another one."""
        folder, config = self.work / "killed", self.config()
        command = [sys.executable, "-m", "part_fast.gpu.training", "--run", str(folder), "--config"]
        command += [json.dumps(config.to_json()), "--out", str(self.recorder.out)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, **quiet)  # type: ignore[call-overload]
        try:
            deadline = time.time() + 100
            while not rows_of(folder) and process.poll() is None and time.time() < deadline:
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            said = process.communicate()[1]
        before = rows_of(folder)
        tail = said.decode(errors="replace").strip().splitlines()[-1:]
        require(1 <= len(before) < config.epochs, f"{len(before)} epochs were done when it was killed: {tail}")
        done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=200)
        require(done.returncode == 0, f"resuming ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        after, straight = rows_of(folder), rows_of(self.work / "straight")
        require(len(after) == config.epochs, f"{len(after)} epochs after resuming")
        losses = [[float(row["train_loss"]) for row in rows] for rows in (before, after, straight)]
        require(losses[1][: len(before)] == losses[0], "rows of before it was killed have changed")
        off = [abs(a - b) for a, b in zip(losses[1], losses[2], strict=True)] if straight else []
        worst = max(off, default=float("nan"))
        self.recorder.value("a killed run beside a straight one", epochs_before=len(before), train_loss_off=worst)
        require(not worst > 0.15, f"train losses differ by {worst:.3g}")

    def evaluated(self) -> None:
        """Evaluation and the grid of masks of the straight run."""
        few = 20 if self.recorder.dry else 500
        attacks = ("natural", "pgd20", "mma")
        record = evaluate(self.work / "straight", attacks, n=few, device=str(self.recorder.device))
        for name, result in record["results"].items():
            self.recorder.value(f"evaluate {name}", accuracy=result["accuracy"], seconds=result["seconds"])
        masks(self.work / "straight", self.work / "masks.png", device=str(self.recorder.device))

    def other(self, name: str, **changed: Any) -> None:
        """An epoch of something else."""
        if changed.get("precision") == "fp16" and not self.cuda:
            raise MissingError("fp16 needs a CUDA device")
        config = self.config(**{"epochs": 1, "warmup_epochs": 0, **changed})
        (row,) = train(config, self.work / name, log=print)[-1:]
        loss = row["train_loss"]
        self.recorder.value(f"train {name}", train_loss=loss, images_per_second=row["images_per_second"])

    def command_line(self) -> None:
        """`part-fast info`, where its parser is installed."""
        if importlib.util.find_spec("tyro") is None:
            raise MissingError("tyro is not installed, so there is no command line")
        done = subprocess.run([sys.executable, "-m", "part_fast", "info"], capture_output=True, text=True, timeout=120)
        require(done.returncode == 0, f"part-fast info ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        print(done.stdout)


def short(recorder: Recorder) -> None:
    """All checks; on a dry run those that start no process."""
    with tempfile.TemporaryDirectory() as folder:
        checks = Checks(recorder, Path(folder))
        recorder.case("train", checks.straight)
        if recorder.dry:
            recorder.skip("killed and resumed", "starts processes: not on a dry run")
        else:
            recorder.case("command line", checks.command_line)
            recorder.case("killed and resumed", checks.killed)
        recorder.case("evaluate, masks", checks.evaluated)
        others: dict[str, dict[str, Any]] = {
            "part-t": {"method": "part-t", "refresh": "1"},
            "part-m": {"method": "part-m", "refresh": "1"},
            "mma with ema": {"attack": "mma", "average": "ema:0.99"},
            "fp16": {"precision": "fp16"},
            "compiled": {"compile": True},
        }
        for name, changed in others.items():
            if recorder.dry and name != "fp16":
                recorder.skip(f"train {name}", "takes long: not on a dry run")
            else:
                recorder.case(f"train {name}", checks.other, name, **changed)


def poster(recorder: Recorder, method: str, data: Path, runs: Path) -> None:
    """A row of the published CIFAR-10 table, ResNet-18: train it as far as time goes, or on, and evaluate it.

    The folder of the run is `runs`/`method`; asked for again, a run goes on after its last whole epoch.
    """
    cuda = recorder.device.type == "cuda"
    config = dataclasses.replace(
        preset("cifar10-resnet18"),
        method=method,
        root=str(data),
        device=str(recorder.device),
        precision="bf16" if cuda else "fp32",
        cuda_graph=cuda,
        pgd_test_size=1000,
    )
    if recorder.dry:
        small: dict[str, Any] = {"model": "resnet-small", "train_size": 32, "test_size": 16, "pgd_test_size": 0}
        config = dataclasses.replace(config, **small, epochs=2, warmup_epochs=1, steps=1)
    folder = runs / method
    begin, epochs = time.time(), 0

    def log(text: str) -> None:
        nonlocal epochs
        print(text, flush=True)
        epochs += text.startswith("epoch ")
        if epochs and time.time() + 1.5 * (time.time() - begin) / epochs > recorder.until:
            raise OutOfTimeError(text)

    def run() -> bool:
        try:
            train(config, folder, resume=(folder / "training_state.pt").exists(), overwrite=False, log=log)
        except OutOfTimeError:
            return len(rows_of(folder)) == config.epochs
        finally:
            for row in rows_of(folder):
                shown = {key: float(row[key]) for key in SHOWN if row.get(key)}
                recorder.line("value", f"{method}, epoch {row['epoch']}", **shown)
        return True

    def judged() -> None:
        attacks = ("natural",) if recorder.dry else ("natural", "pgd20", "mma")
        record = evaluate(folder, attacks, resume=True, device=str(recorder.device))
        for name, result in record["results"].items():
            recorder.value(f"{method}, {name}", accuracy=result["accuracy"], standard_error=result["standard_error"])

    if recorder.case(f"train {method}", run):
        recorder.case(f"evaluate {method}", judged)
    elif not recorder.failures:
        recorder.line("late", f"{method}: goes on in {folder} when asked for again")


def main(arguments: list[str] | None = None) -> int:
    """The short runs, a row of the published table, or one run in this process, to be killed."""
    flags = parser(__doc__)
    flags.add_argument("--poster", metavar="METHOD", help="at, part, ...: a row of the published table")
    flags.add_argument("--data", type=Path, help="the folder of CIFAR-10")
    flags.add_argument("--runs", type=Path, default=Path("runs/poster"), help="the folder of the table's runs")
    flags.add_argument("--run", type=Path, metavar="FOLDER", help="train into this folder and do nothing else")
    flags.add_argument("--config", help="of that run, as JSON")
    flags.add_argument("--resume", action="store_true", help="go on with that run")
    args = flags.parse_args(arguments)
    if args.run is not None:
        train(TrainConfig.from_json(json.loads(args.config), "--config"), args.run, resume=args.resume)
        return 0
    recorder = Recorder("poster" if args.poster else "train", args)
    if args.poster:
        poster(recorder, args.poster, args.data, args.runs)
    else:
        short(recorder)
    return recorder.code


if __name__ == "__main__":
    sys.exit(main())
