"""`ascend`, the loop of steps that every attack here runs, its start and its checks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from part_fast import checks
from part_fast.attack_model import AttackModel
from part_fast.attack_model.graph import capturing, surroundings
from part_fast.attacks.objectives import Loss, objective
from part_fast.checks import Bound, Clip
from part_fast.errors import BadTypeError, BadValueError
from part_fast.eval_mode import eval_mode, input_gradient, uncached_autocast
from part_fast.ops.bank_view import BankView
from part_fast.ops.eps_step import eps_step_
from part_fast.ops.packed_epsilon import PackedEpsilon, eps_arguments
from part_fast.ops.pgd_step import pgd_step_

Model = nn.Module | Callable[[Tensor], Tensor]

STARTS = ("uniform", "zero")


@dataclasses.dataclass(frozen=True)
class LastStep:
    """The `eps_step_` that an attack takes in the place of its last PGD step.

    factor: how far a pixel moves in units of its own eps; or alpha, in image units. project: back into its eps.
    store: the bank that the same launch writes the perturbation to.
    """

    factor: float | None = None
    alpha: float | None = None
    project: bool = True
    store: BankView | None = None

    @property
    def key(self) -> Hashable:
        """Everything but the places that decides what the step does, for the key of a CUDA graph."""
        bank = None if self.store is None else (self.store.bank.data_ptr(), self.store.bank.shape, self.store.scale)
        return (self.factor, self.alpha, self.project, bank)


def attack(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor | PackedEpsilon,
    alpha: float,
    steps: int,
    begin: Callable[[Tensor], Tensor],
    loss: str | Loss,
    clip: Clip,
    *,
    last: LastStep | None = None,
) -> Tensor:
    """Check what an attack of one batch was given, begin at the images `begin(x)`, and `ascend`; see `pgd`."""
    checks.model(model)
    x = check_images(x, eps, clip)
    checks.labels("y", y, x, soft=loss != "margin")
    checks.count("steps", steps)
    with torch.inference_mode(False), torch.no_grad():
        x, y = plain(x), plain(y)
        x_adv = begin(x)
        if x.shape[0] == 0:
            return x_adv
        clean = clean_logits(model, x) if loss == "kl" else None
        return ascend(model, x_adv, x, y, eps, alpha, steps, *objective(loss, clean), clip=clip, last=last)


def clean_logits(model: Model, x: Tensor) -> Tensor:
    """Eval-mode logits (N,classes) of the images, without a graph."""
    with record_function("part_fast: attack forward"), eval_mode(model), torch.no_grad(), uncached_autocast():
        return checks.logits(model(x.clone()), x)  # some models normalise in place


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
    last: LastStep | None = None,
) -> Tensor:
    """The images after `steps` PGD steps from x_adv, which may be overwritten; every attack here runs this loop.

    last: what the last of the steps is in place of a PGD step, for attacks that step by eps or remember what they find.

    loss: callable(logits, y, *extra), increased; its result is summed, so that no image's step depends on the batch.
    With an AttackModel that captures CUDA graphs the steps are one launch; `loss` is then hashable, stays the same
    object, and reads no tensor that changes place but its arguments.
    """

    low, high = checks.clip_range(clip, x)

    def run(x_adv: Tensor, x: Tensor, y: Tensor, *rest: Tensor) -> tuple[Tensor]:
        held, others = _held_eps(eps, rest)
        bounds, others = _held_clip(low, high, others)
        final, others = _held_places(last, others)
        with eval_mode(model), torch.enable_grad():
            for step in range(steps):
                leaf = x_adv.detach().requires_grad_()
                with record_function("part_fast: attack forward"):
                    logits = checks.logits(forward(leaf), x)
                if step == 0 and not capturing(x):
                    checks.labels("y", y, x, logits.shape[1], soft=True)
                with record_function("part_fast: attack backward"):
                    grad = input_gradient(loss(logits, y, *others).sum(), leaf)
                if grad is None:
                    raise BadValueError(
                        "model must lead from its input to the loss, got a loss that does not depend on x_adv"
                    )
                del logits, leaf  # the graph is done; x_adv may be overwritten
                with record_function("part_fast: pgd_step"), torch.no_grad():
                    if final is not None and step == steps - 1:
                        _take(final, x_adv, grad, x, held, bounds)
                    else:
                        pgd_step_(x_adv, grad, x, held, alpha, bounds)
        return (x_adv,)

    forward = model
    if isinstance(model, AttackModel):
        model.refresh_if_changed()  # once per attack
        forward = functools.partial(model, follow=False, kind=loss)
    rest = (*_eps_tensors(eps), *_clip_tensors(low, high), *_places_tensors(last), *extra)
    if isinstance(model, AttackModel) and model.graphs is not None and steps > 0:
        key = _graph_key(model, x, eps, alpha, steps, loss, (_clip_numbers(low, high), last and last.key))
        with record_function("part_fast: attack graph"):
            return model.graphs(key, run, x_adv, x, y, *rest)[0]
    return run(x_adv, x, y, *rest)[0]


def _graph_key(
    model: AttackModel,
    x: Tensor,
    eps: float | Tensor | PackedEpsilon,
    alpha: float,
    steps: int,
    loss: Loss,
    others: Hashable,
) -> Hashable:
    """Everything but its tensors that decides what the steps of an attack do."""
    if not isinstance(loss, Hashable):
        raise BadTypeError(f"loss must be hashable where an attack is captured, got {type(loss).__name__}")
    numbers = (steps, checks.number("alpha", alpha), others, _eps_numbers(eps))
    return (loss, numbers, surroundings(model.module, x.device))


def _eps_tensors(eps: float | Tensor | PackedEpsilon) -> tuple[Tensor, ...]:
    """The tensors of an eps argument; `_held_eps` makes an eps argument from other tensors in their place."""
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
    """As `_held_eps`, for a clip argument."""
    return ((tensors[0], tensors[1]), tensors[2:]) if isinstance(low, Tensor) else ((low, high), tensors)


def _places_tensors(last: LastStep | None) -> tuple[Tensor, ...]:
    return () if last is None or last.store is None else (last.store.places,)


def _held_places(last: LastStep | None, tensors: tuple[Tensor, ...]) -> tuple[LastStep | None, tuple[Tensor, ...]]:
    """As `_held_eps`, for a step's places in a bank; the bank itself is written where it lies."""
    if last is None or last.store is None:
        return last, tensors
    return dataclasses.replace(last, store=dataclasses.replace(last.store, places=tensors[0])), tensors[1:]


