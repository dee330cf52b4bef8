"""TF32, the choice of algorithms, and what "auto" chooses: set for a training, put back after it."""

import contextlib
import dataclasses
import json
import os

import pytest
import torch
from conftest import TINY_RUN

from part_fast.cli import _parse
from part_fast.config import PRESETS, TrainConfig, read_config
from part_fast.evaluation.sanity import gradient_agreement
from part_fast.precision import algorithms, full_float32, tf32
from part_fast.report.environment import environment, environment_text
from part_fast.training import step
from part_fast.training.loop import train

pytestmark = pytest.mark.usefixtures("quick_runs", "torchs_own_settings")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)
TINY = dataclasses.replace(TINY_RUN, device="cpu", method="at", epochs=1, warmup_epochs=0)


@pytest.fixture
def torchs_own_settings():
    torch.use_deterministic_algorithms(False)
    before = settings()
    yield
    assert settings() == before


def left_by_an_exception():
    return contextlib.suppress(KeyError)


def settings():
    return {
        "convolutions": torch.backends.cudnn.conv.fp32_precision,
        "matrix products": torch.backends.cuda.matmul.fp32_precision,
        "benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def test_full_float32_and_back_also_after_an_exception():
    assert tf32() == {"convolutions": True, "matrix_products": False}  # torch's default
    with left_by_an_exception(), full_float32():
        assert tf32() == {"convolutions": False, "matrix_products": False}
        raise KeyError
    assert torch.backends.cudnn.allow_tf32  # torch's older name of it, which refuses settings that contradict
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    ("device", "deterministic", "without_tf32", "expected"),
    [
        (CUDA, False, False, {"benchmark": True}),
        (CUDA, True, False, {"deterministic": True, "workspace": ":4096:8"}),
        (CUDA, False, True, {"benchmark": True, "convolutions": "ieee", "matrix products": "ieee"}),
        (CPU, False, False, {}),
        (CPU, True, False, {"deterministic": True}),
    ],
)
def test_algorithms(device, deterministic, without_tf32, expected):
    before = settings()
    with left_by_an_exception(), algorithms(device, tf32=not without_tf32, deterministic=deterministic):
        assert settings() == {**before, **expected}
        raise KeyError
    assert settings() == before


def test_determinism_of_the_caller_is_kept():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = settings()
        with algorithms(CUDA, tf32=True, deterministic=False):
            assert settings() == before
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_training_sets_them_and_puts_them_back(tmp_path, monkeypatch):
    seen, real = [], step.batch_loss
    monkeypatch.setattr(step, "batch_loss", lambda *a, **k: seen.append(settings()) or real(*a, **k))
    before = settings()
    train(TINY, tmp_path / "plain", log=str)
    assert all(one == before for one in seen)
    seen.clear()
    train(dataclasses.replace(TINY, deterministic=True, tf32=False), tmp_path / "strict", log=str)
    assert all(one["deterministic"] and one["convolutions"] == "ieee" for one in seen)
    assert settings() == before
    for name, used in (("plain", True), ("strict", False)):
        record = json.loads((tmp_path / name / "environment.json").read_text())
        assert record["tf32"] == {"convolutions": used, "matrix_products": False}


def test_gradient_agreement_compares_with_true_float32():
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x):
            seen.append(tf32()["convolutions"])
            return x.mean((2, 3))

    gradient_agreement(Net(), Net(), torch.rand(2, 3, 4, 4), torch.tensor([0, 1]))
    assert seen == [False, True]  # what is compared runs as it does in training


def test_info_names_it():
    assert "TF32      on CUDA float32 is multiplied in it by convolutions\n" in environment_text(environment())
    with full_float32():
        assert "TF32      on CUDA float32 is multiplied in it by nothing\n" in environment_text(environment())


@pytest.mark.parametrize("bf16", [True, False])
def test_auto_chooses_for_the_device(bf16, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or torch.no_grad())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 and not including_emulation)
    for name, config in PRESETS.items():
        assert (config.precision, config.cuda_graph, config.deterministic, config.tf32) == ("auto", "auto", False, True)
        there = config.on(CUDA)
        assert (there.precision, there.cuda_graph) == ("bf16" if bf16 else "fp32", True), name
        here = config.on(CPU)
        assert (here.precision, here.cuda_graph) == ("fp32", False)
        assert dataclasses.replace(there, precision="auto", cuda_graph="auto") == config  # and nothing else
    assert set(asked) == {CUDA}
    asked_for = TrainConfig(precision="fp16", cuda_graph=False)
    assert asked_for.on(CUDA) == asked_for


def test_the_run_folder_says_what_was_chosen_and_resume_keeps_it(tmp_path):
    rows = train(TINY, tmp_path / "run", log=str)
    assert read_config(tmp_path / "run") == dataclasses.replace(TINY, precision="fp32", cuda_graph=False)
    assert "sign_agreement" not in rows[0]
    train(dataclasses.replace(TINY, precision="bf16"), tmp_path / "other", log=str)
    rows = train(dataclasses.replace(TINY, epochs=2), tmp_path / "other", resume=True, log=str)
    assert "sign_agreement" in rows[1]  # of bf16, though auto would choose fp32 here
    assert read_config(tmp_path / "other").precision == "bf16"
    with pytest.raises(ValueError, match=r"another configuration: precision 'bf16' there, 'fp32' here"):
        train(dataclasses.replace(TINY, precision="fp32", epochs=3), tmp_path / "other", resume=True, log=str)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {}),
        (["--cuda-graph"], {"cuda_graph": True}),
        (["--cuda_graph", "--compile"], {"cuda_graph": True, "compile": True}),
        (["--no-cuda-graph"], {"cuda_graph": False}),
        (["--cuda-graph", "off"], {"cuda_graph": False}),
        (["--cuda-graph=auto"], {}),
        (["--precision", "bf16", "--deterministic"], {"precision": "bf16", "deterministic": True}),
        (["--no-tf32"], {"tf32": False}),
    ],
)
def test_flags(flags, expected):
    config = _parse("train", ["--out", "x", *flags]).config
    assert config == dataclasses.replace(PRESETS["demo"], **expected)


def test_bad_values():
    with pytest.raises(ValueError, match=r"invalid choice 'maybe'.*'on', 'off', 'auto'"):
        _parse("train", ["--out", "x", "--cuda-graph", "maybe"])
    with pytest.raises(ValueError, match="cuda_graph must be True, False or 'auto', got 'on'"):
        TrainConfig(cuda_graph="on").check()
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, fp16, auto, got 'int8'"):
        TrainConfig(precision="int8").check()
