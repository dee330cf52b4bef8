"""Rules: from a class activation map to how much of the budget each pixel gets, by name or as a function."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from part_fast import checks
from part_fast.atomic import replacing
from part_fast.errors import BadTypeError, BadValueError
from part_fast.ops.cam_mask import RULE_HELP, _fraction, parse_rule
from part_fast.ops.upsample_cam import upsample_cam
from part_fast.optional import needs
from part_fast.reading import read_tensors

# (cam (N,h,w), size (H,W)) -> weights (N,1,H,W) or (N,C,H,W) in [0,1]; asked with target=(N,) where it takes one.
Rule = Callable[..., Tensor]

# What each rule gives the full eps to, for help texts: those of `part_fast.epsilon_map`, and functions of this file.
RULES = {
    **RULE_HELP,
    "budget-matched:MEAN": "as soft, raised or lowered to the mean eps MEAN in each image",
    "region:NAME": "the top-left, top-right, bottom-left or bottom-right quarter or the centre",
    "learned:FILE": "maps per class that the study learned",
}
_REGIONS = ("top-left", "top-right", "bottom-left", "bottom-right", "centre")


def find_rule(rule: str | Rule, eps: float, eps_low: float, *, functions: bool = True) -> str | Rule:
    """A rule of the ops by its name, or the function that any other rule is, for a budget of eps and eps_low.

    functions: whether the caller takes functions, of which the message tells; a configuration has names alone, whose
    files are not read.
    Errors: TypeError or ValueError that lists the names; FileNotFoundError or ValueError for a file of learned maps.
    """
    if isinstance(rule, str):
        name, colon, value = rule.partition(":")
        if name == "budget-matched" and colon:
            above, below = _fraction(value)
            mean = above / below if below else math.nan
            if not eps_low <= mean <= eps or (mean == 0 and above):
                raise BadValueError(
                    f"rule budget-matched:MEAN must have eps_low <= MEAN <= eps, {eps_low:g} to {eps:g}, got {rule!r}"
                )
            return budget_matched((mean - eps_low) / (eps - eps_low) if eps > eps_low else 1.0)
        if name == "region" and colon:
            return region(value)
        if name == "learned" and value:
            return LearnedRule.load(Path(value)) if functions else rule
        try:
            parse_rule(rule, 1, 1, soft=True)
        except BadValueError as error:
            others = ", ".join(name for name in RULES if name not in RULE_HELP)
            listed = f", soft, {others}{', or a function' if functions else ''}, got"
            raise BadValueError(str(error).replace(", soft, got", listed)) from None
        return rule
    if not callable(rule) or isinstance(rule, type):
        raise BadTypeError(f"rule must be a name or a function (cam, size) -> weights, got {rule!r}")
    return rule


def has_bits(rule: str) -> bool:
    """Whether a rule's maps are masks of two values that `packed` and a MaskBank can hold."""
    return rule.partition(":")[0] in ("zscore", "released", "quantile")


