"""Tests of part_fast.experiments.study: arms, pairing, tables, figure, going on."""

import csv
import dataclasses
import hashlib
import json
import math
import re
import shutil
import textwrap

import pytest
import torch
from conftest import ROOT, load_once, make_runs_quick
from safetensors.torch import load_file, save_file

from part_fast import CamBudget
from part_fast.budgets.rules import LearnedRule
from part_fast.config import PRESETS, read_config
from part_fast.data.memory import to_float
from part_fast.evaluation.trained import load_trained
from part_fast.experiments import arms as arms_of_experiments
from part_fast.experiments import study as studying
from part_fast.experiments.arms import ACCURACIES, Result, has_result, how_tested, read_result, read_results
from part_fast.experiments.compare import is_correct
from part_fast.experiments.learned import attacked_loss, learn_rule
from part_fast.experiments.study import ARMS, CONFIGS, study
from part_fast.models.catalogue import build_model

pytestmark = pytest.mark.usefixtures("quick_runs")

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
    for config in (config for scales in CONFIGS.values() for config in scales.values()):
        # Below 0.7 points of standard error at any accuracy; None are all 10,000.
        assert 0.5 / (config.test_size or 10_000) ** 0.5 < 0.0071
        for changes in ARMS.values():
            if changes.get("rule") != "learned":  # until the study has learned it, which gives it a file
                dataclasses.replace(config, **changes).check()


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """(folder, what study returned, what it said) of two seeds."""
    out, said = tmp_path_factory.mktemp("study"), []
    with pytest.MonkeyPatch.context() as patch:
        make_runs_quick(patch)
        return out, study(out, config=TINY, arms=FEW, seeds=2, log=said.append), said


def test_study(studied, tmp_path, monkeypatch):
    out, record, said = studied
    assert record["text"] == said[-1].rpartition("\n\n")[0]
    assert json.loads((out / "study.json").read_text()) == record
    with (out / "runs.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"]) for row in runs] == [(arm, seed) for arm in FEW for seed in "01"]
    names = [row["difference"] for row in record["differences"]]
    assert names == [d for d in ("PART - AT", "random - AT", "PART - random") for _ in range(2)]
    # Every arm begins at its own seed's warm-up, at the learning rate that comes next.
    for seed in (0, 1):
        for arm in ("at", "part", "random"):
            config = json.loads((out / f"{arm}-seed{seed}" / "config.json").read_text())
            assert config["init"] == str(out / f"warmup-seed{seed}" / "model.safetensors")
            assert (config["epochs"], config["lr_drops"], config["seed"]) == (1, [0], seed)
            evaluation = json.loads((out / f"{arm}-seed{seed}" / "evaluation.json").read_text())
            assert evaluation["eps"] == 8 / 255  # of the test, whatever the arm trained with
    expected = [
        float(is_correct(out / f"part-seed{s}", "pgd20").float().mean())
        - float(is_correct(out / f"at-seed{s}", "pgd20").float().mean())
        for s in (0, 1)
    ]
    found = next(d for d in record["differences"] if d["difference"] == "PART - AT" and d["measure"] == "pgd20")
    assert found["per_seed"] == pytest.approx(expected)
    assert (out / "study.png").stat().st_size > 10_000

    # Nothing is trained or attacked twice, whether or not there are weights.
    monkeypatch.setattr("part_fast.experiments.arms.train", None)
    monkeypatch.setattr("part_fast.experiments.arms.evaluate", None)
    again = study(tmp_path, config=TINY, arms=FEW, seeds=2, results=out / "results", log=said.append)
    assert again["runs"] == record["runs"]
    assert again["differences"] == record["differences"]
    assert not list(tmp_path.rglob("*.safetensors"))
    other = dataclasses.replace(TINY, lr=0.5)
    says = r"at-seed0.json has another configuration: .'lr': 0.05. there, .'lr': 0.5. here"
    with pytest.raises(ValueError, match=says):
        study(tmp_path, config=other, arms=FEW, seeds=2, results=out / "results")


