"""bench step: published loops are the authors', pairs that differ are refused, times add up, files are written."""

import ast
import collections
import contextlib
import csv
import inspect
import io
import json
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from golden_attack import EXPECTED, golden_net
from matplotlib.figure import Figure
from PIL import Image

from part_fast.attack_model import AttackModel
from part_fast.attack_model.cpu import winograd
from part_fast.attack_model.cpu.packed_conv import PackedConv2d
from part_fast.attack_model.graph import Graphs
from part_fast.attacks.pgd import pgd
from part_fast.bench import cases, clocks, flop, profile, published, step_cases, step_tables, steps
from part_fast.models.catalogue import build_model
from part_fast.training import loop, step

CPU = torch.device("cpu")
OF_A_GPU = ("attack graph", "training graph", "waiting")  # parts that a CPU does not have
X, Y = EXPECTED["x"], EXPECTED["y"]
EPS, EPS_LOW, ALPHA = 8 / 255, 7 / 255, 2 / 255


def config(**changed):
    return step_cases.configuration("resnet-small", changed.pop("batch", 2), **changed)


# --- the published loops ----------------------------------------------------------------------------------------------


def test_published_loops_share_nothing_with_ours():
    tree = ast.parse((ROOT / "part_fast" / "bench" / "published.py").read_text())
    imported = [
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not [name for name in imported if name.startswith("part_fast")]


def attacked_by(step, *args):
    """(images that the golden network was trained on and that are not X, loss, gradients), no weight decay."""
    net = golden_net()
    seen = []
    net.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, inputs[0].detach().clone())))
    loss = step(net, torch.optim.SGD(net.parameters(), 0.1), X, Y, EXPECTED["eps"], ALPHA, 10, *args)
    trained = [image for training, image in seen if loop and not torch.equal(image, X)]
    return trained[-1], loss, net, len(seen)


def test_published_masks_are_the_authors():
    net = golden_net()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    found = published.hooked_eps_map(net, net.relu2, X, EPS, EPS_LOW)
    assert torch.equal(found, EXPECTED["eps"])
    assert not net.relu2._forward_hooks
    # What makes them slow: gradients of all parameters, of layers before the target too.
    assert not torch.equal(net.conv1.weight.grad, torch.ones_like(net.conv1.weight))


def test_flat_map_gives_eps_low():
    flat = torch.ones(1, 4, 4)
    for rule in ("released", "zscore"):
        found = published.published_epsilon_map(flat, size=(8, 8), rule=rule, eps=EPS, eps_low=EPS_LOW)
        assert (found == torch.tensor(EPS_LOW)).all()


def test_published_at_is_the_authors():
    x_adv, _, net, forwards = attacked_by(published.madry_step, EXPECTED["start_uniform"])
    # As in test_attacks: a gradient of rounding size may have another sign elsewhere.
    assert (x_adv != EXPECTED["pgd_ce"]).float().mean() < 1e-3
    assert forwards == 11
    assert net.training


def test_published_trades_is_the_authors():
    x_adv, loss, net, forwards = attacked_by(published.trades_step, EXPECTED["start_normal"], 6.0)
    assert (x_adv != EXPECTED["pgd_kl"]).float().mean() < 5e-3
    torch.testing.assert_close(loss[None], EXPECTED["trades.loss"], rtol=1e-3, atol=0)
    assert forwards == 10 * 2 + 3  # the clean batch again in every step, and twice in the loss
    gradient = (EXPECTED["state.fc.weight"] - net.fc.weight.detach()) / 0.1
    torch.testing.assert_close(gradient, EXPECTED["trades.grad.fc"], rtol=0.05, atol=0.01)


@pytest.mark.parametrize(
    ("step", "extra", "times"),
    [
        (published.madry_step, (), 3 + 1),
        (published.input_gradient_step, (), 1),
        (published.trades_step, (6.0,), 1),
    ],
)
def test_whose_attack_computes_parameter_gradients(step, extra, times):
    net, computed = golden_net(), []
    net.conv1.weight.register_hook(lambda gradient: computed.append(1))
    step(net, torch.optim.SGD(net.parameters(), 0.1), X, Y, EPS, ALPHA, 3, None, *extra)
    assert len(computed) == times


