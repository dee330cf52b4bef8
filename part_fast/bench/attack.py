"""What each change to an attack step brings: forward and gradient on a CPU, from published code to AttackModel.

    python benchmarks/attack_step.py [--models resnet18 wrn-34-10] [--rounds 9] [--compile] [--out attack_step.csv]

ResNets get 32 images of 32x32, WideResNets 4. All variants of a network run in turn in each round, on one set of
weights; times are medians, "faster" is the first row's median over the row's. "Signs" is the share of values of the
input gradient that have the sign of the first row's.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from part_fast.attack_model import AttackModel
from part_fast.attack_model.cpu import winograd
from part_fast.attack_model.cpu.packed_conv import PackedConv2d
from part_fast.bench.step_cases import settle
from part_fast.models.catalogue import build_model
from part_fast.report import files


def without(what: type | ModuleType, model: nn.Module, precision: str) -> AttackModel:
    """With no convolution that PackedConv2d, or Winograd, takes."""
    with mock.patch.object(what, "takes", return_value=False):
        return AttackModel(model, precision=precision)


def variants(name: str, x: Tensor, compiled: bool) -> dict[str, tuple[nn.Module, bool]]:
    """By what was changed: a model, and whether its parameters get gradients too."""
    torch.manual_seed(0)
    model = build_model(name)
    settle(model, x)
    model.eval()
    found: dict[str, tuple[nn.Module, bool]] = {
        "parameter gradients, fp32": (model, True),
        "input gradients": (model, False),
        "channels_last": (copy.deepcopy(model).to(memory_format=torch.channels_last), False),
    }
    for precision in ("fp32", "bf16"):
        found[f"{precision}, folded"] = (without(PackedConv2d, model, precision), False)
        found[f"{precision}, folded and packed"] = (without(winograd, model, precision), False)
        found[f"{precision}, folded, packed and Winograd"] = (AttackModel(model, precision=precision), False)
        if compiled:
            found[f"{precision}, folded and compiled"] = (AttackModel(model, precision=precision, compile=True), False)
    return found


def gradient(model: nn.Module, parameters: bool, x: Tensor, y: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    loss = F.cross_entropy(model(leaf), y)
    if not parameters:
        return torch.autograd.grad(loss, leaf)[0]
    model.zero_grad()
    loss.backward()
    assert leaf.grad is not None
    return leaf.grad


def measure(name: str, rounds: int, compiled: bool) -> list[dict[str, object]]:
    n = 4 if name.startswith("wrn") else 32
    x, y = torch.rand(n, 3, 32, 32), torch.randint(0, 10, (n,))
    steps: dict[str, Callable[[], Tensor]] = {
        what: lambda model=model, parameters=parameters: gradient(model, parameters, x, y)
        for what, (model, parameters) in variants(name, x, compiled).items()
    }
    signs = {what: step().sign() for what, step in steps.items()}
    seconds: dict[str, list[float]] = {what: [] for what in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for what, step in steps.items():
            begin = time.perf_counter()
            step()
            seconds[what].append(time.perf_counter() - begin)
    median = {what: statistics.median(each) for what, each in seconds.items()}
    first = next(iter(steps))
    return [
        {
            "model": name,
            "batch": n,
            "variant": what,
            "ms": f"{1e3 * median[what]:.1f}",
            "faster": f"{median[first] / median[what]:.2f}",
            "signs": f"{(signs[what] == signs[first]).float().mean().item():.4f}",
        }
        for what in steps
    ]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet18", "wrn-34-10"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    rows = [row for name in options.models for row in measure(name, options.rounds, options.compile)]
    print(files.table(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))
    if options.out:
        files.write_csv(options.out, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