def test_a_result_holds_what_the_run_left_and_nothing_of_the_machine(studied):
    out, *_ = studied
    results = read_results(out / "results", FEW)
    assert [(one.arm, one.seed) for one in results] == [(arm, seed) for arm in FEW for seed in (0, 1)]
    for one in results:
        folder = out / f"{one.arm.lower()}-seed{one.seed}"
        for key in ("natural", "pgd20"):
            assert torch.equal(one.correct[key], is_correct(folder, key))
        warm = (out / f"warmup-seed{one.seed}" / "model.safetensors").read_bytes()
        assert one.warmup == hashlib.sha256(warm).hexdigest()
        assert one.config["alpha"] == 2 / 255
        assert str(out) not in one.file(out / "results").read_text()


def test_another_sitting_of_some_arms(studied, tmp_path):
    """A third seed of two arms: the tables are of all there is, the intervals of the seeds that both arms have."""
    out, *_ = studied
    shutil.copytree(out / "results", tmp_path / "results")
    more = {"arms": FEW, "seeds": 3, "only": ["AT", "PART"]}
    record = study(tmp_path, config=TINY, log=lambda line: None, **more)
    assert {name: by["seeds"] for name, by in record["table"].items()} == {"AT": 3, "PART": 3, "random": 2}
    assert {d["difference"]: d["seeds"] for d in record["differences"]} == {
        "PART - AT": [0, 1, 2],
        "random - AT": [0, 1],
        "PART - random": [0, 1],
    }
    assert not (tmp_path / "warmup-seed0").exists()
    # The arm's other file gone: one seed is enough, since the others say how much accuracies scatter.
    (tmp_path / "results" / "random-seed1.json").unlink()
    found = read_results(tmp_path / "results", FEW)
    few = [d for d in studying.tables(found)[1] if d["measure"] == "natural"]
    assert [d["seeds"] for d in few] == [[0, 1, 2], [0], [0]]
    assert few[1]["half_width"] > few[0]["half_width"]
    assert studying.tables(found[:1])[1] == []
    assert few[1]["significant"] is False


def test_tables_as_printed():
    """AT is always wrong, PART right but for AutoAttack with one of two seeds; random has no AutoAttack."""

    def result(arm, seed, **correct):
        hits = {name: torch.full((4,), bool(right)) for name, right in correct.items()}
        return Result(arm, {"seed": seed}, None, [], {}, hits, {})

    found = [result("AT", seed, natural=0, aa=0) for seed in (0, 1)]
    found += [result("PART", 0, natural=1, aa=1), result("PART", 1, natural=1, aa=0)]
    found += [result("random", 0, natural=0), result("random", 2, natural=0, aa=1)]
    _, compared, text = studying.tables(found)
    assert not any(d["significant"] for d in compared), "two seeds are too few"
    # Two arms, two seeds, one hit of four: a variance of 1/4 with one degree of freedom, where t is a tangent.
    alone, of_all = (100 * math.tan(math.pi * (0.5 - 0.025 / m)) * (2 / 4 / 2) ** 0.5 for m in (1, 4))
    said = [" ".join(line.split()) for line in text.split("\n") if not line.startswith("--")]
    assert said == [
        "arm seeds natural % AutoAttack %",
        "AT 2 0.00 ± 0.00 0.00 ± 0.00",
        "PART 2 100.00 ± 0.00 50.00 ± 70.71",
        "random 2 0.00 ± 0.00 100.00 (n=1)",
        "mean ± standard deviation of the seeds",
        "",
        "difference natural, points AutoAttack, points",
        f"PART - AT +100.00 ± 0.00 (± 0.00) n=2 +50.00 ± {alone:.2f} (± {of_all:.2f}) n=2",
        "random - AT +0.00 ± 0.00 (± 0.00) n=1 -",
        "PART - random +100.00 ± 0.00 (± 0.00) n=1 -",
        "± 95 % interval of the difference alone; in brackets, of all 4 at once; "
        "*: it excludes 0, which exceeds chance;",
        "n: seeds that both have; with fewer than 3 the variance is of all arms, and none has a *",
    ]
    # A third seed: the difference's own variance, which is none.
    found += [result("AT", 2, natural=0), result("PART", 2, natural=1)]
    of_three = studying.tables(found)[1][0]
    assert (of_three["difference"], of_three["half_width_all"], of_three["significant"]) == ("PART - AT", 0, True)
    assert studying.tables(found[:1])[2].endswith("\n\nno differences: they take two arms with two seeds each")


