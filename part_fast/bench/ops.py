"""Speed of every op, by every provider that can run it here: `part-fast bench ops`.

What is measured. A case is an op at one shape, dtype, memory format and form of eps or rule. Its providers are
`reference` (part_fast's plain PyTorch), `torch.compile` (of the expression a user would write, with all constants
computed before), the backends `cpp`, `triton` and `cuda` where the device has them, for maps also `vectorised` (that
expression, not compiled) and `published` (one image at a time through PIL and matplotlib), and `copy`: a tensor
copied into another one that is there already, half of the case's bytes read and half written. On a CPU each case is
measured with every number of threads that was asked for.

Every provider's result is compared with the reference's before any of them is timed; a mismatch raises
`MismatchError`. Then rounds: in each one every provider is timed once, starting with another one each time, so that
what disturbs the machine meets all alike. A time is that of one call, its result allocated anew (but for
`pgd_step_`), on inputs that all providers share; many calls are timed together where one is short. Reported are the
median and the 20th and 80th percentile over the rounds.

Bytes, one formula for every op: each input tensor read once, plus each result written once. GB/s is bytes / median
/ 1e9, and % of copy is the median of `copy` over that of the provider.

On a CPU the clock is the wall's, and inputs lie in whatever cache holds them. On a GPU it is a pair of CUDA events
around a CUDA graph, replayed: the graph calls the provider on so many sets of inputs in turn that what they read and
write is at least twice the L2 cache. `reference` and `published` also work on the host, so they are launched from
Python between the events, on at most LAUNCHED_SETS sets: they wait for the host, not for memory, and masks by PIL take
seconds on the sets that fill a cache. The column `timing` says which it was.

On Linux's usual C library freed memory is kept for the next result. Otherwise a call pays the system for new pages, or
not, by what other providers have freed before it.

Peak memory is what one call has allocated at most, above what was there before it and with its result, by PyTorch's
allocator: `torch.cuda.max_memory_allocated`, or on a CPU the profiler's record of every allocation. The memory of PIL
and numpy and a thread's scratch memory in C++ are not in it, so `published` has none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from part_fast import backends
from part_fast.bench.cases import OPS, OWN, Case, Provider, all_cases, check, dtype_name, providers_of, why_not
from part_fast.bench.clocks import clock_for, interleave, keep_freed_memory, sampler, threads_of
from part_fast.bench.command import at_least_one, check_threads, current_device, environment_line, result_paths
from part_fast.bench.tables import KEY, RATIO_COLUMNS, draw, ratio_table, speed_table
from part_fast.config import find_device
from part_fast.errors import BadValueError
from part_fast.optional import needs
from part_fast.report import files
from part_fast.report.environment import environment


def copy_provider(nbytes: int) -> tuple[Provider, Callable[[torch.device], tuple[Tensor, Tensor]]]:
    """A copy that reads nbytes / 2 and writes nbytes / 2, into memory that is there; and what makes its tensors."""

    def inputs(device: torch.device) -> tuple[Tensor, Tensor]:
        shape = (nbytes // 8,)
        return torch.ones(shape, device=device), torch.zeros(shape, device=device)

    return Provider("copy", lambda source, target: target.copy_(source)), inputs


def measure(
    case: Case, device: torch.device, rounds: int, providers: Sequence[Provider] | None = None
) -> list[dict[str, Any]]:
    """One row for each provider of the case, `copy` first; by default of all that the device has.

    Columns: op, shape, dtype, threads (of a CPU; None elsewhere), provider, timing, median_us,
    p20_us, p80_us, gb_per_s, percent_of_copy, peak_bytes (None where it is not known), bytes, rounds, calls (timed
    together in a round).
    Errors: MismatchError where a provider's result is wrong; nothing is timed then.
    """
    torch.compiler.reset()  # compiled graphs of earlier cases count against the limit of recompilations
    torch._inductor.config.compile_threads = 1  # its processes go on working beside what is timed
    keep_freed_memory()
    providers = list(providers_of(case, device) if providers is None else providers)
    nbytes = check(case, providers, device)
    clock = clock_for(device)
    copy, copy_inputs = copy_provider(nbytes)
    sets = {provider.name: clock.sets(nbytes, provider.captured) for provider in (copy, *providers)}
    inputs = [case.inputs(device, seed) for seed in range(max(sets.values()))]
    given: dict[str, list[Any]] = {provider.name: inputs[: sets[provider.name]] for provider in providers}
    given["copy"] = [copy_inputs(device) for _ in range(sets["copy"])]

    samples, calls, peaks = {}, {}, {}
    for provider in (copy, *providers):
        samples[provider.name], calls[provider.name] = sampler(provider, given[provider.name], clock)
        with torch.no_grad(), backends.backend(provider.backend):
            call = partial(provider.run, *given[provider.name][0])
            peaks[provider.name] = None if provider.name == "published" else clock.peak_bytes(call)
    seconds = {name: np.percentile(values, (20, 50, 80)) for name, values in interleave(samples, rounds).items()}
    rows = []
    for provider in (copy, *providers):
        p20, median, p80 = (float(value) for value in seconds[provider.name])
        rows.append(
            {
                "op": case.op,
                "shape": case.shape,
                "dtype": dtype_name(case.dtype),
                "threads": torch.get_num_threads() if device.type == "cpu" else None,
                "provider": provider.name,
                "timing": clock.timing(provider.captured),
                "median_us": 1e6 * median,
                "p20_us": 1e6 * p20,
                "p80_us": 1e6 * p80,
                "gb_per_s": nbytes / median / 1e9,
                "percent_of_copy": 100 * float(seconds["copy"][1]) / median,
                "peak_bytes": peaks[provider.name],
                "bytes": nbytes,
                "rounds": rounds,
                "calls": calls[provider.name],
            }
        )
    return rows


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each case how many times faster than each other provider the fastest backend of part_fast is, by medians."""
    found = []
    for key, group in itertools.groupby(rows, lambda row: tuple(row[name] for name in KEY)):
        median = {row["provider"]: row["median_us"] for row in group}
        own = min((name for name in OWN if name in median), key=median.__getitem__, default=None)
        if own is not None:
            times = {name: median[name] / median[own] for name in median if name not in OWN}
            found.append({**dict(zip(KEY, key, strict=True)), "backend": own, **times})
    return found


