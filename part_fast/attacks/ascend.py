"""Attacks with a budget per pixel: pgd, mma, and PGD as a drop-in for attack libraries."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from part_fast import checks
from part_fast.attack_model import AttackModel
from part_fast.attack_model.graph import surroundings
from part_fast.checks import Bound, Clip
from part_fast.eval_mode import eval_mode, input_gradient, uncached_autocast
from part_fast.ops.packed_epsilon import PackedEpsilon, eps_arguments
from part_fast.ops.pgd_step import pgd_step_

Model = nn.Module | Callable[[Tensor], Tensor]
Loss = Callable[..., Tensor]

STARTS = ("uniform", "zero")
LOSSES = ("ce", "kl", "margin")


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor | PackedEpsilon,
    alpha: float = 2 / 255,
    steps: int = 10,
    *,
    start: str | Tensor = "uniform",
    loss: str | Loss = "ce",
    clip: Clip = (0.0, 1.0),
) -> Tensor:
    """Projected gradient descent in the l-infinity ball of each pixel's own eps: adversarial images like x.

    x: images (N,C,H,W) within clip up to a rounding of 1e-6, which is taken as it is; copied if neither contiguous nor
        channels_last. y: class indices (N,), or for "ce" and callables probabilities (N,classes), floating, as mixup
        and label smoothing make them; "kl" reads neither.
    eps: image units (8/255), finite and >= 0; a float, a tensor that broadcasts to the images, or a PackedEpsilon.
        Where it is larger than the whole range of clip a warning says that 8/255 may be meant.
    alpha: step size, image units. steps: 0 gives the start back.
    start: "uniform" within each pixel's own eps, then clipped; "zero", at x; or a tensor like x, used as given.
    loss, increased: "ce", cross-entropy; "kl", the divergence from the clean softmax, computed once; "margin", largest
        wrong logit minus the right one; or callable(logits, y), whose result is summed.
    clip: (low, high), what a pixel may be, each a number or one per channel, (C,), (C,1,1) or (1,C,1,1), for images
        that are normalised outside the model; None for anything.
    The model runs in eval mode and gets its mode back. Gradients are taken for the input only: no parameter's .grad
    is touched. The random generator is used for the start alone.

    Equivalent to, for "ce" and "uniform", besides modes and gradients:
        x_adv = (x + (2 * torch.rand_like(x) - 1) * eps).clamp(*clip)
        for _ in range(steps):
            x_adv.requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
            x_adv = pgd_step(x_adv.detach(), grad, x, eps, alpha, clip)
    Source: Madry et al., ICLR 2018, section 2.1; "kl" Zhang et al., ICML 2019 (TRADES), algorithm 1;
    "margin" Carlini and Wagner, S&P 2017, f6; per-pixel eps Zhang et al., ICML 2024 (PART), algorithm 2.
    Errors: TypeError or ValueError that names the argument.
    """
    x = check_images(x, eps, clip)
    checks.labels("y", y, x, soft=loss != "margin")
    checks.count("steps", steps)
    with torch.inference_mode(False), torch.no_grad():
        x, y = plain(x), plain(y)
        x_adv = _start(x, eps, start, clip)
        if x.shape[0] == 0:
            return x_adv
        clean = clean_logits(model, x) if loss == "kl" else None
        return ascend(model, x_adv, x, y, eps, alpha, steps, *objective(loss, clean), clip=clip)


def clean_logits(model: Model, x: Tensor) -> Tensor:
    """Eval-mode logits (N,classes) of the images, without a graph."""
    with record_function("part_fast: attack forward"), eval_mode(model), torch.no_grad(), uncached_autocast():
        return checks.logits(model(x.clone()), x)  # some normalise in place


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
    fewer; ranked by the clean logits. For each class c the attack increases -max(z_y - z_c + 50, 0); kept is the
    result with the largest z_c - z_y, ties by the more likely class. The k attacks run as one batch of k*N images.

    Equivalent to: `pgd(model, x, y, eps, alpha, steps, start=start, loss=towards_c, clip=clip)` for every c, then the
    choice.
    Source: Gao et al., "Fast and Reliable Evaluation of Adversarial Robustness with Minimum-Margin Attack", ICML 2022.
    """
    x = check_images(x, eps, clip)
    checks.labels("y", y, x)
    checks.count("steps", steps)
    checks.count("k", k, 1)
    with torch.inference_mode(False), torch.no_grad():
        x, y = plain(x), plain(y)
        if x.shape[0] == 0:
            return _start(x, eps, start, clip)
        logits = clean_logits(model, x)
        checks.labels("y", y, x, logits.shape[1])
        k = min(k, logits.shape[1] - 1)
        if k == 0:
            raise ValueError("model must give at least 2 classes for a minimum-margin attack, got 1")
        wrong = logits.float().scatter(1, y[:, None], -torch.inf).topk(k, dim=1).indices
        n, target = x.shape[0], wrong.T.reshape(-1)

        xs, ys = _repeat(x, k), y.repeat(k)
        eps = _repeat_eps(eps, n, k)
        begin = _start(xs, eps, _repeat(plain(start), k) if isinstance(start, Tensor) else start, clip)
        x_adv = ascend(model, begin, xs, ys, eps, alpha, steps, towards, (target,), clip=clip)
        logits = clean_logits(model, x_adv)
        best = (_logit(logits, target) - _logit(logits, ys)).view(k, n).argmax(0)
        chosen = best * n + torch.arange(n, device=x.device)
        return checks.same_format(x_adv[chosen], x)


