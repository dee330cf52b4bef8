"""Accelerate: PART in its loop, with `prepare`, `backward` and mixed precision.

Make the AttackModel before `prepare`, with a precision of its own: it follows the model's device and weights, and
Accelerate's autocast, which it puts in the place of the model's forward, stays out of the copy.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator

import part_fast
from part_fast.data import load, to_float
from part_fast.models import resnet_small


def main() -> None:
    torch.manual_seed(0)
    images = load("demo", "train").subset(200)
    pairs = torch.utils.data.TensorDataset(to_float(images.images), images.labels)
    loader = torch.utils.data.DataLoader(pairs, batch_size=50, shuffle=True)
    model = resnet_small()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    fast = part_fast.AttackModel(model, precision="bf16")
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    budget = part_fast.CamBudget(fast, 8 / 255, 7 / 255)
    for epoch in range(2):
        for x, y in loader:
            x_adv = part_fast.pgd(fast, x, y, budget(x), 2 / 255, 2)
            loss = F.cross_entropy(model(x_adv), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")
    same = (fast(x).argmax(1) == model.eval()(x).argmax(1)).float().mean()
    print(f"the copy and the model agree on {same:.0%} of a batch")


if __name__ == "__main__":
    main()