def ops(
    out: Path,
    *,
    only: Sequence[str] = (),
    device: str = "auto",
    quick: bool = False,
    rounds: int | None = None,
    threads: Sequence[int] = (),
    overwrite: bool = False,
    cases: Sequence[Case] | None = None,
) -> list[dict[str, Any]]:
    """Measure the ops, print a table for each, and write ops.csv, ratios.csv, ops.png, environment.json into `out`.

    only: names of ops, default all. quick: one or two cases of each op, and fewer rounds. rounds: 21, quick 7.
    threads: of a CPU; each case is measured with each number, default as many as torch has. cases: others than
    all_cases(). Files are written when every case was measured and every provider was right.
    Errors: MismatchError for a provider with a wrong result; ValueError for an unknown op or device, rounds or
    threads < 1, threads on a GPU, nothing to measure, and for a folder that holds results already, unless `overwrite`.
    """
    with needs("tqdm", "train"):
        from tqdm import tqdm
    unknown = [name for name in only if name not in OPS]
    if unknown:
        raise BadValueError(f"only must name ops among {', '.join(OPS)}, got {', '.join(unknown)}")
    rounds = (7 if quick else 21) if rounds is None else rounds
    at_least_one("rounds", rounds)
    where = find_device(device)
    check_threads(threads, where)
    paths = result_paths(out, ("ops.csv", "ratios.csv", "ops.png", "environment.json"), overwrite)
    chosen = list(all_cases()) if cases is None else list(cases)
    chosen = [case for case in chosen if (not only or case.op in only) and (case.quick or not quick)]
    if not chosen:
        raise BadValueError("cases must hold one to measure, got none")
    out.mkdir(parents=True, exist_ok=True)

    record = environment()
    print(environment_line(record, where))
    for reason in dict.fromkeys(why_not(case.raw, name, where) for name in OWN for case in chosen):
        if reason:
            print(f"not measured: {reason}")
    rows: list[dict[str, Any]] = []
    with current_device(where), tqdm(chosen, unit="case", leave=False) as progress:
        for op, group in itertools.groupby(progress, lambda case: case.op):
            of_op = []
            for case in group:
                progress.set_postfix_str(case.name)
                for count in threads or (torch.get_num_threads(),):
                    with threads_of(count):
                        of_op += measure(case, where, rounds)
            rows += of_op
            progress.write(f"\n{op}: bytes = every input read once + the result written once\n{speed_table(of_op)}")
    faster = ratios(rows)
    if faster:
        print(f"\nTimes faster than each other provider, by medians\n{ratio_table(faster)}")

    measured = [op for op in OPS if any(row["op"] == op for row in rows)]
    record["bench"] = {"device": str(where), "quick": quick, "rounds": rounds, "ops": measured}
    record["bench"]["threads"] = list(dict.fromkeys(row["threads"] for row in rows))
    files.write_csv(paths[0], rows)
    files.write_csv(paths[1], [{key: row.get(key) for key in RATIO_COLUMNS} for row in faster])
    draw(paths[2], rows, environment_line(record, where))
    files.write_json(paths[3], record)
    print(f"\nwritten: {', '.join(map(str, paths))}")
    return rows
