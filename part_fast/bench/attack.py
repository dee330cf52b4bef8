"""What each change to an attack step brings, from published code to AttackModel: `part-fast bench attack`.

A step is a forward of the attacked network in eval mode and the gradient of the loss for its images; the move by the
gradient's sign is not in it. The variants of a network are

    parameter gradients, fp32            as published code computes them beside the images' gradient
    input gradients                      the images' gradient alone
    channels_last                        that, with weights in that memory format
    PRECISION, folded                    AttackModel, which folds BatchNorms; convolutions are torch's
    PRECISION, folded and packed         on a CPU: with oneDNN's weights packed once, and ReLUs in a convolution's pass
    PRECISION, folded, packed and Winograd   AttackModel as it is on a CPU
    PRECISION, folded and compiled       with --compile: AttackModel by torch.compile

each in fp32 and bf16. All have one set of weights, with BatchNorm statistics of the batch, random images of 32x32 and
random labels.

Logits and input gradient of every variant are compared with those of a float64 copy before any is timed, float32
without TF32; what is farther off than the variant's precision explains raises `MismatchError`. Then rounds: in each one
every variant is run once, beginning with another one each time; on a GPU as often in a row, between two CUDA events, as
takes half a second. Reported are the median and the 20th and 80th percentile over the rounds. "faster" is the first
row's median over the row's, "signs" the share of values of the gradient that have the sign of the first row's; "logits
off" and "gradient off" are the length of the difference to float64's over the length of that.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from part_fast.attack_model import AttackModel
from part_fast.attack_model.cpu import winograd
from part_fast.attack_model.cpu.packed_conv import PackedConv2d
from part_fast.bench.cases import MismatchError
from part_fast.bench.clocks import Progress, clock_for, silent, threads_of, time_in_turn
from part_fast.bench.command import (
    at_least_one,
    check_threads,
    current_device,
    environment_line,
    result_paths,
    write_results,
)
from part_fast.bench.step_cases import MODELS, SIZE, default_batch, settle
from part_fast.config import find_device
from part_fast.models.catalogue import build_model
from part_fast.optional import needs
from part_fast.precision import full_float32
from part_fast.report import figures, files
from part_fast.report.environment import environment

FILES = ("attack.csv", "attack.png", "environment.json")

FIRST = "parameter gradients, fp32"

# What rounding explains, by precision, five to twenty times what was measured of logits and of fp32 gradients. Rounding
# also closes and opens ReLUs near zero, which changes a gradient by far more: in bf16 by 0.7 of its length for
# WRN-34-10, where a gradient of something else is 1.4 off. So it is the logits that show a wrong weight there.
LOGITS_NEAR = {"fp32": 1e-4, "bf16": 0.2}
GRADIENT_NEAR = {"fp32": 0.05, "bf16": 0.9}


@contextlib.contextmanager
def _none_for(what: Any) -> Iterator[None]:
    """An AttackModel that is made in the block has no convolution that `what` takes: PackedConv2d or winograd."""
    takes = vars(what)["takes"]
    what.takes = staticmethod(lambda conv: False)
    try:
        yield
    finally:
        what.takes = takes


def variants(model: nn.Module, compile: bool = False) -> dict[str, tuple[nn.Module, bool]]:
    """By what was changed, in the tables' order: a network, and whether its parameters get gradients too.

    model: in eval mode, float32. compile: with the variants by torch.compile.
    """
    found: dict[str, tuple[nn.Module, bool]] = {
        FIRST: (model, True),
        "input gradients": (model, False),
        "channels_last": (copy.deepcopy(model).to(memory_format=torch.channels_last), False),
    }
    on_cpu = next(model.parameters()).device.type == "cpu"
    for precision in LOGITS_NEAR:
        with _none_for(PackedConv2d):
            found[f"{precision}, folded"] = AttackModel(model, precision=precision), False
        if on_cpu:
            with _none_for(winograd):
                found[f"{precision}, folded and packed"] = AttackModel(model, precision=precision), False
            found[f"{precision}, folded, packed and Winograd"] = AttackModel(model, precision=precision), False
        if compile:
            found[f"{precision}, folded and compiled"] = AttackModel(model, precision=precision, compile=True), False
    return found


def input_gradient(model: nn.Module, parameters: bool, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the batch's loss for x (N,C,H,W); with `parameters` by a backward that gives them theirs too."""
    leaf = x.detach().requires_grad_()
    loss = F.cross_entropy(model(leaf).float() if x.dtype == torch.float32 else model(leaf), y)
    if not parameters:
        return torch.autograd.grad(loss, leaf)[0]
    model.zero_grad()
    loss.backward()
    assert leaf.grad is not None
    return leaf.grad


