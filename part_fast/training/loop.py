"""Adversarial training, to be read top to bottom: data, model; for each batch: eps map, attack, loss, update."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from part_fast import distributed
from part_fast.attacks.ascend import mma, pgd
from part_fast.budgets.bank import MaskBank
from part_fast.budgets.cam import CamBudget
from part_fast.budgets.controls import control_map
from part_fast.config import WEIGHTED, TrainConfig, find_device, read_config
from part_fast.data.catalogue import load
from part_fast.data.memory import Augmentation, Dataset, draw_augmentation, to_float
from part_fast.evaluation.accuracy import AttackSettings, correct, evaluation_data
from part_fast.evaluation.sanity import agreement_warning, gradient_agreement
from part_fast.losses import mart_loss, mart_objective, trades_loss, trades_objective
from part_fast.precision import algorithms, full_float32
from part_fast.report import figures as report
from part_fast.training.engine import Engine

STATE, WEIGHTS, AVERAGED = "training_state.pt", "model.safetensors", "averaged.safetensors"
RUN_FILES = ("config.json", "metrics.csv", WEIGHTS, STATE, "environment.json", "curves.png")
# What others make of a run, stale once it is overwritten.
DERIVED = (
    AVERAGED,
    "evaluation.json",
    "evaluation.csv",
    "evaluation_images.safetensors",
    "evaluation_aa_*",
    "events.out.tfevents.*",
)
# A resumed run may be longer, and may go on elsewhere.
MAY_CHANGE = ("epochs", "device", "root", "download")


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
    averaged.safetensors where weights are averaged, and training_state.pt, from which `resume` goes on exactly as if
    it had never stopped. Nothing is written before everything that can be checked is; `overwrite` replaces a run that
    is already there. Under torchrun each process trains on its share of every batch, and the first one writes.

    Returns: the rows of metrics.csv; accuracies from 0 to 1, loss in nats, seconds and images per second of training.

    Raises:
        FileNotFoundError: the data set or checkpoint is missing, or there is nothing to resume.
        TypeError, ValueError: a field of config is wrong, does not fit the run to resume; or `out` holds a run already.
        RuntimeError: the loss is no longer finite.
    """
    config.check()
    device = distributed.join(find_device(config.device))
    main = distributed.rank() == 0
    config = config.on(device, like=read_config(out) if resume else None)
    check_folder(config, out, resume, overwrite)
    distributed.barrier()  # nobody writes before everybody has checked
    torch.manual_seed(config.seed)

    data = load(config.dataset, "train", config.root, config.download)
    data = (data if config.train_size is None else data.subset(config.train_size)).to(device)
    test = evaluation_data(config).to(device)
    attacked_test = test.subset(min(config.pgd_test_size, len(test))) if config.pgd_test_size else None

    # A run that was stopped in its first epoch has no state yet, and starts as it did.
    engine = Engine(config, data.num_classes, device, load=not (resume and (out / STATE).is_file()))
    model, budget = engine.model, engine.budget
    bank = None
    if config.refresh_epochs and config.method in WEIGHTED:
        size = (data.images.shape[2], data.images.shape[3])
        bank = MaskBank(len(data), size, budget.channels, config.eps, config.eps_low, device)

    rows = load_state(out / STATE, engine, bank) if resume else []
    if len(rows) > config.epochs:
        done = f"the {len(rows)} that the run in {out} has done"
        raise ValueError(f"epochs must be at least {done}, got {config.epochs}")
    refuse_single_images(config, engine.model, data)
    if main:
        prepare_folder(config, out, resume, overwrite)
        if rows:
            export(out, engine, rows)  # the run may have been stopped between its state and these
    with (
        algorithms(device, tf32=config.tf32, deterministic=config.deterministic),
        tqdm(
            total=config.epochs * len(data),
            initial=len(rows) * len(data),
            unit="img",
            disable=None if main else True,
        ) as bar,
        adversarial_logits(model) as seen,
        _tensorboard(out) if tensorboard and main else contextlib.nullcontext() as writer,
    ):
        for epoch in range(len(rows), config.epochs):
            method = config.method_at(epoch)
            # Sums stay on the device: reading them every batch would make a GPU wait.
            loss_sum, hits = torch.zeros((), device=device), torch.zeros((), dtype=torch.long, device=device)
            begin = time.perf_counter()
            weighted_epoch = epoch - config.warmup_epochs
            if bank is not None and method in WEIGHTED and weighted_epoch % config.refresh_epochs == 0:
                bank.fill(budget, data.images)
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
                loss = train_step(engine, method, x, batch.labels, epsilon, (seen_images, len(order), epoch))
                seen_images += len(x)
                loss_sum += loss * len(x)
                hits += (seen[-1].argmax(1) == batch.labels).sum()
                bar.update(len(x) * distributed.size())
            engine.end_epoch(epoch)
            images = len(order) * distributed.size()
            train_loss = float(distributed.sum_(loss_sum)) / images
            seconds = time.perf_counter() - begin
            if not math.isfinite(train_loss):
                raise RuntimeError(f"training diverged in epoch {epoch + 1}: the loss is {train_loss}; lower lr")
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
                save_state(out, engine, rows, bank)
                if writer is not None:
                    _log_scalars(writer, rows[-1])
                log(_line(rows[-1], config.epochs))
            distributed.barrier()
    if main:
        title = f"{config.method} on {config.dataset}, {config.model}, seed {config.seed}"
        report.draw_curves(out / "curves.png", rows, title)
    return rows


