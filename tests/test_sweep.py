"""`evaluate --sweep`: accuracy as PGD grows, on a trained network; its warnings; what it keeps and refuses."""

import dataclasses
import json

import pytest
import torch
from conftest import TINY_RUN, load_once

from part_fast import cli
from part_fast.data.memory import to_float
from part_fast.evaluation import sweep as sweeping
from part_fast.evaluation import trained
from part_fast.evaluation.accuracy import evaluate
from part_fast.evaluation.sweep import sweep
from part_fast.models.catalogue import build_model
from part_fast.models.weights_file import write_weights
from part_fast.report import files

N = 30


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few points, that still go from nothing to half the range of a pixel; the demo set unpacked once."""
    monkeypatch.setattr(trained, "load", load_once)
    monkeypatch.setattr(sweeping, "FACTORS", (0, 1, 4, 16, 64))
    monkeypatch.setattr(sweeping, "STEPS", (1, 5, 20))


@pytest.fixture(scope="module")
def weights():
    """Of a network that is right on most test images."""
    torch.manual_seed(0)
    net = build_model("resnet-small", 10)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(4):
        for batch in load_once("demo", "train", None, False).subset(500).batches(25, shuffle=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(to_float(batch.images)), batch.labels).backward()
            optimizer.step()
    return net.state_dict()


@pytest.fixture
def run(weights, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    write_weights(folder / "model.safetensors", weights)
    files.write_json(folder / "config.json", dataclasses.replace(TINY_RUN, eps=8 / 255, test_size=N).to_json())
    return folder


def test_curves_fall_from_natural_accuracy_through_pgd20_to_nothing(run):
    record = sweep(run, batch_size=30)
    results = evaluate(run, ("natural", "pgd20", "pgd5"), batch_size=30)["results"]
    over_eps, over_steps = ([p["accuracy"] for p in record["curves"][kind]["points"]] for kind in ("eps", "steps"))
    # 64 times 8/255 is above 1, beyond which no pixel can move.
    assert [p["eps"] * 255 for p in record["curves"]["eps"]["points"]] == pytest.approx([0, 8, 32, 128])
    assert over_eps[0] == results["natural"]["accuracy"] > 0.4
    assert over_eps[1] == results["pgd20"]["accuracy"] == over_steps[2]
    assert over_steps[1] == results["pgd5"]["accuracy"]
    assert over_eps[-1] == 0
    assert over_eps == sorted(over_eps, reverse=True)
    assert over_steps == sorted(over_steps, reverse=True)
    assert [curve["warnings"] for curve in record["curves"].values()] == [[], []]
    assert json.loads((run / "sweep.json").read_text()) == record
    assert record["n"] == N


def test_the_step_size_grows_with_eps(run, monkeypatch):
    seen = []

    def keep(net, data, name, attack, *rest, **how):
        seen.append((name, attack.eps, attack.alpha))
        return torch.ones(len(data), dtype=torch.bool)

    monkeypatch.setattr(sweeping, "is_correct", keep)
    sweep(run, alpha=2 / 255)
    assert [name for name, _, _ in seen] == ["pgd20"] * 4 + ["pgd1", "pgd5", "pgd20"]
    assert [255 * alpha for _, _, alpha in seen] == pytest.approx([0, 2, 8, 32, 2, 2, 2])
    assert [255 * eps for _, eps, _ in seen[4:]] == pytest.approx([8, 8, 8])


def test_what_no_sound_attack_does_is_warned_about(run, monkeypatch):
    rising = iter([20, 10, 25, 6, 5, 5, 5])

    def some(net, data, *rest, **how):
        return torch.arange(len(data)) < next(rising)

    monkeypatch.setattr(sweeping, "is_correct", some)
    curves = sweep(run)["curves"]
    assert len(curves["eps"]["warnings"]) == 2
    assert curves["eps"]["warnings"][0].startswith("accuracy rises from eps 8/255 to eps 32/255, by 50.00 points")
    assert curves["eps"]["warnings"][1] == "20.0% are right at eps 128/255, where an attack must fool everything"
    assert curves["steps"]["warnings"] == []


def test_large_data_is_swept_in_part(run, monkeypatch):
    monkeypatch.setattr(sweeping, "IMAGES", 20)
    assert sweep(run, ["steps"])["n"] == 20


def test_the_other_curve_is_kept_and_settings_must_be_the_same(run, monkeypatch):
    first = sweep(run, ["steps"])
    both = sweep(run, ["eps"])
    assert both["curves"]["steps"] == first["curves"]["steps"]
    assert list(both["curves"]) == ["steps", "eps"]
    before = (run / "sweep.json").read_text()
    with pytest.raises(ValueError, match="holds a sweep with other eps, seed: choose another --out or --overwrite"):
        sweep(run, ["steps"], eps=4 / 255, seed=1)
    assert (run / "sweep.json").read_text() == before
    monkeypatch.setattr(sweeping, "is_correct", None)
    assert sweep(run, resume=True)["curves"] == both["curves"]


def test_overwrite_replaces_it(run):
    sweep(run, ["steps"])
    assert list(sweep(run, ["eps"], eps=4 / 255, overwrite=True)["curves"]) == ["eps"]


def test_command(run, capsys):
    arguments = ["evaluate", str(run), "--attacks", "natural", "--n", "20", "--device", "cpu", "--sweep", "steps"]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[5].split() == ["steps", "accuracy", "%", "standard", "error"]
    assert [line.split()[0] for line in lines[7:]] == ["1", "5", "20"]
    assert json.loads((run / "sweep.json").read_text())["n"] == 20


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (["--sweep", "size"], "sweep must be of eps, steps, each once, got 'size'"),
        (["--sweep", ","], "sweep must be of eps, steps, each once, got ''"),
        (["--sweep", "eps,eps"], "sweep must be of eps, steps"),
    ],
)
def test_refusals_come_before_anything_is_written(how, says, run, capsys):
    before = sorted(path.name for path in run.iterdir())
    assert cli.main(["evaluate", str(run), *how]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert sorted(path.name for path in run.iterdir()) == before


def test_no_eps_is_refused(run):
    with pytest.raises(ValueError, match="eps must be > 0 for a sweep over it, got 0"):
        sweep(run, eps=0.0)
    with pytest.raises(ValueError, match="resume and overwrite"):
        sweep(run, resume=True, overwrite=True)
