"""The documentation does what it says: its code runs and is equivalent, its commands, flags and links exist."""

import ast
import csv
import dataclasses
import re
import shlex
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY_RUN, load_once
from golden_attack import golden_net

import part_fast
from part_fast import AttackModel, CamBudget, cli
from part_fast.attacks.mma import mma
from part_fast.attacks.pgd import pgd
from part_fast.data.memory import augment, draw_augmentation, to_float
from part_fast.evaluation.accuracy import check_attacks
from part_fast.gpu.__main__ import parser as gpu_parser
from part_fast.losses import mart_objective, trades_objective
from part_fast.models.catalogue import build_model
from part_fast.models.checkpoints import export_weights, load_weights
from part_fast.models.resnet import resnet_small
from part_fast.report import files

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page, language):
    """The fenced blocks of a page in one language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


class Tokens(torch.nn.Module):
    """A stand-in for a vision transformer: a patch embedding and attention."""

    def __init__(self):
        super().__init__()
        self.conv_proj = torch.nn.Conv2d(3, 8, 4, 4)
        self.norm = torch.nn.LayerNorm(8)
        self.block = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = torch.nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.block(self.norm(self.conv_proj(x).flatten(2).transpose(1, 2))).mean(1))


class Vgg(torch.nn.Module):
    """A stand-in for torchvision's vgg16: `features` of 31 modules, whose 29th is a ReLU."""

    def __init__(self):
        super().__init__()
        layers = [torch.nn.Conv2d(3, 8, 3, padding=1), *(torch.nn.Identity() for _ in range(28))]
        self.features = torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.MaxPool2d(2))
        self.classifier = torch.nn.Linear(8, 10)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def usual_names():
    """What a reader of the pages has already: as many images as channels, so that a lost dimension would broadcast."""
    torch.manual_seed(0)
    model = resnet_small()
    x, y = torch.rand(3, 3, 16, 16), torch.tensor([3, 0, 7])
    budget = CamBudget(model, 0.1, 0.02)
    evidence, _ = budget.evidence(x)
    return {
        "torch": torch,
        "part_fast": part_fast,
        "model": model,
        "vgg": Vgg(),
        "vit": Tokens(),
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "loader": [(x, y), (x.flip(3), y)],
        "x": x,
        "y": y,
        "x_adv": (x + 0.05 * torch.randn_like(x)).clamp(0, 1),
        "grad": torch.randn_like(x),
        "alpha": 0.01,
        "eps": 0.1,
        "eps_low": 0.02,
        "evidence": evidence,
        "u": part_fast.upsample_cam(evidence, (16, 16)),
    }


@pytest.fixture
def trained_run(tmp_path, monkeypatch):
    """A working directory with a run folder in it: runs/part, as `part-fast train --out runs/part` leaves one."""
    folder = tmp_path / "runs" / "part"
    folder.mkdir(parents=True)
    files.write_json(folder / "config.json", TINY_RUN.to_json())
    torch.manual_seed(1)
    export_weights(build_model(TINY_RUN.model), folder / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return folder


@pages
def test_python_blocks_run(page, trained_run):
    names = usual_names()
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)


def test_readmes_loop_trains_and_attacks_within_the_budget():
    names = usual_names()
    before = [parameter.clone() for parameter in names["model"].parameters()]
    (loop,) = (block for block in blocks(PAGES[0], "python") if "loader" in block)
    exec(loop, names)
    assert any(not torch.equal(a, b) for a, b in zip(before, names["model"].parameters(), strict=True))
    change = (names["x_adv"] - names["x"]).abs()
    assert 7 / 255 < change.max() <= 8 / 255 + 1e-6
    assert names["budget"].eps_low == 7 / 255


