"""TRADES and MART, drop-in for the published functions; with a CamBudget they are PART-T and PART-M."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from part_fast import checks
from part_fast.attacks.ascend import Model, ascend, check_images, clean_logits
from part_fast.attacks.objectives import Loss, as_target, objective, widened
from part_fast.budgets.cam import CamBudget, same_network
from part_fast.checks import Clip
from part_fast.errors import BadTypeError, BadValueError
from part_fast.ops.packed_epsilon import PackedEpsilon

Epsilon = float | Tensor | PackedEpsilon | CamBudget


def trades_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer | None,
    step_size: float = 0.003,
    epsilon: Epsilon = 0.031,
    perturb_steps: int = 10,
    beta: float = 1.0,
    distance: str = "l_inf",
    *,
    attack_model: nn.Module | None = None,
    clip: Clip = (0.0, 1.0),
) -> Tensor:
    """TRADES: clean cross-entropy plus beta times the divergence between the clean and the adversarial softmax.

    x_natural: images (N,C,H,W) within clip. y: class indices (N,), or probabilities (N,classes), floating, as mixup and
        label smoothing make them: the loss is then the mean over labels drawn from them.
    optimizer: its gradients are cleared before the forward that trains, as in the published function; None clears
        nothing.
    step_size, epsilon: image units. epsilon: a float, a tensor that broadcasts to the images, a PackedEpsilon, or a
        CamBudget, which makes it PART-T: its map comes from the clean forward that the attack needs anyway, if it is
        one of this model.
        Defaults, also of beta, are the published function's; its training script passes 0.007, 0.031 and 6.
    distance: "l_inf".
    attack_model: an `AttackModel` of the model, which is attacked in its place; default: the model.
    clip: (low, high), what a pixel may be, as in `pgd`; a CamBudget has a clip of its own.
    The attack starts at x + 0.001 N(0,1), runs in eval mode, and moves away from the clean prediction, whatever y
    is. A model in eval mode is put in train mode, as published; one in train mode keeps what its submodules have
    (frozen BatchNorm, say). The clean batch is forwarded once, where the published loop does it twice: the loss and its
    gradient are the same, and BatchNorm's running statistics see the clean batch once.

    Equivalent to: `trades_objective(model(x_natural), model(x_adv), y, beta)` with
    `x_adv = pgd(model, x_natural, y, epsilon, step_size, perturb_steps, start=x_natural + 0.001 * noise, loss="kl")`.
    Source: Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019, eq. 5.
    Errors: TypeError or ValueError that names the argument.
    """
    x_natural, beta = _check(model, x_natural, y, optimizer, epsilon, perturb_steps, beta, distance, clip)
    x_adv = trades_attack(attack_model or model, x_natural, y, epsilon, step_size, perturb_steps, clip)
    _begin(model, optimizer)
    logits, logits_adv = (checks.logits(model(images), images) for images in (x_natural, x_adv))
    return trades_objective(logits, logits_adv, y, beta)


def trades_attack(
    model: Model, x: Tensor, y: Tensor, epsilon: Epsilon, alpha: float, steps: int, clip: Clip = (0.0, 1.0)
) -> Tensor:
    """The attack of `trades_loss`, which has checked its arguments: adversarial images like x."""
    eps: float | Tensor | PackedEpsilon
    if isinstance(epsilon, CamBudget) and same_network(epsilon.model, model):
        eps, clean = epsilon.with_logits(x)
    else:
        eps = epsilon(x) if isinstance(epsilon, CamBudget) else epsilon
        clean = clean_logits(model, x.detach())
    return _attack(model, x, y, eps, alpha, steps, clip, *objective("kl", clean))


def trades_objective(logits: Tensor, logits_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    """TRADES's loss, a scalar, from clean and adversarial logits (N,classes); gradients flow through both.

    y: class indices (N,) or probabilities (N,classes).
    Source: Zhang et al., ICML 2019, eq. 5.
    """
    logits, logits_adv = widened(logits), widened(logits_adv)
    divergence = F.kl_div(logits_adv.log_softmax(1), logits.softmax(1), reduction="batchmean")
    return F.cross_entropy(logits, as_target(y, logits)) + beta * divergence


def mart_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer | None,
    step_size: float = 0.007,
    epsilon: Epsilon = 0.031,
    perturb_steps: int = 10,
    beta: float = 6.0,
    distance: str = "l_inf",
    *,
    attack_model: nn.Module | None = None,
    clip: Clip = (0.0, 1.0),
) -> Tensor:
    """MART: boosted cross-entropy on the adversarial images plus a divergence weighted by the clean error.

    Arguments, modes and errors as in `trades_loss`, defaults those of the published function; with a CamBudget it is
    PART-M. The attack increases the cross-entropy, from x + 0.001 N(0,1).

    Equivalent to: `mart_objective(model(x_natural), model(x_adv), y, beta)` with
    `x_adv = pgd(model, x_natural, y, epsilon, step_size, perturb_steps, start=x_natural + 0.001 * noise)`.
    Source: Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020,
    eq. 10.
    """
    x_natural, beta = _check(model, x_natural, y, optimizer, epsilon, perturb_steps, beta, distance, clip)
    x_adv = mart_attack(attack_model or model, x_natural, y, epsilon, step_size, perturb_steps, clip)
    _begin(model, optimizer)
    logits, logits_adv = (checks.logits(model(images), images) for images in (x_natural, x_adv))
    return mart_objective(logits, logits_adv, y, beta)


def mart_attack(
    model: Model, x: Tensor, y: Tensor, epsilon: Epsilon, alpha: float, steps: int, clip: Clip = (0.0, 1.0)
) -> Tensor:
    """The attack of `mart_loss`, which has checked its arguments: adversarial images like x."""
    eps = epsilon(x) if isinstance(epsilon, CamBudget) else epsilon
    return _attack(model, x, y, eps, alpha, steps, clip, *objective("ce"))


def mart_objective(logits: Tensor, logits_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    """MART's loss, a scalar, from clean and adversarial logits (N,classes); gradients flow through both.

    y: class indices (N,); or probabilities (N,classes), with which it is the mean over labels drawn from them, as mixup
    weighs the losses of its two labels.
    The small constants that keep logarithms finite are those of the authors' code.
    Source: Wang et al., ICLR 2020, eq. 7 to 10.
    """
    logits, logits_adv = widened(logits), widened(logits_adv)
    probs, probs_adv = logits.softmax(1), logits_adv.softmax(1)
    if y.is_floating_point():
        y = as_target(y, logits)
        first, second = probs_adv.detach().topk(2, dim=1).indices.unbind(1)
        # The most likely wrong class is the first one, for all labels but that itself.
        of_first = y.gather(1, first[:, None])[:, 0]
        wrong = _confidence(probs_adv, first) * (y.sum(1) - of_first) + _confidence(probs_adv, second) * of_first
        clean_error = (y * (1.0000001 - probs)).sum(1)
    else:
        wrong = _confidence(probs_adv, probs_adv.detach().scatter(1, y[:, None], -1.0).argmax(1))
        clean_error = 1.0000001 - probs.gather(1, y[:, None])[:, 0]
    boosted = F.cross_entropy(logits_adv, as_target(y, logits)) + wrong.mean()
    divergence = F.kl_div((probs_adv + 1e-12).log(), probs, reduction="none").sum(1)
    return boosted + beta * (divergence * clean_error).mean()


def _confidence(probs: Tensor, label: Tensor) -> Tensor:
    """-log(1 - p) of each image's class `label` (N,): large where the model is sure of that class."""
    return F.nll_loss((1.0001 - probs + 1e-12).log(), label, reduction="none")


