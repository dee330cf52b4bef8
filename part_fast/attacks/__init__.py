"""Attacks with a budget per pixel: pgd, fast ones, mma, AutoAttack, and PGD as a drop-in for attack libraries."""

from part_fast.attacks.ascend import ascend, clean_logits
from part_fast.attacks.autoattack import autoattack
from part_fast.attacks.fast import fgsm_rs, n_fgsm, pgi, warm
from part_fast.attacks.mma import mma
from part_fast.attacks.objectives import cross_entropy, divergence, margin, objective, towards
from part_fast.attacks.pgd import PGD, pgd

__all__ = [
    "PGD",
    "ascend",
    "autoattack",
    "clean_logits",
    "cross_entropy",
    "divergence",
    "fgsm_rs",
    "margin",
    "mma",
    "n_fgsm",
    "objective",
    "pgd",
    "pgi",
    "towards",
    "warm",
]
