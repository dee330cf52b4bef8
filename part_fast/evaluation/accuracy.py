"""Accuracy of a trained model on natural and attacked images."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
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
from part_fast.attacks.catalogue import ATTACKS, attack_of_evaluation, known_attacks, load_attacks
from part_fast.config import find_device
from part_fast.data.memory import Dataset, to_float
from part_fast.errors import BadValueError, UsageError
from part_fast.evaluation.sanity import gradient_flags, order_flags
from part_fast.evaluation.trained import load_trained
from part_fast.optional import needs
from part_fast.reading import check_texts, read_json, read_tensors
from part_fast.report import files
from part_fast.report.environment import environment

with needs("tqdm", "train"):
    from tqdm import tqdm
with needs("safetensors", "train"):
    from safetensors.torch import save_file

# Files of what a slow attack has done so far: its name, what it may be continued with, and the process of several.
KEPT = tuple(f"evaluation_{name}_*" for name, attack in ATTACKS.items() if attack.resumes)


@dataclass(frozen=True)
class AttackSettings:
    """How test images are attacked: eps and alpha in image units, and the seed of the random start."""

    eps: float = 8 / 255
    alpha: float = 2 / 255
    seed: int = 0


def check_attacks(names: Sequence[str]) -> None:
    """Raises ValueError for an unknown attack, listing the known, and for none at all."""
    for name in names:
        attack_of_evaluation(name)
    if not names or len(set(names)) < len(names):
        raise BadValueError(f"attacks must be at least one of {known_attacks()}, each once, got {', '.join(names)!r}")


def is_correct(
    model: nn.Module,
    data: Dataset,
    name: str,
    settings: AttackSettings,
    batch_size: int = 256,
    progress: bool = False,
    keep: Path | None = None,
) -> Tensor:
    """Whether each image of `data` is classified right under the attack called `name`: bool (N,), on the CPU.

    name: one that `part_fast.attacks.catalogue` lets an evaluation take, such as natural, which is no attack, or pgd20.
    An attack that starts at random does so once, uniformly within its reach. Random numbers come from `settings.seed`,
    on the CPU but for AutoAttack, so that a result repeats and the global random state stays as it is. Attacks run on
    an `AttackModel` of the model; the model itself judges what they found, in eval mode, and gets its mode back. Data
    and model lie on one device.
    keep: a file to which results are written after every batch, and from which a stopped call goes on.
    Each of several processes does its share of the batches, with the random numbers of a single process, and all get
    the whole result.
    """
    attack, steps = attack_of_evaluation(name)
    generator = torch.Generator().manual_seed(settings.seed)
    is_correct, done = torch.zeros(len(data), dtype=torch.bool), 0
    begin = time.perf_counter()
    keep = None if keep is None else _own_part(keep)
    if keep is not None and keep.exists():
        is_correct, done, seconds = _read_kept(keep, len(data))
        begin -= seconds
    attacked = AttackModel(model) if attack.reads_model else model  # the same gradients in less time
    with tqdm(total=len(data), desc=name, unit="img", disable=None if progress else True, leave=False) as bar:
        for place, batch in enumerate(data.batches(batch_size)):
            noise = torch.rand(batch.images.shape, generator=generator) if attack.random_start else None
            ours = place % distributed.size() == distributed.rank()
            if int(batch.indices[-1]) < done or not ours:
                bar.update(len(batch.images))
                continue
            x = to_float(batch.images)
            reach = attack.reach * settings.eps
            start = "zero" if noise is None else (x + (noise.to(x.device) * 2 - 1) * reach).clamp(0, 1)
            x_adv = attack.run(attacked, x, batch.labels, settings.eps, settings.alpha, steps, start, settings.seed)
            is_correct[batch.indices.cpu()] = (clean_logits(model, x_adv).argmax(1) == batch.labels).cpu()
            bar.update(len(x))
            if keep is not None:
                state = {
                    "right": is_correct,
                    "done": batch.indices[-1:].cpu() + 1,
                    "seconds": torch.tensor([time.perf_counter() - begin], dtype=torch.float64),
                }
                with files.replacing(keep) as temporary:
                    save_file(state | {"sha256": _checksum(*state.values())}, temporary)
    return distributed.sum_(is_correct.to(torch.uint8).to(data.images.device)).bool().cpu()


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
    weights: str | None = None,
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
        one or has `dataset` and `model` named. weights: of a run folder, as in `load_trained`.
    attacks: see `is_correct`. n: a balanced subset of the test images;
        default: those of the run.
    out: the folder written to; default: the run folder, or the checkpoint's. Results of other attacks in it
        are kept if they were made with the same settings. resume: do not repeat an attack whose result it holds.
    sanity_images: on so many of the images, look for signs that gradients mislead the attacks
        (`part_fast.evaluation.sanity`).
    Accuracies in an order that no sound attack gives are always warned about, under "warnings".

    Whether each image was right goes into evaluation_images.safetensors: bool (N,) per attack, and the labels.
    All files are written after every attack: one that is stopped loses none that was done before it, and resume goes on
    from there. AutoAttack writes down every batch: stopped, it goes on there when it is asked for again. Under torchrun
    the processes share the batches, and the first one writes.

    Returns: what evaluation.json holds.

    Raises:
        FileNotFoundError: no such run, checkpoint or data set.
        ValueError, TypeError: an argument is wrong; or `out` holds an evaluation that is damaged or of other settings,
            not overwrite.
        ImportError: pyautoattack, which aa needs, is missing; nothing is written then.
    """
    check_attacks(attacks)
    load_attacks(attacks)  # a missing package is said before anything is written
    if resume and overwrite:
        raise BadValueError("resume and overwrite exclude each other")
    checks.count("batch_size", batch_size, 1)
    checks.seed("seed", seed)
    checks.count("sanity_images", sanity_images)
    place = distributed.join(find_device(device))
    net, config, data, path = load_trained(
        where, n, dataset=dataset, model=model, weights=weights, root=root, download=download, device=str(place)
    )
    attack = AttackSettings(
        checks.number("eps", config.eps if eps is None else eps, 0),
        checks.number("alpha", config.alpha if alpha is None else alpha, 0),
        seed,
    )
    out = (where if where.is_dir() else where.parent) if out is None else out
    summary, per_image = out / "evaluation.json", out / "evaluation_images.safetensors"
    settings = {
        "checkpoint": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "dataset": config.dataset,
        "n": len(data),
        **dataclasses.asdict(attack),
    }
    results: dict[str, Any] = {}
    images = {"labels": data.labels.cpu()}
    record = {**settings, "results": results, "environment": environment()}
    masking: list[str] = []  # the warnings of the sanity check
    if summary.exists() and not overwrite:
        earlier, earlier_images, looked = _read_results(summary, per_image, settings, images["labels"])
        results |= earlier
        images |= earlier_images
        if looked is not None:
            record["sanity"], masking = looked, looked["warnings"]

    def write() -> None:
        record["warnings"] = [*order_flags({name: images[name] for name in results}), *masking]
        record["images_sha256"] = {name: images_sha256(images["labels"], images[name]) for name in results}
        if distributed.rank() == 0:
            with files.replacing(per_image) as temporary:
                save_file(images, temporary)
            files.write_csv(out / "evaluation.csv", [{"attack": name, **row} for name, row in results.items()])
            files.write_json(summary, record)

    out.mkdir(parents=True, exist_ok=True)
    for name in attacks:
        if resume and name in results:
            continue
        resumes = attack_of_evaluation(name)[0].resumes
        keep = out / f"evaluation_{name}_{_digest(settings, batch_size)}.safetensors" if resumes else None
        begin = time.perf_counter()
        if keep is not None and _own_part(keep).exists():
            begin -= _read_kept(_own_part(keep), len(data))[2]
        images[name] = is_correct(net, data, name, attack, batch_size, progress=True, keep=keep)
        results[name] = {**accuracy(images[name]), "seconds": round(time.perf_counter() - begin, 3)}
        write()
    if sanity_images:
        few = data.subset(min(sanity_images, len(data)))
        generator = torch.Generator().manual_seed(seed)
        masking, figures = gradient_flags(net, to_float(few.images), few.labels, attack.eps, attack.alpha, generator)
        record["sanity"] = {**figures, "warnings": masking}
    write()
    if distributed.rank() == 0:
        for stale in itertools.chain.from_iterable(out.glob(f"evaluation_{name}_*") for name in results):
            if any(stale.match(pattern) for pattern in KEPT):  # of an attack whose result is written now
                stale.unlink()
    distributed.barrier()
    return record


