"""Tests of part_fast.training.engine, of schedules, accumulation, averages, precision, compile."""

import dataclasses
import math

import pytest
import torch
from conftest import TINY_RUN
from safetensors.torch import load_file

from part_fast.data.memory import to_float
from part_fast.evaluation import trained
from part_fast.evaluation.sanity import agreement_warning, gradient_agreement
from part_fast.training import loop
from part_fast.training.checkpoint import STATE
from part_fast.training.engine import Engine
from part_fast.training.loop import train

pytestmark = pytest.mark.usefixtures("quick_runs")
CPU = torch.device("cpu")
TINY = dataclasses.replace(TINY_RUN, method="at", warmup_epochs=0)


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


def silent(line):
    pass


def weights(folder, name="model.safetensors"):
    return load_file(folder / name)


@pytest.mark.parametrize(("images", "lengths"), [(17, [8, 9]), (9, [9]), (25, [8, 8, 9]), (33, [8, 8, 8, 9])])
def test_a_group_counts_the_single_image_that_joins_it(images, lengths):
    """Of two batches of 8 an update: its gradient is that of the mean over all its images."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(images, 3, 16, 16, generator=generator), torch.arange(images) % 10
    engine = Engine(tiny(batch_size=8, accumulate=2, lr=0.0, weight_decay=0.0), 10, CPU)
    engine.model.eval()
    done = first = 0
    for length in lengths:
        engine.begin(done, images, 0)
        batch = slice(done, done + length)
        engine.backward(torch.nn.functional.cross_entropy(engine.model(x[batch]), y[batch]), length)
        done += length
        if engine._last:
            group = slice(first, done)
            loss = torch.nn.functional.cross_entropy(engine.model(x[group]), y[group])
            (expected,) = torch.autograd.grad(loss, engine.model.linear.weight)
            torch.testing.assert_close(engine.model.linear.weight.grad, expected)
            first = done
        engine.end()
    assert first == done == images


def test_cosine_and_cyclic_rates():
    cosine, cyclic = tiny(schedule="cosine", lr=0.1, epochs=10), tiny(schedule="cyclic", lr=0.1, epochs=10)
    assert [cosine.lr_at(e) for e in (0, 5, 10)] == pytest.approx([0.1, 0.05, 0.0])
    assert cosine.lr_at(2.5) == pytest.approx(0.05 * (1 + math.sqrt(0.5)))
    assert [cyclic.lr_at(e) for e in (0, 2, 4, 7, 10)] == pytest.approx([0.0, 0.05, 0.1, 0.05, 0.0])


def test_the_rate_follows_the_schedule_within_an_epoch():
    engine = Engine(tiny(schedule="cosine", lr=0.1), 10, CPU)
    engine.begin(32, 64, 1)
    assert engine.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi * 1.75 / 2)))
    engine = Engine(tiny(lr=0.1, lr_drops=(1,)), 10, CPU)
    for done, epoch, rate in ((0, 0, 0.1), (32, 0, 0.1), (0, 1, 0.01)):
        engine.begin(done, 64, epoch)
        assert engine.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


@pytest.mark.parametrize(("images", "updates"), [(64, 1), (80, 2), (40, 1)])
def test_accumulated_batches_make_the_gradient_of_one(images, updates, monkeypatch):
    """Also where the last group is short, or its last batch."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(images, 3, 16, 16, generator=generator), torch.arange(images) % 10
    found = []
    for size, accumulate in ((32, 2), (64, 1)):
        torch.manual_seed(0)
        engine = Engine(tiny(batch_size=size, accumulate=accumulate), 10, CPU)
        engine.model.eval()  # BatchNorm's statistics would differ between batches of 32 and of 64
        steps = []
        monkeypatch.setattr(engine.optimizer, "step", lambda steps=steps: steps.append(1))
        engine.scaler = type(
            "", (), {"scale": lambda _, v: v, "step": lambda _, o: o.step(), "update": lambda _: None}
        )()
        gradients = []
        for start in range(0, images, size):
            batch = x[start : start + size]
            engine.begin(start, images, 0)
            with engine.collecting():
                engine.backward(
                    torch.nn.functional.cross_entropy(engine.trained(batch), y[start : start + size]), len(batch)
                )
            before = len(steps)
            engine.end()
            if len(steps) > before:
                gradients.append(engine.model.linear.weight.grad.clone())
        assert len(steps) == updates
        found.append(gradients)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_ema_and_swa_are_what_they_say(tmp_path):
    """After every update, and after every epoch from the second on, from the weights of the runs' own checkpoints."""
    ends = []
    for epochs in (1, 2, 3):
        train(tiny(epochs=epochs, method="at", lr_drops=()), tmp_path / f"{epochs}", log=silent)
        ends.append(weights(tmp_path / f"{epochs}"))
    rows = train(tiny(epochs=3, lr_drops=(), average="swa:2"), tmp_path / "swa", log=silent)
    swa = weights(tmp_path / "swa", "averaged.safetensors")
    for name, value in swa.items():
        assert torch.equal(weights(tmp_path / "swa")[name], ends[2][name]), "averaging changes no training"
        if value.is_floating_point():
            torch.testing.assert_close(value, (ends[1][name] + ends[2][name]) / 2, rtol=1e-5, atol=1e-6)
    assert rows[0]["averaged_natural"] == rows[0]["test_natural"]  # before it begins it is the model
    assert "averaged_pgd20" in rows[0]

    one = tiny(epochs=1, lr_drops=(), batch_size=64, average="ema:0.75")  # one update an epoch
    train(dataclasses.replace(one, epochs=2), tmp_path / "ema", log=silent)
    train(one, tmp_path / "first", log=silent)
    train(dataclasses.replace(one, average="none"), tmp_path / "none", log=silent)
    first, second = weights(tmp_path / "first"), weights(tmp_path / "ema")
    for name, value in weights(tmp_path / "none").items():
        assert torch.equal(value, first[name]), "averaging changes no training, whatever the average forwards"
    for name, value in weights(tmp_path / "ema", "averaged.safetensors").items():
        if "running" in name:  # its own, see tests/test_recipe.py
            continue
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * first[name] + 0.25 * second[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, second[name])  # batches counted: no mean


