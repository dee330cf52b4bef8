"""What defines a training run: one dataclass, and the presets with the numbers of the published experiments."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_type_hints

import torch
from typing_extensions import Doc

from part_fast import checks
from part_fast.attack_model import PRECISIONS
from part_fast.attacks.catalogue import ATTACKS, for_training
from part_fast.budgets.cam import CAM_CHOICES, native_methods
from part_fast.budgets.controls import CONTROLS, check_control
from part_fast.budgets.rules import RULES, find_rule, has_bits
from part_fast.choices import check_choice, described, either
from part_fast.data.catalogue import DATASETS
from part_fast.errors import BadValueError, MissingFileError, UsageError
from part_fast.methods import METHODS
from part_fast.models.catalogue import MODELS
from part_fast.ops.packed_epsilon import eps_pair
from part_fast.reading import read_json

SCHEDULES = {
    "piecewise": "at --lr-drops",
    "cosine": "to 0",
    "cyclic": "up in the first 40 %, then down to 0",
}
CYCLIC_PEAK = 0.4  # of the epochs, as in the code of Rice et al., "Overfitting in adversarially robust deep learning"


# What is done about an update whose loss or gradients are not finite.
ON_NONFINITE = {
    "stop": "with the step and its images",
    "skip": "leave weights and statistics as they were, and count it",
}

Switch = bool | Literal["auto"]


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Images are in [0,1]; eps, eps_low and alpha are in their units, so 8/255 is 8 gray levels.

    Where a field takes a name, its help is made from the table that the names are in. The command line and `from_json`
    evaluate these annotations, and nothing else does.
    """

    preset: Annotated[str, Doc(f"The set of numbers to start from: {either(PRESETS)}.")] = "demo"
    method: Annotated[str, Doc(f"How it trains: {described(METHODS)}.")] = "part"
    attack: Annotated[str, Doc(f"The inner attack: {described(for_training())}.")] = "pgd"
    dataset: Annotated[str, Doc(f"The images: {described(DATASETS)}.")] = "demo"
    root: str | None = None
    """The only folder to look for the data set in; default: PART_FAST_DATA, ./data, ~/.cache/part_fast and Debian's."""
    download: Annotated[
        bool, Doc(f"Download the data set where it is not found; {downloadable()} can be downloaded.")
    ] = False
    augment: bool = True
    """Random crop with padding 4 and random flip."""
    cutmix: float = 0.0
    """How probable it is that CutMix mixes a batch: a box of each image shows another one, labels follow by area."""
    extra: str | None = None
    """An .npz of extra images: image, uint8 (N,H,W,3), and label (N,); an epoch stays as long as without them."""
    extra_fraction: float = 0.7
    """With extra: how much of every batch they are."""
    train_size: int | None = None
    """Train on a balanced subset of so many images; default: all."""
    test_size: int | None = None
    """Test on a balanced subset of so many images; default: all."""
    validation: int = 0
    """Keep so many training images aside, a balanced part drawn by the seed; PGD-20 on them in each test picks
    best.safetensors, of plain and averaged weights. 0: none."""
    model: Annotated[str, Doc(f"The network: {described(MODELS)}.")] = "resnet-small"
    init: str | None = None
    """A checkpoint to start from; default: random weights."""
    epochs: int = 80
    """Epochs in all, warm-up included."""
    warmup_epochs: Annotated[int, Doc(f"Epochs with the plain method first: {_warm_ups()}.")] = 20
    batch_size: int = 128
    """Images per batch, and per process where there are several."""
    accumulate: int = 1
    """Batches whose gradients are added up for one update of the weights."""
    lr: float = 0.01
    """Learning rate of SGD."""
    lr_drops: tuple[int, ...] = (60, 90)
    """Epochs, counted from the first of the warm-up, at which the learning rate falls to a tenth."""
    schedule: Annotated[str, Doc(f"How the learning rate falls: {described(SCHEDULES)}.")] = "piecewise"
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's form of the momentum."""
    weight_decay: float = 2e-4
    """Weight decay of SGD."""
    eps: float = 8 / 255
    """How far a pixel may move; images are in [0,1], so 8/255 is 8 gray levels."""
    eps_low: Annotated[
        float, Doc(f"How far a pixel may move that matters little to the prediction ({_weighted()}).")
    ] = 7 / 255
    alpha: Annotated[
        float, Doc(f"How far one step of the attack moves a pixel ({_stepping()}), and one of PGD in tests.")
    ] = 2 / 255
    steps: Annotated[int, Doc(f"Steps of the attack ({_stepping()}; others take one, of the pixel's eps).")] = 10
    beta: Annotated[float, Doc(f"Weight of the robust term of the loss ({_with_beta()}).")] = 6.0
    pgi_lambda: Annotated[float, Doc(f"Weight of the regulariser in the loss ({_that('regularised')}).")] = 10.0
    perturbation_reset: Annotated[
        int, Doc(f"Epochs after which remembered perturbations are drawn anew, 0: never ({_that('remembers')}).")
    ] = 40
    label_smoothing: float = 0.0
    """In the loss, how much of each label is shared evenly among all classes; the attack gets labels as they are."""
    rule: Annotated[str, Doc(f"Which pixels get the full eps, by the class activation map: {described(RULES)}.")] = (
        "zscore"
    )
    refresh: str = "batch"
    """When masks, which pixels keep the full eps, are made: batch, of each batch; K, of all images every K epochs."""
    control: Annotated[str, Doc(f"What is done to the masks, to tell whether they matter: {either(CONTROLS)}.")] = (
        "none"
    )
    released: bool = False
    """What the authors' published code does: rule released, control permuted, learning rate dropped by the epochs after
    the warm-up; after it, the attacks that it has start uniformly within eps, not the eps map, pgd's unclipped."""
    cam: Annotated[str, Doc(f"How the class activation map (CAM) is made: {described(CAM_CHOICES)}.")] = "gradcam"
    target_layer: str | None = None
    """The layer whose output CAMs explain, by its name in the network; default: layer4 or block3."""
    awp: float = 0.0
    """Adversarial weight perturbation (AWP) by so much of each weight's norm, 0.005 for example; 0: none."""
    awp_warmup: int = 0
    """Epochs before AWP begins."""
    average: str = "none"
    """A second model of averaged weights, tested too: none, ema:DECAY (after every update, with BatchNorm statistics of
    its own) or swa:EPOCH (mean of the ends of epochs, from that one on, counted from 1)."""
    precision: Annotated[
        str,
        Doc(
            f"In which layers multiply: {', '.join(PRECISIONS)} (fp16 on CUDA alone), or auto: on CUDA bf16 "
            "where the card multiplies in it, else fp32."
        ),
    ] = "auto"
    tf32: bool = True
    """On CUDA, leave torch's TF32 as it is (by default float32 convolutions have it); --no-tf32: float32 in float32."""
    compile: bool = False
    """Run the attack's forward and backward by torch.compile."""
    cuda_graph: Switch = "auto"
    """Capture the steps of the attack as a CUDA graph: on (also by the flag alone), off, or auto: on CUDA."""
    deterministic: bool = False
    """Run only algorithms that repeat their results; without it the fastest are found by timing on CUDA."""
    on_nonfinite: Annotated[str, Doc(f"An update that is not finite: {described(ON_NONFINITE)}.")] = "stop"
    test_every: int = 1
    """Epochs from one test to the next; the last epoch is always tested."""
    pgd_test_size: int = 500
    """In each test PGD-20 attacks so many test images, a balanced subset; 0: none."""
    seed: int = 0
    """Seed of the random numbers: initial weights, order of the images, augmentation, attack."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a CUDA device where there is one."""

    def check(self) -> None:
        """Refuse what no run can use; data set, model and device are checked by those who load them.

        Raises:
            TypeError, ValueError: names the field, what it got and what it takes.
        """
        check_choice("preset", self.preset, PRESETS)
        check_choice("method", self.method, METHODS)
        check_choice("attack", self.attack, for_training())
        if not native_methods(self.cam):
            check_choice("cam", self.cam, CAM_CHOICES)
        check_control(self.control)
        if self.released and (self.rule not in ("zscore", "released") or self.control not in ("none", "permuted")):
            raise BadValueError(f"released takes no other rule or control, got {self.rule!r} and {self.control!r}")
        check_choice("schedule", self.schedule, SCHEDULES)
        if self.released and self.schedule != "piecewise":
            raise BadValueError(f"released takes schedule piecewise, got {self.schedule!r}")
        check_choice("precision", self.precision, (*PRECISIONS, "auto"))
        if self.cuda_graph not in (True, False, "auto"):
            raise BadValueError(f"cuda_graph must be True, False or 'auto', got {self.cuda_graph!r}")
        check_choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        parse_average(self.average)
        if METHODS[self.method].weighted:
            eps_pair(self.eps, self.eps_low)
        for name in ("eps", "eps_low"):  # which a plain method does not use, so that its default may be above eps
            checks.number(name, getattr(self, name), 0)
        find_rule(self.rule, max(self.eps, self.eps_low), self.eps_low, functions=False)
        if self.refresh_epochs and not has_bits(self.mask_rule):
            raise BadValueError(
                f"refresh must be batch with rule {self.mask_rule}, whose maps are no masks that could be kept"
            )
        checks.image_units("eps", self.eps, (0.0, 1.0), stacklevel=2)
        if ATTACKS[self.attack].remembers and self.eps == 0:
            raise BadValueError(f"eps must be > 0 with attack {self.attack}, whose perturbations are stored, got 0")
        for name in ("lr", "momentum", "weight_decay", "alpha", "beta", "pgi_lambda"):
            checks.number(name, getattr(self, name), 0)
        if self.nesterov and not self.momentum:
            raise BadValueError("nesterov takes a momentum > 0, got 0")
        if checks.number("label_smoothing", self.label_smoothing, 0) >= 1:
            raise BadValueError(f"label_smoothing must be < 1, got {self.label_smoothing!r}")
        if checks.number("cutmix", self.cutmix, 0) > 1:
            raise BadValueError(f"cutmix must be a probability <= 1, got {self.cutmix!r}")
        attack = ATTACKS[self.attack]
        if self.cutmix and (attack.remembers or not attack.soft_labels):
            what = "remembers the perturbations of single images" if attack.remembers else "takes class indices alone"
            raise BadValueError(f"cutmix must be 0 with attack {self.attack}, which {what}, got {self.cutmix!r}")
        if checks.number("extra_fraction", self.extra_fraction, 0) >= 1:
            raise BadValueError(f"extra_fraction must be < 1, got {self.extra_fraction!r}")
        if self.extra is not None and not self.extra_fraction:
            raise BadValueError("extra_fraction must be > 0 with extra, got 0")
        checks.number("awp", self.awp, 0)
        for name in ("epochs", "batch_size", "accumulate", "test_every"):
            checks.count(name, getattr(self, name), 1)
        for name in ("warmup_epochs", "awp_warmup", "steps", "pgd_test_size", "validation", "perturbation_reset"):
            checks.count(name, getattr(self, name))
        if ATTACKS[self.attack].remembers:
            checks.count("steps", self.steps, 1)
        checks.seed("seed", self.seed)
        for name in ("train_size", "test_size"):
            if getattr(self, name) is not None:
                checks.count(name, getattr(self, name), 1)
        for epoch in self.lr_drops:
            checks.count("lr_drops", epoch)
        if self.warmup_epochs > self.epochs:
            raise BadValueError(f"warmup_epochs must be <= epochs, {self.epochs}, got {self.warmup_epochs}")
        if self.awp and self.awp_warmup >= self.epochs:
            raise BadValueError(f"awp_warmup must be < epochs, {self.epochs}, with awp, got {self.awp_warmup}")
        kind, since = self.averaging
        if kind == "swa" and since > self.epochs:
            raise BadValueError(f"average must begin within the epochs, {self.epochs}, got {self.average!r}")

    def on(self, device: torch.device, like: TrainConfig | None = None) -> TrainConfig:
        """This configuration with what is "auto" chosen: as in the run `like`, else for `device`, an existing one.

        Graphs are how a run computes, not what: one that has them goes on without on a device that has none.
        """
        precision, cuda_graph = self.precision, self.cuda_graph
        if precision == "auto":
            fast = "bf16" if device.type == "cuda" and _multiplies_bf16(device) else "fp32"
            precision = fast if like is None else like.precision
        if cuda_graph == "auto":
            cuda_graph = device.type == "cuda"
        elif like is not None and like.cuda_graph and device.type != "cuda":
            cuda_graph = False
        return dataclasses.replace(self, precision=precision, cuda_graph=cuda_graph)

    @property
    def refresh_epochs(self) -> int:
        """Epochs between two refreshes of all masks; 0: none, masks are of each batch."""
        if self.refresh == "batch":
            return 0
        if not self.refresh.isdecimal() or int(self.refresh) < 1:
            raise BadValueError(f"refresh must be batch or a number of epochs >= 1, got {self.refresh!r}")
        return int(self.refresh)

    @property
    def one_step(self) -> bool:
        """Whether the attack takes a single step, which training may learn to resist alone."""
        return 1 in (ATTACKS[self.attack].steps, self.steps)

    @property
    def mask_rule(self) -> str:
        return "released" if self.released else self.rule

    @property
    def mask_control(self) -> str:
        return "permuted" if self.released else self.control

    def method_at(self, epoch: int) -> str:
        """The method that trains epoch `epoch`, counted from 0."""
        return METHODS[self.method].plain if epoch < self.warmup_epochs else self.method

    def after_warmup(self, weights: Path, **changes: Any) -> TrainConfig:
        """What is left of this run after its warm-up, from the `weights` that it left; `changes` as in replace."""
        values = {
            "init": str(weights),
            "epochs": self.epochs - self.warmup_epochs,
            "warmup_epochs": 0,
            "lr_drops": tuple(max(drop - self.warmup_epochs, 0) for drop in self.lr_drops),
            "awp_warmup": max(self.awp_warmup - self.warmup_epochs, 0),
        }
        kind, since = self.averaging
        if kind == "swa":
            values["average"] = f"swa:{max(int(since) - self.warmup_epochs, 1)}"
        return dataclasses.replace(self, **{**values, **changes})

    def lr_at(self, epoch: float) -> float:
        """The learning rate of epoch `epoch`, counted from 0; 2.5 is the middle of the third."""
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        if self.schedule == "cyclic":
            peak = CYCLIC_PEAK * self.epochs
            return self.lr * (epoch / peak if epoch < peak else (self.epochs - epoch) / (self.epochs - peak))
        if self.released:  # which counts from 1, and from the end of the warm-up
            epoch = max(epoch + 1 - self.warmup_epochs, 0)
        return self.lr * 0.1 ** sum(epoch >= drop for drop in self.lr_drops)

    @property
    def averaging(self) -> tuple[str, float]:
        """As `parse_average` gives it."""
        return parse_average(self.average)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them."""
        return dataclasses.asdict(self) | {"lr_drops": list(self.lr_drops)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str) -> TrainConfig:
        """From what `to_json` gave. A field that is missing has its default, and a warning says so.

        Raises:
            ValueError: a field is unknown, or of another type than the field takes; `source` says where it stands.
        """
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise BadValueError(
                f"{source} is not a training configuration of this version: unknown {', '.join(unknown)}"
            )
        kinds = get_type_hints(cls)
        read = {name: _typed(f"{source}: {name}", value, kinds[name]) for name, value in values.items()}
        config = cls(**read)
        missing = [f"{name} ({getattr(config, name)!r})" for name in kinds if name not in values]
        if missing:
            warnings.warn(f"{source} does not say {', '.join(missing)}: the defaults are taken", stacklevel=3)
        return config


# What a value of a configuration may be in JSON, and what a message calls it.
_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    float: ((int, float), "a number"),
    int: ((int,), "a whole number"),
    bool: ((bool,), "true or false"),
    str: ((str,), "a text"),
    NoneType: ((NoneType,), "null"),
    tuple[int, ...]: ((list,), "a list of whole numbers"),
    Literal["auto"]: ((str,), "'auto'"),
}


def _typed(name: str, value: Any, kind: Any) -> Any:
    """`value`, read from JSON, if it is of that type; a list as a tuple, a number that a float field has as a float."""
    kinds = get_args(kind) if kind not in _KINDS else (kind,)
    if not any(type(value) in _KINDS[one][0] for one in kinds):
        takes = either(_KINDS[one][1] for one in kinds)
        raise BadValueError(f"{name} must be {takes}, got {_shown(value)}")
    if isinstance(value, list):
        if not all(type(one) is int for one in value):
            raise BadValueError(f"{name} must be a list of whole numbers, got {_shown(value)}")
        return tuple(value)
    if isinstance(value, str):
        try:
            text = os.fsencode(value)  # a name of a file may be any of these
        except UnicodeEncodeError:
            text = b"\0"
        if b"\0" in text:
            raise BadValueError(f"{name} must be a text, got one with a character that no text has")
    return checks.number(name, value) if kind is float else value


def _shown(value: Any) -> str:
    plain = value is None or isinstance(value, bool | int | float | str)
    return repr(value)[:80] if plain else f"a {type(value).__name__}"


# Numbers of the authors' experiments where they made one; `demo` fits two CPU cores and some minutes; the last two are
# recipes of the literature, see docs/train.md.
PRESETS = {
    "demo": TrainConfig(
        augment=False, epochs=4, warmup_epochs=3, batch_size=64, lr=0.05, lr_drops=(3,), steps=5, pgd_test_size=0
    ),
    "fashion-mnist": TrainConfig(preset="fashion-mnist", dataset="fashion-mnist"),
    "cifar10-resnet18": TrainConfig(preset="cifar10-resnet18", dataset="cifar10", model="resnet18"),
    "cifar10-wrn34-10": TrainConfig(preset="cifar10-wrn34-10", dataset="cifar10", model="wrn-34-10"),
    "svhn-resnet18": TrainConfig(
        preset="svhn-resnet18", dataset="svhn", model="resnet18", augment=False, alpha=1 / 255, weight_decay=3.5e-3
    ),
    "tinyimagenet-wrn34-10": TrainConfig(preset="tinyimagenet-wrn34-10", dataset="tinyimagenet", model="wrn-34-10"),
    "fast-resnet18": TrainConfig(
        preset="fast-resnet18",
        dataset="cifar10",
        model="resnet18",
        attack="pgi",
        epochs=30,
        warmup_epochs=8,
        lr=0.2,
        schedule="cyclic",
        weight_decay=5e-4,
        label_smoothing=0.1,
        average="ema:0.999",
    ),
    "strong-wrn28-10": TrainConfig(
        preset="strong-wrn28-10",
        method="part-t",
        dataset="cifar10",
        model="wrn-28-10-silu",
        epochs=400,
        warmup_epochs=100,
        batch_size=512,
        lr=0.2,
        schedule="cosine",
        nesterov=True,
        weight_decay=5e-4,
        beta=5.0,
        label_smoothing=0.1,
        cutmix=1.0,
        average="ema:0.995",
    ),
}


def preset(name: str) -> TrainConfig:
    """The preset called `name`. Raises ValueError for an unknown one, listing the known."""
    return PRESETS[check_choice("preset", name, PRESETS)]


def read_config(folder: Path) -> TrainConfig:
    """The configuration of the run in `folder`.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: its config.json cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise MissingFileError(f"{folder} holds no run: there is no config.json")
    config = TrainConfig.from_json(read_json(path), str(path))
    try:
        config.check()
    except UsageError as error:
        raise BadValueError(f"{path}: {error}") from error
    return config


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise BadValueError(f"device takes auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadValueError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _multiplies_bf16(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def parse_number(text: str) -> float:
    """A number as written on a command line: 0.03, 3e-2 or a fraction such as 8/255.

    Raises:
        ValueError: it is neither.
    """
    above, slash, below = text.partition("/")
    try:
        return float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        raise BadValueError(f"takes a number such as 0.03 or 8/255, got {text!r}") from None


def parse_average(average: str) -> tuple[str, float]:
    """What `TrainConfig.average` says: ("none", 0), ("ema", decay) or ("swa", first epoch, counted from 1).

    Raises:
        ValueError: it says none of these.
    """
    kind, _, number = average.partition(":")
    if kind == "ema" and number:
        decay = checks.number("average ema", parse_number(number), 0)
        if decay < 1:
            return kind, decay
    elif (kind == "swa" and number.isdecimal() and int(number) >= 1) or average == "none":
        return kind, int(number or 0)
    raise BadValueError(f"average must be none, ema:DECAY with DECAY < 1, or swa:EPOCH, got {average!r}")


def _warm_ups() -> str:
    return ", ".join(f"{method.plain} before {name}" for name, method in METHODS.items() if method.plain != name)


def _weighted() -> str:
    return ", ".join(name for name, method in METHODS.items() if method.weighted)


def _with_beta() -> str:
    return ", ".join(name for name, method in METHODS.items() if method.beta)


def _stepping() -> str:
    return ", ".join(name for name, attack in for_training().items() if attack.steps != 1)


def _that(field: str) -> str:
    return ", ".join(name for name, attack in for_training().items() if getattr(attack, field))


def downloadable() -> str:
    """The data sets that --download fetches."""
    return ", ".join(name for name, source in DATASETS.items() if source.downloads)
