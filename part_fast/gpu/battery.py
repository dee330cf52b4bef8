"""Runs the parts one after another, each process with a time limit, and puts what they find into one folder.

Every group of parts gets the share of the time left that its weight has among the groups to come, so that what one does
not use, or loses by failing, is the others'. Parts of one group run side by side: those that time nothing. A process
that has not ended at its limit is killed, which counts as a failure, since nobody can tell it from one that hangs; it
begins no new case for some time before.

The folder then holds report.md, results.jsonl (see `record`), log.txt (what the processes printed) and the CSV files of
the parts that time something. Parts that are run again replace what the folder has of them.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from part_fast.atomic import replacing
from part_fast.errors import BadValueError
from part_fast.gpu import page
from part_fast.gpu.checkout import ROOT
from part_fast.gpu.record import CASES_FAILED, RESULTS, append

LOG, LOG_CHARACTERS = "log.txt", 200_000  # of each process
SANITIZERS = ("/usr/local/cuda*/bin/compute-sanitizer", "/opt/nvidia/*/compute-sanitizer")
SANITIZER_FOUND = 9  # the exit code that compute-sanitizer is asked for where it found something
# For the report, after the last part; and the least that a process is started for.
RESERVE, LEAST = 8.0, 5.0


@dataclass(frozen=True)
class Settings:
    """What was asked for. models: of the training steps that are timed; data, runs: see `--only poster`."""

    out: Path
    device: str
    minutes: float
    dry: bool = False
    models: tuple[str, ...] = ("resnet18", "wrn-34-10")
    methods: tuple[str, ...] = ("at", "part")
    data: Path | None = None
    runs: Path = Path("runs/poster")

    @property
    def cores(self) -> int:
        return os.cpu_count() or 1


@dataclass(frozen=True)
class Process:
    """A command. judged: its exit code is its result; else it writes rows and takes --until."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    judged: bool = False


@dataclass(frozen=True)
class Part:
    """Processes that run side by side. processes: of the settings; or, in words, why there are none.

    files: what it writes beside rows. asked: whether it runs only where it is asked for.
    """

    name: str
    weight: float
    title: str
    processes: Callable[[Settings], list[Process] | str]
    files: tuple[str, ...] = ()
    asked: bool = False


def _module(settings: Settings, name: str, *arguments: str, **environment: str) -> Process:
    """A module of this package as a process, which is named by its arguments."""
    command = [sys.executable, "-m", f"part_fast.gpu.{name}", *arguments]
    command += ["--out", str(settings.out.resolve()), "--device", settings.device]
    return Process(" ".join([name, *arguments]), command + ["--dry-run"] * settings.dry, environment)


def _ops(settings: Settings) -> list[Process]:
    """cuda by two processes, all its cases; a thinned selection by the others, Triton, which compiles, by many."""
    values = "step,backward,fast,cam,upsample,soft,mask"
    if settings.device == "cpu":
        return [_module(settings, "ops", "--backends", "cpp,reference", "--kinds", f"{values},big", "--thin", "101")]
    # The reference works on the host too, which neither a stream nor a graph holds.
    kinds = f"{values},stream,graph"
    shards = max(1, settings.cores - 5)
    found = [_module(settings, "ops", "--backends", "cuda", "--kinds", kinds, "--shard", f"{i}/2") for i in range(2)]
    found.append(_module(settings, "ops", "--backends", "reference", "--kinds", values, "--thin", "11"))
    found.append(_module(settings, "ops", "--backends", "cuda,triton", "--kinds", "big"))
    for i in range(shards):
        shard = f"{i}/{shards}"
        found.append(
            _module(settings, "ops", "--backends", "triton", "--kinds", kinds, "--thin", "11", "--shard", shard)
        )
    return found


