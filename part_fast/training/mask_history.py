"""What the network looks at while it learns: the eps maps of a few test images after every epoch, in a small file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from part_fast.budgets.cam import CamBudget
from part_fast.config import TrainConfig
from part_fast.data.memory import Dataset, to_float
from part_fast.errors import BadValueError, UsageError
from part_fast.methods import METHODS
from part_fast.optional import needs
from part_fast.report import files
from part_fast.training.engine import Engine

with needs("safetensors", "train"):
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

MASKS = "masks.safetensors"
IMAGES = 4


class MaskHistory(NamedTuple):
    """Eps maps of the same images over epochs.

    images: uint8 (N,C,H,W). labels: int64 (N,). epochs: int64 (E,), counted from 1, ascending. weights: uint8
    (E,N,M,H,W), 255 where a pixel has eps, 0 where it has eps_low. eps: float64 (2,), eps and eps_low in image units.
    class_names: one per class.
    """

    images: Tensor
    labels: Tensor
    epochs: Tensor
    weights: Tensor
    eps: Tensor
    class_names: list[str]


def keep_masks(out: Path, engine: Engine, test: Dataset, epoch: int) -> None:
    """After epoch `epoch`, counted from 0, add the maps of a few test images to the run's file.

    The maps are those of the model as `evaluate` sees it, in float32 and eval mode, by the run's CAM and rule, before
    its control. A plain method, which trains without them, leaves them too: what PART would make of its model. Later
    epochs in the file are of a run that was stopped before its state was written, and are dropped; a file that is
    damaged or of other images begins anew. A network that has no CAM leaves none where the method needs none.
    """
    few = test.subset(min(IMAGES, len(test)))
    try:
        weights, eps = mask_weights(engine, few)
    except UsageError:
        if METHODS[engine.config.method].weighted:
            raise
        return  # a network without a CAM, which a plain method does not need
    history = MaskHistory(
        few.images.cpu(),
        few.labels.cpu(),
        torch.tensor([epoch + 1]),
        weights[None].cpu(),
        torch.tensor(eps, dtype=torch.float64),
        list(few.class_names),
    )
    try:
        before = read_masks(out)
    except BadValueError:
        before = None
    if before is not None and torch.equal(before.images, history.images) and torch.equal(before.eps, history.eps):
        earlier = before.epochs <= epoch
        history = history._replace(
            epochs=torch.cat([before.epochs[earlier], history.epochs]),
            weights=torch.cat([before.weights[earlier], history.weights]),
        )
    tensors = history._asdict()
    names = {"class_names": json.dumps(tensors.pop("class_names"))}
    with files.replacing(out / MASKS) as temporary:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, names)


def mask_weights(engine: Engine, data: Dataset) -> tuple[Tensor, tuple[float, float]]:
    """(the eps maps of the images as uint8 (N,M,H,W), 255 for eps and 0 for eps_low; eps and eps_low)."""
    eps, eps_low = pair_of(engine.config)
    # The model and not its copy that is attacked, which may be compiled for other batch sizes.
    config = engine.config
    budget = CamBudget(
        engine.model, eps, eps_low, method=config.cam, rule=config.mask_rule, target_layer=config.target_layer
    )
    weights = (budget(to_float(data.images)) - eps_low) / (eps - eps_low)
    return (255 * weights).round().to(torch.uint8), (eps, eps_low)


def pair_of(config: TrainConfig) -> tuple[float, float]:
    """The run's eps and eps_low; 1 and 0 for a plain method whose eps is not above its unused eps_low."""
    return (config.eps, config.eps_low) if config.eps > config.eps_low else (1.0, 0.0)


def read_masks(folder: Path) -> MaskHistory | None:
    """What `keep_masks` left in a run folder; None if there is no such file. Errors: ValueError for a damaged one."""
    path = folder / MASKS
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            names = json.loads((file.metadata() or {})["class_names"])
            tensors = {key: file.get_tensor(key) for key in MaskHistory._fields if key != "class_names"}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise BadValueError(f"{path} cannot be read: {error}") from error
    history = MaskHistory(**tensors, class_names=names)
    images, weights = history.images, history.weights
    if (
        images.dtype != torch.uint8
        or weights.dtype != torch.uint8
        or images.ndim != 4
        or weights.ndim != 5
        or images.shape[1] not in (1, 3)
        or history.labels.shape != images.shape[:1]
        or history.epochs.shape != weights.shape[:1]
        or (weights.shape[1], *weights.shape[3:]) != (len(images), *images.shape[2:])
        or history.eps.shape != (2,)
        or not isinstance(names, list)
        or not all(0 <= label < len(names) for label in history.labels.tolist())
    ):
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in tensors.items())
        raise BadValueError(f"{path} is no history of masks: {shapes}")
    return history
