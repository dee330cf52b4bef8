"""What makes networks robust beside the attack: labels, momentum, averages, CutMix, extra images, AWP."""

import contextlib
import copy
import dataclasses
import io
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_RUN, load_once
from safetensors.torch import load_file
from test_resume import cut

from part_fast import awp, distributed
from part_fast.budgets.bank import MaskBank
from part_fast.config import read_config
from part_fast.data import extra
from part_fast.data.mixing import draw_cutmix, probabilities, smooth_labels
from part_fast.methods import METHODS
from part_fast.models.resnet import resnet_small
from part_fast.training import engine as engines
from part_fast.training import loop, step
from part_fast.training.checkpoint import read_state, write_state
from part_fast.training.engine import Engine
from part_fast.training.epoch import epoch_order
from part_fast.training.loop import train
from part_fast.training.step import train_step

CPU = torch.device("cpu")
TINY = dataclasses.replace(TINY_RUN, method="at", warmup_epochs=0, epochs=1, batch_size=8, train_size=40)


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


def silent(line):
    pass


def batch(n=8, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, size, size, generator=generator), torch.arange(n) % 10


def refused(said, **changes):
    with pytest.raises((ValueError, TypeError), match=said) as caught:
        tiny(**changes).check()
    assert "\n" not in str(caught.value)


# --- label smoothing --------------------------------------------------------------------------------------------------


def test_smoothed_labels_are_the_formula():
    y = torch.tensor([2, 0, 1])
    soft = smooth_labels(y, 4, 0.2)
    assert soft.dtype == torch.float32
    torch.testing.assert_close(soft, 0.8 * F.one_hot(y, 4) + 0.05)
    mixed = torch.tensor([[0.25, 0.75, 0.0]])
    torch.testing.assert_close(smooth_labels(mixed, 3, 0.3), 0.7 * mixed + 0.1)
    assert torch.equal(probabilities(y, 4), F.one_hot(y, 4).float())


@pytest.fixture
def seeded(monkeypatch):
    """Networks that start all alike."""
    real = engines.build_model

    def build(*given):
        with torch.random.fork_rng([]):
            torch.manual_seed(7)
            return real(*given)

    monkeypatch.setattr(engines, "build_model", build)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_gets_smoothed_labels_and_the_attack_the_labels(method, monkeypatch, seeded):
    """The loss is the objective of the formula's probabilities; of cross-entropy it is torch's own label_smoothing."""
    config = tiny(method=method, label_smoothing=0.3, beta=2.0)
    seen = []
    real = step.batch_attack
    monkeypatch.setattr(step, "batch_attack", lambda *given: seen.append((given[3], real(*given))) or seen[-1][1])
    x, y = batch()
    loss = train_step(Engine(config, 10, CPU), method, x, y, torch.full((8, 1, 16, 16), 8 / 255)).loss
    ((labels, (x_adv, _)),) = seen
    assert labels is y
    network = Engine(config, 10, CPU).model
    expected = METHODS[method].objective(network, x, x_adv, 0.7 * F.one_hot(y, 10) + 0.03, 2.0)
    torch.testing.assert_close(loss, expected.detach())
    if method == "at":
        torch.testing.assert_close(expected, F.cross_entropy(network(x_adv), y, label_smoothing=0.3))


def test_training_accuracy_counts_the_labels(tmp_path, monkeypatch):
    counted = []
    real = loop.Epoch.add
    monkeypatch.setattr(loop.Epoch, "add", lambda self, *given: counted.append(given) or real(self, *given))
    (row,) = train(tiny(label_smoothing=0.2), tmp_path / "run", log=silent)
    hits = sum(int((logits.argmax(1) == labels).sum()) for _, logits, labels in counted)
    assert row["train_robust"] == hits / 40


# --- Nesterov ---------------------------------------------------------------------------------------------------------


