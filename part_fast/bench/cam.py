"""What a CamBudget call costs, in forwards of its batch; beside it the batched GradCAM of the grad-cam package.

ResNet-18 at batch 32 and WRN-34-10 at batch 4, 32x32 images. Each round times an eval-mode forward without a graph,
a CamBudget call, and grad-cam's call, in turn; `extra_info` has the medians over the median forward, and the table is
printed with `-s`.
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from part_fast import CamBudget
from part_fast.bench import clocks
from part_fast.models.resnet import resnet18
from part_fast.models.wideresnet import wideresnet

ROUNDS = 9
CASES = {
    "resnet18, batch 32": (resnet18, 32),
    "wrn-34-10, batch 4": (lambda: wideresnet(34, 10), 4),
}


def seconds(call: Callable[[], Any]) -> Callable[[], float]:
    def timed() -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return timed


@pytest.mark.parametrize("name", CASES)
def test_cost_in_forwards(benchmark: Any, name: str) -> None:
    make, batch = CASES[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.rand(batch, 3, 32, 32)
    budget = CamBudget(model)
    calls: dict[str, Callable[[], Any]] = {
        "forward": torch.no_grad()(lambda: model(x)),
        "CamBudget": lambda: budget(x),
    }
    try:
        from pytorch_grad_cam import GradCAM
    except ImportError:
        pass  # the table then has no such row
    else:
        package = GradCAM(model=model, target_layers=[budget.target_layer])
        calls["grad-cam"] = lambda: package(input_tensor=x, targets=None)
    for call in calls.values():
        call()
    times = clocks.interleave({key: seconds(call) for key, call in calls.items()}, ROUNDS)
    medians = {key: sorted(values)[len(values) // 2] for key, values in times.items()}
    for key, median in medians.items():
        print(f"\n{name}: {key} {1000 * median:.1f} ms, {median / medians['forward']:.3f} forwards", end="")
        benchmark.extra_info[key] = median / medians["forward"]
    benchmark.pedantic(calls["CamBudget"], rounds=ROUNDS, warmup_rounds=1)
