"""The ops, one file each; backends and shapes are in each op's docstring."""

from part_fast.ops.bank_start import bank_start
from part_fast.ops.cam import cam
from part_fast.ops.cam_mask import cam_mask
from part_fast.ops.eps_step import eps_step_
from part_fast.ops.epsilon_map import epsilon_map, packed_epsilon_map
from part_fast.ops.packed_epsilon import PackedEpsilon
from part_fast.ops.pgd_step import pgd_step, pgd_step_
from part_fast.ops.project_linf import project_linf
from part_fast.ops.uniform_start import uniform_start
from part_fast.ops.upsample_cam import upsample_cam

__all__ = [
    "PackedEpsilon",
    "bank_start",
    "cam",
    "cam_mask",
    "eps_step_",
    "epsilon_map",
    "packed_epsilon_map",
    "pgd_step",
    "pgd_step_",
    "project_linf",
    "uniform_start",
    "upsample_cam",
]
