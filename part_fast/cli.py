"""`part-fast`: one dataclass a command, whose fields are its flags; each command calls one function."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from typing_extensions import Doc

import part_fast
from part_fast import backends, distributed
from part_fast.attacks.catalogue import for_evaluation
from part_fast.budgets.rules import RULES
from part_fast.choices import check_choice, described, either
from part_fast.config import PRESETS, Switch, TrainConfig, parse_number, preset, read_config
from part_fast.data.catalogue import DATASETS
from part_fast.errors import BadValueError, UsageError
from part_fast.models.catalogue import MODELS
from part_fast.models.external import is_own_code, refuse_own_code
from part_fast.ops.cam import METHODS
from part_fast.optional import needs

with needs("tyro", "train"):
    import tyro

# Flags that several commands have. Of a run's, None stands for what it was trained with.
DatasetOfRun = Annotated[str | None, Doc(f"{described(DATASETS)}; default: the run's.")]
ModelOfRun = Annotated[str | None, Doc(f"{described(MODELS)}; default: the run's.")]
WeightsOfRun = Annotated[str | None, Doc("Of a run folder: last, best or averaged; default: last.")]
_ONLY = "The only folder to look for the data set in"
RootOfRun = Annotated[str | None, Doc(f"{_ONLY}; default: where the run found it, else as in train.")]
Root = Annotated[str | None, Doc(f"{_ONLY}; default: as in train.")]
Download = Annotated[bool, Doc("Download the data set where it is not found.")]
Device = Annotated[str, Doc("cpu, cuda, cuda:1, ...; auto takes a CUDA device where there is one.")]


@dataclass
class Train:
    """Train a network by PART or a plain method; a run folder: config.json, metrics.csv, model.safetensors, ..."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    out: Path
    """The run folder to make."""
    resume: bool = False
    """Go on with the run in the folder; its configuration is the default then."""
    overwrite: bool = False
    """Replace the run in the folder."""
    tensorboard: bool = False
    """Write TensorBoard event files too."""
    save_every: float = 10.0
    """Minutes between two states within an epoch, from which --resume goes on; each end of an epoch leaves one too."""

    def run(self) -> None:
        from part_fast.training.checkpoint import STATE
        from part_fast.training.loop import train

        before = _stamp(self.out / STATE)
        how = {name: getattr(self, name) for name in ("resume", "overwrite", "tensorboard", "save_every")}
        try:
            train(self.config, self.out, **how)
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
            # A state of before, which --overwrite had not replaced yet, is another run's.
            begun = self.resume or _stamp(self.out / STATE) != before
            again = f" --model {self.config.model}" if is_own_code(self.config.model) else ""
            said = f"go on with: part-fast train --out {self.out} --resume{again}" if begun else "no run was begun"
            if distributed.rank() == 0:
                print(f"stopped; {said}", file=sys.stderr)
            raise
        print(f"run folder: {self.out}")


