"""bench scaling: ratios of time beside ratios of FLOP, of steps that were compared with published ones."""

import csv
import inspect
import json
import time

import pytest
import torch
from PIL import Image

from part_fast.bench import cases, published, scaling
from part_fast.bench.step_cases import configuration

CPU = torch.device("cpu")
BASE = configuration("wrn-10-1", 2, steps=2)


def test_predictions_are_ratios_of_flop():
    """A step of PGD-K is 2K + 4 forwards; a forward grows with the batch and with the pixels."""
    changes = {"steps": ({"steps": 4}, 16), "batch": ({"batch_size": 3}, 16), "pixels": ({}, 32)}
    rows = {row["change"]: row for row in scaling.measure(BASE, changes, CPU, 1, side=16)}
    # The first layer of training has no input gradient, and a mask's backward stops at the target layer.
    assert rows["steps"]["predicted"] == pytest.approx(12 / 8, abs=0.03)
    assert rows["batch"]["predicted"] == pytest.approx(3 / 2, abs=1e-3)
    assert rows["pixels"]["predicted"] == pytest.approx(4, abs=0.01)


def test_measured_is_the_median_of_a_rounds_own_ratios(monkeypatch):
    times = {"base": [1.0, 2.0, 4.0], "batch": [3.0, 4.0, 4.0]}
    monkeypatch.setattr(scaling, "time_in_turn", lambda *_: (times, dict.fromkeys(times, 1)))
    (row,) = scaling.measure(BASE, {"batch": ({"batch_size": 3}, 16)}, CPU, 3, side=16)
    assert row["measured"] == 2.0
    assert (row["p20"], row["p80"]) == pytest.approx((1.4, 2.6))
    assert (row["base_ms"], row["median_ms"]) == (2000, 4000)


def test_the_processors_time_is_taken_and_not_the_clocks():
    assert scaling.ProcessorClock().seconds(lambda: time.sleep(0.05), 1) < 0.04
    begin = time.process_time()

    def busy():
        while time.process_time() < begin + 0.05:
            pass

    assert scaling.ProcessorClock().seconds(busy, 1) > 0.04


@pytest.mark.parametrize(
    ("name", "argument", "value"), [("madry_step", "steps", 2), ("hooked_eps_map", "eps_low", 6.9 / 255)]
)
def test_wrong_step_is_refused(monkeypatch, name, argument, value):
    right = getattr(published, name)

    def wrong(*args):
        bound = inspect.signature(right).bind(*args)
        bound.arguments[argument] = value
        return right(*bound.args)

    monkeypatch.setattr(published, name, wrong)
    monkeypatch.setattr(scaling, "time_in_turn", lambda *_: pytest.fail("timed"))
    with pytest.raises(cases.MismatchError, match=r"^wrn-10-1: published PART computes something else than PART: "):
        scaling.measure(BASE, {"batch": ({"batch_size": 3}, 16)}, CPU, 1, side=16)


def test_every_network_and_size_is_compared(monkeypatch):
    seen = []
    monkeypatch.setattr(scaling, "compare", lambda made, *pair: seen.append((made.config.model, made.x.shape[3], pair)))
    monkeypatch.setattr(scaling, "part_step", lambda *_: lambda: None)
    monkeypatch.setattr(scaling, "count", lambda step: 1)
    monkeypatch.setattr(scaling, "time_in_turn", lambda steps, *_: ({s: [1.0] for s in steps}, dict.fromkeys(steps, 1)))
    scaling.measure(scaling.BASE, scaling.CHANGES, CPU, 1)
    networks = [("wrn-10-2", 32), ("wrn-10-1", 32), ("wrn-10-4", 32), ("wrn-10-2", 16), ("wrn-10-2", 64)]
    assert seen == [(*each, ("PART", "published PART")) for each in networks]


def test_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "scaling"
    monkeypatch.setattr(scaling, "SIDE", 16)
    monkeypatch.setattr(scaling, "CHANGES", {"batch 2 to 4": ({"batch_size": 4}, 16), "steps": ({"steps": 1}, 16)})
    monkeypatch.setattr(scaling, "QUICK", ("batch 2 to 4",))
    before = torch.get_num_threads()
    rows = scaling.scaling(out, device="cpu", quick=True, rounds=2, base=BASE)
    assert torch.get_num_threads() == before
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == sorted(scaling.FILES)
    with (out / "scaling.csv").open() as file:
        (written,) = csv.DictReader(file)
    assert written == {key: str(value) for key, value in rows[0].items()}
    assert (written["change"], written["threads"], written["rounds"]) == ("batch 2 to 4", "1", "2")
    line = next(line for line in printed.splitlines() if line.startswith("batch 2 to 4"))
    assert {f"{float(written[key]):.3f}" for key in ("predicted", "measured")} <= set(line.split())
    record = json.loads((out / "environment.json").read_text())
    expected = {"model": "wrn-10-1", "batch": 2, "quick": True, "rounds": 2, "threads": [1]}
    assert record["bench"] == {"device": "cpu", **expected}
    with Image.open(out / "scaling.png") as picture:
        assert min(picture.size) > 200
    with pytest.raises(ValueError, match=r"^out must be .*scaling\.csv.*--overwrite$"):
        scaling.scaling(out, device="cpu")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rounds": 0}, "rounds must be >= 1, got 0$"),
        ({"threads": [0]}, "threads must be >= 1, got 0$"),
        ({"device": "mps"}, "device takes auto, cpu, cuda or cuda:N, got 'mps'$"),
    ],
)
def test_errors(tmp_path, given, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        scaling.scaling(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
