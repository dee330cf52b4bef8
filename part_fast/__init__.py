"""part_fast: pixel-reweighted adversarial training (PART) at the price of plain adversarial training.

Data flows one way: images -> class activation map -> mask -> per-pixel eps map -> attack -> loss. Each
step is a function that other code can use alone; see `part_fast.ops`, `part_fast.attacks`, `part_fast.losses`.
"""

from part_fast import attacks, losses, models, ops
from part_fast.attack_model import AttackModel
from part_fast.attacks.fast import fgsm_rs, n_fgsm, pgi, warm
from part_fast.attacks.mma import mma
from part_fast.attacks.pgd import PGD, pgd
from part_fast.awp import awp
from part_fast.backends import available_backends, backend, current_backend, set_backend
from part_fast.budgets.cam import CamBudget
from part_fast.budgets.perturbations import PerturbationBank
from part_fast.errors import UsageError
from part_fast.evaluation.trained import load_model
from part_fast.losses import mart_loss, trades_loss
from part_fast.ops import (
    PackedEpsilon,
    bank_start,
    cam,
    cam_mask,
    eps_step_,
    epsilon_map,
    packed_epsilon_map,
    pgd_step,
    pgd_step_,
    project_linf,
    uniform_start,
    upsample_cam,
)

__version__ = "0.1.0"

__all__ = [
    "PGD",
    "AttackModel",
    "CamBudget",
    "PackedEpsilon",
    "PerturbationBank",
    "UsageError",
    "attacks",
    "available_backends",
    "awp",
    "backend",
    "bank_start",
    "cam",
    "cam_mask",
    "current_backend",
    "eps_step_",
    "epsilon_map",
    "fgsm_rs",
    "load_model",
    "losses",
    "mart_loss",
    "mma",
    "models",
    "n_fgsm",
    "ops",
    "packed_epsilon_map",
    "pgd",
    "pgd_step",
    "pgd_step_",
    "pgi",
    "project_linf",
    "set_backend",
    "trades_loss",
    "uniform_start",
    "upsample_cam",
    "warm",
]
