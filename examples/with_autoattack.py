"""AutoAttack: by `part_fast.attacks.autoattack`, or its own class with an AttackModel as the model.

The second is for code that has the call already: one line makes its gradients faster. Both need `pyautoattack`.
"""

import pyautoattack
import torch
import torch.nn.functional as F

import part_fast
from part_fast.attacks import autoattack
from part_fast.data import load, to_float
from part_fast.models import resnet_small


def train(model: torch.nn.Module) -> None:
    images = load("demo", "train").subset(600)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for batch in torch.arange(600).repeat(2).split(30):
        optimizer.zero_grad()
        F.cross_entropy(model(to_float(images.images[batch])), images.labels[batch]).backward()
        optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    model = resnet_small()
    train(model)
    model.eval()
    test = load("demo", "test").subset(10)
    x, y = to_float(test.images), test.labels
    x_adv = autoattack(model, x, y, eps=64 / 255)
    clean, robust = ((model(images).argmax(1) == y).float().mean() for images in (x, x_adv))
    print(f"clean {clean:.0%}, robust {robust:.0%}")

    fast = part_fast.AttackModel(model)
    attack = pyautoattack.AutoAttack(fast, norm="Linf", eps=64 / 255, device="cpu", seed=0)
    x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=10)
    print(f"its own class: {(model(x_adv).argmax(1) == y).float().mean():.0%}")


if __name__ == "__main__":
    main()
