"""A learned rule: where each class spends its eps is trained by gradients that come through the ops.

`LearnedRule` adds a map per class to the CAM and keeps every image's mean weight. Here the maps learn to hurt a fixed
network as much as they can: the last step of the attack leads from the loss back to them.
"""

import torch
import torch.nn.functional as F

import part_fast
from part_fast import AttackModel, CamBudget
from part_fast.budgets.rules import LearnedRule
from part_fast.data import load, to_float
from part_fast.models import resnet_small


def train(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for batch in torch.arange(len(x)).repeat(2).split(50):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


def last_step(model: AttackModel, x: torch.Tensor, y: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """The loss of attacked images, with a graph that leads to eps."""
    x_adv = part_fast.pgd(model, x, y, eps.detach(), 8 / 255, 2, start="zero")
    leaf = x_adv.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
    return F.cross_entropy(model(part_fast.pgd_step(x_adv, grad, x, eps, 1.0)), y)  # a step of 1 ends at the bound


def main() -> None:
    torch.manual_seed(0)
    images = load("demo", "train").subset(400)
    x, y = to_float(images.images), images.labels
    model = resnet_small()
    train(model, x, y)
    fast = AttackModel(model)
    rule = LearnedRule((32, 32), classes=10, mean=0.25)
    budget = CamBudget(fast, eps=16 / 255, eps_low=4 / 255, rule=rule)
    optimizer = torch.optim.Adam(rule.parameters(), 0.1)
    before = last_step(fast, x, y, budget(x, y)).item()
    for batch in torch.arange(len(x)).repeat(2).split(100):
        optimizer.zero_grad()
        (-last_step(fast, x[batch], y[batch], budget(x[batch], y[batch]))).backward()
        optimizer.step()
    eps = budget(x, y)
    after = last_step(fast, x, y, eps).item()
    print(f"loss before learning {before:.3f}, after {after:.3f}; mean eps of each image {eps.mean() * 255:.2f}/255")
    spread = rule.place.detach().std(0).mean()
    print(f"the classes' maps differ by a standard deviation of {spread:.3f}; gain of the CAM {rule.gain.item():.2f}")


if __name__ == "__main__":
    main()
