"""Accuracies compared: means and spreads over seeds, paired differences, and what may be concluded from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from part_fast.errors import BadValueError
from part_fast.optional import needs
from part_fast.reading import read_tensors
from part_fast.report import files

# The measures that demo and study compare, by their names in `evaluate`.
MEASURES = {"natural": "natural", "pgd20": "PGD-20"}


def mean_and_spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, and the sample standard deviation: 0 for one value."""
    return {"mean": statistics.mean(values), "spread": statistics.stdev(values) if len(values) > 1 else 0.0}


def difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> dict[str, Any]:
    """How much more often `after` is right than `before`: bool (N,) per seed, the same N images and seeds in both.

    mean: of the difference in accuracy; spread: its sample standard deviation over seeds; standard_error: what the
    choice of test images adds, from the differences on each image; significant: whether the mean is more than
    both the spread and two standard errors (never with a single seed).
    """
    change = _change(before, after)
    over_seeds = mean_and_spread(change.mean(1).tolist())
    error = _image_error(change)
    significant = len(change) > 1 and abs(over_seeds["mean"]) > max(over_seeds["spread"], 2 * error)
    return {**over_seeds, "standard_error": error, "significant": significant}


@dataclass(frozen=True)
class SeedVariance:
    """The variance over seeds of one accuracy, and the degrees of freedom that it was estimated with."""

    variance: float
    degrees: int


def seed_variance(accuracies: Mapping[tuple[str, int], float]) -> SeedVariance:
    """What is left of accuracies, by (arm, seed), after each arm's mean and what a seed gives to all arms.

    The residual variance of a two-way analysis of variance without interaction, by least squares: arms may have
    different seeds. It takes all arms' accuracies to scatter alike, and a seed to move them alike.
    variance: NaN where no degrees of freedom are left.

    Equivalent to, where every arm has every seed, y of shape (arms, seeds):
        rest = y - y.mean(0) - y.mean(1, keepdim=True) + y.mean()
        rest.square().sum() / ((arms - 1) * (seeds - 1))
    """
    arms, seeds = (sorted({key[place] for key in accuracies}) for place in (0, 1))
    design = torch.zeros(len(accuracies), len(arms) + len(seeds), dtype=torch.float64)
    for row, (arm, seed) in enumerate(accuracies):
        design[row, arms.index(arm)] = design[row, len(arms) + seeds.index(seed)] = 1
    values = torch.tensor(list(accuracies.values()), dtype=torch.float64)
    rest = values - design @ (torch.linalg.pinv(design) @ values)
    degrees = len(accuracies) - int(torch.linalg.matrix_rank(design))
    return SeedVariance(float(rest.square().sum()) / degrees if degrees else math.nan, degrees)


def interval(
    before: Sequence[Tensor], after: Sequence[Tensor], comparisons: int = 1, pooled: SeedVariance | None = None
) -> dict[str, Any]:
    """A confidence interval of how much more often `after` is right: bool (N,) per seed, paired by seed and image.

    The variance over seeds and the one over test images are added, which counts a part of them twice; Student's t
    with the degrees of freedom of the former. comparisons: how many of them are looked at together, for Bonferroni's
    correction. pooled: of more runs than these, `seed_variance`; then a single seed is enough. None: of the
    differences themselves, with seeds - 1 degrees of freedom.

    Returns: mean; per_seed; half_width of the 95 % interval of this comparison alone; half_width_all, of an
    interval that holds for all comparisons at once with 95 %; significant: whether that one excludes 0.
    Errors: ValueError for too few seeds; ImportError without scipy.
    """
    t = load_student_t()
    least = 2 if pooled is None else 1
    if len(before) < least or len(before) != len(after):
        got = f"{len(before)} and {len(after)}"
        raise BadValueError(f"before and after take as many seeds each, at least {least}, got {got}")
    change = _change(before, after)
    per_seed = change.mean(1).tolist()
    mean = statistics.mean(per_seed)
    if pooled is None:
        variance, degrees = statistics.variance(per_seed), len(per_seed) - 1
    else:
        variance, degrees = 2 * pooled.variance, pooled.degrees
    error = math.sqrt(variance / len(per_seed) + _image_error(change) ** 2)
    one, every = (float(t.ppf(1 - 0.025 / m, degrees)) * error for m in (1, comparisons))
    return {
        "mean": mean,
        "per_seed": per_seed,
        "half_width": one,
        "half_width_all": every,
        "significant": abs(mean) > every,
    }


def load_student_t() -> Any:
    """Student's t distribution of scipy. Errors: ImportError without it, saying how to get it."""
    with needs("scipy", "study"):
        from scipy.stats import t
    return t


def accuracy_table(what: str, found: Mapping[str, Mapping[str, Mapping[str, float]]], seeds: int) -> str:
    """Text: a line for each name of `found`, name -> measure -> `mean_and_spread`; `what` heads the names."""
    rows = [
        (name, *(f"{100 * v['mean']:.2f} ± {100 * v['spread']:.2f}" for v in (by[key] for key in MEASURES)))
        for name, by in found.items()
    ]
    header = (what, *(f"{measure} %" for measure in MEASURES.values()))
    return f"{files.table(header, rows)}\nmean ± standard deviation of {seeds} seeds"


def is_correct(folder: Path, attack: str) -> Tensor:
    """Whether each test image was right under `attack`: bool (N,), as `evaluate` left it in a run folder."""
    path = folder / "evaluation_images.safetensors"
    images = read_tensors(path)
    if attack not in images or images[attack].dtype != torch.bool:
        raise BadValueError(f"{path} must hold a bool for each image under {attack!r}: evaluate the run again")
    return images[attack]


def _change(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """(seeds, N): 1 where an image became right, -1 where it became wrong."""
    return torch.stack(list(after)).double() - torch.stack(list(before)).double()


def _image_error(change: Tensor) -> float:
    return float(change.mean(0).std()) / math.sqrt(change.shape[1])