def test_nesterov_is_torch_s():
    x, y = batch()
    found = []
    for nesterov in (False, True):
        torch.manual_seed(0)
        engine = Engine(tiny(nesterov=nesterov, lr=0.1, weight_decay=1e-3, epochs=9), 10, CPU)
        theirs = [parameter.detach().clone() for parameter in engine.model.parameters()]
        for parameter in theirs:
            parameter.requires_grad_()
        optimizer = torch.optim.SGD(theirs, 0.1, momentum=0.9, weight_decay=1e-3, nesterov=nesterov)
        for _ in range(2):
            engine.optimizer.zero_grad()
            train_step(engine, "at", x, y, 8 / 255)
            for parameter, own in zip(theirs, engine.model.parameters(), strict=True):
                parameter.grad = own.grad.clone()
            optimizer.step()
        for parameter, own in zip(theirs, engine.model.parameters(), strict=True):
            torch.testing.assert_close(parameter, own, rtol=1e-5, atol=1e-7)
        found.append(theirs)
    assert not torch.equal(found[0][0], found[1][0])


# --- the average's own BatchNorm statistics ---------------------------------------------------------------------------


def statistics(model):
    return {name: value for name, value in model.named_buffers() if "running" in name or "tracked" in name}


class Watched:
    """Keeps what the model trains on, with the averaged weights that stand there at that moment, and its statistics."""

    def __init__(self, monkeypatch):
        self.seen = []
        real = Engine.measure

        def measure(engine, x_adv):
            self.engine = engine
            state = {name: value.clone() for name, value in engine.averaged.module.state_dict().items()}
            self.seen.append((x_adv.clone(), state, engine._measures))
            real(engine, x_adv)

        monkeypatch.setattr(Engine, "measure", measure)


@pytest.mark.usefixtures("quick_runs")
@pytest.mark.parametrize("method", ["at", "part-t"])
def test_statistics_are_of_the_averaged_model_s_own_forwards(method, tmp_path, monkeypatch):
    """In the last batches of an epoch; before them they are the model's."""
    monkeypatch.setattr(engines, "AVERAGE_BATCHES", 3)
    watched = Watched(monkeypatch)
    train(tiny(method=method, average="ema:0.5", epochs=2, train_size=41), tmp_path / "run", log=silent)
    # 41 images in batches of 8: the single one joins the fifth batch.
    assert [measures for *_, measures in watched.seen] == [False, False, True, True, True] * 2
    by_hand = engines.build_model("resnet-small", 10).to(memory_format=torch.channels_last).train()
    own = None
    for x_adv, state, measures in watched.seen[5:]:
        by_hand.load_state_dict(state)
        if own is not None:
            assert all(torch.equal(value, own[name]) for name, value in statistics(by_hand).items())
        if measures:
            with torch.no_grad():
                by_hand(x_adv)
            own = {name: value.clone() for name, value in statistics(by_hand).items()}
    left = load_file(tmp_path / "run" / "averaged.safetensors")
    assert all(torch.equal(left[name], value) for name, value in own.items())
    theirs = load_file(tmp_path / "run" / "model.safetensors")
    assert not torch.equal(left["bn1.running_mean"], theirs["bn1.running_mean"])


def test_before_the_last_batches_statistics_are_the_model_s(monkeypatch):
    monkeypatch.setattr(engines, "AVERAGE_BATCHES", 1)
    x, y = batch()
    engine = Engine(tiny(average="ema:0.9", lr=0.5), 10, CPU)
    for done in (0, 8, 16):
        train_step(engine, "at", x, y, 8 / 255, done, 32)
        for name, value in statistics(engine.averaged.module).items():
            assert torch.equal(value, statistics(engine.model)[name]), name
    before = statistics(engine.model)["bn1.running_mean"].clone()
    train_step(engine, "at", x, y, 8 / 255, 24, 32)
    assert not torch.equal(statistics(engine.averaged.module)["layer4.0.bn2.running_mean"], before)
    assert not torch.equal(
        statistics(engine.averaged.module)["layer4.0.bn2.running_mean"],
        statistics(engine.model)["layer4.0.bn2.running_mean"],
    )


