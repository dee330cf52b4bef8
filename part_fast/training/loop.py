"""Adversarial training, to be read top to bottom: data, model; for each batch: eps map, attack, loss, update."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from part_fast import checks, distributed
from part_fast.attacks.catalogue import ATTACKS
from part_fast.budgets.bank import MaskBank
from part_fast.budgets.perturbations import PerturbationBank
from part_fast.config import PRESETS, TrainConfig, find_device, read_config
from part_fast.data.catalogue import load, root_anywhere
from part_fast.data.extra import add_extra, checksums
from part_fast.data.memory import Dataset, draw_augmentation, to_float
from part_fast.data.mixing import draw_cutmix
from part_fast.errors import BadValueError
from part_fast.evaluation.sanity import gradient_agreement
from part_fast.methods import METHODS
from part_fast.optional import needs
from part_fast.precision import algorithms
from part_fast.report import figures
from part_fast.training.checkpoint import PREVIOUS, promote_previous, read_state
from part_fast.training.engine import Engine
from part_fast.training.epoch import (
    LOOK_EVERY,
    Epoch,
    epoch_row,
    refuse_bad_loss,
    refuse_bad_weights,
    refuse_single_images,
    refuse_uneven,
    resets,
    same_rng,
    seed_generators,
)
from part_fast.training.measures import Tested, accuracies, epoch_warnings, is_tested
from part_fast.training.progress import Progress
from part_fast.training.run_folder import Checkpoints, check_folder, export, load_state, mend, opened, refuse_edited
from part_fast.training.signals import SAVE, Stop
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
    save_every: float = 10.0,
    log: Callable[[str], None] = tqdm.write,
) -> list[dict[str, Any]]:
    """Train one model and leave a run folder behind, from which a run that was stopped or killed goes on.

    `out` then holds config.json, metrics.csv (a row per epoch), model.safetensors, environment.json, curves.png,
    masks.safetensors (see `mask_history`), averaged.safetensors where weights are averaged, best.safetensors (the
    better of both) with config.validation, and training_state.pt, written after every epoch and every `save_every`
    minutes, from which `resume` goes on exactly as if it had never stopped. SIGTERM and Ctrl-C let the update finish
    and the state be saved first. Nothing is written before everything that can be checked is; `overwrite` replaces a
    run that is already there. Under torchrun each process trains on its share of every batch, and the first one writes.
    The generators of torch, Python and numpy are seeded by config.seed.

    Returns: the rows of metrics.csv; accuracies from 0 to 1, loss in nats, seconds and images per second of training.

    Raises:
        FileNotFoundError: the data set or checkpoint is missing, or there is nothing to resume.
        TypeError, ValueError: a field of config is wrong, does not fit the run to resume; or `out` holds a run already.
        RuntimeError: loss or weights are no longer finite, or another process trains in `out`.
        OSError: the disk is full, or the folder may not be written to; the last state is still whole.
        ImportError: matplotlib, or with `tensorboard` that package, is missing; nothing is written then.
        KeyboardInterrupt, SystemExit(143): after Ctrl-C and SIGTERM.
    """
    figures.load_matplotlib()  # a missing package is said before anything is written
    summary_writer = _load_summary_writer() if tensorboard else None
    config.check()
    checks.number("save_every", save_every, 0)
    device = distributed.join(find_device(config.device))
    main = distributed.rank() == 0
    say = log if main else _nobody
    config = config.on(device, like=read_config(out) if resume else None)
    if config.extra is not None:
        config = dataclasses.replace(config, extra=str(Path(config.extra).expanduser().absolute()))
    check_folder(config, out, resume, overwrite)
    distributed.barrier()  # nobody writes before everybody has checked
    seed_generators(config.seed)

    data = load(config.dataset, "train", config.root, config.download)
    config = dataclasses.replace(config, root=root_anywhere(data, config.root))
    data = (data if config.train_size is None else data.subset(config.train_size, name="train_size")).to(device)
    data, held_out = data.set_aside(config.validation, config.seed, "validation") if config.validation else (data, None)
    tested = Tested.of(config, data, held_out)
    n = len(data)  # of an epoch
    extra = None
    if config.extra is not None:
        data, extra = add_extra(data, Path(config.extra)), checksums(Path(config.extra))

    # A run that was killed before its first state starts as it did.
    state = read_state(out, say) if resume else None
    if state is not None:
        refuse_edited(config, out, state, extra)
    engine = Engine(config, data.num_classes, device, load=state is None)
    engine.try_network(data)
    refuse_single_images(config, engine.model, data)
    refuse_uneven(config, n, len(data) - n)
    model = engine.model
    budget = engine.budget if METHODS[config.method].weighted else None
    bank = None
    if config.refresh_epochs and budget is not None:
        size = (data.images.shape[2], data.images.shape[3])
        bank = MaskBank(len(data), size, budget.channels, config.eps, config.eps_low, device)

    remembered = None
    if ATTACKS[config.attack].remembers:
        remembered = PerturbationBank(len(data), data.images.shape[1:], config.eps, device, seed=config.seed)

    rows, epoch = ([], Epoch(0, device)) if state is None else load_state(state, engine, bank, remembered)
    if len(rows) > config.epochs:
        done = f"the {len(rows)} that the run in {out} has done"
        raise BadValueError(f"epochs must be at least {done}, got {config.epochs}")
    look_every = LOOK_EVERY if device.type == "cuda" else 1
    checkpoints = Checkpoints(out, engine, bank, rows, save_every, remembered, extra)
    behind = len(rows) * n + epoch.done * distributed.size()
    with (
        opened(config, out, resume, overwrite),
        algorithms(device, tf32=config.tf32, deterministic=config.deterministic),
        Progress(config.epochs * n, behind, config.epochs, log, shown=main) as progress,
        summary_writer(str(out)) if summary_writer and main else contextlib.nullcontext() as writer,
        Stop() as stop,
    ):
        say(_first_line(config, engine, data, n, tested))
        _warn_of_unused(config, say)
        if state is None:
            checkpoints.save(epoch)  # so that a run killed in its first epoch still knows where it began
        else:
            checkpoints.note(epoch)
            say(_where_it_goes_on(out, config, rows, epoch))
            _warn_of_another_rate(config, state["config"]["epochs"], epoch, say)
            if len(rows) == config.epochs and rows[-1]["test_natural"] is None:  # it was not to be the last one then
                with stop.at_once(), same_rng(device):
                    rows[-1] |= accuracies(engine, tested, len(rows) - 1)[0]
                checkpoints.save(epoch)
            if main:
                if state["file"] == PREVIOUS:
                    promote_previous(out)
                mend(out, engine, rows, tested.test, epoch, say)
        while epoch.number < config.epochs:
            method = config.method_at(epoch.number)
            progress.phase(epoch.number)
            began = time.perf_counter() - epoch.seconds
            since_warmup = epoch.number - config.warmup_epochs
            refreshes = bank is not None and METHODS[method].weighted and since_warmup % config.refresh_epochs == 0
            if bank is not None and refreshes and not epoch.begun:
                bank.fill(engine.budget, data.images)
            if remembered is not None and resets(config, epoch):
                remembered.reset((config.seed * 1_000_003 + epoch.number) % 2**63)
            order = epoch.order(n, config, len(data) - n).to(device)
            model.train()
            for batch in data.batches(config.batch_size, order=order[epoch.done :], join_last=True):
                drawn = draw_augmentation(len(batch.images), device=device) if config.augment else None
                x = to_float(batch.images) if drawn is None else drawn.apply(batch.images)
                mix = draw_cutmix(x, config.cutmix) if config.cutmix else None
                y = batch.labels if mix is None else mix.labels(batch.labels, data.num_classes)
                x = x if mix is None else mix.images(x)
                if epoch.done == 0 and config.precision != "fp32":
                    epoch.agreement = gradient_agreement(model, engine.attack_model, x, y)
                epsilon = batch_epsilon(method, budget, bank, batch.indices, drawn, config, mix)
                view = None if remembered is None else remembered.at(batch.indices, drawn)
                learned = train_step(engine, method, x, y, epsilon, epoch.done, len(order), epoch.number, view)
                epoch.add(*learned, y)
                epoch.seconds = time.perf_counter() - began
                if not engine.at_update:
                    progress.update(len(x) * distributed.size())
                    continue
                asked = stop.asked(due=checkpoints.due)
                looks = asked or epoch.done // config.batch_size % look_every == 0
                if looks:  # seldom on a GPU, which would wait for it each time
                    refuse_bad_loss(epoch, order, config, checkpoints.last)
                progress.update(len(x) * distributed.size(), epoch.mean_loss() if looks else None)
                if asked:
                    checkpoints.save(epoch)
                if asked > SAVE:
                    stop.leave(asked)
            if not epoch.ended:
                engine.end_epoch(epoch.number)
                refuse_bad_loss(epoch, order, config, checkpoints.last)  # and waits for a GPU, before time is taken
                epoch.seconds = time.perf_counter() - began
                epoch.ended = True
            refuse_bad_weights(engine, epoch.number, checkpoints.last)
            images = len(order) * distributed.size()
            if is_tested(config, epoch.number):
                progress.phase(epoch.number, "test")
            try:
                with stop.at_once(), same_rng(device):
                    measured, disordered = accuracies(engine, tested, epoch.number)
            except (KeyboardInterrupt, SystemExit):
                checkpoints.save(epoch)  # what was trained is kept; the tests are done again
                raise
            rows.append(
                {
                    **epoch_row(epoch, engine, method, images),
                    **measured,
                    **epoch.agreement,
                    "skipped": int(engine.skipped),
                    "seconds": epoch.seconds,
                    "images_per_second": images / epoch.seconds,
                }
            )
            for warning in epoch_warnings(rows, epoch, config, disordered):
                say(f"warning: epoch {epoch.number + 1}{warning}")
            engine.skipped.zero_()
            epoch = Epoch(epoch.number + 1, device)
            checkpoints.save(epoch)
            if main:
                export(out, engine, rows, tested.test)
                if writer is not None:
                    _log_scalars(writer, rows[-1])
            say(_line(rows[-1], config.epochs))
            if asked := stop.asked(due=False):
                stop.leave(asked)
    if main:
        draw(out, rows, config, say)
    return rows


def draw(out: Path, rows: list[dict[str, Any]], config: TrainConfig, say: Callable[[str], None]) -> None:
    """curves.png; whatever goes wrong with it is said, since the run itself is done."""
    title = f"{config.method} on {config.dataset}, {config.model}, seed {config.seed}"
    try:
        figures.draw_curves(out / "curves.png", rows, title)
    except Exception as error:  # of matplotlib, of its fonts and caches, of the disk
        say(f"warning: curves.png is not drawn: {type(error).__name__}: {' '.join(str(error).split())}")


def _nobody(line: str) -> None:
    """Processes other than the first one say nothing."""


def _first_line(config: TrainConfig, engine: Engine, data: Dataset, n: int, tested: Tested) -> str:
    size = "x".join(map(str, data.images.shape[2:]))
    aside = "" if tested.held_out is None else f", {len(tested.held_out)} held out"
    if len(data) > n:
        size_of_all = f"{data.images.nbytes / 1e9:.1f} GB with these"
        aside += f", {len(data) - n} extra ones, {config.extra_fraction:g} of each batch, {size_of_all}"
    device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "CPU"
    several = f"{distributed.size()} processes of " if distributed.size() > 1 else ""
    threads = f", {torch.get_num_threads()} threads" if engine.device.type == "cpu" else ""
    weights = sum(parameter.numel() for parameter in engine.model.parameters())
    return (
        f"{config.method} on {config.dataset} ({data.source or 'in memory'}): {n} training images of {size}"
        f"{aside}, {len(tested.test)} test images; {config.model}, {weights:,} weights; epochs: {config.epochs}, "
        f"batches of {several}{config.batch_size}; {config.precision} on {device}{threads}"
    )


def _warn_of_unused(config: TrainConfig, say: Callable[[str], None]) -> None:
    """Of steps and alpha that somebody gave to an attack that has its own."""
    usual = PRESETS[config.preset]
    if ATTACKS[config.attack].steps == 1:
        what = f"warning: attack {config.attack} takes one step, of each pixel's own eps"
        if config.steps not in (1, usual.steps):
            say(f"{what}: steps {config.steps} is not used")
        if config.alpha != usual.alpha:
            say(f"{what}: alpha {config.alpha:g} is that of PGD in tests alone")


def _where_it_goes_on(out: Path, config: TrainConfig, rows: list[dict[str, Any]], epoch: Epoch) -> str:
    if len(rows) == config.epochs:
        return f"the run in {out} is finished, with {len(rows)} epochs; --epochs with more goes on"
    return f"goes on in epoch {epoch.number + 1} after {epoch.done} images of each process"


def _warn_of_another_rate(config: TrainConfig, before: int, epoch: Epoch, say: Callable[[str], None]) -> None:
    """Of a schedule that depends on the number of epochs, where that is not what it was `before`."""
    old = dataclasses.replace(config, epochs=before).lr_at(epoch.number)
    now = config.lr_at(epoch.number)
    if old != now:
        say(
            f"warning: schedule {config.schedule} is over all epochs: epoch {epoch.number + 1} of {config.epochs} has "
            f"rate {now:.4g} at its start, and the run had come to {old:.4g} by its {before} epochs"
        )


def _line(row: dict[str, Any], epochs: int) -> str:
    accuracies = {"test natural": row["test_natural"], "PGD-20": row["test_pgd20"]}
    tested = "".join(f"{name} {100 * value:.1f}%, " for name, value in accuracies.items() if value is not None)
    return (
        f"epoch {row['epoch']}/{epochs} {row['method']}: lr {row['lr']:g}, loss {row['train_loss']:.4f}, "
        f"train robust {100 * row['train_robust']:.1f}%, {tested}{row['images_per_second']:.0f} img/s"
    )


def _load_summary_writer() -> Any:
    with needs("tensorboard", "train"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


def _log_scalars(writer: Any, row: dict[str, Any]) -> None:
    for name, value in row.items():
        if isinstance(value, float):
            writer.add_scalar(name, value, row["epoch"])
