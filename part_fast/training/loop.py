"""Adversarial training, to be read top to bottom: data, model; for each batch: eps map, attack, loss, update."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from part_fast import distributed
from part_fast.budgets.bank import MaskBank
from part_fast.config import TrainConfig, find_device, read_config
from part_fast.data.catalogue import load, root_anywhere
from part_fast.data.memory import Dataset, draw_augmentation, to_float
from part_fast.errors import BadValueError, CannotRunError
from part_fast.evaluation.accuracy import AttackSettings, is_correct
from part_fast.evaluation.sanity import agreement_warning, gradient_agreement
from part_fast.evaluation.trained import evaluation_data
from part_fast.methods import METHODS
from part_fast.optional import needs
from part_fast.precision import algorithms
from part_fast.report import figures
from part_fast.training.engine import Engine
from part_fast.training.mask_history import keep_masks
from part_fast.training.run_folder import STATE, check_folder, export, load_state, prepare_folder, save_state
from part_fast.training.step import batch_epsilon, train_step

with needs("tqdm", "train"):
    from tqdm import tqdm


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: bool = False,
    log: Callable[[str], None] = tqdm.write,
) -> list[dict[str, Any]]:
    """Train one model, with a checkpoint after every epoch, and leave a run folder behind.

    `out` then holds config.json, metrics.csv (a row per epoch), model.safetensors, environment.json, curves.png,
    masks.safetensors (see `mask_history`), averaged.safetensors where weights are averaged, and training_state.pt, from
    which `resume` goes on exactly as if it had never stopped. Nothing is written before everything that can be checked
    is; `overwrite` replaces a run that is already there. Under torchrun each process trains on its share of every
    batch, and the first one writes.

    Returns: the rows of metrics.csv; accuracies from 0 to 1, loss in nats, seconds and images per second of training.

    Raises:
        FileNotFoundError: the data set or checkpoint is missing, or there is nothing to resume.
        TypeError, ValueError: a field of config is wrong, does not fit the run to resume; or `out` holds a run already.
        RuntimeError: the loss is no longer finite.
        ImportError: matplotlib, or with `tensorboard` that package, is missing; nothing is written then.
    """
    figures.load_matplotlib()  # a missing package is said before anything is written
    summary_writer = _load_summary_writer() if tensorboard else None
    config.check()
    device = distributed.join(find_device(config.device))
    main = distributed.rank() == 0
    config = config.on(device, like=read_config(out) if resume else None)
    check_folder(config, out, resume, overwrite)
    distributed.barrier()  # nobody writes before everybody has checked
    torch.manual_seed(config.seed)

    data = load(config.dataset, "train", config.root, config.download)
    config = dataclasses.replace(config, root=root_anywhere(data, config.root))
    data = (data if config.train_size is None else data.subset(config.train_size)).to(device)
    test = evaluation_data(config).to(device)
    attacked_test = test.subset(min(config.pgd_test_size, len(test))) if config.pgd_test_size else None

    # A run that was stopped in its first epoch has no state yet, and starts as it did.
    engine = Engine(config, data.num_classes, device, load=not (resume and (out / STATE).is_file()))
    engine.try_network(data)
    model = engine.model
    budget = engine.budget if METHODS[config.method].weighted else None
    bank = None
    if config.refresh_epochs and budget is not None:
        size = (data.images.shape[2], data.images.shape[3])
        bank = MaskBank(len(data), size, budget.channels, config.eps, config.eps_low, device)

    rows = load_state(out / STATE, engine, bank) if resume else []
    if len(rows) > config.epochs:
        done = f"the {len(rows)} that the run in {out} has done"
        raise BadValueError(f"epochs must be at least {done}, got {config.epochs}")
    refuse_single_images(config, engine.model, data)
    if main:
        prepare_folder(config, out, resume, overwrite)
        if rows:
            export(out, engine, rows)  # the run may have been stopped after its state and before these files
    with (
        algorithms(device, tf32=config.tf32, deterministic=config.deterministic),
        tqdm(
            total=config.epochs * len(data),
            initial=len(rows) * len(data),
            unit="img",
            disable=None if main else True,
        ) as bar,
        adversarial_logits(model) as seen,
        summary_writer(str(out)) if summary_writer and main else contextlib.nullcontext() as writer,
    ):
        for epoch in range(len(rows), config.epochs):
            method = config.method_at(epoch)
            # Sums stay on the device: reading them every batch would make a GPU wait.
            loss_sum, hits = torch.zeros((), device=device), torch.zeros((), dtype=torch.long, device=device)
            begin = time.perf_counter()
            weighted_epoch = epoch - config.warmup_epochs
            if bank is not None and METHODS[method].weighted and weighted_epoch % config.refresh_epochs == 0:
                bank.fill(engine.budget, data.images)
            order = epoch_order(len(data), config, epoch).to(device)
            agreement: dict[str, float] = {}
            model.train()
            seen_images = 0
            for batch in data.batches(config.batch_size, order=order, join_last=True):
                drawn = draw_augmentation(len(batch.images), device=device) if config.augment else None
                x = to_float(batch.images) if drawn is None else drawn.apply(batch.images)
                if seen_images == 0 and config.precision != "fp32":
                    agreement = gradient_agreement(model, engine.attack_model, x, batch.labels)
                epsilon = batch_epsilon(method, budget, bank, batch.indices, drawn, config)
                loss = train_step(engine, method, x, batch.labels, epsilon, seen_images, len(order), epoch)
                seen_images += len(x)
                loss_sum += loss * len(x)
                hits += (seen[-1].argmax(1) == batch.labels).sum()
                bar.update(len(x) * distributed.size())
            engine.end_epoch(epoch)
            images = len(order) * distributed.size()
            train_loss = float(distributed.sum_(loss_sum)) / images
            seconds = time.perf_counter() - begin
            if not math.isfinite(train_loss):
                raise CannotRunError(f"training diverged in epoch {epoch + 1}: the loss is {train_loss}; lower lr")
            if agreement and main and (warning := agreement_warning(agreement)) is not None:
                log(f"warning: epoch {epoch + 1}, {config.precision}: {warning}")

            rows.append(
                {
                    "epoch": epoch + 1,
                    "method": method,
                    "lr": config.lr_at(epoch),
                    "train_loss": train_loss,
                    "train_robust": int(distributed.sum_(hits)) / images,
                    **accuracies(engine, test, attacked_test),
                    **agreement,
                    "seconds": seconds,
                    "images_per_second": images / seconds,
                }
            )
            if main:
                keep_masks(out, engine, test, epoch)
                save_state(out, engine, rows, bank)
                if writer is not None:
                    _log_scalars(writer, rows[-1])
                log(_line(rows[-1], config.epochs))
            distributed.barrier()
    if main:
        title = f"{config.method} on {config.dataset}, {config.model}, seed {config.seed}"
        figures.draw_curves(out / "curves.png", rows, title)
    return rows


def accuracies(engine: Engine, test: Dataset, attacked_test: Dataset | None) -> dict[str, float | None]:
    """test_natural and test_pgd20 (None without `attacked_test`), and those of the averaged model if there is one."""
    config = engine.config
    attack = AttackSettings(config.eps, config.alpha, config.seed)
    models = {"test": engine.model} | ({} if engine.averaged is None else {"averaged": engine.averaged.module})
    found: dict[str, float | None] = {}
    for name, model in models.items():
        for measure, images in (("natural", test), ("pgd20", attacked_test)):
            if images is None:
                found[f"{name}_{measure}"] = None
            else:
                found[f"{name}_{measure}"] = float(is_correct(model, images, measure, attack).float().mean())
    return found


def epoch_order(n: int, config: TrainConfig, epoch: int) -> Tensor:
    """The samples of an epoch, in the order in which this process takes them, as many in every process.

    Together the processes go over one order: a batch of all of them is made of the batches of each.
    """
    if distributed.size() == 1:
        return torch.randperm(n)
    # Every process draws its own augmentation and starts, and the same ones when it is resumed here.
    torch.manual_seed(((config.seed * 1_000_003 + epoch) * 1009 + distributed.rank()) % 2**63)
    order = distributed.same_(torch.randperm(n))
    every = -(-n // distributed.size()) * distributed.size()
    return order[torch.arange(every) % n][distributed.shares(every)]


@contextlib.contextmanager
def adversarial_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """In `with adversarial_logits(model) as seen`, seen[-1] is the output of the latest train-mode forward.

    Every method's loss ends with the forward of its adversarial images, so this serves all six alike.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, logits: Tensor) -> None:
        if module.training:
            seen[:] = [logits.detach()]

    handle = model.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def refuse_single_images(config: TrainConfig, model: nn.Module, data: Dataset) -> None:
    """Errors: ValueError, before the first epoch, where batches are single images and BatchNorm cannot take one."""
    if config.batch_size > 1 and len(data) > distributed.size():
        return
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(to_float(data.images[:1]))
    except ValueError as error:
        name = "batch_size" if config.batch_size == 1 else "train_size"
        size = "x".join(map(str, data.images.shape[2:]))
        raise BadValueError(f"{name} must be >= 2 for {config.model} on images of {size}: {error}") from error


def _line(row: dict[str, Any], epochs: int) -> str:
    pgd20 = "" if row["test_pgd20"] is None else f", PGD-20 {100 * row['test_pgd20']:.1f}%"
    return (
        f"epoch {row['epoch']}/{epochs} {row['method']}: lr {row['lr']:g}, loss {row['train_loss']:.4f}, "
        f"train robust {100 * row['train_robust']:.1f}%, test natural {100 * row['test_natural']:.1f}%{pgd20}, "
        f"{row['images_per_second']:.0f} img/s"
    )


def _load_summary_writer() -> Any:
    with needs("tensorboard", "train"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


def _log_scalars(writer: Any, row: dict[str, Any]) -> None:
    for name, value in row.items():
        if isinstance(value, float):
            writer.add_scalar(name, value, row["epoch"])