def _read_results(
    summary: Path, per_image: Path, settings: dict[str, Any], labels: Tensor
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any] | None]:
    """The results of an evaluation with the same settings, its images by attack, and its sanity check, if it has one;
    both files agree.

    Errors: ValueError, FileNotFoundError that names the file and what to do.
    """
    remedy = "choose another --out or --overwrite"
    try:
        before = read_json(summary)
        # The same file under another path is the same checkpoint.
        different = [key for key in settings if key != "checkpoint" and before.get(key) != settings[key]]
        if different:
            raise BadValueError(f"{summary} holds an evaluation with other {', '.join(different)}")
        results, checksums = before.get("results"), before.get("images_sha256")
        images = read_tensors(per_image)
        if not isinstance(results, dict) or not isinstance(checksums, dict) or results.keys() != checksums.keys():
            raise BadValueError(f"{summary} is damaged: 'results' and 'images_sha256' must hold the same attacks")
        if not torch.equal(images.get("labels", labels[:0]), labels):
            raise BadValueError(f"{per_image} holds other images: its labels are not those of the test images")
        for name, row in results.items():
            attack_of_evaluation(name)
            right = images.get(name)
            if right is None or right.dtype != torch.bool or right.shape != labels.shape:
                raise BadValueError(f"{per_image} is damaged: it must hold a bool for each image under {name!r}")
            if images_sha256(labels, right) != checksums.get(name):
                raise BadValueError(f"{per_image} and {summary.name} do not belong together: other images for {name!r}")
            seconds = row.get("seconds") if isinstance(row, dict) else None
            if type(seconds) not in (float, int) or row != {**accuracy(right), "seconds": seconds}:
                raise BadValueError(f"{summary} is damaged: its result for {name!r} is not that of {per_image.name}")
        images = {name: images[name] for name in results}
        looked = before.get("sanity")
        if looked is not None:
            try:
                # Files of before have all warnings in one list.
                looked = {
                    "warnings": [said for said in before["warnings"] if said not in order_flags(images)],
                    **looked,
                }
                check_texts(looked["warnings"])
            except (KeyError, TypeError, ValueError) as error:
                raise BadValueError(f"{summary} is damaged: its sanity check has no warnings") from error
    except UsageError as error:
        named = str(error) if str(summary.parent) in str(error) else f"{summary}: {error}"
        raise BadValueError(f"{named}: {remedy}") from error
    return results, images, looked


