"""What runs leave behind: the environment they ran in, JSON and CSV files, tables, curves and grids of masks."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import part_fast
from part_fast import backends, precision

# Okabe and Ito's palette: tells apart for every kind of colour vision.
BLUE, ORANGE, GREEN, VERMILION, GRAY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#767676"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write that then takes the place of `path` at once: no reader ever meets half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """`values`, indented."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A row per mapping, columns in the first one's order; None is an empty cell."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


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
        # An installed package may lie inside somebody else's checkout, which does not track it.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text columns, the first one left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def draw_curves(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Loss and accuracies over the epochs of one run: the rows of its metrics.csv, as numbers."""
    epochs = [row["epoch"] for row in rows]
    series = (
        ("test_natural", "test, natural", BLUE, "o", "-"),
        ("test_pgd20", "test, PGD-20", VERMILION, "s", "-"),
        ("train_robust", "training, under attack", ORANGE, "^", "--"),
    )
    with drawing(path, (9.5, 4), "constrained") as figure:
        left, right = _two_panels(figure)
        figure.suptitle(title)
        left.plot(epochs, [row["train_loss"] for row in rows], color=GREEN, marker="o", markersize=3)
        left.set(xlabel="epoch", ylabel="training loss (nats)")
        for key, label, color, marker, line in series:
            if any(row[key] is not None for row in rows):
                values = [float("nan") if row[key] is None else 100 * row[key] for row in rows]
                right.plot(epochs, values, color=color, marker=marker, markersize=3, linestyle=line, label=label)
        right.set(xlabel="epoch", ylabel="accuracy (%)")
        methods = [row["method"] for row in rows]
        changes = [i for i in range(1, len(rows)) if methods[i] != methods[i - 1]]
        for axes in (left, right):
            axes.xaxis.get_major_locator().set_params(integer=True)
            for i in changes:
                said = f"{methods[i]} from here" if axes is right else None
                axes.axvline((epochs[i - 1] + epochs[i]) / 2, color=GRAY, linestyle=":", label=said)
        figure.legend(loc="outside lower center", ncols=5)


def draw_comparison(
    path: Path, curves: Mapping[str, Mapping[int, Sequence[float]]], results: Mapping[str, Any]
) -> None:
    """Left: natural test accuracy over epochs, mean and range over seeds. Right: where each seed's run ends.

    curves: method -> epoch -> accuracy of each seed; results: method -> {"natural": per seed, "pgd20": per seed}, in
    which dotted lines join the runs of one seed.
    """
    style = {"AT": (BLUE, "o"), "PART": (VERMILION, "s")}
    with drawing(path, (10, 4), "constrained") as figure:
        left, right = _two_panels(figure)
        for method, epochs in curves.items():
            color, marker = style.get(method, (GRAY, "^"))
            at = sorted(epochs)
            mean = [100 * sum(epochs[e]) / len(epochs[e]) for e in at]
            left.plot(at, mean, color=color, marker=marker, markersize=4, label=method)
            if any(len(epochs[e]) > 1 for e in at):
                ends = ([100 * end(epochs[e]) for e in at] for end in (min, max))
                left.fill_between(at, *ends, color=color, alpha=0.2, linewidth=0)
        left.set(xlabel="epoch", ylabel="natural test accuracy (%)", title="line: mean, band: range of seeds")
        left.xaxis.get_major_locator().set_params(integer=True)
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=8)
        pairs: list[tuple[float, float]] = []
        for method, values in results.items():
            color, marker = style.get(method, (GRAY, "^"))
            natural, robust = ([100 * v for v in values[key]] for key in ("natural", "pgd20"))
            right.scatter(natural, robust, color=color, marker=marker, alpha=0.6, label=f"{method}, one seed")
            if pairs:
                for one, other in zip(pairs, zip(natural, robust, strict=True), strict=True):
                    right.plot(*zip(one, other, strict=True), color=GRAY, linewidth=0.8, linestyle=":", zorder=1)
            pairs = list(zip(natural, robust, strict=True))
            middle = sum(natural) / len(natural), sum(robust) / len(robust)
            right.scatter(*middle, color=color, marker="*", s=220, edgecolor="black", label=f"{method}, mean", zorder=3)
        right.set(xlabel="natural test accuracy (%)", ylabel="PGD-20 test accuracy (%)", title="after the last epoch")
        right.locator_params(axis="x", nbins=5)  # labels of small differences are long
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, fontsize=8, columnspacing=1)