def ascend(
    model: Model,
    x_adv: Tensor,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor | PackedEpsilon,
    alpha: float,
    steps: int,
    loss: Loss,
    extra: tuple[Tensor, ...] = (),
    *,
    clip: Clip = (0.0, 1.0),
) -> Tensor:
    """`steps` PGD steps from x_adv, which is overwritten and returned; what every attack here runs.

    loss: callable(logits, y, *extra), increased; its result is summed, so that no image's step depends on the batch.
    With an AttackModel that captures CUDA graphs the steps are one launch; `loss` is then hashable, stays the same
    object, and reads no tensor that changes place but its arguments.
    """

    low, high = checks.clip_range(clip, x)

    def run(x_adv: Tensor, x: Tensor, y: Tensor, *rest: Tensor) -> None:
        held, others = _held_eps(eps, rest)
        bounds, others = _held_clip(low, high, others)
        with eval_mode(model), torch.enable_grad():
            for step in range(steps):
                leaf = x_adv.detach().requires_grad_()
                with record_function("part_fast: attack forward"):
                    logits = checks.logits(forward(leaf), x)
                if step == 0 and not _capturing(x):
                    checks.labels("y", y, x, logits.shape[1], soft=True)
                with record_function("part_fast: attack backward"):
                    grad = input_gradient(loss(logits, y, *others).sum(), leaf)
                if grad is None:
                    raise ValueError(
                        "model must lead from its input to the loss, got a loss that does not depend on x_adv"
                    )
                del logits, leaf  # the graph is done; x_adv may be overwritten
                with record_function("part_fast: pgd_step"), torch.no_grad():
                    pgd_step_(x_adv, grad, x, held, alpha, bounds)

    forward = model
    if isinstance(model, AttackModel):
        model.refresh_if_changed()  # once an attack
        forward = functools.partial(model, follow=False, kind=loss)
    rest = (*_eps_tensors(eps), *_clip_tensors(low, high), *extra)
    if isinstance(model, AttackModel) and model.graphs is not None and steps > 0:
        key = _graph_key(model, x, eps, alpha, steps, loss, _clip_numbers(low, high))
        with record_function("part_fast: CUDA graph"):
            model.graphs(key, run, x_adv, x, y, *rest)
    else:
        run(x_adv, x, y, *rest)
    return x_adv


