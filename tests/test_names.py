"""Names of attacks, methods, models and data sets: each in one table, which commands, help and errors read."""

import ast
import dataclasses
import inspect
import re

import pytest
import torch
from conftest import ROOT, TINY_RUN, load_once

from part_fast.attacks.catalogue import ATTACKS, Attack, attack_of_evaluation, for_evaluation, for_training
from part_fast.budgets.controls import CONTROLS
from part_fast.choices import check_choice, described, either
from part_fast.cli import main
from part_fast.config import PRESETS, SCHEDULES
from part_fast.data.catalogue import DATASETS, Source, load
from part_fast.evaluation.accuracy import AttackSettings, check_attacks, is_correct
from part_fast.experiments.reproduce import POSTER
from part_fast.methods import METHODS
from part_fast.models.catalogue import MODELS, Model, build_model
from part_fast.models.resnet import resnet_small
from part_fast.ops.cam import METHODS as CAM_METHODS
from part_fast.ops.cam_mask import RULE_HELP, RULES
from part_fast.training.step import batch_attack, batch_loss


def attacked_loss(method, model, x, y, epsilon, config):
    """The loss of a training step, whose attack runs on the model itself."""
    return batch_loss(method, model, x, batch_attack(method, model, x, y, epsilon, config), y, config).loss


# --- what there is ----------------------------------------------------------------------------------------------------


def test_names():
    assert list(for_training()) == ["pgd", "fgsm", "fgsm-rs", "n-fgsm", "pgi", "warm", "mma"]
    assert list(for_evaluation()) == ["natural", "pgdSTEPS", "fgsm", "fgsm-rs", "n-fgsm", "mma", "aa"]
    assert list(METHODS) == ["at", "part", "trades", "part-t", "mart", "part-m"]
    assert list(MODELS) == [
        "resnet18",
        "resnet-small",
        "preact-resnet18",
        "preact-resnet18-wong",
        "preact-resnet18-silu",
        "wrn-DEPTH-WIDTH",
        "wrn-DEPTH-WIDTH-silu",
        "torchvision:NAME",
        "timm:NAME",
        "MODULE:FUNCTION",
    ]
    assert list(DATASETS)[:6] == ["demo", "fashion-mnist", "cifar10", "cifar100", "svhn", "tinyimagenet"]
    assert list(DATASETS)[6:] == ["folder:PATH"]
    assert RULES == ("zscore", "released", "quantile", "soft")


@pytest.mark.parametrize(("name", "steps"), [("pgd1", 1), ("pgd20", 20), ("pgd100", 100), ("mma", 20)])
def test_an_evaluation_knows_an_attack_and_its_steps(name, steps):
    attack, found = attack_of_evaluation(name)
    assert found == steps
    assert attack is ATTACKS[name.rstrip("0123456789")]


@pytest.mark.parametrize("name", ["", "pgd", "pgd0", "pgd07", "pgd-1", "pgd2.5", "PGD20", "mma20", "aa ", "natural1"])
def test_an_evaluation_refuses_other_names(name):
    with pytest.raises(ValueError, match=r"attacks must be of natural, .*pgdSTEPS .pgd20, pgd100, .*mma, aa, got"):
        attack_of_evaluation(name)


def test_the_demo_is_as_large_as_its_row_says():
    data, row = load("demo", "train"), DATASETS["demo"]
    assert (len(data), data.num_classes) == (row.train_images, row.classes)
    assert data.images.shape[2:] == (row.size, row.size)


def test_listing():
    assert either(["a"]) == "a"
    assert either(["a", "b"]) == "a or b"
    assert either("abc") == "a, b or c"
    assert described({"a": "one", "b": ""}) == "a (one) or b"
    assert check_choice("x", "b", {"a": 1, "b": 2}) == "b"
    with pytest.raises(ValueError, match=r"^x must be one of a, b, got 'c'$"):
        check_choice("x", "c", {"a": 1, "b": 2})


# --- help lists all of it ---------------------------------------------------------------------------------------------


def help_of(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "2000")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return capsys.readouterr().out


def flag_of(text, flag):
    """The lines of a flag in a help text, as one."""
    after = text[re.search(rf"^[ │]*{flag}\b", text, re.MULTILINE).end() :]
    return " ".join(re.split(r"\n[ │]*-", after)[0].replace("│", " ").split())


