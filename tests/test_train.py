"""train: what a run folder holds, that training trains, that a resumed run is the same run, what is refused."""

import csv
import dataclasses
import json
import math
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN as TINY
from conftest import load_once
from PIL import Image
from safetensors.torch import load_file

from part_fast.attacks.catalogue import ATTACKS
from part_fast.budgets.bank import MaskBank
from part_fast.budgets.cam import CamBudget
from part_fast.config import read_config
from part_fast.data.catalogue import load
from part_fast.data.memory import to_float
from part_fast.evaluation import trained
from part_fast.evaluation.trained import load_trained
from part_fast.experiments.runs import read_rows
from part_fast.methods import METHODS
from part_fast.models.catalogue import build_model
from part_fast.models.weights_file import read_about
from part_fast.report import files
from part_fast.training import loop, step
from part_fast.training.checkpoint import PREVIOUS, STATE
from part_fast.training.loop import train
from part_fast.training.mask_history import MASKS
from part_fast.training.run_folder import LOCK, RUN_FILES
from part_fast.training.step import batch_attack, batch_epsilon, batch_loss

pytestmark = pytest.mark.usefixtures("quick_runs")


def attacked_loss(method, model, x, y, epsilon, config):
    """The loss of a training step, whose attack runs on the model itself."""
    return batch_loss(method, model, x, batch_attack(method, model, x, y, epsilon, config), y, config).loss


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, rows) of a run with everything on."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, train(tiny(pgd_test_size=10), folder, tensorboard=True, log=lambda line: None)