class Frozen(torch.nn.Module):
    """One BatchNorm that stays frozen and one that does not, and dropout."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
        self.conv2, self.bn2 = torch.nn.Conv2d(4, 4, 3), torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Linear(4, 10)

    def train(self, mode=True):
        super().train(mode)
        self.bn1.training = False
        return self

    def forward(self, x):
        out = F.dropout(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))), 0.5, self.training)
        return self.head(out.mean((2, 3)))


def test_frozen_layers_stay_and_random_numbers_are_as_before(monkeypatch):
    monkeypatch.setattr(engines, "build_model", lambda *_: Frozen())
    x, y = batch()
    ends = []
    for average in ("none", "ema:0.5"):
        torch.manual_seed(3)
        engine = Engine(tiny(average=average), 10, CPU)
        engine.model.train()
        for done in (0, 8, 16):
            train_step(engine, "at", x, y, 8 / 255, done, 24)
        ends.append([*engine.model.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True)), "averaging changes no training"
    averaged = engine.averaged.module
    assert averaged.bn1.num_batches_tracked == 0
    assert torch.equal(averaged.bn1.running_mean, torch.zeros(4))
    assert averaged.bn2.num_batches_tracked == 3
    assert not torch.equal(averaged.bn2.running_mean, engine.model.bn2.running_mean)


@pytest.mark.parametrize("at", [1, 3])
def test_a_skipped_update_leaves_the_average_s_statistics(at, monkeypatch):
    """Of the batches of two updates, the second update's are not finite."""
    x, y = batch()
    engine = Engine(tiny(average="ema:0.5", on_nonfinite="skip", accumulate=2), 10, CPU)
    kept = None
    real = step.batch_attack
    monkeypatch.setattr(
        step, "batch_attack", lambda *given: step.Attacked(real(*given).x_adv * (math.nan if given[2] is bad else 1))
    )
    bad = x + 0
    for i in range(4):
        if i == 2:
            kept = {name: value.clone() for name, value in statistics(engine.averaged.module).items()}
        train_step(engine, "at", bad if i == at and at > 1 else x, y, 8 / 255, 8 * i, 32)
    now = statistics(engine.averaged.module)
    assert all(bool(torch.isfinite(value).all()) for value in now.values())
    same = all(torch.equal(now[name], value) for name, value in kept.items())
    assert same == (at == 3)


