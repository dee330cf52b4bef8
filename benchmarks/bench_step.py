"""Training steps beside the published loops. As tables, CSV and plot: `part-fast bench step`.

The demo's small ResNet at batch 32; with --full ResNet-18 at batch 32 and WRN-34-10 at batch 4, for which there are
goals. A network is measured once, all its steps in interleaved rounds, after each published loop was compared with
ours; a test takes its step's row from there into `extra_info` (images/s, GFLOP/s, % of matmul, peak memory), with the
goals' ratios that it is part of. pytest-benchmark's own columns are of one call made after that: use `extra_info` to
compare. The published loops are in `part_fast/bench/published.py`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from part_fast.bench import step_cases, steps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 7
STEPS = ("AT", "PART", "TRADES", "PART-T", *dict.fromkeys(published for _, published in step_cases.PAIRS))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    models = steps.MODELS if metafunc.config.getoption("--full") else ("resnet-small",)
    metafunc.parametrize(("model", "step"), [(model, step) for model in models for step in STEPS])


@pytest.fixture(scope="module")
def measured() -> Callable[[str], Any]:
    """(arena, rows, ratios) of a network; the last one is kept, for its tests come together."""
    kept: dict[str, Any] = {}

    def of(model: str) -> Any:
        if model not in kept:
            kept.clear()
            precision, _ = steps.auto_precision(DEVICE)
            batch = steps.BATCHES.get(model, steps.BATCH)
            config = step_cases.configuration(model, batch, precision=precision)
            step_cases.check(config, DEVICE)
            rows = steps.measure(config, DEVICE, ROUNDS)
            kept[model] = step_cases.Arena(config, DEVICE), rows, steps.ratios(rows)
        return kept[model]

    return of


def test_speed(benchmark: Any, measured: Callable[[str], Any], model: str, step: str) -> None:
    arena, rows, ratios = measured(model)
    (row,) = [row for row in rows if row["name"] == step]
    part_of = [goal.title for goal in steps.GOALS if step in (goal.step, goal.other)]
    benchmark.group = f"{model}, batch {row['batch']}"
    benchmark.extra_info.update(row)
    benchmark.extra_info.update({each["what"]: each["value"] for each in ratios if each["what"] in part_of})
    call = arena.steps()[step]

    def finished() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark.pedantic(finished, rounds=1)
