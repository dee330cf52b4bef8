"""The command line: one process end to end, the rest through main(): flags, presets, one-line errors, exit codes."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from safetensors.torch import load_file

import part_fast
from part_fast import cli
from part_fast.attacks.catalogue import for_training
from part_fast.cli import main
from part_fast.config import PRESETS, TrainConfig, preset, read_config
from part_fast.data.catalogue import load
from part_fast.evaluation import accuracy
from part_fast.evaluation import trained as reading
from part_fast.models.catalogue import build_model
from part_fast.models.checkpoints import load_weights
from part_fast.report import environment, figures, files
from part_fast.report.environment import environment_text
from part_fast.training import loop, step

CACHED = functools.lru_cache(load)
SMALL = {
    "train-size": 32,
    "test-size": 20,
    "steps": 1,
    "batch-size": 32,
    "epochs": 1,
    "warmup-epochs": 0,
    "pgd-test-size": 0,
}
TINY = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Unpack the demo set once, and draw no curves."""
    monkeypatch.setattr(loop, "load", CACHED)
    monkeypatch.setattr(reading, "load", CACHED)
    monkeypatch.setattr(figures, "draw_curves", lambda path, rows, title: path.write_bytes(b"drawn"))


@pytest.fixture
def trained(monkeypatch):
    """What train() would have been called with."""
    calls = []
    monkeypatch.setattr(loop, "train", lambda config, out, **how: calls.append((config, out, how)))
    return calls


