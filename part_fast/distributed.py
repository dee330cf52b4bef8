"""Several processes, one training: started by torchrun, a process per device; alone, everything here does nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, by nccl on GPUs and gloo elsewhere; gives this process its device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(f"torchrun takes as many processes as there are GPUs, {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


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
