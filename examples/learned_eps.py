"""A learned eps: the ops differentiate in eps, so the budget of a position can be trained like a weight.

Here a map of 32x32 logits is trained to hurt a model as much as it can while its mean stays 8/255: the last step of the
attack, `pgd_step`, leads from the loss back to eps.
"""

import torch
import torch.nn.functional as F

import part_fast
from part_fast.data import load, to_float
from part_fast.models import resnet_small

MEAN = 8 / 255


def train(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for batch in torch.arange(len(x)).repeat(2).split(50):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


def damage(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, eps: float | torch.Tensor) -> float:
    return F.cross_entropy(model(part_fast.pgd(model, x, y, eps, 8 / 255, 3, start="zero")), y).item()


def main() -> None:
    torch.manual_seed(0)
    images = load("demo", "train").subset(600)
    x, y = to_float(images.images), images.labels
    model = resnet_small()
    train(model, x, y)
    fast = part_fast.AttackModel(model)
    where = torch.zeros(32 * 32, requires_grad=True)
    optimizer = torch.optim.Adam([where], 0.1)
    for batch in torch.arange(len(x)).split(100):
        eps = (where.softmax(0) * 32 * 32 * MEAN).view(1, 1, 32, 32)
        x_adv = part_fast.pgd(fast, x[batch], y[batch], eps.detach(), 8 / 255, 2)
        leaf = x_adv.clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(fast(leaf), y[batch]), leaf)
        x_adv = part_fast.pgd_step(x_adv, grad, x[batch], eps, 1.0)  # a step of 1 ends at the bound
        loss = F.cross_entropy(fast(x_adv), y[batch])
        optimizer.zero_grad()
        (-loss).backward()
        optimizer.step()
    learned, uniform = (damage(fast, x, y, e) for e in (eps.detach(), MEAN))
    middle = eps[0, 0, 8:24, 8:24].mean() / MEAN
    print(f"loss under a uniform eps {uniform:.3f}, under the learned one {learned:.3f}")
    print(f"its mean {eps.mean() * 255:.2f}/255; the middle gets {middle:.2f} times that")


if __name__ == "__main__":
    main()
