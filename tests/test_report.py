"""report and demo: files, the environment record, tables, pictures that show something, the demo's verdict."""

import csv
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import part_fast
from part_fast.config import PRESETS
from part_fast.data.catalogue import load
from part_fast.evaluation import trained
from part_fast.experiments import demo as demonstrating
from part_fast.experiments.demo import demo
from part_fast.report import figures, files
from part_fast.report.environment import environment, environment_text
from part_fast.training import loop
from part_fast.training.run_folder import locked


def picture(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def near(pixels, color, tolerance=12):
    """How many pixels have a colour given as #RRGGBB."""
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels - rgb).max(2) <= tolerance).sum())


ROWS = [
    {"epoch": e, "method": "at" if e < 3 else "part", "train_loss": 2.0 / e, "train_robust": 0.1 * e,
     "test_natural": 0.12 * e, "test_pgd20": None}
    for e in range(1, 6)
]  # fmt: skip


def test_csv_and_json(tmp_path):
    rows = [{"a": 1, "b": None}, {"a": 0.1, "b": "x,y"}]
    files.write_csv(tmp_path / "t.csv", rows)
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": ""}, {"a": "0.1", "b": "x,y"}]
    files.write_json(tmp_path / "t.json", {"a": [1, None]})
    assert json.loads((tmp_path / "t.json").read_text()) == {"a": [1, None]}