@pytest.mark.parametrize("by", ["on_nonfinite", "scaler"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_skipped_update_moves_no_average(at, by, monkeypatch):
    """Nor is it counted: the average begins at the first update that changes something."""
    x, y = batch()
    engine = Engine(tiny(average="ema:0.75", on_nonfinite="skip" if by == "on_nonfinite" else "stop"), 10, CPU)
    if by == "scaler":  # that of fp16, which CUDA alone has otherwise
        engine.scaler = torch.amp.GradScaler("cpu")
    real, done = step.batch_loss, 0

    def spoil(*given, **named):
        found = real(*given, **named)
        return found._replace(loss=found.loss * math.nan) if done == at else found

    monkeypatch.setattr(step, "batch_loss", spoil)
    mean = None
    for done in range(4):
        train_step(engine, "at", x, y, 8 / 255, 8 * done, 320)
        now = [value.detach().clone() for value in engine.model.parameters()]
        if done != at:
            mean = now if mean is None else [0.75 * old + 0.25 * new for old, new in zip(mean, now, strict=True)]
        for value, expected in zip(engine.averaged.module.parameters(), mean or now, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    assert engine.averaged.n_averaged == 3


def test_ema_of_nothing_has_the_model_s_statistics_bit_for_bit():
    """With decay 0 the average is the model, and plain adversarial training forwards the attacked images alone."""
    x, y = batch()
    engine = Engine(tiny(average="ema:0"), 10, CPU)
    for done in (0, 8, 16):
        train_step(engine, "at", x, y, 8 / 255, done, 24)
    pairs = zip(engine.averaged.module.state_dict().items(), engine.model.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for (_, one), other in pairs)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals():
    refused("label_smoothing must be finite and >= 0, got -0.1", label_smoothing=-0.1)
    refused("label_smoothing must be < 1, got 1.0", label_smoothing=1.0)
    refused("nesterov takes a momentum > 0, got 0", nesterov=True, momentum=0.0)


# --- CutMix -----------------------------------------------------------------------------------------------------------


def test_cutmix_mixes_images_maps_and_labels_by_the_same_box():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 10, 12).clone()
    maps = images[:, :1] * 2
    y = torch.tensor([3, 1, 0, 2])
    for seed in range(20):
        torch.manual_seed(seed)
        mix = draw_cutmix(images, 1.0)
        (top, bottom), (left, right) = mix.rows, mix.columns
        inside = torch.zeros(10, 12, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        expected = torch.where(inside, images[mix.partner], images)
        assert torch.equal(mix.images(images), expected)
        assert torch.equal(mix.images(maps), expected[:, :1] * 2)
        # The label says how much of the image is whose, pixel by pixel.
        soft = mix.labels(y, 5)
        torch.testing.assert_close(soft.sum(1), torch.ones(4))
        assert mix.area == inside.double().mean().item()
        for i in range(4):
            counted = sum(F.one_hot(y[int(v)], 5) for v in mix.images(images)[i, 0].flatten()) / 120
            torch.testing.assert_close(soft[i], counted)
    assert sorted(mix.partner.tolist()) == [0, 1, 2, 3]


def test_cutmix_is_drawn_with_its_probability_and_a_uniform_share():
    images = torch.zeros(2, 3, 64, 64)
    drawn = [draw_cutmix(images, 0.3) for _ in range(1000)]
    assert 0.25 < sum(mix is not None for mix in drawn) / 1000 < 0.35
    sides = sorted(mix.rows[1] - mix.rows[0] for mix in (draw_cutmix(images, 1.0) for _ in range(1000)))
    # The whole side is 64 * sqrt(u) of a uniform u, of which the edge of the image cuts off a part.
    assert sides[-1] > 58
    assert draw_cutmix(images, 0.0) is None


@pytest.mark.usefixtures("quick_runs")
@pytest.mark.parametrize("method", ["at", "part", "trades", "mart", "part-m"])
def test_cutmix_in_a_run(method, tmp_path, monkeypatch):
    """Attack and loss get the mixed images and labels; kept maps are mixed by the box; the larger label counts."""
    seen, boxes, kept = [], [], []
    real_step, real_box, real_lookup = loop.train_step, loop.draw_cutmix, MaskBank.lookup
    real_loss = step.batch_loss

    def watch(engine, method, x, y, epsilon, *rest):
        seen.append((x, y, epsilon))
        return real_step(engine, method, x, y, epsilon, *rest)

    monkeypatch.setattr(loop, "train_step", watch)
    monkeypatch.setattr(loop, "draw_cutmix", lambda *given: boxes.append((given[0], real_box(*given))) or boxes[-1][1])
    monkeypatch.setattr(MaskBank, "lookup", lambda self, *given: kept.append(real_lookup(self, *given)) or kept[-1])
    losses = []
    monkeypatch.setattr(step, "batch_loss", lambda *given: losses.append(given[4]) or real_loss(*given))
    refresh = "1" if method.startswith("part") else "batch"
    config = tiny(method=method, cutmix=1.0, label_smoothing=0.1, refresh=refresh, augment=True)
    (row,) = train(config, tmp_path / "run", log=silent)
    assert len(seen) == len(boxes) == 5
    assert 0 <= row["train_robust"] <= 1
    for i, ((x, y, epsilon), (plain, mix), target) in enumerate(zip(seen, boxes, losses, strict=True)):
        assert torch.equal(x, mix.images(plain))
        assert y.shape == (8, 10)
        torch.testing.assert_close(target, 0.9 * y + 0.01)
        if kept:
            assert torch.equal(epsilon, mix.images(kept[i]))
    assert len(kept) == (5 if refresh == "1" else 0)


def test_cutmix_refusals():
    refused("cutmix must be a probability <= 1, got 1.5", cutmix=1.5)
    refused("cutmix must be finite and >= 0, got -1", cutmix=-1.0)
    refused("cutmix must be 0 with attack mma, which takes class indices alone, got 0.5", cutmix=0.5, attack="mma")
    for attack in ("pgi", "warm"):
        refused(f"cutmix must be 0 with attack {attack}, which remembers", cutmix=0.5, attack=attack)


def test_soft_labels_where_none_are_meant_are_one_line():
    x, y = batch()
    soft = probabilities(y, 10)
    with pytest.raises((ValueError, TypeError), match="y must be") as caught:
        train_step(Engine(tiny(attack="mma"), 10, CPU), "at", x, soft, 8 / 255)
    assert "\n" not in str(caught.value)


# --- extra images -----------------------------------------------------------------------------------------------------


def write_extra(path, n=30, compressed=False, **changes):
    generator = np.random.default_rng(0)
    arrays = {
        "image": generator.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8),
        "label": generator.integers(0, 10, n),
        **changes,
    }
    (np.savez_compressed if compressed else np.savez)(path, **{k: v for k, v in arrays.items() if v is not None})
    return arrays


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["int64", "uint8", ">i4"])
def test_extra_images_lie_behind_the_others(compressed, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(extra, "PIECE", 4 * 3 * 32 * 32 + 5)  # four images at once
    path = tmp_path / "extra.npz"
    arrays = write_extra(path, compressed=compressed, label=(np.arange(30) % 10).astype(kind))
    data = load_once("demo", "train").subset(20)
    both = extra.add_extra(data, path)
    assert torch.equal(both.images[:20], data.images)
    assert torch.equal(both.labels[:20], data.labels)
    assert torch.equal(both.images[20:], torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2))
    assert torch.equal(both.labels[20:], torch.arange(30) % 10)
    assert both.images.is_contiguous()


def objects(n):
    return np.array([object()] * n, dtype=object)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image": None, "images": np.zeros(3)}, "must hold image and label, each once, got label, images"),
        ({"label": None}, "must hold image and label, each once, got image"),
        (
            {"label": np.arange(29) % 10},
            r"image in .* must be uint8 \(29, 32, 32, 3\), N >= 1, got uint8 \(30, 32, 32, 3\)",
        ),
        ({"label": np.arange(30) / 3}, r"label in .* must be integers \(N,\), got float64 \(30,\)"),
        ({"label": np.zeros((30, 10), int)}, r"label in .* must be integers \(N,\), got int64 \(30, 10\)"),
        ({"label": np.arange(30)}, "label in .* takes values from 0 to 9, got 29"),
        ({"label": np.arange(30) % 10 - 1}, "label in .* takes values from 0 to 9, got -1"),
        (
            {"image": np.zeros((30, 28, 28, 3), np.uint8)},
            r"must be uint8 \(30, 32, 32, 3\), N >= 1, got uint8 \(30, 28",
        ),
        ({"image": np.zeros((30, 3, 32, 32), np.uint8)}, r"got uint8 \(30, 3, 32, 32\)"),
        ({"image": np.zeros((30, 32, 32, 3), np.float32)}, r"got float32 \(30, 32, 32, 3\)"),
        ({"image": np.asfortranarray(np.zeros((30, 32, 32, 3), np.uint8))}, "must be in C order, got Fortran's"),
        ({"label": objects(30)}, r"label in .* must be integers \(N,\), got object"),
        ({"image": objects(30)}, r"image in .* must be uint8"),
        ({"image": np.zeros((0, 32, 32, 3), np.uint8), "label": np.zeros(0, int)}, "N >= 1"),
    ],
)
def test_extra_files_that_do_not_fit_are_one_line(changes, said, tmp_path):
    write_extra(tmp_path / "extra.npz", **changes)
    with pytest.raises(ValueError, match=said) as caught:
        extra.add_extra(load_once("demo", "train").subset(20), tmp_path / "extra.npz")
    assert "\n" not in str(caught.value)