def test_run_folder_holds_what_it_should(finished):
    folder, rows = finished
    names = {path.name for path in folder.iterdir()}
    assert set(RUN_FILES) <= names
    assert [name for name in names if name.startswith("events.out.tfevents")]
    assert not [name for name in names if name.endswith(".tmp")]
    config = dataclasses.replace(tiny(pgd_test_size=10), precision="fp32", cuda_graph=False)  # chosen for a CPU
    assert json.loads((folder / "config.json").read_text()) == config.to_json()
    record = json.loads((folder / "environment.json").read_text())
    assert record["torch"] == torch.__version__
    assert record["backends"]["cpu"][-1] == "reference"
    build_model("resnet-small", 10).load_state_dict(weights(folder))

    with (folder / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == ["at", "part"]
    for said, row in zip(table, rows, strict=True):
        assert {key: str(value) for key, value in row.items()} == said
        assert 0 <= row["train_robust"] <= 1
        assert 0 <= row["test_natural"] <= 1
        assert row["test_pgd20"] * 10 == pytest.approx(round(row["test_pgd20"] * 10))  # of ten images
        assert row["images_per_second"] == pytest.approx(64 / row["seconds"])


def test_folder_is_the_same_but_for_times_when_run_again(finished, tmp_path):
    folder, rows = finished
    again = train(tiny(pgd_test_size=10), tmp_path / "run", log=lambda line: None)
    times = {"seconds": 0, "images_per_second": 0}
    assert [{**row, **times} for row in again] == [{**row, **times} for row in rows]
    assert_same_weights(weights(folder), weights(tmp_path / "run"))


ACCURACIES = ("test_natural", "test_pgd20", "averaged_natural", "averaged_pgd20")
ON_VALIDATION = ("validation_pgd20", "validation_averaged_pgd20")


def test_tests_every_few_epochs_and_after_the_last_change_nothing_else(tmp_path):
    config = tiny(method="at", epochs=5, warmup_epochs=0, pgd_test_size=10, validation=10, average="ema:0.5")
    said = []
    always = train(config, tmp_path / "always", log=lambda line: None)
    seldom = train(dataclasses.replace(config, test_every=2), tmp_path / "seldom", log=said.append)
    for before, now in zip(always, seldom, strict=True):
        assert list(before) == list(now)
        tested = now["epoch"] in (2, 4, 5)
        for name in (*ACCURACIES, *ON_VALIDATION):
            assert before[name] is not None
            assert now[name] == (before[name] if tested else None), (name, now["epoch"])
        assert now["train_loss"] == before["train_loss"]
        (line,) = [line for line in said if line.startswith(f"epoch {now['epoch']}/5")]
        assert ("test natural" in line, "PGD-20" in line) == (tested, tested)
    for name in ("model.safetensors", "averaged.safetensors"):
        assert_same_weights(load_file(tmp_path / "always" / name), load_file(tmp_path / "seldom" / name))
    read = read_rows(tmp_path / "seldom" / "metrics.csv")
    assert [row["test_natural"] for row in read] == [row["test_natural"] for row in seldom]
    tested = [row for row in seldom if row["epoch"] in (2, 4, 5)]
    best = max(tested, key=lambda row: max(row[name] for name in ON_VALIDATION))  # of equals the first
    assert read_about(tmp_path / "seldom" / "best.safetensors")["epoch"] == best["epoch"]


def test_a_run_that_is_cut_short_is_tested_at_its_end(tmp_path):
    config = tiny(method="at", epochs=5, warmup_epochs=0, test_every=5, validation=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Checkpoints, "save", _stopping_after(2, loop.Checkpoints.save))
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", log=lambda line: None)
    with pytest.raises(FileNotFoundError, match="held out, from the first test on"):
        load_trained(tmp_path / "run", weights="best")
    rows = train(dataclasses.replace(config, epochs=2), tmp_path / "run", resume=True, log=lambda line: None)
    assert [row["test_natural"] is None for row in rows] == [True, False]
    assert [row["test_natural"] for row in read_rows(tmp_path / "run" / "metrics.csv")][1] == rows[1]["test_natural"]
    whole = train(dataclasses.replace(config, epochs=2), tmp_path / "whole", log=lambda line: None)
    times = {"seconds": 0, "images_per_second": 0}
    assert [{**row, **times} for row in rows] == [{**row, **times} for row in whole]
    assert read_about(tmp_path / "run" / "best.safetensors")["epoch"] == 2
    again = train(dataclasses.replace(config, epochs=2), tmp_path / "run", resume=True, log=lambda line: None)
    assert again == rows


def _stopping_after(epochs, save):
    def stop(self, epoch):
        save(self, epoch)
        if epoch.number == epochs:
            raise KeyboardInterrupt

    return stop


def test_seconds_of_an_epoch_end_when_its_device_is_done(tmp_path, monkeypatch):
    waits = loop.refuse_bad_loss

    def wait(*arguments):  # for what is queued, as on a GPU
        time.sleep(0.25)
        waits(*arguments)

    monkeypatch.setattr(loop, "refuse_bad_loss", wait)
    monkeypatch.setattr(loop, "LOOK_EVERY", 1000)
    rows = train(tiny(batch_size=64), tmp_path / "run", log=lambda line: None)  # one batch an epoch, two looks
    assert all(row["seconds"] > 0.5 for row in rows)


def test_a_run_with_cuda_graphs_goes_on_on_a_cpu_without_them(tmp_path):
    config = tiny(method="at", epochs=1, warmup_epochs=0)
    train(config, tmp_path / "run", log=lambda line: None)
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cuda_graph": True}))
    state = torch.load(tmp_path / "run" / STATE, weights_only=True)
    state["config"]["cuda_graph"] = True
    torch.save(state, tmp_path / "run" / STATE)
    begun = dataclasses.replace(read_config(tmp_path / "run"), epochs=2, device="cpu")
    assert begun.cuda_graph
    assert len(train(begun, tmp_path / "run", resume=True, log=lambda line: None)) == 2
    assert read_config(tmp_path / "run").cuda_graph is False


def test_what_watches_for_overfitting_looks_in_tests_alone(tmp_path):
    config = tiny(method="at", attack="fgsm", epochs=3, warmup_epochs=0, test_every=2)
    rows = train(config, tmp_path / "run", log=lambda line: None)
    assert [row["train_pgd10"] is None for row in rows] == [True, False, False]


def test_a_run_that_was_over_goes_on_with_its_own_tests(tmp_path):
    config = tiny(method="at", epochs=1, warmup_epochs=0, test_every=2)
    train(config, tmp_path / "run", log=lambda line: None)
    rows = train(dataclasses.replace(config, epochs=4), tmp_path / "run", resume=True, log=lambda line: None)
    assert [row["test_natural"] is None for row in rows] == [False, False, True, False]  # the first was the last once
    with pytest.raises(ValueError, match="another configuration: test_every 2 there, 1 here"):
        train(dataclasses.replace(config, epochs=5, test_every=1), tmp_path / "run", resume=True)


@pytest.mark.parametrize("method", METHODS)
def test_loss_falls_on_real_images(method, tmp_path):
    config = tiny(method=method, epochs=6, warmup_epochs=0, augment=False, batch_size=16, beta=1.0)
    rows = train(config, tmp_path / "run", log=lambda line: None)
    # Ten classes: chance is ln 10 = 2.3 nats for the cross-entropy methods; MART adds its boosting term.
    assert rows[-1]["train_loss"] < 0.85 * rows[0]["train_loss"]
    assert rows[-1]["train_robust"] > rows[0]["train_robust"]
    assert all(row["method"] == method for row in rows)


def test_seeds_and_methods_differ(finished, tmp_path):
    folder, _ = finished
    for i, change in enumerate(({"seed": 1}, {"method": "at"}, {"augment": False})):
        train(tiny(pgd_test_size=10, **change), tmp_path / str(i), log=lambda line: None)
        assert any(not torch.equal(v, weights(folder)[k]) for k, v in weights(tmp_path / str(i)).items()), change


@pytest.mark.parametrize("method", ["part", "part-t"])
def test_one_epoch_and_one_resumed_are_two_epochs(method, tmp_path):
    config = tiny(method=method)
    whole = train(config, tmp_path / "whole", log=lambda line: None)
    train(dataclasses.replace(config, epochs=1), tmp_path / "parts", log=lambda line: None)
    torch.manual_seed(12345)  # what happened to the global generator in between must not matter
    parts = train(config, tmp_path / "parts", resume=True, log=lambda line: None)
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert [row["train_loss"] for row in whole] == [row["train_loss"] for row in parts]
    states = [torch.load(tmp_path / name / STATE, weights_only=True) for name in ("whole", "parts")]
    buffers = [[entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()] for state in states]
    assert all(torch.equal(one, other) for one, other in zip(*buffers, strict=True))
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["epochs"] == 2
    assert len(json.loads((tmp_path / "parts" / "environment.json").read_text())["resumed"]) == 1


def test_interrupted_in_the_second_epoch_resumes_exactly(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    train(TINY, whole, log=lambda line: None)
    real, calls = batch_loss, []

    def stop_at_the_fourth(*arguments, **named):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(step, "batch_loss", stop_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, tmp_path / "cut", log=lambda line: None)
    rows = train(TINY, tmp_path / "cut", resume=True, log=lambda line: None)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert_same_weights(weights(whole), weights(tmp_path / "cut"))


def test_interrupted_before_the_first_checkpoint_starts_again(tmp_path, monkeypatch):
    def stop(*arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(step, "batch_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, tmp_path / "run", log=lambda line: None)
    assert len(train(TINY, tmp_path / "run", resume=True, log=lambda line: None)) == 2


def test_stopped_in_its_first_epoch_a_run_starts_again_from_its_checkpoint(finished, tmp_path, monkeypatch):
    folder, _ = finished
    config = tiny(init=str(folder / "model.safetensors"), seed=1, epochs=1)
    train(config, tmp_path / "whole", log=lambda line: None)

    def stop(*arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(step, "batch_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "cut", log=lambda line: None)
    train(config, tmp_path / "cut", resume=True, log=lambda line: None)
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    # Once it has a state, the checkpoint may be gone.
    longer = dataclasses.replace(config, epochs=2)
    moved = folder / "moved.safetensors"
    (folder / "model.safetensors").rename(moved)
    try:
        train(longer, tmp_path / "cut", resume=True, log=lambda line: None)
    finally:
        moved.rename(folder / "model.safetensors")


@pytest.mark.parametrize("method", ["at", "part", "part-t"])
@pytest.mark.parametrize(("images", "batch", "accumulate"), [(33, 32, 1), (17, 8, 2), (9, 8, 3), (5, 2, 1)])
def test_a_last_single_image_joins_the_batch_before(method, images, batch, accumulate, tmp_path, one_pixel_maps):
    config = tiny(method=method, epochs=1, warmup_epochs=0, train_size=images, batch_size=batch, accumulate=accumulate)
    (row,) = train(config, tmp_path / "run", log=lambda line: None)
    assert math.isfinite(row["train_loss"])
    assert sum(one_pixel_maps) == images
    assert min(one_pixel_maps) > 1


@pytest.mark.parametrize(("changes", "name"), [({"batch_size": 1}, "batch_size"), ({"train_size": 1}, "train_size")])
def test_single_images_are_refused_where_a_batch_norm_sees_one_pixel(changes, name, tmp_path, one_pixel_maps):
    with pytest.raises(ValueError, match=f"{name} must be >= 2 for resnet-small on images of 32x32: Expected more"):
        train(tiny(**changes), tmp_path / "run", log=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_single_images_train_where_their_maps_are_larger(tmp_path):
    (row,) = train(tiny(epochs=1, batch_size=1, train_size=3), tmp_path / "run", log=lambda line: None)
    assert math.isfinite(row["train_loss"])


@pytest.fixture
def one_pixel_maps(monkeypatch):
    """Networks whose last BatchNorm sees one pixel; gives the lengths of the batches that are trained on."""
    from part_fast.training import engine

    def build(name, classes):
        model = build_model(name, classes)
        model.layer4.insert(0, torch.nn.AdaptiveAvgPool2d(1))
        return model

    lengths = []
    real = loop.train_step

    def counted(engine, method, x, *rest):
        lengths.append(len(x))
        return real(engine, method, x, *rest)

    monkeypatch.setattr(engine, "build_model", build)
    monkeypatch.setattr(loop, "train_step", counted)
    return lengths


def test_killed_between_state_and_weights_is_mended_on_resume(tmp_path):
    run = tmp_path / "run"
    train(TINY, run, log=lambda line: None)
    before = contents(run)
    (run / "model.safetensors").write_bytes(b"old")
    (run / "metrics.csv").unlink()
    train(TINY, run, resume=True, log=lambda line: None)
    after = contents(run)
    assert after["model.safetensors"] == before["model.safetensors"]
    assert after["metrics.csv"] == before["metrics.csv"]


def test_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fill_the_disk():
        with files.replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        fill_the_disk()
    assert contents(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize(
    ("changes", "how", "says"),
    [
        ({}, {}, "already holds a run"),
        ({}, {"resume": True, "overwrite": True}, "exclude each other"),
        ({"lr": 0.5}, {"resume": True}, r"another configuration: lr 0\.05 there, 0\.5 here"),
        ({"seed": 3, "method": "at"}, {"resume": True}, "method 'part' there, 'at' here; seed 0 there, 3 here"),
        ({"epochs": 1}, {"resume": True}, "epochs must be at least the 2"),
        ({"eps_low": 1.0}, {"overwrite": True}, "eps_low must be <= eps"),
        ({"model": "vgg"}, {"overwrite": True}, "model takes one of resnet18"),
        ({"dataset": "mnist"}, {"overwrite": True}, "data set takes one of demo"),
        ({"train_size": 60_000}, {"overwrite": True}, "train_size takes an integer from 1 to 6000"),
        ({"device": "tpu"}, {"overwrite": True}, "device takes auto"),
    ],
)
def test_refusals_write_nothing(finished, changes, how, says):
    folder, _ = finished
    before = contents(folder)
    with pytest.raises(ValueError, match=says):
        train(tiny(pgd_test_size=10, **changes), folder, **how)
    assert contents(folder) == before


def test_refusals_make_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        train(TINY, tmp_path / "run", resume=True)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file at .*absent\.pt"):
        train(tiny(init=str(tmp_path / "absent.pt")), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="cifar10 not found: looked for"):
        train(tiny(dataset="cifar10", root=str(tmp_path)), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        train(TINY, tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_damaged_states_are_one_line(tmp_path):
    train(tiny(epochs=1), tmp_path / "run", log=lambda line: None)
    for name in (STATE, PREVIOUS):
        (tmp_path / "run" / name).write_bytes(b"nothing that torch wrote")
    with pytest.raises(
        ValueError, match=f"{STATE} is damaged.*{PREVIOUS} is damaged.*--overwrite starts anew"
    ) as error:
        train(TINY, tmp_path / "run", resume=True)
    assert "\n" not in str(error.value)


def test_overwrite_replaces_the_run_and_what_was_made_of_it_alone(tmp_path):
    run = tmp_path / "run"
    train(TINY, run, log=lambda line: None)
    stale = [
        "evaluation.json",
        "evaluation.csv",
        "evaluation_images.safetensors",
        "evaluation_aa_1.pt",
        "events.out.tfevents.1",
    ]
    for name in [*stale, "notes.txt"]:
        (run / name).write_text("kept?")
    train(tiny(epochs=1, seed=1), run, overwrite=True, log=lambda line: None)
    names = {path.name for path in run.iterdir()}
    assert names == {*RUN_FILES, LOCK, MASKS, "notes.txt"}
    assert len((run / "metrics.csv").read_text().splitlines()) == 2


def test_init_starts_from_a_checkpoint(finished, tmp_path):
    folder, _ = finished
    init = str(folder / "model.safetensors")
    train(tiny(init=init, lr=0.0, epochs=1), tmp_path / "run", log=lambda line: None)
    own, start = weights(tmp_path / "run"), weights(folder)
    for name in own:
        if "running" not in name and "tracked" not in name:
            assert torch.equal(own[name], start[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_perturbation_obeys_its_map(method, monkeypatch):
    """The images of the last train-mode forward lie within each pixel's eps of the natural ones, some on the bound."""
    data = load_once("demo", "train").subset(16)
    x, y = to_float(data.images), data.labels
    model = build_model("resnet-small", 10).train()
    config = tiny(steps=10)
    maps, inputs = [], []
    real = CamBudget.with_logits

    def keep_map(budget, *arguments):
        maps.append(real(budget, *arguments))
        return maps[-1]

    def keep_input(module, arguments):
        if module.training:
            inputs.append(arguments[0].detach().clone())

    monkeypatch.setattr(CamBudget, "with_logits", keep_map)
    model.register_forward_pre_hook(keep_input)
    budget = CamBudget(model, config.eps, config.eps_low)
    epsilon = batch_epsilon(method, budget, None, torch.arange(len(x)), None, config)
    attacked_loss(method, model, x, y, epsilon, config)
    assert model.training
    change = (inputs[-1] - x).abs()
    rounding = 1e-7  # of x + eps near 1 in float32
    assert bool((change > config.eps - rounding).any())
    if not method.startswith("part"):
        assert not maps
        assert bool((change <= config.eps + rounding).all())
        return
    ((eps, _),) = maps
    assert sorted(eps.unique().tolist()) == pytest.approx([config.eps_low, config.eps])
    assert bool((change <= eps + rounding).all())


@pytest.mark.parametrize("method", METHODS)
def test_robust_accuracy_is_that_of_the_adversarial_forward(method):
    data = load_once("demo", "train").subset(8)
    x, y = to_float(data.images), data.labels
    model = build_model("resnet-small", 10)
    inputs = []
    model.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0].detach().clone()))
    epsilon = batch_epsilon(method, CamBudget(model), None, torch.arange(len(x)), None, tiny(steps=2))
    attacked = batch_attack(method, model, x, y, epsilon, tiny(steps=2))
    logits = batch_loss(method, model, x, attacked, y, tiny(steps=2)).logits.detach()
    assert not torch.equal(inputs[-1], x)
    model.train()
    assert torch.allclose(model(inputs[-1]), logits, atol=1e-5)  # one batch, the same batch statistics
    assert math.isfinite(float(logits.sum()))


@pytest.mark.parametrize("attack", ["pgd", "mma"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_every_attack_gives_gradients(method, attack):
    data = load_once("demo", "train").subset(10)
    x, y = to_float(data.images), data.labels
    config = tiny(steps=1, attack=attack, method=method)
    model = build_model("resnet-small", 10)
    epsilon = batch_epsilon(method, CamBudget(model), None, torch.arange(10), None, config)
    loss = attacked_loss(method, model, x, y, epsilon, config)
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_kept_masks_follow_their_images_and_the_refresh(tmp_path, monkeypatch):
    """--refresh 2 fills the bank in every second epoch after the warm-up; each batch gets its own masks."""
    fills, maps = [], []
    fill, lookup = MaskBank.fill, MaskBank.lookup

    def count(bank, budget, images, *arguments):
        fills.append(len(maps))
        return fill(bank, budget, images, *arguments)

    def keep(bank, indices, drawn):
        maps.append((indices, drawn, lookup(bank, indices, drawn), bank.bits.clone()))
        return maps[-1][2]

    monkeypatch.setattr(MaskBank, "fill", count)
    monkeypatch.setattr(MaskBank, "lookup", keep)
    config = tiny(method="part", epochs=4, warmup_epochs=1, steps=1, refresh="2", augment=True, train_size=40)
    train(config, tmp_path / "run")
    per_epoch = len(maps) // 3
    assert fills == [0, 2 * per_epoch]
    assert sorted(torch.cat([indices for indices, *_ in maps[:per_epoch]]).tolist()) == list(range(40))
    assert all(drawn is not None for _, drawn, *_ in maps)
    assert torch.equal(maps[0][3], maps[per_epoch][3])
    assert not torch.equal(maps[0][3], maps[2 * per_epoch][3])


def test_kept_masks_are_part_of_the_checkpoint(tmp_path):
    whole = tiny(method="part", epochs=3, warmup_epochs=0, steps=1, refresh="3")
    train(whole, tmp_path / "whole")
    train(dataclasses.replace(whole, epochs=1), tmp_path / "parts")
    train(whole, tmp_path / "parts", resume=True)
    expected, got = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(got[key], value) for key, value in expected.items())


@pytest.mark.parametrize("control", ["none", "inverted"])
def test_control_of_kept_masks(control):
    model = build_model("resnet-small", 10)
    data = load_once("demo", "train").subset(10)
    config = tiny(method="part", refresh="1", control=control)
    budget = CamBudget(model, config.eps, config.eps_low)
    bank = MaskBank(10, (32, 32), 1, config.eps, config.eps_low)
    bank.fill(budget, data.images)
    eps = batch_epsilon("part", budget, bank, torch.arange(10), None, config)
    kept = bank.lookup(torch.arange(10))
    expected = kept if control == "none" else (config.eps + config.eps_low) - kept
    assert torch.equal(eps, expected)


@pytest.mark.parametrize(("attack", "highest"), [("pgd", 1 + 8 / 255), ("mma", 1.0)])
def test_released_start_is_not_within_the_map_and_that_of_pgd_is_not_clipped(attack, highest, monkeypatch):
    starts = []
    row = dataclasses.replace(
        ATTACKS[attack], run=lambda model, x, y, eps, alpha, steps, start, seed: starts.append(start) or x
    )
    monkeypatch.setitem(ATTACKS, attack, row)
    x = torch.ones(4, 3, 32, 32)
    model = build_model("resnet-small", 10)
    config = tiny(method="part", attack=attack, released=True)
    epsilon = torch.zeros(4, 1, 32, 32)
    attacked_loss("part", model, x, torch.arange(4), epsilon, config)
    moved = (starts[0] - x).abs()
    assert starts[0].max() == pytest.approx(highest, abs=1e-3)
    assert 0.9 * config.eps < moved.max() <= config.eps + 1e-6
    # The warm-up has the start of a library, which clips.
    attacked_loss("at", model, x, torch.arange(4), config.eps, config)
    assert starts[1] == "uniform"


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """A folder of images per class in pets, in the folder that the process is in; nothing else is searched."""
    here = tmp_path / "here"
    pictures = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8).numpy()
    for split in ("train", "test"):
        for i, picture in enumerate(pictures):
            place = here / "data" / "pets" / split / ("cat", "dog")[i % 2] / f"{i}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(place)
    monkeypatch.chdir(here)
    monkeypatch.delenv("PART_FAST_DATA", raising=False)
    monkeypatch.setattr(loop, "load", load)  # not those kept by quick_runs
    monkeypatch.setattr(trained, "load", load)
    return here


@pytest.mark.parametrize(
    ("dataset", "root"),
    [
        ("folder:data/pets", None),
        ("folder:pets", "data"),
        ("folder:pets", None),
        ("cifar10", None),
        ("cifar10", "data"),
    ],
)
def test_a_run_finds_its_data_set_from_another_folder(dataset, root, pets, tmp_path, monkeypatch):
    if dataset == "folder:pets" and root is None:
        monkeypatch.chdir("data")
    if dataset == "cifar10":
        for name in ("data_batch_1", "test_batch"):
            content = [bytes([i % 2]) + bytes(range(192)) * 16 for i in range(4)]
            Path(f"data/{name}.bin").write_bytes(b"".join(content))
    run = tmp_path / "runs" / "x"
    config = tiny(
        dataset=dataset, root=root, method="at", epochs=1, warmup_epochs=0, train_size=4, test_size=4, precision="fp32"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there are fewer images than published
        train(config, run, log=lambda line: None)
        monkeypatch.chdir(tmp_path / "runs")
        assert len(load_trained(Path("x")).data) == 4
        rows = train(dataclasses.replace(read_config(run), epochs=2), run, resume=True, log=lambda line: None)
        assert len(rows) == 2

        (pets / "data").rename(tmp_path / "moved")
        with pytest.raises(FileNotFoundError) as caught:
            load_trained(Path("x"))
        assert "name the folder that holds it now by --root" in str(caught.value)
        assert str(pets) in str(caught.value)
        assert "\n" not in str(caught.value)
        if dataset == "folder:data/pets":
            (tmp_path / "moved").rename(tmp_path / "data")
            assert len(load_trained(Path("x"), root="..").data) == 4
        else:
            assert len(load_trained(Path("x"), root="../moved").data) == 4


def test_a_run_whose_data_set_needs_no_root_records_none(finished):
    assert read_config(finished[0]).root is None
