"""`part-fast report`: the page's numbers by hand, what it names as missing, what it refuses, and a real browser."""

import base64
import dataclasses
import hashlib
import html
import io
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_RUN
from PIL import Image
from safetensors.torch import load_file, save_file
from tools import browser

from part_fast import cli
from part_fast.budgets.rules import LearnedRule
from part_fast.evaluation.accuracy import images_sha256
from part_fast.experiments.report import _starts, report
from part_fast.experiments.runs import find_runs, group_runs, read_rows
from part_fast.report import charts, files, page
from part_fast.training.loop import train
from part_fast.training.mask_history import MASKS

ENVIRONMENT = {"part_fast": "0.1.0", "torch": "2.14.1", "threads": 1, "gpus": [], "backends": {"cpu": ["cpp"]}}
EPS = 8 / 255
# Of 4 images, which are right: by seed and attack. AT: 3/4 and 2/4 natural; PART: 4/4 and 3/4.
HITS = {
    ("at", 0): {"natural": [1, 1, 1, 0], "pgd20": [1, 0, 0, 0]},
    ("at", 1): {"natural": [1, 0, 1, 0], "pgd20": [1, 0, 0, 0]},
    ("part", 0): {"natural": [1, 1, 1, 1], "pgd20": [1, 1, 0, 0]},
    ("part", 1): {"natural": [1, 1, 1, 0], "pgd20": [0, 0, 0, 0]},
}


def write_masks(folder, epochs, share):
    """Masks of two images of 8x8, in which the first `share` of the rows keep eps."""
    images = torch.arange(2 * 3 * 64, dtype=torch.uint8).view(2, 3, 8, 8)
    weights = torch.zeros(len(epochs), 2, 1, 8, 8, dtype=torch.uint8)
    weights[..., : round(8 * share), :] = 255
    tensors = {
        "images": images,
        "labels": torch.tensor([0, 1]),
        "epochs": torch.tensor(epochs),
        "weights": weights,
        "eps": torch.tensor([EPS, 7 / 255], dtype=torch.float64),
    }
    save_file(tensors, folder / MASKS, {"class_names": json.dumps(["cat & dog", "<b>"])})


def write_run(folder, method="part", seed=0, epochs=3, done=None, *, sweep=True, **config):
    """A finished run as train and evaluate leave it, with numbers that are made up."""
    folder.mkdir(parents=True)
    done = epochs if done is None else done
    run = dataclasses.replace(TINY_RUN, method=method, seed=seed, epochs=epochs, warmup_epochs=0, **config)
    files.write_json(folder / "config.json", run.to_json())
    files.write_json(folder / "environment.json", ENVIRONMENT)
    names = ("epoch", "method", "lr", "train_loss", "train_robust", "test_natural", "test_pgd20")
    rows = [
        dict(zip(names, (e, method, 0.1, 2 / e, min(0.1 * e, 1.0), min(20 * e + seed, 100) / 100, None), strict=True))
        | {"seconds": 10.0 + seed, "images_per_second": 100.0 * (1 + seed)}
        for e in range(1, done + 1)
    ]
    if rows:
        files.write_csv(folder / "metrics.csv", rows)
    save_file({"w": torch.tensor([float(seed), float(len(method))])}, folder / "model.safetensors")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    hits = HITS.get((method, seed), HITS["part", 0])
    settings = {"sha256": digest, "dataset": "demo", "n": 4, "eps": EPS, "alpha": 2 / 255, "seed": 0}
    results = {
        name: {"accuracy": sum(hit) / 4, "standard_error": 0.1, "correct": sum(hit), "n": 4, "seconds": 2.0}
        for name, hit in hits.items()
    }
    record = {**settings, "results": results, "warnings": [], "environment": ENVIRONMENT}
    files.write_json(folder / "evaluation.json", record)
    tensors = {name: torch.tensor(hit, dtype=torch.bool) for name, hit in hits.items()}
    save_file({**tensors, "labels": torch.tensor([0, 1, 2, 3])}, folder / "evaluation_images.safetensors")
    if sweep:
        points = [
            {"eps": i * EPS, "accuracy": hits / 1000, "standard_error": 0.1, "correct": hits, "n": 1000}
            for i, hits in enumerate((800, 80, 42, 28))
        ]
        curves = {"eps": {"points": points, "warnings": []}}
        files.write_json(folder / "sweep.json", {**settings, "curves": curves, "environment": ENVIRONMENT})
    write_masks(folder, range(1, done + 1), 0.25 if method == "part" else 0.5)
    return folder