@dataclass
class Evaluate:
    """Measure accuracy on natural and attacked test images, with standard errors: evaluation.json and .csv."""

    where: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR_OR_CHECKPOINT")]
    """A run folder, or a checkpoint file: in a run folder, or together with --dataset and --model."""
    attacks: Annotated[str, Doc(f"Separated by commas: {described(for_evaluation())}.")] = "natural,pgd20"
    n: int | None = None
    """A balanced subset of so many test images; default: those of the run."""
    out: Path | None = None
    """The folder to write to; default: the run folder, or the checkpoint's."""
    overwrite: bool = False
    """Replace an evaluation with other settings."""
    resume: bool = False
    """Do not repeat an attack whose result the folder holds."""
    dataset: DatasetOfRun = None
    model: ModelOfRun = None
    weights: WeightsOfRun = None
    root: RootOfRun = None
    download: Download = False
    eps: float | None = None
    """How far a pixel may move; default: as in training."""
    alpha: float | None = None
    """Step size; default: as in training."""
    batch_size: int = 256
    """Images per batch."""
    seed: int = 0
    """Seed of the attack's random start."""
    device: Device = "auto"
    sanity_images: int = 0
    """Look on so many of the images for signs of gradient masking: a robustness that comes from useless gradients."""
    sweep: str | None = None
    """Besides, accuracy on at most 1,000 of the images as PGD grows: in eps, in steps, or in eps,steps; sweep.json."""

    def run(self) -> None:
        from part_fast.evaluation.accuracy import evaluate
        from part_fast.evaluation.sweep import check_kinds, sweep
        from part_fast.evaluation.trained import described_weights
        from part_fast.report.files import table

        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["attacks"] = _names(self.attacks)
        kinds = values.pop("sweep")
        if kinds is not None:
            check_kinds(_names(kinds))
        record = evaluate(**values)
        print(f"weights: {described_weights(Path(record['checkpoint']))}")
        rows = [
            (name, f"{100 * r['accuracy']:.2f}", f"{100 * r['standard_error']:.2f}", str(r["n"]), f"{r['seconds']:.1f}")
            for name, r in record["results"].items()
        ]
        print(table(("attack", "accuracy %", "standard error", "images", "seconds"), rows))
        for warning in record["warnings"]:
            print(f"warning: {warning}")
        if kinds is None:
            return
        for name in ("attacks", "sanity_images"):
            del values[name]
        for kind, curve in sweep(kinds=_names(kinds), **values)["curves"].items():
            points = [
                (_as_written(p[kind]), f"{100 * p['accuracy']:.2f}", f"{100 * p['standard_error']:.2f}")
                for p in curve["points"]
            ]
            print(f"\n{table((kind, 'accuracy %', 'standard error'), points)}")
            for warning in curve["warnings"]:
                print(f"warning: {warning}")