def error_of(capsys, *arguments):
    """The one line on stderr of a command that must fail."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("part-fast: error: ")
    assert err.count("\n") == 1
    return err


def process(*arguments, **environment):
    command = [sys.executable, "-m", "part_fast", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )


def test_train_evaluate_and_masks_end_to_end(tmp_path, capsys):
    run = tmp_path / "run"
    done = process("train", "--out", run, *TINY, "--eps", "4/255", "--eps-low", "2/255")
    assert done.returncode == 0, done.stderr
    assert f"run folder: {run}" in done.stdout
    assert "epoch 1/1 part" in done.stdout
    assert read_config(run).eps == 4 / 255
    assert main(["evaluate", str(run), "--n", "10", "--attacks", "natural, pgd2"]) == 0
    said = capsys.readouterr().out
    results = json.loads((run / "evaluation.json").read_text())["results"]
    for name in ("natural", "pgd2"):
        assert f"{100 * results[name]['accuracy']:.2f}" in said
    assert main(["masks", str(run), "--out", str(tmp_path / "grid.png"), "--n", "2"]) == 0
    assert (tmp_path / "grid.png").stat().st_size > 10_000


def test_bad_input_in_a_process_is_one_line_and_code_2(tmp_path):
    done = process("train", "--out", tmp_path / "run", "--preset", "imagenet")
    assert (done.returncode, done.stdout) == (2, "")
    known = (
        "demo, fashion-mnist, cifar10-resnet18, cifar10-wrn34-10, svhn-resnet18, tinyimagenet-wrn34-10, fast-resnet18, "
        "strong-wrn28-10"
    )
    assert done.stderr == f"part-fast: error: preset must be one of {known}, got 'imagenet'\n"
    assert not (tmp_path / "run").exists()


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["backends"]["cpu"] == part_fast.available_backends("cpu")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"part_fast {part_fast.__version__}" in text
    assert torch.__version__ in text
    for name, reason in record["not_available"]["cpu"].items():
        assert f"not {name}: {reason}" in text


def test_help_and_version(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == text
    for command in cli.COMMANDS:
        assert f"\n  {command} " in text
        with pytest.raises(SystemExit) as stop:
            main([*command.split(), "--help"])
        assert stop.value.code == 0
        assert f"part-fast {command}" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{part_fast.__version__}\n"


@pytest.mark.parametrize("name", PRESETS)
def test_flags_change_the_preset(name, trained, tmp_path):
    flags = ["--lr", "1/50", "--method", "trades", "--no-download", "--lr-drops", "3", "5", "--train-size", "10"]
    assert main(["train", "--out", str(tmp_path), *flags, "--preset", name]) == 0
    ((config, out, how),) = trained
    assert config == dataclasses.replace(preset(name), lr=0.02, method="trades", lr_drops=(3, 5), train_size=10)
    assert out == tmp_path
    assert how == {"resume": False, "overwrite": False, "tensorboard": False, "save_every": 10.0}


def test_every_number_takes_a_fraction(trained, tmp_path):
    floats = [name for name, kind in get_type_hints(TrainConfig).items() if kind is float]
    assert len(floats) == 12
    flags = [part for name in floats for part in (f"--{name.replace('_', '-')}", "3/255")]
    assert main(["train", f"--out={tmp_path}", "--preset=demo", *flags]) == 0
    assert [getattr(trained[0][0], name) for name in floats] == [3 / 255] * 12


def test_evaluate_takes_fractions(monkeypatch, tmp_path):
    calls, record = [], {"checkpoint": "net.pt", "results": {}, "warnings": []}
    monkeypatch.setattr(accuracy, "evaluate", lambda **values: calls.append(values) or record)
    assert main(["evaluate", str(tmp_path), "--eps", "12/255", "--alpha", "3e-3"]) == 0
    assert (calls[0]["eps"], calls[0]["alpha"], calls[0]["n"]) == (12 / 255, 3e-3, None)


def test_resume_takes_the_configuration_of_the_run(trained, tmp_path):
    config = dataclasses.replace(preset("cifar10-resnet18"), lr=0.3, seed=5)
    files.write_json(tmp_path / "config.json", config.to_json())
    assert main(["train", "--out", str(tmp_path), "--resume", "--epochs", "90"]) == 0
    assert trained[0][0] == dataclasses.replace(config, epochs=90)
    assert trained[0][2]["resume"]
    assert main(["train", "--out", str(tmp_path), "--resume", "--preset", "demo"]) == 0
    assert trained[1][0] == preset("demo")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--method free", "method must be one of at, part, trades, part-t, mart, part-m, got 'free'"),
        ("--attack deepfool", f"attack must be one of {', '.join(for_training())}, got 'deepfool'"),
        (
            "--rule otsu",
            "rule must be one of zscore, released, quantile:q with 0 < q < 1, soft, budget-matched:MEAN, region:NAME, "
            "learned:FILE, got 'otsu'",
        ),
        ("--cam eigencam", "cam must be one of gradcam, xgradcam, layercam, hirescam"),
        ("--model vgg", "model takes one of resnet18, resnet-small"),
        ("--dataset mnist", "data set takes one of demo, fashion-mnist, cifar10"),
        ("--eps -1/255", "eps must be finite and >= 0"),
        ("--eps nan", "eps must be finite and >= 0, got nan"),
        ("--eps-low 9/255", "eps_low must be <= eps"),
        ("--eps 8/0", "--eps: takes a number such as 0.03 or 8/255, got '8/0'"),
        ("--epochs many", "--epochs"),
        ("--epochs 0", "epochs must be >= 1"),
        ("--epsilon 3", "Unrecognized options: --epsilon"),
        (
            "--presett demo",
            "Unrecognized options: --presett, demo; perhaps you meant --preset (part-fast train --help)",
        ),
        ("--epoch 3", "Unrecognized options: --epoch, 3; perhaps you meant --epochs or --warmup-epochs"),
        ("--no-augmen", "perhaps you meant --augment"),
        ("--seed 100000000000000000000", "seed must be < 2**63, got 100000000000000000000"),
        ("--seed 1e20", "--seed: takes a whole number, got '1e20'"),
        ("--lr-drops 60 x", "--lr-drops: takes a whole number, got 'x'"),
        ("--device cuda:42", "device 'cuda:42' is not there"),
        ("--resume", "holds no run"),
        ("--init absent.pt", "no checkpoint file at absent.pt"),
        ("--train-size 7000", "train_size takes an integer from 1 to 6000"),
    ],
)
def test_bad_flags_of_train(flags, says, capsys, tmp_path):
    out = tmp_path / "run"
    assert says in error_of(capsys, "train", "--out", out, *flags.split())
    assert not out.exists()


def test_missing_data_set_names_every_place_and_the_cure(capsys, tmp_path):
    message = error_of(capsys, "train", "--out", tmp_path / "run", "--preset", "cifar10-resnet18", "--root", tmp_path)
    assert str(tmp_path / "cifar-10-batches-py") in message
    assert "--download" in message
    assert list(tmp_path.iterdir()) == []


def test_bad_commands(capsys, tmp_path):
    assert (
        "known: train, evaluate, masks, export, bench, reproduce, study, speedrun, attacks, demo, report, info"
        in error_of(capsys, "trian")
    )
    assert "--out" in error_of(capsys, "train")
    assert "no run folder or checkpoint at" in error_of(capsys, "evaluate", tmp_path / "absent")
    assert "holds no run" in error_of(capsys, "masks", tmp_path, "--out", tmp_path / "grid.png")
    study = ["study", "--out", tmp_path / "study", "--scale"]
    assert "scale of fashion-mnist must be one of small, got 'full'" in error_of(capsys, *study, "full")
    assert "must be one of small, full, got 'huge'" in error_of(capsys, *study, "huge", "--dataset", "cifar10")
    assert "out takes a .png file" in error_of(capsys, "masks", tmp_path, "--out", tmp_path / "grid")
    (tmp_path / "warmup").mkdir()
    assert "already holds a demo" in error_of(capsys, "demo", "--out", tmp_path)
    (tmp_path / "file").write_text("mine")
    assert "is a file" in error_of(capsys, "train", "--out", tmp_path / "file", "--overwrite")
    # A path that the system refuses.
    assert "part-fast: error: " in error_of(capsys, "train", "--out", tmp_path / "file" / "run", *TINY)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {"eps": None, "n": None, "out": None, "model": None, "seed": 0}),
        ("--eps 8/255 --n 100 --out there --model resnet18", {"eps": 8 / 255, "n": 100, "model": "resnet18"}),
        ("--eps 1 --out there", {"eps": 1.0, "out": Path("there")}),
        ("--eps None --n None --out None --model None", {"eps": None, "n": None, "out": None, "model": None}),
    ],
)
def test_values_of_flags_that_may_be_none(flags, expected):
    parsed = cli._parse("evaluate", ["run", *flags.split()])
    assert {name: getattr(parsed, name) for name in expected} == expected
    assert parsed.where == Path("run")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--eps abc", "--eps: takes a number such as 0.03 or 8/255, got 'abc'"),
        ("--n 1.5", "--n: takes a whole number, got '1.5'"),
        ("--seed None", "--seed: takes a whole number, got 'None'"),
    ],
)
def test_bad_values_of_flags_that_may_be_none_or_not(flags, says, capsys):
    assert says in error_of(capsys, "evaluate", "run", *flags.split())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("", None), ("--autoattack", True), ("--no-autoattack", False), ("--autoattack off --runs 2", False)],
)
def test_speedrun_tests_by_autoattack_as_asked_or_as_its_scale_does(flags, expected, monkeypatch):
    calls = []
    monkeypatch.setattr("part_fast.experiments.speedrun.speedrun", lambda **values: calls.append(values))
    assert main(["speedrun", "--out", "x", *flags.split()]) == 0
    assert calls[0]["autoattack"] is expected


def test_second_run_in_a_folder_is_refused_and_changes_nothing(capsys, tmp_path):
    run = tmp_path / "run"
    assert main(["train", "--out", str(run), *TINY]) == 0
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert "--resume continues it, --overwrite replaces it" in error_of(capsys, "train", "--out", run, *TINY)
    assert "attacks must be of natural, pgdSTEPS" in error_of(capsys, "evaluate", run, "--attacks", "natural,mystery")
    assert "another configuration: steps 1 there, 9 here" in error_of(
        capsys, "train", "--out", run, "--resume", "--steps", "9"
    )
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert main(["train", "--out", str(run), *TINY, "--overwrite", "--seed", "1"]) == 0
    assert read_config(run).seed == 1


def test_interruption_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    def stop(*arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(step, "batch_loss", stop)
        assert main(["train", "--out", str(tmp_path / "run"), *TINY]) == 130
    assert capsys.readouterr().err == f"stopped; go on with: part-fast train --out {tmp_path / 'run'} --resume\n"
    assert main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 0


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_interruption_before_a_run_begins_does_not_say_how_to_go_on(flags, capsys, tmp_path, monkeypatch):
    def stop(*arguments, **named):
        raise KeyboardInterrupt

    if flags:
        assert main(["train", "--out", str(tmp_path / "run"), *TINY]) == 0
        capsys.readouterr()
    monkeypatch.setattr(loop, "load", stop)
    assert main(["train", "--out", str(tmp_path / "run"), *TINY, *flags]) == 130
    assert capsys.readouterr().err == "stopped; no run was begun\n"


def test_of_a_flag_that_is_given_twice_the_last_one_counts(tmp_path):
    parsed = cli._parse(
        "train", ["--out", "x", "--preset", "demo", "--preset", "cifar10-resnet18", "--lr", "1", "--lr=2"]
    )
    assert parsed.config == dataclasses.replace(PRESETS["cifar10-resnet18"], lr=2.0)


def test_our_own_mistakes_keep_their_traceback(monkeypatch, tmp_path):
    def broken(*arguments, **how):
        return torch.zeros(2) + torch.zeros(3)

    monkeypatch.setattr(loop, "train", broken)
    with pytest.raises(RuntimeError, match="must match the size"):
        main(["train", "--out", str(tmp_path / "run")])
    # Raised inside the package, but by no `raise` of ours.
    monkeypatch.setattr(environment, "environment", lambda: environment_text(None))
    with pytest.raises(TypeError, match="subscriptable"):
        main(["info"])


FRAMED = """\
╭─ Unrecognized options ──╮
│ Unrecognized options:   │
│ --x, 3                  │
│ ─────────────────────── │
│ For full helptext, ...  │
╰─────────────────────────╯
"""
PROPOSING = """\
╭─ Unrecognized options ──╮
│ Unrecognized options:   │
│ --x, 3                  │
│ ─────────────────────── │
│ Perhaps you meant:      │
│     --y INT             │
│         Not --here.     │
│     --z, --no-z         │
│ ─────────────────────── │
│ For full helptext, ...  │
╰─────────────────────────╯
"""
PLAIN = """\
 Unrecognized options
 -------------------------
  Unrecognized options:
  --x, 3
  ------------------------
  For full helptext, ...
