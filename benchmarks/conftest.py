"""The cases of part_fast.bench as pytest-benchmark tests: one for each case and provider of a file's OPS.

`pytest benchmarks` measures one or two cases of each op, `--full` all of them. A case is measured once, all its
providers in interleaved rounds, after each one's result was compared with the reference's; a test takes its
provider's row from there into `extra_info` (GB/s, bytes, % of copy, p20, p80, peak memory). pytest-benchmark's own
columns are of calls made after that, one provider after the other, on a GPU with the wait for it: use `extra_info`
to compare.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from part_fast import backends
from part_fast.bench import cases, ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 9


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every case of every op, not just the quick ones")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    every = metafunc.config.getoption("--full")
    parameters = [
        pytest.param(case, provider, id=f"{case.name} {provider}".replace(" ", "-"))
        for case in cases.all_cases()
        if case.op in metafunc.module.OPS and (every or case.quick)
        for provider in cases.names_of(case, DEVICE)
    ]
    metafunc.parametrize(("case", "provider"), parameters)


@pytest.fixture(scope="module")
def measured() -> Callable[[cases.Case], dict[str, tuple[cases.Provider, dict[str, Any]]]]:
    """Name -> (provider, row of `bench.measure`) of a case; the last one is kept, for its tests come together."""
    kept: dict[str, Any] = {}

    def of(case: cases.Case) -> dict[str, tuple[cases.Provider, dict[str, Any]]]:
        if case.name not in kept:
            kept.clear()
            providers = cases.providers_of(case, DEVICE)
            rows = {row["provider"]: row for row in ops.measure(case, DEVICE, ROUNDS, providers)}
            kept[case.name] = {provider.name: (provider, rows[provider.name]) for provider in providers}
        return kept[case.name]

    return of


@pytest.fixture
def speed(benchmark: Any, measured: Callable[..., Any]) -> Callable[[cases.Case, str], None]:
    """Benchmarks a provider of a case."""

    def run(case: cases.Case, name: str) -> None:
        provider, row = measured(case)[name]
        benchmark.group = case.name
        benchmark.extra_info.update(row)
        call = partial(provider.run, *case.inputs(DEVICE, 0))

        def finished() -> None:
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize(DEVICE)

        together = max(1, round(2000 / row["median_us"]))
        with torch.no_grad(), backends.backend(provider.backend):
            benchmark.pedantic(finished, rounds=ROUNDS, iterations=together, warmup_rounds=1)

    return run