@pytest.mark.parametrize("eps", [EPS, EXPECTED["eps"]], ids=["float", "map"])
def test_random_start_is_the_published_one(eps):
    """In +-8/255 for every pixel, whatever its own eps, and not clipped."""
    np.random.seed(0)
    noise = published._uniform(X, eps) - X
    assert 0.95 * EPS < noise.abs().max() <= EPS + 1e-7
    assert noise.abs().mean() == pytest.approx(EPS / 2, rel=0.05)


# --- the same result --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return config(batch=3, steps=3, alpha=4 / 255)


def small_cases(small):
    return step_cases.StepCases(small, CPU, 16, torch.float64)


@pytest.mark.parametrize("pair", step_cases.PAIRS, ids=" = ".join)
def test_pairs_compute_the_same(small, pair):
    row = step_cases.compare(small_cases(small), *pair)
    assert row["images_off"] == 0
    assert row["masks_off"] == (0 if "PART" in pair[0] else None)
    assert row["masked"] is None or 0.05 < row["masked"] < 0.5
    assert row["update_off"] < (1e-6 if pair[0] == "PART-T" else 1e-12)


def changed(name, **arguments):
    """The baseline with arguments exchanged: a value, or a function of the one given."""
    right = getattr(published, name)
    signature = inspect.signature(right)

    def wrong(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        for key, value in arguments.items():
            bound.arguments[key] = value(bound.arguments[key]) if callable(value) else value
        return right(*bound.args, **bound.kwargs)

    return name, wrong


def trained_mode(model, *args):
    """An attack that forgot eval mode."""
    kept, model.eval = model.eval, lambda: model
    try:
        return madry(model, *args)
    finally:
        model.eval = kept


madry = published.madry_step
AT, LIBRARY, PART, PART_T = step_cases.PAIRS


@pytest.mark.parametrize(
    ("pair", "planted", "what"),
    [
        (AT, changed("madry_step", alpha=lambda alpha: 1.01 * alpha), "images_off"),
        (AT, changed("madry_step", eps=7.9 / 255), "images_off"),
        (AT, changed("madry_step", steps=2), "images_off"),
        (AT, changed("madry_step", y=lambda y: y.roll(1)), "images_off"),
        (AT, ("madry_step", trained_mode), "images_off"),
        (AT, ("_update", lambda model, optimizer, objective: model.train() and objective().detach()), "update_off"),
        (LIBRARY, changed("input_gradient_step", start=lambda start: start + 1e-6), "images_off"),
        (PART, changed("hooked_eps_map", eps_low=6.9 / 255), "masks_off"),
        (PART, changed("published_epsilon_map", rule="zscore"), "masks_off"),
        (PART, changed("published_epsilon_map", cam=lambda cam: cam.flip(2)), "masks_off"),
        (PART_T, changed("trades_step", beta=5.9), "update_off"),
        (PART_T, changed("trades_step", eps=8 / 255), "images_off"),
    ],
)
def test_wrong_baseline_is_refused(small, monkeypatch, pair, planted, what):
    name, wrong = planted
    monkeypatch.setattr(published, name, wrong)
    with pytest.raises(
        cases.MismatchError, match=rf"{pair[1]} computes something else than {pair[0]}: {what} .*: not timed$"
    ):
        step_cases.compare(small_cases(small), *pair)


def test_wrong_training_of_ours_is_refused(small, monkeypatch):
    def wrong(*args, right=step.batch_loss):
        found = right(*args)
        return found._replace(loss=1.001 * found.loss)

    monkeypatch.setattr(step, "batch_loss", wrong)
    with pytest.raises(cases.MismatchError, match="update_off"):
        step_cases.compare(small_cases(small), *AT)


def test_attacks_of_the_check_meet_every_bound():
    """So that a pair with another eps anywhere is told apart, from TRADES's start beside the images too."""
    checked = step_cases.StepCases, []

    def keep(*args):
        checked[1].append(checked[0](*args))
        return checked[1][-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_cases, "StepCases", keep)
        step_cases.check(config(), CPU)
    (small,) = {(made.config.steps, made.config.alpha, made.config.precision) for made in checked[1]}
    assert small[0] * small[1] > EPS + 0.004  # TRADES starts some 0.001 N(0,1) away
    assert small[2] == "fp32"
    assert {made.x.dtype for made in checked[1]} == {torch.float64}


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_flop_are_in_forwards():
    """PGD-10 is 10 forwards and input gradients, training a forward and twice that; published loops do more."""
    counted = step_cases.count_flop(config(), CPU)
    forward = counted["clean logits"]

    def forwards(name):
        return counted[name] / forward

    # The first layer of a training step has no input gradient, and the mask's backward stops at the target layer.
    assert forwards("AT") == pytest.approx(20 + 3, abs=0.1)
    assert forwards("PART") == pytest.approx(21 + 3, abs=0.1)
    assert forwards("TRADES") == pytest.approx(21 + 6, abs=0.2)
    assert forwards("PART-T") == pytest.approx(21 + 6, abs=0.2)
    assert forwards("published AT") == pytest.approx(30 + 3, abs=0.1)
    assert forwards("input-gradient AT") == pytest.approx(20 + 3, abs=0.1)
    assert forwards("published PART") == pytest.approx(30 + 3 + 3, abs=0.2)
    assert forwards("published PART-T") == pytest.approx(30 + 9 + 3, abs=0.3)
    assert forwards("refresh") == pytest.approx(step_cases.BANK_BATCHES, abs=0.01)
    assert counted["lookup"] == 0


def test_flop_of_a_product_and_a_convolution():
    with flop.FlopCount() as count:
        torch.ones(3, 4) @ torch.ones(4, 5)
    assert count.total == 2 * 3 * 4 * 5
    with flop.FlopCount() as count:
        torch.nn.functional.conv2d(torch.ones(2, 3, 8, 8), torch.ones(5, 3, 3, 3), padding=1)
    assert count.total == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)
    conv = torch.nn.Conv2d(16, 32, 3, padding=1).requires_grad_(False)
    for by_winograd in (False, True):
        with mock.patch.object(winograd, "pays", return_value=by_winograd), flop.FlopCount() as count:
            x = torch.ones(2, 16, 8, 8, requires_grad=True)
            PackedConv2d(conv)(x).sum().backward()
        assert count.total == 2 * 2 * (2 * 32 * 8 * 8) * (16 * 3 * 3)


