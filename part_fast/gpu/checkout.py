"""What only a source checkout has: compiling the libraries for the card that is there, and the tests marked gpu."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import part_fast
from part_fast.gpu.page import NO_CARD
from part_fast.gpu.record import Recorder, parser

ROOT = Path(part_fast.__file__).resolve().parents[1]
# What parts of the battery, or some of their cases, need beside torch and numpy.
PACKAGES = (
    *("triton", "safetensors", "tqdm", "matplotlib", "pillow", "torchvision", "setuptools", "ninja"),
    *("pytest", "hypothesis", "pytest-xdist", "tyro", "pyautoattack"),
)


def why_no_checkout() -> str | None:
    """Why this package is none that could be compiled or tested; None if it is a checkout."""
    if (ROOT / "setup.py").is_file() and (ROOT / "csrc").is_dir():
        return None
    return "part_fast is installed, not a checkout: it is used as it is"


def setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the checkout's setup.py."""
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def build(recorder: Recorder) -> None:
    """Compile both libraries in place, for the architecture of this card alone; the CPU's where CUDA's fails."""
    if (why := why_no_checkout()) is not None:
        return recorder.skip("build", why)
    if recorder.device.type != "cuda":
        return recorder.skip("build", "no CUDA device to build for: the libraries are used as they are")
    major, minor = torch.cuda.get_device_capability()
    flags = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "MAX_JOBS": str(os.cpu_count())}
    # With --force ninja still compiles only what changed, its flags included.
    command = ("--quiet", "build_ext", "--inplace", "--force")

    def compiled(cuda: str) -> None:
        done = setup(*command, **flags, PART_FAST_CUDA=cuda)
        print(done.stdout[-20000:], done.stderr[-20000:], flush=True)
        if done.returncode:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            telling = [line for line in lines if "error" in line.lower()] or lines[-1:]
            raise RuntimeError(f"setup.py ended with {done.returncode}: {' | '.join(telling[:3])}")

    recorder.case(f"both libraries, for {major}.{minor}", compiled, "1")
    if recorder.failures:
        recorder.case("the CPU's library alone", compiled, "0")
    return None


