"""DistributedDataParallel: PART in two processes (gloo on the CPU; nccl takes the same lines on GPUs).

Every process copies the wrapped model and attacks its own part of the batch; gradients meet in the outer backward
alone. With torchrun, `spawn` and the address go away. With torch 2.10 `trades_loss` and `mart_loss` also need
`broadcast_buffers=False`.
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.nn  # the first wrapped model would import it, and it keeps the group that it finds
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import part_fast
from part_fast.data import load, to_float
from part_fast.models import resnet_small


def train(rank: int, world: int) -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(resnet_small())
    fast = part_fast.AttackModel(model)
    budget = part_fast.CamBudget(fast, 8 / 255, 7 / 255)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    images = load("demo", "train").subset(400)
    x, y = to_float(images.images[rank::world]), images.labels[rank::world]
    for step in range(4):
        x_adv = part_fast.pgd(fast, x[step * 50 :][:50], y[step * 50 :][:50], budget(x[step * 50 :][:50]), steps=2)
        loss = F.cross_entropy(model(x_adv), y[step * 50 :][:50])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    everybodys = [torch.empty_like(weights) for _ in range(world)]
    dist.all_gather(everybodys, weights)
    if rank == 0:
        print(f"{world} processes, loss {loss.item():.3f}, equal weights: {torch.equal(*everybodys)}")


def process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world)
    train(rank, world)
    # With no wrapped model left, gloo's threads end here. A process that ends before them may abort.
    dist.destroy_process_group()


def main() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (2, folder), nprocs=2)


if __name__ == "__main__":
    main()
