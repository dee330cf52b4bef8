"""Accuracy of a trained model on natural and attacked images."""

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
from typing import Any

import torch
from torch import Tensor, nn

from part_fast import checks, distributed
from part_fast.attack_model import AttackModel
from part_fast.attacks.ascend import clean_logits
from part_fast.attacks.autoattack import autoattack, load_autoattack
from part_fast.attacks.mma import mma
from part_fast.attacks.pgd import pgd
from part_fast.config import find_device
from part_fast.data.memory import Dataset, to_float
from part_fast.errors import BadValueError
from part_fast.evaluation import sanity
from part_fast.evaluation.trained import load_trained
from part_fast.optional import needs
from part_fast.report import files
from part_fast.report.environment import environment

with needs("tqdm", "train"):
    from tqdm import tqdm
with needs("safetensors", "train"):
    from safetensors.torch import load_file, save_file

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
            raise BadValueError(f"attacks must be of {KNOWN_ATTACKS}, got {name!r}")
    if not names or len(set(names)) < len(names):
        raise BadValueError(f"attacks must be at least one of {KNOWN_ATTACKS}, each once, got {', '.join(names)!r}")


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
    keep: a file to which aa writes its results after every batch, and from which a stopped call goes on.
    Each of several processes does its share of the batches, with the random numbers of a single process, and all get
    the whole result.
    """
    generator = torch.Generator().manual_seed(attack.seed)
    right, done = torch.zeros(len(data), dtype=torch.bool), 0
    if keep is not None and distributed.size() > 1:
        keep = keep.with_name(f"{keep.stem}_{distributed.rank()}of{distributed.size()}{keep.suffix}")
    if keep is not None and keep.exists():
        state = load_file(keep)
        right, done = state["right"], int(state["done"])
    attacked = AttackModel(model) if name != "natural" else model  # the same gradients in less time
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
                with files.replacing(keep) as temporary:
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
    out: the folder written to; default: the run folder, or the checkpoint's. Results of other attacks in it
        are kept if they were made with the same settings. resume: do not repeat an attack whose result it holds.
    sanity_images: on so many of the images, look for signs that gradients mislead the attacks
        (`part_fast.evaluation.sanity`).
    Accuracies in an order that no sound attack gives are always warned about, under "warnings".

    Whether each image was right goes into evaluation_images.safetensors: bool (N,) per attack, and the labels.
    AutoAttack writes down every batch: stopped, it goes on there when it is asked for again. Under torchrun the
    processes share the batches, and the first one writes.

    Returns: what evaluation.json holds.

    Raises:
        FileNotFoundError: no such run, checkpoint or data set.
        ValueError, TypeError: an argument is wrong; or `out` holds an evaluation with other settings, not overwrite.
        ImportError: pyautoattack, which aa needs, is missing; nothing is written then.
    """
    check_attacks(attacks)
    if "aa" in attacks:
        load_autoattack()  # a missing package is said before anything is written
    if resume and overwrite:
        raise BadValueError("resume and overwrite exclude each other")
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
            raise BadValueError(
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
    record = {**settings, "results": results, "environment": environment()}
    record["warnings"] = sanity.order_flags({name: images[name] for name in results})
    if sanity_images:
        few = data.subset(min(sanity_images, len(data)))
        generator = torch.Generator().manual_seed(seed)
        flags, record["sanity"] = sanity.gradient_flags(
            net, to_float(few.images), few.labels, attack.eps, attack.alpha, generator
        )
        record["warnings"] += flags
    if distributed.rank() == 0:
        with files.replacing(per_image) as temporary:
            save_file(images, temporary)
        files.write_csv(out / "evaluation.csv", [{"attack": name, **row} for name, row in results.items()])
        files.write_json(summary, record)
        for stale in out.glob("evaluation_aa_*.safetensors"):
            stale.unlink()
    distributed.barrier()
    return record


def _digest(settings: dict[str, Any], batch_size: int) -> str:
    """A digest of model, data and settings: a stopped AutoAttack goes on only with the same."""
    settings = {**settings, "checkpoint": "", "batch_size": batch_size}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def accuracy(right: Tensor) -> dict[str, Any]:
    """Share of True in `right` (N,) and its standard error, sqrt(p (1 - p) / N)."""
    n, hits = len(right), int(right.sum())
    p = hits / n
    return {"accuracy": p, "standard_error": math.sqrt(p * (1 - p) / n), "correct": hits, "n": n}


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