@pytest.mark.parametrize("n", [1, 3, 5])
def test_readmes_equivalent_is_what_the_library_computes(n):
    names = usual_names()
    torch.manual_seed(n)
    shape = (n, 3, 16, 16)
    cam = torch.rand(n, 4, 4)
    cam[-1] = 0.5 if n == 5 else cam[-1]  # a flat map, which is no evidence
    x, grad = torch.rand(shape), torch.randn(shape)
    x_adv = (x + 0.1 * torch.randn(shape)).clamp(0, 1)
    names.update(x=x, grad=grad, x_adv=x_adv, u=part_fast.upsample_cam(cam, shape[2:]))
    (equivalent,) = (block for block in blocks(PAGES[0], "python") if "important" in block)
    exec(equivalent, names)
    expected = part_fast.epsilon_map(cam, shape[2:], names["eps"], names["eps_low"])
    assert torch.equal(names["eps_map"], expected)
    assert torch.equal(names["x_adv"], part_fast.pgd_step(x_adv, grad, x, expected, names["alpha"]))


@pages
def test_every_block_is_run_by_a_test(page):
    """As Python here, as commands below, as a file of docs/write_an_op.md, by test_write_an_op.py, or as lines of
    examples/cpp, which test_from_cpp.py builds."""
    example = "".join(path.read_text() for path in (ROOT / "examples" / "cpp").iterdir())
    for fence, block in re.findall(r"^ *(`{3,}[^\n]*)\n(.*?)^ *`{3,}$", page.read_text(), re.MULTILINE | re.DOTALL):
        kind = fence.strip("`")
        if kind in ("cpp", "cmake"):
            lines = [line.strip() for line in block.strip().splitlines() if line.strip()]
            assert [line for line in lines if line not in example] == [], fence
            continue
        assert kind in ("python", "bibtex") or (page.name == "write_an_op.md" and " title=" in kind), fence


def test_a_block_that_fails_is_seen():
    with pytest.raises(NameError):
        exec("eps_mop + 1", usual_names())


# Commands


def commands(page):
    """Every command line of a page: indented or fenced as a shell's, or in backticks."""
    text = page.read_text()
    lines = [line.strip() for line in re.findall(r"^    (\S.*)$", text, re.MULTILINE)]
    lines += [line.strip() for block in blocks(page, "(?:sh|bash|console|shell)") for line in block.splitlines()]
    lines += re.findall(r"`((?:part-fast|torchrun|make) [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [
        line.removeprefix("$ ")
        for line in lines
        if re.match(r"(\$ )?(part-fast|torchrun|make|python -m part_fast)\b", line)
    ]


def parsed(arguments):
    """The command that the line is, by the command line's own parser; a folder that is not named is made up."""
    command, flags = cli._split(arguments)
    kind = cli.COMMANDS[command]
    required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    if "out" in required and "--out" not in flags:
        flags += ["--out", "run"]
    if "where" in required and (not flags or flags[0].startswith("--")):
        flags = ["run", *flags]
    return cli._parse(command, flags)


def check(arguments):
    """Whether a command's values are known as well as its flags, as far as that can be told without running it."""
    if cli._split(arguments)[0] not in cli.COMMANDS:
        return None  # `part-fast bench` lists its commands
    command = parsed(arguments)
    if isinstance(command, cli.Train):
        command.config.check()
    elif isinstance(command, (cli.Evaluate, cli.Reproduce)) and command.attacks is not None:
        check_attacks(cli._names(command.attacks))
    elif isinstance(command, cli.Masks):
        for rule in (command.rule or "zscore").split(","):
            dataclasses.replace(TINY_RUN, rule=rule.strip()).check()
    return command


@pages
def test_commands_exist(page):
    from torch.distributed.run import get_args_parser

    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in commands(page):
        program, *arguments = (word for word in shlex.split(line, comments=True) if word != "--resume")  # of a run here
        if program == "make":
            assert arguments[0] in targets, line
        elif program == "torchrun":
            launched = get_args_parser().parse_args(arguments)
            assert (launched.module, launched.training_script) == (True, "part_fast"), line
            check(launched.training_script_args)
        elif arguments[:2] == ["-m", "part_fast.gpu"]:
            gpu_parser().parse_args(arguments[2:])
        else:
            check(arguments[2:] if program == "python" else arguments)


