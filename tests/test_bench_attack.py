"""bench attack: variants are what their names say, wrong ones are refused before timing, files are written."""

import csv
import json

import pytest
import torch
from PIL import Image
from torch import nn

from part_fast.attack_model import AttackModel
from part_fast.attack_model.cpu import onednn
from part_fast.attack_model.cpu.packed_conv import PackedConv2d
from part_fast.bench import attack, cases
from part_fast.bench.step_cases import settle
from part_fast.models.catalogue import build_model

CPU = torch.device("cpu")
NAMES = [
    "parameter gradients, fp32",
    "input gradients",
    "channels_last",
    *(f"{p}, folded{more}" for p in ("fp32", "bf16") for more in ("", " and packed", ", packed and Winograd")),
]
pytestmark = pytest.mark.usefixtures("one_thread")
needs_onednn = pytest.mark.skipif(not onednn.works(torch.float32), reason="oneDNN does not multiply float32 here")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = build_model("resnet-small")
    settle(net, torch.rand(4, 3, 16, 16))
    return net.eval()


def packed(network):
    return [module for module in network.modules() if isinstance(module, PackedConv2d)]


@needs_onednn
def test_variants_are_what_their_names_say(model):
    found = attack.variants(model)
    assert list(found) == NAMES
    assert [name for name, (_, parameters) in found.items() if parameters] == ["parameter gradients, fp32"]
    assert found["channels_last"][0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    for precision in ("fp32", "bf16"):
        folded, with_packed, whole = (
            found[f"{precision}, folded{more}"][0] for more in ("", " and packed", ", packed and Winograd")
        )
        assert all(isinstance(each, AttackModel) and each.folded for each in (folded, with_packed, whole))
        assert not packed(folded)
        assert packed(with_packed)
        assert not any(conv.by_winograd for conv in packed(with_packed))
        assert any(conv.by_winograd for conv in packed(whole))
    # What the variants leave out is there again.
    assert packed(AttackModel(model))
    assert PackedConv2d.takes(nn.Conv2d(16, 16, 3))


def test_parameters_get_gradients_only_where_asked(model):
    x, y = torch.rand(2, 3, 16, 16), torch.tensor([1, 2])
    for parameters in (True, False):
        model.zero_grad()
        gradient = attack.input_gradient(model, parameters, x, y)
        assert (model.conv1.weight.grad is not None) == parameters
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y), leaf)
        torch.testing.assert_close(gradient, expected)


class Wrong(nn.Module):
    """Another network's logits or gradient."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x):
        return self.change(self.model(x))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("input gradients", lambda logits: 1.001 * logits, "logits"),
        ("input gradients", lambda logits: logits * float("nan"), "logits"),
        ("fp32, folded", lambda logits: Reversed.apply(logits), "gradient"),
        ("bf16, folded, packed and Winograd", lambda logits: logits.roll(1, 1), "logits"),
        ("bf16, folded, packed and Winograd", lambda logits: Reversed.apply(logits), "gradient"),
    ],
)
def test_wrong_variant_is_refused(monkeypatch, name, change, what):
    def planted(model, compile=False, right=attack.variants):
        found = right(model, compile)
        return {**found, name: (Wrong(found[name][0], change), False)}

    monkeypatch.setattr(attack, "variants", planted)
    monkeypatch.setattr(attack, "time_in_turn", lambda *_: pytest.fail("timed"))
    with pytest.raises(cases.MismatchError, match=f"^resnet-small: '{name}' computes something else: {what} off"):
        attack.measure("resnet-small", 2, CPU, 1)


def test_command_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "deep" / "attack"
    rows = attack.attack(out, device="cpu", batch_size=2, quick=True, rounds=2, threads=[1])
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == sorted(attack.FILES)
    assert [row["variant"] for row in rows] == NAMES
    with (out / "attack.csv").open() as file:
        written = list(csv.DictReader(file))
    first = float(written[0]["median_ms"])
    for row, kept in zip(written, rows, strict=True):
        assert {key: str(value) for key, value in kept.items()} == row
        assert float(row["faster"]) == pytest.approx(first / float(row["median_ms"]))
        assert f"{float(row['median_ms']):.1f}" in printed
        assert (row["model"], row["batch"], row["threads"], row["rounds"]) == ("resnet-small", "2", "1", "2")
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert 0.5 < float(row["signs"]) <= 1
    record = json.loads((out / "environment.json").read_text())
    assert record["torch"] == torch.__version__
    expected = {"models": ["resnet-small"], "compile": False, "quick": True, "rounds": 2, "threads": [1]}
    assert record["bench"] == {"device": "cpu", **expected}
    with Image.open(out / "attack.png") as picture:
        assert min(picture.size) > 200
        assert len(set(picture.convert("RGB").resize((64, 64)).get_flattened_data())) > 3
    with pytest.raises(ValueError, match=r"^out must be .*attack\.csv.*--overwrite$"):
        attack.attack(out, device="cpu", quick=True)


def test_command_shows_nothing_after_a_mismatch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attack, "LOGITS_NEAR", {"fp32": 0.0, "bf16": 0.0})
    with pytest.raises(cases.MismatchError, match="resnet-small"):
        attack.attack(tmp_path / "out", device="cpu", batch_size=2, quick=True, rounds=1)
    assert "median" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rounds": 0}, "rounds must be >= 1, got 0$"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0$"),
        ({"threads": [2, 0]}, "threads must be >= 1, got 2, 0$"),
        ({"device": "mps"}, "device takes auto, cpu, cuda or cuda:N, got 'mps'$"),
        ({"models": ["resnet19"]}, "model takes one of .*resnet19"),
    ],
)
def test_errors(tmp_path, given, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        attack.attack(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
