"""Tests of part_fast.experiments.attacks, the table of attacks, and of what a step costs."""

import csv
import dataclasses
import json
import re

import pytest
from conftest import ROOT, TINY_RUN, load_once

from part_fast.attacks.catalogue import ATTACKS, for_training
from part_fast.config import TrainConfig
from part_fast.experiments import attacks as tables
from part_fast.experiments import step_cost
from part_fast.experiments.arms import PLACES, measured, read_results
from part_fast.experiments.attacks import ARMS, CONFIG, attacks
from part_fast.experiments.step_cost import Cost, step_costs
from part_fast.reading import read_json
from part_fast.training.engine import Engine

pytestmark = pytest.mark.usefixtures("quick_runs")

PAGE = (ROOT / "docs" / "speedrun.md").read_text()
TINY = dataclasses.replace(
    TINY_RUN, method="at", epochs=2, warmup_epochs=0, train_size=40, test_size=20, pgd_test_size=0, batch_size=20
)
FEW = {
    "FGSM": {"attack": "fgsm"},
    "FGSM-PGI": {"attack": "pgi"},
    "PGD-2": {"attack": "pgd", "steps": 2, "alpha": 4 / 255},
}


def test_arms_are_all_attacks_that_train():
    assert {changes["attack"] for changes in ARMS.values()} == set(for_training()) - {"mma"}
    assert list(ARMS)[-1] == "PGD-10"
    for changes in ARMS.values():
        dataclasses.replace(CONFIG, **changes).check()


def test_attacks(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "load", load_once)
    costs = {"FGSM": Cost(1.0, 2**20, 0), "FGSM-PGI": Cost(1.5, 2**21, 3072), "PGD-2": Cost(3.1, 2**20, 0)}
    monkeypatch.setattr(tables, "step_costs", lambda configs, data, rounds: costs)
    said = []
    record = attacks(tmp_path, config=TINY, arms=FEW, autoattack=False, log=said.append)
    assert said[-1].startswith(record["text"])
    assert json.loads((tmp_path / "attacks.json").read_text()) == record
    with (tmp_path / "attacks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["equal"], row["attack"], row["epochs"]) for row in rows] == [
        ("epochs", "FGSM", "2"),
        ("epochs", "FGSM-PGI", "2"),
        ("epochs", "PGD-2", "2"),
        ("seconds", "FGSM", "6"),  # 2 * 3.1 / 1.0
        ("seconds", "FGSM-PGI", "4"),  # 2 * 3.1 / 1.5
        ("seconds", "PGD-2", "2"),
    ]
    for row in record["rows"]:
        assert row["seconds"] == pytest.approx(costs[row["attack"]].seconds * 40 * row["epochs"])
        assert row["bank_bytes"] == (3072 * 40 if row["attack"] == "FGSM-PGI" else 0)
        folder = tmp_path / f"{row['attack'].lower()}-{row['epochs']}-epochs-seed0"
        config = json.loads((folder / "config.json").read_text())
        assert config["epochs"] == row["epochs"]
        evaluation = json.loads((folder / "evaluation.json").read_text())
        assert row["pgd20"]["mean"] == evaluation["results"]["pgd20"]["accuracy"]
        assert (evaluation["eps"], evaluation["alpha"]) == (8 / 255, 2 / 255)  # PGD-2 was trained with another alpha
    # The slowest attack's network is the same in both, and trained once.
    assert len(list((tmp_path / "results").glob("*-seed0.json"))) == 5
    # Other timings on another day change nothing in what is kept.
    costs["FGSM"] = Cost(2.0, 2**20, 0)
    monkeypatch.setattr("part_fast.experiments.arms.train", None)
    again = attacks(tmp_path, config=TINY, arms=FEW, autoattack=False, log=said.append)
    assert [row["epochs"] for row in again["rows"]] == [2, 2, 2, 6, 4, 2]
    # Of results that lie elsewhere, in a folder that has no run.
    elsewhere, results = tmp_path / "elsewhere", tmp_path / "results"
    found = attacks(elsewhere, config=TINY, arms=FEW, results=results, autoattack=False, log=said.append)
    assert found["rows"] == again["rows"] == json.loads((elsewhere / "attacks.json").read_text())["rows"]
    wrong = tmp_path / "wrong"
    for epochs in (0, -3):
        with pytest.raises(ValueError, match=f"^epochs must be >= 1, got {epochs}$"):
            attacks(wrong, config=dataclasses.replace(TINY, epochs=epochs), arms=FEW, autoattack=False)
    assert not wrong.exists()
    longer = dataclasses.replace(TINY, epochs=3)
    with pytest.raises(ValueError, match=r"epochs.json is of 2 epochs of PGD-2, got epochs 3: take another folder$"):
        attacks(tmp_path, config=longer, arms=FEW, equal=["seconds"], autoattack=False)
    (tmp_path / "results" / "epochs.json").write_text('{"FGSM": 0}')
    with pytest.raises(ValueError, match=r"epochs.json must hold a number of epochs for each of FGSM, FGSM-PGI, PGD-2"):
        attacks(tmp_path, config=TINY, arms=FEW, equal=["seconds"], autoattack=False)


