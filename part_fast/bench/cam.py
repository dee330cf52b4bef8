"""What per-pixel eps by class activation maps costs, in forwards of the batch: `part-fast bench cam`.

A case is a network, a batch size and a CAM method, on random images of 32x32. Its providers are

    forward                  an eval-mode forward of the batch without a graph: the unit
    CamBudget                the network's eps map, by rule "released", which published code has
    CamBudget, AttackModel   the same of the copy that training attacks: BatchNorm folded, on a CPU weights packed
    grad-cam                 the batched maps of the grad-cam package, scaled to the images' size; no mask. Where the
                             package is installed
    published                eps maps as published code makes them: Grad-CAM by hooks, an image at a time, then PIL and
                             matplotlib's colours. For method gradcam, the one it has

all in float32, on one set of weights with BatchNorm statistics of the batch.

Each is compared before any is timed: published eps maps with those of CamBudget, value by value; grad-cam's maps with
CamBudget's own, scaled and enlarged linearly as the package does it. A mismatch raises `MismatchError`. Then rounds: in
each one every provider is run once, beginning with another one each time; on a GPU as often in a row, between two CUDA
events, as takes half a second. Reported are the median and the 20th and 80th percentile over the rounds. "forwards" is
the median over that of `forward`, "x CamBudget" over that of `CamBudget`. Peak memory is as in `bench ops`; what numpy
and PIL take is not in it, so `grad-cam` and `published` have none.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from part_fast.attack_model import AttackModel
from part_fast.bench.cases import EPS, EPS_LOW, MismatchError
from part_fast.bench.clocks import Pass, Progress, clock_for, silent, threads_of, time_in_turn
from part_fast.bench.command import (
    at_least_one,
    check_threads,
    current_device,
    environment_line,
    result_paths,
    write_results,
)
from part_fast.bench.step_cases import AWAY, MODELS, SIZE, default_batch, settle
from part_fast.budgets.cam import CamBudget
from part_fast.config import find_device
from part_fast.errors import BadValueError
from part_fast.models.catalogue import build_model
from part_fast.ops.cam import METHODS
from part_fast.optional import needs
from part_fast.precision import full_float32
from part_fast.report import figures, files
from part_fast.report.environment import environment

with needs("pillow", "train"):
    from part_fast.bench import published

FILES = ("cam.csv", "cam.png", "environment.json")

# The classes of the grad-cam package that compute what our methods do.
PACKAGE_CLASSES = dict(zip(METHODS, ("GradCAM", "XGradCAM", "LayerCAM", "HiResCAM"), strict=True))

# Of maps from 0 to 1, that is of each map's range, by which their rounding is divided.
NEAR = 1e-3

PROVIDERS = ("forward", "CamBudget", "CamBudget, AttackModel", "grad-cam", "published")


def providers(model: nn.Module, x: Tensor, method: str) -> dict[str, Pass]:
    """Every provider of PROVIDERS that is there, as a call: the logits, eps maps, or of grad-cam maps (N,H,W) in [0,1].

    model: in eval mode, float32, with a default target layer. x: images (N,C,H,W).
    """
    budget = CamBudget(model, EPS, EPS_LOW, method=method, rule="released")
    fast = CamBudget(AttackModel(model), EPS, EPS_LOW, method=method, rule="released")
    found: dict[str, Pass] = {
        "forward": torch.no_grad()(lambda: model(x)),
        "CamBudget": lambda: budget(x),
        "CamBudget, AttackModel": lambda: fast(x),
    }
    layer = next(name for name, module in model.named_modules() if module is budget.target_layer)
    if importlib.util.find_spec("pytorch_grad_cam") is not None:
        import pytorch_grad_cam

        # Its hooks stay, so it has a copy: they would take time in the others' forwards.
        theirs = copy.deepcopy(model)
        explain = getattr(pytorch_grad_cam, PACKAGE_CLASSES[method])(theirs, [theirs.get_submodule(layer)])
        found["grad-cam"] = lambda: torch.from_numpy(explain(input_tensor=x, targets=None))
    if method == "gradcam":
        hooked = copy.deepcopy(model)
        target = hooked.get_submodule(layer)
        found["published"] = lambda: published.hooked_eps_map(hooked, target, x, EPS, EPS_LOW)
    return found


def check(name: str, model: nn.Module, x: Tensor, method: str, calls: Mapping[str, Pass]) -> None:
    """Compare every provider's result with CamBudget's, float32 without TF32.

    Errors: MismatchError, naming the provider and how far it is off.
    """
    wanted = calls["CamBudget"]()
    for provider in ("CamBudget, AttackModel", "published"):
        if provider not in calls:
            continue
        off = float((calls[provider]() != wanted).double().mean())
        if off > AWAY:
            said = f"{100 * off:.3g}% of the values, at most {100 * AWAY:g}% were due"
            raise MismatchError(f"{name}, {method}: the eps map of {provider} differs in {said}: not timed")
    if "grad-cam" in calls:
        evidence = CamBudget(model, EPS, EPS_LOW, method=method, rule="released").evidence(x)[0]
        enlarged = F.interpolate(_scaled(evidence)[:, None], x.shape[2:], mode="bilinear", align_corners=False)
        expected = _scaled(enlarged[:, 0])
        off = float((calls["grad-cam"]().to(expected) - expected).abs().max())
        if not off <= NEAR:  # not `off > NEAR`: a NaN is a mismatch
            said = f"off by up to {off:.3g} of their range, at most {NEAR:g} was due"
            raise MismatchError(f"{name}, {method}: the maps of grad-cam are {said}: not timed")


def _scaled(maps: Tensor) -> Tensor:
    """Maps (N,h,w), each from 0 to 1, as the grad-cam package scales them: before it enlarges them, and again after."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low + 1e-7)