@pytest.fixture
def four(tmp_path):
    """A folder of AT and PART with two seeds each."""
    for method, seed in HITS:
        write_run(tmp_path / "runs" / f"{method}-seed{seed}", method, seed)
    return tmp_path / "runs"


def table(text, caption):
    """The rows of the table whose caption begins so, as texts."""
    for found in re.findall(r"<table.*?</table>", text, re.DOTALL):
        if html.unescape(re.search(r"<caption>(.*?)</caption>", found, re.DOTALL)[1]).startswith(caption):
            rows = re.findall(r"<tr.*?</tr>", found, re.DOTALL)
            return [[html.unescape(re.sub("<.*?>", "", c)) for c in re.findall(r"<t[hd].*?</t[hd]>", r)] for r in rows]
    raise AssertionError(f"no table {caption!r}")


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_means_and_spreads_over_seeds(four, tmp_path):
    found = report([four], tmp_path / "page.html")
    assert found == {"warnings": [], "groups": ["at", "part"], "runs": 4}
    header, at, part = table((tmp_path / "page.html").read_text(), "Accuracy on test images")
    assert header == ["run", "seeds", "natural %", "pgd20 %", "eps", "alpha", "images"]
    # Sample standard deviations of (75, 50), (100, 75) and (50, 0): half the distance times the root of 2.
    assert at == ["at", "0, 1", "62.50 ± 17.68", "25.00 ± 0.00", "8/255", "2/255", "4"]
    assert part == ["part", "0, 1", "87.50 ± 17.68", "25.00 ± 35.36", "8/255", "2/255", "4"]


def test_differences_are_paired_and_have_intervals(four, tmp_path):
    from scipy.stats import t

    report([four], tmp_path / "page.html")
    header, natural, pgd20 = table((tmp_path / "page.html").read_text(), "Differences in points")
    # Natural: both seeds gain one image of four. On average over seeds the images gain (0, 0.5, 0, 0.5).
    error = math.sqrt(0 / 2 + np.std([0, 0.5, 0, 0.5], ddof=1) ** 2 / 4)
    widths = [100 * error * t.ppf(1 - 0.025 / m, 1) for m in (1, 2)]
    assert natural == ["part - at", "natural", "2", "+25.00", *(f"± {width:.2f}" for width in widths), "no"]
    assert pgd20[3] == "+0.00"
    assert (header[2], header[5]) == ("seeds", "95 % for all 2")


def test_one_seed_says_nothing_about_chance(tmp_path):
    runs = [write_run(tmp_path / method, method) for method in ("at", "part")]
    report(runs, tmp_path / "page.html")
    _, natural, _ = table((tmp_path / "page.html").read_text(), "Differences in points")
    assert natural[2:4] == ["1", "+25.00"]
    assert natural[5:] == ["unknown", "unknown: one seed"]
    assert table((tmp_path / "page.html").read_text(), "Accuracy")[1][2] == "75.00"  # and no spread of 0


