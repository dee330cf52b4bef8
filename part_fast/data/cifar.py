"""CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from part_fast.data.files import read_cifar_binary, read_cifar_pickle
from part_fast.data.memory import Dataset
from part_fast.data.places import dataset_of, download_archive, first_found, not_found, roots, say_if_partial

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_FINE_CLASSES = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
    "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
    "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard "
    "lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear "
    "pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal "
    "shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank "
    "telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)

CIFAR100_CLASSES = tuple(_FINE_CLASSES.split())


@dataclass(frozen=True)
class _Cifar:
    """What tells CIFAR-10 and CIFAR-100 apart."""

    name: str
    title: str
    layouts: tuple[str, str]
    stems: dict[str, tuple[str, ...]]
    field: str
    label_bytes: int
    classes: tuple[str, ...]


CIFAR10 = _Cifar(
    "cifar10",
    "CIFAR-10",
    ("cifar-10-batches-py", "cifar-10-batches-bin"),
    {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
    "labels",
    1,
    CIFAR10_CLASSES,
)

CIFAR100 = _Cifar(
    "cifar100",
    "CIFAR-100",
    ("cifar-100-python", "cifar-100-binary"),
    {"train": ("train",), "test": ("test",)},
    "fine_labels",
    2,
    CIFAR100_CLASSES,
)


def load_cifar(cifar: _Cifar, split: str, root: Path | None, download: bool) -> Dataset:
    stems = cifar.stems[split]

    def find(folder: Path) -> list[Path] | None:
        layouts = (
            [path for stem in stems if (path := folder / f"{stem}{suffix}").is_file()] for suffix in ("", ".bin")
        )
        return next((files for files in layouts if files), None)

    places = [place for base in roots(root) for place in (*(base / layout for layout in cifar.layouts), base)]
    files = first_found(places, find)
    if files is None and download:
        places = [download_archive(cifar.title.replace("-", ""), root) / cifar.layouts[0]]
        files = first_found(places, find)
    if files is None:
        wanted = " to ".join(dict.fromkeys((stems[0], stems[-1])))
        raise not_found(cifar.name, f"{wanted} (or .bin)", places, "")
    parts = [
        read_cifar_binary(path, cifar.title, cifar.label_bytes, len(cifar.classes))
        if path.suffix == ".bin"
        else read_cifar_pickle(path, cifar.title, cifar.field, len(cifar.classes))
        for path in files
    ]
    pixels = np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts])
    folder = files[0].parent
    say_if_partial(cifar.name, split, len(labels), 50_000 if split == "train" else 10_000, folder)
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32))
    return dataset_of(cifar.name, split, images, labels, cifar.classes, folder)
