"""A trained model, read back from a run folder or a checkpoint with its configuration and test images."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from part_fast.choices import check_choice
from part_fast.config import TrainConfig, find_device, read_config
from part_fast.data.catalogue import DATASETS, load
from part_fast.data.memory import Dataset, to_float
from part_fast.errors import BadTypeError, BadValueError, MissingFileError
from part_fast.models.catalogue import build_model
from part_fast.models.checkpoints import load_weights
from part_fast.models.external import check_network, is_external, refuse_own_code
from part_fast.models.weights_file import read_about

# The weights that a run leaves, by the names that commands take, and what makes it leave them.
WEIGHTS = {
    "last": ("model.safetensors", "no epoch of it is finished"),
    "best": (
        "best.safetensors",
        "train --validation N keeps the weights that are best on N images held out, from the first test on",
    ),
    "averaged": ("averaged.safetensors", "train --average ema:DECAY or swa:EPOCH averages weights"),
}


class Trained(NamedTuple):
    """A trained model in eval mode, the configuration it was trained with, test images on its device, its file."""

    model: nn.Module
    config: TrainConfig
    data: Dataset
    weights: Path


def load_trained(
    where: Path,
    n: int | None = None,
    *,
    dataset: str | None = None,
    model: str | None = None,
    weights: str | None = None,
    root: str | None = None,
    download: bool = False,
    device: str = "auto",
) -> Trained:
    """The model in a run folder; or in a checkpoint file, in a run folder or with data set and model named.

    n: a balanced subset of the test images; default: those of the run.
    model: default that of the run, unless it is a function of the user's own: to build it runs code that the caller
    must name, not a file.
    weights: of a run folder: last, best or averaged; default: last. A checksum that they carry is checked; a warning
    says where there is none.

    Raises:
        FileNotFoundError: there is no such run folder, checkpoint or data set.
        ValueError: an argument is missing, or the weights do not fit.
        ImportError: the network is of a package or module that cannot be imported.
    """
    config, path, alone = _find(where, weights)
    if alone and (dataset is None or model is None):
        raise BadValueError(f"{where} is a checkpoint alone, not a run folder: name --dataset and --model")
    if model is None:
        refuse_own_code(config.model, path.parent / "config.json")
    recorded = config.root if root is None and dataset in (None, config.dataset) else None
    config = dataclasses.replace(config, dataset=dataset or config.dataset, model=model or config.model)
    # Not what the run says of downloads: the file may be another's, and nobody has asked for one here.
    config = dataclasses.replace(config, root=root or recorded, download=download)
    config.check()
    place = find_device(device)
    try:
        data = evaluation_data(config, n).to(place)
    except MissingFileError as error:
        if recorded is None:
            raise
        raise MissingFileError(
            f"{config.dataset} is not in {recorded}, where the run found it: name the folder that holds it now by "
            f"--root ({error})"
        ) from error
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it was
        net = build_model(config.model, data.num_classes)
    load_weights(net, path)
    _warn_of_missing_checksum(path)
    if is_external(config.model):
        check_network(net.to(place), config.model, to_float(data.images[:2]), data.num_classes)
        if alone:
            _warn_of_normalisation(config.model, path)
    return Trained(net.eval().requires_grad_(False).to(place), config, data, path)


def load_model(where: str | os.PathLike[str], *, model: str | None = None, num_classes: int | None = None) -> nn.Module:
    """The trained model of a run folder or a checkpoint, on the CPU and in eval mode, for images (N,3,H,W) in [0,1].

    Needs neither the data set nor a GPU. The package safetensors, of the extra `train`, reads what training writes.

    where: a run folder, for its `model.safetensors`; a checkpoint in one, such as `averaged.safetensors`; or any
        checkpoint that `models.load_weights` reads, together with `model`.
    model: a name that `models.build_model` knows, such as "resnet18"; default: the run's.
    num_classes: default: of the run's data set, 10 for a checkpoint alone; to be given for a run on a folder of images.

    Equivalent to `load_weights(build_model(model, num_classes), weights).eval()`, by the names that the run's
    config.json holds.
    A checksum that the weights carry is checked; a warning says where a safetensors file has none.
    Errors: FileNotFoundError where there is no such run or checkpoint; TypeError for another thing than a path;
    ValueError where an argument is missing, or the weights do not fit.
    """
    if not isinstance(where, (str, os.PathLike)):
        raise BadTypeError(f"where must be a path, got {type(where).__name__}")
    where = Path(where)
    config, weights, alone = _find(where)
    if alone and model is None:
        raise BadValueError(f"{where} is a checkpoint alone, not a run folder: model must be given, such as 'resnet18'")
    if num_classes is None and not alone:
        if config.dataset not in DATASETS:  # images of a folder, which need not be here
            raise BadValueError(f"num_classes must be given for {where}, which was trained on {config.dataset}")
        num_classes = DATASETS[config.dataset].classes
    if model is None:
        refuse_own_code(config.model, weights.parent / "config.json")
    with torch.random.fork_rng(devices=[]):
        net = build_model(model or config.model, 10 if num_classes is None else num_classes)
    load_weights(net, weights)
    _warn_of_missing_checksum(weights)
    if alone and model is not None and is_external(model):
        _warn_of_normalisation(model, weights)
    return net.eval()


def described_weights(path: Path) -> str:
    """The path, and what best.safetensors says of itself: which weights it holds, and of which epoch."""
    about = read_about(path) if path.suffix == ".safetensors" else None
    if about is None or not {"epoch", "weights"} <= about.keys():
        return str(path)
    return f"{path}, the {about['weights']} weights of epoch {about['epoch']}"


def _warn_of_missing_checksum(path: Path) -> None:
    if path.suffix == ".safetensors" and read_about(path) is None:
        warnings.warn(f"{path} carries no checksum, as files of before have none: damage would go unseen", stacklevel=3)


def _warn_of_normalisation(model: str, weights: Path) -> None:
    warnings.warn(
        f"{model} gets images in [0,1]: if {weights} was trained on normalised ones, name a function of your own that "
        "normalises first",
        stacklevel=3,
    )


def _find(where: Path, weights: str | None = None) -> tuple[TrainConfig, Path, bool]:
    """(configuration, weights, whether they are a checkpoint alone, whose configuration nobody knows)."""
    if where.is_dir():
        name, why = WEIGHTS[check_choice("weights", "last" if weights is None else weights, WEIGHTS)]
        config, path = read_config(where), where / name
        if not path.is_file():
            raise MissingFileError(f"{where} holds a run without {name}: {why}")
        return config, path, False
    if weights is not None and where.is_file():
        raise BadValueError(f"weights takes a run folder, of whose files it names one, got the file {where}")
    if not where.is_file():
        raise MissingFileError(f"there is no run folder or checkpoint at {where}")
    if (where.parent / "config.json").is_file():  # a run's, such as its averaged weights
        return read_config(where.parent), where, False
    return TrainConfig(), where, True


def evaluation_data(config: TrainConfig, n: int | None = None) -> Dataset:
    """The run's test images, or a balanced subset of n of them."""
    data = load(config.dataset, "test", config.root, config.download)
    if n is not None:
        return data.subset(n)
    return data if config.test_size is None else data.subset(config.test_size, name="test_size")