@pages
def test_flags_exist(page):
    """Also those in backticks without their command."""
    kinds = [*cli.COMMANDS.values(), type(TINY_RUN)]
    known = {field.name.replace("_", "-") for kind in kinds for field in dataclasses.fields(kind)}
    known |= {action.dest.replace("_", "-") for action in gpu_parser()._actions}
    for said in re.findall(r"`(--[^`]+)`", page.read_text()):
        flag = said.split()[0].removeprefix("--").partition("=")[0]
        assert flag in known or flag.removeprefix("no-") in known, said


def test_commands_of_the_readme_are_found_and_wrong_ones_refused():
    assert len(commands(PAGES[0])) >= 11
    for wrong in ("train --preset cifar --out x", "evaluate x --atacks aa", "bench fast", "evaluate x --attacks pgd"):
        with pytest.raises((ValueError, AssertionError)):
            check(wrong.split())


@pages
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert "://" in target or (page.parent / target).exists(), target


# Numbers


def ratios_measured():
    """{network: {what: measured}} of docs/performance.md's table of goals."""
    text = (ROOT / "docs" / "performance.md").read_text()
    found = {}
    for what, network, measured, parts in re.findall(
        r"^\| ([A-Z][^|]+?) \| ([\w-]+) \| \d+ \| ([\d.]+x|-?[\d.]+%) \| [^|]+ \| [^|]+ \| ([\d.]+%|-) \|",
        text,
        re.MULTILINE,
    ):
        found.setdefault(network, {})[what] = measured if parts == "-" else parts
    return found


def test_the_readmes_figures_are_those_of_the_performance_page():
    measured = ratios_measured()
    rows = {
        "AT": "AT step",
        "PART, masks of every batch": "PART step, refresh every batch",
        "PART-T": "PART-T step",
        "what masks of every batch add to an AT step": "PART over AT, refresh every batch",
    }
    readme = PAGES[0].read_text()
    for row, what in rows.items():
        on_gpu, *said = re.search(rf"^\| {re.escape(row)} \| (.+) \| (.+) \| (.+) \|$", readme, re.MULTILINE).groups()
        assert on_gpu == measured_on_gpu(what), row
        for number, network in zip(said, ("resnet18", "wrn-34-10"), strict=True):
            exact = measured[network][what]
            assert number == (exact if exact.endswith("%") else f"{float(exact.rstrip('x')):.2f}"), (row, network)
    fp32 = [f"{float(measured[network]['AT step, all fp32'].rstrip('x')):.2f}" for network in ("resnet18", "wrn-34-10")]
    assert f"is {fp32[0]} and {fp32[1]} times as fast" in readme
    rates = re.findall(r"\d+,\d+", re.search(r"On an H100 ResNet-18 trains ([^.]+)\.", readme)[1])
    assert len(rates) == 2
    for rate in rates:
        assert rate in (ROOT / "docs" / "gpu.md").read_text(), rate
    with (ROOT / "docs" / "gpu" / "speedrun.csv").open(newline="") as file:
        seconds = [float(row["seconds_to_goal"]) for row in csv.DictReader(file)]
    assert f"in {sum(seconds) / 3:.0f}\nseconds, mean of three runs" in readme


