"""Tests of part_fast.experiments.study: arms, pairing, tables, figure, going on."""

import csv
import dataclasses
import json

import pytest

from part_fast.config import PRESETS
from part_fast.experiments import study as studying
from part_fast.experiments.compare import is_correct
from part_fast.experiments.study import ARMS, CONFIG, study

TINY = dataclasses.replace(
    PRESETS["demo"], epochs=2, warmup_epochs=1, lr_drops=(1,), steps=1, train_size=20, test_size=20
)
FEW = {
    "AT": {"method": "at"},
    "PART": {},
    "random": {"control": "random", "eps": 12 / 255, "rule": "budget-matched:8/255"},
}


def test_arms_are_all_controls_and_rules():
    assert {arm.get("control") for arm in ARMS.values()} >= {None, "permuted", "random", "inverted", "uniform"}
    assert [arm.get("rule") for arm in ARMS.values() if "rule" in arm] == [
        "released",
        "quantile:0.5",
        "budget-matched:8/255",
        "region:centre",
    ]
    # Below 0.7 points of standard error at any accuracy.
    assert 0.5 / CONFIG.test_size**0.5 < 0.0071
    for changes in ARMS.values():
        dataclasses.replace(CONFIG, **changes).check()


def test_study(tmp_path, monkeypatch):
    said: list[str] = []
    record = study(tmp_path, config=TINY, arms=FEW, seeds=2, log=said.append)
    assert record["text"] == said[-1].rpartition("\n\n")[0]
    assert json.loads((tmp_path / "study.json").read_text()) == record
    with (tmp_path / "runs.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"]) for row in runs] == [(arm, seed) for seed in "01" for arm in FEW]
    names = [row["difference"] for row in record["differences"]]
    assert names == [d for d in ("PART - AT", "random - AT", "PART - random") for _ in range(2)]
    # Every arm begins at its own seed's warm-up, at the learning rate that comes next.
    for seed in (0, 1):
        for arm in ("at", "part", "random"):
            config = json.loads((tmp_path / f"{arm}-seed{seed}" / "config.json").read_text())
            assert config["init"] == str(tmp_path / f"warmup-seed{seed}" / "model.safetensors")
            assert (config["epochs"], config["lr_drops"], config["seed"]) == (1, [0], seed)
            evaluation = json.loads((tmp_path / f"{arm}-seed{seed}" / "evaluation.json").read_text())
            assert evaluation["eps"] == 8 / 255  # of the test, whatever the arm trained with
    expected = [
        float(is_correct(tmp_path / f"part-seed{s}", "pgd20").float().mean())
        - float(is_correct(tmp_path / f"at-seed{s}", "pgd20").float().mean())
        for s in (0, 1)
    ]
    found = next(d for d in record["differences"] if d["difference"] == "PART - AT" and d["measure"] == "pgd20")
    assert found["per_seed"] == pytest.approx(expected)
    assert (tmp_path / "study.png").stat().st_size > 10_000

    # Nothing is trained or attacked twice.
    before = {path: path.read_bytes() for path in tmp_path.rglob("model.safetensors")}
    monkeypatch.setattr("part_fast.evaluation.accuracy.is_correct", None)
    again = studying.study(tmp_path, config=TINY, arms=FEW, seeds=2, log=said.append)
    assert again["runs"] == record["runs"]
    assert {path: path.read_bytes() for path in before} == before


def test_study_with_another_configuration_refuses_the_folder(tmp_path):
    study(tmp_path, config=TINY, arms={"AT": {"method": "at"}, "PART": {}}, seeds=2, log=lambda line: None)
    other = dataclasses.replace(TINY, lr=0.5)
    with pytest.raises(ValueError, match="has another configuration: lr"):
        study(tmp_path, config=other, arms=FEW, seeds=2, log=lambda line: None)


@pytest.mark.parametrize(("arms", "seeds", "said"), [(FEW, 1, "seeds must be"), ({"AT": {}}, 2, "arms must hold")])
def test_study_bad_arguments(tmp_path, arms, seeds, said):
    with pytest.raises(ValueError, match=said):
        study(tmp_path / "out", config=TINY, arms=arms, seeds=seeds)
    assert not (tmp_path / "out").exists()