@pytest.mark.parametrize("average", ["ema:0.9", "swa:1"])
def test_averages_resume(tmp_path, average):
    config = tiny(average=average)
    train(config, tmp_path / "whole", log=silent)
    train(dataclasses.replace(config, epochs=1), tmp_path / "parts", log=silent)
    train(config, tmp_path / "parts", resume=True, log=silent)
    whole, parts = (weights(tmp_path / name, "averaged.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    averaged = trained.load_trained(tmp_path / "whole" / "averaged.safetensors").model.state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in averaged.items())


def test_bf16_run_logs_agreement_and_learns(tmp_path):
    said = []
    rows = train(
        tiny(precision="bf16", train_size=32, epochs=3, batch_size=16, augment=False), tmp_path / "run", log=said.append
    )
    for row in rows:
        assert 0 <= row["zero_gradients"] < 0.05
        assert 0.8 < row["sign_agreement"] < 1
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert all(
        value.dtype == torch.float32 for value in weights(tmp_path / "run").values() if value.is_floating_point()
    )
    plain = train(tiny(epochs=1), tmp_path / "plain", log=silent)
    assert "sign_agreement" not in plain[0]


class Halved(torch.nn.Module):
    """Loses the gradients of half of the pixels, and turns around those of one in eight."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        factor = torch.ones_like(x)
        factor[..., ::2] = 0
        factor[..., 1::8] = -1
        return self.model(x.detach() + (x - x.detach()) * factor)


def test_gradient_agreement_counts():
    engine = Engine(TINY, 10, CPU)
    x, y = torch.rand(4, 3, 16, 16), torch.arange(4)
    same = gradient_agreement(engine.model, engine.model, x, y)
    assert same == {"zero_gradients": 0, "sign_agreement": 1}
    assert agreement_warning(same) is None
    worse = gradient_agreement(engine.model, Halved(engine.model), x, y)
    assert worse["zero_gradients"] == pytest.approx(0.5)
    assert worse["sign_agreement"] == pytest.approx(0.375)
    assert "50.0% of the input gradients have become zero" in agreement_warning(worse)


def test_a_weak_attack_is_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(loop, "gradient_agreement", lambda *_: {"zero_gradients": 0.3, "sign_agreement": 0.6})
    train(tiny(precision="bf16", epochs=1), tmp_path / "run", log=said.append)
    assert "warning: epoch 1, bf16: 30.0% of the input gradients have become zero" in said[1]


def test_compiled_run_trains_as_the_other(tmp_path):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        # 72 images in batches of 32: the last is short, twice; PART after AT; tests in between.
        config = tiny(compile=True, train_size=80, method="part", warmup_epochs=1)
        compiled = train(config, tmp_path / "compiled", log=silent)
    plain = train(dataclasses.replace(config, compile=False), tmp_path / "plain", log=silent)
    for one, other in zip(compiled, plain, strict=True):
        # A sign that rounding turns moves a pixel by twice alpha: losses agree to a part in a thousand.
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=2e-3)


def test_attacks_of_a_trained_model_agree_in_every_precision(tmp_path):
    """Signs above 99 % and robust accuracy within a point."""
    train(tiny(epochs=6, train_size=600, batch_size=64, augment=False), tmp_path / "run", log=silent)
    model, _, data, _ = trained.load_trained(tmp_path / "run", 100)
    from part_fast import AttackModel, pgd
    from part_fast.attacks.ascend import clean_logits

    x, y = to_float(data.images), data.labels
    assert gradient_agreement(model, AttackModel(model), x, y)["sign_agreement"] > 0.99
    bf16 = AttackModel(model, precision="bf16")
    reduced = gradient_agreement(model, bf16, x, y)
    assert reduced["zero_gradients"] < 0.01
    assert reduced["sign_agreement"] > 0.99
    robust = [
        (clean_logits(model, pgd(net, x, y, 8 / 255, steps=5, start="zero")).argmax(1) == y).float().mean()
        for net in (model, AttackModel(model), bf16)
    ]
    assert robust[1] == pytest.approx(float(robust[0]), abs=0.0101)
    assert robust[2] == pytest.approx(float(robust[0]), abs=0.0101)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "step"}, "schedule must be one of piecewise, cosine, cyclic, got 'step'"),
        ({"schedule": "cosine", "released": True}, "released takes schedule piecewise, got 'cosine'"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, auto, got 'fp8'"),
        ({"average": "ema"}, "average must be none, ema:DECAY"),
        ({"average": "ema:1"}, "average must be none, ema:DECAY"),
        ({"average": "swa:0"}, "average must be none, ema:DECAY"),
        ({"average": "none:3"}, "average must be none, ema:DECAY"),
        ({"accumulate": 0}, "accumulate must be >= 1, got 0"),
        ({"cuda_graph": True}, "cuda_graph needs a CUDA model, got one on cpu"),
        ({"precision": "fp16"}, "precision fp16 needs a CUDA model, got one on cpu"),
    ],
)
def test_bad_options_write_nothing(changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        train(tiny(device="cpu", **changes), tmp_path / "run", log=silent)
    assert not (tmp_path / "run" / STATE).exists()
    assert not (tmp_path / "run").exists()