def _tests(settings: Settings) -> list[Process] | str:
    if settings.device == "cpu":
        return "needs a CUDA device"
    # Seconds of work, as far as an H100 got with it: Triton's is compiling.
    few, many = settings.cores // 3, settings.cores - settings.cores // 3 - 1
    return [
        _module(settings, "checkout", "tests", "--select", name, "--workers", str(max(1, workers)), "--work", work)
        for name, workers, work in (("not triton-gpu", few, "600"), ("triton-gpu", many, "4500"))
    ]


def _sanitize(settings: Settings) -> list[Process] | str:
    launches = [sys.executable, "-m", "part_fast.gpu.sanitize", "--device", settings.device]
    if settings.device == "cpu":
        return [Process("launches, not watched", [*launches, "--backend", "cpp", "--much", "few"], judged=True)]
    tool = find_sanitizer()
    if tool is None:
        return "compute-sanitizer is neither on PATH nor in CUDA's folders"
    # Without PyTorch's cache of memory, so that what lies beside a tensor is nobody's.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = []
    for check, backend, much, environment in (
        ("memcheck", "cuda", "all", alone),
        ("racecheck", "cuda", "few", {}),
        ("initcheck", "cuda", "few", {}),
        ("synccheck", "cuda", "few", {}),
        ("memcheck", "triton", "least", alone),
    ):
        watch = [tool, "--tool", check, "--error-exitcode", str(SANITIZER_FOUND)]
        command = [*launches, "--backend", backend, "--much", much]
        # Triton compiles first, unwatched, which under the tool takes longer than there is time for.
        command = [*command, "--watch", *watch] if backend == "triton" else [*watch, *command]
        found.append(Process(f"{check} {backend}", command, environment, judged=True))
    return found


def find_sanitizer() -> str | None:
    """compute-sanitizer, if it is on PATH or in a folder where CUDA puts it."""
    home = os.environ.get("CUDA_HOME")
    places = (*([f"{home}/bin/compute-sanitizer"] if home else []), *SANITIZERS)
    found = [path for pattern in places for path in sorted(glob.glob(pattern), reverse=True)]
    return shutil.which("compute-sanitizer") or (found[0] if found else None)


def _host(settings: Settings) -> list[Process]:
    backends = "cpp" if settings.device == "cpu" else "cuda,triton"
    return [_module(settings, "ops", "--backends", backends, "--kinds", "host", "--part", "host")]


def _poster(settings: Settings) -> list[Process] | str:
    if settings.data is None:
        return "needs --data, the folder of CIFAR-10"
    given = ["--data", str(settings.data.resolve()), "--runs", str(settings.runs.resolve())]
    return [_module(settings, "training", "--poster", method, *given) for method in settings.methods]


# Side by side: what times nothing. The weights are seconds that were thought to be enough on an H100.
GROUPS: tuple[tuple[Part, ...], ...] = (
    (Part("build", 70, "the libraries, compiled for this card", lambda s: [_module(s, "checkout", "build")]),),
    (Part("environment", 12, "card, versions, backends", lambda s: [_module(s, "checkout", "environment")]),),
    (Part("ops", 65, "every op against an oracle, on every backend", _ops),),
    (
        Part("attacks", 115, "graphs, compile, precision: the same attack", lambda s: [_module(s, "attacks")]),
        Part("tests", 115, "the tests marked gpu", _tests),
        Part("sanitize", 115, "every kernel under compute-sanitizer", _sanitize),
    ),
    (Part("host", 12, "microseconds of Python in a call", _host),),
    (Part("bench", 80, "ops beside torch.compile", lambda s: [_module(s, "speed", "ops")], ("ops.csv",)),),
    (
        Part(
            "step",
            80,
            "training steps beside published loops, by `bench step`",
            lambda s: [_module(s, "speed", "step", "--models", s.models[0], "--rounds", "3")],
            ("step.csv", "step_ratios.csv", "step_profile.csv"),
        ),
    ),
    (
        Part(
            "settings",
            110,
            "ceilings; training steps in every setting",
            lambda s: [_module(s, "speed", "settings", "--models", ",".join(s.models))],
            ("settings.csv",),
        ),
    ),
    (Part("train", 120, "a short training, killed and resumed", lambda s: [_module(s, "training")]),),
    (Part("poster", 540, "rows of the published table", _poster, asked=True),),
)
PARTS = tuple(part.name for group in GROUPS for part in group)