def measured_on_gpu(what):
    """Of ResNet-18: how many times as fast as published, by the battery's file; what masks add, by the last steps."""
    with (ROOT / "docs" / "gpu" / "step_ratios.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if row["what"] == what]
    if row["kind"] == "faster":
        return f"{float(row['value']):.3g}"
    with (ROOT / "docs" / "gpu" / "fast_steps.csv").open(newline="") as file:
        steps = [
            row for row in csv.DictReader(file) if (row["attack"], row["steps"], row["batch"]) == ("pgd", "10", "128")
        ]
    last = {row["method"]: float(row["ms"]) for row in steps if row["model"] == "resnet18"}
    return f"{100 * (last['part'] / last['at'] - 1):.0f}%"


def test_the_answers_to_reviewers_have_numbers_of_other_pages_alone():
    measured = "".join((ROOT / "docs" / name).read_text() for name in ("performance.md", "study.md", "gpu.md"))
    published = (ROOT / "part_fast" / "experiments" / "reproduce.py").read_text()
    numbers = re.findall(r"(?<![\d.])[+-]?\d+\.\d+%?", (ROOT / "docs" / "questions.md").read_text())
    assert len(numbers) > 20
    for number in numbers:
        assert number in measured or number in published, number


# docs/target_layers.md


def layers_of(library):
    """(network, layer, whether it is the default, shape of its output for 224x224) of each row of the page's table."""
    section = (ROOT / "docs" / "target_layers.md").read_text().partition(f"## {library}\n")[2].partition("\n## ")[0]
    found = []
    for networks, layer, shape in re.findall(r"^\| (`.+?) \| (`.+?) \| \(N,(.+?)\) \|$", section, re.MULTILINE):
        name = re.match("`([^`]+)`", layer).group(1)
        sizes = tuple(int(size) for size in shape.split(","))
        found += [(network, name, "default" in layer, sizes) for network in re.findall("`([^`]+)`", networks)]
    return found


def build(library, network):
    if library == "timm":
        return pytest.importorskip("timm", reason="timm is not installed").create_model(network).eval()
    vision = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    return getattr(vision, network)(**({"init_weights": False} if network == "googlenet" else {})).eval()


ROWS = [(library, *row) for library in ("torchvision", "timm") for row in layers_of(library)]
QUICK = ("resnet18", "vgg16", "mobilenet_v2", "convnext_tiny", "swin_t")


def rows(quick=()):
    """Parameters (library, network, layer, default, shape), slow ones marked."""
    return [
        pytest.param(*row, id=f"{row[0]}-{row[1]}", marks=[] if row[0] == "torchvision" and row[1] in quick else slow)
        for row in ROWS
    ]


slow = pytest.mark.slow
columns = ("library", "network", "layer", "default", "shape")


@pytest.mark.parametrize(columns, rows(QUICK))
def test_target_layers_have_the_maps_that_the_page_says(library, network, layer, default, shape):
    # Without memory, but for what computes with numbers as it is built.
    with torch.device("cpu" if network.startswith("regnet") else "meta"):
        model = build(library, network)
        x = torch.empty(2, 3, 224, 224)
    seen = []
    found = CamBudget(model, target_layer=None if default else layer).target_layer
    found.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[1:])))
    model(x)
    assert found is model.get_submodule(layer)
    assert seen == [shape]


def test_target_layers_are_read():
    assert len(ROWS) >= 35


@pytest.mark.parametrize("attacked", [False, True], ids=["plain", "AttackModel"])
@pytest.mark.parametrize(columns, rows())
def test_target_layers_give_grad_cam(library, network, layer, default, shape, attacked):
    torch.manual_seed(0)
    model = build(library, network)
    size = 224 if any(name in network for name in ("swin", "maxvit", "coatnet")) else 96
    x = torch.rand(2, 3, size, size)
    kept = {}

    def keep(module, args, out):
        kept.update(out=out)
        return out.clone()  # DenseNet's next ReLU works in place

    hook = model.get_submodule(layer).register_forward_hook(keep)
    logits = model(x)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits.amax(1).sum(), kept["out"])
    activation = kept["out"]
    if shape[0] == shape[1]:  # (N,h,w,K)
        activation, gradient = activation.permute(0, 3, 1, 2), gradient.permute(0, 3, 1, 2)
    cam = (gradient.mean((2, 3), keepdim=True) * activation).sum(1).relu().detach()
    expected = part_fast.epsilon_map(cam, (size, size), 1.0, 0.0, "soft")
    chosen = AttackModel(model) if attacked else model
    got = CamBudget(chosen, 1.0, 0.0, rule="soft", target_layer=None if default else layer)(x)
    # Min-max divides what convolutions round otherwise by the map's range, which is small without training.
    torch.testing.assert_close(got, expected, atol=1e-3 if attacked else 2e-4, rtol=0)


