"""The study's learned rule: maps per class that spend a fixed budget where attacks on a network hurt it most."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from part_fast.attack_model import AttackModel
from part_fast.attacks.pgd import pgd
from part_fast.budgets.cam import CamBudget
from part_fast.budgets.rules import LearnedRule
from part_fast.config import TrainConfig
from part_fast.data.memory import Dataset, to_float
from part_fast.ops.pgd_step import pgd_step

LEARNING_RATE = 0.1  # of Adam, for maps whose sigmoid begins at 0.5


def learn_rule(model: nn.Module, data: Dataset, config: TrainConfig, mean: float, epochs: int = 1) -> LearnedRule:
    """The rule that solves max over maps of mean weight `mean` of the loss of `model` on the images it attacks.

    Adversarial training minimises the loss of the worst perturbation within the budget; here the adversary also chooses
    where in the image each class's budget is spent, how much of it there is being fixed. The network is fixed. Adam
    ascends on the cross-entropy of a last step of the attack, whose gradient comes through `pgd_step`.

    data: training images, taken as they are. config: eps, eps_low, alpha, steps, batch_size, cam, target_layer and seed
    of the run that the rule is for. mean: the mean weight of every image; 0.5 gives it (eps + eps_low) / 2.
    """
    height, width = data.images.shape[2:]
    device = data.images.device
    rule = LearnedRule((height, width), data.num_classes, mean).to(device)
    fast = AttackModel(model)
    budget = CamBudget(fast, config.eps, config.eps_low, method=config.cam, rule=rule, target_layer=config.target_layer)
    optimizer = torch.optim.Adam(rule.parameters(), LEARNING_RATE)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        for _ in range(epochs):
            for batch in data.batches(config.batch_size, shuffle=True):
                optimizer.zero_grad()
                x = to_float(batch.images)
                loss = attacked_loss(fast, x, batch.labels, budget(x), config)
                (-loss).backward()
                optimizer.step()
    return rule.requires_grad_(False)


def attacked_loss(model: nn.Module, x: Tensor, y: Tensor, eps: Tensor, config: TrainConfig) -> Tensor:
    """The cross-entropy, a scalar, of images x (N,C,H,W) attacked within eps, with a graph that leads to eps."""
    x_adv = pgd(model, x, y, eps.detach(), config.alpha, config.steps)
    leaf = x_adv.detach().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
    # A step of 1, the whole range of images, ends at each pixel's bound, so that every eps counts.
    return F.cross_entropy(model(pgd_step(x_adv, grad, x, eps, 1.0)), y)
