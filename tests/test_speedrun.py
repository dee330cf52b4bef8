"""Tests of part_fast.experiments.speedrun: seconds to the goal, runs, parts, tables."""

import csv
import dataclasses
import json
import shutil
import textwrap

import pytest
import torch
from conftest import ROOT, TINY_RUN

from part_fast.experiments import speedrun as speedruns
from part_fast.experiments.arms import MEASURES, PLACES, Result, how_tested, read_results, slug
from part_fast.experiments.speedrun import SCALES, Scale, seconds_to_goal, speedrun
from part_fast.experiments.step_cost import Cost

pytestmark = pytest.mark.usefixtures("quick_runs")

TINY = dataclasses.replace(
    TINY_RUN, method="at", epochs=3, warmup_epochs=0, train_size=40, test_size=20, pgd_test_size=20, average="ema:0.5"
)


def result(*rows, natural=0.5, pgd20=0.5):
    names = ("seconds", "test_natural", "test_pgd20", "averaged_natural", "averaged_pgd20")
    correct = {name: torch.arange(10) < 10 * value for name, value in (("natural", natural), ("pgd20", pgd20))}
    rows_of = [dict(zip(names, row, strict=False)) for row in rows]
    return Result("speedrun", {"seed": 0}, None, rows_of, how_tested(TINY), correct, {})


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [
        ([(1.0, 0.4, 0.4), (2.0, 0.5, 0.29), (4.0, 0.5, 0.31)], 7.0),  # both in one epoch, or none
        ([(1.0, 0.5, 0.3), (2.0, 0.1, 0.1)], 1.0),  # the bound itself; what comes later is another matter
        ([(1.0, 0.5, 0.2), (2.0, 0.4, 0.9)], None),
        ([(1.0, 0.1, 0.1, 0.6, 0.1), (2.0, 0.1, 0.1, 0.6, 0.4)], 3.0),  # the averaged weights
        ([(1.0, 0.1, 0.4, 0.6, 0.1)], None),  # one of each is nobody's
        ([(1.0, 0.9, None)], None),  # not attacked
    ],
)
def test_seconds_until_the_goal_is_met(rows, seconds):
    assert seconds_to_goal(result(*rows), 0.5, 0.3) == seconds


def test_the_scales():
    full, small = SCALES.values()
    assert (full.natural, full.pgd20) == (0.8258, 0.4369)
    assert (full.config.dataset, full.config.model, full.config.train_size) == ("cifar10", "resnet18", None)
    assert small.config.model == "resnet-small"
    for scale in (full, small):
        scale.config.check()
        assert scale.config.method == "at"
        assert scale.config.pgd_test_size  # or nobody would see that the goal is met


def test_the_last_test_on_more_images_decides():
    scale = Scale(TINY, 0.5, 0.3, "made up", 1, False)
    never, once = [(1.0, 0.4, 0.4), (2.0, 0.6, 0.2)], [(1.0, 0.5, 0.3), (2.0, 0.6, 0.2)]
    met, missed = {"natural": 0.5, "pgd20": 0.3}, {"natural": 0.5, "pgd20": 0.2}
    assert [speedruns._to_goal(result(*rows, **met), scale) for rows in (never, once)] == [3.0, 1.0]
    assert [speedruns._to_goal(result(*rows, **missed), scale) for rows in (never, once)] == [None, None]


def test_without_an_average_the_weights_themselves_count(tmp_path, monkeypatch):
    monkeypatch.setattr(speedruns, "evaluate", lambda *arguments, **named: None)
    monkeypatch.setattr(speedruns, "is_correct", lambda folder, name: torch.arange(10) < 7)
    whole = result((1.0, 0.4, 0.4, 0.5, 0.3), (2.0, 0.6, 0.4, 0.6, 0.4))
    config = {name: value for name, value in TINY.to_json().items() if name not in PLACES}
    whole = dataclasses.replace(whole, config=config | {"seed": 0})
    speedruns._test_own_weights(whole, tmp_path, tmp_path, TINY)
    (own,) = read_results(tmp_path, [speedruns.OWN])
    assert own.accuracy("pgd20") == 0.7
    assert own.config["average"] == "none"
    assert seconds_to_goal(whole, 0.5, 0.3) == 1.0
    assert seconds_to_goal(own, 0.5, 0.3) == 3.0
    with pytest.raises(ValueError, match=r"has another configuration: .*'epochs': 3"):
        speedruns._test_own_weights(whole, tmp_path, tmp_path, dataclasses.replace(TINY, epochs=4))