# "Equivalent to" in docstrings


def expressions(thing):
    """What stands in backticks, or indented, after "Equivalent to" in a docstring."""
    text = textwrap.dedent("    " + thing.__doc__).partition("Equivalent to")[2]
    text = re.split(r"\n\s*(?:Source|Errors|Raises|Returns|Args):|\n\n", text)[0]
    assert text, thing
    return text


def quoted(thing):
    return re.findall(r"`([^`]+)`", expressions(thing))


def evaluated(thing, names, place=0):
    code = " ".join(quoted(thing)[place].split())
    return eval(compile(ast.parse(code, mode="eval"), thing.__name__, "eval"), names)


def docstring_names():
    names = usual_names() | {name: getattr(part_fast, name) for name in part_fast.__all__}
    mask = names["u"][:, None] > 0.5
    return names | {"F": F, "clip": (0.0, 1.0), "size": (16, 16), "rule": "zscore", "mask": mask, "method": "gradcam"}


def test_docstrings_of_the_ops():
    names = docstring_names()
    x_adv, x, grad, cam = (names[name] for name in ("x_adv", "x", "grad", "evidence"))
    assert torch.equal(part_fast.project_linf(x_adv, x, 0.03), evaluated(part_fast.project_linf, names | {"eps": 0.03}))
    eps = torch.rand(3, 1, 16, 16) * 0.1
    got = part_fast.pgd_step(x_adv, grad, x, eps, 0.01)
    assert torch.equal(got, evaluated(part_fast.pgd_step, names | {"eps": eps}))
    names["cam"] = cam  # and not the function
    assert torch.equal(part_fast.cam_mask(cam, (16, 16)), evaluated(part_fast.cam_mask, names))
    assert torch.equal(part_fast.epsilon_map(cam, (16, 16), 0.1, 0.02), evaluated(part_fast.epsilon_map, names))
    expected = evaluated(part_fast.packed_epsilon_map, names)
    assert torch.equal(part_fast.packed_epsilon_map(cam, (16, 16), 0.1, 0.02).bits, expected.bits)
    activation, gradient = torch.rand(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    weighted = names | {"activation": activation, "w": gradient.mean((2, 3), keepdim=True)}
    # Channels are added in another order.
    torch.testing.assert_close(part_fast.cam(activation, gradient), evaluated(part_fast.cam, weighted))


@pytest.mark.filterwarnings("ignore:'mode' parameter:DeprecationWarning")
def test_docstring_of_upsample_cam():
    import PIL.Image

    cam = torch.rand(1, 4, 4)
    normalized = ((cam - cam.min()) / (cam.max() - cam.min()))[0].numpy()
    names = {"PIL": PIL, "normalized": normalized, "W": 16, "H": 16}
    expected = torch.from_numpy(np.array(evaluated(part_fast.upsample_cam, names)))
    torch.testing.assert_close(part_fast.upsample_cam(cam, (16, 16))[0], expected)


def test_docstring_of_pack():
    names = docstring_names() | {"numpy": np}
    packed = part_fast.PackedEpsilon.pack(names["mask"], 0.1, 0.02)
    assert torch.equal(packed.bits, torch.from_numpy(evaluated(part_fast.PackedEpsilon.pack, names)))


def test_docstring_of_pgd():
    net = golden_net()
    names = docstring_names() | {"model": net, "eps": 0.05, "alpha": 0.02, "steps": 3}
    code = textwrap.dedent("\n".join(line for line in expressions(pgd).splitlines()[1:] if line.strip()))
    torch.manual_seed(0)
    exec(code, names)
    torch.manual_seed(0)
    got = pgd(net, names["x"], names["y"], 0.05, 0.02, 3)
    assert torch.equal(got, names["x_adv"].detach())


def test_docstring_of_the_pgd_class():
    net = golden_net()
    names = docstring_names() | {"pgd": pgd, "model": net, "steps": 2, "start": "uniform", "clip": (0, 1)}
    names |= {"images": names["x"], "labels": names["y"], "eps": 0.05, "alpha": 0.02}
    torch.manual_seed(0)
    expected = evaluated(part_fast.PGD, names)
    torch.manual_seed(0)
    assert torch.equal(part_fast.PGD(net, 0.05, 0.02, 2)(names["x"], names["y"]), expected)


@pytest.mark.parametrize(("loss", "objective"), [("trades", trades_objective), ("mart", mart_objective)])
def test_docstrings_of_the_losses(loss, objective):
    net = golden_net()
    names = docstring_names() | {"pgd": pgd, "model": net, "beta": 6.0, "step_size": 0.01, "perturb_steps": 2}
    names |= {"x_natural": names["x"], "epsilon": 0.05, f"{loss}_objective": objective}
    function = getattr(part_fast, f"{loss}_loss")
    torch.manual_seed(0)
    names["noise"] = torch.randn_like(names["x"])
    result, attack = quoted(function)
    target, _, code = " ".join(attack.split()).partition(" = ")
    names[target] = eval(code, names)
    net.train()  # the loss forwards in train mode
    expected = eval(result, names)
    net.load_state_dict(golden_net().state_dict())
    torch.manual_seed(0)
    got = function(net, names["x"], names["y"], None, 0.01, 0.05, 2, 6.0)
    torch.testing.assert_close(got, expected)


def test_docstring_of_cam_budget():
    net = golden_net()
    x = docstring_names()["x"]
    kept = {}
    hook = net.relu2.register_forward_hook(lambda module, args, out: kept.update(out=out))
    logits = net(x)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits.amax(1).sum(), kept["out"])
    names = docstring_names() | {"A": kept["out"].detach(), "dA": gradient.contiguous(), "eps": 0.1, "rule": "soft"}
    got = CamBudget(net, 0.1, 0.02, rule="soft", target_layer="relu2")(x)
    torch.testing.assert_close(got, evaluated(CamBudget, names), atol=1e-6, rtol=1e-5)