@dataclass
class Masks:
    """Draw test images as a PNG grid: image, class activation map, eps map, adversarial image, its difference x8."""

    where: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR_OR_CHECKPOINT")]
    """A run folder, or a checkpoint file: in a run folder, or together with --dataset and --model."""
    out: Path
    """The PNG file to make; a JSON file with the titles' contents goes beside it."""
    n: int = 8
    """How many images, a row each, with classes as equal in number as can be."""
    rule: Annotated[str | None, Doc(f"{described(RULES)}; default: the run's. With commas: a map by each.")] = None
    target_layer: str | None = None
    """The layer whose output CAMs explain, by its name in the network; default: the run's, else layer4 or block3."""
    overwrite: bool = False
    """Replace the files."""
    dataset: DatasetOfRun = None
    model: ModelOfRun = None
    weights: WeightsOfRun = None
    root: RootOfRun = None
    download: Download = False
    seed: int = 0
    """Seed of the attack's random start."""
    device: Device = "auto"

    def run(self) -> None:
        from part_fast.evaluation.masks import masks

        masks(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        print(f"grid: {self.out}")


@dataclass
class Export:
    """Write a model's weights for others: safetensors, or a .pt with RobustBench's key names."""

    where: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR_OR_CHECKPOINT")]
    """A run folder, or a checkpoint file: in a run folder, or together with --dataset and --model."""
    out: Path
    """The file to make: .safetensors, or .pt for RobustBench's names."""
    sub_block1: bool = False
    """Add the unused sub_block1 that some published WideResNets carry."""
    overwrite: bool = False
    """Replace the file."""
    dataset: str | None = None
    """The data set that the checkpoint was trained on; default: the run's."""
    model: ModelOfRun = None
    weights: WeightsOfRun = None
    root: RootOfRun = None

    def run(self) -> None:
        from part_fast.evaluation.trained import described_weights, load_trained
        from part_fast.models.checkpoints import export_weights

        net, _, _, path = load_trained(
            self.where,
            1,
            dataset=self.dataset,
            model=self.model,
            weights=self.weights,
            root=self.root,
            device="cpu",
        )
        made = export_weights(net, self.out, sub_block1=self.sub_block1, overwrite=self.overwrite)
        print(f"weights: {described_weights(path)}")
        print(made)


@dataclass
class BenchOps:
    """Time every op on every backend, beside torch.compile, published masks and a copy of the same bytes."""

    out: Path = Path("runs/bench")
    """The folder to make: ops.csv, ratios.csv, ops.png, environment.json."""
    only: tuple[str, ...] = ()
    """The ops to time; default: all."""
    quick: bool = False
    """One or two cases of each op, and fewer rounds."""
    rounds: int | None = None
    """Rounds, each of which times everything once; default: 21, with --quick 7."""
    threads: tuple[int, ...] = ()
    """Numbers of CPU threads; each case is measured with each; default: as many as torch has."""
    device: Device = "auto"
    overwrite: bool = False
    """Replace the files in the folder."""

    def run(self) -> None:
        from part_fast.bench.ops import ops

        _bench(ops, self)


@dataclass
class BenchStep:
    """Time training steps beside published loops and against goals, and show where their time goes."""

    out: Path = Path("runs/bench")
    """The folder to make: step.csv, step_ratios.csv, step_profile.csv, step.json, step.md, step.png."""
    models: tuple[str, ...] = ()
    """Networks to time; default: resnet18 and wrn-34-10, with --quick resnet-small."""
    batch_size: int | None = None
    """Images per batch; default: 32, of wrn-34-10 4, on a GPU 128."""
    precision: str = "auto"
    """Of our steps: fp32, bf16 or fp16; auto: bf16 where the hardware multiplies in it, else fp32."""
    compile: bool = False
    """Run our attacks by torch.compile."""
    cuda_graph: bool = False
    """Capture the steps of our attacks as a CUDA graph."""
    quick: bool = False
    """A small network and fewer rounds."""
    rounds: int | None = None
    """Rounds, each of which times everything once; default: 7, with --quick 3."""
    device: Device = "auto"
    overwrite: bool = False
    """Replace the files in the folder."""

    def run(self) -> None:
        from part_fast.bench.steps import steps

        _bench(steps, self)


@dataclass
class BenchAttack:
    """Time an attack step's forward and gradient, change by change, from published code to AttackModel."""

    out: Path = Path("runs/bench/attack")
    """The folder to make: attack.csv, attack.png, environment.json."""
    models: tuple[str, ...] = ()
    """Networks to time; default: resnet18 and wrn-34-10, with --quick resnet-small."""
    batch_size: int | None = None
    """Images per batch; default: 32, of wrn-34-10 4, on a GPU 128."""
    compile: bool = False
    """With the variants by torch.compile."""
    quick: bool = False
    """A small network and fewer rounds."""
    rounds: int | None = None
    """Rounds, each of which times everything once; default: 9, with --quick 3."""
    threads: tuple[int, ...] = ()
    """Numbers of CPU threads; each network is measured with each; default: as many as torch has."""
    device: Device = "auto"
    overwrite: bool = False
    """Replace the files in the folder."""

    def run(self) -> None:
        from part_fast.bench.attack import attack

        _bench(attack, self)


@dataclass
class BenchCam:
    """Time eps maps (CamBudget) beside the grad-cam package and published masks, in forwards of the batch."""

    out: Path = Path("runs/bench/cam")
    """The folder to make: cam.csv, cam.png, environment.json."""
    models: tuple[str, ...] = ()
    """Networks to time; default: resnet18 and wrn-34-10, with --quick resnet-small."""
    batch_sizes: tuple[int, ...] = ()
    """Images per batch; default: 1 and 32, of wrn-34-10 1 and 4, on a GPU 1 and 128; with --quick 32 or 128."""
    methods: Annotated[
        tuple[str, ...], Doc(f"Methods of CAMs: {either(METHODS)}; default: all, with --quick gradcam.")
    ] = ()
    quick: bool = False
    """A small network, one method, and fewer rounds."""
    rounds: int | None = None
    """Rounds, each of which times everything once; default: 9, with --quick 3."""
    threads: tuple[int, ...] = ()
    """Numbers of CPU threads; each case is measured with each; default: as many as torch has."""
    device: Device = "auto"
    overwrite: bool = False
    """Replace the files in the folder."""

    def run(self) -> None:
        from part_fast.bench.cam import cam

        _bench(cam, self)


@dataclass
class BenchScaling:
    """Time PART steps of more attack steps, width, resolution and batch, beside the count of operations."""

    out: Path = Path("runs/bench/scaling")
    """The folder to make: scaling.csv, scaling.png, environment.json."""
    quick: bool = False
    """Four of the changes, and fewer rounds."""
    rounds: int | None = None
    """Rounds, each of which times everything once; default: 5, with --quick 3."""
    threads: tuple[int, ...] = ()
    """Numbers of CPU threads; the changes are measured with each; default: 1."""
    device: Device = "auto"
    overwrite: bool = False
    """Replace the files in the folder."""

    def run(self) -> None:
        from part_fast.bench.scaling import scaling

        _bench(scaling, self)


Bench = BenchOps | BenchStep | BenchAttack | BenchCam | BenchScaling


def _bench(measure: Callable[..., Any], flags: Bench) -> None:
    """Call a benchmark with its command's flags."""
    from part_fast.report import figures

    figures.load_matplotlib()  # the published baselines import it themselves
    measure(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(flags)})