def named(name, begin, end):
    return {"cat": "user_annotation", "name": f"part_fast: {name}", "ts": begin, "dur": end - begin}


def test_parts_of_nested_ranges():
    """A step of 31 s: an inner range's time is not its outer one's, and a CAM keeps its own but for refreshing."""
    events = [
        named("other", 0, 31e6),
        named("CAM", 1e6, 15.5e6),
        named("attack forward", 5e6, 7.5e6),
        named("refresh of AttackModel", 7e6, 7.5e6),
        named("attack backward", 7.5e6, 15.5e6),  # begins where the other one ends
        named("attack forward", 15.5e6, 18e6),
        named("refresh of AttackModel", 15.5e6, 16e6),  # begins with the outer one
        named("unknown to the table", 20e6, 21e6),
        named("pgd_step", 25e6, 25e6),  # took no time
        {"cat": "user_annotation", "name": "ProfilerStep#1", "ts": 0, "dur": 99e6},
        {"cat": "cpu_op", "name": "part_fast: CAM", "ts": 20e6, "dur": 5e6},
        {"name": "[memory]", "ts": 1, "args": {"Bytes": 3}},
    ]
    expected = {"CAM": 14.0, "refresh of AttackModel": 1.0, "attack forward": 2.0, "other": 14.0}
    for order in (events, events[::-1]):
        found = profile.part_seconds(order)
        assert tuple(found) == profile.PARTS
        assert {name: value for name, value in found.items() if value} == pytest.approx(expected)