def test_environment_is_complete_and_plain(tmp_path):
    record = environment()
    assert json.loads(json.dumps(record)) == record
    assert record["part_fast"] == part_fast.__version__
    assert record["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    assert record["backends"]["cpu"] == part_fast.available_backends("cpu")
    assert set(record["backends"]["cpu"]) | set(record["not_available"]["cpu"]) == set(part_fast.backends.BACKENDS)
    assert not set(record["backends"]["cpu"]) & set(record["not_available"]["cpu"])
    assert record["cpu"]
    text = environment_text(record)
    for name, reason in record["not_available"]["cpu"].items():
        assert f"not {name}: {reason}" in text


def test_commit_is_that_of_the_checkout_or_none():
    commit = environment()["commit"]
    command = ["git", "-C", str(Path(figures.__file__).parent), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if commit is None:
        pytest.skip("part_fast does not lie in a git checkout")
    assert commit.removesuffix("+changes") == head


def test_pictures_and_data_sets_are_not_imported_with_report():
    code = "import sys, part_fast.report; print([m for m in ('matplotlib', 'torchvision', 'tyro') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("backend", ["module://no.such", "pdf"])
def test_pictures_are_drawn_whatever_backend_is_wished(tmp_path, backend):
    """Notebooks set MPLBACKEND for their shells, whose Python may lack it; a good one stays the process's own."""
    code = f"""
import os
from pathlib import Path
from part_fast.report import figures
with figures.drawing(Path({str(tmp_path / "a.png")!r}), (2, 2)) as figure:
    figure.subplots().plot([1, 2])
import matplotlib
assert os.environ["MPLBACKEND"] == {backend!r}
assert {backend!r} != "pdf" or matplotlib.get_backend() == "pdf"
"""
    environment = {**os.environ, "MPLBACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert picture(tmp_path / "a.png").size


def test_a_backend_that_is_chosen_stays(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    before = matplotlib.rcParams["backend"]
    monkeypatch.setenv("MPLBACKEND", "svg")
    with figures.drawing(tmp_path / "a.png", (2, 2)) as figure:
        figure.subplots().plot([1, 2])
    assert matplotlib.rcParams["backend"] == before != "svg"


def test_table():
    text = files.table(("attack", "%"), [("natural", "81.20"), ("pgd20", "5.00")])
    assert text == "attack       %\n-------  -----\nnatural  81.20\npgd20     5.00"


def test_curves_show_each_series_that_there_is(tmp_path):
    figures.draw_curves(tmp_path / "a.png", ROWS, "title")
    pixels = picture(tmp_path / "a.png")
    assert near(pixels, figures.GREEN) > 300
    assert near(pixels, figures.BLUE) > 300
    assert near(pixels, figures.ORANGE) > 200
    assert near(pixels, figures.VERMILION) == 0
    figures.draw_curves(tmp_path / "b.png", [{**row, "test_pgd20": 0.3} for row in ROWS], "title")
    assert near(picture(tmp_path / "b.png"), figures.VERMILION) > 300


def test_curves_join_the_epochs_that_were_tested(tmp_path):
    rows = [{**ROWS[0], "epoch": i, "test_natural": None if i in (2, 3) else 0.5} for i in range(1, 5)]
    figures.draw_curves(tmp_path / "gap.png", rows, "title")
    figures.draw_curves(tmp_path / "all.png", [{**row, "test_natural": 0.5} for row in rows], "title")
    gap, whole = (near(picture(tmp_path / name), figures.BLUE) for name in ("gap.png", "all.png"))
    # Two of four markers fewer, 12 pixels each, and the same line.
    assert whole - 60 < gap < whole


def test_comparison_shows_both_methods(tmp_path):
    curves = {"warm-up (AT)": {1: [0.5], 2: [0.6]}, "AT": {2: [0.6], 3: [0.6, 0.7]}, "PART": {2: [0.6], 3: [0.7, 0.8]}}
    results = {"AT": {"natural": [0.6, 0.7], "pgd20": [0.4, 0.5]}, "PART": {"natural": [0.7, 0.8], "pgd20": [0.4, 0.5]}}
    figures.draw_comparison(tmp_path / "c.png", curves, results)
    pixels = picture(tmp_path / "c.png")
    for color in (figures.BLUE, figures.VERMILION, figures.GRAY):
        assert near(pixels, color) > 200


def test_masks_with_one_channel_and_a_flat_eps_map(tmp_path):
    x = torch.rand(1, 1, 8, 8)
    figures.draw_masks(
        tmp_path / "m.png", x, torch.zeros(1, 8, 8), {"soft": torch.full((1, 1, 8, 8), 0.03)}, x, [("a", "b")], "c"
    )
    pixels = picture(tmp_path / "m.png")
    assert pixels.std() > 20
    # Nothing changed: the picture of the difference is gray of 0.5.
    assert near(pixels, "#808080", 1) > 150**2


def test_demo_in_miniature(tmp_path, monkeypatch):
    config = dataclasses.replace(
        PRESETS["demo"], train_size=64, test_size=20, epochs=2, warmup_epochs=1, steps=1, batch_size=32
    )
    cached = functools.lru_cache(load)
    for module in (loop, trained):
        monkeypatch.setattr(module, "load", cached)
    drawn = []
    monkeypatch.setattr(figures, "draw_curves", lambda path, rows, title: drawn.append(path))  # tested above, and slow
    said = []
    record = demo(tmp_path / "demo", config=config, seeds=(0, 1), log=said.append)
    out = tmp_path / "demo"
    assert len(drawn) == 5
    assert {path.name for path in out.iterdir()} == {
        *demonstrating.FILES, "warmup", "at-seed0", "part-seed0", "at-seed1", "part-seed1",
    }  # fmt: skip
    assert json.loads((out / "results.json").read_text()) == record
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [("AT", "0"), ("PART", "0"), ("AT", "1"), ("PART", "1")]
    for row in rows:
        folder = out / f"{row['method'].lower()}-seed{row['seed']}"
        evaluation = json.loads((folder / "evaluation.json").read_text())
        assert float(row["pgd20"]) == evaluation["results"]["pgd20"]["accuracy"]
        settings = json.loads((folder / "config.json").read_text())
        assert (settings["method"], settings["epochs"], settings["warmup_epochs"]) == (row["method"].lower(), 1, 0)
        assert settings["init"] == str(out / "warmup" / "model.safetensors")
    natural = [float(row["natural"]) for row in rows if row["method"] == "PART"]
    assert record["table"]["PART"]["natural"]["mean"] == pytest.approx(sum(natural) / 2)
    assert record["text"] in said
    assert "PART - AT, natural" in record["text"]
    threads = torch.get_num_threads()
    assert re.search(rf"^made with {threads} threads?: .* give other digits$", record["text"], re.MULTILINE)
    for name in ("curves.png", "masks.png"):
        assert picture(out / name).std() > 10

    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="already holds a demo"):
        demo(out, config=config)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    with locked(out / "warmup"), pytest.raises(RuntimeError, match="is being written to by another run"):
        demo(out, config=config, overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    again = demo(out, config=config, seeds=(0,), overwrite=True, log=said.append)
    assert again["runs"][0]["natural"] == record["runs"][0]["natural"]


def test_demo_continues_the_schedule_of_its_warm_up(tmp_path, monkeypatch):
    """A drop at epoch 2 falls in the second epoch after a warm-up of one; one in the warm-up holds from the start."""
    seen = {}
    row = {"epoch": 1, "test_natural": 0.5}
    monkeypatch.setattr(demonstrating, "train", lambda config, out, **_: seen.update({out.name: config}) or [row])
    config = dataclasses.replace(PRESETS["demo"], epochs=4, warmup_epochs=2, lr_drops=(1, 3))
    with pytest.raises(FileNotFoundError):  # nothing was trained
        demo(tmp_path, config=config, log=lambda line: None)
    rates = [config.lr_at(epoch) for epoch in range(4)]
    assert [seen["warmup"].lr_at(epoch) for epoch in range(2)] == pytest.approx(rates[:2])
    assert [seen["at-seed0"].lr_at(epoch) for epoch in range(2)] == pytest.approx(rates[2:])
