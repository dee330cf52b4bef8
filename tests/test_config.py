"""TrainConfig: presets, what it refuses, schedule, its JSON; devices and numbers as written on a command line."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from part_fast.config import PRESETS, TrainConfig, find_device, parse_number, preset, read_config
from part_fast.methods import METHODS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole_and_named(name):
    config = preset(name)
    config.check()
    assert config.preset == name


@pytest.mark.parametrize("name", ["cifar10-resnet18", "cifar10-wrn34-10", "fashion-mnist"])
def test_published_numbers(name):
    config = preset(name)
    assert (config.epochs, config.warmup_epochs, config.batch_size) == (80, 20, 128)
    assert (config.lr, config.lr_drops) == (0.01, (60, 90))
    assert (config.momentum, config.weight_decay, config.beta, config.steps) == (0.9, 2e-4, 6.0, 10)
    assert (config.eps, config.eps_low, config.alpha) == (8 / 255, 7 / 255, 2 / 255)
    assert config.augment


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("preset", "cifar", "cifar10-resnet18"),
        ("method", "free", "at, part, trades"),
        ("attack", "deepfool", "one of pgd"),
        ("control", "shuffled", "none, permuted, random, inverted, uniform"),
        ("refresh", "0", "batch or a number of epochs >= 1"),
        ("refresh", "epoch", "batch or a number of epochs >= 1"),
        ("cam", "gradcam++", "gradcam, xgradcam"),
        ("rule", "otsu", "zscore, released"),
        ("rule", "quantile:2", "quantile:q with 0 < q < 1"),
        ("eps", -0.1, ">= 0"),
        ("eps", math.nan, "finite"),
        ("eps_low", 9 / 255, "eps_low must be <= eps"),
        ("alpha", math.inf, "alpha"),
        ("lr", math.nan, "lr"),
        ("beta", -1.0, "beta"),
        ("momentum", -0.5, "momentum"),
        ("weight_decay", -1e-4, "weight_decay"),
        ("epochs", 0, "epochs"),
        ("batch_size", 0, "batch_size"),
        ("steps", -1, "steps"),
        ("seed", -1, "seed"),
        ("seed", 10**20, "seed must be < 2**63, got 100000000000000000000"),
        ("train_size", 0, "train_size"),
        ("test_size", -5, "test_size"),
        ("pgd_test_size", -1, "pgd_test_size"),
        ("test_every", 0, "test_every must be >= 1"),
        ("lr_drops", (5, -1), "lr_drops"),
        ("average", "swa:81", "average must begin within the epochs, 80, got 'swa:81'"),
        ("warmup_epochs", 81, "warmup_epochs must be <= epochs, 80"),
    ],
)
def test_refused_in_one_line_that_names_the_field(field, value, says):
    config = dataclasses.replace(preset("cifar10-resnet18"), **{field: value})
    with pytest.raises(ValueError, match=field) as error:
        config.check()
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_what_would_never_begin_is_refused():
    config = dataclasses.replace(preset("cifar10-resnet18"), awp=0.005, awp_warmup=79)
    config.check()
    with pytest.raises(ValueError, match="awp_warmup must be < epochs, 80, with awp, got 80"):
        dataclasses.replace(config, awp_warmup=80).check()
    dataclasses.replace(config, awp=0.0, awp_warmup=80).check()
    with pytest.raises(ValueError, match="extra_fraction must be > 0 with extra, got 0"):
        dataclasses.replace(config, extra="x.npz", extra_fraction=0.0).check()


def test_after_its_warm_up_a_run_s_epochs_are_counted_from_there():
    config = dataclasses.replace(
        preset("cifar10-resnet18"), average="swa:30", awp=0.005, awp_warmup=25, lr_drops=(10, 60), warmup_epochs=20
    )
    left = config.after_warmup(Path("weights"))
    assert (left.epochs, left.warmup_epochs, left.lr_drops) == (60, 0, (0, 40))
    assert (left.average, left.awp_warmup) == ("swa:10", 5)
    soon = dataclasses.replace(config, average="swa:3", awp_warmup=2).after_warmup(Path("weights"))
    assert (soon.average, soon.awp_warmup) == ("swa:1", 0)
    assert dataclasses.replace(config, average="ema:0.9").after_warmup(Path("weights")).average == "ema:0.9"


@pytest.mark.parametrize("method", ["at", "trades", "mart"])
def test_plain_methods_take_any_eps_low(method):
    config = dataclasses.replace(preset("cifar10-resnet18"), method=method, eps=4 / 255)
    config.check()
    with pytest.raises(ValueError, match="eps_low must be finite and >= 0, got nan"):
        dataclasses.replace(config, eps_low=math.nan).check()
    with pytest.raises(ValueError, match="eps must be finite and >= 0"):
        dataclasses.replace(config, eps=-1.0).check()


def test_text_where_a_number_belongs_is_a_type_error():
    with pytest.raises(TypeError, match="lr must be a number, got str"):
        TrainConfig(lr="fast").check()


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match=r"one of demo, fashion-mnist, .*strong-wrn28-10, got 'x'"):
        preset("x")


def test_the_recipe_is_of_the_last_two_presets_alone():
    off = {"label_smoothing": 0, "nesterov": False, "cutmix": 0, "extra": None, "awp": 0, "average": "none"}
    *published, fast, strong = PRESETS.values()
    for config in published:
        assert {name: getattr(config, name) for name in off} == off
    assert (fast.attack, fast.average, fast.label_smoothing) == ("pgi", "ema:0.999", 0.1)
    assert (strong.nesterov, strong.cutmix, strong.average, strong.label_smoothing) == (True, 1, "ema:0.995", 0.1)
    for config in (fast, strong):
        config.check()
        dataclasses.replace(config, method="at").check()


def test_svhn_has_its_own_numbers():
    config = preset("svhn-resnet18")
    assert (config.alpha, config.weight_decay, config.augment) == (1 / 255, 3.5e-3, False)
    assert (config.epochs, config.warmup_epochs, config.lr, config.lr_drops) == (80, 20, 0.01, (60, 90))


def test_released_counts_from_the_end_of_the_warm_up():
    config = dataclasses.replace(preset("cifar10-resnet18"), released=True)
    rates = [config.lr_at(epoch) for epoch in range(80)]
    assert rates[:79] == [0.01] * 79  # the drop at 60 touches one epoch, the last
    assert rates[79] == pytest.approx(0.001)
    assert (config.mask_rule, config.mask_control) == ("released", "permuted")


def test_what_excludes_each_other():
    with pytest.raises(ValueError, match="released takes no other rule or control, got 'soft' and 'none'"):
        TrainConfig(released=True, rule="soft").check()
    with pytest.raises(ValueError, match="refresh must be batch with rule soft"):
        TrainConfig(refresh="3", rule="soft").check()


def test_learning_rate_counts_every_epoch():
    config = TrainConfig(lr=0.01, lr_drops=(60, 90), epochs=100)
    expected = {0: 1e-2, 59: 1e-2, 60: 1e-3, 89: 1e-3, 90: 1e-4, 99: 1e-4}
    assert {epoch: pytest.approx(config.lr_at(epoch)) for epoch in expected} == expected


@pytest.mark.parametrize("method", METHODS)
def test_warm_up_is_the_same_method_without_pixel_weights(method):
    config = TrainConfig(method=method, epochs=4, warmup_epochs=2)
    plain = {"at": "at", "part": "at", "trades": "trades", "part-t": "trades", "mart": "mart", "part-m": "mart"}
    assert [config.method_at(epoch) for epoch in range(4)] == [plain[method]] * 2 + [method] * 2


def test_json_round_trip(tmp_path):
    config = TrainConfig(eps=0.1, lr_drops=(3, 4), train_size=5)
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    assert read_config(tmp_path) == config


def test_unreadable_configurations(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        read_config(tmp_path)
    for text, says in (("{", "not JSON"), ("[]", "got a list"), ('{"epsilon": 1}', "unknown epsilon")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", 8 / 255), ("0.03", 0.03), ("3e-2", 0.03), ("-1", -1.0), ("1.5/3", 0.5), ("1e0/4", 0.25)],
)
def test_numbers_as_written(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize("text", ["8/0", "8/", "/255", "eight", "1/2/3", ""])
def test_no_numbers(text):
    with pytest.raises(ValueError, match=r"such as 0.03 or 8/255, got"):
        parse_number(text)


def test_devices():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name, says in (("gpu", "takes auto, cpu"), ("meta", "takes auto, cpu"), ("cuda:99", "is not there")):
        with pytest.raises(ValueError, match=says):
            find_device(name)