def _own_part(keep: Path) -> Path:
    """The file of this process, of several."""
    rank, size = distributed.rank(), distributed.size()
    return keep if size == 1 else keep.with_name(f"{keep.stem}_{rank}of{size}{keep.suffix}")


def _read_kept(keep: Path, n: int) -> tuple[Tensor, int, float]:
    """What an attack that was stopped has done: bool (n,), how many images, and in how many seconds.

    Errors: ValueError if damaged.
    """
    state = read_tensors(keep)
    right, done, checksum = (state.get(name, torch.empty(0)) for name in ("right", "done", "sha256"))
    timed = [state["seconds"]] if "seconds" in state else []  # which files of before lack
    seconds = timed[0] if timed else torch.zeros(1)
    whole = right.dtype == torch.bool and right.shape == (n,) and done.dtype == torch.int64 and done.numel() == 1
    whole = whole and torch.equal(checksum, _checksum(right, done, *timed)) and seconds.numel() == 1
    if not whole or not 0 <= int(done) <= n:
        raise BadValueError(f"{keep} is damaged: remove it, and the attack begins anew")
    return right, int(done), float(seconds)


def _checksum(*tensors: Tensor) -> Tensor:
    """SHA-256 of what tensors on the CPU hold, uint8 (32,)."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8)


def images_sha256(labels: Tensor, right: Tensor) -> str:
    """What evaluation.json says of the labels and of which images were right, by which the two files are compared."""
    return bytes(_checksum(labels, right).tolist()).hex()


def _digest(settings: dict[str, Any], batch_size: int) -> str:
    """A digest of model, data and settings: a stopped AutoAttack goes on only with the same."""
    settings = {**settings, "checkpoint": "", "batch_size": batch_size}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def accuracy(is_correct: Tensor) -> dict[str, Any]:
    """Share of True in `is_correct` (N,) and its standard error, sqrt(p (1 - p) / N)."""
    n, hits = len(is_correct), int(is_correct.sum())
    p = hits / n
    return {"accuracy": p, "standard_error": math.sqrt(p * (1 - p) / n), "correct": hits, "n": n}