"""


@pytest.mark.parametrize("box", [FRAMED, PLAIN])
def test_parser_message_becomes_one_line(box):
    assert cli._one_line(box, "info") == "Unrecognized options: --x, 3 (part-fast info --help)"


def test_flags_that_the_parser_proposes_are_kept():
    said = "Unrecognized options: --x, 3; perhaps you meant --y or --z (part-fast info --help)"
    assert cli._one_line(PROPOSING, "info") == said


def test_unknown_backend_in_the_environment_is_one_line():
    done = process("info", PART_FAST_BACKEND="foo")
    known = "known: reference, cpp, triton, cuda"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"part-fast: error: PART_FAST_BACKEND: unknown backend 'foo'; {known}\n"


def test_seeds_that_no_generator_takes(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "--out", str(run), *TINY]) == 0
    capsys.readouterr()
    for command in (["evaluate", run], ["masks", run, "--out", tmp_path / "grid.png"]):
        assert "seed must be < 2**63, got 9223372036854775808" in error_of(capsys, *command, "--seed", 2**63)
        assert "seed must be >= 0, got -1" in error_of(capsys, *command, "--seed", -1)


def test_warnings_are_one_line(capsys):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = cli._warn
        warnings.warn("only 7 images", stacklevel=1)
    assert capsys.readouterr().err == "part-fast: warning: only 7 images\n"


def test_export_end_to_end(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "--out", str(run), *TINY]) == 0
    for name in ("weights.safetensors", "weights.pt"):
        assert main(["export", str(run), "--out", str(tmp_path / name)]) == 0
        assert str(tmp_path / name) in capsys.readouterr().out
    model = build_model("resnet-small", 10)
    load_weights(model, tmp_path / "weights.pt")
    expected = load_file(run / "model.safetensors")
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    before = (tmp_path / "weights.pt").read_bytes()
    assert "--overwrite" in error_of(capsys, "export", run, "--out", tmp_path / "weights.pt")
    assert (tmp_path / "weights.pt").read_bytes() == before


BENCH = {
    "ops": ("part_fast.bench.ops.ops", {"only": (), "threads": ()}),
    "step": (
        "part_fast.bench.steps.steps",
        {"models": (), "batch_size": None, "precision": "auto", "compile": False, "cuda_graph": False},
    ),
    "attack": ("part_fast.bench.attack.attack", {"models": (), "batch_size": None, "compile": False, "threads": ()}),
    "cam": ("part_fast.bench.cam.cam", {"models": (), "batch_sizes": (), "methods": (), "threads": ()}),
    "scaling": ("part_fast.bench.scaling.scaling", {"threads": ()}),
}


@pytest.mark.parametrize("what", BENCH)
def test_bench_gives_its_flags_to_the_benchmark(what, tmp_path, monkeypatch):
    calls, (function, own) = [], BENCH[what]
    monkeypatch.setattr(function, lambda **flags: calls.append(flags))
    assert main(["bench", what, "--out", str(tmp_path), "--quick", "--rounds", "9"]) == 0
    common = {"out": tmp_path, "device": "auto", "quick": True, "rounds": 9, "overwrite": False}
    assert calls == [{**own, **common}]


@pytest.mark.parametrize(
    ("what", "flags", "given"),
    [
        ("ops", "--only cam pgd_step --threads 1 2", {"only": ("cam", "pgd_step"), "threads": (1, 2)}),
        ("step", "--models resnet18 wrn-34-10 --cuda-graph", {"models": ("resnet18", "wrn-34-10"), "cuda_graph": True}),
        ("attack", "--batch-size 4 --compile", {"batch_size": 4, "compile": True}),
        ("cam", "--batch-sizes 1 8 --methods layercam", {"batch_sizes": (1, 8), "methods": ("layercam",)}),
        ("scaling", "--device cpu --overwrite", {"device": "cpu", "overwrite": True}),
    ],
)
def test_bench_takes_its_own_flags(what, flags, given, monkeypatch):
    calls = []
    monkeypatch.setattr(BENCH[what][0], lambda **flags: calls.append(flags))
    assert main(["bench", what, *flags.split()]) == 0
    assert {name: calls[0][name] for name in given} == given


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("ops --batch-size 4", "Unrecognized options: --batch-size, 4 (part-fast bench ops --help)"),
        ("step --only cam", "Unrecognized options: --only, cam"),
        ("scaling --models resnet18", "Unrecognized options: --models, resnet18"),
        ("speed", "bench takes ops, step, attack, cam or scaling, got 'speed'"),
        ("--quick", "bench takes ops, step, attack, cam or scaling, got '--quick'"),
    ],
)
def test_bench_refuses_what_is_not_its_own(arguments, says, capsys):
    assert says in error_of(capsys, "bench", *arguments.split())


def test_bench_alone_lists_its_commands(capsys):
    for arguments in (["bench"], ["bench", "--help"]):
        assert main(arguments) == 0
        said = capsys.readouterr().out
        assert re.findall(r"^  (\w+ \w+) ", said, re.MULTILINE) == [f"bench {what}" for what in BENCH]


@pytest.mark.parametrize("what", BENCH)
def test_help_of_a_benchmark_lists_its_flags_alone(what, capsys):
    with pytest.raises(SystemExit):
        main(["bench", what, "--help"])
    flags = set(re.findall(r"--([a-z][a-z-]+)", capsys.readouterr().out.partition("options")[2]))
    own = {name.replace("_", "-") for name in (*BENCH[what][1], "out", "device", "quick", "rounds", "overwrite")}
    assert {flag for flag in flags if not flag.startswith("no-")} - {"help"} == own