def test_damaged_extra_files_are_one_line(tmp_path, monkeypatch):
    data, path = load_once("demo", "train").subset(20), tmp_path / "extra.npz"

    def says(said, kind=ValueError):
        with pytest.raises(kind, match=said) as caught:
            extra.add_extra(data, path)
        assert "\n" not in str(caught.value)

    says("extra: there is no file at", FileNotFoundError)
    path.write_bytes(b"no zip")
    says("is no .npz that can be read")
    write_extra(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    says("is no .npz that can be read")
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    says("is no .npz that can be read: Bad CRC-32")
    with zipfile.ZipFile(path, "w") as archive:
        for name, shape in (("label", (5,)), ("image", (5, 32, 32, 3))):
            buffer = io.BytesIO()
            np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
            archive.writestr(f"{name}.npy", buffer.getvalue() + bytes(math.prod(shape) - (name == "image")))
    says("an array is cut off")
    with zipfile.ZipFile(path, "w") as archive:
        for name, shape in (("label", (5,)), ("image", (5, 32, 32, 3))):
            buffer = io.BytesIO()
            np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
            archive.writestr(f"{name}.npy", buffer.getvalue() + bytes(math.prod(shape) + (name == "image")))
    says("an array is longer than its header says")
    write_extra(path)
    monkeypatch.setattr(extra.os, "sysconf", lambda name: 100)
    says(r"must fit into the memory of cpu, 0.0 GB: with the others its 30 images take 0.0 GB")


def test_a_header_of_a_terabyte_takes_no_memory(tmp_path):
    """Labels too are read no further than the file goes."""
    path, count = tmp_path / "extra.npz", 2**40
    with zipfile.ZipFile(path, "w") as archive:
        for name, shape in (("label", (count,)), ("image", (count, 32, 32, 3))):
            buffer = io.BytesIO()
            np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
            archive.writestr(f"{name}.npy", buffer.getvalue() + bytes(100))
    with pytest.raises(ValueError, match="an array is cut off"):
        extra.add_extra(load_once("demo", "train").subset(20), path)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.7, 0.99])