def test_of_runs_that_some_attack_tested_and_some_did_not():
    row = {"seconds": 9.0, "images_per_second": 7.0, "seconds_to_goal": None, "natural": 0.5, "pgd20": 0.25}
    rows = [{**row, "seed": 0, "reached": False, "aa": 0.125}, {**row, "seed": 1, "reached": False}]
    lines = speedruns._runs_table(rows, MEASURES).split("\n")
    assert lines[2].split()[4:] == ["50.00", "25.00", "12.50", "no"]
    assert lines[3].split()[4:] == ["50.00", "25.00", "-", "no"]
    assert lines[4].endswith("50.00 ± 0.00  25.00 ± 0.00   12.50 (n=1)        0 of 2")


def test_the_pages_table_is_that_of_a_gpus_runs():
    with (ROOT / "docs" / "gpu" / "speedrun.csv").open(newline="") as file:
        rows = [{name: json.loads(value.lower()) for name, value in row.items()} for row in csv.DictReader(file)]
    table = speedruns._runs_table(rows, {key: MEASURES[key] for key in ("natural", "pgd20")})
    assert textwrap.indent(table, "    ") in (ROOT / "docs" / "speedrun.md").read_text()
    goal, epochs = SCALES["full"], SCALES["full"].config.epochs
    assert all(
        row["natural"] >= goal.natural and row["pgd20"] >= goal.pgd20 and row["epochs"] == epochs for row in rows
    )


def test_speedrun(tmp_path, monkeypatch):
    costs = {"speedrun": Cost(1.0, 1, 0), "kernels": Cost(1.5, 1, 0)}
    monkeypatch.setattr(speedruns, "step_costs", lambda *arguments, **named: costs)
    scales = {"full": Scale(TINY, 0.0, 0.0, "made up", 2, True), "small": Scale(TINY, 1.0, 1.0, "made up", 2, True)}
    said = []
    record = speedrun(tmp_path, parts=True, autoattack=False, scales=scales, log=said.append)
    assert record["text"] in said
    assert json.loads((tmp_path / "speedrun.json").read_text()) == record
    assert [row["seed"] for row in record["runs"]] == [0, 1]
    with (tmp_path / "speedrun.csv").open(newline="") as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["0", "1"]
    for row in record["runs"]:
        folder = tmp_path / f"speedrun-seed{row['seed']}"
        with (folder / "metrics.csv").open(newline="") as file:
            metrics = list(csv.DictReader(file))
        seconds = [float(epoch["seconds"]) for epoch in metrics]
        assert row["seconds"] == pytest.approx(sum(seconds))
        assert row["seconds_to_goal"] == pytest.approx(seconds[0])  # any network reaches 0 at once
        assert row["images_per_second"] == pytest.approx(3 * 40 / sum(seconds))
        evaluation = json.loads((folder / "evaluation.json").read_text())
        assert evaluation["checkpoint"].endswith("averaged.safetensors")
        assert row["pgd20"] == evaluation["results"]["pgd20"]["accuracy"]
    names = ["speedrun", "without fast attack", "without schedule", "without averaged weights", "without kernels"]
    assert [part["arm"] for part in record["parts"]] == names
    config = json.loads((tmp_path / "without-schedule-seed0" / "config.json").read_text())
    assert (config["schedule"], config["lr_drops"]) == ("piecewise", [2, 2])
    assert json.loads((tmp_path / "without-fast-attack-seed1" / "config.json").read_text())["steps"] == 10
    whole, plain, kernels = (record["parts"][i] for i in (0, 3, 4))
    assert plain["seconds"] == whole["seconds"]
    last = [json.loads((tmp_path / f"speedrun-seed{i}" / "last" / "evaluation.json").read_text()) for i in (0, 1)]
    assert all(one["checkpoint"].endswith("model.safetensors") for one in last)
    accuracies = [one["results"]["pgd20"]["accuracy"] for one in last]
    assert plain["pgd20"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert kernels["seconds_to_goal"] == pytest.approx(1.5 * whole["seconds_to_goal"])

    # Weights that are gone, and whose own accuracy is not known.
    shutil.copytree(tmp_path / "results", tmp_path / "lost" / "results")
    (tmp_path / "lost" / "results" / f"{slug(speedruns.OWN)}-seed1.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"^there is no run folder at .*speedrun-seed1, whose own weights"):
        speedrun(tmp_path / "lost", parts=True, autoattack=False, scales=scales)

    # A goal that nobody meets, from the results that are there.
    (tmp_path / "small").mkdir()
    (tmp_path / "results").rename(tmp_path / "small" / "results")
    monkeypatch.setattr("part_fast.experiments.arms.train", None)
    record = speedrun(tmp_path / "small", scale="small", parts=True, autoattack=False, scales=scales, log=said.append)
    assert [row["seconds_to_goal"] for row in record["runs"]] == [None, None]
    assert not any(row["reached"] for row in record["runs"])
    assert record["text"].count("never") == 2 + 1 + 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"scale": "large"}, "scale must be one of full, small, got 'large'"),
        ({"runs": 0}, "runs must be >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments, says, tmp_path):
    with pytest.raises(ValueError, match=f"^{says}$"):
        speedrun(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