def _graph_key(
    model: AttackModel,
    x: Tensor,
    eps: float | Tensor | PackedEpsilon,
    alpha: float,
    steps: int,
    loss: Loss,
    clip: Hashable,
) -> Hashable:
    """All that decides what the steps of an attack do, but its tensors."""
    if not isinstance(loss, Hashable):
        raise TypeError(f"loss must be hashable where an attack is captured, got {type(loss).__name__}")
    numbers = (steps, checks.number("alpha", alpha), clip, _eps_numbers(eps))
    return (loss, numbers, surroundings(model.module, x.device))


def _eps_tensors(eps: float | Tensor | PackedEpsilon) -> tuple[Tensor, ...]:
    """What of an eps argument is a tensor; `_held_eps` puts it together again from others in their place."""
    return (eps.bits,) if isinstance(eps, PackedEpsilon) else (eps,) if isinstance(eps, Tensor) else ()


def _eps_numbers(eps: float | Tensor | PackedEpsilon) -> Hashable:
    return (eps.eps, eps.eps_low) if isinstance(eps, PackedEpsilon) else None if isinstance(eps, Tensor) else eps


def _held_eps(
    eps: float | Tensor | PackedEpsilon, tensors: tuple[Tensor, ...]
) -> tuple[float | Tensor | PackedEpsilon, tuple[Tensor, ...]]:
    """An eps argument like `eps` of the first of `tensors`, if it has one, and the other tensors."""
    if isinstance(eps, PackedEpsilon):
        return dataclasses.replace(eps, bits=tensors[0]), tensors[1:]
    return (tensors[0], tensors[1:]) if isinstance(eps, Tensor) else (eps, tensors)


def _clip_tensors(low: Bound, high: Bound) -> tuple[Tensor, ...]:
    return (low, high) if isinstance(low, Tensor) and isinstance(high, Tensor) else ()


def _clip_numbers(low: Bound, high: Bound) -> Hashable:
    return None if isinstance(low, Tensor) else (low, high)


def _held_clip(low: Bound, high: Bound, tensors: tuple[Tensor, ...]) -> tuple[Clip, tuple[Tensor, ...]]:
    """As `_held_eps`."""
    return ((tensors[0], tensors[1]), tensors[2:]) if isinstance(low, Tensor) else ((low, high), tensors)


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def objective(loss: str | Loss, clean: Tensor | None = None) -> tuple[Loss, tuple[Tensor, ...]]:
    """The attack loss of that name as callable(logits, y, *extra) -> (N,), and its extra; "kl" is against `clean`."""
    if callable(loss):
        return loss, ()
    if loss == "kl":
        if clean is None:
            raise ValueError("clean must be the clean logits for loss 'kl', got None")
        return divergence, (clean.detach().float().softmax(1),)
    if loss == "ce":
        return cross_entropy, ()
    if loss == "margin":
        return margin, ()
    raise ValueError(f"loss must be one of {', '.join(LOSSES)} or callable(logits, y), got {loss!r}")


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each image, (N,); y are class indices (N,) or probabilities (N,classes)."""
    return F.cross_entropy(logits.float(), as_target(y), reduction="none")


def as_target(y: Tensor) -> Tensor:
    """Labels as `F.cross_entropy` takes them beside float32 logits."""
    return y.float() if y.is_floating_point() else y


def divergence(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """KL divergence of each image's softmax from the probabilities `target` (N,classes), (N,)."""
    return F.kl_div(logits.float().log_softmax(1), target, reduction="none").sum(1)


