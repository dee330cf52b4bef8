"""The minimum-margin attack."""

from __future__ import annotations

import torch
from torch import Tensor

from part_fast import checks
from part_fast.attacks.ascend import Model, ascend, check_images, clean_logits, plain, starting_point
from part_fast.attacks.objectives import logit_of, towards, widened
from part_fast.checks import Clip
from part_fast.errors import BadValueError
from part_fast.ops.packed_epsilon import PackedEpsilon


def mma(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor | PackedEpsilon,
    alpha: float = 2 / 255,
    steps: int = 10,
    *,
    k: int = 3,
    start: str | Tensor = "uniform",
    clip: Clip = (0.0, 1.0),
) -> Tensor:
    """Minimum-margin attack: PGD towards each of the k most likely wrong classes, the best result kept per image.

    Arguments, modes and errors as in `pgd`, y class indices alone. k: how many classes, all wrong ones if there are
    fewer; ranked by the clean logits. For each class c the attack increases -max(z_y - z_c + 50, 0); the result
    with the largest z_c - z_y is kept, at ties that of the more likely class.
    The k attacks run as one batch of k*N images.

    Equivalent to: `pgd(model, x, y, eps, alpha, steps, start=start, loss=towards_c, clip=clip)` for every c, then the
    choice.
    Source: Gao et al., "Fast and Reliable Evaluation of Adversarial Robustness with Minimum-Margin Attack", ICML 2022.
    """
    checks.model(model)
    x = check_images(x, eps, clip)
    checks.labels("y", y, x)
    checks.count("steps", steps)
    checks.count("k", k, 1)
    with torch.inference_mode(False), torch.no_grad():
        x, y = plain(x), plain(y)
        if x.shape[0] == 0:
            return starting_point(x, eps, start, clip)
        logits = clean_logits(model, x)
        checks.labels("y", y, x, logits.shape[1])
        k = min(k, logits.shape[1] - 1)
        if k == 0:
            raise BadValueError("model must give at least 2 classes for a minimum-margin attack, got 1")
        wrong = widened(logits).scatter(1, y[:, None], -torch.inf).topk(k, dim=1).indices
        n, target = x.shape[0], wrong.T.reshape(-1)

        xs, ys = _repeat(x, k), y.repeat(k)
        eps = _repeat_eps(eps, n, k)
        begin = starting_point(xs, eps, _repeat(plain(start), k) if isinstance(start, Tensor) else start, clip)
        x_adv = ascend(model, begin, xs, ys, eps, alpha, steps, towards, (target,), clip=clip)
        logits = clean_logits(model, x_adv)
        best = (logit_of(logits, target) - logit_of(logits, ys)).view(k, n).argmax(0)
        chosen = best * n + torch.arange(n, device=x.device)
        return checks.same_format(x_adv[chosen], x)


def _repeat(value: Tensor, k: int) -> Tensor:
    """(N,C,H,W) -> (k*N,C,H,W), in its memory format."""
    return checks.same_format(value.repeat(k, 1, 1, 1), value)


def _repeat_eps(eps: float | Tensor | PackedEpsilon, n: int, k: int) -> float | Tensor | PackedEpsilon:
    if isinstance(eps, PackedEpsilon):
        return eps[torch.arange(n, device=eps.device).repeat(k)]
    return eps.repeat(k, 1, 1, 1) if isinstance(eps, Tensor) and eps.ndim == 4 and eps.shape[0] == n > 1 else eps
