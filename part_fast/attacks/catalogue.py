"""The attacks by name: what training, evaluation, the command line and its help texts know of each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from part_fast.attacks.autoattack import autoattack, load_autoattack
from part_fast.attacks.fast import fgsm_rs, n_fgsm, pgi, warm
from part_fast.attacks.mma import mma
from part_fast.attacks.pgd import pgd
from part_fast.errors import BadValueError


@dataclass(frozen=True)
class Attack:
    """One attack.

    help: what it is, for help texts.
    run: callable(model, x, y, eps, alpha, steps, start, seed) -> adversarial images like x (N,C,H,W), for class indices
        y (N,). eps, in training a map of each pixel's too, and alpha are in image units; start as in `pgd`.
    trains, evaluates: whether `train --attack` and `evaluate --attacks` take it.
    steps: of an evaluation; None: its name there ends in their number, as in pgd20. Training gives its own, of which
        an attack of one step reads none.
    random_start: whether `start` is drawn from a random generator; else it is "zero".
    reach: how far a random start that is a tensor lies from the images, in units of eps.
    released_clip: to what PART's published code clips this attack's start, (low, high); None: it has no such attack.
    remembers: whether `start` is a BankView of the training images' perturbations, which `run` writes back.
    regularised: whether the training loss also gets `pgi_lambda` times the mean squared difference between the logits
        at the start and at the end.
    reads_model: whether it asks the model, so that a faster copy of it pays.
    soft_labels: whether y may be probabilities (N,classes), as CutMix makes them.
    of_method: whether a method that has an attack of this kind in its own loss runs that instead.
    strongest: whether no other one within eps is expected to fool more.
    resumes: whether an evaluation is so slow that each batch is kept, to go on from.
    load: called before anything is written; raises, saying how to get it, where a package is missing.
    """

    help: str
    run: Callable[..., Tensor]
    trains: bool = True
    evaluates: bool = True
    steps: int | None = None
    random_start: bool = True
    reach: float = 1.0
    released_clip: tuple[float, float] | None = None
    remembers: bool = False
    regularised: bool = False
    reads_model: bool = True
    soft_labels: bool = True
    of_method: bool = False
    resumes: bool = False
    strongest: bool = False
    load: Callable[[], object] | None = None


ATTACKS: dict[str, Attack] = {
    "natural": Attack(
        "no attack", lambda model, x, *_: x, trains=False, steps=0, random_start=False, reads_model=False
    ),
    "pgd": Attack(
        "projected gradient descent",
        lambda model, x, y, eps, alpha, steps, start, seed: pgd(model, x, y, eps, alpha, steps, start=start),
        of_method=True,
        released_clip=(-math.inf, math.inf),
    ),
    "fgsm": Attack(
        "one step of the whole eps from the image itself",
        # A step of 1 crosses the whole range of images, so that the projection stops each pixel at its own eps.
        lambda model, x, y, eps, alpha, steps, start, seed: pgd(model, x, y, eps, 1.0, 1, start=start),
        steps=1,
        random_start=False,
    ),
    "fgsm-rs": Attack(
        "one step of 1.25 eps from a random start, projected",
        lambda model, x, y, eps, alpha, steps, start, seed: fgsm_rs(model, x, y, eps, start=start),
        steps=1,
    ),
    "n-fgsm": Attack(
        "one step of eps from noise of 2 eps, not projected: it moves pixels by up to 3 eps",
        lambda model, x, y, eps, alpha, steps, start, seed: n_fgsm(model, x, y, eps, start=start),
        steps=1,
        reach=2.0,
    ),
    "pgi": Attack(
        "one step of eps from the image's perturbation of an epoch ago, with a regulariser",
        lambda model, x, y, eps, alpha, steps, start, seed: pgi(model, x, y, eps, start=start),
        evaluates=False,
        steps=1,
        random_start=False,
        remembers=True,
        regularised=True,
    ),
    "warm": Attack(
        "projected gradient descent from the image's perturbation of an epoch ago",
        lambda model, x, y, eps, alpha, steps, start, seed: warm(model, x, y, eps, alpha, steps, start=start),
        evaluates=False,
        random_start=False,
        remembers=True,
    ),
    "mma": Attack(
        "minimum margin, three targets",
        lambda model, x, y, eps, alpha, steps, start, seed: mma(model, x, y, eps, alpha, steps, start=start),
        steps=20,
        soft_labels=False,
        released_clip=(0.0, 1.0),
    ),
    "aa": Attack(
        "AutoAttack, standard",
        lambda model, x, y, eps, alpha, steps, start, seed: autoattack(model, x, y, eps, seed),
        trains=False,
        steps=0,
        random_start=False,
        soft_labels=False,
        resumes=True,
        strongest=True,
        load=load_autoattack,
    ),
}


def for_training() -> dict[str, Attack]:
    """Those that training takes."""
    return {name: attack for name, attack in ATTACKS.items() if attack.trains}


def for_evaluation() -> dict[str, Attack]:
    """Those that an evaluation takes, by the names that it takes; in pgdSTEPS a number stands for STEPS."""
    evaluating = {name: attack for name, attack in ATTACKS.items() if attack.evaluates}
    return {name if attack.steps is not None else f"{name}STEPS": attack for name, attack in evaluating.items()}


def attack_of_evaluation(name: str) -> tuple[Attack, int]:
    """The attack that an evaluation knows by that name, and its steps.

    Errors: ValueError for an unknown name, listing the known.
    """
    for key, attack in ATTACKS.items():
        if attack.evaluates and attack.steps is not None and name == key:
            return attack, attack.steps
        if attack.evaluates and attack.steps is None and (steps := re.fullmatch(rf"{re.escape(key)}([1-9]\d*)", name)):
            return attack, int(steps[1])
    raise BadValueError(f"attacks must be of {known_attacks()}, got {name!r}")


def load_attacks(names: Iterable[str]) -> None:
    """What attacks of an evaluation need beside part_fast. Errors: ImportError where it is missing."""
    for attack, _ in map(attack_of_evaluation, names):
        if attack.load is not None:
            attack.load()


def known_attacks() -> str:
    """The names that an evaluation takes, for messages."""
    return ", ".join(
        name if attack.steps is not None else f"{name}STEPS ({name}20, {name}100, ...)"
        for name, attack in ATTACKS.items()
        if attack.evaluates
    )