def test_docstrings_of_the_data():
    images = load_once("demo", "train").images[:5]
    names = docstring_names() | {"images": images, "draw_augmentation": draw_augmentation}
    assert torch.equal(to_float(images), evaluated(to_float, names))
    torch.manual_seed(0)
    code = quoted(augment)[0].replace(", ...", "")
    expected = eval(code, names)
    torch.manual_seed(0)
    assert torch.equal(augment(images), expected)


def test_docstring_of_load_model(trained_run):
    names = {"load_weights": load_weights, "build_model": build_model, "model": TINY_RUN.model, "num_classes": 10}
    (code,) = (code for code in quoted(part_fast.load_model) if code.endswith("eval()"))
    expected = eval(code, names | {"weights": trained_run / "model.safetensors"})
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(part_fast.load_model(trained_run)(x), expected(x))


def test_docstring_of_attack_model():
    model = resnet_small()
    x = torch.rand(2, 3, 16, 16)
    fast = AttackModel(model)
    (plain,) = [code for code in quoted(AttackModel) if code.endswith("eval()")]
    expected = eval(plain, {"model": model})(x)
    # What a folded BatchNorm rounds otherwise.
    torch.testing.assert_close(fast(x), expected, atol=1e-4, rtol=1e-4)


def test_docstring_of_mma():
    """With one wrong class to attack there is no choice: it is pgd towards that class."""
    net = golden_net()
    names = docstring_names() | {"pgd": pgd, "model": net, "eps": 0.05, "alpha": 0.02, "steps": 2, "start": "zero"}
    x, y = names["x"], names["y"]
    wrong = net(x).detach().scatter(1, y[:, None], -torch.inf).argmax(1)

    def towards_c(logits, labels):
        of, to = (logits.gather(1, index[:, None])[:, 0] for index in (labels, wrong))
        return -(of - to + 50).clamp(min=0).sum()

    expected = evaluated(mma, names | {"towards_c": towards_c})
    assert torch.equal(mma(net, x, y, 0.05, 0.02, 2, k=1, start="zero"), expected)