def _check(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    optimizer: object,
    epsilon: Epsilon,
    steps: int,
    beta: float,
    distance: str,
    clip: Clip,
) -> tuple[Tensor, float]:
    """The images contiguous or channels_last, and beta."""
    if not isinstance(model, nn.Module):
        raise BadTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if optimizer is not None and not hasattr(optimizer, "zero_grad"):
        raise BadTypeError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
    if distance != "l_inf":
        raise BadValueError(f"distance must be 'l_inf', got {distance!r}")
    x = check_images(x, 0.0 if isinstance(epsilon, CamBudget) else epsilon, clip, name="x_natural", stacklevel=4)
    if x.shape[0] == 0:
        raise BadValueError("x_natural must hold at least one image: the loss of an empty batch is not defined")
    checks.labels("y", y, x, soft=True)
    checks.count("perturb_steps", steps)
    return x, checks.number("beta", beta, 0)


def _attack(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor | PackedEpsilon,
    alpha: float,
    steps: int,
    clip: Clip,
    loss: Loss,
    extra: tuple[Tensor, ...],
) -> Tensor:
    x = x.detach()
    x_adv = x + (0.001 * torch.randn_like(x, dtype=checks.compute_dtype(x))).to(x.dtype)
    x_adv = ascend(model, x_adv, x, y, eps, alpha, steps, loss, extra, clip=clip)
    return x_adv.clamp_(*checks.clip_range(clip, x))


def _begin(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    if not model.training:
        model.train()
    if optimizer is not None:
        optimizer.zero_grad()
