"""Accuracy of a trained model on natural and attacked test images, and pictures of what its CAM budget does."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from part_fast import checks, distributed
from part_fast.attack_model import AttackModel
from part_fast.attacks.ascend import clean_logits, mma, pgd
from part_fast.attacks.autoattack import autoattack
from part_fast.budgets.cam import CamBudget
from part_fast.config import TrainConfig, find_device, read_config
from part_fast.data.catalogue import load
from part_fast.data.memory import Dataset, to_float
from part_fast.evaluation import sanity
from part_fast.models.checkpoints import build_model, load_weights
from part_fast.report import figures as report

KNOWN_ATTACKS = "natural, pgdSTEPS (pgd20, pgd100, ...), mma, aa"
MMA_STEPS = 20


@dataclass(frozen=True)
class AttackSettings:
    """How test images are attacked: eps and alpha in image units, and the seed of the random start."""

    eps: float = 8 / 255
    alpha: float = 2 / 255
    seed: int = 0


def check_attacks(names: Sequence[str]) -> None:
    """Raises ValueError for an unknown attack, listing the known, and for none at all."""
    for name in names:
        if name not in ("natural", "mma", "aa") and _pgd_steps(name) is None:
            raise ValueError(f"attacks must be of {KNOWN_ATTACKS}, got {name!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"attacks must be at least one of {KNOWN_ATTACKS}, each once, got {', '.join(names)!r}")


def correct(
    model: nn.Module,
    data: Dataset,
    name: str,
    attack: AttackSettings,
    batch_size: int = 256,
    progress: bool = False,
    keep: Path | None = None,
) -> Tensor:
    """Whether each image of `data` is classified right under the attack called `name`: bool (N,), on the CPU.

    natural: no attack. pgdSTEPS: cross-entropy PGD of so many steps from one uniform start. mma: minimum margin, 20
    steps, three targets. aa: AutoAttack, standard. Random numbers come from `attack.seed`, on the CPU but for aa, so
    that a result repeats and the global random state stays as it is. Attacks run on an `AttackModel` of the model;
    the model itself judges what they found, in eval mode, and gets its mode back. Data and model lie on one device.
    keep: a file that holds what is done after every batch, from which a call that was stopped goes on; for aa.
    Of several processes each does its share of the batches, with the random numbers of one, and all get the result.
    """
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(attack.seed)
    right, done = torch.zeros(len(data), dtype=torch.bool), 0
    if keep is not None and distributed.size() > 1:
        keep = keep.with_name(f"{keep.stem}_{distributed.rank()}of{distributed.size()}{keep.suffix}")
    if keep is not None and keep.exists():
        state = load_file(keep)
        right, done = state["right"], int(state["done"])
    attacked = AttackModel(model) if name != "natural" else model  # the same gradients, sooner
    with tqdm(total=len(data), desc=name, unit="img", disable=None if progress else True, leave=False) as bar:
        for place, batch in enumerate(data.batches(batch_size)):
            noise = None if name in ("natural", "aa") else torch.rand(batch.images.shape, generator=generator)
            ours = place % distributed.size() == distributed.rank()
            if int(batch.indices[-1]) < done or not ours:
                bar.update(len(batch.images))
                continue
            x = to_float(batch.images)
            x_adv = _attacked(attacked, x, batch.labels, name, attack, noise)
            right[batch.indices.cpu()] = (clean_logits(model, x_adv).argmax(1) == batch.labels).cpu()
            bar.update(len(x))
            if keep is not None:
                with report.replacing(keep) as temporary:
                    save_file({"right": right, "done": batch.indices[-1:].cpu() + 1}, temporary)
    return distributed.sum_(right.to(torch.uint8).to(data.images.device)).bool().cpu()


def evaluate(
    where: Path,
    attacks: Sequence[str] = ("natural", "pgd20"),
    *,
    n: int | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dataset: str | None = None,
    model: str | None = None,
    root: str | None = None,
    download: bool = False,
    eps: float | None = None,
    alpha: float | None = None,
    batch_size: int = 256,
    seed: int = 0,
    device: str = "auto",
    sanity_images: int = 0,
) -> dict[str, Any]:
    """Accuracies, with standard errors, of a run folder's model or of a checkpoint, into evaluation.json and .csv.

    where: a run folder, whose configuration gives data set, model, eps and alpha; or a checkpoint file, which lies in
        one or has `dataset` and `model` named. attacks: see `correct`. n: a balanced subset of the test images;
        default: those of the run.
    out: the folder written to; default: the run folder, or the checkpoint's. Results of other attacks that it holds
        are kept where they were made with the same settings. resume: do not repeat an attack whose result it holds.
    sanity_images: on so many of the images, look for signs that gradients mislead the attacks (`part_fast.sanity`).
    Accuracies in an order that no sound attack gives are always looked for. What is found is under "warnings".

    Whether each image was right goes into evaluation_images.safetensors: bool (N,) per attack, and the labels.
    AutoAttack writes down every batch: stopped, it goes on there when it is asked for again. Under torchrun the
    processes share the batches, and the first one writes.

    Returns: what evaluation.json holds.

    Raises:
        FileNotFoundError: no such run, checkpoint or data set.
        ValueError, TypeError: an argument is wrong; or `out` holds an evaluation with other settings, not overwrite.
    """
    from safetensors.torch import load_file, save_file

    check_attacks(attacks)
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    checks.count("batch_size", batch_size, 1)
    checks.seed("seed", seed)
    checks.count("sanity_images", sanity_images)
    place = distributed.join(find_device(device))
    net, config, data, weights = load_trained(
        where, n, dataset=dataset, model=model, root=root, download=download, device=str(place)
    )
    attack = AttackSettings(
        checks.number("eps", config.eps if eps is None else eps, 0),
        checks.number("alpha", config.alpha if alpha is None else alpha, 0),
        seed,
    )
    out = (where if where.is_dir() else where.parent) if out is None else out
    summary, per_image = out / "evaluation.json", out / "evaluation_images.safetensors"
    settings = {
        "checkpoint": str(weights),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "dataset": config.dataset,
        "n": len(data),
        **dataclasses.asdict(attack),
    }
    results, images = {}, {"labels": data.labels.cpu()}
    if summary.exists() and not overwrite:
        before = json.loads(summary.read_text())
        # The same file under another path is the same checkpoint.
        different = [k for k in settings if k != "checkpoint" and before.get(k) != settings[k]]
        if different:
            raise ValueError(
                f"{summary} holds an evaluation with other {', '.join(different)}: choose another --out or --overwrite"
            )
        results, images = before["results"], load_file(per_image)
    out.mkdir(parents=True, exist_ok=True)
    for name in attacks:
        if resume and name in results:
            continue
        begin = time.perf_counter()
        keep = out / f"evaluation_aa_{_digest(settings, batch_size)}.safetensors" if name == "aa" else None
        right = correct(net, data, name, attack, batch_size, progress=True, keep=keep)
        results[name] = {**accuracy(right), "seconds": round(time.perf_counter() - begin, 3)}
        images[name] = right
    record = {**settings, "results": results, "environment": report.environment()}
    record["warnings"] = sanity.order_flags({name: images[name] for name in results})
    if sanity_images:
        few = data.subset(min(sanity_images, len(data)))
        generator = torch.Generator().manual_seed(seed)
        flags, record["sanity"] = sanity.gradient_flags(
            net, to_float(few.images), few.labels, attack.eps, attack.alpha, generator
        )
        record["warnings"] += flags
    if distributed.rank() == 0:
        with report.replacing(per_image) as temporary:
            save_file(images, temporary)
        report.write_csv(out / "evaluation.csv", [{"attack": name, **row} for name, row in results.items()])
        report.write_json(summary, record)
        for stale in out.glob("evaluation_aa_*.safetensors"):
            stale.unlink()
    distributed.barrier()
    return record


def _digest(settings: dict[str, Any], batch_size: int) -> str:
    """Names what a stopped AutoAttack may be continued with."""
    settings = {**settings, "checkpoint": "", "batch_size": batch_size}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def accuracy(right: Tensor) -> dict[str, Any]:
    """Share of True in `right` (N,) and its standard error, sqrt(p (1 - p) / N)."""
    n, hits = len(right), int(right.sum())
    p = hits / n
    return {"accuracy": p, "standard_error": math.sqrt(p * (1 - p) / n), "correct": hits, "n": n}


def masks(
    where: Path,
    out: Path,
    n: int = 8,
    *,
    rule: str | None = None,
    overwrite: bool = False,
    dataset: str | None = None,
    model: str | None = None,
    root: str | None = None,
    download: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """A PNG grid, a row per image: n test images, their CAM, eps map, adversarial image and difference x8.

    where, dataset, model: as in `evaluate`. rule: default the run's; several, separated by commas, get an eps map each,
    and the first one is the attack's. The attack is the training's, within the eps map. What the titles say goes
    into a JSON file beside `out` too: labels, predictions, the share of pixels that keep the full eps.

    Returns: what the JSON file holds.

    Raises:
        FileNotFoundError: no such run, checkpoint or data set.
        ValueError, TypeError: an argument is wrong, or `out` exists, not overwrite.
    """
    record_path = out.with_suffix(".json")
    if out.suffix != ".png":
        raise ValueError(f"out takes a .png file, got {str(out)!r}")
    for path in (out, record_path):
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists: choose another --out or --overwrite")
    checks.seed("seed", seed)
    net, config, data, weights = load_trained(
        where, n, dataset=dataset, model=model, root=root, download=download, device=device
    )
    rules = [config.rule] if rule is None else [name.strip() for name in rule.split(",")]
    for name in rules:
        dataclasses.replace(config, rule=name).check()
    # The run of a plain method does not use eps_low, which may then lie above its eps.
    config = dataclasses.replace(config, rule=rules[0], eps_low=min(config.eps, config.eps_low))
    x, y = to_float(data.images), data.labels
    maps = {name: CamBudget(net, config.eps, config.eps_low, method=config.cam, rule=name)(x) for name in rules}
    eps = maps[rules[0]]
    # What the soft rule gives between 0 and 1 is the enlarged CAM itself.
    cams = CamBudget(net, 1.0, 0.0, method=config.cam, rule="soft")(x)[:, 0]
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
        "checkpoint": str(weights),
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
    report.draw_masks(out, x, cams, maps, x_adv, titles, caption)
    report.write_json(record_path, record)
    return record


class Trained(NamedTuple):
    """A trained model in eval mode, the configuration it was trained with, test images on its device, its file."""

    model: nn.Module
    config: TrainConfig
    data: Dataset
    weights: Path


def load_trained(
    where: Path,
    n: int | None = None,
    *,
    dataset: str | None = None,
    model: str | None = None,
    root: str | None = None,
    download: bool = False,
    device: str = "auto",
) -> Trained:
    """The model in a run folder; or in a checkpoint file, in a run folder or with data set and model named.

    n: a balanced subset of the test images; default: those of the run.

    Raises:
        FileNotFoundError, ValueError: there is no such thing, or the weights do not fit.
    """
    if where.is_dir():
        config, weights = read_config(where), where / "model.safetensors"
        if not weights.is_file():
            raise FileNotFoundError(f"{where} holds a run without model.safetensors: no epoch of it is finished")
        config = dataclasses.replace(config, dataset=dataset or config.dataset, model=model or config.model)
    elif where.is_file():
        config, weights = TrainConfig(), where
        if (where.parent / "config.json").is_file():  # a run's, such as its averaged weights
            config = read_config(where.parent)
        elif dataset is None or model is None:
            raise ValueError(f"{where} is a checkpoint alone, not a run folder: name --dataset and --model")
        config = dataclasses.replace(config, dataset=dataset or config.dataset, model=model or config.model)
    else:
        raise FileNotFoundError(f"there is no run folder or checkpoint at {where}")
    config = dataclasses.replace(config, root=root or config.root, download=download or config.download)
    config.check()
    place = find_device(device)
    data = evaluation_data(config, n).to(place)
    with torch.random.fork_rng(devices=[]):  # the first weights, overwritten at once, are no draw of the caller's
        net = build_model(config.model, data.num_classes)
    load_weights(net, weights)
    return Trained(net.eval().requires_grad_(False).to(place), config, data, weights)


def evaluation_data(config: TrainConfig, n: int | None = None) -> Dataset:
    """The run's test images, or a balanced subset of n of them."""
    data = load(config.dataset, "test", config.root, config.download)
    size = config.test_size if n is None else n
    return data if size is None else data.subset(size)


def _pgd_steps(name: str) -> int | None:
    match = re.fullmatch(r"pgd([1-9]\d*)", name)
    return int(match[1]) if match else None


def _attacked(
    model: nn.Module, x: Tensor, y: Tensor, name: str, attack: AttackSettings, noise: Tensor | None
) -> Tensor:
    if name == "natural":
        return x
    if name == "aa":
        return autoattack(model, x, y, attack.eps, attack.seed)
    assert noise is not None
    start = (x + (noise.to(x.device) * 2 - 1) * attack.eps).clamp(0, 1)
    if name == "mma":
        return mma(model, x, y, attack.eps, attack.alpha, MMA_STEPS, start=start)
    return pgd(model, x, y, attack.eps, attack.alpha, _pgd_steps(name) or 0, start=start)