def _take(
    step: LastStep, x_adv: Tensor, grad: Tensor, x: Tensor, eps: float | Tensor | PackedEpsilon, clip: Clip
) -> None:
    view = step.store
    kept = {} if view is None else {"bank": view.bank, "places": view.places, "scale": view.scale}
    eps_step_(x_adv, grad, x, eps, step.factor, clip, alpha=step.alpha, project=step.project, **kept)  # type: ignore[arg-type]


def check_images(
    x: Tensor, eps: float | Tensor | PackedEpsilon, clip: Clip, name: str = "x", stacklevel: int = 4
) -> Tensor:
    """Check images and their eps, values included: once, where an attack or loss is entered.

    Returns the images contiguous or channels_last.
    """
    if checks.transformed():
        raise BadValueError(f"{name} must be a tensor outside torch.func transforms: an attack runs its own backward")
    x = checks.pixels(name, x, clip)
    eps_arguments(eps, x)
    if isinstance(eps, Tensor):
        checks.values("eps", eps, 0)
    checks.image_units("eps", eps.eps if isinstance(eps, PackedEpsilon) else eps, clip, stacklevel)
    return x


def starting_point(x: Tensor, eps: float | Tensor | PackedEpsilon, start: str | Tensor, clip: Clip) -> Tensor:
    """The start of an attack, a new tensor like x."""
    if isinstance(start, Tensor):
        start = checks.images("start", start)
        checks.alike("start", start, "x", x)
        return checks.same_format(plain(start), x).clone()
    bounds = checks.clip_range(clip, x)
    if start == "zero":
        return torch.clamp(x, *bounds)  # x may lie outside by rounding
    if start != "uniform":
        raise BadValueError(f"start must be one of {', '.join(STARTS)} or a tensor, got {start!r}")
    bound = eps.dense() if isinstance(eps, PackedEpsilon) else eps
    noise = torch.rand_like(x, dtype=checks.compute_dtype(x)).mul_(2).sub_(1)
    bound = bound.detach() if isinstance(bound, Tensor) else bound
    return torch.clamp(x + noise * bound, *bounds).to(x.dtype)


def plain(value: Tensor) -> Tensor:
    """`value` without a graph, and copied if it is an inference tensor, which autograd cannot save."""
    return value.clone() if value.is_inference() else value.detach()
