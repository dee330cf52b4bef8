"""reproduce: every row of the poster is planned, its command is its configuration, runs are continued and compared."""

import dataclasses
import json
import shlex

import pytest

from part_fast import cli
from part_fast.config import preset
from part_fast.experiments import reproduce as module
from part_fast.experiments.reproduce import POSTER, plan, reproduce
from part_fast.training.checkpoint import STATE


@pytest.mark.parametrize("table", POSTER)
def test_every_row_with_every_seed(table):
    rows = plan(table, seeds=2)
    assert [row.name for row in rows[::2]] == list(POSTER[table])
    assert len(POSTER[table]) == 9
    assert len({row.folder for row in rows}) == 18
    for row in rows:
        row.config.check()
        assert row.config.method == row.name.lower().split(" ")[0]
        assert row.config.refresh == (row.name[-3:-1].lstrip("=") if "s=" in row.name else "batch")
        base = preset(row.config.preset)
        assert (row.config.epochs, row.config.lr, row.config.alpha) == (base.epochs, base.lr, base.alpha)


@pytest.mark.parametrize("table", POSTER)
def test_poster_rows_are_accuracies_in_their_order(table):
    """Stronger attacks leave less, by the poster's own rounding; AutoAttack may tie with MMA."""
    for natural, pgd20, mma, aa in POSTER[table].values():
        assert 100 > natural > pgd20 > mma > 0
        assert abs(aa - mma) < 3.5


def test_poster_sums():
    """Column sums taken from the poster's text, not from this code: they guard against a mistyped digit."""

    def sums(table):
        return [round(sum(column), 2) for column in zip(*POSTER[table].values(), strict=True)]

    assert sums("cifar10") == [722.91, 426.43, 398.19, 396.30]
    assert sums("svhn") == [824.53, 503.24, 461.94, 442.92]
    assert sums("tinyimagenet") == [397.94, 121.71, 111.79, 110.55]


@pytest.mark.parametrize("scale", ["full", "small"])
def test_command_is_the_configuration(scale, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("part_fast.training.loop.train", lambda config, out, **flags: seen.append((config, out)))
    out = tmp_path / "a folder"
    for row in plan("svhn", 2, scale):
        for changes in (
            {},
            {"download": True, "root": "/my data", "lr_drops": (1, 2)},
            {"augment": not row.config.augment},
        ):
            changed = dataclasses.replace(row, config=dataclasses.replace(row.config, **changes))
            words = shlex.split(changed.command(out))
            assert words[0] == "part-fast"
            assert cli.main(words[1:]) == 0
            assert seen.pop() == (changed.config, out / row.folder)


def test_small_runs_are_trained_resumed_and_compared(tmp_path, monkeypatch, capsys):
    done = []

    def train(config, out, *, resume, overwrite):
        done.append((out.name, resume, overwrite))
        out.mkdir(exist_ok=True)
        (out / STATE).touch()
        return [{"seconds": 1.5}, {"seconds": 2.5}]

    monkeypatch.setattr(module, "train", train)
    accuracy = {"natural": 0.80, "pgd20": 0.50}
    monkeypatch.setattr(
        module,
        "evaluate",
        lambda folder, attacks, resume, device: {
            "results": {
                key: {"accuracy": accuracy[key] + 0.01 * int(folder.name[-1]), "seconds": 0.25} for key in attacks
            }
        },
    )
    (tmp_path / "at-seed0").mkdir()
    (tmp_path / "at-seed0" / STATE).touch()
    (tmp_path / "at-seed1").mkdir()
    (tmp_path / "at-seed1" / "model.safetensors").touch()  # somebody removed the state: nothing is overwritten
    records = reproduce("cifar10", tmp_path, seeds=2, scale="small", attacks=("natural", "pgd20"))
    assert done[:2] == [("at-seed0", True, False), ("at-seed1", False, False)]
    assert all(how == [False, True] for _, *how in done[2:])
    assert len(done) == 18
    assert records[0]["natural"] == pytest.approx(80.5)
    assert records[0]["natural_spread"] == pytest.approx(0.5**0.5)
    assert records[0]["natural_difference"] == pytest.approx(80.5 - 82.58)
    text = capsys.readouterr().out
    assert "82.58 (-2.08)" in text
    assert "not comparable" in text
    assert "PART (s=1), seed 1: training 4.0 s, natural 0.2 s, pgd20 0.2 s" in text
    saved = json.loads((tmp_path / "reproduce.json").read_text())
    assert saved["text"] in text
    assert len((tmp_path / "reproduce.csv").read_text().splitlines()) == 10


def test_seeds_by_default():
    assert len(plan("svhn")) == 27
    assert len(plan("svhn", scale="small")) == 9


def test_dry_run_prints_commands_and_an_estimate_and_writes_nothing(tmp_path, capsys):
    assert reproduce("cifar10", tmp_path / "out", seeds=1, scale="small", dry_run=True) == []
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("part-fast train --preset demo") for line in lines) == 9
    assert "9 runs, about" in lines[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--table", "mnist"], "table must be one of cifar10, svhn, tinyimagenet, got 'mnist'"),
        (["--table", "svhn", "--scale", "tiny"], "scale must be one of full, small, got 'tiny'"),
        (["--table", "svhn", "--seeds", "0"], "seeds must be >= 1, got 0"),
        (["--table", "svhn", "--attacks", "deepfool"], "attacks must be of natural"),
    ],
)
def test_refusals(arguments, says, capsys):
    assert cli.main(["reproduce", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
