"""report.md: a page made of results.jsonl and the CSV files of one folder."""

from __future__ import annotations

import collections
import csv
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from part_fast.gpu.record import RESULTS

Row = dict[str, Any]
# Shown: lines of the failures' table, and characters of an error; all is in results.jsonl.
FAILURES, ERROR = 40, 120
PROFILED = "kernels of "
NO_CARD = "no GPU"
PRINTED = ("heading", "ops", "settings", "goals", "kernels", "skipped", "parts", "failures")


def read(out: Path) -> list[Row]:
    """The rows of results.jsonl; none without one. A line cut off by a killed process is left out."""
    if not (out / RESULTS).exists():
        return []
    rows = []
    for line in (out / RESULTS).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def environment(rows: Iterable[Row]) -> Row | None:
    """The row that says on what machine the results were found."""
    return next((row for row in rows if row["part"] == "environment" and row["kind"] == "value"), None)


def sections(out: Path, titles: Mapping[str, str]) -> dict[str, str]:
    """The page's sections in Markdown, by name, in its order. titles: what each part is, in the order of the table."""
    rows = read(out)
    found = {
        "heading": _heading(rows),
        "parts": _parts(rows, titles),
        "failures": _failures(rows),
        "skipped": _skipped(rows),
        "ops": _ops(_csv(out / "ops.csv")),
        "settings": _settings(_csv(out / "settings.csv")),
        "goals": _goals(_csv(out / "step_ratios.csv")),
        "kernels": _kernels(rows),
        "profile": _profile(_csv(out / "step_profile.csv")),
        "values": _values(rows),
    }
    return {name: text for name, text in found.items() if text}


def _heading(rows: Sequence[Row]) -> str:
    found = environment(rows)
    if found is None:
        return "# part_fast on a GPU\n\nThe machine was not described: the part `environment` failed."
    title = "# part_fast: a dry run on a CPU" if found["card"] == NO_CARD else f"# part_fast on {found['card']}"
    lines = [title, ""]
    versions = f"part_fast {found['part_fast']}, commit {found['commit'] or 'unknown'}"
    lines.append(
        f"{found['date']}. {versions}, torch {found['torch']}, CUDA {found['cuda']}, Triton {found['triton']}, "
        f"Python {found['python']}, {found['cores']} cores ({found['cpu']}), {found['system']}."
    )
    if "capability" in found:
        lines.append(
            f"Capability {found['capability']}, {found['multiprocessors']} multiprocessors, "
            f"{found['memory_gb']:.1f} GB, L2 {found['l2_mb']:.0f} MB, cuDNN {found['cudnn']}; "
            f"driver, power limit, clocks: {found['driver_power_clocks']}. TF32: {found['tf32']}."
        )
    live = "; ".join(f"{device}: {', '.join(names)}" for device, names in found["backends"].items())
    lines.append(f"Backends live, {live}.")
    return "\n".join(lines)


def _parts(rows: Sequence[Row], titles: Mapping[str, str]) -> str:
    cells = []
    for part, title in titles.items():
        own = [row for row in rows if row["part"] == part]
        if not own:
            continue
        count = collections.Counter(row["kind"] for row in own)
        seconds = next((row["seconds"] for row in own if row["kind"] == "part"), None)
        numbers = (str(count[kind] or "") for kind in ("ok", "failed", "skipped", "late"))
        cells.append((part, title, state(count), *numbers, "" if seconds is None else f"{seconds:.1f}"))
    header = ("part", "what", "result", "ok", "failed", "skipped", "not reached", "seconds")
    return f"## Parts\n\n{_table(header, cells)}"


def state(count: Mapping[str, int]) -> str:
    """A part in a word, by how many rows of each kind it has."""
    if count.get("failed"):
        return "**failed**"
    if count.get("ok") or count.get("value"):
        return "ok, not all of it" if count.get("late") else "ok"
    return "not reached" if count.get("late") else "skipped" if count.get("skipped") else "nothing"


def _failures(rows: Sequence[Row]) -> str:
    failed = [row for row in rows if row["kind"] == "failed"]
    if not failed:
        return ""
    # One line for all that failed alike, or one fault would hide the others.
    alike: dict[tuple[str, str], list[str]] = {}
    for row in failed:
        alike.setdefault((row["part"], row.get("error", "")), []).append(row["name"])
    cells = [
        (part, f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}", _cut(error))
        for (part, error), names in alike.items()
    ]
    more = f"\n\nand {len(cells) - FAILURES} more, in {RESULTS}" if len(cells) > FAILURES else ""
    return f"## Failures\n\n{_table(('part', 'case', 'error'), cells[:FAILURES])}{more}"


def _cut(error: str) -> str:
    """At most ERROR characters: a table is as wide as its widest cell."""
    return error if len(error) <= ERROR else f"{error[: ERROR - 3]}..."


def _skipped(rows: Sequence[Row]) -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["kind"] == "skipped":
            reasons.setdefault((row["part"], row["why"]), []).append(row["name"])
    cells = []
    for (part, why), names in reasons.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        cells.append((part, ", ".join(names[:3]) + more, why))
    return f"## Skipped\n\n{_table(('part', 'what', 'why'), cells)}" if cells else ""


