"""A few launches of every kernel, for compute-sanitizer to watch: small and odd shapes, aligned and not, all dtypes.

compute-sanitizer --tool memcheck python -m part_fast.gpu.sanitize --backend cuda

Triton compiles a kernel for every dtype, alignment and form of eps, which takes most of a second each: it gets
`--much least`, and `--watch`, by which all is compiled before the tool watches.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from typing import Any

import torch

import part_fast
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
from part_fast.ops.cam import METHODS

IMAGES = [(2, 3, 5, 7), (3, 3, 16, 16), (1, 1, 33, 31)]
CAMS = [(2, 33, 5, 3), (2, 512, 4, 4), (1, 640, 8, 8), (2, 5, 1, 1)]
SIZES = [((3, 4, 4), (32, 32)), ((2, 5, 7), (30, 44)), ((1, 2, 9), (7, 9)), ((1, 16, 16), (65, 130))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EPS, EPS_LOW, ALPHA = 0.1, 0.05, 0.01
# How many dtypes, and shapes of each kind, the first of them.
SHARES = {"all": None, "few": 2, "least": 1}


def steps(shape: tuple[int, int, int, int], dtype: torch.dtype, last: bool, device: str, each: int = 1) -> int:
    """The ops on images and their gradients, in each `each`-th form of eps; how many calls."""
    n, c, h, w = shape
    count = n * c * h * w
    memory = torch.rand(3, count + 3, device=device).to(dtype)
    bank = torch.randint(-127, 128, (n + 1, c, h, w), dtype=torch.int8, device=device)
    # Crops that leave much and nothing, flips, and on a GPU a sample that is not in the bank.
    drawn = [(i + 1, i - 1, (-1) ** i * w * i, i % 2) for i in range(n)]
    if device != "cpu":
        drawn[0] = (n + 1, 0, 0, 0)
    kept: dict[str, Any] = {"bank": bank, "places": torch.tensor(drawn, device=device), "scale": EPS}
    mask = torch.rand(n, 1, h, w, device=device) < 0.5
    forms: tuple[Any, ...] = (
        EPS,
        torch.full((n, 1, h, w), EPS, device=device),
        torch.rand(shape, device=device),
        torch.rand(1, c, 1, 1, device=device),
        PackedEpsilon.pack(mask, EPS, EPS_LOW),
        PackedEpsilon.pack(mask.expand(n, c, h, w), EPS, EPS_LOW),
    )
    for pad, eps in itertools.product((0, 3), forms[::each]):  # 3: no access of 16 bytes is aligned
        x_adv, grad, x = (row[pad : pad + count].view(shape) for row in memory)
        if pad == 0:
            x_adv, grad, x = (value.clone() for value in (x_adv, grad, x))
        if last:
            x_adv, grad, x = (value.clone(memory_format=torch.channels_last) for value in (x_adv, grad, x))
        pgd_step(x_adv, grad, x, eps, ALPHA)
        pgd_step(x_adv, grad.float(), x, eps, ALPHA)
        project_linf(x_adv, x, eps)
        leaf, other = (value.clone().requires_grad_() for value in (x_adv, x))
        learned = eps.clone().requires_grad_() if isinstance(eps, torch.Tensor) else eps
        pgd_step(leaf, grad, other, learned, ALPHA).sum().backward()
        project_linf(leaf, other, learned).sum().backward()
        pgd_step_(x_adv.clone(), grad, x, eps, ALPHA)
        uniform_start(x, eps, seed=pad)
        bank_start(x, **kept, eps=eps)
        eps_step_(x_adv.clone(), grad, x, eps, 1.0)
        eps_step_(x_adv, grad.float(), x, eps, 1.0, **kept)
    return 10 * 2 * len(forms[::each])


def cams(shape: tuple[int, int, int, int], dtype: torch.dtype, last: bool, device: str) -> int:
    """cam by every method; how many calls."""
    memory_format = torch.channels_last if last else torch.contiguous_format
    a, g = (torch.randn(shape, device=device).to(dtype, memory_format=memory_format) for _ in range(2))
    for method in METHODS:
        cam(a, g, method)
    return len(METHODS)


def maps(shape: tuple[int, int, int], size: tuple[int, int], dtype: torch.dtype, device: str) -> int:
    """cam_mask, epsilon_map, packed_epsilon_map and upsample_cam, by every rule; how many calls."""
    small = torch.randn(shape, device=device).relu().to(dtype)
    small[0, 0, 0] += 1
    rules = ("zscore", "released", "quantile:0.3")
    for rule in rules:
        cam_mask(small, size, rule)
        epsilon_map(small, size, EPS, EPS_LOW, rule)
        packed_epsilon_map(small, size, EPS, EPS_LOW, rule)
    epsilon_map(small, size, EPS, EPS_LOW, "soft")
    upsample_cam(small.requires_grad_(), size).sum().backward()
    return 3 * len(rules) + 3


def main(arguments: list[str] | None = None) -> int:
    """Launch them all."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    flags.add_argument("--backend", required=True)
    flags.add_argument("--device", default="cuda")
    flags.add_argument("--much", choices=tuple(SHARES), default="all", help="few: two dtypes and shapes; least: one")
    flags.add_argument("--watch", nargs=argparse.REMAINDER, help="a command to launch all under, once it is compiled")
    args = flags.parse_args(arguments)
    launches(args.backend, args.device, args.much)
    if not args.watch:
        return 0
    print("compiled; now watched", flush=True)
    own = [sys.executable, "-m", "part_fast.gpu.sanitize", "--backend", args.backend]
    return subprocess.call([*args.watch, *own, "--device", args.device, "--much", args.much])


def launches(backend: str, device: str, much: str) -> None:
    """Launch them, and print how far it is: what is killed halfway has said so much."""
    some = slice(SHARES[much])
    torch.manual_seed(0)
    count = 0
    with part_fast.backend(backend):
        for dtype, last in itertools.product(DTYPES[some], (False,) if much == "least" else (False, True)):
            for images in IMAGES[some]:
                count += steps(images, dtype, last, device, each=2 if much == "least" else 1)
                print(f"{count} calls on {backend}: images {images} {dtype}", flush=True)
            count += sum(cams(shape, dtype, last, device) for shape in CAMS[some])
        large = [((1, 7, 7), (224, 224))] if much == "all" else []
        for dtype, (shape, size) in itertools.product(DTYPES[some], SIZES[some] + large):
            count += maps(shape, size, dtype, device)
            print(f"{count} calls on {backend}: maps {shape} {dtype}", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} calls on {backend}: done", flush=True)


if __name__ == "__main__":
    sys.exit(main())
