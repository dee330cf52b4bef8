"""A grid of test images with their CAMs, eps maps and adversarial images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from part_fast import checks
from part_fast.attacks.ascend import clean_logits
from part_fast.attacks.pgd import pgd
from part_fast.budgets.cam import CamBudget
from part_fast.data.memory import to_float
from part_fast.errors import BadValueError
from part_fast.evaluation.trained import load_trained
from part_fast.report import figures, files


def masks(
    where: Path,
    out: Path,
    n: int = 8,
    *,
    rule: str | None = None,
    overwrite: bool = False,
    dataset: str | None = None,
    model: str | None = None,
    weights: str | None = None,
    target_layer: str | None = None,
    root: str | None = None,
    download: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """A PNG grid, a row per image: n test images, their CAM, eps map, adversarial image and difference x8.

    where, dataset, model, weights: as in `evaluate`. rule: default the run's; several, separated by commas, get an eps
    map each, and the attack uses the first. target_layer: as in `CamBudget`; default the run's. The attack is that of
    the training, within the eps map. A JSON file beside `out` holds what the titles say: labels, predictions, the share
    of pixels that keep the full eps.

    Returns: what the JSON file holds.

    Raises:
        FileNotFoundError: no such run, checkpoint or data set.
        ValueError, TypeError: an argument is wrong, or `out` exists, not overwrite.
    """
    figures.load_matplotlib()  # a missing package is said before anything is written
    record_path = out.with_suffix(".json")
    if out.suffix != ".png":
        raise BadValueError(f"out takes a .png file, got {str(out)!r}")
    for path in (out, record_path):
        if path.exists() and not overwrite:
            raise BadValueError(f"{path} exists: choose another --out or --overwrite")
    checks.seed("seed", seed)
    net, config, data, path = load_trained(
        where, n, dataset=dataset, model=model, weights=weights, root=root, download=download, device=device
    )
    rules = [config.mask_rule] if rule is None else [name.strip() for name in rule.split(",")]
    for name in rules:  # of which a released run takes its own alone
        dataclasses.replace(config, rule=name, released=False).check()
    # The run of a plain method does not use eps_low, which may then lie above its eps.
    config = dataclasses.replace(config, rule=rules[0], eps_low=min(config.eps, config.eps_low))
    x, y = to_float(data.images), data.labels
    layer = config.target_layer if target_layer is None else target_layer

    def budget(eps: float, eps_low: float, rule: str) -> CamBudget:
        return CamBudget(net, eps, eps_low, method=config.cam, rule=rule, target_layer=layer)

    maps = {name: budget(config.eps, config.eps_low, name)(x) for name in rules}
    eps = maps[rules[0]]
    cams = budget(1.0, 0.0, "soft")(x)[:, 0]  # between 0 and 1 the soft rule gives the enlarged CAM itself
    start = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device) * 2 - 1
    x_adv = pgd(net, x, y, eps, config.alpha, config.steps, start=(x + start * eps).clamp(0, 1))
    predicted, attacked = (clean_logits(net, images).argmax(1) for images in (x, x_adv))
    names = data.class_names
    middle = (config.eps + config.eps_low) / 2
    full = {name: (values > middle).float().mean((1, 2, 3)) for name, values in maps.items()}
    rows = [
        {
            "label": names[y[i]],
            "predicted": names[predicted[i]],
            "predicted_under_attack": names[attacked[i]],
            "share_of_full_eps": round(float(full[rules[0]][i]), 4),
            **{f"share_of_full_eps_{name}": round(float(full[name][i]), 4) for name in rules[1:]},
        }
        for i in range(len(data))
    ]
    record = {
        "checkpoint": str(path),
        "rule": ",".join(rules),
        "cam": config.cam,
        "eps": config.eps,
        "eps_low": config.eps_low,
        "alpha": config.alpha,
        "steps": config.steps,
        "images": rows,
    }
    titles = [(f"{r['label']} -> {r['predicted']}", f"-> {r['predicted_under_attack']}") for r in rows]
    caption = (
        f"{config.cam}, rule{'s' * (len(rules) > 1)} {' and '.join(rules)}, "
        f"eps {255 * config.eps:g}/255 and {255 * config.eps_low:g}/255, "
        f"PGD-{config.steps} within the eps map"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    figures.draw_masks(out, x, cams, maps, x_adv, titles, caption)
    files.write_json(record_path, record)
    return record


def adversarial(runs: Mapping[str, Path], out: Path, n: int = 6, *, eps: float = 32 / 255, seed: int = 0) -> None:
    """A PNG grid, a row per test image: natural, and attacked with one eps on each of several trained networks.

    runs: a name and a run folder each, all of one data set. The attack is PGD-40 with steps of eps/10 within one eps
    for every pixel, whatever the training was; a large eps shows what the gradients of a network follow.
    Errors: ValueError where the runs' data sets differ, or `out` exists; those of `load_trained`.
    """
    checks.number("eps", eps, 0)
    if out.exists():
        raise BadValueError(f"{out} exists: choose another out")
    found = {name: load_trained(folder, n) for name, folder in runs.items()}
    datasets = {trained.config.dataset for trained in found.values()}
    if len(datasets) != 1:
        raise BadValueError(f"runs must be of one data set, got {', '.join(sorted(datasets)) or 'none'}")
    attacked = {}
    for name, trained in found.items():
        x, y = to_float(trained.data.images), trained.data.labels
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device) * 2 - 1
        x_adv = pgd(trained.model, x, y, eps, eps / 10, 40, start=(x + noise * eps).clamp(0, 1))
        classes = clean_logits(trained.model, x_adv).argmax(1)
        attacked[name] = (
            x_adv,
            [
                f"{trained.data.class_names[a]} -> {trained.data.class_names[b]}"
                for a, b in zip(y, classes, strict=True)
            ],
        )
    figures.draw_adversarial(out, x, attacked, f"PGD-40, eps {255 * eps:g}/255 for every pixel; label -> prediction")
