"""Networks of torchvision, timm and the user's own: by name in runs and commands, what is refused, what is not run."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN, load_once
from safetensors.torch import load_file, save_file

from part_fast.cli import main
from part_fast.config import read_config
from part_fast.data.memory import to_float
from part_fast.evaluation.accuracy import evaluate
from part_fast.evaluation.trained import load_trained
from part_fast.models import build_model, load_weights
from part_fast.models.external import check_network
from part_fast.report import files
from part_fast.training.loop import train

pytestmark = pytest.mark.usefixtures("quick_runs")

NETWORKS = """
import pathlib
import torch
from torch import nn

pathlib.Path(__file__).with_name("imported").touch()


class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.again = self.features  # a second name
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class Pair(Net):
    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


def build(num_classes):
    return Net(num_classes)


def other(classes):
    return Net(classes)


def eleven(num_classes):
    return Net(11)


def image(num_classes):
    return nn.Conv2d(3, num_classes, 3)


def large(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, num_classes))


def still(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def nothing(num_classes):
    pass


number = 3
"""
NAME = "nets_of_a_test"
TINY = [
    *("--train-size", "8", "--test-size", "8", "--steps", "1", "--batch-size", "4", "--epochs", "1"),
    *("--warmup-epochs", "0", "--pgd-test-size", "0", "--device", "cpu"),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder that the process is in, which holds a module of networks; it is forgotten afterwards."""
    (tmp_path / f"{NAME}.py").write_text(NETWORKS)
    (tmp_path / "broken_of_a_test.py").write_text("import no_such_package_of_a_test\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in (NAME, "broken_of_a_test"):
        sys.modules.pop(name, None)


def error_of(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


# --- building ---------------------------------------------------------------------------------------------------------


def test_names_of_torchvision_and_timm():
    torch.manual_seed(1)
    torchvision = pytest.importorskip("torchvision")
    timm = pytest.importorskip("timm")
    expected = {
        "torchvision:resnet18": lambda: torchvision.models.resnet18(num_classes=7),
        "torchvision.models:squeezenet1_1": lambda: torchvision.models.squeezenet1_1(num_classes=7),
        "timm:test_resnet": lambda: timm.create_model("test_resnet", num_classes=7),
        "timm:test_vit.r160_in1k": lambda: timm.create_model("test_vit", num_classes=7),
    }
    for name, build in expected.items():
        torch.manual_seed(5)
        theirs = build()
        torch.manual_seed(5)
        ours = build_model(name, 7)
        assert type(ours) is type(theirs)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())


def test_a_function_of_the_folder_that_the_process_is_in(here):
    model = build_model(f"{NAME}:build", 7)
    assert model.head.out_features == 7
    assert type(build_model(f"{NAME}:Net", 3)).__name__ == "Net"  # a class is called like a function
    (here / "package_of_a_test").mkdir()
    (here / "package_of_a_test" / "nets.py").write_text(f"from {NAME} import build\n")
    assert build_model("package_of_a_test.nets:build", 4).head.out_features == 4
    for name in ("package_of_a_test", "package_of_a_test.nets"):
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("no_such_of_a_test:build", ImportError, "there is no module no_such_of_a_test, neither in "),
        (f"{NAME}.sub:build", ImportError, f"'{NAME}' is not a package"),
        ("broken_of_a_test:build", ImportError, "to import broken_of_a_test fails: No module named 'no_such_package"),
        (f"{NAME}:biuld", ValueError, "has no biuld; perhaps you meant build"),
        (f"{NAME}:number", ValueError, "must be a function that is called with num_classes=, got int"),
        (f"{NAME}:other", ValueError, "num_classes= alone, got one that refuses it"),
        (f"{NAME}:nothing", ValueError, "must give a torch.nn.Module, got NoneType"),
        (f"{NAME}:still", ValueError, "must give a network with parameters to train"),
        (f"{NAME}.py:build", ValueError, "model must be MODULE:FUNCTION as Python imports them"),
        ("a:b:c", ValueError, "model must be MODULE:FUNCTION as Python imports them"),
        (":build", ValueError, "model takes one of resnet18"),
        (f"{NAME}:", ValueError, "model takes one of resnet18"),
        ("torchvision:resnet51", ValueError, "torchvision has no classifier 'resnet51'; perhaps you meant resnet50"),
        ("torchvision:list_models", ValueError, "torchvision has no classifier"),
        ("torchvision.models:raft_small", ValueError, "torchvision has no classifier"),
        ("timm:convnext_ato", ValueError, "timm has no classifier 'convnext_ato'; perhaps you meant convnext_atto"),
        ("timm:resnet18.nobody", ValueError, "Invalid pretrained tag"),
        ("os:getcwd", ValueError, "num_classes= alone, got one that refuses it"),
    ],
)
def test_what_cannot_be_built(name, error, says, here):
    with pytest.raises(error) as caught:
        build_model(name)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mean_and_std_are_for_our_own_networks(here):
    with pytest.raises(ValueError, match=r"mean and std must not be given for .*:build, which gets images in \[0,1\]"):
        build_model(f"{NAME}:build", mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize(
    ("function", "trains", "says"),
    [
        ("eleven", False, r"must give logits \(2,10\) for 2 images of 10 classes, got \(2, 11\)$"),
        ("image", False, r"must give logits \(2,10\) .* got \(2, 10, 30, 30\)$"),
        ("large", False, r"does not take images \(3, 32, 32\): RuntimeError: mat1 and mat2"),
        ("Pair", True, "must give logits, a tensor, got tuple in training$"),
    ],
)
def test_what_does_not_fit_the_images(function, trains, says, here):
    model, x = build_model(f"{NAME}:{function}"), torch.rand(2, 3, 32, 32)
    with pytest.raises(ValueError, match=says):
        check_network(model, function, x, 10, trains=trains)


def test_a_trial_leaves_the_network_and_the_random_numbers_as_they_are(here):
    model = build_model(f"{NAME}:build")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    check_network(torch.nn.Sequential(model, torch.nn.Dropout()), "net", torch.rand(2, 3, 8, 8), 10, trains=True)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.set_rng_state(state)
    torch.rand(2, 3, 8, 8)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    check_network(torch.nn.Sequential(model, torch.nn.Dropout()), "net", torch.rand(2, 3, 8, 8), 10, trains=True)
    assert torch.equal(torch.get_rng_state(), after)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer"),
    [("torchvision:resnet18", None), ("timm:test_convnext", "stages.3"), ("timm:test_resnet", None)],
)
def test_a_run_with_a_network_of_a_package(name, layer, tmp_path):
    pytest.importorskip(name.partition(":")[0])
    config = dataclasses.replace(
        TINY_RUN, model=name, target_layer=layer, epochs=1, warmup_epochs=0, train_size=32, test_size=10
    )
    train(config, tmp_path / "run", log=lambda line: None)
    assert read_config(tmp_path / "run").model == name
    found = load_trained(tmp_path / "run")
    # The weights are those of the package's own network, under its names.
    theirs = build_model(name, 10)
    theirs.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    x = to_float(found.data.images)
    with torch.no_grad():
        assert torch.equal(found.model(x), theirs.eval()(x))
    # A plain method needs no layer.
    plain = dataclasses.replace(config, method="at", target_layer=None)
    train(plain, tmp_path / "plain", log=lambda line: None)