@dataclass
class Reproduce:
    """Train and evaluate every row of a results table of PART's authors (ICML 2024), and print ours beside it."""

    table: Annotated[str, Doc(f"The table of the data set: {either(_published())}.")]
    out: Path = Path("runs/reproduce")
    """The folder to make or to go on with: a run folder per row and seed, reproduce.json, reproduce.csv."""
    seeds: int | None = None
    """Runs of each row; default: 3, with --scale small 1."""
    scale: str = "full"
    """full: the published setting; small: the same rows on the demo's images and small network, 32 test images."""
    attacks: Annotated[
        str | None, Doc(f"Separated by commas: {described(for_evaluation())}; default: the table's.")
    ] = None
    dry_run: bool = False
    """Print the commands and an estimate of the time from a measured step."""
    root: Root = None
    download: Download = False
    device: Device = "auto"

    def run(self) -> None:
        from part_fast.experiments.reproduce import MEASURES, reproduce

        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["attacks"] = MEASURES if self.attacks is None else _names(self.attacks)
        reproduce(**values)


def _published() -> Iterable[str]:
    from part_fast.experiments.reproduce import POSTER

    return POSTER


@dataclass
class Study:
    """Compare plain training (AT), PART, and PART with other eps maps: does it matter which pixels keep eps?"""

    out: Path
    """The folder to make or to go on with: a run folder per arm and seed, study.json, two tables, study.png."""
    dataset: str = "fashion-mnist"
    """The images that the runs are trained on: fashion-mnist or cifar10."""
    scale: str = "small"
    """small: a small network on some of the images, for CPU cores; full, of cifar10: ResNet-18 on all, for a GPU."""
    arms: tuple[str, ...] = ()
    """The arms to train now, such as AT PART; default: all. The tables show all that have results."""
    seeds: int = 5
    """Runs of each arm."""
    results: Path | None = None
    """The folder of results, a small file per arm and seed, from which a study goes on without the run folders;
    default: results in the folder."""
    autoattack: bool = False
    """Test AT and PART by AutoAttack too, on 1,000 images."""
    root: Root = None
    download: Download = False
    device: Device = "auto"

    def run(self) -> None:
        from part_fast.experiments.study import CONFIGS, study

        scales = CONFIGS[check_choice("dataset", self.dataset, CONFIGS)]
        config = scales[check_choice(f"scale of {self.dataset}", self.scale, scales)]
        config = dataclasses.replace(config, root=self.root, download=self.download, device=self.device)
        only = self.arms or None
        study(self.out, config=config, seeds=self.seeds, only=only, results=self.results, autoattack=self.autoattack)