def test_parts_of_a_gpu_are_what_was_launched_in_them():
    """By the time of the launch, whatever thread it came from and however late the device did it."""

    def launch(number, at, kind="cuda_runtime", name="cudaLaunchKernel", thread=1):
        return {"cat": kind, "name": name, "ts": at, "dur": 1, "tid": thread, "args": {"correlation": number}}

    def ran(number, begin, end, kind="kernel"):
        return {"cat": kind, "name": "any", "ts": begin, "dur": end - begin, "args": {"correlation": number}}

    events = [
        named("other", 0, 100),
        named("attack forward", 10, 20),
        named("attack backward", 20, 30),
        named("attack graph", 40, 50),
        # What the profiler makes of the ranges on the device's own timeline would count twice.
        {"cat": "gpu_user_annotation", "name": "part_fast: attack forward", "ts": 0, "dur": 1e6},
        launch(1, 12),
        launch(2, 25, thread=2),  # autograd's own thread
        launch(3, 28, kind="cuda_driver", name="cuLaunchKernel"),  # as Triton does it
        launch(4, 45, name="cudaGraphLaunch"),
        launch(5, 60, name="cudaMemcpyAsync"),
        ran(1, 1000, 1300),
        ran(2, 1400, 1500),
        ran(3, 1450, 1600),  # beside the one before, on another stream
        ran(4, 1600, 1700),
        ran(4, 1700, 1800),  # all kernels of a graph have its launch
        ran(5, 2000, 2040, "gpu_memcpy"),
        ran(99, 2040, 2050, "gpu_memset"),  # whose launch is not in the trace
    ]
    found = profile.part_seconds(events)
    # The device did nothing from 1300 to 1400 and from 1800 to 2000.
    expected = {"attack forward": 300, "attack backward": 250, "attack graph": 200, "other": 50, "waiting": 300}
    assert {name: 1e6 * value for name, value in found.items() if value} == pytest.approx(expected)


def test_profile_covers_every_part():
    rows = profile.profile(config(), CPU, 1)
    of = {(row["method"], row["part"]): row for row in rows}
    assert len(rows) == len(step_cases.METHODS) * (len(profile.PARTS) + 1)
    for method in step_cases.METHODS:
        parts = {part: of[method, part]["median_s"] for part in profile.PARTS}
        assert sum(parts.values()) == pytest.approx(of[method, "total"]["median_s"])
        assert (parts["CAM"] > 0) == method.startswith("part")
        assert parts["attack graph"] == parts["training graph"] == parts["waiting"] == 0
        for part in set(parts) - {"CAM", *OF_A_GPU}:
            assert parts[part] > 0, part
        assert max(parts, key=parts.get) in ("attack forward", "attack backward")
    shown, _ = zip(*[(cells[0], cells[1:]) for cells in step_tables._profile_cells(rows)[1]], strict=True)
    assert shown == (*(part for part in profile.PARTS if part not in OF_A_GPU), "total")


def test_forward_hooks_of_a_profile_go_away():
    model = torch.nn.Linear(2, 2)
    with profile.named_forward(model, "training forward"):
        events = clocks.traced(lambda: model(torch.ones(1, 2)))
    assert [event["name"] for event in events if event.get("cat") == "user_annotation"] == [
        "part_fast: training forward"
    ]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_attack_replayed_from_a_graph_is_one_range():
    """On a stand-in for CUDA graphs that runs what it recorded, without the ranges that Python opens around it."""

    def record(run):
        run()

        def replay():
            with mock.patch.object(sys.modules["part_fast.attacks.ascend"], "record_function", contextlib.nullcontext):
                run()

        return replay

    model = AttackModel(build_model("resnet-small"))
    model.graphs = Graphs(record=record)
    x, y = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    pgd(model, x, y, EPS, steps=2)
    events = clocks.traced(lambda: pgd(model, x, y, EPS, steps=2))
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert names.count("part_fast: attack graph") == 1
    assert not {"part_fast: attack forward", "part_fast: pgd_step"} & set(names)