def towards(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The minimum-margin attack's loss towards the classes `target` (N,), (N,)."""
    return -(_logit(logits, y) - _logit(logits, target) + 50).clamp(min=0)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Largest wrong logit minus the right one, (N,); positive where the model is wrong."""
    right = logits.gather(1, y[:, None])
    wrong = logits.scatter(1, y[:, None], -torch.inf)
    return wrong.amax(1) - right[:, 0]


class PGD:
    """PGD as an object: `PGD(model)(images, labels)`, the way of attack libraries such as torchattacks.

    eps, alpha: image units, eps in every form that `pgd` takes. random_start: uniform within eps, else at the images.
    clip: as in `pgd`.

    Equivalent to: `pgd(model, images, labels, eps, alpha, steps, start=start, clip=clip)`, where start is "uniform" if
    random_start else "zero".
    """

    def __init__(
        self,
        model: Model,
        eps: float | Tensor | PackedEpsilon = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        *,
        clip: Clip = (0.0, 1.0),
    ):
        self.model = model
        self.eps = eps
        self.alpha = checks.number("alpha", alpha)
        self.steps = checks.count("steps", steps)
        self.random_start = random_start
        self.clip = clip

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images (N,C,H,W) for class indices (N,) or probabilities (N,classes)."""
        start = "uniform" if self.random_start else "zero"
        return pgd(self.model, images, labels, self.eps, self.alpha, self.steps, start=start, clip=self.clip)

    def __repr__(self) -> str:
        eps = f"{self.eps:.4g}" if isinstance(self.eps, float) else type(self.eps).__name__
        return f"PGD(eps={eps}, alpha={self.alpha:.4g}, steps={self.steps}, random_start={self.random_start})"


def check_images(
    x: Tensor, eps: float | Tensor | PackedEpsilon, clip: Clip, name: str = "x", stacklevel: int = 4
) -> Tensor:
    """Images within clip and an eps for them, values included: once, where an attack or loss is entered.

    Returns the images contiguous or channels_last.
    """
    if checks.transformed():
        raise ValueError(f"{name} must be a tensor outside torch.func transforms: an attack runs its own backward")
    x = checks.pixels(name, x, clip)
    eps_arguments(eps, x)
    if isinstance(eps, Tensor):
        checks.values("eps", eps, 0)
    checks.image_units("eps", eps.eps if isinstance(eps, PackedEpsilon) else eps, clip, stacklevel)
    return x


def _start(x: Tensor, eps: float | Tensor | PackedEpsilon, start: str | Tensor, clip: Clip) -> Tensor:
    """A new tensor like x to begin at."""
    if isinstance(start, Tensor):
        start = checks.images("start", start)
        checks.alike("start", start, "x", x)
        return checks.same_format(plain(start), x).clone()
    bounds = checks.clip_range(clip, x)
    if start == "zero":
        return torch.clamp(x, *bounds)  # x may lie outside by rounding
    if start != "uniform":
        raise ValueError(f"start must be one of {', '.join(STARTS)} or a tensor, got {start!r}")
    bound = eps.dense() if isinstance(eps, PackedEpsilon) else eps
    noise = torch.rand_like(x, dtype=checks.compute_dtype(x)).mul_(2).sub_(1)
    bound = bound.detach() if isinstance(bound, Tensor) else bound
    return torch.clamp(x + noise * bound, *bounds).to(x.dtype)


def _repeat(value: Tensor, k: int) -> Tensor:
    """(N,C,H,W) -> (k*N,C,H,W), in its memory format."""
    return checks.same_format(value.repeat(k, 1, 1, 1), value)


def _repeat_eps(eps: float | Tensor | PackedEpsilon, n: int, k: int) -> float | Tensor | PackedEpsilon:
    if isinstance(eps, PackedEpsilon):
        return eps[torch.arange(n, device=eps.device).repeat(k)]
    return eps.repeat(k, 1, 1, 1) if isinstance(eps, Tensor) and eps.ndim == 4 and eps.shape[0] == n > 1 else eps


def _logit(logits: Tensor, index: Tensor) -> Tensor:
    return logits.float().gather(1, index[:, None])[:, 0]


def plain(value: Tensor) -> Tensor:
    """`value` outside any graph, and no inference tensor, which autograd could not save."""
    return value.clone() if value.is_inference() else value.detach()
