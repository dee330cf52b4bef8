"""Figures of runs: curves, comparisons, intervals, grids of masks."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from part_fast.atomic import replacing
from part_fast.optional import needs

# Okabe and Ito's palette, whose colours differ for every kind of colour vision.
BLUE, ORANGE, GREEN, VERMILION, GRAY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#767676"


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
            found = [(row["epoch"], 100 * row[key]) for row in rows if row[key] is not None]
            if found:
                x, y = zip(*found, strict=True)
                right.plot(x, y, color=color, marker=marker, markersize=3, linestyle=line, label=label)
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

    panels: title -> rows of `part_fast.experiments.compare.interval` with the name under "difference".
    """
    most = max(len(rows) for rows in panels.values())
    with drawing(path, (max(10, 4.5 * len(panels)), 1.3 + 0.3 * most), "constrained") as figure:
        named: list[str] = []  # of the panel to the left, which stand for this one too if they are the same
        for axes, (title, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for place, row in enumerate(rows):
                color = VERMILION if row["significant"] else BLUE
                mean = 100 * row["mean"]
                axes.errorbar(mean, place, xerr=100 * row["half_width_all"], color=color, linewidth=1, capsize=3)
                axes.errorbar(mean, place, xerr=100 * row["half_width"], color=color, linewidth=3, marker="o")
                seeds = [100 * value for value in row["per_seed"]]
                axes.scatter(seeds, [place + 0.25] * len(seeds), color=GRAY, marker=".", s=14)
            axes.axvline(0, color=GRAY, linewidth=1)
            names = [row["difference"] for row in rows]
            axes.set_yticks(range(len(rows)), [""] * len(rows) if names == named else names)
            named = names
            axes.set_ylim(most - 0.4, -0.6)  # a line has one height in all panels
            axes.set(xlabel="difference in accuracy (points)", title=title)
        figure.supxlabel(
            "thick: 95 % interval; thin: 95 % for all at once; dots: seeds; red: thin excludes 0, of enough seeds",
            fontsize=8,
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
    return float(box.x0 + box.x1) / 2


def load_matplotlib() -> Any:
    """The module, imported without the backend that MPLBACKEND names, which may be missing and is not needed for files.

    Notebooks set it for the processes that they start. Where it is good, the process keeps it for its own figures.
    """
    if "matplotlib" in sys.modules:  # then its backend is chosen already
        return sys.modules["matplotlib"]
    wanted = os.environ.pop("MPLBACKEND", None)
    try:
        with needs("matplotlib", "train"):
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


def draw_adversarial(path: Path, x: Tensor, attacked: Mapping[str, tuple[Tensor, Sequence[str]]], caption: str) -> None:
    """A PNG grid with a row per image: the image, then for each network the adversarial image and the change, enlarged.

    x: (N,C,H,W) in [0,1], C 1 or 3; attacked: name -> adversarial images like x and a title for each; caption: one line
    at the top. The change is drawn so that gray is none, and black and white are the largest there is.
    """
    load_matplotlib()
    n, columns = len(x), 1 + 2 * len(attacked)

    def pixels(value: Tensor) -> Any:
        return value.detach().float().cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()

    with drawing(path, (1.6 * columns, 1.75 * n + 0.5), "constrained") as figure:
        figure.suptitle(caption, fontsize=9)
        for i, row in enumerate(figure.subplots(n, columns, squeeze=False)):
            panels = [(pixels(x)[i], "natural" if i == 0 else "")]
            for name, (x_adv, titles) in attacked.items():
                change = pixels(x_adv)[i] - pixels(x)[i]
                most = max(float(abs(change).max()), 1e-9)
                panels += [(pixels(x_adv)[i], f"{name}\n{titles[i]}"), (0.5 + change / (2 * most), "change")]
            for axes, (picture, title) in zip(row, panels, strict=True):
                axes.imshow(picture.clip(0, 1))
                axes.set_title(title, fontsize=7)
                axes.set(xticks=[], yticks=[])
