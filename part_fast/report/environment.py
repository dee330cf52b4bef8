"""What a run ran on: versions, hardware, backends, commit."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import part_fast
from part_fast import backends, precision


def environment() -> dict[str, Any]:
    """Versions, hardware, backends (and why the others are not live), and part_fast's git commit, if it has one."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {
        "part_fast": part_fast.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "tf32": precision.tf32(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": {device: backends.available_backends(device) for device in devices},
        "not_available": {
            device: {name: reason for name in backends.BACKENDS if (reason := backends.why_not(name, device))}
            for device in devices
        },
    }


def environment_text(record: Mapping[str, Any]) -> str:
    """The lines that `part-fast info` prints of `environment()`."""
    tf32 = [name.replace("_", " ") for name, used in record["tf32"].items() if used]
    lines = [
        f"part_fast {record['part_fast']}" + (f" (commit {record['commit']})" if record["commit"] else ""),
        f"torch     {record['torch']}, CUDA {record['cuda'] or 'none'}, Python {record['python']}",
        f"system    {record['system']}",
        f"CPU       {record['cpu']}, {record['cpu_capability']}, {record['threads']} threads",
        f"GPU       {', '.join(record['gpus']) or 'none'}",
        f"TF32      on CUDA float32 is multiplied in it by {' and '.join(tf32) or 'nothing'}",
        "",
    ]
    for device, names in record["backends"].items():
        lines.append(f"backends for {device} tensors, the first one is used: {', '.join(names)}")
        lines += [f"  not {name}: {reason}" for name, reason in record["not_available"][device].items()]
    return "\n".join(lines)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that this package lies in, "+changes" where tracked files differ; None outside one."""
    package = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed package may lie inside another project's checkout, which does not track it.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