@dataclass
class Speedrun:
    """Train a network until it is as accurate as published adversarial training, and say in how many seconds."""

    out: Path
    """The folder to make or to go on with: a run folder per run, speedrun.json, speedrun.csv."""
    scale: str = "full"
    """full: ResNet-18 on CIFAR-10; small: a small network on 20,000 of its images, minutes on two CPU cores."""
    runs: int | None = None
    """Networks to train, a seed each; default: 3 at full scale, else 1."""
    parts: bool = False
    """Train as many without each of what makes it fast, too."""
    autoattack: Switch = "auto"
    """Test by AutoAttack too, on 1,000 images; auto: at full scale."""
    root: Root = None
    download: Download = False
    device: Device = "auto"

    def run(self) -> None:
        from part_fast.experiments.speedrun import speedrun

        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        speedrun(**{**values, "autoattack": None if self.autoattack == "auto" else self.autoattack})


@dataclass
class Attacks:
    """Compare the attacks to train with: accuracy, seconds and memory, for equal epochs and for equal seconds."""

    out: Path
    """The folder to make or to go on with: run folders and results, attacks.json, attacks.csv."""
    model: Annotated[str, Doc(f"The network: {described(MODELS)}.")] = "resnet-small"
    epochs: int = 10
    """Epochs of each attack; for equal seconds, epochs of PGD-10: every other attack trains as long as these take."""
    train_size: int | None = 10_000
    """Train on a balanced subset of so many images; None: all."""
    seeds: int = 1
    """Runs of each attack."""
    equal: tuple[str, ...] = ("epochs", "seconds")
    """What is equal between attacks: epochs, seconds, or both, a table each."""
    results: Path | None = None
    """The folder of results, a small file per network, from which the comparison goes on without the run folders;
    default: results in the folder."""
    autoattack: bool = True
    """Test by AutoAttack too, on 1,000 images."""
    root: Root = None
    download: Download = False
    device: Device = "auto"

    def run(self) -> None:
        from part_fast.experiments.attacks import CONFIG, attacks

        names = ("model", "epochs", "train_size", "root", "download", "device")
        config = dataclasses.replace(CONFIG, **{name: getattr(self, name) for name in names})
        own = ("seeds", "equal", "results", "autoattack")
        attacks(self.out, config=config, **{name: getattr(self, name) for name in own})


@dataclass
class Demo:
    """Compare plain adversarial training (AT) and PART on 6,000 real images, in some minutes on two CPU cores."""

    out: Path
    """The folder to make: a run folder per model, results.json, results.csv, curves.png, masks.png."""
    overwrite: bool = False
    """Replace the demo in the folder."""

    def run(self) -> None:
        from part_fast.experiments.demo import demo

        demo(self.out, overwrite=self.overwrite)


@dataclass
class Report:
    """One HTML page about runs: accuracies with spread, curves, masks over epochs, robustness, speed, what differs."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN")]
    """Run folders, or folders that hold some: a demo's, a study's, a reproduction's."""
    out: Path
    """The .html file to make, which needs no other file."""
    mask_epochs: tuple[int, ...] = ()
    """Epochs whose masks to show, such as 30 40 50 60; default: at most seven, evenly spaced."""
    overwrite: bool = False
    """Replace the file."""

    def run(self) -> None:
        from part_fast.experiments.report import report

        made = report(self.runs, self.out, mask_epochs=self.mask_epochs, overwrite=self.overwrite)
        for warning in made["warnings"]:
            print(f"warning: {warning}")
        print(f"page: {self.out}")


@dataclass
class Info:
    """Print versions, devices, threads, and which backends are live, which are not and why."""

    json: bool = False
    """As JSON."""

    def run(self) -> None:
        from part_fast.report.environment import environment, environment_text

        record = environment()
        print(json.dumps(record, indent=2) if self.json else environment_text(record))


