"""What `bench step` shows of its rows: tables as text and Markdown, and a figure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from part_fast.bench.profile import parts_there
from part_fast.bench.step_cases import METHODS, PAIRS
from part_fast.report import figures

Table = tuple[str, Sequence[str], list[tuple[str, ...]]]


def tables_of(rows: Sequence[Mapping[str, Any]], profiled: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Of one model: its steps, what masks add, and the parts of a step."""
    model = f"{rows[0]['model']}, batch {rows[0]['batch']}"
    return [
        (f"{model}: a step", *_step_cells([row for row in rows if row["kind"] == "step"])),
        (f"{model}: what masks add, and a matrix product", *_step_cells([r for r in rows if r["kind"] != "step"])),
        (f"{model}: where a step's time goes, ms (%)", *_profile_cells(profiled)),
    ]


def _step_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    header = ("", "precision", "median ms", "p20", "p80", "images/s", "GFLOP", "GFLOP/s", "% of matmul", "peak MiB")
    cells = []
    for row in rows:
        times = (f"{1e3 * row[key]:.1f}" for key in ("median_s", "p20_s", "p80_s"))
        rate = "-" if row["images_per_s"] is None else f"{row['images_per_s']:.1f}"
        flop = (f"{row[key]:.1f}" for key in ("gflop", "gflop_per_s", "percent_of_matmul"))
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        cells.append((row["name"], row["precision"], *times, rate, *flop, peak))
    return header, cells


def _profile_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    of = {(row["part"], row["method"]): row for row in rows}
    cells = []
    for part in (*parts_there(rows), "total"):
        shown = (of[part, method] for method in METHODS)
        cells.append((part, *(f"{1e3 * row['median_s']:.1f} ({row['percent']:.2f})" for row in shown)))
    return ("part", *METHODS), cells


def ratio_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    header = ("", "model", "batch", "measured", "p20", "p80", "by parts", "goal", "met")
    cells = []
    for row in rows:

        def text(key: str, row: Mapping[str, Any] = row) -> str:
            value = row[key]
            if value is None:
                return "-"
            if row["kind"] == "rate":
                return f"{value:.0f}"
            return f"{100 * value:.2f}%" if row["kind"] == "extra" else f"{value:.3f}x"

        met = "-" if row["met"] is None else "yes" if row["met"] else "no"
        numbers = (text(key) for key in ("value", "p20", "p80", "by_parts", "goal"))
        cells.append((row["what"], row["model"], str(row["batch"]), *numbers, met))
    return "Against the goals: times faster than the published step; extra cost; memory; images/s", header, cells


def markdown(
    heading: str,
    rows: Sequence[Mapping[str, Any]],
    compared: Sequence[Mapping[str, Any]],
    profiled: Sequence[Mapping[str, Any]],
) -> str:
    """Every table that was printed, for docs/performance.md."""
    tables = [ratio_table(compared)]
    for model, group in itertools.groupby(rows, lambda row: row["model"]):
        tables += tables_of(list(group), [row for row in profiled if row["model"] == model])
    text = [heading.replace("\n", "; ") + "."]
    for title, header, cells in tables:
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
        text.append(f"**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(text) + "\n"


_PART_COLOURS = {
    "augmentation": "#F0E442",
    "CAM": figures.VERMILION,
    "refresh of AttackModel": "#000000",
    "attack forward": figures.BLUE,
    "attack backward": "#56B4E9",
    "pgd_step": "#CC79A7",
    "training forward": figures.GREEN,
    "training backward": "#66CCAA",
    "optimizer": figures.ORANGE,
    "attack graph": "#8C6BB1",
    "training graph": "#B59BD0",
    "other": figures.GRAY,
    "waiting": "#DDDDDD",
}

_OURS, _PUBLISHED = "#44546A", "#B8B8B8"  # of whole steps: colours that no part has


def draw(path: Path, rows: Sequence[Mapping[str, Any]], profiled: Sequence[Mapping[str, Any]], caption: str) -> None:
    """A PNG: for each model the time of every step, and the parts of a step of every method, stacked.

    Each column has a legend of its own: left ours and the published ones, right the parts.
    """
    from matplotlib.patches import Patch

    models = list(dict.fromkeys((row["model"], row["batch"]) for row in rows))
    theirs = {published for _, published in PAIRS}
    parts = parts_there(profiled)
    with figures.drawing(path, (14, 4 * len(models) + 1.5), "constrained") as figure:
        panels: Any = figure.subplots(len(models), 2, squeeze=False)
        for (model, batch), (left, right) in zip(models, panels, strict=True):
            shown = [row for row in rows if row["model"] == model and row["kind"] == "step"]
            for y, row in enumerate(shown):
                colour = _PUBLISHED if row["name"] in theirs else _OURS
                errors = [[row["median_s"] - row["p20_s"]], [row["p80_s"] - row["median_s"]]]
                left.barh(y, row["median_s"], xerr=errors, color=colour)
                left.text(row["p80_s"], y, f" {row['median_s']:.3g} s", va="center", fontsize=7)
            left.set_yticks(range(len(shown)), [row["name"] for row in shown], fontsize=8)
            left.invert_yaxis()
            left.set_xlim(0, 1.15 * max(row["p80_s"] for row in shown))
            left.set(xlabel="seconds a step (20th to 80th percentile)", title=f"{model}, batch {batch}")
            of = {(row["method"], row["part"]): row["median_s"] for row in profiled if row["model"] == model}
            for y, method in enumerate(METHODS):
                at = 0.0
                for part in parts:
                    right.barh(y, of[method, part], left=at, color=_PART_COLOURS[part])
                    at += of[method, part]
            right.set_yticks(range(len(METHODS)), METHODS, fontsize=8)
            right.invert_yaxis()
            right.set(xlabel="seconds", title="where a step's time goes")
        steps_legend = [Patch(color=_OURS, label="part_fast"), Patch(color=_PUBLISHED, label="published loops")]
        parts_legend = [Patch(color=_PART_COLOURS[part], label=part) for part in parts]
        for axes, handles in zip(panels[-1], (steps_legend, parts_legend), strict=True):
            axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=5, fontsize=8)
        figure.suptitle(f"Training steps, 32x32, PGD-10\n{caption}", fontsize=9)