def test_every_command_on_a_function_of_the_users_own(here, capsys):
    function = ("--model", f"{NAME}:build")
    assert main(["train", "--out", "run", *function, "--target-layer", "features", *TINY]) == 0
    capsys.readouterr()
    assert read_config(Path("run")).model == f"{NAME}:build"
    assert read_config(Path("run")).target_layer == "features"

    assert main(["evaluate", "run", "--attacks", "natural,pgd1", *function]) == 0
    said = json.loads(Path("run/evaluation.json").read_text())["results"]
    assert set(said) == {"natural", "pgd1"}
    assert main(["masks", "run", "--out", "grid.png", "--n", "1", *function]) == 0
    assert main(["masks", "run", "--out", "other.png", "--n", "1", "--target-layer", "features.0", *function]) == 0
    assert Path("grid.png").read_bytes() != Path("other.png").read_bytes()
    assert main(["export", "run", "--out", "weights.safetensors", *function]) == 0
    exported = build_model(f"{NAME}:build")
    exported.load_state_dict(load_file("weights.safetensors"))
    assert main(["train", "--out", "run", "--resume", "--epochs", "2", *function]) == 0
    capsys.readouterr()
    assert len(Path("run/metrics.csv").read_text().splitlines()) == 3

    message = error_of(capsys, "export", "run", "--out", "weights.pt", *function)
    assert "ResNet or WideResNet of part_fast.models for format robustbench, got Net" in message


