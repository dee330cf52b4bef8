"""Images in memory as uint8 tensors: the data set, balanced subsets, batches, crop and flip as one gather."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from part_fast import checks
from part_fast.errors import BadValueError


class Batch(NamedTuple):
    """Images (B,C,H,W) uint8, labels (B,) int64 and their positions (B,) int64 in the data set."""

    images: Tensor
    labels: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Dataset:
    """A whole data set in memory.

    Attributes:
        images: uint8 (N,C,H,W).
        labels: int64 (N,), each in [0, num_classes).
        class_names: one per class.
        name, split: what `load` was asked for.
        source: the file or folder it came from.

    Raises:
        ValueError: the tensors do not fit together, or a label is out of range.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    class_names: tuple[str, ...]
    name: str
    split: str
    source: str = ""

    def __post_init__(self) -> None:
        where = self.source or self.name
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise BadValueError(
                f"images takes a uint8 tensor (N,C,H,W), got {self.images.dtype} {tuple(self.images.shape)} ({where})"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise BadValueError(
                f"labels takes an int64 tensor ({len(self.images)},), one per image, "
                f"got {self.labels.dtype} {tuple(self.labels.shape)} ({where})"
            )
        if len(self.class_names) != self.num_classes:
            raise BadValueError(f"class_names takes {self.num_classes} names, got {len(self.class_names)} ({where})")
        if len(self.labels):
            low, high = int(self.labels.min()), int(self.labels.max())
            if low < 0 or high >= self.num_classes:
                raise BadValueError(
                    f"labels takes values from 0 to {self.num_classes - 1}, got {low if low < 0 else high} ({where})"
                )

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Dataset:
        """The same data set with images and labels on `device`."""
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, n: int, seed: int = 0, name: str = "n") -> Dataset:
        """n images at random, classes as equal in number as the data allows, in their original order.

        With one seed a smaller subset is part of a larger one. name: what an error calls n.

        Raises:
            ValueError: n is not from 1 to len(self).
        """
        indices = balanced_indices(self.labels, n, seed, name)
        return dataclasses.replace(self, images=self.images[indices], labels=self.labels[indices])

    def set_aside(self, n: int, seed: int = 0, name: str = "n") -> tuple[Dataset, Dataset]:
        """(what is left, a part of n images as `subset` takes it), both in their original order.

        Raises:
            ValueError: n is not from 1 to len(self) - 1.
        """
        part = balanced_indices(self.labels, checks.count(name, n, 1), seed, name)
        if len(part) == len(self):
            raise BadValueError(f"{name} must be < {len(self)}, the number of images, got {n}")
        left = torch.ones(len(self), dtype=torch.bool, device=self.labels.device)
        left[part] = False
        rest, taken = (
            dataclasses.replace(self, images=self.images[chosen], labels=self.labels[chosen]) for chosen in (left, part)
        )
        return rest, taken

    def batches(
        self,
        batch_size: int,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
        order: Tensor | None = None,
        join_last: bool = False,
    ) -> Iterator[Batch]:
        """One pass over the data set; the order is drawn when this is called. Images stay uint8.

        With drop_last a last batch smaller than batch_size is left out; with join_last one of a single image is part of
        the batch before it (see `batch_length`). order: the samples to go over, in this order.

        Raises:
            ValueError: batch_size < 1.
        """
        if batch_size < 1:
            raise BadValueError(f"batch_size takes an integer >= 1, got {batch_size!r}")
        if order is not None:
            order = order.to(self.images.device)
        elif shuffle:
            device = generator.device if generator is not None else None
            order = torch.randperm(len(self), generator=generator, device=device).to(self.images.device)
        else:
            order = torch.arange(len(self), device=self.images.device)
        end = len(order) // batch_size * batch_size if drop_last else len(order)
        cuts = [*range(0, end, batch_size), end]
        if join_last and len(cuts) > 2 and batch_length(end - cuts[-3], batch_size) > batch_size:
            del cuts[-2]
        chunks = (order[start:stop] for start, stop in itertools.pairwise(cuts))
        return (Batch(self.images[indices], self.labels[indices], indices) for indices in chunks)


def batch_length(left: int, batch_size: int, batches: int = 1) -> int:
    """Images in the next `batches` training batches, of `left` images: a single last one joins the batch before.

    Alone it would make BatchNorm raise where the map is one pixel, and give noisy statistics elsewhere.
    """
    full = batch_size * batches
    return left if left <= full + (batch_size > 1) else full


