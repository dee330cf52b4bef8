"""The masks that a run keeps of a few test images after every epoch: right, complete after a stop, without a trace."""

import dataclasses
import json

import pytest
import torch
from conftest import TINY_RUN, load_once
from safetensors.torch import load_file, save_file

from part_fast.budgets.cam import CamBudget
from part_fast.data.memory import to_float
from part_fast.models.catalogue import build_model
from part_fast.training import loop, run_folder
from part_fast.training.mask_history import IMAGES, MASKS, pair_of, read_masks

pytestmark = pytest.mark.usefixtures("quick_runs")


def train(folder, **changes):
    how = {name: changes.pop(name) for name in ("resume", "overwrite") if name in changes}
    return loop.train(dataclasses.replace(TINY_RUN, **changes), folder, log=lambda line: None, **how)


def by_hand(folder, **config):
    """The masks of the network that the run ended with."""
    config = dataclasses.replace(TINY_RUN, **config)
    net = build_model(config.model, 10)
    net.load_state_dict(load_file(folder / "model.safetensors"))
    few = load_once("demo", "test", None, False).subset(config.test_size).subset(IMAGES)
    return few, CamBudget(net, 1.0, 0.0, rule=config.mask_rule)(to_float(few.images))


@pytest.mark.parametrize("changes", [{}, {"method": "at"}, {"released": True}, {"rule": "soft"}])
def test_they_are_the_masks_of_the_model_after_each_epoch(changes, tmp_path):
    train(tmp_path, **changes)
    history = read_masks(tmp_path)
    few, weights = by_hand(tmp_path, **changes)
    assert torch.equal(history.images, few.images)
    assert torch.equal(history.labels, few.labels)
    assert history.class_names == list(few.class_names)
    assert history.epochs.tolist() == [1, 2]
    assert history.eps.tolist() == [TINY_RUN.eps, TINY_RUN.eps_low]
    # Steps of 1/255, and a hair for the division by eps - eps_low.
    torch.testing.assert_close(history.weights[-1] / 255, weights, atol=0.51 / 255, rtol=0)
    if changes.get("rule") != "soft":
        assert set(history.weights.unique().tolist()) == {0, 255}
    assert (tmp_path / MASKS).stat().st_size < 40_000


def test_a_plain_method_with_a_smaller_eps_has_masks_too(tmp_path):
    train(tmp_path, method="at", eps=4 / 255)
    history = read_masks(tmp_path)
    assert history.eps.tolist() == [1.0, 0.0] == list(pair_of(dataclasses.replace(TINY_RUN, method="at", eps=4 / 255)))
    assert torch.equal(history.weights[-1] == 255, by_hand(tmp_path, method="at", eps=4 / 255)[1] == 1)


def test_keeping_them_changes_nothing_else(tmp_path, monkeypatch):
    with_masks = train(tmp_path / "with", control="permuted")
    monkeypatch.setattr(run_folder, "keep_masks", lambda *arguments: None)
    without = train(tmp_path / "without", control="permuted")
    for row in (*with_masks, *without):
        del row["seconds"], row["images_per_second"]
    assert with_masks == without
    names = [tmp_path / name / "model.safetensors" for name in ("with", "without")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_resumed_run_has_them_as_one_that_never_stopped(tmp_path):
    train(tmp_path / "whole", epochs=3)
    train(tmp_path / "parts", epochs=1)
    first = (tmp_path / "parts" / MASKS).read_bytes()
    train(tmp_path / "parts", epochs=3, resume=True)
    whole = (tmp_path / "whole" / MASKS).read_bytes()
    assert (tmp_path / "parts" / MASKS).read_bytes() == whole
    # Stopped between the masks of an epoch and its state, a run repeats the epoch: no epoch is there twice.
    train(tmp_path / "again", epochs=1)
    (tmp_path / "again" / MASKS).write_bytes(whole)
    train(tmp_path / "again", epochs=3, resume=True)
    assert (tmp_path / "again" / MASKS).read_bytes() == whole
    # A damaged file begins anew, and says so by the epochs that it lacks.
    train(tmp_path / "damaged", epochs=2)
    (tmp_path / "damaged" / MASKS).write_bytes(first[:-5])
    train(tmp_path / "damaged", epochs=3, resume=True)
    assert read_masks(tmp_path / "damaged").epochs.tolist() == [2, 3]


def test_overwriting_a_run_removes_its_masks_and_its_sweep(tmp_path, monkeypatch):
    train(tmp_path)
    (tmp_path / "sweep.json").write_text("{}")
    monkeypatch.setattr(run_folder, "keep_masks", lambda *arguments: None)
    train(tmp_path, overwrite=True)
    assert not (tmp_path / MASKS).exists()
    assert not (tmp_path / "sweep.json").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"weights": torch.zeros(2, 3, 1, 32, 32, dtype=torch.uint8)},
        {"weights": torch.zeros(2, 4, 1, 32, 31, dtype=torch.uint8)},
        {"weights": torch.zeros(2, 4, 1, 32, 32)},
        {"epochs": torch.tensor([1])},
        {"labels": torch.tensor([0, 1, 2, 10])},
        {"eps": torch.tensor([1.0])},
        {"images": torch.zeros(4, 2, 32, 32, dtype=torch.uint8)},
    ],
)
def test_a_file_of_other_tensors_is_refused_in_one_line(change, tmp_path):
    good = {
        "images": torch.zeros(4, 3, 32, 32, dtype=torch.uint8),
        "labels": torch.tensor([0, 1, 2, 9]),
        "epochs": torch.tensor([1, 2]),
        "weights": torch.zeros(2, 4, 1, 32, 32, dtype=torch.uint8),
        "eps": torch.tensor([0.1, 0.0], dtype=torch.float64),
    }
    names = {"class_names": json.dumps([str(i) for i in range(10)])}
    save_file(good, tmp_path / MASKS, names)
    assert read_masks(tmp_path) is not None
    save_file(good | change, tmp_path / MASKS, names)
    with pytest.raises(ValueError, match=r"masks.safetensors is no history of masks: images \("):
        read_masks(tmp_path)
    save_file(good, tmp_path / MASKS)
    with pytest.raises(ValueError, match=r"masks.safetensors cannot be read: 'class_names'"):
        read_masks(tmp_path)