Command = Train | Evaluate | Masks | Export | Bench | Reproduce | Study | Speedrun | Attacks | Demo | Report | Info
# A name is one word, or two, as it is typed.
COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "evaluate": Evaluate,
    "masks": Masks,
    "export": Export,
    "bench ops": BenchOps,
    "bench step": BenchStep,
    "bench attack": BenchAttack,
    "bench cam": BenchCam,
    "bench scaling": BenchScaling,
    "reproduce": Reproduce,
    "study": Study,
    "speedrun": Speedrun,
    "attacks": Attacks,
    "demo": Demo,
    "report": Report,
    "info": Info,
}

HELP = ("-h", "--help")

SWITCH: dict[str, bool | str] = {"on": True, "off": False, "auto": "auto"}

_registry = tyro.constructors.ConstructorRegistry()


@_registry.primitive_rule
def _values(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Numbers, of which a float may be written as a fraction; and None for each field that may be None."""
    kinds: tuple[tuple[type[Any], str, Callable[[str], Any]], ...] = (
        (float, "NUMBER", parse_number),
        (int, "INT", _whole_number),
        (str, "STR", str),
        (Path, "PATH", Path),
    )
    for kind, metavar, read in kinds:
        if info.type in (kind, kind | None):
            return _value(kind, metavar, read, optional=info.type != kind)
    return None


def _value(
    kind: type[Any], metavar: str, read: Callable[[str], Any], optional: bool
) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    kinds = (float, int) if kind is float else kind
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda texts: None if optional and texts[0] == "None" else read(texts[0]),
        is_instance=lambda value: isinstance(value, kinds) or (optional and value is None),
        str_from_instance=lambda value: [_as_written(value) if isinstance(value, float) else str(value)],
    )


@_registry.primitive_rule
def _whole_numbers(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Any number of whole numbers, of which the message names the wrong one."""
    if info.type != tuple[int, ...]:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[INT [INT ...]]",
        instance_from_str=lambda texts: tuple(map(_whole_number, texts)),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(one, int) for one in value),
        str_from_instance=lambda value: list(map(str, value)),
    )


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise BadValueError(f"takes a whole number, got {text!r}") from None


@_registry.primitive_rule
def _switches(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """on, off or auto."""
    if info.type != Switch:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{on,off,auto}",
        choices=tuple(SWITCH),
        instance_from_str=lambda arguments: SWITCH[arguments[0]],
        is_instance=lambda value: value in SWITCH.values(),
        str_from_instance=lambda value: [next(name for name, meant in SWITCH.items() if meant == value)],
    )


def _spelled_out(kind: type[Command], arguments: list[str]) -> list[str]:
    """A switch given as a flag, with its value: --cuda-graph, --no-cuda-graph."""
    types = get_type_hints(TrainConfig if kind is Train else kind)
    switches = [name.replace("_", "-") for name, type_ in types.items() if type_ == Switch]
    off = {f"--no-{name}": f"--{name}" for name in switches}
    found: list[str] = []
    for i, argument in enumerate(arguments):
        flag = argument.replace("_", "-")
        following = arguments[i + 1] if i + 1 < len(arguments) else "--"
        if flag in off:
            found += [off[flag], "off"]
        elif flag in off.values() and following.startswith("-"):
            found += [flag, "on"]
        else:
            found.append(argument)
    return found


