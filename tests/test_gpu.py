"""On a CUDA device: streams, graphs, AttackModel, Engine, 2^31 elements, the clock, a run killed and resumed.

What is not of CUDA alone runs on the CPU too, so that it is known to run where there is no GPU.
"""

import argparse
import contextlib
import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_RUN

import part_fast
from part_fast import AttackModel, PackedEpsilon, pgd
from part_fast.bench import cases, clocks
from part_fast.bench import ops as bench_ops
from part_fast.bench.step_cases import settle
from part_fast.gpu import attacks, ops, record, training
from part_fast.methods import METHODS
from part_fast.models.resnet import resnet18, resnet_small
from part_fast.training.engine import Engine
from part_fast.training.step import batch_epsilon, train_step

EPS = 8 / 255
CALLS = tuple(ops.Checks(torch.device("cpu")).calls(1))
gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """Algorithms as cuDNN chooses them, not the deterministic ones of the other tests; new memory still holds NaN."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(
    params=[name for name in ("cuda", "triton") if name in part_fast.available_backends("cuda")] or ["none"]
)
def own(request):
    """Each of part_fast's own backends for CUDA tensors."""
    if request.param == "none":
        pytest.skip("needs a CUDA device")
    with part_fast.backend(request.param):
        yield ops.Checks(torch.device("cuda"))


@gpu
@pytest.mark.parametrize("kind", ["stream", "graph"])
@pytest.mark.parametrize("name", CALLS)
def test_every_op_on_a_side_stream_and_in_a_graph(own, kind, name):
    getattr(own, kind)(*own.calls()[name])


@pytest.fixture
def stand_in(monkeypatch):
    """CUDA's streams and graphs on the CPU: everything runs at once; a graph that is replayed does nothing."""
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None, query=lambda: False)
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda chosen: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda graph: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return stream


@pytest.mark.parametrize("name", CALLS)
def test_the_checks_of_streams_and_graphs_by_stand_ins(stand_in, name):
    checks = ops.Checks(torch.device("cpu"))
    checks.stream(*checks.calls()[name])
    with pytest.raises(AssertionError, match=r"replay [01]: \d+ of \d+ values differ"):
        checks.graph(*checks.calls()[name])
    stand_in.query = lambda: True
    with pytest.raises(AssertionError, match="waited for the GPU"):
        checks.stream(*checks.calls()[name])


def test_the_check_of_streams_sees_a_launch_on_another_one(stand_in, monkeypatch):
    """There the op reads what the inputs were before the side stream wrote them."""
    checks = ops.Checks(torch.device("cpu"))
    function, tensors = checks.calls()["pgd_step"]
    seen = []

    def another_stream(*inputs):
        seen.append(inputs)
        # The second call is the one on the side stream.
        return function(*(torch.zeros_like(value) for value in inputs)) if len(seen) == 2 else function(*inputs)

    with pytest.raises(AssertionError, match=r"on a side stream: \d+ of \d+ values differ"):
        checks.stream(another_stream, tensors)


@pytest.mark.parametrize("what", ["step float", "step tensor", "step bits", "step bits last", "cam", "maps"])
def test_more_elements_than_an_int32_counts(device, what):
    """On a CPU the same on 2^17."""
    checks = ops.Checks(device, dry=device.type == "cpu")
    try:
        checks.big(what)
    except record.MissingError as missing:
        pytest.skip(str(missing))
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def network(device, make=resnet_small):
    """A network with BatchNorm statistics of its inputs, and a batch of 8."""
    torch.manual_seed(0)
    model = make()
    x, y = torch.rand(8, 3, 32, 32), torch.randint(0, 10, (8,))
    settle(model, x)
    return model.eval().to(device), x.to(device), y.to(device)


def budgets(device):
    mask = (torch.rand(8, 1, 32, 32) < 0.3).to(device)
    return {"float": EPS, "tensor": torch.where(mask, EPS, EPS / 2), "packed": PackedEpsilon.pack(mask, EPS, EPS / 2)}


@pytest.mark.parametrize("form", ["float", "tensor", "packed"])
@pytest.mark.parametrize("loss", ["ce", "kl", "margin"])
@pytest.mark.parametrize("graph", [False, True])
def test_attack_model_attacks_as_the_model_and_follows_it(device, graph, loss, form):
    model, x, y = network(device)
    if graph and device.type == "cpu":
        pytest.skip("a CUDA graph needs a CUDA device")
    eps, start = budgets(device)[form], (x + EPS * torch.randn_like(x).sign()).clamp(0, 1)
    fast = AttackModel(model, cuda_graph=graph)
    found = []
    with attacks.full_float32():
        for _ in range(3):
            wanted = pgd(model, x, y, eps, steps=3, start=start, loss=loss)
            found.append(pgd(fast, x, y, eps, steps=3, start=start, loss=loss))
            # The copy rounds otherwise: a gradient as good as zero may change its sign, and three steps build on it.
            assert float(((found[-1] - wanted).abs() > 1e-6).float().mean()) < 0.05
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    assert record.share_differing(found[0], found[1]) > 0.1
    if graph:
        assert len(fast.graphs) == 1


@gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_finds_nearly_the_same(precision):
    device = torch.device("cuda")
    model, x, y = network(device, resnet18)
    with attacks.full_float32():
        wanted = pgd(model, x, y, EPS, steps=5, start="zero")
    got = pgd(AttackModel(model, precision=precision, cuda_graph=True), x, y, EPS, steps=5, start="zero")
    losses = [float(F.cross_entropy(model(images), y)) for images in (x, wanted, got)]
    assert losses[2] - losses[0] > 0.9 * (losses[1] - losses[0]) > 0


@gpu
def test_a_captured_attack_on_a_side_stream_and_with_another_batch():
    device = torch.device("cuda")
    model, x, y = network(device)
    fast = AttackModel(model, cuda_graph=True)
    wanted = pgd(fast, x, y, EPS, steps=3, start="zero")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = pgd(fast, x, y, EPS, steps=3, start="zero")
    side.synchronize()
    assert record.share_differing(got, wanted) < 0.02
    short = pgd(fast, x[:5], y[:5], EPS, steps=3, start="zero")
    assert record.share_differing(short, wanted[:5]) < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_engine_takes_a_step_of_every_method(device, method):
    """In reduced precision, on CUDA with graphs: the loss of the float32 engine on the CPU, and the weights move."""
    x, y = torch.rand(8, 3, 32, 32), torch.randint(0, 10, (8,))
    config = dataclasses.replace(TINY_RUN, method=method, batch_size=8, steps=2, precision="fp32", cuda_graph=False)
    cuda = device.type == "cuda"
    losses = []
    for place, changed in ((torch.device("cpu"), {}), (device, {"precision": "bf16", "cuda_graph": cuda})):
        torch.manual_seed(0)
        engine = Engine(dataclasses.replace(config, device=str(place), **changed), 10, place)
        settle(engine.model, x.to(place))
        engine.model.train()
        before = copy.deepcopy(engine.model.state_dict())
        epsilon = batch_epsilon(method, engine.budget, None, None, None, engine.config)
        for _ in range(2):
            losses.append(float(train_step(engine, method, x.to(place), y.to(place), epsilon).loss))
        after = engine.model.state_dict()
        assert all(value.isfinite().all() for value in after.values())
        assert not torch.equal(before["linear.weight"], after["linear.weight"])
    assert losses[2] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("case", ["pgd_step", "epsilon_map"])
def test_the_clock_of_the_benchmarks(device, case):
    """Every provider but compiled ones is timed; bytes and peak memory are those of the tensors."""
    made = {
        "pgd_step": cases.step_case("pgd_step", (16, 3, 32, 32), torch.float32, False),
        "epsilon_map": cases.map_case("epsilon_map", (16, 8, 8), (32, 32), "zscore"),
    }[case]
    providers = [p for p in cases.providers_of(made, device) if p.name != "torch.compile"]
    rows = bench_ops.measure(made, device, 2, providers)
    assert [row["provider"] for row in rows] == ["copy", *(p.name for p in providers)]
    result = cases.tensor_bytes(made.run(*made.inputs(device, 0)))
    for row in rows:
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        if row["provider"] in cases.OWN:
            assert result <= row["peak_bytes"] <= result + 2**16  # the allocator rounds up
            assert row["timing"] == ("graph" if device.type == "cuda" else "wall")


@gpu
def test_the_clock_times_the_device_and_not_the_launch():
    """Ten times the cycles take about ten times as long, and the host is back before."""
    clock = clocks.clock_for(torch.device("cuda"))
    clock.seconds(lambda: torch.cuda._sleep(10**6), 1)
    one, ten = (clock.seconds(lambda n=n: torch.cuda._sleep(n), 3) for n in (10**7, 10**8))
    assert 5 < ten / one < 20


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=gpu)])
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(device, tmp_path, monkeypatch):
    """By SIGKILL, in a process of its own, resumed in another; on a CPU the losses are the straight run's."""
    arguments = argparse.Namespace(part=None, out=tmp_path, device=device, until=float("inf"), dry_run=False)
    recorder = record.Recorder("train", arguments)
    checks = training.Checks(recorder, tmp_path)
    config = dataclasses.replace(TINY_RUN, device=device, epochs=6, train_size=1000, steps=2)
    monkeypatch.setattr(checks, "config", lambda: config)
    checks.straight()
    checks.killed()
    assert len(training.rows_of(tmp_path / "killed")) == 6
    if device == "cpu":
        straight, killed = (training.rows_of(tmp_path / name) for name in ("straight", "killed"))
        assert [row["train_loss"] for row in straight] == [row["train_loss"] for row in killed]
