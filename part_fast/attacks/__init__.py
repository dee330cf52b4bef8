"""Attacks with a budget per pixel: pgd, mma, AutoAttack, and PGD as a drop-in for attack libraries."""

from part_fast.attacks.ascend import (
    PGD,
    ascend,
    clean_logits,
    cross_entropy,
    divergence,
    margin,
    mma,
    objective,
    pgd,
    towards,
)
from part_fast.attacks.autoattack import autoattack

__all__ = [
    "PGD",
    "ascend",
    "autoattack",
    "clean_logits",
    "cross_entropy",
    "divergence",
    "margin",
    "mma",
    "objective",
    "pgd",
    "towards",
]
