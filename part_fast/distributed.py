"""Several processes, one training: started by torchrun, a process per device; alone, everything here does nothing."""

from __future__ import annotations

import atexit
import os

import torch
import torch.distributed as dist
from torch import Tensor


def join(device: torch.device) -> torch.device:
    """Join the processes that torchrun started, by nccl on GPUs and gloo elsewhere; gives this process its device.

    They part when the process ends: torch cannot join twice. Errors: ValueError for more processes than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(f"torchrun takes as many processes as there are GPUs, {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return device


def rank() -> int:
    """Which of the processes this is; 0 writes and prints."""
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
    if size() > 1:
        dist.barrier()


def shares(n: int) -> range:
    """Which of n things this process does."""
    return range(rank(), n, size())