def test_curves_speed_and_sweep(four, tmp_path):
    report([four], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert table(text, "Natural test accuracy")[1] == ["at", "20.50 ± 0.71", "40.50 ± 0.71", "60.50 ± 0.71"]
    assert "Not measured in training: PGD-20 test accuracy." in text
    # Images per second of the two seeds are 100 and 200, seconds per epoch 10 and 11, of three epochs.
    expected = ["at", "150 ± 71", "10.5 ± 0.7", "31.5 ± 2.1", "4.0 ± 0.0"]
    assert table(text, "Images per second")[1] == expected
    header, at, _ = table(text, "PGD-20, over eps")
    assert header == ["run", "0", "8", "16", "24"]
    assert at[1:3] == ["80.00 ± 0.00", "8.00 ± 0.00"]


def test_masks_side_by_side(four, tmp_path):
    report([four], tmp_path / "page.html", mask_epochs=(1, 3))
    text = (tmp_path / "page.html").read_text()
    rows = table(text, "Test images, and after each epoch")
    assert rows[0] == ["image", "run", "epoch 1", "epoch 3"]
    assert rows[1][1:] == ["at, seed 0", "50 %, not used", "50 %, not used"]
    assert rows[2] == ["part, seed 0", "25 %", "25 %"]
    assert "part, seed 0, epoch 3: 25 % keep the full eps" in text
    drawn = [np.asarray(Image.open(io.BytesIO(base64.b64decode(d)))) for d in re.findall(r"base64,([^\"]+)", text)]
    original, mask = drawn[0], drawn[3]
    assert np.array_equal(original, torch.arange(192, dtype=torch.uint8).view(3, 8, 8).permute(1, 2, 0).numpy())
    coloured = np.ptp(mask.astype(int), axis=2) > 20
    assert coloured[:2].all()
    assert not coloured[2:].any()


def test_epochs_that_no_run_has_masks_of_are_named(four, tmp_path):
    said = [
        report([four], tmp_path / "page.html", mask_epochs=epochs, overwrite=True)["warnings"]
        for epochs in ((), (1, 3), (99, 3, 4))
    ]
    assert said[0] == said[1]
    assert [text for text in said[2] if text not in said[0]] == ["No run here has masks of epoch 4, 99."]


def test_a_warm_up_stands_before_the_runs_that_start_from_it(tmp_path):
    warm = write_run(tmp_path / "all" / "warmup", "at", epochs=2)
    (warm / "evaluation.json").unlink()
    for method in ("at", "part"):
        # The path is that of the machine it was trained on.
        write_run(tmp_path / "all" / f"{method}-seed0", method, init="/elsewhere/warmup/model.safetensors", sweep=False)
    found = report([tmp_path / "all"], tmp_path / "page.html")
    assert not any("not evaluated" in warning for warning in found["warnings"])
    text = (tmp_path / "page.html").read_text()
    header, at, part, warmup = table(text, "Natural test accuracy")
    assert header[1:] == ["1", "2", "3", "4", "5"]
    assert warmup[1:] == ["20.00", "40.00", "", "", ""]
    assert part[1:] == ["", "40.00", "20.00", "40.00", "60.00"] == at[1:]
    rows = table(text, "Test images, and after each epoch")
    assert [row[-6:] for row in rows[1:3]] == [
        ["at", *["50 %, not used"] * 5],
        ["part", *["50 %, not used"] * 2, *["25 %"] * 3],
    ]


def test_groups_have_names_of_their_own(tmp_path):
    first = [write_run(tmp_path / "a" / "part", "part"), write_run(tmp_path / "b" / "part", "part", lr=0.5)]
    assert [group.name for group in group_runs(find_runs(first))] == ["a/part", "b/part"]
    others = [write_run(tmp_path / "one" / "x" / "part", "part"), write_run(tmp_path / "two" / "x" / "part", lr=0.5)]
    names = [group.name for group in group_runs(find_runs(others))]
    assert names == ["x/part (lr 0.05)", "x/part (lr 0.5)"]


def test_warm_ups_of_each_seed_do_not_part_a_group_and_other_starts_do(tmp_path):
    starts = ["w-seed0/model.safetensors", "w-seed1/model.safetensors", "other/model.safetensors"]
    runs = [write_run(tmp_path / f"part-seed{i}", seed=i, init=start) for i, start in enumerate(starts)]
    assert [len(group.runs) for group in group_runs(find_runs(runs))] == [2, 1]


def test_groups_that_begin_differently_have_a_row_each(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "all" / f"part-seed{seed}", seed=seed, init=f"w{seed}/model.safetensors")
    found = report([tmp_path / "all"], tmp_path / "page.html")
    assert found["groups"] == [f"all/part (init w{seed}/model.safetensors)" for seed in (0, 1)]
    text = (tmp_path / "page.html").read_text()
    assert [row[1] for row in table(text, "Accuracy")[1:]] == ["0", "1"]
    assert "Without an evaluation" not in text


def test_a_rule_that_each_seed_learned_does_not_part_a_group(tmp_path):
    for seed in (0, 1):
        rule = f"learned:{tmp_path}/learned-seed{seed}.safetensors"
        LearnedRule((8, 8)).save(tmp_path / f"learned-seed{seed}.safetensors")
        write_run(tmp_path / "all" / f"learned-seed{seed}", seed=seed, rule=rule)
        write_run(tmp_path / "all" / f"part-seed{seed}", seed=seed)
    assert report([tmp_path / "all"], tmp_path / "page.html")["groups"] == ["learned", "part"]
    (row,) = [row for row in table((tmp_path / "page.html").read_text(), "What differs") if row[0] == "rule"]
    assert row[1].count("learned:") == 2


def test_runs_that_start_from_each_other_start_anew(tmp_path):
    for name, other in (("a", "b"), ("b", "a"), ("c", "a")):
        write_run(tmp_path / "all" / name, init=str(tmp_path / "all" / other / "model.safetensors"))
    found = find_runs([tmp_path / "all"])
    befores = {folder.name: start and start.name for folder, start in _starts(found).items()}
    assert befores == {"a": None, "b": None, "c": "a"}
    assert report([tmp_path / "all"], tmp_path / "page.html")["runs"] == 3


# --- what is wrong or missing -----------------------------------------------------------------------------------------


def warnings_of(tmp_path, *runs):
    return report(runs, tmp_path / "page.html", overwrite=True)["warnings"]


def test_warnings(tmp_path):
    run = write_run(tmp_path / "all" / "part", epochs=5, done=2)
    assert warnings_of(tmp_path, run) == ["all/part is not finished: 2 of 5 epochs."]
    save_file({"w": torch.zeros(3)}, run / "model.safetensors")
    assert warnings_of(tmp_path, run)[1:] == [
        "The evaluation of all/part is of other weights than the folder holds, and is left out.",
        "The sweep of all/part is of other weights than the folder holds, and is left out.",
    ]
    text = (tmp_path / "page.html").read_text()
    assert "No run of these is evaluated" in text
    assert "Not swept: part." in text
    for name in ("evaluation.json", "sweep.json", "metrics.csv", "environment.json", "masks.safetensors"):
        (run / name).unlink()
    assert warnings_of(tmp_path, run)[1] == "all/part is not evaluated: part-fast evaluate."
    text = (tmp_path / "page.html").read_text()
    for missing in (
        "No run of these is evaluated",
        "No run has finished an epoch",
        "No masks over epochs in the folder: part.",
        "Not swept: part.",
        "No folder holds an environment.json.",
        "0 of 5",
    ):
        assert missing in text


def test_an_evaluation_of_any_weights_in_the_folder_counts(tmp_path):
    run = write_run(tmp_path / "part", sweep=False)
    save_file({"w": torch.zeros(3)}, run / "best.safetensors")
    record = json.loads((run / "evaluation.json").read_text())
    record["sha256"] = hashlib.sha256((run / "best.safetensors").read_bytes()).hexdigest()
    (run / "evaluation.json").write_text(json.dumps(record))
    assert warnings_of(tmp_path, run) == []
    assert table((tmp_path / "page.html").read_text(), "Accuracy")[1][0] == "part, best.safetensors"


def test_what_is_left_out_says_nothing(tmp_path):
    run = write_run(tmp_path / "part")
    for name in ("evaluation.json", "sweep.json"):
        record = json.loads((run / name).read_text())
        record |= {"sha256": "0" * 64, "eps": 1 / 255}
        for part in (record, *record.get("curves", {}).values()):
            part["warnings"] = ["its gradients mislead it"]
        (run / name).write_text(json.dumps(record))
    said = warnings_of(tmp_path, run)
    assert [line for line in said if "left out" not in line] == []
    assert table((tmp_path / "page.html").read_text(), "Images per second")[1][-1] == "-"


def test_a_seed_that_is_there_twice_is_not_paired(tmp_path):
    runs = [write_run(tmp_path / name, method) for name, method in (("at-seed0", "at"), ("part-seed0", "part"))]
    report([*runs, write_run(tmp_path / "part_seed0", "part")], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "Not compared with at, for want of the same seeds, each once" in text
    assert "Differences in points" not in text


@pytest.mark.parametrize("fault", ["cut off", "swapped", "another count"])
def test_images_that_are_not_of_the_evaluation_are_an_error(four, fault, tmp_path):
    path = four / "part-seed1" / "evaluation_images.safetensors"
    images = load_file(path)
    if fault == "cut off":
        path.write_bytes(path.read_bytes()[:-3])
    elif fault == "another count":
        save_file({**images, "pgd20": torch.ones(4, dtype=torch.bool)}, path)
    else:
        record = json.loads((four / "part-seed1" / "evaluation.json").read_text())
        record["images_sha256"] = {name: images_sha256(images["labels"], images[name]) for name in record["results"]}
        (four / "part-seed1" / "evaluation.json").write_text(json.dumps(record))
        report([four], tmp_path / "sound.html")
        save_file({**images, "natural": images["natural"].flip(0)}, path)
    with pytest.raises(ValueError, match=r"evaluation_images\.safetensors") as caught:
        report([four], tmp_path / "page.html")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "page.html").exists()


def test_what_does_not_compare_is_said_and_not_averaged(tmp_path):
    runs = [write_run(tmp_path / f"part-seed{seed}", seed=seed) for seed in (0, 1)]
    path = runs[1] / "evaluation.json"
    record = json.loads(path.read_text())
    record.update(eps=4 / 255, environment={**ENVIRONMENT, "threads": 8}, warnings=["pgd20 is above natural"])
    path.write_text(json.dumps(record))
    found = warnings_of(tmp_path, *runs)
    assert f"{tmp_path.name}/part-seed1 was trained with eps 8/255 and evaluated with 4/255." in found
    assert f"{tmp_path.name}/part-seed1: pgd20 is above natural." in found
    assert "Evaluations have different settings: accuracies of different rows do not compare." in found
    assert "Runs and evaluations differ in their environment: threads." in found
    text = (tmp_path / "page.html").read_text()
    assert [row[:3] for row in table(text, "Accuracy")[1:]] == [["part", "0", "100.00"], ["part", "1", "75.00"]]
    assert "Not compared with part, for want of the same seeds" in text


def test_masks_of_another_eps_and_a_seed_that_is_there_twice(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    config = json.loads((runs[0] / "config.json").read_text())
    for run in runs:
        (run / "config.json").write_text(json.dumps({**config, "eps": 12 / 255}))
    found = warnings_of(tmp_path, *runs)
    assert "part has a seed twice (0, 0): its spread is not one over seeds." in found
    parent = tmp_path.name
    assert f"The masks of {parent}/one are of another eps, 8/255 and 7/255, and are left out." in found
    assert "No masks over epochs" in (tmp_path / "page.html").read_text()


def test_texts_of_files_are_escaped(tmp_path):
    name = "<script>alert(1)</script>&\"'"
    run = write_run(tmp_path / name.replace("/", "|"))
    record = json.loads((run / "evaluation.json").read_text())
    record["warnings"] = [name]
    record["environment"] = {**ENVIRONMENT, "cpu": name}
    (run / "evaluation.json").write_text(json.dumps(record))
    report([run], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text
    assert "<b>" not in text
    assert html.escape(name, quote=False).replace("/", "|").split('"')[0] in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 2


def test_a_run_with_every_column_is_read_as_it_was_written(tmp_path):
    config = dataclasses.replace(TINY_RUN, pgd_test_size=4, average="ema:0.5", precision="bf16")
    plain = train(config, tmp_path / "plain", log=lambda line: None)
    judged = train(dataclasses.replace(config, validation=20), tmp_path / "judged", log=lambda line: None)
    for name, rows in (("plain", plain), ("judged", judged)):
        names = list(dict.fromkeys(key for row in rows for key in row))
        assert read_rows(tmp_path / name / "metrics.csv") == [{key: row.get(key) for key in names} for row in rows]


ROWS = "epoch,method,train_loss,test_natural,seconds,images_per_second\n1,at,2.25,0.5,1.0,9.0\n"


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", '{"methods": 1}', "unknown methods"),
        ("config.json", '{"seed": "<b>"}', "seed"),
        ("metrics.csv", "epoch,method\n1,at\n", "metrics.csv is no table of epochs: 'train_loss' is missing"),
        ("metrics.csv", "epoch,method\nx,at\n", "metrics.csv is no table of epochs"),
        ("metrics.csv", "epoch\n2\n", "epochs are not 1, 2, 3"),
        ("environment.json", "[1]", "environment.json must hold an object, got a list"),
        ("evaluation.json", "{}", "evaluation.json is no evaluation: 'results' is missing"),
        (
            "evaluation.json",
            '{"results": {"pgd20": {"accuracy": 2, "standard_error": 0, "correct": 2, "n": 1}}}',
            "in [0, 1]",
        ),
        ("evaluation.json", '{"results": {"<b>": {}}}', "attacks must be of natural, "),
        ("metrics.csv", ROWS[:-2], "its last line is cut off"),
        ("metrics.csv", ROWS.replace("0.5", "1.5"), "test_natural must be from 0 to 1, got 1.5"),
        ("metrics.csv", ROWS.replace("0.5", "1_0"), "test_natural is '1_0', no number"),
        ("metrics.csv", ROWS.replace("test_natural", "test_naturel"), "a column must be one of epoch, method"),
        ("metrics.csv", ROWS.replace("0.5,", ""), "rows take a cell for each column"),
        ("metrics.csv", ROWS.replace(",at,", ",fat,"), "method must be one of at, "),
        ("metrics.csv", "", "its last line is cut off"),
        ("metrics.csv", ROWS.splitlines()[0] + "\n", "rows take a cell for each column"),
        ("evaluation.json", '{"results": [1]}', "evaluation.json is no evaluation"),
        ("evaluation.json", "\x00", "evaluation.json is not JSON"),
        ("sweep.json", '{"curves": {"eps": {"points": [{"accuracy": 1}]}}}', "sweep.json is no sweep"),
        ("masks.safetensors", "nonsense", "masks.safetensors cannot be read"),
    ],
)
def test_damaged_files_are_one_line_and_no_page(file, content, says, tmp_path, capsys):
    run = write_run(tmp_path / "run")
    (run / file).write_text(content)
    assert cli.main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not (tmp_path / "page.html").exists()


def test_refusals(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    out = tmp_path / "page.html"
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, says in (
        ([run, "--out", tmp_path / "page.pdf"], "out takes an .html file, got"),
        ([tmp_path / "nowhere", "--out", out], "there is no run folder at"),
        ([run / "config.json", "--out", out], "there is no run folder at"),
        ([empty, "--out", out], "holds no run: there is no config.json in it or in a folder in it"),
        ([run, "--out", out, "--mask-epochs", "0"], "mask_epochs must be"),
    ):
        assert cli.main(["report", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
        assert not out.exists()
    assert cli.main(["report", str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"page: {out}\n"
    assert cli.main(["report", str(run), "--out", str(out)]) == 2
    assert "exists: choose another --out or --overwrite" in capsys.readouterr().err
    assert cli.main(["report", str(run), "--out", str(out), "--overwrite"]) == 0


def test_the_same_files_give_the_same_page(four, tmp_path):
    report([four], tmp_path / "one.html")
    report([four, four / "at-seed0"], tmp_path / "two.html")  # a run that is named twice is there once
    first, second = ((tmp_path / name).read_text() for name in ("one.html", "two.html"))
    assert first == second.replace("runs and at-seed0", "runs")
    assert str(tmp_path) not in first


# --- charts -----------------------------------------------------------------------------------------------------------


def test_a_chart_is_drawn_to_its_axes():
    line = charts.Series("<a>", 0, [(1, 0.0), (2, 50.0), (4, 100.0)])
    svg = str(charts.line_chart("t", "epoch", "accuracy", [line]))
    (points,) = re.findall(r'points="([^"]+)"', svg)
    (x1, y1), (x2, y2), (x4, y4) = (map(float, pair.split(",")) for pair in points.split())
    assert (x1, x4) == (charts.LEFT + charts.INSET, charts.WIDTH - charts.RIGHT)
    assert x2 - x1 == pytest.approx((x4 - x1) / 3, abs=0.1)
    assert y2 == pytest.approx((y1 + y4) / 2, abs=0.1)
    assert (y4, y1) == (charts.TOP, charts.HEIGHT - charts.BOTTOM)
    assert re.findall(r"<text[^>]*>([^<]*)</text>", svg) == [
        *["0", "20", "40", "60", "80", "100", "1", "2", "3", "4", "epoch"]
    ]
    assert "&lt;a&gt;" in svg
    assert "<a>" not in svg
    evenly = str(charts.line_chart("t", "eps", "accuracy", [line], even=True))
    assert [float(pair.split(",")[0]) for pair in re.findall(r'points="([^"]+)"', evenly)[0].split()] == [
        charts.LEFT + charts.INSET,
        pytest.approx((charts.LEFT + charts.INSET + charts.WIDTH - charts.RIGHT) / 2, abs=0.1),
        charts.WIDTH - charts.RIGHT,
    ]


@pytest.mark.parametrize("points", [[(1, 0.0)], [(3, 7.0), (4, 7.0)], [(1, 1e-9), (80, 2e-9)], [(0, -1.0), (1, 1e6)]])
def test_charts_of_few_and_flat_and_far_points(points):
    svg = str(charts.line_chart("t", "x", "y", [charts.Series("a", 9, points)]))
    places = [float(v) for pair in re.findall(r'points="([^"]+)"', svg)[0].split() for v in pair.split(",")]
    assert all(0 <= value <= charts.WIDTH for value in places)
    assert "nan" not in svg


def test_large_pictures_are_made_small():
    source = page.picture(torch.zeros(1, 300, 200, dtype=torch.uint8))
    drawn = Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))
    assert drawn.size == (64, 96)


# --- a browser --------------------------------------------------------------------------------------------------------

chromium = pytest.mark.skipif(browser.find_chromium() is None, reason="needs chromium: apt-get install chromium")


@chromium
def test_a_browser_shows_the_page_and_loads_nothing_else(four, tmp_path):
    write_run(four / "a-name-that-is-as-long-as-names-of-runs-can-be-without-any-blank-in-it", epochs=40, lr=0.5)
    found = report([four], tmp_path / "page.html")
    views, console, asked = browser.measure(tmp_path / "page.html", [390, 1280])
    assert console == []
    assert asked == ["/page.html?390", "/page.html?1280"]
    assert [view["width"] for view in views] == [390, 1280]
    for view in views:
        assert view["scroll"] == view["width"], view["wide"]
        assert view["wide"] == []
        assert view["loaded"] == []
        assert (view["broken"], view["unnamed"], view["uncaptioned"], view["scripts"]) == (0, 0, 0, 0)
        # Two images, each with the long run's masks after 7 of its epochs, and the others' after the first.
        assert view["images"] == 2 * (1 + 7 + 1 + 1)
        assert view["charts"] == 4
        assert view["headings"][0] == "H1 part_fast report: runs"
        assert [link.removeprefix("#") for link in view["links"]] == view["ids"][1:]
        for group in found["groups"]:
            assert group in view["text"]


@chromium
def test_a_browser_finds_faults_in_a_page_that_has_some(tmp_path):
    (tmp_path / "page.html").write_text(
        "<h1>Faults</h1><div style='width: 600px'>wide</div><img src='http://127.0.0.1:9/x.png'><table></table>"
        "<svg></svg><link rel='stylesheet' href='other.css'><script>missing()</script>"
    )
    (view,), console, asked = browser.measure(tmp_path / "page.html", [390])
    assert view["scroll"] > view["width"]
    assert view["wide"][0].startswith("<div")
    assert any("other.css" in name for name in view["loaded"])
    assert "/other.css" in asked
    assert (view["broken"], view["unnamed"], view["uncaptioned"], view["scripts"]) == (1, 2, 1, 1)
    assert any("missing is not defined" in line for line in console)


@chromium
def test_a_browser_takes_the_picture_of_the_docs(four, tmp_path):
    report([four], tmp_path / "page.html")
    sizes = []
    for dark in (False, True):
        browser.take_picture(tmp_path / "page.html", tmp_path / "shot.png", 1280, 900, dark)
        drawn = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
        assert drawn.shape == (900, 1280, 3)
        sizes.append(drawn[0, 0].tolist())
        assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 50
    assert sizes == [[255, 255, 255], [0x14, 0x18, 0x1D]]
    in_the_docs = Image.open(ROOT / "docs" / "report.png")
    assert in_the_docs.size[0] == 1080