def test_every_batch_has_its_fraction_of_extra_images(fraction):
    config = tiny(extra="x.npz", extra_fraction=fraction)
    order = epoch_order(1000, config, 0, 5000)
    assert len(order) == 1000
    for start in range(0, 1000, 50):
        share = int((order[start : start + 50] >= 1000).sum())
        assert abs(share - 50 * fraction) < 1
    assert len(order.unique()) == 1000, "no image stands there twice"
    assert int(order.max()) < 6000
    few = epoch_order(1000, config, 0, 10)
    assert few[few >= 1000].unique().numel() == (10 if fraction else 0)


@pytest.mark.usefixtures("quick_runs")
def test_resumed_a_run_takes_the_same_extra_images_wherever_they_lie(tmp_path, monkeypatch):
    path, elsewhere, run = tmp_path / "extra.npz", tmp_path / "moved" / "images.npz", tmp_path / "run"
    write_extra(path)
    monkeypatch.chdir(tmp_path)
    config = tiny(extra="extra.npz", epochs=1)
    train(config, run, log=silent)
    go_on = {"out": run, "resume": True, "log": silent}
    assert len(train(dataclasses.replace(config, epochs=2), **go_on)) == 2  # by the same relative name
    elsewhere.parent.mkdir()
    path.rename(elsewhere)
    longer = dataclasses.replace(config, epochs=3, extra=str(elsewhere))
    assert len(train(longer, **go_on)) == 3
    assert read_config(run).extra == str(elsewhere)
    begun = f"extra must be the images that the run was begun with, those of {elsewhere}, got"
    write_extra(tmp_path / "others.npz", label=np.arange(30) % 10)
    with pytest.raises(ValueError, match=rf"{begun} other ones in {tmp_path}/others.npz$"):
        train(dataclasses.replace(longer, epochs=4, extra="others.npz"), **go_on)
    with pytest.raises(ValueError, match=f"{begun} no file$"):
        train(dataclasses.replace(longer, epochs=4, extra=None), **go_on)
    assert len((run / "metrics.csv").read_text().splitlines()) == 4
    # A state of before checksums were kept.
    write_state(run, {name: value for name, value in read_state(run, silent).items() if name not in ("extra", "file")})
    with pytest.raises(ValueError, match=f"{begun} no file$"):
        train(dataclasses.replace(longer, epochs=4, extra=None), **go_on)
    assert len(train(dataclasses.replace(longer, epochs=4), **go_on)) == 4


def test_without_extra_images_the_order_is_torch_s():
    torch.manual_seed(3)
    expected = torch.randperm(50)
    torch.manual_seed(3)
    assert torch.equal(epoch_order(50, tiny(), 0), expected)


@pytest.mark.parametrize("attack", ["pgd", "warm"])
def test_processes_share_extra_images(attack, monkeypatch):
    monkeypatch.setattr(distributed, "same_", lambda value: value.copy_(torch.arange(len(value)).flip(0)))
    monkeypatch.setattr(distributed, "size", lambda: 2)
    config = tiny(extra="x.npz", extra_fraction=0.5, attack=attack)
    orders = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        orders.append(epoch_order(20, config, 0, 100))
    for rank, order in enumerate(orders):
        assert len(order) == 10
        assert [int((order[at : at + 2] >= 20).sum()) for at in range(0, 10, 2)] == [1] * 5
        if attack == "warm":
            assert (order % 2 == rank).all(), "each process has the perturbations of its own samples"
    assert len(torch.cat(orders).unique()) == 20


