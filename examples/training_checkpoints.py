"""Checkpoints of training scripts: weights in a dictionary load; files that hold other objects are refused by name.

Such files run code when they are read. `load_weights` does not: it names the objects and says how to get the weights
out once, if you trust the file.
"""

import argparse
import pathlib
import tempfile

import numpy as np
import torch

from part_fast.models import load_weights, resnet_small


def main() -> None:
    torch.manual_seed(0)
    model = resnet_small()
    weights = model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.pt")
        torch.save({"epoch": 7, "state_dict": {f"module.{key}": value for key, value in weights.items()}}, path)
        load_weights(resnet_small(), path)
        print("a dictionary: loaded")
        for kind, checkpoint in {
            "Namespace": {"state_dict": weights, "args": argparse.Namespace(lr=0.1)},
            "numpy scalar": {"state_dict": weights, "best_accuracy": np.float64(51.2)},
            "whole model": model,
        }.items():
            torch.save(checkpoint, path)
            try:
                load_weights(resnet_small(), path)
            except ValueError as error:
                print(f"{kind}: {str(error).partition(': ')[2]}")
        # What it says, for the last of them:
        torch.save(torch.load(path, weights_only=False).state_dict(), pathlib.Path(folder, "weights.pt"))
        again = load_weights(resnet_small(), pathlib.Path(folder, "weights.pt"))
        print(f"weights alone: equal {all(torch.equal(v, weights[k]) for k, v in again.state_dict().items())}")


if __name__ == "__main__":
    main()