def _ops(rows: Sequence[Row]) -> str:
    """A line per case: each provider's microseconds, and of the fastest of ours GB/s and % of copy."""
    if not rows:
        return ""
    own = ("cuda", "triton", "cpp")
    present = {row["provider"] for row in rows}
    providers = [*(name for name in own if name in present), "reference", "vectorised", "torch.compile", "published"]
    providers = [name for name in providers if name in present]
    cells = []
    # A case may have been measured again beside published code: the same key, another group.
    for key, group in itertools.groupby(rows, lambda row: (row["op"], row["shape"], row["dtype"])):
        of = {row["provider"]: row for row in group}
        best = min((of[name] for name in own if name in of), key=lambda row: float(row["median_us"]), default=None)
        times = (f"{float(of[name]['median_us']):.1f}" if name in of else "" for name in providers)
        speed = (
            ("", "") if best is None else (f"{float(best['gb_per_s']):.0f}", f"{float(best['percent_of_copy']):.0f}")
        )
        cells.append((*key, *times, *speed))
    header = ("op", "shape", "dtype", *(f"{name} us" for name in providers), "GB/s", "% of copy")
    return f"## Ops: medians; GB/s and % of copy are of our fastest\n\n{_table(header, cells)}"


def _settings(rows: Sequence[Row]) -> str:
    """A line per setting, with how many times faster it is than the published loop of its kind."""
    sections = []
    for (model, batch), group in itertools.groupby(rows, lambda row: (row["model"], row["batch"])):
        measured = list(group)
        speed = {row["setting"]: float(row["images_per_s"]) for row in measured}
        cells = []
        for row in measured:
            name = row["setting"]
            other = speed.get(_published(name))
            times = "" if other is None else f"{speed[name] / other:.2f}x"
            spread = f"{float(row['least_ms']):.2f} to {float(row['most_ms']):.2f}"
            share = f"{float(row['percent_of_matmul']):.1f}" if row["percent_of_matmul"] else ""
            rate, ms, host = (f"{float(row[key]):.{n}f}" for key, n in (("images_per_s", 1), ("ms", 2), ("host_ms", 2)))
            cells.append((name, rate, ms, spread, host, share, times, f"{float(row['first_s']):.1f}"))
        header = ("step", "images/s", "ms", "least to most", "host ms", "% of matmul", "of published", "first call, s")
        sections.append(f"## Training steps: {model}, batch {batch}\n\n{_table(header, cells)}")
    return "\n\n".join(sections)


def _published(setting: str) -> str:
    """The published loop that does what a setting does: not one of another attack, or with masks of before."""
    method, _, how = setting.partition(" ")
    compared = method.rstrip(",") if how.split(",")[0] in ("bf16", "fp32", "fp16") else "none"
    return f"published {compared}{', cudnn.benchmark' * setting.endswith('cudnn.benchmark')}"


def _goals(rows: Sequence[Row]) -> str:
    if not rows:
        return ""

    def shown(row: Row, key: str) -> str:
        if not row[key]:
            return ""
        value = float(row[key])
        return {"extra": f"{100 * value:.2f}%", "rate": f"{value:.0f}"}.get(row["kind"], f"{value:.3f}x")

    keys = ("value", "p20", "p80", "by_parts", "goal")
    cells = [(row["what"], row["model"], row["batch"], *(shown(row, key) for key in keys), row["met"]) for row in rows]
    header = ("`bench step`", "model", "batch", "measured", "p20", "p80", "by parts", "goal", "met")
    return f"## Against the published steps\n\n{_table(header, cells)}"


def _kernels(rows: Sequence[Row]) -> str:
    """Milliseconds of each kind of kernel, a column for each profiled step."""
    steps = [row for row in rows if row["kind"] == "value" and row["name"].startswith(PROFILED)]
    if not steps:
        return ""
    kinds = dict.fromkeys(key for row in steps for key in row if key not in ("part", "kind", "name"))
    cells = [(kind.replace("_", " "), *(_number(row.get(kind, "")) for row in steps)) for kind in kinds]
    titles = (row["name"].removeprefix(PROFILED) for row in steps)
    return f"## Kernels of one step, by kind\n\n{_table(('', *titles), cells)}"


def _profile(rows: Sequence[Row]) -> str:
    sections = []
    for (model, batch), group in itertools.groupby(rows, lambda row: (row["model"], row["batch"])):
        of = list(group)
        methods = list(dict.fromkeys(row["method"] for row in of))
        cells = []
        for part in dict.fromkeys(row["part"] for row in of):
            own = {row["method"]: row for row in of if row["part"] == part}
            cells.append((part, *(f"{1e3 * float(own[method]['median_s']):.2f}" for method in methods)))
        title = f"## Where a step's time goes: {model}, batch {batch}, ms"
        sections.append(f"{title}\n\n{_table(('part', *methods), cells)}")
    return "\n\n".join(sections)


def _values(rows: Sequence[Row]) -> str:
    """All other numbers: a table per part and set of columns."""
    values = [row for row in rows if row["kind"] == "value" and row["part"] not in ("environment", "bench")]
    values = [row for row in values if not row["name"].startswith(PROFILED)]
    sections = []
    for part, group in itertools.groupby(sorted(values, key=lambda row: row["part"]), lambda row: row["part"]):
        tables: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for row in group:
            keys = tuple(key for key in row if key not in ("part", "kind", "name"))
            tables.setdefault(keys, []).append((row["name"], *(_number(row[key]) for key in keys)))
        texts = [_table(("", *(key.replace("_", " ") for key in keys)), cells) for keys, cells in tables.items()]
        sections.append(f"## Numbers of {part}\n\n" + "\n\n".join(texts))
    return "\n\n".join(sections)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _csv(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, also to be read as text: columns are as wide as their widest cell."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