def test_a_result_of_before_a_field_has_its_default(studied, tmp_path):
    shutil.copytree(studied[0] / "results", tmp_path / "results")
    path = tmp_path / "results" / "part-seed0.json"
    record = json.loads(path.read_text())
    assert record["config"].pop("cutmix") == 0
    path.write_text(json.dumps(record))
    study(tmp_path, config=TINY, arms=FEW, seeds=2, log=lambda line: None)
    assert not (tmp_path / "part-seed0").exists()
    del record["config"]["steps"]  # 10 by default, 1 here
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"another configuration: .'steps': 10. there, .'steps': 1. here"):
        study(tmp_path, config=TINY, arms=FEW, seeds=2)


def test_a_result_of_other_tests_is_refused(studied, tmp_path):
    shutil.copytree(studied[0] / "results", tmp_path / "results")
    path = tmp_path / "results" / "part-seed0.json"
    record = json.loads(path.read_text())
    assert record["tested"] == {"eps": 8 / 255, "alpha": 2 / 255}
    record["tested"]["alpha"] = 0.5
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"part-seed0.json was tested otherwise: .*'alpha': 0.5. there"):
        study(tmp_path, config=TINY, arms=FEW, seeds=2)


def test_the_pages_tables_are_those_of_the_results():
    kept, config = ROOT / "docs" / "study" / "small", CONFIGS["cifar10"]["small"]
    found = read_results(kept, ARMS)
    assert len(found) == len(list(kept.iterdir()))
    assert {one.seed for one in found if one.arm == "AT"} == set(range(5))
    assert textwrap.indent(studying.tables(found)[2], "    ") in (ROOT / "docs" / "study.md").read_text()
    for one in found:  # of the configuration that the command has now
        plan = arms_of_experiments._plan(config, ARMS[one.arm], one.seed)
        assert has_result(kept, one.arm, plan, how_tested(config), ACCURACIES)
        assert len(one.correct["natural"]) == len(one.correct["pgd20"]) == 10_000


