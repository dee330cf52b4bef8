"""Tests of part_fast.experiments.study: arms, pairing, tables, figure, going on."""

import csv
import dataclasses
import json

import pytest
import torch
from conftest import load_once
from safetensors.torch import save_file

from part_fast import CamBudget
from part_fast.budgets.rules import LearnedRule
from part_fast.config import PRESETS, read_config
from part_fast.data.memory import to_float
from part_fast.evaluation.trained import load_trained
from part_fast.experiments import study as studying
from part_fast.experiments.compare import is_correct
from part_fast.experiments.learned import attacked_loss, learn_rule
from part_fast.experiments.study import ARMS, CONFIG, study
from part_fast.models.catalogue import build_model

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
        "learned",
    ]
    # Below 0.7 points of standard error at any accuracy.
    assert 0.5 / CONFIG.test_size**0.5 < 0.0071
    for changes in ARMS.values():
        if changes.get("rule") != "learned":  # until the study has learned it, which gives it a file
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


@pytest.mark.usefixtures("quick_runs")
def test_a_learned_arm(tmp_path, monkeypatch):
    monkeypatch.setattr(studying, "load", load_once)
    arms = {"AT": {"method": "at"}, "PART": {}, "learned": ARMS["learned"]}
    config = dataclasses.replace(TINY, train_size=40)
    record = study(tmp_path, config=config, arms=arms, seeds=2, log=lambda line: None)
    assert {run["arm"] for run in record["runs"]} == set(arms)
    files = [tmp_path / f"learned-seed{seed}.safetensors" for seed in (0, 1)]
    rules = [LearnedRule.load(file) for file in files]
    assert all(rule.place.shape == (10, 1, 32, 32) for rule in rules)
    assert not torch.equal(rules[0].place, rules[1].place)  # each from its own warm-up
    assert read_config(tmp_path / "learned-seed0").rule == f"learned:{files[0]}"
    # Every image has the mean eps of AT, and an eps of its own in every place.
    found = load_trained(tmp_path / "learned-seed0", 20)
    eps = CamBudget(found.model, 9 / 255, 7 / 255, rule=read_config(tmp_path / "learned-seed0").rule)(
        to_float(found.data.images)
    )
    assert not eps.requires_grad
    torch.testing.assert_close(eps.mean((1, 2, 3)), torch.full((20,), 8 / 255), rtol=1e-6, atol=0)
    assert float(eps.std()) > 0.1 / 255
    before = [file.read_bytes() for file in files]
    monkeypatch.setattr(studying, "learn_rule", None)  # nothing is learned twice
    study(tmp_path, config=config, arms=arms, seeds=2, log=lambda line: None)
    assert [file.read_bytes() for file in files] == before


def test_learning_finds_where_a_network_is_hurt():
    """A network that reads the left half of the images alone, with all of the budget's mean to spend: it goes there."""

    class Left(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer4 = torch.nn.Conv2d(3, 4, 1)
            self.fc = torch.nn.Linear(4, 10)

        def forward(self, x):
            seen = torch.nn.functional.pad(x[..., :16], (0, 16))
            return self.fc(self.layer4(seen).relu().mean((2, 3)))

    torch.manual_seed(3)
    model, data = Left(), load_once("demo", "train").subset(100)
    config = dataclasses.replace(TINY, eps=9 / 255, eps_low=7 / 255, batch_size=20, steps=2)
    state = torch.get_rng_state()
    rule = learn_rule(model, data, config, 0.5, epochs=4)
    assert torch.equal(torch.get_rng_state(), state)
    x, y = to_float(data.images), data.labels
    eps = CamBudget(model, 9 / 255, 7 / 255, rule=rule)(x)
    torch.testing.assert_close(eps.mean((1, 2, 3)), torch.full((100,), 8 / 255), rtol=1e-6, atol=0)
    assert float(eps[..., :16].mean()) > 8.1 / 255
    assert float(eps[..., 16:].mean()) < 7.9 / 255
    torch.manual_seed(0)
    uniform = attacked_loss(model, x, y, torch.full_like(eps, 8 / 255), config)
    torch.manual_seed(0)
    assert attacked_loss(model, x, y, eps, config) > uniform


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (None, FileNotFoundError, "there is no file"),
        (b"", ValueError, "is not a safetensors file that can be read"),
        ({"place": torch.zeros(2, 1, 4, 4)}, ValueError, r"must hold place \(classes,1,H,W\), gain and mean"),
        (
            {"place": torch.zeros(2, 4, 4), "gain": torch.ones(()), "mean": torch.ones(())},
            ValueError,
            r"must hold place \(classes,1,H,W\)",
        ),
        (
            {"place": torch.full((2, 1, 4, 4), torch.nan), "gain": torch.ones(()), "mean": torch.ones(())},
            ValueError,
            "must hold finite numbers",
        ),
    ],
)
def test_files_that_hold_no_learned_rule(content, error, says, tmp_path):
    file = tmp_path / "rule.safetensors"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        save_file(content, file)
    with pytest.raises(error, match=says):
        CamBudget(build_model("resnet-small"), rule=f"learned:{file}")


def test_a_learned_rule_is_read_as_it_was_written(tmp_path):
    for classes, mean in ((None, None), (3, 0.25)):
        rule = LearnedRule((4, 6), classes, mean)
        with torch.no_grad():
            rule.place.normal_()
            rule.gain.fill_(0.3)
        rule.save(tmp_path / "rule.safetensors")
        read = LearnedRule.load(tmp_path / "rule.safetensors")
        cam, target = torch.rand(5, 2, 3), torch.tensor([0, 2, 1, 1, 0])
        assert torch.equal(read(cam, (4, 6), target), rule(cam, (4, 6), target))
        assert (read.mean, read.per_class) == (mean, classes is not None)