def check(model: str, variant: str, what: str, got: Tensor, exact: Tensor) -> float:
    """The length of the difference of a variant's "logits" or "gradient" to the exact ones, over the length of these.

    Errors: MismatchError, naming the variant, where that is more than its precision explains.
    """
    off = float((got.double() - exact).norm() / exact.norm())
    bounds = LOGITS_NEAR if what == "logits" else GRADIENT_NEAR
    near = bounds["bf16" if variant.startswith("bf16") else "fp32"]
    if not off <= near:  # not `off > near`: a NaN is a mismatch
        said = f"{what} off {off:.3g} of float64's, at most {near:g} was due"
        raise MismatchError(f"{model}: {variant!r} computes something else: {said}: not timed")
    return off


def measure(
    name: str, batch: int, device: torch.device, rounds: int, compile: bool = False, progress: Progress = silent
) -> list[dict[str, Any]]:
    """One row for each variant of a network.

    Columns: model, batch, threads (of a CPU; None elsewhere), variant, median_ms, p20_ms, p80_ms, faster, signs,
    logits_off, gradient_off, rounds, calls (timed together in a round).
    Errors: MismatchError where a variant's logits or gradient are wrong; nothing is timed then.
    """
    torch.compiler.reset()  # what earlier ones compiled counts against the limit of recompilations
    torch.manual_seed(0)
    model = build_model(name)
    x, y = torch.rand(batch, 3, SIZE, SIZE), torch.randint(0, 10, (batch,))
    settle(model, x)
    model, x, y = model.eval().to(device), x.to(device), y.to(device)
    networks = variants(model, compile)
    steps = {what: partial(input_gradient, each, parameters, x, y) for what, (each, parameters) in networks.items()}
    double = copy.deepcopy(model).double()
    exact = input_gradient(double, False, x.double(), y)
    gradients, off = {}, {}
    tick = progress("comparing", len(steps))
    with full_float32():
        with torch.no_grad():
            exact_logits = double(x.double())
            logits = {what: each(x) for what, (each, _) in networks.items()}
        for what, step in steps.items():
            gradients[what] = step()
            off[what] = {
                "logits_off": check(name, what, "logits", logits[what], exact_logits),
                "gradient_off": check(name, what, "gradient", gradients[what], exact),
            }
            tick()
    seconds, calls = time_in_turn(steps, clock_for(device), rounds, progress)
    rows = []
    for what, values in seconds.items():
        p20, median, p80 = (float(value) for value in np.percentile(values, (20, 50, 80)))
        rows.append(
            {
                "model": name,
                "batch": batch,
                "threads": torch.get_num_threads() if device.type == "cpu" else None,
                "variant": what,
                "median_ms": 1e3 * median,
                "p20_ms": 1e3 * p20,
                "p80_ms": 1e3 * p80,
                "faster": float(np.median(seconds[FIRST])) / median,
                "signs": float((gradients[what].sign() == gradients[FIRST].sign()).double().mean()),
                **off[what],
                "rounds": rounds,
                "calls": calls[what],
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Text of the rows of `measure`."""
    header = (
        "variant",
        "model",
        "batch",
        "threads",
        "median ms",
        "p20",
        "p80",
        "faster",
        "signs",
        "logits off",
        "gradient off",
    )
    cells = []
    for row in rows:
        times = (f"{row[key]:.1f}" for key in ("median_ms", "p20_ms", "p80_ms"))
        where = (row["model"], str(row["batch"]), "-" if row["threads"] is None else str(row["threads"]))
        off = (f"{row[key]:.1e}" for key in ("logits_off", "gradient_off"))
        compared = (f"{row['faster']:.2f}x", f"{100 * row['signs']:.2f}%", *off)
        cells.append((row["variant"], *where, *times, *compared))
    return files.table(header, cells)


def draw(path: Path, rows: Sequence[Mapping[str, Any]], caption: str) -> None:
    """A PNG: a panel for each network, and number of threads, with a bar for each variant's median."""
    panels = list(dict.fromkeys((row["model"], row["batch"], row["threads"]) for row in rows))
    with figures.drawing(path, (9, 3.2 * len(panels) + 0.8), "constrained") as figure:
        for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            shown = [row for row in rows if (row["model"], row["batch"], row["threads"]) == panel]
            for y, row in enumerate(shown):
                errors = [[row["median_ms"] - row["p20_ms"]], [row["p80_ms"] - row["median_ms"]]]
                axes.barh(y, row["median_ms"], xerr=errors, color=figures.BLUE)
                axes.text(row["p80_ms"], y, f" {row['faster']:.2f}x", va="center", fontsize=8)
            axes.set_yticks(range(len(shown)), [row["variant"] for row in shown], fontsize=8)
            axes.invert_yaxis()
            axes.set_xlim(0, 1.12 * max(row["p80_ms"] for row in shown))
            threads = "" if panel[2] is None else f", {panel[2]} threads"
            axes.set(xlabel="ms (20th to 80th percentile)", title=f"{panel[0]}, batch {panel[1]}{threads}")
        figure.suptitle(f"Forward and input gradient of an attack step\n{caption}", fontsize=9)


def attack(
    out: Path,
    *,
    models: Sequence[str] = (),
    batch_size: int | None = None,
    device: str = "auto",
    compile: bool = False,
    quick: bool = False,
    rounds: int | None = None,
    threads: Sequence[int] = (),
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Measure the variants of each network, print the table, and write FILES to the folder `out`.

    models: names for `build_model`, default MODELS; with quick resnet-small. batch_size: default that of `bench step`.
    compile: with the variants by torch.compile. rounds: 9, quick 3. threads: of a CPU; each network is measured with
    each number, default as many as torch has.
    Returns: the rows of attack.csv, see `measure`.
    Errors: MismatchError for a variant with wrong logits or gradient; ValueError for an unknown model or device, for
    rounds, threads or batch_size < 1, threads on a GPU, and for a folder that holds results already, unless
    `overwrite`. Nothing is written then.
    """
    with needs("tqdm", "train"):
        from tqdm import tqdm

    rounds = (3 if quick else 9) if rounds is None else rounds
    at_least_one("rounds", rounds)
    if batch_size is not None:
        at_least_one("batch_size", batch_size)
    where = find_device(device)
    check_threads(threads, where)
    names = tuple(models) or (("resnet-small",) if quick else MODELS)
    for name in names:
        with torch.device("meta"):
            build_model(name)
    paths = result_paths(out, FILES, overwrite)

    record = environment()
    heading = environment_line(record, where)
    print(heading)
    rows: list[dict[str, Any]] = []
    with current_device(where), tqdm(unit="step", leave=False, disable=None) as bar:

        def progress(what: str, total: int) -> Callable[[], object]:
            bar.reset(total)
            bar.set_description(f"{name}, {what}")
            update: Callable[[], object] = bar.update
            return update

        for name in names:
            for count in threads or (torch.get_num_threads(),):
                with threads_of(count):
                    batch = batch_size or default_batch(name, where.type)
                    rows += measure(name, batch, where, rounds, compile, progress)
    print(f"\nA forward and the images' gradient; faster: than {FIRST!r}\n{table(rows)}")

    record["bench"] = {
        "device": str(where),
        "models": list(names),
        "compile": compile,
        "quick": quick,
        "rounds": rounds,
        "threads": list(dict.fromkeys(row["threads"] for row in rows)),
    }
    write_results(paths, rows, draw, heading, record)
    return rows
