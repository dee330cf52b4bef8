"""What makes networks robust beside the attack: label smoothing, Nesterov, the average's BatchNorm statistics."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_RUN
from safetensors.torch import load_file

from part_fast.data.mixing import probabilities, smooth_labels
from part_fast.methods import METHODS
from part_fast.training import engine as engines
from part_fast.training import loop, step
from part_fast.training.engine import Engine
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
    loss = train_step(Engine(config, 10, CPU), method, x, y, torch.full((8, 1, 16, 16), 8 / 255))
    ((labels, x_adv),) = seen
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
    monkeypatch.setattr(step, "batch_attack", lambda *given: real(*given) * (float("nan") if given[2] is bad else 1))
    bad = x + 0
    for i in range(4):
        if i == 2:
            kept = {name: value.clone() for name, value in statistics(engine.averaged.module).items()}
        train_step(engine, "at", bad if i == at and at > 1 else x, y, 8 / 255, 8 * i, 32)
    now = statistics(engine.averaged.module)
    assert all(bool(torch.isfinite(value).all()) for value in now.values())
    same = all(torch.equal(now[name], value) for name, value in kept.items())
    assert same == (at == 3)


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
