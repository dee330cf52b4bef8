"""Line charts as SVG, whose colours and fonts are those of the HTML page that they stand in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from part_fast.optional import needs

with needs("jinja2", "train"):
    from markupsafe import Markup

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 40
INSET = 10  # from the left end of the axis to the first point, whose marker would hide a number
# As many as the page's style has; a further series gets the first colour again, with dashes.
COLORS = 8


@dataclass(frozen=True)
class Series:
    """One line of a chart. place: which colour, dash and marker, so that a name looks the same in every chart.

    points: (x, y), ascending in x. thin: further lines of the same colour, such as those of single seeds.
    """

    name: str
    place: int
    points: Points
    thin: Sequence[Points] = ()


def line_chart(title: str, x_label: str, y_label: str, series: Sequence[Series], *, even: bool = False) -> Markup:
    """The chart as an <svg> element. even: the x values that occur stand side by side, whatever their distances.

    Every number is finite; each text is escaped. A reader without eyes gets the title and each line's two ends.
    """
    lines = [line for one in series for line in (one.points, *one.thin)]
    xs = sorted({x for line in lines for x, _ in line})
    low, high, step = _ticks(min(y for line in lines for _, y in line), max(y for line in lines for _, y in line))
    inner, tall = WIDTH - LEFT - INSET - RIGHT, HEIGHT - TOP - BOTTOM

    def across(x: float) -> float:
        share = xs.index(x) / max(len(xs) - 1, 1) if even else (x - xs[0]) / ((xs[-1] - xs[0]) or 1)
        return LEFT + INSET + inner * (share if len(xs) > 1 else 0.5)

    def down(y: float) -> float:
        return TOP + tall * (1 - (y - low) / (high - low))

    ends = "; ".join(
        f"{one.name}: {_number(one.points[0][1])} at {_number(one.points[0][0])}, "
        f"{_number(one.points[-1][1])} at {_number(one.points[-1][0])}"
        for one in series
        if one.points
    )
    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            WIDTH, HEIGHT, f"{title}. {y_label} over {x_label}. {ends}"
        )
    ]
    for i in range(round((high - low) / step) + 1):
        y = low + i * step
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                LEFT, WIDTH - RIGHT, down(y), down(y)
            )
        )
        parts.append(_text(LEFT - 6, down(y) + 4, _number(y), "end"))
    for x in xs if even else _whole(xs):
        parts.append(_text(across(x), HEIGHT - BOTTOM + 17, _number(x), "middle"))
    parts.append(_text(LEFT + inner / 2, HEIGHT - 4, x_label, "middle"))
    for one in series:
        look = f"s{one.place % COLORS} d{one.place // COLORS % 3}"
        for line in one.thin:
            parts.append(_polyline(f"thin {look}", [(across(x), down(y)) for x, y in line]))
        parts.append(_polyline(look, [(across(x), down(y)) for x, y in one.points]))
        for x, y in one.points:
            said = f"{one.name}, {x_label} {_number(x)}: {_number(y)}"
            parts.append(marker(one.place, across(x), down(y), said, small=len(one.points) > 30))
    return Markup("").join([*parts, Markup("</svg>")])


def marker(place: int, x: float, y: float, said: str, small: bool = False) -> Markup:
    """The sign of a series at (x, y): a disc, square, triangle or diamond, by its place; `said` when pointed at."""
    r = 2 if small else 3.5
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"',
        f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r}" height="{2 * r}"',
        f'<path d="M{x:.1f} {y - r - 1:.1f}l{r + 1} {2 * r}h-{2 * r + 2}z"',
        f'<path d="M{x:.1f} {y - r - 1:.1f}l{r + 1} {r + 1}l-{r + 1} {r + 1}l-{r + 1} -{r + 1}z"',
    )
    shape = Markup(shapes[place % len(shapes)])
    return shape + Markup(' class="dot s{}"><title>{}</title></{}>').format(
        place % COLORS, said, ("circle", "rect", "path", "path")[place % len(shapes)]
    )


def key(place: int) -> Markup:
    """A piece of a series' line, for a legend."""
    look = f"s{place % COLORS} d{place // COLORS % 3}"
    line = _polyline(look, [(1, 7), (29, 7)])
    return Markup('<svg class="key" viewBox="0 0 30 14" aria-hidden="true">{}{}</svg>').format(
        line, marker(place, 15, 7, "")
    )


def _polyline(look: str, places: Points) -> Markup:
    return Markup('<polyline class="{}" points="{}"/>').format(look, " ".join(f"{x:.1f},{y:.1f}" for x, y in places))


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _step(span: float, most: int) -> float:
    """1, 2 or 5 times a power of ten, so that at most `most` steps span it."""
    size = 10.0 ** math.floor(math.log10(span / most))
    return next(size * factor for factor in (1, 2, 5, 10) if size * factor * most >= span * (1 - 1e-9))


def _ticks(low: float, high: float) -> tuple[float, float, float]:
    """(first tick, last tick, distance of ticks) that hold low and high."""
    if high == low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    step = _step(high - low, 5)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step


def _whole(xs: Sequence[float]) -> list[int]:
    """Some of the whole numbers in the range of xs, which has the width of a chart; at most eight."""
    first, last = math.ceil(xs[0]), math.floor(xs[-1])
    step = max(round(_step(last - first, 7)), 1) if last > first else 1
    start = math.ceil(first / step) * step
    return list(range(start, last + 1, step))