def test_a_file_does_not_choose_what_code_runs(here, capsys):
    """A run folder from somebody else, whose configuration names a function: it is not imported before it is named."""
    run = here / "run"
    run.mkdir()
    config = dataclasses.replace(TINY_RUN, model=f"{NAME}:build", epochs=1, warmup_epochs=0)
    files.write_json(run / "config.json", config.to_json())
    (run / "model.safetensors").write_bytes(b"")
    (run / "averaged.safetensors").write_bytes(b"")
    commands = (
        ("evaluate", "run"),
        ("evaluate", "run/averaged.safetensors"),
        ("masks", "run", "--out", "grid.png"),
        ("export", "run", "--out", "weights.safetensors"),
        ("train", "--out", "run", "--resume"),
    )
    for command in commands:
        message = error_of(capsys, *command)
        assert f"run/config.json names the network {NAME}:build" in message
        assert message.endswith(f"if you trust it, name it yourself, --model {NAME}:build\n")
        assert not (here / "imported").exists()
        assert NAME not in sys.modules
    files.write_json(run / "config.json", dataclasses.replace(config, model="os:system").to_json())
    with pytest.raises(ValueError, match=r"config\.json names the network os:system"):
        evaluate(run)
    # What torchvision's and timm's own tables name is built as it is.
    files.write_json(run / "config.json", dataclasses.replace(config, model="torchvision:resnet18").to_json())
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_trained(run)


def test_a_module_that_is_elsewhere_is_named(here, capsys, monkeypatch):
    assert main(["train", "--out", "run", "--method", "at", "--model", f"{NAME}:build", *TINY]) == 0
    capsys.readouterr()
    (here / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    sys.modules.pop(NAME)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(here)])
    message = error_of(capsys, "evaluate", "../run", "--model", f"{NAME}:build")
    assert f"model {NAME}:build cannot be built: there is no module {NAME}, neither in {Path.cwd()}" in message
    assert main(["evaluate", "../run", "--attacks", "natural", "--model", f"{NAME}:build"]) == 2
    monkeypatch.chdir(here)
    assert main(["evaluate", "run", "--attacks", "natural", "--model", f"{NAME}:build"]) == 0


@pytest.mark.parametrize(
    ("function", "flags", "says"),
    [
        ("build", (), "target_layer must be given (--target-layer), the model has no layer4 or block3; candidates: "),
        ("build", ("--target-layer", "nope"), "target_layer must be one of "),
        ("build", ("--target-layer", "head"), "target_layer must give a tensor (N,K,h,w), got (2, 10)"),
        ("eleven", ("--target-layer", "features"), "must give logits (2,10)"),
        ("large", ("--method", "at"), "does not take images (3, 32, 32)"),
        ("Pair", ("--method", "at"), "got tuple in training"),
    ],
)
def test_refused_before_anything_is_written(function, flags, says, here, capsys):
    message = error_of(capsys, "train", "--out", "run", "--model", f"{NAME}:{function}", *flags, *TINY)
    assert says in message
    assert not Path("run").exists()


def test_a_checkpoint_alone_is_warned_about(tmp_path):
    """Training code of others normalises outside of the network, as often as not."""
    pytest.importorskip("timm")
    model = build_model("timm:test_resnet", 10)
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    with pytest.warns(UserWarning, match=r"timm:test_resnet gets images in \[0,1\]: if .* was trained on normalised"):
        found = load_trained(tmp_path / "net.safetensors", 4, dataset="demo", model="timm:test_resnet")
    x = to_float(load_once("demo", "test").subset(4).images)
    with torch.no_grad():
        assert torch.equal(found.model(x), model.eval()(x))


@pytest.mark.slow
def test_processes_of_torchrun_build_it_each(here):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "part_fast"]
    flags = ["--model", f"{NAME}:build", "--target-layer", "features", *TINY]
    done = subprocess.run(
        [*launcher, "train", "--out", "run", *flags], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("epoch 1/1") + done.stderr.count("epoch 1/1") == 1
    model = load_weights(build_model(f"{NAME}:build"), "run/model.safetensors")
    assert model.features[0].weight.isfinite().all()