def draw_intervals(path: Path, panels: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A panel per measure, a line per difference: each seed's, the mean, and its two confidence intervals.

    panels: title -> rows of `part_fast.compare.interval` with the name under "difference".
    """
    most = max(len(rows) for rows in panels.values())
    with drawing(path, (10, 1.3 + 0.3 * most), "constrained") as figure:
        for i, (axes, (title, rows)) in enumerate(zip(_two_panels(figure), panels.items(), strict=True)):
            for place, row in enumerate(rows):
                color = VERMILION if row["significant"] else BLUE
                mean = 100 * row["mean"]
                axes.errorbar(mean, place, xerr=100 * row["half_width_all"], color=color, linewidth=1, capsize=3)
                axes.errorbar(mean, place, xerr=100 * row["half_width"], color=color, linewidth=3, marker="o")
                seeds = [100 * value for value in row["per_seed"]]
                axes.scatter(seeds, [place + 0.25] * len(seeds), color=GRAY, marker=".", s=14)
            axes.axvline(0, color=GRAY, linewidth=1)
            axes.set_yticks(range(len(rows)), [row["difference"] for row in rows] if i == 0 else [""] * len(rows))
            axes.invert_yaxis()
            axes.set(xlabel="difference in accuracy (points)", title=title)
        figure.supxlabel(
            "thick: 95 % interval; thin: 95 % for all at once; dots: seeds; red: the thin one excludes 0", fontsize=8
        )


def draw_masks(
    path: Path,
    x: Tensor,
    cams: Tensor,
    maps: Mapping[str, Tensor],
    x_adv: Tensor,
    titles: Sequence[tuple[str, str]],
    caption: str,
) -> None:
    """A PNG grid with a row per image: image, CAM over it, eps map by each rule, adversarial image, difference x8.

    x, x_adv: (N,C,H,W) in [0,1], C 1 or 3; cams: (N,H,W) in [0,1]; maps: rule -> (N,M,H,W), the mean over M is drawn;
    titles: for each image one above it and one above its adversarial image; caption: one line at the top.
    """
    load_matplotlib()
    from matplotlib.colors import Normalize

    n = len(x)

    def pixels(value: Tensor) -> Any:
        return value.detach().float().cpu().numpy()

    images, adversarial = (pixels(value.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)) for value in (x, x_adv))
    heat, levels = pixels(cams), [255 * pixels(eps.mean(1)) for eps in maps.values()]
    low, high = min(float(v.min()) for v in levels), max(float(v.max()) for v in levels)
    scale = Normalize(low, high if high > low else low + 1)
    rules = ["eps map"] if len(maps) == 1 else [f"eps map,\n{rule}" for rule in maps]
    heads = ("image\nlabel -> prediction", "CAM", *rules, "adversarial image\n-> prediction", "difference, x8")
    columns = len(heads)
    side, gap, top, bottom = 1.6, 0.22, 0.75, 0.65  # inches
    width, height = columns * side + 0.3, n * (side + gap) + top + bottom
    with drawing(path, (width, height)) as figure:
        figure.text(0.5, 1 - 0.12 / height, caption, ha="center", va="top", fontsize=9)

        def place(column: int, up: float, tall: float, wide: float = side - 0.08) -> Any:
            left = 0.15 + column * side + (side - wide) / 2
            return figure.add_axes((left / width, up / height, wide / width, tall / height))

        for i in range(n):
            up = height - top - (i + 1) * (side + gap) + 0.04
            panels = [place(column, up, side - 0.08) for column in range(columns)]
            image, cam, *shades, attacked, difference = panels
            image.imshow(images[i], vmin=0, vmax=1)
            cam.imshow(images[i].mean(2), cmap="gray", vmin=0, vmax=1)
            warmth = cam.imshow(heat[i], cmap="inferno", vmin=0, vmax=1, alpha=0.6)
            for axes, values in zip(shades, levels, strict=True):
                shade = axes.imshow(values[i], cmap="cividis", norm=scale, interpolation="nearest")
            attacked.imshow(adversarial[i], vmin=0, vmax=1)
            difference.imshow((0.5 + 8 * (adversarial[i] - images[i])).clip(0, 1))
            for axes, title in ((image, titles[i][0]), (attacked, titles[i][1])):
                axes.set_title(title, fontsize=7.5, pad=3)
            for column, axes in enumerate(panels):
                axes.set(xticks=[], yticks=[])
                if i == 0:
                    head = 1 - (top + 0.02) / height
                    figure.text(*(_middle(axes), head), heads[column], ha="center", va="bottom", fontsize=9)
        bars = ((warmth, 1, "CAM, 0 to 1", (0, 0.5, 1)), (shade, 2, "eps, 1/255", sorted({low, high})))
        for mappable, column, label, ticks in bars:
            box = place(column, 0.45, 0.1, wide=1.2)
            bar = figure.colorbar(mappable, cax=box, orientation="horizontal", ticks=ticks)
            bar.ax.set_xticklabels([f"{tick:.3g}" for tick in ticks])
            bar.set_label(label, fontsize=8, labelpad=1)
            bar.ax.tick_params(labelsize=7)


def _middle(axes: Any) -> float:
    box = axes.get_position()
    return (box.x0 + box.x1) / 2


def load_matplotlib() -> Any:
    """The module, imported without the backend of MPLBACKEND, which may be absent here and draws nothing of ours.

    Notebooks set it for the processes that they start. Where it is good, the process keeps it for its own figures.
    """
    if "matplotlib" in sys.modules:  # somebody has chosen
        return sys.modules["matplotlib"]
    wanted = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if wanted is not None:
            os.environ["MPLBACKEND"] = wanted
    if wanted:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = wanted
    return matplotlib


@contextlib.contextmanager
def drawing(path: Path, size: tuple[float, float], layout: Literal["constrained"] | None = None) -> Iterator[Any]:
    """A figure that is saved to `path` (PNG) when the block ends; no global state of pyplot is touched."""
    load_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout=layout, dpi=150)
    FigureCanvasAgg(figure)
    yield figure
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _two_panels(figure: Any) -> Any:
    panels = figure.subplots(1, 2)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return panels