def test_the_pages_table_by_mean_eps_is_of_the_results():
    compared = studying.tables(read_results(ROOT / "docs" / "study" / "small", ARMS))[1]
    found = {(row["difference"], row["measure"]): f"{100 * row['mean']:+.2f}" for row in compared}
    page = (ROOT / "docs" / "study.md").read_text()
    rows = re.findall(r"^\| ([\w -]+?)(?::| \().* \| \d\.\d\d \| ([+-][\d.]+) \| ([+-][\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == len({one["difference"] for one in compared if one["difference"].endswith("- AT")})
    for arm, natural, pgd20 in rows:
        assert (natural, pgd20) == (found[f"{arm} - AT", "natural"], found[f"{arm} - AT", "pgd20"])


def test_arms_of_different_warm_ups_are_said():
    def result(arm, seed, warmup):
        return Result(arm, {"seed": seed}, warmup, [], {}, {"natural": torch.ones(4, dtype=torch.bool)}, {})

    same = [result(arm, seed, f"of seed {seed}") for arm in ("AT", "PART") for seed in (0, 1)]
    assert "warm-up" not in studying.tables(same)[2]
    text = studying.tables([*same, result("random", 0, "of seed 0"), result("random", 1, "trained anew")])[2]
    compared = studying.tables([*same, result("random", 0, "of seed 0"), result("random", 1, "trained anew")])[1]
    assert [d["seeds"] for d in compared] == [[0, 1], [0], [0]]
    said = "seed 1 has 2 warm-ups, which are not paired with each other: AT, PART; random"
    assert [line for line in text.split("\n") if "warm-up" in line] == [said]


@pytest.mark.parametrize("more", [{"only": ["AT"]}, {"seeds": 2, "only": ["AT", "PART"]}])
def test_a_result_of_another_configuration_is_refused_though_it_is_not_trained_now(more, studied, tmp_path):
    shutil.copytree(studied[0] / "results", tmp_path / "results")
    path = tmp_path / "results" / "random-seed1.json"
    record = json.loads(path.read_text())
    record["config"]["lr"] = 0.5
    path.write_text(json.dumps(record))
    says = r"random-seed1.json has another configuration: .'lr': 0.5. there, .'lr': 0.05. here"
    with pytest.raises(ValueError, match=says):
        study(tmp_path, config=TINY, arms=FEW, log=lambda line: None, **{"seeds": 2, **more})


def damaged_results():
    """name -> (change of a result, what the error says)."""

    def hits(record):
        record["results"]["pgd20"]["correct"] += 1

    def image(record):
        row = record["results"]["natural"]
        row["images"] = ("A" if row["images"][0] != "A" else "/") + row["images"][1:]

    def fewer(record):
        record["results"]["natural"]["images"] = ""

    def base(record):
        record["results"]["natural"]["images"] = "?"

    def attack(record):
        record["results"]["nothing"] = record["results"]["natural"]

    def seed(record):
        record["config"]["seed"] = 7

    def lacks(record):
        del record["config"]

    def tests(record):
        record["tested"] = None

    return {change.__name__: change for change in (hits, image, fewer, base, attack, seed, lacks, tests)}


@pytest.mark.parametrize("name", damaged_results())
def test_a_damaged_result_is_refused_by_name(name, studied, tmp_path):
    result_file = studied[0] / "results" / "at-seed1.json"
    record = json.loads(result_file.read_text())
    assert read_result(result_file).seed == 1
    damaged_results()[name](record)
    path = tmp_path / "at-seed1.json"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is no result of an experiment: [^\n]+$"):
        read_result(path)


def test_autoattack_of_the_main_arms(tmp_path, monkeypatch):
    pytest.importorskip("pyautoattack", reason="pip install pyautoattack")
    asked = []
    real = arms_of_experiments.evaluate

    def quick(folder, attacks, *, n=None, out=None, **settings):
        asked.append((folder.name, tuple(attacks), n))
        assert settings["device"] == "cpu"
        if attacks == ["aa"]:
            out = folder / "autoattack"
            real(folder, ["natural"], n=n, out=out, **settings)
            images = load_file(out / "evaluation_images.safetensors")
            save_file({"aa": images["natural"]}, out / "evaluation_images.safetensors")
        else:
            real(folder, attacks, **settings)

    monkeypatch.setattr(arms_of_experiments, "evaluate", quick)
    monkeypatch.setattr(arms_of_experiments, "AUTOATTACK_IMAGES", 10)
    said = []
    config = dataclasses.replace(TINY, device="cpu")
    record = study(tmp_path, config=config, arms=FEW, seeds=2, autoattack=True, log=said.append)
    assert {folder for folder, attacks, n in asked if attacks == ("aa",) and n == 10} == {
        f"{arm}-seed{seed}" for arm in ("at", "part") for seed in (0, 1)
    }
    assert [d["difference"] for d in record["differences"] if d["measure"] == "aa"] == ["PART - AT"]
    assert "AutoAttack %" in said[-1]
    (line,) = (line for line in record["text"].split("\n") if line.startswith("random  "))
    assert line.endswith("-")


@pytest.mark.parametrize(("arms", "seeds", "said"), [(FEW, 1, "seeds must be"), ({"AT": {}}, 2, "arms must hold")])
def test_study_bad_arguments(tmp_path, arms, seeds, said):
    with pytest.raises(ValueError, match=said):
        study(tmp_path / "out", config=TINY, arms=arms, seeds=seeds)
    assert not (tmp_path / "out").exists()


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
