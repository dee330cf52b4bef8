"""What is measured after an epoch, which weights are the best so far, and what a reader of it should not miss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from part_fast.attacks.catalogue import ATTACKS
from part_fast.config import TrainConfig
from part_fast.data.memory import Dataset
from part_fast.evaluation.accuracy import AttackSettings, is_correct
from part_fast.evaluation.sanity import agreement_warning, order_flags
from part_fast.evaluation.trained import evaluation_data
from part_fast.training.engine import Engine
from part_fast.training.epoch import Epoch

# Training images that PGD-10 attacks after an epoch of an attack of one step.
WATCHED_IMAGES = 256


@dataclass(frozen=True)
class Tested:
    """The images of the tests after every `config.test_every` epochs.

    test: all test images. attacked: those of them that PGD-20 attacks. held_out: training images kept aside. watched:
    training images that PGD-10 attacks, where a single step may be all that the model learns to resist and PGD attacks
    no others. None: not measured.
    """

    test: Dataset
    attacked: Dataset | None
    held_out: Dataset | None
    watched: Dataset | None

    @classmethod
    def of(cls, config: TrainConfig, data: Dataset, held_out: Dataset | None) -> Tested:
        """data: what is trained on; all images lie on its device."""
        test = evaluation_data(config).to(data.images.device)
        attacked = test.subset(min(config.pgd_test_size, len(test))) if config.pgd_test_size else None
        watches = config.one_step and held_out is None and attacked is None
        watched = data.subset(min(WATCHED_IMAGES, len(data)), config.seed) if watches else None
        return cls(test, attacked, held_out, watched)


# The columns of metrics.csv that judge weights of an epoch: those that are trained, and their average.
JUDGED = {"plain": "validation_pgd20", "averaged": "validation_averaged_pgd20"}


class Best(NamedTuple):
    """epoch: counted from 1. weights: which of it, "plain" or "averaged"."""

    epoch: int
    weights: str


def best_epoch(rows: Sequence[Mapping[str, Any]]) -> Best | None:
    """The weights with the highest PGD-20 accuracy on the validation images; of equals the first, the plain ones."""
    judged = [
        (row[column], Best(row["epoch"], weights))
        for row in rows
        for weights, column in JUDGED.items()
        if row.get(column) is not None
    ]
    return max(judged, key=lambda pair: pair[0])[1] if judged else None


# What tells whether a model still resists PGD, the first of them that is measured.
WATCHED = {
    "validation_pgd20": "PGD-20 on the validation images",
    "test_pgd20": "PGD-20 on the test images",
    "train_pgd10": "PGD-10 on training images",
}


def overfitting_warning(rows: Sequence[Mapping[str, Any]], attack: str) -> str | None:
    """A warning if the last epoch's model resists the attack that it trains on, and no longer PGD.

    That is: PGD on the images watched has fallen to less than half of its best, while training accuracy under attack
    has risen since then and is more than twice as high; both of the plain weights.
    Source: Wong et al., "Fast is better than free", ICLR 2020, where it is called catastrophic overfitting.
    """
    judge = next((name for name in WATCHED if rows[-1].get(name) is not None), None)
    if judge is None:
        return None
    best = max((row for row in rows if row.get(judge) is not None), key=lambda row: row[judge])
    resists, trained = rows[-1][judge], rows[-1]["train_robust"]
    if not (resists < best[judge] / 2 and trained > best["train_robust"] and trained > 2 * resists):
        return None
    if ATTACKS[attack].steps != 1:
        stronger = "more --steps or a smaller --alpha"
    else:
        stronger = "--attack pgd" if ATTACKS[attack].regularised else "--attack pgi"
    kept = "take --weights best" if judge == "validation_pgd20" else "keep the best epoch by --validation"
    return (
        f"{WATCHED[judge]} has fallen from {100 * best[judge]:.1f}% in epoch {best['epoch']} to "
        f"{100 * resists:.1f}%, while training accuracy under attack has risen from "
        f"{100 * best['train_robust']:.1f}% to {100 * trained:.1f}%: catastrophic overfitting to a weak attack; train "
        f"with {stronger}, and {kept}"
    )


def is_tested(config: TrainConfig, epoch: int) -> bool:
    """Whether there is a test after that epoch, counted from 0."""
    return (epoch + 1) % config.test_every == 0 or epoch + 1 == config.epochs


def accuracies(engine: Engine, tested: Tested, epoch: int) -> tuple[dict[str, float | None], list[str]]:
    """test_natural and test_pgd20 (None without `attacked`), and validation_pgd20 if images are held out, those of
    the averaged model too if there is one; and train_pgd10 if training images are watched. And what is said of an order
    that no sound attack gives. After an epoch, counted from 0, that is not tested all are None."""
    config = engine.config
    if not is_tested(config, epoch):
        return dict.fromkeys(_columns(tested, averaged=engine.averaged is not None)), []
    attack = AttackSettings(config.eps, config.alpha, config.seed)
    models = {"test": engine.model} | ({} if engine.averaged is None else {"averaged": engine.averaged.module})
    found: dict[str, float | None] = {}
    disordered = []
    for name, model in models.items():
        found[f"{name}_natural"] = float(is_correct(model, tested.test, "natural", attack).float().mean())
        found[f"{name}_pgd20"] = None
        if tested.attacked is not None:
            right = {measure: is_correct(model, tested.attacked, measure, attack) for measure in ("natural", "pgd20")}
            found[f"{name}_pgd20"] = float(right["pgd20"].float().mean())
            which = "" if model is engine.model else ", averaged weights"
            disordered += [f"{which}: on test images {flag}" for flag in order_flags(right)]
    if tested.held_out is not None:
        for model, column in zip(models.values(), JUDGED.values(), strict=False):
            found[column] = float(is_correct(model, tested.held_out, "pgd20", attack).float().mean())
    if tested.watched is not None:
        found["train_pgd10"] = float(is_correct(engine.model, tested.watched, "pgd10", attack).float().mean())
    return found, disordered


def _columns(tested: Tested, averaged: bool) -> list[str]:
    """What `accuracies` measures."""
    models = ("test", "averaged") if averaged else ("test",)
    found = [f"{name}_{measure}" for name in models for measure in ("natural", "pgd20")]
    found += [] if tested.held_out is None else list(JUDGED.values())[: len(models)]
    return found + ([] if tested.watched is None else ["train_pgd10"])


def epoch_warnings(
    rows: list[dict[str, Any]], epoch: Epoch, config: TrainConfig, disordered: list[str]
) -> Iterator[str]:
    """What the row of an epoch tells that its reader should not miss. disordered: as `accuracies` says it."""
    if epoch.agreement and (weak := agreement_warning(epoch.agreement)) is not None:
        yield f", {config.precision}: {weak}"
    if (overfitting := overfitting_warning(rows, config.attack)) is not None:
        yield f": {overfitting}"
    for flag in disordered:
        yield (
            f"{flag}: the attack raises accuracy, so its gradients mislead it and no robust accuracy here counts; "
            f"look at what the network does to its input, and at evaluate --sanity-images 100"
        )
    if rows[-1]["skipped"]:
        yield f": {rows[-1]['skipped']} updates were not finite and are skipped"
