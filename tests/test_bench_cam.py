"""bench cam: every provider's maps are compared before it is timed, numbers are consistent, files are written."""

import csv
import json

import pytest
import torch
from PIL import Image

from part_fast.bench import cam, cases, clocks, published
from part_fast.budgets.cam import CamBudget
from part_fast.ops.cam import METHODS

pytest.importorskip("pytorch_grad_cam", reason="the grad-cam package is not installed")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_images(monkeypatch):
    monkeypatch.setattr(cam, "SIZE", 16)


@pytest.mark.parametrize("method", METHODS)
def test_providers_compute_the_same(method):
    rows = cam.measure("resnet-small", 2, method, CPU, 1)
    names = [row["provider"] for row in rows]
    assert names == [name for name in cam.PROVIDERS if name != "published" or method == "gradcam"]


def never(*_):
    pytest.fail("timed")


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (
            lambda patch: patch.setattr(
                published, "published_epsilon_map", lambda *a, f=published.published_epsilon_map, **k: f(*a, **k) + 1e-6
            ),
            "the eps map of published differs in 100% of the values",
        ),
        (
            lambda patch: patch.setattr(
                cam, "AttackModel", lambda model, made=cam.AttackModel: made(torch.nn.Sequential(Flip(), model))
            ),
            "the eps map of CamBudget, AttackModel differs in",
        ),
        (
            lambda patch: patch.setitem(cam.PACKAGE_CLASSES, "gradcam", "EigenCAM"),
            "the maps of grad-cam are off by up to",
        ),
    ],
    ids=["published", "AttackModel", "grad-cam"],
)
def test_wrong_provider_is_refused(monkeypatch, plant, says):
    plant(monkeypatch)
    monkeypatch.setattr(cam, "time_in_turn", never)
    with pytest.raises(cases.MismatchError, match=f"^resnet-small, gradcam: {says}.*: not timed$"):
        cam.measure("resnet-small", 2, "gradcam", CPU, 1)


class Flip(torch.nn.Module):
    def forward(self, x):
        return x.flip(3)


def test_wrong_cam_budget_is_refused(monkeypatch):
    """As the unit of the others it is compared with both: here its eps are those of the images in another order."""
    monkeypatch.setattr(CamBudget, "__call__", lambda self, x, call=CamBudget.__call__: call(self, x).flip(0))
    monkeypatch.setattr(cam, "time_in_turn", never)
    with pytest.raises(cases.MismatchError, match="the eps map of published differs in"):
        cam.measure("resnet-small", 2, "gradcam", CPU, 1)


def test_hooks_of_the_others_are_not_in_the_way(monkeypatch):
    """What grad-cam and the published loop hang on a network would run in every forward of the others."""
    model = cam.build_model("resnet-small").eval()
    calls = cam.providers(model, torch.rand(2, 3, 16, 16), "gradcam")
    for call in calls.values():
        call()
    assert not any(module._forward_hooks for module in model.modules())


def test_seconds_are_of_one_of_several_calls(monkeypatch):
    class Clock(clocks.CpuClock):
        step_seconds_at_least = 4.0

        def seconds(self, one_pass, passes):
            one_pass()
            return 2.0 * passes

    monkeypatch.setattr(cam, "clock_for", lambda device: Clock())
    rows = cam.measure("resnet-small", 2, "gradcam", CPU, 2)
    for row in rows:
        assert row["calls"] == 2
        assert row["median_ms"] == 2000
        assert row["forwards"] == row["times_cam_budget"] == 1
        assert row["images_per_s"] == 1


def test_command_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "deep" / "cam"
    sizes, methods = (1, 3), ("gradcam", "layercam")
    rows = cam.cam(out, device="cpu", batch_sizes=sizes, methods=methods, quick=True, rounds=2, threads=[1])
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == sorted(cam.FILES)
    assert [(row["batch"], row["method"]) for row in rows if row["provider"] == "forward"] == [
        (size, method) for size in sizes for method in methods
    ]
    with (out / "cam.csv").open() as file:
        written = list(csv.DictReader(file))
    for row, kept in zip(written, rows, strict=True):
        assert {key: "" if value is None else str(value) for key, value in kept.items()} == row
        assert any(
            line.startswith(row["provider"]) and f"{float(row['median_ms']):.1f}" in line
            for line in printed.splitlines()
        )
        case = [r for r in rows if (r["batch"], r["method"]) == (kept["batch"], kept["method"])]
        assert kept["forwards"] == pytest.approx(kept["median_ms"] / case[0]["median_ms"])
        assert kept["times_cam_budget"] == pytest.approx(kept["median_ms"] / case[1]["median_ms"])
        assert kept["images_per_s"] == pytest.approx(1e3 * kept["batch"] / kept["median_ms"])
        assert (kept["peak_bytes"] is None) == (kept["provider"] in ("grad-cam", "published"))
        assert kept["peak_bytes"] is None or kept["peak_bytes"] > 0
    record = json.loads((out / "environment.json").read_text())
    expected = {"models": ["resnet-small"], "methods": list(methods), "batches": list(sizes), "threads": [1]}
    assert record["bench"] == {"device": "cpu", "quick": True, "rounds": 2, **expected}
    with Image.open(out / "cam.png") as picture:
        assert min(picture.size) > 200
        assert len(set(picture.convert("RGB").resize((64, 64)).get_flattened_data())) > 3
    with pytest.raises(ValueError, match=r"^out must be .*cam\.csv.*--overwrite$"):
        cam.cam(out, device="cpu", quick=True)


def test_without_grad_cam_the_rest_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cam.importlib.util, "find_spec", lambda name: None)
    rows = cam.cam(tmp_path, device="cpu", batch_sizes=[1], quick=True, rounds=1)
    assert [row["provider"] for row in rows] == [name for name in cam.PROVIDERS if name != "grad-cam"]
    assert "not measured: grad-cam is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rounds": 0}, "rounds must be >= 1, got 0$"),
        ({"batch_sizes": [1, 0]}, "batch_sizes must be >= 1, got 1, 0$"),
        ({"threads": [2, 0]}, "threads must be >= 1, got 2, 0$"),
        ({"methods": ["eigencam"]}, "methods must be among gradcam, .*, got eigencam$"),
        ({"device": "mps"}, "device takes auto, cpu, cuda or cuda:N, got 'mps'$"),
        ({"models": ["resnet19"]}, "model takes one of .*resnet19"),
    ],
)
def test_errors(tmp_path, given, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        cam.cam(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
