"""What every `part-fast bench` command does around what it times: checks, result folder, environment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from part_fast.errors import BadValueError
from part_fast.report import files


def at_least_one(name: str, *values: int) -> None:
    """Errors: ValueError that names the argument, unless every value is >= 1."""
    if any(value < 1 for value in values):
        raise BadValueError(f"{name} must be >= 1, got {', '.join(map(str, values))}")


def check_threads(threads: Sequence[int], device: torch.device) -> None:
    """Errors: ValueError for a number of threads below 1, and for any on a GPU."""
    at_least_one("threads", *threads)
    if threads and device.type != "cpu":
        raise BadValueError(f"threads are a CPU's, got {', '.join(map(str, threads))} for {device}")


def result_paths(out: Path, names: Sequence[str], overwrite: bool) -> list[Path]:
    """Where the results go; nothing is made yet.

    Errors: ValueError where the folder holds some of them already, unless `overwrite`.
    """
    paths = [out / name for name in names]
    there = [path.name for path in paths if path.exists()]
    if there and not overwrite:
        raise BadValueError(f"out must be a folder without results, got {out} with {', '.join(there)}: use --overwrite")
    return paths


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """The device is torch's current one in the block, if it is a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def environment_line(record: Mapping[str, Any], device: torch.device) -> str:
    """Where the numbers come from, in one line."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{record['cpu']} ({record['cpu_capability']}), {record['threads']} threads"
    commit = f" ({record['commit'][:8]})" if record["commit"] else ""
    return f"part_fast {record['part_fast']}{commit}, torch {record['torch']}, {device}: {hardware}"


def write_results(
    paths: Sequence[Path],
    rows: Sequence[Mapping[str, Any]],
    draw: Callable[[Path, Any, str], None],
    heading: str,
    record: Mapping[str, Any],
) -> None:
    """The rows as CSV, their figure, and the environment as JSON, into the files of `result_paths`, in this order."""
    table, figure, environment = paths
    table.parent.mkdir(parents=True, exist_ok=True)
    files.write_csv(table, rows)
    draw(figure, rows, heading)
    files.write_json(environment, record)
    print(f"\nwritten: {', '.join(map(str, paths))}")