def _stamp(path: Path) -> int | None:
    """When a file was written; None where there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _as_written(value: float) -> str:
    """8/255 where that is shorter to say than 0.0313725."""
    decimal, levels = f"{value:.6g}", round(255 * value)
    return f"{levels}/255" if len(decimal) > 7 and math.isclose(255 * value, levels) else decimal


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line, without the program's name; the exit code: 0, 2 for bad input, 130 for Ctrl-C.

    SystemExit(143) where `part-fast train` was stopped by SIGTERM, after it has saved its state.

    What the caller can mend, a `UsageError` or an OSError, is one line on stderr; every other exception keeps its
    traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in HELP:
        print(_usage(COMMANDS))
        return 0
    if arguments[0] == "--version":
        print(part_fast.__version__)
        return 0
    with warnings.catch_warnings():
        warnings.showwarning = _warn  # type: ignore[assignment]
        try:
            backends.check_environment()
            command, flags = _split(arguments)
            if command in COMMANDS:
                _parse(command, flags).run()
            else:
                print(_usage(_commands_of(command)))
        except KeyboardInterrupt:
            return 130
        except (UsageError, OSError) as error:
            print(f"part-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
    return 0


def _usage(commands: Iterable[str]) -> str:
    listed = "\n".join(f"  {name:<13} {(COMMANDS[name].__doc__ or '').splitlines()[0]}" for name in commands)
    return (
        "usage: part-fast COMMAND [FLAGS]\n\nAdversarial training with an eps for each pixel (PART), from class "
        f"activation maps (CAM).\n\n{listed}\n\npart-fast COMMAND --help lists its flags."
    )


def _commands_of(first: str) -> list[str]:
    """The commands of two words that begin with that one."""
    return [name for name in COMMANDS if name.startswith(f"{first} ")]


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    """(the command's name, its flags); of two words, the first one alone where only its commands are asked for."""
    first, *others = arguments
    commands = _commands_of(first)
    if first in COMMANDS or (commands and (not others or others[0] in HELP)):
        return first, others
    if not commands:
        names = dict.fromkeys(name.partition(" ")[0] for name in COMMANDS)
        raise BadValueError(f"unknown command {first!r}; known: {', '.join(names)}")
    if f"{first} {others[0]}" not in commands:
        known = either(name.partition(" ")[2] for name in commands)
        raise BadValueError(f"{first} takes {known}, got {others[0]!r}")
    return f"{first} {others[0]}", others[1:]


def _parse(command: str, arguments: list[str]) -> Command:
    kind = COMMANDS[command]
    default = None
    if kind is Train:
        default = Train(_starting_config(arguments), out=tyro.MISSING)
    arguments = _spelled_out(kind, arguments)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            prog = f"part-fast {command}"
            return tyro.cli(kind, prog=prog, args=arguments, default=default, registry=_registry)  # type: ignore[return-value]
    except SystemExit as stop:
        if not stop.code:
            raise
    raise BadValueError(_one_line(said.getvalue(), command))


def _starting_config(arguments: list[str]) -> TrainConfig:
    """What the other flags change: the preset named; else, with --resume, the run's own; else the first preset."""
    named = _flag(arguments, "--preset")
    if named is not None:
        return preset(named)
    out = _flag(arguments, "--out")
    if "--resume" in arguments and out is not None:
        config = read_config(Path(out))
        if _flag(arguments, "--model") is None:
            refuse_own_code(config.model, Path(out) / "config.json")
        return config
    return next(iter(PRESETS.values()))


def _flag(arguments: list[str], name: str) -> str | None:
    """The value of a flag: of several the last one, as in parsing."""
    found = None
    for i, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            found = argument.partition("=")[2]
        if argument == name and i + 1 < len(arguments):
            found = arguments[i + 1]
    return found


def _one_line(box: str, command: str) -> str:
    """The first paragraph of tyro's message, and the flags that it proposes.

    The message is a title, lines, and rules between paragraphs, framed where UTF-8 is spoken.
    """
    lines = [line.strip(" │") for line in box.splitlines()[1:]]
    blank = [not line.strip("-─╭╮╰╯") for line in lines]
    groups = itertools.groupby(zip(blank, lines, strict=True), key=lambda pair: pair[0])
    paragraphs = [[line for _, line in group] for is_rule, group in groups if not is_rule] or [["bad arguments"]]
    said = " ".join(paragraphs[0])
    for title, *proposed in paragraphs[1:]:
        flags = [line.partition(" ")[0].rstrip(",") for line in proposed if line.startswith("--")]
        if title.startswith("Perhaps you meant") and flags:
            said += f"; perhaps you meant {' or '.join(flags)}"
    return f"{said} (part-fast {command} --help)"


def _warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
    print(f"part-fast: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