@pytest.mark.usefixtures("quick_runs")
def test_a_run_with_all_of_it_resumes_exactly(tmp_path, monkeypatch):
    """In mid-epoch, from a relative path, with the validation images of the data set itself."""
    write_extra(tmp_path / "extra.npz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engines, "AVERAGE_BATCHES", 2)
    config = tiny(
        method="part", refresh="1", augment=True, extra="extra.npz", extra_fraction=0.4, cutmix=0.5, awp=0.01, epochs=2,
        awp_warmup=1, average="ema:0.5", label_smoothing=0.1, nesterov=True, validation=10, train_size=50, accumulate=2,
    )  # fmt: skip
    said = []
    rows = train(config, Path("whole"), log=said.append)
    assert "40 training images of 32x32, 10 held out, 30 extra ones, 0.4 of each batch, 0.0 GB with these" in said[0]
    assert [row["images_per_second"] > 0 for row in rows] == [True, True]
    for at in (1, 3, 4, 6, 8, 9):
        monkeypatch.chdir(tmp_path)
        cut(monkeypatch, config, Path(f"cut{at}"), at, saves=range(1, 99))
        torch.manual_seed(12345)
        saved = read_config(tmp_path / f"cut{at}")
        assert saved.extra == str(tmp_path / "extra.npz")
        monkeypatch.chdir("/")
        train(saved, tmp_path / f"cut{at}", resume=True, log=silent)
        for name in ("model", "averaged"):
            whole, parts = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", f"cut{at}"))
            assert all(torch.equal(value, parts[key]) for key, value in whole.items()), (at, name)


def test_extra_refusals(tmp_path):
    refused("extra_fraction must be < 1, got 1.0", extra_fraction=1.0)
    refused("extra_fraction must be finite and >= 0, got -0.1", extra_fraction=-0.1)
    with pytest.raises(FileNotFoundError, match="extra: there is no file at"):
        train(tiny(extra=str(tmp_path / "none.npz")), tmp_path / "run", log=silent)
    assert not (tmp_path / "run").exists()


# --- AWP --------------------------------------------------------------------------------------------------------------


def by_hand(model, gamma, loss):
    """The gradients of Wu et al.'s algorithm 1, on a copy: a layer moves by gamma of its norm along its gradient."""
    proxy = copy.deepcopy(model)
    weights = [p for p in proxy.parameters() if p.ndim > 1]
    gradients = torch.autograd.grad(loss(proxy), weights)
    proxy = copy.deepcopy(model)
    with torch.no_grad():
        for weight, gradient in zip((p for p in proxy.parameters() if p.ndim > 1), gradients, strict=True):
            weight += gamma * weight.norm() * gradient / gradient.norm()
    loss(proxy).backward()
    return proxy


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5])
def test_awp_is_the_formula_and_leaves_the_weights_bit_for_bit(gamma):
    model = resnet_small().train()
    x, y = batch()

    def loss(of=model):
        return F.cross_entropy(of(x), y)

    expected = by_hand(model, gamma, loss)
    before = copy.deepcopy(model.state_dict())
    with awp(model, gamma, loss):
        moved = [not torch.equal(p, before[name]) for name, p in model.named_parameters()]
        value = loss()
        value.backward()
    assert moved == [p.ndim > 1 and gamma > 0 for p in model.parameters()]
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, before[name])
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6 * float(theirs.grad.abs().max()) + 1e-7)
    # BatchNorm sees the batch once, at the perturbed weights.
    for name, value in statistics(model).items():
        torch.testing.assert_close(value, statistics(expected)[name])
    assert model.bn1.num_batches_tracked == 1
    with pytest.raises(RuntimeError, match="weights are lost"), awp(model, 0.1, loss):
        raise RuntimeError("weights are lost")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_awp_under_autocast_sees_the_perturbed_weights():
    """Autocast keeps casts of weights, which are others in the block and behind it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10))
    x, y = batch(size=4)
    with torch.autocast("cpu", torch.bfloat16):
        first = model(x)
        with awp(model, 0.5, lambda: F.cross_entropy(model(x).float(), y)):
            inside = model(x)
        after = model(x)
    assert torch.equal(first, after)
    assert not torch.equal(first, inside)


def test_awp_leaves_what_has_no_finite_gradient_and_refuses_what_it_cannot_use():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    unused = torch.nn.ModuleDict({"used": model, "unused": torch.nn.Linear(2, 2)})
    x = torch.rand(4, 3)
    before = [p.detach().clone() for p in unused.parameters()]
    for factor in (float("nan"), float("inf"), 0.0):
        with awp(unused, 0.1, lambda factor=factor: (model(x) * factor).sum()):
            assert all(torch.equal(p, own) for p, own in zip(unused.parameters(), before, strict=True))
    for loss, said in ((lambda: 3.0, "float"), (lambda: model(x), r"a tensor \(4, 2\)"), (lambda: x.sum(), "tensor")):
        with pytest.raises(ValueError, match=f"loss must give a scalar that depends on the weights, got .*{said}"):
            awp(model, 0.1, loss).__enter__()
    with pytest.raises(ValueError, match="gamma must be finite and >= 0, got -1"):
        awp(model, -1, lambda: model(x).sum()).__enter__()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        awp([model], 1, lambda: model(x).sum()).__enter__()


@pytest.mark.parametrize("method", METHODS)
def test_a_step_with_awp_has_the_gradients_of_the_formula(method, monkeypatch, seeded, one_thread):
    config = tiny(method=method, awp=0.05, lr=0.0, weight_decay=0.0, beta=2.0, accumulate=2)
    seen = []
    real = step.batch_attack
    monkeypatch.setattr(step, "batch_attack", lambda *given: seen.append(real(*given)) or seen[-1])
    engine = Engine(config, 10, CPU)
    total = None
    for i in range(2):
        x, y = batch(seed=i)
        start = copy.deepcopy(engine.model)
        train_step(engine, method, x, y, torch.full((8, 1, 16, 16), 8 / 255), 8 * i, 16)
        proxy = by_hand(start, 0.05, lambda of, x=x, y=y: METHODS[method].objective(of, x, seen[-1].x_adv, y, 2.0) / 2)
        gradients = [
            p.grad - (0 if q.grad is None else q.grad)
            for p, q in zip(proxy.parameters(), start.parameters(), strict=True)
        ]
        total = gradients if total is None else [a + b for a, b in zip(total, gradients, strict=True)]
    for own, expected in zip(engine.model.parameters(), total, strict=True):
        torch.testing.assert_close(own.grad, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()) + 1e-6)


def test_awp_begins_after_its_warm_up(monkeypatch):
    entered = []
    monkeypatch.setattr(engines, "awp", lambda *given: entered.append(given[1]) or contextlib.nullcontext())
    x, y = batch()
    engine = Engine(tiny(awp=0.01, awp_warmup=2), 10, CPU)
    for epoch in range(4):
        train_step(engine, "at", x, y, 8 / 255, epoch=epoch)
    assert entered == [0.01, 0.01]


def test_awp_where_updates_are_skipped():
    x, y = batch()
    engine = Engine(tiny(awp=0.01, on_nonfinite="skip"), 10, CPU)
    before = copy.deepcopy(engine.model.state_dict())
    step.train_step(engine, "at", x, y, 8 / 255)
    assert not torch.equal(engine.model.conv1.weight, before["conv1.weight"])
    kept = copy.deepcopy(engine.model.state_dict())
    with torch.no_grad():
        engine.model.linear.bias.fill_(float("inf"))
    kept["linear.bias"] = engine.model.linear.bias.detach().clone()
    step.train_step(engine, "at", x, y, 8 / 255)
    assert int(engine.skipped) == 1
    assert all(torch.equal(value, kept[name]) for name, value in engine.model.state_dict().items())


def test_awp_refusals():
    refused("awp must be finite and >= 0, got -0.1", awp=-0.1)
    refused("awp_warmup must be >= 0, got -1", awp_warmup=-1)
