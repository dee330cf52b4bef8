"""Speed of whole training steps beside the loops of published code, and where their time goes: `part-fast bench step`.

What is measured. A step is everything between a batch of float images and the updated weights: mask, attack of 10
steps, loss, backward, SGD. Ours are the trainer's own lines on its `Engine`; the published ones are in
`published`: fp32, contiguous. All run in one process, on 32x32 images; in each round every step is run once,
beginning with another one each time; on a GPU as often in a row, between two CUDA events, as takes half a second.
Reported are the median and the 20th and 80th percentile over the rounds.

    AT, TRADES           no mask
    PART, PART-T         the mask of every batch anew
    PART, refresh K      masks looked up in the MaskBank and cropped and flipped like their images ("PART, bank"), and
                         the time of a refresh, spread over the K epochs it serves
    AT fp32              AT in fp32 throughout, where the others may be in bf16
    published AT         parameter gradients in every attack step
    published PART       that, after masks one image at a time by hooks, PIL and matplotlib
    published PART-T     clean softmax recomputed with its graph in every attack step, clean batch forwarded twice,
                         masks as above
    input-gradient AT    PGD as attack libraries have it, gradients for the images only

Masks are by rule "released", the one that published code has.

Each pair is compared first, in float64, on the same network with fewer, smaller images and 3 attack steps from the same
start: adversarial images, masks, the loss and the update of all weights. A mismatch raises `MismatchError`, and nothing
is timed. That is of the eager fp32 code; tests hold what is compiled, captured or in bf16 to it.

FLOP are those of convolutions and matrix products by the formulas of torch.utils.flop_counter, counted while the step
runs, two for a multiplication and addition; a step that computes what nobody needs has more of them. Their share is of
the rate of a large matrix product in the step's precision, timed in the same rounds.

Peak memory is what one step has allocated at most above what was there before: weights, momentum, the batch, the copy
that is attacked; gradients count. It is PyTorch's allocator's, as in `bench ops`, plus the memory that a step's CUDA
graphs hold, which a replay needs and does not allocate: what PIL, numpy and the convolution library take for themselves
is not in it. The largest resident memory of a process would be, but that also has whatever ran before, and grows in
steps larger than what PART adds.

The cost of PART over AT is small beside what a busy machine does to either, so it is given twice: by the medians of
both steps, and by what PART adds timed alone (the mask; the lookup and the share of a refresh; for PART-T a mask with
its clean logits, less clean logits), over the median of the plain step.

Where the time goes is read from ranges that part_fast gives names to by `torch.profiler.record_function`; any profile
of a training shows them ("part_fast: attack forward"). On a CPU a part's time is that of its range, less what lies in
ranges inside it. On a GPU it is that of the kernels and copies which were launched in it, by whatever thread, and
"waiting" is when the device had none. The steps of an attack that are captured as a CUDA graph are one part, "CUDA
graph": a replay is one launch, and says nothing of what is in it. A profile without `--cuda-graph` does.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from part_fast.attack_model import AttackModel
from part_fast.bench.clocks import Progress, calls_per_sample, clock_for, interleave, silent, ticking
from part_fast.bench.command import at_least_one, current_device, environment_line, result_paths
from part_fast.bench.flop import MATMULS, matmul
from part_fast.bench.profile import profile
from part_fast.bench.step_cases import (
    BANK_BATCHES,
    MODELS,
    REFRESHES,
    Step,
    StepCases,
    check,
    configuration,
    count_flop,
    default_batch,
)
from part_fast.bench.step_tables import draw, markdown, ratio_table, tables_of
from part_fast.config import TrainConfig, find_device
from part_fast.models.catalogue import build_model
from part_fast.optional import needs
from part_fast.report import files
from part_fast.report.environment import environment

PROFILE_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Goal:
    """A row of the table: `step` compared with `other`.

    kind: "faster", other's time over the step's; "extra", the step's time over the other's, less one; "memory", the
    step's peak over the other's; "rate", the step's images a second, without an other. goals: by model, at the batch
    sizes of `default_batch`; on_gpu: where they are others on a GPU.
    """

    title: str
    kind: str
    step: str
    other: str | None
    goals: Mapping[str, float]
    on_gpu: Mapping[str, float] | None = None

    def due(self, model: str, batch: int, device: str) -> float | None:
        """The goal for a model at a batch size on a type of device, None where there is none."""
        if batch != default_batch(model, device):
            return None
        return (self.goals if device == "cpu" or self.on_gpu is None else self.on_gpu).get(model)


def _goals(resnet: float, wide: float) -> dict[str, float]:
    return dict(zip(MODELS, (resnet, wide), strict=True))


GOALS = (
    Goal("AT step", "faster", "AT", "published AT", _goals(3.3, 3.0)),
    Goal("PART step, refresh every batch", "faster", "PART", "published PART", _goals(3.8, 3.2)),
    Goal("PART-T step", "faster", "PART-T", "published PART-T", _goals(3.3, 3.0)),
    Goal("AT step, all fp32", "faster", "AT fp32", "input-gradient AT", _goals(1.12, 1.1)),
    Goal("PART over AT, refresh every batch", "extra", "PART", "AT", _goals(0.04, 0.04)),
    Goal("PART over AT, refresh 1", "extra", "PART, refresh 1", "AT", _goals(0.04, 0.04)),
    Goal("PART over AT, refresh 10", "extra", "PART, refresh 10", "AT", _goals(0.005, 0.005)),
    Goal("PART-T over TRADES", "extra", "PART-T", "TRADES", _goals(0.01, 0.01)),
    Goal("peak memory, PART over AT", "memory", "PART", "AT", _goals(1.05, 1.05)),
    # Of an H100, estimated by operations and bytes (docs/performance.md): with CUDA graphs, and compiled.
    Goal("AT, images/s", "rate", "AT", None, {}, _goals(7100, 1170)),
    Goal("PART, images/s, refresh every batch", "rate", "PART", None, {}, _goals(6800, 1100)),
)


def auto_precision(device: torch.device) -> tuple[str, str]:
    """The precision of our steps where nobody chose one, and why: bf16 where the hardware multiplies in it."""
    if device.type == "cuda":
        return "bf16", "a CUDA device"
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return "bf16", "the CPU has AVX512_BF16 or AMX"
    return "fp32", "the CPU has neither AVX512_BF16 nor AMX"


def measure(
    config: TrainConfig, device: torch.device, rounds: int, progress: Progress = silent
) -> list[dict[str, Any]]:
    """One row for each step, piece and matrix product of the config's model; nothing is compared here.

    Columns: model, batch, device (cpu, cuda), kind (step, piece, matmul), name, precision, median_s, p20_s, p80_s,
    images_per_s, gflop, gflop_per_s, percent_of_matmul, peak_bytes (None where it was not measured), rounds, calls
    (timed together in a round), seconds (of every round).
    """
    flop = count_flop(config, device, progress)
    cases, clock = StepCases(config, device), clock_for(device)
    steps, pieces = cases.steps(), cases.pieces()
    ours = {"PART", "AT", "PART, bank", "TRADES", "PART-T"}
    precisions = {name: config.precision if name in ours or name in pieces else "fp32" for name in (*steps, *pieces)}
    # Momentum is allocated, and what is compiled is compiled, before anything is measured.
    for name in ("AT", "AT fp32", "published AT"):
        if name in steps:
            steps[name]()
    cases.bank.fill(cases.engine.budget, cases.images)
    peaks = {}
    tick = progress("peak memory", len(steps))
    for name, step in steps.items():
        cases.forget_graphs()

        def peak(step: Step = step) -> int:
            for optimizer in (cases.engine.optimizer, cases.fp32.optimizer, cases.optimizer):
                optimizer.zero_grad()
            return clock.peak_bytes(step)

        peaks[name] = settled(peak) + graph_pool_bytes(device)
        tick()
    # Captured again, all of them, before anything is timed.
    for step in steps.values() if config.cuda_graph else ():
        step()

    products = {f"matmul {precision}": matmul(precision, device) for precision in sorted(set(precisions.values()))}
    calls = {name: calls_per_sample(clock, step) for name, step in {**steps, **pieces}.items()} | dict.fromkeys(
        products, MATMULS
    )

    def alone(name: str) -> float:
        pieces["clean logits"]()  # takes over the last step's weights, and finds caches as that left them
        return clock.seconds(pieces[name], calls[name])

    samples: dict[str, Callable[[], float]] = {
        name: partial(clock.seconds, step, calls[name]) for name, step in steps.items()
    }
    samples |= {name: partial(alone, name) for name in pieces}
    samples |= {name: partial(clock.seconds, product, MATMULS) for name, (product, _) in products.items()}
    times = interleave(ticking(samples, progress, f"{rounds} rounds", rounds), rounds)
    seconds = {name: np.array(values) / calls[name] for name, values in times.items()}
    for name in products:
        flop[name] = products[name][1]
        precisions[name] = name.split()[1]
    # A refresh is of BANK_BATCHES batches; each step pays for its own images, once in `every` epochs.
    for every in REFRESHES:
        name = f"PART, refresh {every}"
        seconds[name] = seconds["PART, bank"] + seconds["refresh"] / BANK_BATCHES / every
        flop[name] = flop["PART, bank"] + flop["refresh"] / BANK_BATCHES / every
        precisions[name], calls[name] = config.precision, calls["PART, bank"]
    if "AT fp32" not in seconds:
        seconds["AT fp32"], flop["AT fp32"] = seconds["AT"], flop["AT"]
        precisions["AT fp32"], peaks["AT fp32"], calls["AT fp32"] = "fp32", peaks["AT"], calls["AT"]

    refreshed = [f"PART, refresh {every}" for every in REFRESHES]
    order = ["AT", "AT fp32", "PART", "PART, bank", *refreshed, *(name for name in steps if name not in ("AT", "PART"))]
    kinds = dict.fromkeys(order, "step") | dict.fromkeys(pieces, "piece") | dict.fromkeys(products, "matmul")
    rates = {name.split()[1]: count / float(np.median(seconds[name])) for name, (_, count) in products.items()}
    rows = []
    for name, kind in kinds.items():
        p20, median, p80 = (float(value) for value in np.percentile(seconds[name], (20, 50, 80)))
        images = None if kind == "matmul" else len(cases.images) if name == "refresh" else config.batch_size
        rows.append(
            {
                "model": config.model,
                "batch": config.batch_size,
                "device": device.type,
                "kind": kind,
                "name": name,
                "precision": precisions[name],
                "median_s": median,
                "p20_s": p20,
                "p80_s": p80,
                "images_per_s": None if images is None else images / median,
                "gflop": flop[name] / 1e9,
                "gflop_per_s": flop[name] / 1e9 / median,
                "percent_of_matmul": 100 * flop[name] / median / rates[precisions[name]],
                "peak_bytes": peaks.get(name),
                "rounds": rounds,
                "calls": calls[name],
                "seconds": seconds[name].tolist(),
            }
        )
    return rows


def settled(peak: Callable[[], int], most: int = 5) -> int:
    """A step's peak when two in a row agree, else the last of `most`.

    The first ones may be others: the profiler subtracts what is freed only where it saw it allocated, and a step frees
    what the last one kept, such as packed weights; an AttackModel checks what it has fused; a CUDA graph is captured.
    """
    last = peak()
    for _ in range(most - 1):
        before, last = last, peak()
        if last == before:
            break
    return last


def graph_pool_bytes(device: torch.device) -> int:
    """Memory of a GPU that CUDA graphs hold for their replays, which no allocation shows."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    own = [each for each in torch.cuda.memory_snapshot() if each["device"] == index]
    return sum(each["total_size"] for each in own if tuple(each["segment_pool_id"]) != (0, 0))


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The goals' table from the rows of `measure`: one row for each goal and model.

    Columns: model, batch, what, kind, value (of the medians), p20, p80 (of the rounds' own ratios; None for memory),
    by_parts (an extra cost from what was timed alone), goal and met (None at another batch or model). A rate is of a
    GPU only, for which alone it has goals.
    """
    found = []
    for (model, batch, device), group in itertools.groupby(rows, lambda r: (r["model"], r["batch"], r["device"])):
        row_of = {row["name"]: row for row in group}
        median = {name: row["median_s"] for name, row in row_of.items()}
        added = {
            "PART": median["mask"],
            "PART-T": median["mask"] - median["clean logits"],
            **{f"PART, refresh {k}": median["lookup"] + median["refresh"] / BANK_BATCHES / k for k in REFRESHES},
        }
        for goal in GOALS:
            if goal.kind == "rate" and device == "cpu":
                continue
            step, other = row_of[goal.step], row_of[goal.other or goal.step]
            spread: list[float | None] = [None, None]
            by_parts = None
            if goal.kind == "memory":
                value = step["peak_bytes"] / other["peak_bytes"]
            elif goal.kind == "rate":
                value = step["images_per_s"]
                spread = [float(p) for p in np.percentile(batch / np.array(step["seconds"]), (20, 80))]
            else:
                each = np.array(other["seconds"]) / np.array(step["seconds"])
                value = other["median_s"] / step["median_s"]
                if goal.kind == "extra":
                    each, value = 1 / each - 1, 1 / value - 1
                    by_parts = added[goal.step] / other["median_s"]
                spread = [float(p) for p in np.percentile(each, (20, 80))]
            due = goal.due(model, batch, device)
            more = goal.kind in ("faster", "rate")
            reached = due is not None and (value >= due if more else value <= due)
            found.append(
                {
                    "model": model,
                    "batch": batch,
                    "what": goal.title,
                    "kind": goal.kind,
                    "value": value,
                    "p20": spread[0],
                    "p80": spread[1],
                    "by_parts": by_parts,
                    "goal": due,
                    "met": None if due is None else reached,
                }
            )
    return found


FILES = ("step.csv", "step_ratios.csv", "step_profile.csv", "step.json", "step.md", "step.png")


def steps(
    out: Path,
    *,
    models: Sequence[str] = (),
    batch_size: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    compile: bool = False,
    cuda_graph: bool = False,
    quick: bool = False,
    rounds: int | None = None,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Measure the steps, print the tables, and write FILES to the folder `out`.

    models: names for `build_model`, default MODELS; with quick resnet-small. batch_size: default 32, for wrn-34-10 4;
    on a GPU 128.
    precision: of our steps, fp32, bf16, fp16 or auto, which is `auto_precision`. compile, cuda_graph: as in training,
    of our attacks. rounds: 7, quick 3; of the profile at most PROFILE_ROUNDS.
    Returns: the rows of step.csv, see `measure`.
    Errors: MismatchError where a published step computes something else; ValueError for rounds or batch_size < 1, what
    no training takes either, and for a folder that holds results already, unless `overwrite`. Nothing is written then,
    but of the models before one with a mismatch.
    """
    with needs("tqdm", "train"):
        from tqdm import tqdm
    rounds = (3 if quick else 7) if rounds is None else rounds
    at_least_one("rounds", rounds)
    if batch_size is not None:
        at_least_one("batch_size", batch_size)
    where = find_device(device)
    chosen, why = auto_precision(where) if precision == "auto" else (precision, "as asked")
    names = tuple(models) or (("resnet-small",) if quick else MODELS)
    configs = [
        configuration(
            name,
            batch_size or default_batch(name, where.type),
            precision=chosen,
            compile=compile,
            cuda_graph=cuda_graph,
        )
        for name in names
    ]
    for config in configs:
        config.check()
        with torch.device("meta"):
            build_model(config.model)
    AttackModel(nn.Linear(1, 1, device=where), precision=chosen, cuda_graph=cuda_graph)  # whether the device can
    paths = result_paths(out, FILES, overwrite)
    out.mkdir(parents=True, exist_ok=True)

    record = environment()
    settings = f"precision {chosen} ({why}){', compiled' if compile else ''}{', CUDA graphs' if cuda_graph else ''}"
    heading = f"{environment_line(record, where)}\n{settings}; medians of {rounds} interleaved rounds"
    print(heading)
    record["bench"] = {
        "device": str(where),
        "models": list(names),
        "batches": [config.batch_size for config in configs],
        "precision": chosen,
        "precision_because": why,
        "compile": compile,
        "cuda_graph": cuda_graph,
        "quick": quick,
        "rounds": rounds,
        "profile_rounds": min(rounds, PROFILE_ROUNDS),
        "attack_steps": configs[0].steps,
    }
    rows: list[dict[str, Any]] = []
    checked: list[dict[str, Any]] = []
    profiled: list[dict[str, Any]] = []
    with current_device(where), tqdm(unit="step", leave=False, disable=None) as bar:

        def progress(what: str, total: int) -> Step:
            bar.reset(total)
            bar.set_description(f"{config.model}, {what}")
            update: Step = bar.update
            return update

        for config in configs:
            checked += [{"model": config.model, **row} for row in check(config, where, progress)]
            of_model = measure(config, where, rounds, progress)
            of_profile = profile(config, where, min(rounds, PROFILE_ROUNDS), progress)
            rows += of_model
            profiled += of_profile
            for title, header, cells in tables_of(of_model, of_profile):
                bar.write(f"\n{title}\n{files.table(header, cells)}")
            # After each model: the next one may take half an hour.
            compared = ratios(rows)
            files.write_csv(paths[0], [{key: value for key, value in row.items() if key != "seconds"} for row in rows])
            files.write_csv(paths[1], compared)
            files.write_csv(paths[2], profiled)
            files.write_json(
                paths[3], {**record, "checked": checked, "steps": rows, "ratios": compared, "profile": profiled}
            )
            with files.replacing(paths[4]) as temporary:
                temporary.write_text(markdown(heading, rows, compared, profiled))
            draw(paths[5], rows, profiled, heading)
    title, header, cells = ratio_table(ratios(rows))
    print(f"\n{title}\n{files.table(header, cells)}")
    print(f"\nwritten: {', '.join(map(str, paths))}")
    return rows
