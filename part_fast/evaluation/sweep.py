"""Robustness over the attack's strength: the accuracy under PGD as eps grows, and as its steps grow."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from part_fast import checks, distributed
from part_fast.config import find_device
from part_fast.errors import BadValueError
from part_fast.evaluation import sanity
from part_fast.evaluation.accuracy import AttackSettings, accuracy, is_correct
from part_fast.evaluation.trained import load_trained
from part_fast.reading import check_numbers, check_share, check_texts, missing_or_wrong, read_json
from part_fast.report import files
from part_fast.report.environment import environment

SWEEP = "sweep.json"
# At most so many images: a curve is some 20 attacks.
IMAGES = 1000
# Of the eps of the evaluation; none goes beyond 1, the range of a pixel.
FACTORS = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 4, 8, 16)
STEPS = (1, 2, 5, 10, 20, 50, 100)
# Of the attacks over eps, as in the evaluation called pgd20.
STEPS_OVER_EPS = 20
KINDS = {
    "eps": "PGD-20 with eps from 0 to 16 times that of the evaluation",
    "steps": "PGD of 1 to 100 steps",
}


def check_kinds(kinds: Sequence[str]) -> None:
    """Raises ValueError unless `kinds` are some of eps and steps, each once."""
    if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(KINDS):
        raise BadValueError(f"sweep must be of {', '.join(KINDS)}, each once, got {', '.join(kinds)!r}")


def sweep(
    where: Path,
    kinds: Sequence[str] = tuple(KINDS),
    *,
    n: int | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dataset: str | None = None,
    model: str | None = None,
    weights: str | None = None,
    root: str | None = None,
    download: bool = False,
    eps: float | None = None,
    alpha: float | None = None,
    batch_size: int = 256,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Accuracy, with standard errors, under PGD of growing eps or of growing steps, into sweep.json.

    kinds: "eps", which also lets the step size grow, so that it stays the same part of eps; and "steps". The other
    arguments are those of `evaluate`. On the evaluation's images, or a balanced subset of `IMAGES` of them, so that
    with as many the point at the evaluation's eps is its pgd20. A curve of the other kind in the file is kept.

    A curve that rises, or an eps of half the range of a pixel and more that leaves some images right, is warned about:
    a sound attack of growing strength finds ever more, and in the end everything.
    Source of these two signs: Carlini et al., "On Evaluating Adversarial Robustness", 2019, arXiv 1902.06705.

    Returns: what sweep.json holds.

    Raises:
        FileNotFoundError: no such run, checkpoint or data set.
        ValueError, TypeError: an argument is wrong; or `out` holds a sweep with other settings, not overwrite.
    """
    check_kinds(kinds)
    if resume and overwrite:
        raise BadValueError("resume and overwrite exclude each other")
    checks.count("batch_size", batch_size, 1)
    checks.seed("seed", seed)
    place = distributed.join(find_device(device))
    net, config, data, checkpoint = load_trained(
        where, n, dataset=dataset, model=model, weights=weights, root=root, download=download, device=str(place)
    )
    data = data.subset(min(IMAGES, len(data)))
    attack = AttackSettings(
        checks.number("eps", config.eps if eps is None else eps, 0),
        checks.number("alpha", config.alpha if alpha is None else alpha, 0),
        seed,
    )
    if "eps" in kinds and not attack.eps:
        raise BadValueError("eps must be > 0 for a sweep over it, got 0")
    out = (where if where.is_dir() else where.parent) if out is None else out
    path = out / SWEEP
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    settings = {"sha256": digest, "dataset": config.dataset, "n": len(data), **dataclasses.asdict(attack)}
    curves: dict[str, dict[str, Any]] = {}
    if path.exists() and not overwrite:
        before = read_sweep(path)
        different = [key for key in settings if before.get(key) != settings[key]]
        if different:
            raise BadValueError(
                f"{path} holds a sweep with other {', '.join(different)}: choose another --out or --overwrite"
            )
        curves = before["curves"]
    for kind in kinds:
        if resume and kind in curves:
            continue
        points: list[dict[str, Any]] = []
        hits: list[Tensor] = []
        for strength, name, settings_here in _attacks(kind, attack):
            hits.append(is_correct(net, data, name, settings_here, batch_size, progress=True))
            points.append({kind: strength, **accuracy(hits[-1])})
        curves[kind] = {"points": points, "warnings": _warnings(kind, points, hits)}
    record = {**settings, "curves": curves, "environment": environment()}
    if distributed.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        files.write_json(path, record)
    distributed.barrier()
    return record


def read_sweep(path: Path) -> dict[str, Any]:
    """What `sweep` wrote. Errors: FileNotFoundError; ValueError that names the file, unless it is a sweep."""
    values = read_json(path)
    try:
        for kind, curve in values["curves"].items():
            check_kinds([kind])
            for point in curve["points"]:
                check_share(point)
                check_numbers(point[kind])
            check_texts(curve["warnings"])
        if not values["curves"] or not all(curve["points"] for curve in values["curves"].values()):
            raise BadValueError("no curve, or one without points")
        check_numbers(*(values[name] for name in ("eps", "alpha", "n", "seed")))
        check_texts([values["sha256"], values["dataset"]])
        if not isinstance(values["environment"], dict):
            raise BadValueError("an environment is no object")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadValueError(f"{path} is no sweep: {missing_or_wrong(error)}") from error
    return values


def _attacks(kind: str, attack: AttackSettings) -> Iterator[tuple[float, str, AttackSettings]]:
    """(eps or steps, the attack's name, its settings) of every point of a curve, the weakest first."""
    if kind == "steps":
        yield from ((steps, f"pgd{steps}", attack) for steps in STEPS)
        return
    for factor in FACTORS:
        # Steps of alpha alone would not reach a large eps, and those accuracies would say nothing.
        stronger = dataclasses.replace(attack, eps=factor * attack.eps, alpha=factor * attack.alpha)
        if stronger.eps <= 1:
            yield stronger.eps, f"pgd{STEPS_OVER_EPS}", stronger


def _warnings(kind: str, points: Sequence[dict[str, Any]], hits: Sequence[Tensor]) -> list[str]:
    found = []
    for weak, strong, before, after in zip(points, points[1:], hits, hits[1:], strict=False):
        if (excess := sanity.excess(after, before)) is not None:
            names = [_named(kind, point[kind]) for point in (weak, strong)]
            found.append(f"accuracy rises from {names[0]} to {names[1]}, {excess}")
    last = points[-1]
    if kind == "eps" and last["eps"] >= 0.5 and last["accuracy"] > 0.01:
        share = f"{100 * last['accuracy']:.1f}%"
        found.append(f"{share} are right at {_named(kind, last['eps'])}, where an attack must fool everything")
    return found


def _named(kind: str, value: float) -> str:
    return f"eps {255 * value:.4g}/255" if kind == "eps" else f"{value:g} steps"