TRAIN = {
    "preset": PRESETS,
    "method": METHODS,
    "attack": for_training(),
    "dataset": DATASETS,
    "model": MODELS,
    "rule": RULE_HELP,
    "control": CONTROLS,
    "cam": CAM_METHODS,
    "schedule": SCHEDULES,
    "precision": ("fp32", "bf16", "fp16", "auto"),
}
OF_A_RUN = {"dataset": DATASETS, "model": MODELS}


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("train", TRAIN),
        ("evaluate", {"attacks": for_evaluation(), **OF_A_RUN}),
        ("masks", {"rule": RULE_HELP, **OF_A_RUN}),
        ("export", {"model": MODELS}),
        ("reproduce", {"attacks": for_evaluation(), "table": POSTER}),
    ],
)
def test_help_lists_every_name(command, flags, capsys, monkeypatch):
    text = help_of(capsys, monkeypatch, command)
    for flag, names in flags.items():
        said = flag_of(text, f"--{flag}")
        for name in names:
            assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", said), (flag, name, said)


# --- rows that have no test elsewhere ---------------------------------------------------------------------------------


def fast_gradient_sign(model, x, y, eps):
    """Goodfellow et al., "Explaining and Harnessing Adversarial Examples", ICLR 2015, section 4, within [0,1]."""
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(leaf), y), leaf)
    return (x + eps * grad.sign()).clamp(0, 1)


@pytest.mark.parametrize("per_pixel", [False, True])
def test_fgsm_is_the_fast_gradient_sign_method_whatever_alpha_and_steps(per_pixel):
    data = load_once("demo", "test").subset(20)
    x, y = data.images.float() / 255, data.labels
    eps = torch.rand(20, 1, 32, 32) * 8 / 255 if per_pixel else 8 / 255
    model = resnet_small().eval()
    found = ATTACKS["fgsm"].run(model, x, y, eps, 2 / 255, 10, "zero", 0)
    assert torch.equal(found, fast_gradient_sign(model, x, y, eps))
    assert not torch.equal(found, x)


def test_fgsm_in_training_and_evaluation():
    data = load_once("demo", "test").subset(20)
    x, y = data.images.float() / 255, data.labels
    model = resnet_small().eval()
    x_adv = fast_gradient_sign(model, x, y, 8 / 255)
    found = is_correct(model, data, "fgsm", AttackSettings(eps=8 / 255))
    assert torch.equal(found, model(x_adv).argmax(1) == y)
    config = dataclasses.replace(TINY_RUN, attack="fgsm")
    config.check()
    loss = attacked_loss("at", model, x, y, 8 / 255, config)
    assert torch.equal(loss, torch.nn.functional.cross_entropy(model(x_adv), y))


# --- a row is enough --------------------------------------------------------------------------------------------------


def test_a_row_is_a_new_attack(capsys, monkeypatch):
    calls = []

    def run(model, x, y, eps, alpha, steps, start, seed):
        calls.append((steps, start, seed))
        return x

    monkeypatch.setitem(ATTACKS, "still", Attack("moves nothing", run, steps=7, random_start=False))
    model, data = resnet_small(), load_once("demo", "test").subset(20)
    config = dataclasses.replace(TINY_RUN, attack="still", steps=3, seed=5)
    config.check()
    x, y = data.images.float() / 255, data.labels
    loss = attacked_loss("at", model, x, y, 8 / 255, config)
    assert torch.equal(loss, torch.nn.functional.cross_entropy(model(x), y))
    check_attacks(["natural", "still"])
    settings = AttackSettings(seed=9)
    found = [is_correct(model.eval(), data, name, settings) for name in ("natural", "still")]
    assert torch.equal(*found)
    assert calls == [(3, "zero", 5), (7, "zero", 9)]
    for command, flag in (("train", "--attack"), ("evaluate", "--attacks"), ("reproduce", "--attacks")):
        assert "still (moves nothing)" in flag_of(help_of(capsys, monkeypatch, command), flag)


def test_a_row_is_a_new_method(capsys, monkeypatch):
    def objective(model, x, x_adv, y, beta):
        return model(x).sum() * 0 + beta

    monkeypatch.setitem(METHODS, "nothing", dataclasses.replace(METHODS["at"], objective=objective, help="learns nil"))
    config = dataclasses.replace(TINY_RUN, method="nothing", warmup_epochs=0, beta=2.5)
    config.check()
    x = torch.rand(2, 3, 32, 32)
    assert attacked_loss("nothing", resnet_small(), x, torch.tensor([0, 1]), 0.1, config).item() == 2.5
    assert [config.method_at(epoch) for epoch in range(2)] == ["nothing", "nothing"]
    assert "nothing (learns nil)" in help_of(capsys, monkeypatch, "train")


def test_a_row_is_a_new_model_and_a_new_data_set(capsys, monkeypatch):
    def build(width, num_classes, *, mean, std):
        return torch.nn.Linear(width, num_classes)

    def read(path, split, root, download):
        return path, split

    monkeypatch.setitem(MODELS, "linear-WIDTH", Model("one layer", build))
    monkeypatch.setitem(DATASETS, "zip:PATH", Source("packed", read, None, None, None))
    assert build_model("linear-12", 3).weight.shape == (3, 12)
    assert load("zip:a:b.zip", "test") == ("a:b.zip", "test")
    text = help_of(capsys, monkeypatch, "train")
    assert "linear-WIDTH (one layer)" in text
    assert "zip:PATH (packed)" in text