def balanced_indices(labels: Tensor, n: int, seed: int = 0, name: str = "n") -> Tensor:
    """Positions (n,) int64, ascending, of n random samples with classes as equal in number as `labels` (N,) allows.

    Raises:
        ValueError: n is not from 1 to N.
    """
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= len(labels):
        raise BadValueError(f"{name} takes an integer from 1 to {len(labels)}, the number of images, got {n!r}")
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    drawn = labels.cpu()[shuffled]
    by_class = torch.argsort(drawn, stable=True)
    counts = torch.bincount(drawn)
    first = torch.cumsum(counts, 0) - counts
    rank = torch.empty_like(by_class)
    rank[by_class] = torch.arange(len(labels)) - first[drawn[by_class]]
    # The first sample of every class, then the second, and so on: any prefix is as balanced as it can be.
    chosen = shuffled[torch.argsort(rank, stable=True)[:n]]
    return chosen.sort().values.to(labels.device)


def to_float(images: Tensor) -> Tensor:
    """Images in [0,255], uint8 or any dtype, as new float32 ones in [0,1]. Equivalent to: `images.float() / 255`."""
    return images.to(torch.float32, copy=True).div_(255)


@dataclass(frozen=True)
class Augmentation:
    """A drawn crop and flip for each sample, to be applied to images and, the same way, to their masks.

    Attributes:
        dy, dx: int64 (N,), the shift: row y of the result is row y + dy of the source, columns alike.
        flip: bool (N,), whether the cropped sample is mirrored left to right.
    """

    dy: Tensor
    dx: Tensor
    flip: Tensor

    def apply(self, images: Tensor, fill: float = 0.0) -> Tensor:
        """Crop and flip (N,C,H,W); uint8 becomes float32 in [0,1], any other dtype is kept (masks, eps maps).

        `fill`, in units of the result, is what lies outside the source. The result is new and contiguous.
        Equivalent to, for each sample: pad with `fill`, crop at the drawn place, `flip(-1)` where drawn.

        Raises:
            ValueError: images is not (N,C,H,W) with the N that was drawn for.
        """
        if images.dim() != 4 or len(images) != len(self.dy):
            raise BadValueError(
                f"images takes ({len(self.dy)},C,H,W), as many as were drawn, got {tuple(images.shape)}"
            )
        n, channels, height, width = images.shape
        device = images.device
        dy, dx, flip = (t.to(device).unsqueeze(1) for t in (self.dy, self.dx, self.flip))
        columns = torch.arange(width, device=device)
        rows = torch.arange(height, device=device) + dy
        columns = torch.where(flip, width - 1 - columns, columns) + dx
        outside = ((rows < 0) | (rows >= height)).unsqueeze(2) | ((columns < 0) | (columns >= width)).unsqueeze(1)
        source = rows.clamp(0, height - 1).unsqueeze(2) * width + columns.clamp(0, width - 1).unsqueeze(1)
        index = source.view(n, 1, height * width).expand(n, channels, height * width)
        out = images.flatten(2).gather(2, index).view(images.shape)
        if out.dtype == torch.uint8:
            out = to_float(out)
        return out.masked_fill_(outside.unsqueeze(1), fill)


def draw_augmentation(
    n: int,
    *,
    crop_padding: int = 4,
    flip: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Augmentation:
    """Shifts uniform in -crop_padding..crop_padding and fair flips for n samples, on `device`.

    Drawn from `generator`, else from the default generator of `device`; `flip=False` flips none.

    Raises:
        ValueError: crop_padding < 0.
    """
    if isinstance(crop_padding, bool) or not isinstance(crop_padding, int) or crop_padding < 0:
        raise BadValueError(f"crop_padding takes an integer >= 0, got {crop_padding!r}")
    drawn_on = generator.device if generator is not None else device
    shifts = torch.randint(-crop_padding, crop_padding + 1, (2, n), generator=generator, device=drawn_on).to(device)
    if flip:
        flips = torch.randint(0, 2, (n,), generator=generator, device=drawn_on).to(device).bool()
    else:
        flips = torch.zeros(n, dtype=torch.bool, device=shifts.device)
    return Augmentation(shifts[0], shifts[1], flips)


def augment(
    images: Tensor, crop_padding: int = 4, flip: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Random crop with zero padding and random flip of (N,C,H,W); uint8 comes back as float32 in [0,1].

    Equivalent to: `draw_augmentation(len(images), ...).apply(images)`; draw first where a mask must follow.
    """
    drawn = draw_augmentation(
        len(images), crop_padding=crop_padding, flip=flip, generator=generator, device=images.device
    )
    return drawn.apply(images)
