"""No training step makes a GPU wait: every method, with masks kept, averaged weights and graphs, on an imagined GPU."""

import contextlib
import dataclasses

import pytest
import torch
from conftest import TINY_RUN
from fake_gpu import GpuTensor, HostWaitError, net

from part_fast import PackedEpsilon
from part_fast.budgets.bank import MaskBank
from part_fast.data.memory import draw_augmentation
from part_fast.methods import METHODS
from part_fast.models.catalogue import build_model
from part_fast.training import engine as engines
from part_fast.training.engine import Engine
from part_fast.training.step import batch_epsilon, train_step

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
N, STEPS = 6, 4


def make(gpu, config, device):
    """An engine, its images and its bank there, all alike on both devices."""
    torch.manual_seed(0)
    model = net(10) if config.model == "net" else build_model(config.model, 10)
    images = torch.randint(0, 256, (STEPS * N, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(STEPS * N) % 10
    if device.type == "cuda":
        model, images, labels = gpu.put(model), gpu.put(images), gpu.put(labels)
    engines.build_model, before = lambda *_: model, engines.build_model
    try:
        engine = Engine(config, 10, device)
    finally:
        engines.build_model = before
    bank = None
    if config.refresh != "batch":
        bank = MaskBank(STEPS * N, (16, 16), engine.budget.channels, config.eps, config.eps_low, device)
    engine.model.train()
    return engine, images, labels, bank


def step(engine, images, labels, bank, i):
    """What `train` does for a batch; the loss."""
    indices = torch.arange(i * N, (i + 1) * N, device=engine.device)
    drawn = draw_augmentation(N, device=engine.device)
    x, y = drawn.apply(images[indices]), labels[indices]
    epsilon = batch_epsilon(engine.config.method, engine.budget, bank, indices, drawn, engine.config)
    return train_step(engine, engine.config.method, x, y, epsilon, i * N, STEPS * N).loss


def run(gpu, config, device):
    """Losses of some batches; on a GPU all but the first two, and a refresh of the masks, make nobody wait."""
    engine, images, labels, bank = make(gpu, config, device)
    torch.manual_seed(1)
    losses = []
    for i in range(STEPS):
        # The first one captures its attack, the second one its training, which waits.
        with gpu.without_waits() if i > 1 and device.type == "cuda" else contextlib.nullcontext():
            if bank is not None:
                bank.fill(engine.budget, images, N)
            losses.append(step(engine, images, labels, bank, i))
    assert isinstance(losses[0], GpuTensor) == (device.type == "cuda")
    return [float(loss) for loss in losses]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_no_method_waits(gpu, method, precision):
    model = "resnet-small" if method == "part-t" else "net"
    config = dataclasses.replace(TINY_RUN, model=model, method=method, precision=precision, average="ema:0.9")
    config = dataclasses.replace(config, cuda_graph=True)
    losses = run(gpu, config, CUDA)
    assert len(gpu.graphs) == 2 + METHODS[method].weighted
    if precision == "fp32":
        plain = run(gpu, dataclasses.replace(config, cuda_graph=False), CPU)
        # What is imagined computes what the CPU does, whose Winograd rounds otherwise: a sign may turn.
        assert losses == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "part", "refresh": "1"},
        {"method": "part-t", "refresh": "1", "rule": "released", "control": "random"},
        {"method": "part", "rule": "soft", "cam": "layercam", "control": "uniform"},
        {"method": "part-m", "rule": "quantile:0.3", "control": "inverted", "released": False},
        {"method": "part", "released": True},
        {"method": "part-t", "attack": "mma", "accumulate": 2},
        {"method": "at", "average": "swa:1"},
        {"method": "part", "attack": "n-fgsm", "refresh": "1"},
    ],
    ids=lambda changes: ", ".join(map(str, changes.values())),
)
def test_no_option_waits(gpu, changes):
    config = dataclasses.replace(TINY_RUN, model="net", precision="bf16", cuda_graph=True, **changes)
    losses = run(gpu, config, CUDA)
    assert all(0 < loss < 20 for loss in losses)


def test_packed_epsilon_makes_its_numbers_on_the_device(gpu):
    mask = torch.rand(3, 1, 5, 7) < 0.5
    there = gpu.put(mask)
    with gpu.without_waits():
        packed = PackedEpsilon.pack(there, 0.1, 0.05)
        dense, again = packed.dense(), packed.mask()
    assert torch.equal(again.inner, mask)
    assert torch.equal(dense.inner, PackedEpsilon.pack(mask, 0.1, 0.05).dense())


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.tolist(),
        lambda x: x[x > 0.5],
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0.5, x, torch.zeros(3)),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.zeros(3).to(x.device),
        lambda x: torch.zeros(3).to(x),
        lambda x: x + torch.ones(3),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.copy_(torch.zeros(3)),
    ],
)
def test_a_wait_is_seen(gpu, wait):
    x = gpu.put(torch.rand(3))
    wait(x)
    with gpu.without_waits():
        x * 2 + torch.arange(3, device=x.device) + torch.zeros_like(x)  # which does not
        with pytest.raises(HostWaitError):
            wait(x)
