"""Weights in safetensors files that carry a checksum, so that no damage to them goes unseen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from part_fast.atomic import replacing
from part_fast.errors import BadValueError
from part_fast.optional import needs
from part_fast.reading import read_tensors

# One key, whose value is JSON: safetensors writes several keys in any order, and equal weights are to make equal files.
KEY = "part_fast"


def write_weights(path: Path, tensors: Mapping[str, Tensor], **about: Any) -> None:
    """Write tensors as safetensors at `path`, whole or not at all, with `about` and a checksum of both as metadata.

    tensors: on the CPU, contiguous, each with memory of its own.
    Errors: OSError that names the file.
    """
    with needs("safetensors", "train"):
        from safetensors.torch import save
    record = json.dumps({**about, "sha256": digest(tensors, about)}, sort_keys=True)
    # Not save_file, whose error for a full disk does not name it, and which renames a file of its own to the path.
    content = save(dict(tensors), metadata={KEY: record})
    with replacing(path, synced=True) as temporary:
        temporary.write_bytes(content)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; those of a file with a checksum are compared with it.

    Errors: ValueError for a file that is damaged or cannot be read; FileNotFoundError.
    """
    tensors = read_tensors(path)
    about = read_about(path)
    if about is not None and about.pop("sha256", None) != digest(tensors, about):
        raise BadValueError(f"{path} is damaged: its tensors are not those that its checksum was made of")
    return tensors


def read_about(path: Path) -> dict[str, Any] | None:
    """What `write_weights` wrote beside the tensors, the checksum under "sha256"; None for a file without.

    Errors: ValueError where it is damaged.
    """
    with needs("safetensors", "train"):
        from safetensors import safe_open
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if KEY not in metadata:
        return None
    try:
        about = json.loads(metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise BadValueError(f"{path} is damaged: what it says of itself is not JSON") from error
    if not isinstance(about, dict):
        raise BadValueError(f"{path} is damaged: what it says of itself is a {type(about).__name__}")
    return about


def digest(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of tensors on the CPU, and of `about`."""
    found = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        found.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