def test_the_pages_tables_are_those_of_the_results():
    networks = {f"{name}, {epochs} epochs" for name in ARMS for epochs in range(1, 100)}
    found = {one.arm: one for one in read_results(ROOT / "docs" / "attacks", networks)}
    rows = re.findall(r"^    (\S.*?)  +(\d+)  +\d+  +[\d +]+?  +([\d. -]+)$", PAGE, re.MULTILINE)
    assert len(rows) == 2 * len(ARMS)
    measures = measured([*found.values()])  # those that some network has; a "-" where another lacks one
    for name, epochs, printed in rows:
        one = found.pop(f"{name}, {epochs} epochs") if name != "PGD-10" else found["PGD-10, 10 epochs"]
        plan = dataclasses.replace(CONFIG, **ARMS[name], epochs=int(epochs)).to_json()
        usual = TrainConfig().to_json()  # of fields that are younger than the results
        there = {field: value for field, value in (usual | one.config).items() if field not in PLACES}
        assert there == {field: value for field, value in plan.items() if field not in PLACES}
        accuracies = [f"{100 * one.accuracy(key):.2f}" if key in one.correct else "-" for key in measures]
        assert printed.split() == accuracies
        assert one.tested == {"eps": 8 / 255, "alpha": 2 / 255}
    assert list(found) == ["PGD-10, 10 epochs"]
    kept = read_json(ROOT / "docs" / "attacks" / "epochs.json")
    assert [(name, int(epochs)) for name, epochs, _ in rows[len(ARMS) :]] == list(kept.items())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"equal": ["days"]}, "equal must be of epochs, seconds, got days"),
        ({"equal": []}, "equal must be of epochs, seconds, got none"),
        ({"seeds": 0}, "seeds must be >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments, says, tmp_path):
    with pytest.raises(ValueError, match=f"^{says}$"):
        attacks(tmp_path / "out", config=TINY, arms=FEW, **arguments)
    assert not (tmp_path / "out").exists()


def test_the_averages_forward_costs_its_share_of_an_epoch(monkeypatch):
    def timed(calls, clock, rounds, progress):
        return {name: [9.0, 0.4 if name == "the average's forward" else 2.0, 0.0] for name in calls}, {}

    monkeypatch.setattr(step_cost, "time_in_turn", timed)
    monkeypatch.setattr(step_cost, "AVERAGE_BATCHES", 3)
    data = load_once("demo", "train").subset(100)  # five batches, three of which have it
    averaged = dataclasses.replace(TINY, attack="fgsm", average="ema:0.5")
    assert step_costs({"one": averaged}, data, 3)["one"].seconds == pytest.approx((2.0 + 3 / 5 * 0.4) / 20)
    assert step_costs({"one": averaged}, data.subset(40), 3)["one"].seconds == pytest.approx((2.0 + 0.4) / 20)
    plain = dataclasses.replace(averaged, average="none")
    assert step_costs({"one": plain}, data, 3)["one"].seconds == pytest.approx(2.0 / 20)


@pytest.mark.parametrize("kernels", [True, False])
def test_a_timed_step_is_none_of_an_epochs_last(monkeypatch, kernels):
    measured = []
    monkeypatch.setattr(Engine, "measure", lambda self, x: measured.append(self._measures))
    train = step_cost._with_kernels if kernels else step_cost._without_kernels
    data = load_once("demo", "train").subset(20)
    step, _ = step_cost._step(dataclasses.replace(TINY, attack="fgsm", average="ema:0.5"), data, train)
    step()
    assert not any(measured)


def test_more_steps_cost_more_and_a_bank_has_its_bytes():
    configs = {
        "one": dataclasses.replace(TINY, attack="fgsm"),
        "many": dataclasses.replace(TINY, attack="pgd", steps=12),
        "bank": dataclasses.replace(TINY, attack="pgi"),
    }
    data = load_once("demo", "train").subset(20)
    costs = step_costs(configs, data, 3, without_kernels="plain")
    assert list(costs) == ["one", "many", "bank", "plain"]
    assert costs["many"].seconds > 2 * costs["one"].seconds  # of 14 passes and 3
    assert costs["plain"].seconds > 0
    assert [cost.bank for cost in costs.values()] == [0, 0, 3 * 32 * 32, 0]
    activations = 20 * 16 * 16 * 16 * 4  # of the first layer, which the backward keeps
    assert all(cost.bytes > activations for cost in costs.values())
    assert set(ATTACKS) >= {config.attack for config in configs.values()}
