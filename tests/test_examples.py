"""The examples run, on the packages as they are on PyPI, and print what their readers are told to expect.

Each runs in a process of its own, as a user starts it. One whose package is not installed is skipped and says so;
`make test-examples` installs them all.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import part_fast

FOLDER = ROOT / "examples"
# What pip calls the package that each example needs, by the name of its import.
NEEDS = {
    "with_accelerate": {"accelerate": "accelerate"},
    "with_autoattack": {"pyautoattack": "pyautoattack"},
    "with_grad_cam": {"pytorch_grad_cam": "grad-cam"},
    "with_lightning": {"lightning": "lightning"},
    "with_robustbench": {"robustbench": "robustbench", "pyautoattack": "pyautoattack"},
    "with_timm": {"timm": "timm"},
    "with_torchattacks": {"torchattacks": "torchattacks"},
    "with_torchcam": {"torchcam": "torchcam", "torchvision": "torchvision"},
    "with_torchvision": {"torchvision": "torchvision"},
}
slow = pytest.mark.slow


@functools.cache
def said(name):
    """What an example prints."""
    for module, package in NEEDS.get(name, {}).items():
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{package} is not installed")
    # On the CPU, and with the checkout's part_fast in every process that the example starts.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(FOLDER / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "UserWarning" not in "".join(line for line in done.stderr.splitlines() if "part_fast" in line), done.stderr
    return done.stdout


def numbers(pattern, text):
    """The groups of every match, as floats."""
    found = [tuple(map(float, match.groups())) for match in re.finditer(pattern, text)]
    assert found, text
    return found


def test_torchattacks():
    text = said("with_torchattacks")
    assert "within its map: True" in text
    assert numbers(r"PartPGD fools (\d+)%", text)[0] > (0,)
    assert "targeted: the wrong class's logit rises: True" in text


def test_loops_of_trades_and_mart():
    text = said("trades_and_mart_loops")
    losses = numbers(r"(?:TRADES|MART)(?: with a CamBudget)?: loss ([\d.]+), then ([\d.]+)", text)
    assert len(losses) == 4
    assert all(second < first for first, second in losses)


def test_grad_cam():
    text = said("with_grad_cam")
    assert "a class and an object agree: True" in text
    ((share,),) = numbers(r"EigenCAM of an AttackModel: (\d+)%", text)
    assert 0 < share < 100
    assert "overlay: (32, 32, 3) uint8" in text


def test_torchcam():
    text = said("with_torchcam")
    ((share,),) = numbers(r"SmoothGradCAM\+\+: (\d+)%", text)
    assert 0 < share < 100
    ((difference,),) = numbers(r"theirs and ours: largest difference (\S+)", text)
    assert difference < 1e-4
    assert "overlay: (32, 32) RGB" in text


@slow
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_networks(library):
    text = said(f"with_{library}")
    found = numbers(r"\w+: loss ([\d.]+), copy off by (\S+), after a step by (\S+)", text)
    assert len(found) == 4
    for loss, before, after in found:
        assert 0 < loss < 100
        # Folded BatchNorms and channels_last round otherwise, over some 50 layers.
        assert max(before, after) < 1e-3


def test_lightning():
    text = said("with_lightning")
    ((robust,),) = numbers(r"robust accuracy (\d+)%", text)
    assert 0 <= robust <= 100
    assert "state_dict holds ['model']" in text


def test_accelerate():
    text = said("with_accelerate")
    (first,), (second,) = numbers(r"epoch \d: loss ([\d.]+)", text)
    assert second < first
    # bf16 decides ties otherwise.
    assert numbers(r"agree on (\d+)%", text)[0] >= (96,)
    assert "11 BatchNorms are folded" in text


@slow
def test_ddp():
    assert "2 processes, loss" in said("with_ddp")
    assert "equal weights: True" in said("with_ddp")


@slow
def test_mnist():
    text = said("mnist")
    assert "images (1, 28, 28), map (1, 28, 28), eps 0.25 to 0.30" in text
    (first,), (second,) = numbers(r"epoch \d: loss ([\d.]+)", text)
    assert second < first


@slow
def test_learned_eps():
    text = said("learned_eps")
    ((uniform, learned),) = numbers(r"uniform eps ([\d.]+), under the learned one ([\d.]+)", text)
    assert learned > uniform
    assert "its mean 8.00/255" in text


@slow
def test_autoattack():
    text = said("with_autoattack")
    ((clean, robust),) = numbers(r"clean (\d+)%, robust (\d+)%", text)
    assert robust < clean
    assert numbers(r"its own class: (\d+)%", text) == [(robust,)]


def test_robustbench():
    text = said("with_robustbench")
    assert text.count("equal logits True") == 4
    ((clean, robust),) = numbers(r"benchmark: clean (\d+)%, robust (\d+)%", text)
    assert clean == 100
    assert robust < clean


def test_a_published_silu_network_is_robustbench_s():
    """RobustBench's own WideResNet of Gowal et al., Rebuffi et al. and Wang et al., whose weights ours loads."""
    zoo = pytest.importorskip(
        "robustbench.model_zoo.architectures.dm_wide_resnet", reason="robustbench is not installed: make test-examples"
    )
    mean, std = zoo.CIFAR10_MEAN, zoo.CIFAR10_STD
    theirs = zoo.DMWideResNet(num_classes=10, depth=28, width=10, activation_fn=zoo.Swish).eval()
    with torch.no_grad():
        for name, value in theirs.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            elif value.dim() == 1:
                value.uniform_(-0.5, 1.5)
        ours = part_fast.models.build_model("wrn-28-10-silu", 10, mean=mean, std=std).eval()
        part_fast.models.load_weights(ours, theirs.state_dict())
        x = torch.rand(2, 3, 32, 32)
        # float32 convolutions of images that are padded elsewhere: 2e-7 of logits of 1 were seen.
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_training_checkpoints():
    text = said("training_checkpoints")
    assert "a dictionary: loaded" in text
    for kind, named in (("Namespace", "argparse.Namespace"), ("numpy scalar", "scalar"), ("whole model", "ResNet")):
        assert re.search(rf"^{kind}: it holds .*{named}.*: torch\.save\(torch\.load\('model.pt'", text, re.MULTILINE)
    assert "\x1b" not in text
    assert "weights alone: equal True" in text


@slow
def test_from_cpp():
    for program in ("cmake", "c++"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on PATH")
    if "cpp" not in part_fast.available_backends():
        pytest.skip("part_fast._C is not built")
    text = said("from_cpp")
    assert re.findall(r"^(\w+) .*: equal bit for bit (\w+)$", text, re.MULTILINE) == [
        (name, "True") for name in ("cam", "mask", "eps", "bits", "x_adv", "projected")
    ]
    ((moved, mean),) = numbers(r"at most ([\d.]+)/255, mean eps ([\d.]+)/255", text)
    assert moved == 8
    assert 7 < mean < 8


def test_every_example_has_a_test():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    asked = set(re.findall(r'\bsaid\("(\w+)"\)', tests))
    assert {path.stem for path in FOLDER.glob("*.py")} == asked | {"with_torchvision", "with_timm"}


def test_examples_stay_short():
    for path in FOLDER.glob("*.py"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 80, path.name
        assert lines[0].startswith('"""'), path.name
