"""Training in several processes, one per device, started by torchrun; in a single process the functions do nothing."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from part_fast.errors import BadValueError


def join(device: torch.device) -> torch.device:
    """Join the processes that torchrun started; returns the device of this process.

    One process group sends GPU tensors by nccl and CPU tensors by gloo. It lasts until the process ends, because torch
    cannot join twice. Errors: ValueError for more processes than GPUs, and for an existing group that does not take
    tensors of both devices.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise BadValueError(f"torchrun takes as many processes as there are GPUs, {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    by = {"cpu": "gloo", "cuda": "nccl"} if device.type == "cuda" else {"cpu": "gloo"}
    if not dist.is_initialized():
        # Its functions take, as an argument's default, the group that is there at its first import, and keep it.
        importlib.import_module("torch.distributed.nn")
        dist.init_process_group(",".join(f"{kind}:{name}" for kind, name in by.items()))
        atexit.register(_leave)
    there = dist.get_backend_config()
    missing = [kind for kind in by if f"{kind}:" not in there]
    if missing:
        raise BadValueError(
            f"the process group must take {' and '.join(by)} tensors, such as "
            f"init_process_group('cpu:gloo,cuda:nccl'), got {there!r}"
        )
    return device


def _leave() -> None:
    """Destroy the process group and wait for its threads, which a group that something holds would outlive.

    A thread that lets go of a tensor takes the interpreter's lock, and aborts the process where the interpreter is
    gone. A DistributedDataParallel that is still there holds the group.
    """
    gc.collect()
    dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0; process 0 writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_(value: Tensor) -> Tensor:
    """The sum over processes, in place; returned."""
    if size() > 1:
        dist.all_reduce(value)
    return value


def same_(value: Tensor) -> Tensor:
    """The first process's value, in place; returned."""
    if size() > 1:
        dist.broadcast(value, 0)
    return value


def barrier() -> None:
    """Wait until all processes are here."""
    sum_(torch.zeros(()))  # on the CPU: dist.barrier() would choose a device by itself, and wait for the GPU


def shares(n: int) -> range:
    """Which of n things this process does."""
    return range(rank(), n, size())


def largest(value: int) -> int:
    """The largest of the processes' values, which all of them get."""
    if size() == 1:
        return value
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def gathered(value: Any) -> list[Any]:
    """The processes' values in their order, for the first process; the others get an empty list."""
    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    dist.gather_object(value, found if rank() == 0 else None)
    return found if rank() == 0 else []