def run(settings: Settings, only: Sequence[str] = (), groups: Sequence[Sequence[Part]] = GROUPS) -> int:
    """Run the parts named and `environment`, by default all but the poster; the exit code: whether anything failed.

    Errors: ValueError for unknown parts, minutes <= 0, and where the folder holds results of another machine.
    """
    parts = {part.name: part for group in groups for part in group}
    unknown = [name for name in only if name not in parts]
    if unknown:
        raise BadValueError(f"only must name parts among {', '.join(parts)}, got {', '.join(unknown)}")
    if not settings.minutes > 0:
        raise BadValueError(f"minutes must be > 0, got {settings.minutes}")
    _same_machine(settings)
    end = time.time() + 60 * settings.minutes - RESERVE
    settings.out.mkdir(parents=True, exist_ok=True)
    names = {*only, "environment"} if only else {part.name for part in parts.values() if not part.asked}
    todo = [chosen for group in groups if (chosen := [part for part in group if part.name in names])]
    for i, group in enumerate(todo):
        weights = [max(part.weight for part in each) for each in todo[i:]]
        run_group(settings, group, (end - time.time()) * weights[0] / sum(weights))
    sections = page.sections(settings.out, {name: part.title for name, part in parts.items()})
    with replacing(settings.out / "report.md") as temporary:
        temporary.write_text("\n\n".join(sections.values()) + "\n")
    # On a screen the last is what one sees.
    print("\n\n".join(sections[name] for name in page.PRINTED if name in sections))
    print(f"\nwritten: {', '.join(sorted(str(path) for path in settings.out.iterdir() if path.is_file()))}")
    return int(any(row["kind"] == "failed" and row["part"] in names for row in page.read(settings.out)))


def _same_machine(settings: Settings) -> None:
    """Errors: ValueError where the folder holds results of another card or other versions."""
    import torch

    before = page.environment(page.read(settings.out))
    if before is None:
        return
    card = page.NO_CARD if settings.device == "cpu" else torch.cuda.get_device_name(settings.device)
    now = {"card": card, "torch": torch.__version__, "python": platform.python_version()}
    different = [key for key in now if before[key] != now[key]]
    if different:
        pairs = "; ".join(f"{key} {before[key]} there, {now[key]} here" for key in different)
        raise BadValueError(f"out must be a folder without results of another machine, got {settings.out}: {pairs}")


def run_group(settings: Settings, parts: Sequence[Part], limit: float) -> None:
    """Run the processes of the parts side by side, for at most `limit` seconds."""
    begin = time.time()
    names = {part.name for part in parts}
    _forget(settings.out, parts)
    started: list[tuple[Part, Process, subprocess.Popen[bytes], Path]] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            found = part.processes(settings)
            if isinstance(found, str):
                append(settings.out, {"part": part.name, "kind": "skipped", "name": part.name, "why": found})
            elif limit < LEAST:
                append(settings.out, {"part": part.name, "kind": "late", "name": part.name})
            else:
                for process in found:
                    log = Path(folder) / f"{len(started)}.log"
                    threads = max(1, settings.cores // len(found))
                    started.append((part, process, _start(process, log, begin, limit, threads), log))
        print(f"[{', '.join(sorted(names))}] {len(started)} processes, at most {max(0.0, limit):.0f} s", flush=True)
        try:
            seconds = _wait(settings.out, started, begin, limit)
        finally:
            for _, _, handle, _ in started:
                _kill(handle)
    for name, taken in seconds.items():
        append(settings.out, {"part": name, "kind": "part", "name": name, "seconds": round(taken, 3)})


def _start(process: Process, log: Path, begin: float, limit: float, threads: int) -> subprocess.Popen[bytes]:
    command = list(process.command)
    if not process.judged:
        # No new case for the last eighth, so that the last one can end.
        command += ["--until", str(begin + limit - max(2.0, limit / 8))]
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",
        "KINETO_LOG_LEVEL": "99",
        "OMP_NUM_THREADS": str(threads),
        **process.environment,
    }
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )


