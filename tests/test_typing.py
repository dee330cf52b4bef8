"""The types of the public API, as mypy shows them to a user's program: every name has one, and none is Any."""

import inspect
import os
import re
import subprocess
import sys
from types import ModuleType

import pytest
from conftest import ROOT

import part_fast

# What a user writes with results: mypy takes all of it, and refuses each line with `type: ignore`.
PROGRAM = """
import torch
from torch import Tensor, nn

import part_fast
import part_fast.models


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    budget = part_fast.CamBudget(model, 8 / 255, 7 / 255, method="layercam", rule="quantile:0.3", target_layer="layer4")
    reveal_type(budget(x))
    reveal_type(budget(x, target=y))
    reveal_type(budget.with_logits(x))
    packed = budget.packed(x)
    reveal_type(packed)
    reveal_type(packed[0].to("cpu"))
    reveal_type(packed.index_select(y))
    reveal_type(len(packed))
    reveal_type((packed.bits, packed.size, packed.eps, packed.shape, packed.device))
    copy = part_fast.AttackModel(model, precision="bf16")
    reveal_type(copy.refresh())
    for eps in (8 / 255, budget(x), packed):
        reveal_type(part_fast.pgd(copy, x, y, eps, clip=None))
        reveal_type(part_fast.mma(lambda images: images.mean((2, 3)), x, y, eps, start=x))
        reveal_type(part_fast.trades_loss(model, x, y, optimizer, epsilon=eps))
        reveal_type(part_fast.pgd_step(x, x, x, eps, 2 / 255, clip=((0, 0, 0), (1, 1, 1))))
    reveal_type(part_fast.PGD(model, steps=20)(x, y))
    reveal_type(part_fast.mart_loss(model, x, y, None, epsilon=budget, attack_model=copy))
    with part_fast.backend("reference") as nothing:
        reveal_type(nothing)
    try:
        reveal_type(part_fast.load_model("runs/part", num_classes=10))
        reveal_type(part_fast.models.resnet18(10))
    except part_fast.UsageError as error:
        reveal_type(error)
    part_fast.pgd(model, x, y, "8/255")  # type: ignore[arg-type]
    part_fast.cam_mask(x, 32)  # type: ignore[arg-type]
    part_fast.AttackModel(model, "bf16")  # type: ignore[call-arg]
    part_fast.set_backend(0)  # type: ignore[arg-type]
"""


def public_names() -> list[str]:
    """Expressions for all that is public: the names, those of the modules, and what an instance of a class has."""
    names = []
    for name in part_fast.__all__:
        names.append(f"part_fast.{name}")
        value = getattr(part_fast, name)
        if isinstance(value, ModuleType):
            inside = getattr(value, "__all__", None) or [
                name for name, each in vars(value).items() if getattr(each, "__module__", None) == value.__name__
            ]
            names += [f"part_fast.{name}.{each}" for each in inside]
        if inspect.isclass(value):
            names += [f"instance(part_fast.{name}).{each}" for each in vars(value) if not each.startswith("_")]
    return [name for name in names if "._" not in name]


@pytest.mark.slow
def test_every_public_name_has_a_type_and_none_is_any(tmp_path):
    pytest.importorskip("mypy", reason="needs mypy, of the extra dev")
    names = public_names()
    assert {"part_fast.attacks", "part_fast.models.resnet18", "instance(part_fast.CamBudget).packed"} <= set(names)
    lines = [*PROGRAM.splitlines(), "T = TypeVar('T')", "def instance(kind: type[T]) -> T: return kind()"]
    lines[1] = "from typing import TypeVar; import torch"
    lines += [f"reveal_type({name})" for name in names]
    (tmp_path / "program.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent", "--no-pretty"]
    run = subprocess.run(
        [*command, "--cache-dir", str(tmp_path / "cache"), "program.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    said = [re.match(r"program\.py:(\d+): (\w+): (.*)", line) for line in run.stdout.splitlines()]
    problems = [(lines[int(each[1]) - 1].strip(), each[3]) for each in said if each and each[2] == "error"]
    assert problems == []
    types: dict[int, list[str]] = {}
    for each in said:
        if each and each[3].startswith("Revealed type is "):
            types.setdefault(int(each[1]), []).append(each[3].removeprefix("Revealed type is "))
    assert len(types) == "\n".join(lines).count("reveal_type("), run.stdout + run.stderr
    # `(*Any, **Any)` is how mypy writes the arguments of a callable that may have any.
    vague = {
        lines[number - 1].strip(): shown
        for number, shown in types.items()
        if any(re.search(r"\bAny\b", each.replace("(*Any, **Any)", "")) for each in shown)
    }
    assert vague == {}
