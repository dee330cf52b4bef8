"""epsilon_map in Triton: from the small map to each pixel's eps in one launch, a program per image."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from part_fast.kernels import Launch
from part_fast.kernels.cam_mask import EPS, QUANTILE, RELEASED, SOFT, write_image
from part_fast.kernels.upsample_cam import tiles_of


@triton.jit
def epsilon_map_kernel(
    cam, out, high_value: tl.float64, low_value: tl.float64, k, tiles, RULE: tl.constexpr, KEPT: tl.constexpr,
    MAP_HEIGHT: tl.constexpr, MAP_WIDTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, MAPS: tl.constexpr, TABLE: tl.constexpr, TALL: tl.constexpr,
    THREADS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    write_image(
        cam, out, high_value, low_value, k, tiles, RULE, EPS, KEPT,
        MAP_HEIGHT, MAP_WIDTH, HEIGHT, WIDTH, BLOCK, WIDE, MAPS, TABLE, TALL, THREADS, DTYPE,
    )  # fmt: skip


def epsilon_map_launch(
    cam: Tensor, height: int, width: int, rule: int, k: int, eps: float, eps_low: float, out: Tensor
) -> Launch:
    tiles = tiles_of(cam, height, width, rule == QUANTILE.value)
    # "soft" multiplies by eps - eps_low, a difference of Python floats.
    high_value = eps - eps_low if rule == SOFT.value else eps
    return Launch(
        epsilon_map_kernel, cam.shape[0] if out.numel() else 0,
        {"cam": cam, "out": out, "high_value": high_value, "low_value": eps_low, "k": k, "tiles": tiles.count},
        {"RULE": rule, "KEPT": tiles.count == 1, **tiles.constants}, tiles.warps,
    )  # fmt: skip


def epsilon_map(cam: Tensor, height: int, width: int, rule: int, k: int, eps: float, eps_low: float) -> Tensor:
    dtype = torch.float64 if cam.dtype == torch.float64 else torch.float32
    planes = 3 if rule == RELEASED.value else 1
    out = cam.new_empty((cam.shape[0], planes, height, width), dtype=dtype)
    epsilon_map_launch(cam, height, width, rule, k, eps, eps_low, out).run()
    return out
