"""A trained model, read back from a run folder or a checkpoint with its configuration and test images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from part_fast.config import TrainConfig, find_device, read_config
from part_fast.data.catalogue import load
from part_fast.data.memory import Dataset
from part_fast.errors import BadValueError, MissingFileError
from part_fast.models.catalogue import build_model
from part_fast.models.checkpoints import load_weights


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
    root: str | None = None,
    download: bool = False,
    device: str = "auto",
) -> Trained:
    """The model in a run folder; or in a checkpoint file, in a run folder or with data set and model named.

    n: a balanced subset of the test images; default: those of the run.

    Raises:
        FileNotFoundError: there is no such run folder, checkpoint or data set.
        ValueError: an argument is missing, or the weights do not fit.
    """
    if where.is_dir():
        config, weights = read_config(where), where / "model.safetensors"
        if not weights.is_file():
            raise MissingFileError(f"{where} holds a run without model.safetensors: no epoch of it is finished")
        config = dataclasses.replace(config, dataset=dataset or config.dataset, model=model or config.model)
    elif where.is_file():
        config, weights = TrainConfig(), where
        if (where.parent / "config.json").is_file():  # a run's, such as its averaged weights
            config = read_config(where.parent)
        elif dataset is None or model is None:
            raise BadValueError(f"{where} is a checkpoint alone, not a run folder: name --dataset and --model")
        config = dataclasses.replace(config, dataset=dataset or config.dataset, model=model or config.model)
    else:
        raise MissingFileError(f"there is no run folder or checkpoint at {where}")
    # Not what the run says of downloads: the file may be another's, and nobody has asked for one here.
    config = dataclasses.replace(config, root=root or config.root, download=download)
    config.check()
    place = find_device(device)
    data = evaluation_data(config, n).to(place)
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it was
        net = build_model(config.model, data.num_classes)
    load_weights(net, weights)
    return Trained(net.eval().requires_grad_(False).to(place), config, data, weights)


def evaluation_data(config: TrainConfig, n: int | None = None) -> Dataset:
    """The run's test images, or a balanced subset of n of them."""
    data = load(config.dataset, "test", config.root, config.download)
    size = config.test_size if n is None else n
    return data if size is None else data.subset(size)