def accuracies(engine: Engine, test: Dataset, attacked_test: Dataset | None) -> dict[str, float | None]:
    """test_natural and test_pgd20 (None without `attacked_test`), and those of the averaged model if there is one."""
    config = engine.config
    attack = AttackSettings(config.eps, config.alpha, config.seed)
    models = {"test": engine.model} | ({} if engine.averaged is None else {"averaged": engine.averaged.module})
    found: dict[str, float | None] = {}
    for name, model in models.items():
        for measure, images in (("natural", test), ("pgd20", attacked_test)):
            right = None if images is None else correct(model, images, measure, attack)
            found[f"{name}_{measure}"] = None if right is None else float(right.float().mean())
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


def batch_epsilon(
    method: str,
    budget: CamBudget,
    bank: MaskBank | None,
    indices: Tensor,
    drawn: Augmentation | None,
    config: TrainConfig,
) -> float | Tensor | CamBudget:
    """How far the pixels of a batch may move: one eps, the maps kept in the bank, or a budget yet to be asked."""
    if method not in WEIGHTED:
        return config.eps
    if bank is None:
        return budget
    return control_map(bank.lookup(indices, drawn), config.mask_control, config.eps, config.eps_low)


def train_step(
    engine: Engine,
    method: str,
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor | CamBudget,
    where: tuple[int, int, int] | None = None,
) -> Tensor:
    """Attack, loss, backward, update; the loss, a scalar without a graph, of images x (N,C,H,W), labels y (N,).

    where: this process's images of the epoch done before, all of them, and the epoch, from 0; default: a whole epoch.
    """
    engine.begin(*(where or (0, len(x), 0)))
    with engine.collecting():
        loss = batch_loss(method, engine.trained, x, y, epsilon, engine.config, attack_model=engine.attack_model)
        engine.backward(loss, len(x))
    engine.end()
    return loss.detach()


def batch_loss(
    method: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor | CamBudget,
    config: TrainConfig,
    *,
    attack_model: nn.Module | None = None,
) -> Tensor:
    """The training loss, a scalar, of images x (N,C,H,W) in [0,1], labels y (N,); the model is left in train mode.

    attack_model: what is attacked in the model's place; default: the model.
    """
    attacked = model if attack_model is None else attack_model
    trades, mart = method in ("trades", "part-t"), method in ("mart", "part-m")
    if config.attack == "pgd" and (trades or mart):
        robust_loss = trades_loss if trades else mart_loss
        return robust_loss(
            model, x, y, None, config.alpha, epsilon, config.steps, config.beta, attack_model=attack_model
        )
    eps = epsilon(x) if isinstance(epsilon, CamBudget) else epsilon
    # The published start: every pixel within the whole eps, not clipped to [0,1].
    start = x + (2 * torch.rand_like(x) - 1) * config.eps if config.released else "uniform"
    attack = mma if config.attack == "mma" else pgd
    x_adv = attack(attacked, x, y, eps, config.alpha, config.steps, start=start)
    if trades or mart:
        objective = trades_objective if trades else mart_objective
        return objective(model(x), model(x_adv), y, config.beta)
    return F.cross_entropy(model(x_adv), y)


