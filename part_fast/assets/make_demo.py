"""Make fashion-mnist-demo.npz.xz from the full Fashion-MNIST.

    apt-get install dataset-fashion-mnist
    python -m part_fast.assets.make_demo

Takes 600 training and 100 test images of each class with `balanced_indices(labels, n, seed=0)`, that is
`load("fashion-mnist", split).subset(n, seed=0)`, and stores them as 28x28 gray with their positions in the full set,
source and licence. Prints the sha256 that belongs into `part_fast.data.DEMO_SHA256`. The licence is in README.md.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import lzma
from pathlib import Path
from typing import Any

import numpy as np

from part_fast.data.catalogue import load
from part_fast.data.fashion_mnist import DEMO_FILE
from part_fast.data.memory import balanced_indices
from part_fast.errors import BadValueError

SIZES = {"train": 6_000, "test": 1_000}
SEED = 0
ABOUT = (
    "Balanced excerpt of Fashion-MNIST, https://github.com/zalandoresearch/fashion-mnist, "
    "Copyright (c) 2017 Zalando SE, https://tech.zalando.com, MIT licence"
)


def make(root: str | None = None) -> bytes:
    """The content of the demo file, made from the full data set under `root` (or where `load` looks by itself)."""
    arrays: dict[str, Any] = {"about": np.array(ABOUT)}
    for split, size in SIZES.items():
        full = load("fashion-mnist", split, root)
        if len(full) != (60_000 if split == "train" else 10_000):
            raise BadValueError(
                f"the demo is made from the full Fashion-MNIST, {full.source} has {len(full)} {split} images"
            )
        indices = balanced_indices(full.labels, size, SEED)
        arrays[f"{split}_images"] = full.images[indices, 0, 2:30, 2:30].numpy()
        arrays[f"{split}_labels"] = full.labels[indices].numpy().astype(np.uint8)
        arrays[f"{split}_indices"] = indices.numpy().astype(np.int32)
    plain = io.BytesIO()
    np.savez(plain, **arrays)
    return lzma.compress(plain.getvalue(), preset=9 | lzma.PRESET_EXTREME)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the embedded demo images from the full Fashion-MNIST.")
    parser.add_argument("--root", help="folder of Fashion-MNIST, if it is not where part_fast looks")
    parser.add_argument("--out", type=Path, default=DEMO_FILE, help="file to write (default: %(default)s)")
    arguments = parser.parse_args()
    content = make(arguments.root)
    arguments.out.write_bytes(content)
    print(f"{arguments.out}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