# --- and typed nowhere else -------------------------------------------------------------------------------------------

TABLES = {"attack": {**ATTACKS, **for_evaluation()}, "method": METHODS, "model": MODELS, "data set": DATASETS}
SENTENCES = ("at", "part", "natural", "demo")  # which are words too

# What is said there of single names, and why it is no list of all of them.
USES = {
    "evaluation/sweep.py": "the attack that it makes stronger",
    "config.py": "defaults and presets",
    "cli.py": "the command called demo, and what bench measures unless told otherwise",
    "bench/": "the steps that are compared with published ones, and networks that have goals",
    "evaluation/accuracy.py": "the default",
    "evaluation/sanity.py": "which attack is stronger than which",
    "experiments/arms.py": "what is measured of every arm",
    "experiments/attacks.py": "the attacks that are compared",
    "experiments/compare.py": "what the demo and the study measure",
    "experiments/demo.py": "what the demo compares",
    "experiments/reproduce.py": "the published rows and columns",
    "experiments/speedrun.py": "what a part of it is replaced by",
    "experiments/study.py": "what the study compares",
    "training/measures.py": "columns of metrics.csv",
}


def named(text, table):
    """Names of a table in a text, with numbers in the place of their capitals; with whether the text is just a name."""
    patterns = {name: re.sub("[A-Z]+", lambda found: rf"(\d+|{found[0]})", name) for name in table}
    whole = [name for name, pattern in patterns.items() if re.fullmatch(pattern, text)]
    words = [name for name, pattern in patterns.items() if re.search(rf"(?<![\w-]){pattern}(?![\w-])", text)]
    return whole, [name for name in words if name not in SENTENCES]


def typed(source):
    """(line, table, names) of every string of a module that is a name, or lists some."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for kind, table in TABLES.items():
                whole, words = named(node.value, table)
                if whole or len(words) > 1:
                    yield node.lineno, kind, whole or words


def compared(source):
    """Lines on which something is compared with a name: `method == "at"`, `method in ("at", "part")`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            for value in (inner for side in node.comparators for inner in ast.walk(side)):
                text = value.value if isinstance(value, ast.Constant) else None
                if isinstance(text, str) and any(named(text, table)[0] for table in TABLES.values()):
                    yield node.lineno


def modules():
    package = ROOT / "part_fast"
    wings = [package / wing for wing in ("training", "evaluation", "experiments", "bench")]
    return {
        str(path.relative_to(package)): path.read_text()
        for path in [package / "config.py", package / "cli.py", *(path for wing in wings for path in wing.glob("*.py"))]
    }


def test_names_are_typed_in_their_tables_alone():
    found = {path: list(typed(source)) for path, source in modules().items()}
    others = {path: uses for path, uses in found.items() if uses and not any(path.startswith(known) for known in USES)}
    assert not others, others
    for known in USES:
        assert any(uses for path, uses in found.items() if path.startswith(known)), f"{known} has no use any more"


# Texts that list names and are no list of all: the networks that each benchmark of steps measures by default.
LISTS = {"cli.py": 4, "bench/steps.py": 1}


def test_no_table_is_listed_elsewhere():
    """Help texts and messages take the names from the tables."""
    found = {path: sum(len(names) > 1 for _, _, names in typed(source)) for path, source in modules().items()}
    assert {path: n for path, n in found.items() if n} == LISTS


# Comparisons that stay: which published step is compared with which of ours.
BRANCHES = {"bench/step_cases.py": 3}


def test_nothing_branches_on_a_name():
    found = {path: len(list(compared(source))) for path, source in modules().items()}
    assert {path: n for path, n in found.items() if n} == BRANCHES


def test_a_typed_name_is_seen():
    assert list(typed('"""trades, mart or pgd20."""')) == [(1, "method", ["trades", "mart"])]
    assert list(typed('x = "wrn-34-10"')) == [(1, "model", ["wrn-DEPTH-WIDTH"])]
    assert list(typed('"""It looks at a part of the demo."""')) == []
    assert list(compared("if method in ('trades', 'x') or a == 'aa': pass")) == [1, 1]
    assert list(compared("if split == 'train': pass")) == []


def test_rows_say_what_they_are():
    for table in (ATTACKS, METHODS, MODELS):
        for name, row in table.items():
            assert row.help, name
            assert row.help.endswith("...") or not row.help.endswith("."), name
    for name, method in METHODS.items():
        assert METHODS[method.plain].plain == method.plain, name
        assert not METHODS[method.plain].weighted
        assert METHODS[method.plain].objective is method.objective
        assert list(inspect.signature(method.objective).parameters) == ["model", "x", "x_adv", "y", "beta"]