def measure(
    name: str, batch: int, method: str, device: torch.device, rounds: int, progress: Progress = silent
) -> list[dict[str, Any]]:
    """One row for each provider of a case.

    Columns: model, batch, method, threads (of a CPU; None elsewhere), provider, median_ms, p20_ms, p80_ms,
    images_per_s, forwards, times_cam_budget, peak_bytes (None where it is not known), rounds, calls (timed together in
    a round).
    Errors: MismatchError where a provider's result is wrong; nothing is timed then.
    """
    torch.manual_seed(0)
    model = build_model(name)
    x = torch.rand(batch, 3, SIZE, SIZE)
    # A batch of one has no statistics of its own at the last stages' few pixels that say anything.
    settle(model, torch.cat([x, torch.rand(8, 3, SIZE, SIZE)]))
    model, x = model.eval().to(device), x.to(device)
    calls = providers(model, x, method)
    with full_float32():
        check(name, model, x, method, calls)
    clock = clock_for(device)
    for call in calls.values():  # AttackModel's weights are packed, and all memory is there
        call()
    ours = ("forward", "CamBudget", "CamBudget, AttackModel")
    peaks = {provider: clock.peak_bytes(calls[provider]) for provider in ours}
    seconds, together = time_in_turn(calls, clock, rounds, progress)
    medians = {provider: float(np.median(values)) for provider, values in seconds.items()}
    rows = []
    for provider, values in seconds.items():
        p20, median, p80 = (float(value) for value in np.percentile(values, (20, 50, 80)))
        rows.append(
            {
                "model": name,
                "batch": batch,
                "method": method,
                "threads": torch.get_num_threads() if device.type == "cpu" else None,
                "provider": provider,
                "median_ms": 1e3 * median,
                "p20_ms": 1e3 * p20,
                "p80_ms": 1e3 * p80,
                "images_per_s": batch / median,
                "forwards": median / medians["forward"],
                "times_cam_budget": median / medians["CamBudget"],
                "peak_bytes": peaks.get(provider),
                "rounds": rounds,
                "calls": together[provider],
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Text of the rows of `measure`; memory in MiB."""
    times = ("median ms", "p20", "p80", "images/s", "forwards", "x CamBudget", "peak MiB")
    cells = []
    for row in rows:
        case = (row["model"], str(row["batch"]), row["method"], "-" if row["threads"] is None else str(row["threads"]))
        numbers = [f"{row[key]:.1f}" for key in ("median_ms", "p20_ms", "p80_ms", "images_per_s")]
        numbers += [f"{row[key]:.3f}" for key in ("forwards", "times_cam_budget")]
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.2f}"
        cells.append((row["provider"], *case, *numbers, peak))
    return files.table(("", "model", "batch", "method", "threads", *times), cells)


_COLOURS = dict(zip(PROVIDERS, (figures.GRAY, figures.BLUE, figures.GREEN, figures.ORANGE, "#000000"), strict=True))


def draw(path: Path, rows: Sequence[Mapping[str, Any]], caption: str) -> None:
    """A PNG: for each case what every provider costs, in forwards of the batch, on a logarithmic scale."""
    figures.load_matplotlib()
    from matplotlib.patches import Patch

    keys = ("model", "batch", "method", "threads")
    cases = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))
    y, ticks = 0.0, []
    with figures.drawing(path, (9, 0.17 * len(rows) + 0.25 * len(cases) + 1.6), "constrained") as figure:
        axes: Any = figure.subplots()
        for case in cases:
            shown = [row for row in rows if tuple(row[key] for key in keys) == case and row["provider"] != "forward"]
            ticks.append((y + (len(shown) - 1) / 2, f"{case[0]}, batch {case[1]}\n{case[2]}"))
            for row in shown:
                axes.barh(y, row["forwards"], height=0.9, color=_COLOURS[row["provider"]])
                axes.text(row["forwards"], y, f" {row['forwards']:.2f}", va="center", fontsize=7)
                y += 1
            y += 0.8
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_xlabel("forwards of the batch")
        used = [name for name in PROVIDERS[1:] if any(row["provider"] == name for row in rows)]
        handles = [Patch(color=_COLOURS[name]) for name in used]
        figure.legend(handles, used, loc="outside lower center", ncols=len(used), fontsize=8)
        figure.suptitle(f"Cost of maps, 32x32 images\n{caption}", fontsize=9)


def cam(
    out: Path,
    *,
    models: Sequence[str] = (),
    batch_sizes: Sequence[int] = (),
    methods: Sequence[str] = (),
    device: str = "auto",
    quick: bool = False,
    rounds: int | None = None,
    threads: Sequence[int] = (),
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Measure every case, print the table, and write FILES to the folder `out`.

    models: names for `build_model`, default MODELS; with quick resnet-small. batch_sizes: default 1 and that of
    `bench step`; with quick the latter. methods: of METHODS, default all; with quick gradcam. rounds: 9, quick 3.
    threads: of a CPU; each case is measured with each number, default as many as torch has.
    Returns: the rows of cam.csv, see `measure`.
    Errors: MismatchError for a provider with a wrong result; ValueError for an unknown model, method or device, for
    rounds, threads or batch_sizes < 1, threads on a GPU, and for a folder that holds results already, unless
    `overwrite`. Nothing is written then.
    """
    with needs("tqdm", "train"):
        from tqdm import tqdm

    rounds = (3 if quick else 9) if rounds is None else rounds
    at_least_one("rounds", rounds)
    at_least_one("batch_sizes", *batch_sizes)
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise BadValueError(f"methods must be among {', '.join(METHODS)}, got {', '.join(unknown)}")
    where = find_device(device)
    check_threads(threads, where)
    names = tuple(models) or (("resnet-small",) if quick else MODELS)
    chosen = tuple(methods) or (("gradcam",) if quick else METHODS)
    for name in names:
        with torch.device("meta"):
            build_model(name)
    paths = result_paths(out, FILES, overwrite)

    record = environment()
    heading = environment_line(record, where)
    print(heading)
    if importlib.util.find_spec("pytorch_grad_cam") is None:
        print("not measured: grad-cam is not installed: pip install grad-cam")
    rows: list[dict[str, Any]] = []
    with current_device(where), tqdm(unit="call", leave=False, disable=None) as bar:

        def progress(what: str, total: int) -> Callable[[], object]:
            bar.reset(total)
            bar.set_description(f"{name}, batch {batch}, {method}, {what}")
            update: Callable[[], object] = bar.update
            return update

        for name in names:
            usual = default_batch(name, where.type)
            for batch in batch_sizes or ((usual,) if quick else (1, usual)):
                for method in chosen:
                    for count in threads or (torch.get_num_threads(),):
                        with threads_of(count):
                            rows += measure(name, batch, method, where, rounds, progress)
    print(f"\nMaps of a batch; forwards: of the batch, without a graph\n{table(rows)}")

    record["bench"] = {
        "device": str(where),
        "models": list(names),
        "methods": list(chosen),
        "batches": list(dict.fromkeys(row["batch"] for row in rows)),
        "quick": quick,
        "rounds": rounds,
        "threads": list(dict.fromkeys(row["threads"] for row in rows)),
    }
    write_results(paths, rows, draw, heading, record)
    return rows
