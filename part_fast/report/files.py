"""JSON and CSV files, written whole or not at all, and tables as text."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from part_fast.atomic import replacing as replacing


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """`values`, indented."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A row per mapping, columns in the order in which they first appear; None, and what a row lacks, is empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text columns, the first one left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])