class Clock(clocks.CpuClock):
    """By which every call takes `each` seconds, and a row of calls a second more."""

    def __init__(self, each, at_least):
        self.each, self.step_seconds_at_least = each, at_least

    def seconds(self, one_pass, passes):
        for _ in range(passes):
            one_pass()
        return 1.0 + self.each * passes


def test_steps_on_a_gpu_are_timed_several_to_a_pair_of_events():
    def never():
        raise AssertionError

    assert clocks.calls_per_sample(clocks.CpuClock(), never) == 1
    assert clocks.CudaClock.step_seconds_at_least > 0
    assert clocks.calls_per_sample(Clock(0.5, 6.0), lambda: None) == 4  # one alone takes 1.5 s
    assert clocks.calls_per_sample(Clock(0.5, 1.0), lambda: None) == 1
    assert clocks.calls_per_sample(Clock(0.0, 1e9), lambda: None) == 100


def test_seconds_are_of_one_of_several_steps(monkeypatch):
    monkeypatch.setattr(flop, "MATMUL_SIZE", {"cpu": 8})
    monkeypatch.setattr(steps, "count_flop", lambda config, device, progress: collections.defaultdict(float))
    monkeypatch.setattr(steps, "clock_for", lambda device: Clock(0.25, 5.0))
    monkeypatch.setattr(step_cases.StepCases, "steps", lambda self: dict.fromkeys(names, lambda: None))
    monkeypatch.setattr(step_cases.StepCases, "pieces", lambda self: dict.fromkeys(pieces, lambda: None))
    names, pieces = ("AT", "PART", "PART, bank"), ("clean logits", "lookup", "refresh")
    rows = {each["name"]: each for each in steps.measure(config(), CPU, 2)}
    for name in (*names, *pieces, "AT fp32"):
        assert rows[name]["calls"] == 4  # 5 s by steps of 1.25
        assert rows[name]["seconds"] == pytest.approx([(1.0 + 4 * 0.25) / 4] * 2)
    assert rows["matmul fp32"]["calls"] == flop.MATMULS