def environment(recorder: Recorder) -> None:
    """Card, driver, versions, backends, which packages are missing; a call by every backend that says it is live."""
    from part_fast.report.environment import environment as of_this_process

    found = of_this_process()
    recorder.value(
        "environment", **{**found, **_card(recorder.device), "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
    )
    # One that lies on PYTHONPATH has no version.
    missing = [name for name in PACKAGES if _version(name) is None and importlib.util.find_spec(name) is None]
    if missing:
        recorder.skip("packages", f"not installed: {', '.join(missing)}")
    if recorder.device.type == "cuda":
        for name in ("cuda", "triton"):
            if name not in found["backends"]["cuda"]:
                recorder.fail(name, RuntimeError(f"not live: {found['not_available']['cuda'][name]}"))
    for name in part_fast.available_backends(recorder.device):
        recorder.case(f"a call by {name}", _call, name, recorder.device)


def _call(name: str, device: torch.device) -> None:
    if name == "triton" and device.type == "cpu":
        return
    x = torch.full((1, 3, 4, 4), 0.5, device=device)
    with part_fast.backend(name):
        result = part_fast.pgd_step(x, torch.ones_like(x), x, 0.25, 0.5)
    if not (result == 0.75).all():
        raise RuntimeError(f"pgd_step gives {result.flatten()[0]}, not 0.75")


def _card(device: torch.device) -> dict[str, Any]:
    """What identifies the machine a number was measured on."""
    record: dict[str, Any] = {"cores": os.cpu_count(), "triton": _version("triton"), "numpy": _version("numpy")}
    if device.type != "cuda":
        return {**record, "card": NO_CARD}
    properties = torch.cuda.get_device_properties(device)
    command = [
        "nvidia-smi",
        "--query-gpu=driver_version,power.limit,clocks.max.sm,clocks.max.mem",
        "--format=csv,noheader",
    ]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().replace("\n", "; ")
    except (OSError, subprocess.SubprocessError):
        asked = ""
    return {
        **record,
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_mb": properties.L2_cache_size / 2**20,
        "memory_gb": properties.total_memory / 1e9,
        "cudnn": torch.backends.cudnn.version(),
        "driver_power_clocks": asked or "nvidia-smi is not there",
        "tf32": f"cuDNN {torch.backends.cudnn.allow_tf32}, cuBLAS {torch.backends.cuda.matmul.allow_tf32}",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Outcomes:
    """A pytest plugin: writes each failure and the number of passes, and stops when time is up."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name
        self.passed, self.skipped = 0, 0
        self.session: Any = None

    def pytest_sessionstart(self, session: Any) -> None:
        self.session = session

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = str(report.longrepr) if crash is None else crash.message
            self.recorder.failures += 1
            trace = str(report.longrepr)[-3000:]
            self.recorder.line("failed", report.nodeid, error=" ".join(said.split())[:400], trace=trace)
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1
        if self.recorder.late and self.session is not None:
            # pytest-xdist looks at its own, not at the session's.
            for each in (self.session, self.session.config.pluginmanager.getplugin("dsession")):
                if each is not None:
                    each.shouldstop = "out of time"

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.recorder.failures += 1
            self.recorder.line("failed", f"collecting {report.nodeid}", error=str(report.longrepr)[-400:])
        elif report.skipped:
            self.recorder.skip(report.nodeid, report.longrepr[2].removeprefix("Skipped: "))


# Seconds until the workers of pytest-xdist have started and collected the tests.
COLLECTING = 25.0


def share(work: float, workers: int, seconds: float) -> int:
    """k, so that each k-th of tests that take `work` seconds one after another fits into `seconds`; 1 for all."""
    return max(1, math.ceil(work / workers / max(1.0, seconds - COLLECTING)))


def tests(recorder: Recorder, expression: str, workers: int, work: float) -> None:
    """The tests marked gpu whose names match `expression`, by so many processes where pytest-xdist is there.

    work: seconds that all of them take one after another. Where that is more than there is time for, tests/conftest.py
    thins out their parameters: every test runs, with each k-th of them.
    """
    if (why := why_no_checkout()) is not None:
        return recorder.skip("tests", why)
    absent = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if absent:
        return recorder.skip("tests", f"not installed: {', '.join(absent)}")
    import pytest

    outcomes = Outcomes(recorder, expression)
    if importlib.util.find_spec("xdist") is None:
        workers = 1
    each = share(work, workers, recorder.until - time.time())
    os.environ["PART_FAST_TESTS_EACH"] = str(each)
    command = [
        "tests",
        "-m",
        "gpu and not slow and not interpret",
        "-q",
        "--tb=short",
        "--maxfail=200",
        "--rootdir",
        str(ROOT),
        "-p",
        "no:cacheprovider",
    ]
    command += ["-k", expression] if expression else []
    if workers > 1:
        # What a process holds it runs to the end: no quarter of all tests, as by default.
        command += ["-n", str(workers), "--maxschedchunk", "4"]
    os.chdir(ROOT)
    begin = time.perf_counter()
    code = int(pytest.main(command, plugins=[outcomes]))
    seconds = time.perf_counter() - begin
    counts = {"passed": outcomes.passed, "failed": recorder.failures, "skipped": outcomes.skipped}
    recorder.value(f"tests, {expression or 'all'}", **counts, each=each, seconds=seconds)
    if code == pytest.ExitCode.NO_TESTS_COLLECTED or (outcomes.passed == 0 and outcomes.skipped):
        recorder.skip(f"tests, {expression or 'all'}", "no test marked gpu runs here")
    elif recorder.late:
        recorder.line("late", f"tests, {expression or 'all'}: what was left of them")
    elif code == 0:
        recorder.line("ok", f"tests, {expression or 'all'}", seconds=seconds, count=outcomes.passed)
    elif not recorder.failures:
        recorder.fail("tests", RuntimeError(f"pytest ended with {code}"))
    return None


def main(arguments: list[str] | None = None) -> int:
    """Build, describe the machine, or run tests."""
    flags = parser(__doc__)
    flags.add_argument("what", choices=("build", "environment", "tests"))
    flags.add_argument("--select", default="", help="tests: pytest's -k")
    flags.add_argument("--workers", type=int, default=1, help="tests: processes")
    flags.add_argument("--work", type=float, default=0.0, help="tests: seconds that they take one after another")
    args = flags.parse_args(arguments)
    recorder = Recorder(args.what, args)
    if args.what == "tests":
        tests(recorder, args.select, args.workers, args.work)
    else:
        (build if args.what == "build" else environment)(recorder)
    return recorder.code


if __name__ == "__main__":
    sys.exit(main())
