"""A self-contained HTML page: what its template shows, texts escaped, pictures inlined."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from part_fast.atomic import replacing
from part_fast.optional import needs

with needs("jinja2", "train"):
    import jinja2
with needs("pillow", "train"):
    from PIL import Image

LARGEST = 96  # pixels of a small picture's longer side


@dataclass(frozen=True)
class Table:
    """caption: what it shows and how to read it. header: a text per column; the first column names its row.

    rows: texts. differing: the rows, by their place, that are to be seen at once. numbers: columns to the right.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    differing: Sequence[int] = ()
    numbers: bool = True


@dataclass(frozen=True)
class Chart:
    """An <svg> of `charts`, under a heading; unit: of its vertical axis; `numbers` says the same as a table."""

    title: str
    unit: str
    svg: str
    numbers: Table


@dataclass(frozen=True)
class Picture:
    """A small picture, as data, and what is to be seen on it; `below` stands under it."""

    source: str
    alt: str
    below: str = ""


@dataclass(frozen=True)
class MaskGrid:
    """epochs: over the columns. blocks: for each image, the image and a row for each run: its name and its masks."""

    caption: str
    epochs: Sequence[str]
    blocks: Sequence[tuple[Picture, Sequence[tuple[str, Sequence[Picture | None]]]]]


@dataclass(frozen=True)
class Section:
    """A heading, sentences about what follows or is missing, and what follows. legend: (key, name) of the charts."""

    name: str
    title: str
    says: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    legend: Sequence[tuple[str, str]] = ()
    grids: Sequence[MaskGrid] = ()
    folded: Sequence[Table] = field(default=())


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # a run may be called <script>
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def write_page(path: Path, title: str, summary: str, warnings: Sequence[str], sections: Sequence[Section]) -> None:
    """Write page.html, filled in, to `path`: the same text for the same arguments."""
    values: dict[str, Any] = {"title": title, "summary": summary, "warnings": warnings, "sections": sections}
    text = _template().render(values)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def picture(image: Tensor) -> str:
    """The data: URL of a PNG of `image`, uint8 (C,H,W), C 1 or 3, made smaller where it is larger than `LARGEST`."""
    array = image.cpu().permute(1, 2, 0).numpy()
    drawn = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    drawn.thumbnail((LARGEST, LARGEST))
    data = io.BytesIO()
    drawn.save(data, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def mask_picture(image: Tensor, weights: Tensor) -> str:
    """The data: URL of `image`, uint8 (C,H,W), darkened and without colour, orange where `weights`, (H,W), are 255."""
    gray = image.float().mean(0) * 0.55
    share = weights.float() / 255
    # The colour is mixed in equal parts with the image, so that its edges can be seen.
    orange = (230, 159, 0)
    channels = [gray + share * 0.65 * (level - gray) for level in orange]
    return picture(torch.stack([channel.round().clamp(0, 255).byte() for channel in channels]))