def rule_weights(rule: Rule, cam: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """What the function `rule` makes of maps cam (N,h,w) of images x (N,C,H,W) explained for classes target (N,).

    Errors: TypeError or ValueError unless it is (N,1,H,W) or (N,C,H,W), floating, and in [0,1] where values are read.
    """
    function = rule.forward if isinstance(rule, nn.Module) else rule
    height, width = x.shape[2:]
    asked = "target" in inspect.signature(function).parameters
    weights = rule(cam, (height, width), target=target) if asked else rule(cam, (height, width))
    checks.tensor("the result of rule", weights)
    n, channels = x.shape[:2]
    if tuple(weights.shape) not in ((n, 1, height, width), (n, channels, height, width)):
        raise BadValueError(
            f"rule must give weights ({n},1,{height},{width}) or ({n},{channels},{height},{width}), "
            f"got {tuple(weights.shape)}"
        )
    if weights.device != x.device:
        raise BadValueError(f"rule must give weights on the device of x, {x.device}, got {weights.device}")
    checks.values("the result of rule", weights, 0, 1)
    return weights


def ensemble(cams: Sequence[Tensor]) -> Tensor:
    """The mean of maps (N,h,w) of one shape, each first stretched to [0,1] per image; a flat one counts as zeros.

    Equivalent to: `torch.stack([(cam - cam.amin((1, 2), True)) / (cam.amax((1, 2), True) - cam.amin((1, 2), True))
    for cam in cams]).mean(0)`.
    Errors: ValueError for no maps, or maps of several shapes.
    """
    if not cams or any(cam.shape != cams[0].shape for cam in cams):
        raise BadValueError(f"cams must be maps (N,h,w) of one shape, got {[tuple(cam.shape) for cam in cams]}")
    stretched = []
    for cam in cams:
        least, most = (extreme(cam, (1, 2), keepdim=True) for extreme in (torch.amin, torch.amax))
        stretched.append(torch.where(most > least, (cam - least) / (most - least), torch.zeros_like(cam)))
    return torch.stack(stretched).mean(0)


def fixed_mean(weights: Tensor, mean: float) -> Tensor:
    """Weights (N,M,H,W), raised or lowered by one number per image and clamped to [0,1], so that their mean is `mean`.

    This is the point nearest to the weights with that mean in [0,1]. Flat weights become `mean` everywhere.
    Differentiable in the weights; computed in float64, rounded once.

    Equivalent to: `(weights + c).clamp(0, 1)` with each image's c from bisection.
    Errors: ValueError unless 0 <= mean <= 1.
    """
    mean = checks.number("mean", mean, 0)
    if mean > 1:
        raise BadValueError(f"mean must be in [0, 1], got {mean}")
    if weights.numel() == 0:
        return weights
    flat = weights.flatten(1).double()
    pixels = flat.shape[1]
    # The sum of clamp(w + c, 0, 1) over c is linear between the places where a pixel begins to rise and those where it
    # stops; c lies between two of them.
    places, order = torch.cat([-flat, 1 - flat], 1).sort(dim=1, stable=True)
    rising = torch.where(order < pixels, 1, -1).cumsum(1)  # pixels that rise after each place
    total = torch.cat([torch.zeros_like(places[:, :1]), (places.diff(dim=1) * rising[:, :-1]).cumsum(1)], 1)
    wanted = torch.full_like(total[:, :1], mean * pixels)
    after = torch.searchsorted(total.detach().contiguous(), wanted).clamp(1, 2 * pixels - 1)
    before = after - 1
    slope = rising.gather(1, before).clamp(min=1)
    c = places.gather(1, before) + (wanted - total.gather(1, before)) / slope
    return (flat + c).clamp(0, 1).view_as(weights).to(weights.dtype)


def budget_matched(share: float) -> Rule:
    """The rule that gives each image the mean weight `share`: its mean eps is eps_low + share * (eps - eps_low).

    Two networks are then trained with the same budget in all, and a difference between them comes from where it is
    spent. `rule="budget-matched:8/255"` with eps=9/255 and eps_low=7/255 has the mean of plain training with 8/255.

    Equivalent to: `fixed_mean(upsample_cam(cam, size).clamp(0, 1)[:, None], share)`; a map without evidence gives every
    pixel the mean.
    """
    checks.number("share", share, 0)

    def rule(cam: Tensor, size: tuple[int, int]) -> Tensor:
        return fixed_mean(_enlarged(cam, size), share)

    return rule


def region(name: str) -> Rule:
    """The rule that gives 1 to a region of every image, whatever its CAM: a quarter such as "top-left", or "centre"."""
    if name not in _REGIONS:
        raise BadValueError(f"region must be one of {', '.join(_REGIONS)}, got {name!r}")

    def rule(cam: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = size
        weights = cam.new_zeros(len(cam), 1, height, width)
        if name == "centre":
            rows, columns = (slice(side // 4, side // 4 + side // 2) for side in size)
        else:
            rows = slice(0, height // 2) if "top" in name else slice(height // 2, height)
            columns = slice(0, width // 2) if "left" in name else slice(width // 2, width)
        weights[:, :, rows, columns] = 1
        return weights

    return rule


class LearnedRule(nn.Module):
    """A rule with parameters: sigmoid(place + gain * u), u the enlarged CAM in [0,1], and `place` a map to be learned.

    size: (H, W) of the images. classes: one map per class, chosen by the class that the CAM explains; default: one for
    all. mean: if given, weights are brought to this mean per image by `fixed_mean`, so that learning moves the budget
    and cannot just raise or lower it.
    Weights are 0.5 plus what the CAM adds at first: place is zeros, gain 1.

    The eps map of `CamBudget(..., rule=learned)` has a graph that leads to `place` and `gain`. What attacks return has
    none: let a last step by `part_fast.pgd_step(x_adv, grad, x, eps_map, alpha)` end in the loss, as
    examples/learned_rule.py does.
    Errors: ValueError for images of another size.
    """

    def __init__(self, size: tuple[int, int], classes: int | None = None, mean: float | None = None) -> None:
        super().__init__()
        height, width = (checks.count("size", side, 1) for side in size)
        count = 1 if classes is None else checks.count("classes", classes, 1)
        self.size, self.per_class, self.mean = (height, width), classes is not None, mean
        self.place = nn.Parameter(torch.zeros(count, 1, height, width))
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, cam: Tensor, size: tuple[int, int], target: Tensor) -> Tensor:
        """Weights (N,1,H,W) from maps cam (N,h,w) that explain the classes target (N,)."""
        if tuple(size) != self.size:
            raise BadValueError(f"size must be {self.size}, of which the maps are learned, got {tuple(size)}")
        place, gain = self.place.to(cam.device), self.gain.to(cam.device)
        place = place.index_select(0, target) if self.per_class else place
        weights = torch.sigmoid(place + gain * _enlarged(cam, size))
        return weights if self.mean is None else fixed_mean(weights, self.mean)

    def save(self, path: Path) -> None:
        """Write the rule to a file, which `rule="learned:FILE"` reads."""
        with needs("safetensors", "train"):
            from safetensors.torch import save_file
        mean = torch.tensor(torch.nan if self.mean is None else self.mean, dtype=torch.float64)
        state = {"place": self.place.detach().cpu(), "gain": self.gain.detach().cpu(), "mean": mean}
        with replacing(path) as temporary:
            save_file({key: value.clone() for key, value in state.items()}, temporary)

    @classmethod
    def load(cls, path: Path) -> LearnedRule:
        """The rule that `save` wrote, without gradients. Errors: FileNotFoundError or ValueError, naming the file."""
        state = read_tensors(path)
        place, gain, mean = (state.get(key) for key in ("place", "gain", "mean"))
        if (
            place is None
            or gain is None
            or mean is None
            or place.ndim != 4
            or place.shape[1] != 1
            or not len(place)
            or gain.numel() != 1
            or mean.numel() != 1
        ):
            raise BadValueError(f"rule learned:FILE: {path} must hold place (classes,1,H,W), gain and mean, got others")
        if not bool(torch.isfinite(place).all() & torch.isfinite(gain).all()):
            raise BadValueError(f"rule learned:FILE: {path} must hold finite numbers, got NaN or infinite ones")
        share = float(mean)
        rule = cls((place.shape[2], place.shape[3]), len(place), None if math.isnan(share) else share)
        rule.per_class = len(place) > 1
        with torch.no_grad():
            rule.place.copy_(place)
            rule.gain.copy_(gain.view(()))
        return rule.requires_grad_(False)


def _enlarged(cam: Tensor, size: tuple[int, int]) -> Tensor:
    """The CAM (N,h,w) in [0,1] at full size, (N,1,H,W); zeros where it says nothing, flat or not finite."""
    u = upsample_cam(cam.detach(), size).clamp(0, 1)
    return u.masked_fill(~torch.isfinite(u).all((1, 2), keepdim=True).expand_as(u), 0)[:, None]
