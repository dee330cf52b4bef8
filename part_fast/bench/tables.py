"""What `bench ops` shows of its rows: tables as text and a figure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from part_fast.report import figures, files


def speed_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Text of the rows of `measure`; times in microseconds, memory in MiB."""
    header = (
        "shape",
        "dtype",
        "threads",
        "provider",
        "timing",
        "median us",
        "p20",
        "p80",
        "GB/s",
        "% of copy",
        "peak MiB",
    )
    text = []
    for row in rows:
        times = (f"{row[key]:.1f}" for key in ("median_us", "p20_us", "p80_us"))
        rates = (f"{row[key]:.3g}" if row[key] < 100 else f"{row[key]:.0f}" for key in ("gb_per_s", "percent_of_copy"))
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.2f}"
        text.append((row["shape"], row["dtype"], _threads(row), row["provider"], row["timing"], *times, *rates, peak))
    return files.table(header, text)


KEY = ("op", "shape", "dtype", "threads")  # what tells a case's rows from the others
RATIO_COLUMNS = (*KEY, "backend", "copy", "reference", "published", "vectorised", "torch.compile")


def _threads(row: Mapping[str, Any]) -> str:
    return "-" if row["threads"] is None else str(row["threads"])


def ratio_table(rows: Sequence[Mapping[str, Any]]) -> str:
    text = []
    for row in rows:
        numbers = (f"{row[key]:.2f}" if key in row else "-" for key in RATIO_COLUMNS[5:])
        text.append((row["op"], row["shape"], row["dtype"], _threads(row), row["backend"], *numbers))
    return files.table(RATIO_COLUMNS, text)


_COLOURS = {
    "reference": figures.GRAY,
    "published": "#000000",
    "vectorised": "#CC79A7",
    "torch.compile": figures.BLUE,
    "cpp": figures.VERMILION,
    "triton": figures.ORANGE,
    "cuda": figures.GREEN,
}


def draw(path: Path, rows: Sequence[Mapping[str, Any]], caption: str) -> None:
    """A PNG of bars: a panel per op, a group per case, a bar per provider, as long as its share of the copy's speed.

    Of a CPU, only what was measured with the most threads.
    """
    figures.load_matplotlib()
    from matplotlib.patches import Patch

    most = max((row["threads"] for row in rows if row["threads"] is not None), default=None)
    bars = [row for row in rows if row["provider"] != "copy" and row["threads"] == most]
    panels = [(op, list(group)) for op, group in itertools.groupby(bars, lambda row: row["op"])]
    # Two columns about equally tall; a panel's title and axis take the room of some bars.
    weight = [len(group) + 8 for _, group in panels]
    first = min(range(1, len(panels) + 1), key=lambda k: max(sum(weight[:k]), sum(weight[k:])))
    columns = [(panels[:first], weight[:first]), (panels[first:], weight[first:])]
    columns = [column for column in columns if column[0]]
    tallest = max(sum(heights) for _, heights in columns)
    with figures.drawing(path, (8 * len(columns), 0.15 * tallest + 1), "constrained") as figure:
        sides: Any = figure.subfigures(1, len(columns), squeeze=False)
        for side, (shown, heights) in zip(sides[0], columns, strict=True):
            spare = tallest - sum(heights)  # so that a bar is as thick in both columns
            grid = side.subplots(
                len(shown) + bool(spare), 1, squeeze=False, height_ratios=heights + [spare] * bool(spare)
            )
            if spare:
                grid[-1, 0].axis("off")
            for axes, (op, group) in zip(grid[:, 0], shown, strict=False):
                _panel(axes, op, group)
        used = [name for name in _COLOURS if any(row["provider"] == name for row in bars)]
        handles = [Patch(color=_COLOURS[name]) for name in used]
        figure.legend(handles, used, loc="outside lower center", ncols=len(used))
        figure.suptitle(f"Speed of the ops, % of a copy of the same bytes\n{caption}", fontsize=10)


def _panel(axes: Any, op: str, rows: Sequence[Mapping[str, Any]]) -> None:
    y = 0.0
    ticks: list[tuple[float, str]] = []
    widest = max(row["percent_of_copy"] for row in rows)
    if widest > 40:  # else the copy's line would leave the bars no room
        widest = max(widest, 100.0)
        axes.axvline(100, color="black", linewidth=0.8, linestyle=":")
    for (shape, dtype), group in itertools.groupby(rows, lambda row: (row["shape"], row["dtype"])):
        start = y
        for row in group:
            value = row["percent_of_copy"]
            axes.barh(y, value, height=0.9, color=_COLOURS[row["provider"]])
            axes.text(value + 0.01 * widest, y, f"{value:.3g}", va="center", fontsize=6)
            y += 1
        ticks.append(((start + y - 1) / 2, f"{shape}\n{dtype}"))
        y += 0.8
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.set(xlim=(0, 1.12 * widest), ylim=(y - 0.5, -0.8))
    axes.set_xlabel("% of copy", fontsize=7)
    axes.set_title(op, fontsize=9, loc="left")