@contextlib.contextmanager
def adversarial_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """`with adversarial_logits(model) as seen`: seen[-1] is the output of the latest train-mode forward.

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
        raise ValueError(f"{name} must be >= 2 for {config.model} on images of {size}: {error}") from error


def check_folder(config: TrainConfig, out: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that this run must not write to, before anything is written."""
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out takes a folder, {out} is a file")
    present = [name for name in RUN_FILES if (out / name).exists()]
    if present and not (resume or overwrite):
        holds = ", ".join(present)
        raise ValueError(f"{out} already holds a run ({holds}): --resume continues it, --overwrite replaces it")
    if resume:
        before, now = read_config(out).to_json(), config.to_json()
        different = [key for key in now if key not in MAY_CHANGE and before.get(key) != now[key]]
        if different:
            pairs = "; ".join(f"{key} {before.get(key)!r} there, {now[key]!r} here" for key in different)
            raise ValueError(f"the run in {out} has another configuration: {pairs}")


def prepare_folder(config: TrainConfig, out: Path, resume: bool, overwrite: bool) -> None:
    """Make the folder, without what an overwritten run left in it, and say there what runs and on what."""
    out.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for pattern in RUN_FILES + DERIVED:
            for path in out.glob(pattern):
                path.unlink()
    with contextlib.nullcontext() if config.tf32 else full_float32():
        environment = report.environment()
    if resume:
        first = json.loads((out / "environment.json").read_text())
        environment = {**first, "resumed": [*first.get("resumed", []), environment]}
    report.write_json(out / "environment.json", environment)
    report.write_json(out / "config.json", config.to_json())


def save_state(out: Path, engine: Engine, rows: list[dict[str, Any]], bank: MaskBank | None) -> None:
    """After an epoch: everything that resuming needs, in one file, and then `export`."""
    state = {
        **engine.state_dict(),
        "rows": rows,
        "cpu_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "masks": None if bank is None else bank.bits,
    }
    with report.replacing(out / STATE) as temporary:
        torch.save(state, temporary)
    export(out, engine, rows)


def export(out: Path, engine: Engine, rows: list[dict[str, Any]]) -> None:
    """model.safetensors, averaged.safetensors where weights are averaged, and metrics.csv, for everybody else."""
    from safetensors.torch import save_file

    models = {WEIGHTS: engine.model} | ({} if engine.averaged is None else {AVERAGED: engine.averaged.module})
    for name, model in models.items():
        with report.replacing(out / name) as temporary:
            save_file({key: value.contiguous() for key, value in model.state_dict().items()}, temporary)
    report.write_csv(out / "metrics.csv", rows)


def load_state(path: Path, engine: Engine, bank: MaskBank | None) -> list[dict[str, Any]]:
    """Put everything where `save_state` left it; the rows so far, none without a file."""
    if not path.is_file():
        return []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file can raise nearly anything; the first line says what happened.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read: {reason}") from error
    engine.load_state_dict(state)
    torch.set_rng_state(state["cpu_rng"])
    # Runs may go on on a machine with other devices; there the random numbers are others anyway.
    if len(state["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    if bank is not None:
        bank.load_bits(state["masks"])
    rows: list[dict[str, Any]] = state["rows"]
    return rows


def _line(row: dict[str, Any], epochs: int) -> str:
    pgd20 = "" if row["test_pgd20"] is None else f", PGD-20 {100 * row['test_pgd20']:.1f}%"
    return (
        f"epoch {row['epoch']}/{epochs} {row['method']}: lr {row['lr']:g}, loss {row['train_loss']:.4f}, "
        f"train robust {100 * row['train_robust']:.1f}%, test natural {100 * row['test_natural']:.1f}%{pgd20}, "
        f"{row['images_per_second']:.0f} img/s"
    )


def _tensorboard(out: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out))


def _log_scalars(writer: Any, row: dict[str, Any]) -> None:
    for name, value in row.items():
        if isinstance(value, float):
            writer.add_scalar(name, value, row["epoch"])