def _wait(
    out: Path, started: Sequence[tuple[Part, Process, subprocess.Popen[bytes], Path]], begin: float, limit: float
) -> dict[str, float]:
    """Until all have ended or time is up; what each printed goes to the log, how it ended to the results.

    Returns: seconds of each part.
    """
    running, taken = list(started), {}
    while running:
        late = time.time() - begin > limit
        for each in list(running):
            part, process, handle, log = each
            if handle.poll() is None and not late:
                continue
            code = handle.poll()
            _kill(handle)
            running.remove(each)
            text, seconds = log.read_text(errors="replace"), time.time() - begin
            taken[part.name] = seconds
            row = _outcome(part, process, code, seconds, text)
            if row is not None:
                append(out, row)
            said = "killed" if code is None else f"exit code {code}"
            print(f"  {process.name}: {said}, {seconds:.1f} s", flush=True)
            with (out / LOG).open("a") as file:
                file.write(f"\n######## {part.name}: {process.name} ({said}, {seconds:.1f} s)\n")
                file.write(text[-LOG_CHARACTERS:])
        time.sleep(0.02)
    return taken


def _outcome(part: Part, process: Process, code: int | None, seconds: float, text: str) -> dict[str, Any] | None:
    """The row that a process's end is worth; None where its own rows say it all. code: None for a killed one."""
    row: dict[str, Any] = {"part": part.name, "kind": "failed", "name": process.name, "seconds": round(seconds, 3)}
    if process.judged and code == 0:
        return {**row, "kind": "ok"}
    if code == 0 or (code == CASES_FAILED and not process.judged):
        return None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = f"the last that it printed: {lines[-1] if lines else 'nothing'}"
    error = f"ended with exit code {code}; {last}"
    if code is None:
        error = f"killed at its limit, after {seconds:.0f} s; {last}"
    elif code < 0:
        error = f"ended by {signal.Signals(-code).name}; {last}"
    elif process.judged and code == SANITIZER_FOUND:
        found = [said for line in lines if line.startswith("=========") and (said := line.strip("= "))]
        summary = [line for line in found if "SUMMARY" in line]
        error = "; ".join([*summary[-1:], *[line for line in found if line not in summary][1:4]])
    return {**row, "error": error[:400], "trace": text[-3000:]}


def _kill(handle: subprocess.Popen[bytes]) -> None:
    """The process and what it has started, if it still runs."""
    if handle.poll() is None:
        os.killpg(handle.pid, signal.SIGKILL)
        handle.wait()


def _forget(out: Path, parts: Sequence[Part]) -> None:
    """Remove what the folder has of these parts."""
    names = {part.name for part in parts}
    kept = [row for row in page.read(out) if row["part"] not in names]
    (out / RESULTS).write_text("".join(json.dumps(row) + "\n" for row in kept))
    for name in (name for part in parts for name in part.files):
        (out / name).unlink(missing_ok=True)


def default_settings(device: str | None, dry: bool, **given: Any) -> Settings:
    """Settings for the device named, or for the one that is there: CUDA, or on a dry run the CPU.

    Errors: ValueError where there is no CUDA device and it is no dry run.
    """
    import torch

    if device is None:
        device = "cpu" if dry else "cuda"
    if device != "cpu" and not torch.cuda.is_available():
        raise BadValueError(f"device must be one that is there, got {device}: torch sees no CUDA device; try --dry-run")
    if device == "cpu" and not dry:
        raise BadValueError("device must be cuda but for a --dry-run, got cpu")
    return dataclasses.replace(Settings(Path("runs/gpu"), device, 9.0, dry), **given)