def test_peak_memory_counts_what_graphs_hold(monkeypatch):
    segments = [
        {"device": 0, "segment_pool_id": (0, 0), "total_size": 1},
        {"device": 0, "segment_pool_id": (0, 3), "total_size": 20},
        {"device": 0, "segment_pool_id": [1, 0], "total_size": 300},
        {"device": 1, "segment_pool_id": (0, 3), "total_size": 4000},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert steps.graph_pool_bytes(torch.device("cuda")) == 320
    assert steps.graph_pool_bytes(torch.device("cuda", 1)) == 4000
    assert steps.graph_pool_bytes(CPU) == 0


def test_a_peak_counts_when_it_repeats():
    for given, expected in (([7, 7, 9], 7), ([8, 9, 7, 7, 9], 7), ([1, 2, 3, 4, 5, 5], 5)):
        values = iter(given)
        assert steps.settled(lambda values=values: next(values)) == expected
    assert next(values) == 5  # five at most


def test_each_peak_is_of_a_steps_own_graphs(monkeypatch):
    """Before a step's peak is read the graphs of the others are gone, and it has captured its own."""
    made = step_cases.StepCases(config(), CPU)
    every = made.engine.attack_model.graphs, made.engine.graphs = [
        Graphs(record=lambda run: run() or run) for _ in range(2)
    ]
    for graphs in every:
        graphs("key", lambda x: (x + 1,), torch.zeros(1))
        assert len(graphs) == 1
    made.forget_graphs()
    assert [len(graphs) for graphs in every] == [0, 0]


def test_goals_of_a_gpu_are_at_batch_128():
    goals = {goal.title: goal for goal in steps.GOALS}
    assert [steps.default_batch(model, "cuda") for model in steps.MODELS] == [128, 128]
    assert [steps.default_batch(model, "cpu") for model in steps.MODELS] == [32, 4]
    for goal in goals.values():
        assert goal.due("wrn-34-10", 128, "cuda") is not None
        assert goal.due("wrn-34-10", 4, "cuda") is None
        assert (goal.due("wrn-34-10", 4, "cpu") is None) == (goal.kind == "rate")
        assert goal.due("resnet-small", 128, "cuda") is None
    assert goals["AT, images/s"].due("wrn-34-10", 128, "cuda") == 1170
    assert goals["PART over AT, refresh 10"].due("resnet18", 128, "cuda") == 0.005


def row(name, seconds, peak=None, batch=32, device="cpu"):
    median = float(np.median(seconds))
    times = {"seconds": seconds, "median_s": median, "images_per_s": batch / median}
    return {"model": "resnet18", "batch": batch, "device": device, "name": name, "peak_bytes": peak, **times}


def test_ratios_from_medians_with_their_goals():
    names = {"AT fp32": 10.0, "TRADES": 12.0, "PART-T": 12.06, "published AT": 35.0, "published PART": 39.0}
    names |= {"published PART-T": 36.0, "input-gradient AT": 11.0, "PART, refresh 1": 10.5, "PART, refresh 10": 10.04}
    names |= {"mask": 0.4, "clean logits": 0.3, "lookup": 0.01, "refresh": 3.2}
    rows = [row(name, [seconds] * 3) for name, seconds in names.items()]
    rows += [row("AT", [10.0, 9.0, 20.0], peak=100), row("PART", [10.3, 9.9, 20.0], peak=106)]
    found = {each["what"]: each for each in steps.ratios(rows)}
    assert list(found) == [goal.title for goal in steps.GOALS if goal.kind != "rate"]
    assert found["AT step"]["value"] == pytest.approx(3.5)
    assert found["AT step"]["goal"] == 3.3
    assert found["AT step"]["met"] is True
    assert found["PART-T step"]["met"] is False
    assert found["AT step, all fp32"]["met"] is False
    part = found["PART over AT, refresh every batch"]
    assert part["value"] == pytest.approx(0.03)
    assert part["by_parts"] == pytest.approx(0.04)
    assert part["p80"] == pytest.approx(0.03 + 0.6 * 0.07)  # of each round's own ratio: 0.03, 0.1, 0
    assert found["PART over AT, refresh 1"]["by_parts"] == pytest.approx((0.01 + 3.2 / 8) / 10)
    assert found["PART over AT, refresh 10"]["by_parts"] == pytest.approx((0.01 + 3.2 / 80) / 10)
    assert found["PART over AT, refresh 1"]["met"] is False
    assert found["PART over AT, refresh 10"]["met"] is True
    assert found["PART-T over TRADES"]["by_parts"] == pytest.approx(0.1 / 12)
    assert found["peak memory, PART over AT"]["value"] == pytest.approx(1.06)
    assert found["peak memory, PART over AT"]["met"] is False
    others = steps.ratios([{**each, "batch": 16} for each in rows])
    assert {(each["goal"], each["met"]) for each in others} == {(None, None)}

    fast = [row(each["name"], [s / 1e3 for s in each["seconds"]], each["peak_bytes"], 128, "cuda") for each in rows]
    on_gpu = {each["what"]: each for each in steps.ratios(fast)}
    assert list(on_gpu) == [goal.title for goal in steps.GOALS]
    at = on_gpu["AT, images/s"]
    assert at["value"] == pytest.approx(12800)
    assert [at["p20"], at["p80"]] == pytest.approx(
        [128e3 / 20 + 0.4 * (128e3 / 10 - 128e3 / 20), 12800 + 0.6 * 128e3 / 90]
    )
    assert (at["goal"], at["met"]) == (7100, True)
    (cells,) = step_tables.ratio_table([at])[2]
    assert cells[3] == "12800"
    assert on_gpu["AT step"]["goal"] == 3.3
    slow = [{**each, "images_per_s": 7000.0} for each in fast]
    assert {each["what"]: each["met"] for each in steps.ratios(slow)}["AT, images/s"] is False


def test_bf16_where_the_hardware_has_it(monkeypatch):
    for amx, avx, expected in ((False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert steps.auto_precision(CPU)[0] == expected
    assert steps.auto_precision(torch.device("cuda"))[0] == "bf16"


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run in bf16, which has all rows: its folder, what it returned and printed."""
    out = tmp_path_factory.mktemp("bench") / "deep"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(flop, "MATMUL_SIZE", {"cpu": 64})
        rows = steps.steps(out, batch_size=2, quick=True, rounds=2, precision="bf16", device="cpu")
    return out, rows, printed.getvalue()


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_command_writes_what_it_prints(finished):
    out, rows, printed = finished
    assert sorted(path.name for path in out.iterdir()) == sorted(steps.FILES)
    assert "precision bf16 (as asked); medians of 2 interleaved rounds" in printed
    markdown = (out / "step.md").read_text()
    written = read(out / "step.csv")
    assert [each["name"] for each in written] == [each["name"] for each in rows]
    names = {each["name"] for each in written}
    assert names >= {name for goal in steps.GOALS for name in (goal.step, goal.other or goal.step)}
    precision = {each["name"]: each["precision"] for each in written}
    assert precision["PART-T"] == precision["PART, refresh 10"] == precision["mask"] == "bf16"
    assert precision["AT fp32"] == precision["published PART"] == precision["matmul fp32"] == "fp32"
    lines = [line.split() for line in printed.splitlines()]
    for each in written:
        median, gflop = (float(each[key]) for key in ("median_s", "gflop"))
        shown = [each["precision"], f"{1e3 * median:.1f}"]
        line = next(line for line in lines if line[: len(each["name"].split()) + 2] == each["name"].split() + shown)
        assert f"{gflop:.1f}" in line
        assert f"| {each['name']} | {' | '.join(shown)} |" in markdown
        assert float(each["gflop_per_s"]) == pytest.approx(gflop / median)
        if each["images_per_s"] and each["name"] != "refresh":
            assert float(each["images_per_s"]) == pytest.approx(2 / median)
    for each in read(out / "step_ratios.csv"):
        value = float(each["value"])
        text = f"{100 * value:.2f}%" if each["kind"] == "extra" else f"{value:.3f}x"
        assert any(line.startswith(each["what"]) and text in line.split() for line in printed.splitlines())
        assert f"| {each['what']} | resnet-small | 2 | {text} |" in markdown
    for each in read(out / "step_profile.csv"):
        if each["part"] in OF_A_GPU:  # a CPU has neither
            assert float(each["median_s"]) == 0
            assert each["part"] not in printed
            continue
        text = f"{1e3 * float(each['median_s']):.1f} ({float(each['percent']):.2f})"
        assert any(line.startswith(each["part"]) and text in line for line in printed.splitlines())
        assert any(line.startswith(f"| {each['part']} |") and f"| {text} |" in line for line in markdown.splitlines())


def test_rows_are_consistent(finished):
    _, rows, _ = finished
    of = {each["name"]: each for each in rows}
    bank, refresh = (np.array(of[name]["seconds"]) for name in ("PART, bank", "refresh"))
    for every in (1, 10):
        amortised = bank + refresh / 8 / every
        assert of[f"PART, refresh {every}"]["seconds"] == pytest.approx(amortised.tolist())
    for each in rows:
        assert each["p20_s"] <= each["median_s"] <= each["p80_s"]
        assert len(each["seconds"]) == each["rounds"] == 2
    for name in ("matmul fp32", "matmul bf16"):
        assert of[name]["percent_of_matmul"] == pytest.approx(100)
    share = 100 * of["AT fp32"]["gflop_per_s"] / of["matmul fp32"]["gflop_per_s"]
    assert of["AT fp32"]["percent_of_matmul"] == pytest.approx(share)
    # At the least all gradients, which a step ends with.
    weights = 4 * sum(p.numel() for p in build_model("resnet-small").parameters())
    assert all(each["peak_bytes"] > weights for each in rows if each["peak_bytes"] is not None)
    # A mask's own memory is less than a training step's, which stands for the peak of both.
    assert of["PART"]["peak_bytes"] == pytest.approx(of["AT"]["peak_bytes"], rel=0.05)


def test_legends_name_the_colours_beside_them(finished, tmp_path, monkeypatch):
    """Left the bars of ours and of the published loops, right the parts; no colour means two things."""
    _, rows, _ = finished
    profiled = json.loads((finished[0] / "step.json").read_text())["profile"]
    figures = []

    @contextlib.contextmanager
    def keep(path, size, layout=None):
        figures.append(Figure(figsize=size, layout=layout))
        yield figures[-1]

    monkeypatch.setattr(step_tables.figures, "drawing", keep)
    step_tables.draw(tmp_path / "step.png", rows, profiled, "caption")
    left, right = figures[0].axes
    assert not figures[0].legends

    def legend(axes):
        box = axes.get_legend()
        return {
            text.get_text(): patch.get_facecolor()
            for text, patch in zip(box.get_texts(), box.get_patches(), strict=True)
        }

    names = [label.get_text() for label in left.get_yticklabels()]
    for name, bar in zip(names, left.patches, strict=True):
        published = name.startswith(("published", "input-gradient"))
        assert bar.get_facecolor() == legend(left)["published loops" if published else "part_fast"], name
    parts = legend(right)
    assert list(parts) == profile.parts_there(profiled)
    assert {bar.get_facecolor() for bar in right.patches} == set(parts.values())
    assert len({*parts.values(), *legend(left).values()}) == len(parts) + 2


def test_record(finished):
    out, rows, _ = finished
    record = json.loads((out / "step.json").read_text())
    assert record["torch"] == torch.__version__
    assert record["bench"] == {
        "device": "cpu",
        "models": ["resnet-small"],
        "batches": [2],
        "precision": "bf16",
        "precision_because": "as asked",
        "compile": False,
        "cuda_graph": False,
        "quick": True,
        "rounds": 2,
        "profile_rounds": 2,
        "attack_steps": 10,
    }
    assert record["steps"] == rows
    assert [row["published"] for row in record["checked"]] == [published for _, published in step_cases.PAIRS]
    assert all(row["images_off"] == 0 for row in record["checked"])
    with Image.open(out / "step.png") as picture:
        assert min(picture.size) > 300
        assert len(set(picture.convert("RGB").resize((64, 64)).get_flattened_data())) > 5


def test_command_refuses_to_overwrite(finished):
    out, _, _ = finished
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=r"^out must be .*step\.csv.*--overwrite$"):
        steps.steps(out, device="cpu", quick=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_command_shows_nothing_after_a_mismatch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(*([published, *changed("madry_step", steps=2)]))
    with pytest.raises(cases.MismatchError, match="published AT"):
        steps.steps(tmp_path, device="cpu", quick=True, rounds=1)
    assert "median" not in capsys.readouterr().out.replace("medians of", "")
    assert list(tmp_path.iterdir()) == []


def test_finished_models_are_kept_when_a_later_one_fails(finished, tmp_path, monkeypatch):
    record = json.loads((finished[0] / "step.json").read_text())

    def check(config, device, progress):
        if config.model != "resnet-small":
            raise cases.MismatchError("planted")
        return record["checked"]

    monkeypatch.setattr(steps, "check", check)
    monkeypatch.setattr(steps, "measure", lambda *_: record["steps"])
    monkeypatch.setattr(steps, "profile", lambda *_: record["profile"])
    with pytest.raises(cases.MismatchError, match="planted"):
        steps.steps(tmp_path, models=["resnet-small", "wrn-10-1"], device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(steps.FILES)
    assert json.loads((tmp_path / "step.json").read_text())["steps"] == record["steps"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rounds": 0}, "rounds must be >= 1, got 0$"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0$"),
        ({"device": "mps"}, "device takes auto, cpu, cuda or cuda:N, got 'mps'$"),
        ({"precision": "int8"}, "precision must be one of .*int8"),
        ({"models": ["resnet19"]}, "model takes one of .*resnet19"),
    ],
)
def test_errors(tmp_path, given, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        steps.steps(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
