"""cam_mask: which pixels matter, from a small class activation map to a full-size bool mask, fused."""

from __future__ import annotations

import torch
from torch import Tensor

from part_fast import backends, checks
from part_fast.errors import BadTypeError, BadValueError
from part_fast.ops.packed_epsilon import bytes_per_mask, pack_bits
from part_fast.ops.upsample_cam import reference as upsample_reference

# What each rule keeps, for help texts; Q is a number. "soft" is no mask: epsilon_map takes it.
RULE_HELP = {
    "zscore": "pixels more than a standard deviation above the mean",
    "released": "what the authors' published code computes",
    "quantile:Q": "the largest share Q of the pixels",
    "soft": "in proportion to the map",
}

# The raw ops' `rule` argument is the place in this tuple.
RULES = tuple(name.partition(":")[0] for name in RULE_HELP)


def _fraction(text: str) -> tuple[int, int]:
    """Numerator and denominator of "0.07", "7e-2", "7/100" or "7.5/100"; one of them 0 for anything else.

    Exact: 0.07 of 100 pixels is 7, where floats say 7.000000000000001, so 8. Plain integers, since torch.compile
    does not trace fractions.Fraction.
    """
    top, slash, bottom = text.partition("/")
    (a, b), (c, d) = _decimal(top), _decimal(bottom if slash else "1")
    return a * d, b * c


def _decimal(text: str) -> tuple[int, int]:
    """Of a number without a slash; (0, 1) for anything else."""
    try:
        mantissa, e, exponent = text.lower().partition("e")
        whole, _, part = mantissa.strip().partition(".")
        power = (int(exponent) if e else 0) - len(part)
        if abs(power) > 400:  # beyond any double, and 10**power would take long
            return 0, 1
        return int(whole + part) * 10 ** max(power, 0), 10 ** max(-power, 0)
    except ValueError:
        return 0, 1


def parse_rule(rule: object, height: int, width: int, soft: bool) -> tuple[int, int, int]:
    """(rule, k, M): the rule's number, how many pixels `quantile:q` keeps (else 0), the mask's channels."""
    if not isinstance(rule, str):
        raise BadTypeError(f"rule must be one of {_known(soft)}, got {type(rule).__name__}")
    name, colon, share = rule.partition(":")
    if name == "quantile" and colon:
        numerator, denominator = _fraction(share)
        if 0 < numerator < denominator:
            return RULES.index("quantile"), -(-numerator * height * width // denominator), 1
    elif rule in RULES and rule != "quantile" and (soft or rule != "soft"):
        return RULES.index(rule), 0, 3 if rule == "released" else 1
    raise BadValueError(f"rule must be one of {_known(soft)}, got {rule!r}")


def _known(soft: bool) -> str:
    names = (name.replace(":Q", ":q with 0 < q < 1") for name in RULE_HELP if soft or name != "soft")
    return ", ".join(names)


# matplotlib's jet is linear between these (place, value) points of each channel.
_JET = (
    ((0.0, 0.0), (0.35, 0.0), (0.66, 1.0), (0.89, 1.0), (1.0, 0.5)),
    ((0.0, 0.0), (0.125, 0.0), (0.375, 1.0), (0.64, 1.0), (0.91, 0.0), (1.0, 0.0)),
    ((0.0, 0.5), (0.11, 1.0), (0.34, 1.0), (0.65, 0.0), (1.0, 0.0)),
)


def jet() -> Tensor:
    """matplotlib's 256-entry jet, float64 (256, 3), by the operations that csrc/cam_mask.h repeats."""
    table = []
    for entry in range(256):
        rgb = []
        for points in _JET:
            i = 0
            while i + 2 < len(points) and entry >= 255.0 * points[i + 1][0]:
                i += 1
            (x0, y0), (x1, y1) = points[i], points[i + 1]
            rgb.append((entry - 255.0 * x0) / (255.0 * x1 - 255.0 * x0) * (y1 - y0) + y0)
        table.append(rgb)
    return torch.tensor(table, dtype=torch.float64)


def ordered_sum(values: Tensor) -> Tensor:
    """Sum (N,P) over P in float64 in one fixed order: eight interleaved running sums, then their sum in turn.

    The C++ kernel adds in this order, so on a CPU both get the same bits and no mask differs, however
    close a pixel lies to its threshold.
    """
    values = torch.nn.functional.pad(values.double(), (0, -values.shape[1] % 8))
    return values.view(values.shape[0], -1, 8).cumsum(1)[:, -1].cumsum(1)[:, -1:]


def reference(cam: Tensor, height: int, width: int, rule: int, k: int) -> Tensor:
    """`cam_mask` in plain PyTorch, bool (N,M,H,W)."""
    n, pixels = cam.shape[0], height * width
    if n == 0:
        return torch.zeros(n, 3 if RULES[rule] == "released" else 1, height, width, dtype=torch.bool, device=cam.device)
    u = upsample_reference(cam, height, width).view(n, pixels)
    low, high = cam.amin((1, 2))[:, None].to(u.dtype), cam.amax((1, 2))[:, None].to(u.dtype)
    # A flat map, or one with NaN or infinity, holds no evidence.
    # Not high > low: where denormals are flushed to zero, the difference may be none.
    evidence = (high - low > 0) & torch.isfinite(high - low)
    u = torch.where(evidence, u, torch.zeros_like(u))
    if RULES[rule] == "released":
        return _released(u, evidence).view(n, height, width, 3).permute(0, 3, 1, 2).contiguous()
    if RULES[rule] == "quantile":
        mask = torch.zeros_like(u, dtype=torch.bool)
        mask.scatter_(1, torch.sort(u, dim=1, descending=True, stable=True).indices[:, :k], True)
    else:
        mean = ordered_sum(u) / pixels
        deviation = u.double() - mean
        std = (ordered_sum(deviation * deviation) / pixels).sqrt()
        mask = deviation > std
    return (mask & evidence).view(n, 1, height, width)


def _released(u: Tensor, evidence: Tensor) -> Tensor:
    """(N,P) -> bool (N,P,3). A pixel's colour is one of 256, so counts of them give mean and deviation."""
    colours = jet().to(u.device)
    square = u * u
    entry = (square * 256).clamp(max=255).long()
    counts = torch.zeros(u.shape[0], 256, dtype=torch.float64, device=u.device)
    counts.scatter_add_(1, entry, torch.ones_like(entry, dtype=torch.float64))
    values = 3 * u.shape[1]
    mean = ordered_sum(counts * ((colours[:, 0] + colours[:, 1]) + colours[:, 2])) / values
    deviation = colours - mean[..., None]
    square = deviation * deviation
    std = (ordered_sum(counts * ((square[..., 0] + square[..., 1]) + square[..., 2])) / values).sqrt()
    table = (deviation > std[..., None]) & evidence[..., None]
    return table.gather(1, entry[..., None].expand(-1, -1, 3))


def _reference_op(cam: Tensor, height: int, width: int, rule: int, k: int, packed: bool) -> Tensor:
    mask = reference(cam, height, width, rule, k)
    return pack_bits(mask) if packed else mask


def _fake(cam: Tensor, height: int, width: int, rule: int, k: int, packed: bool) -> Tensor:
    head = (cam.shape[0], 3 if RULES[rule] == "released" else 1)
    if packed:
        return cam.new_empty((*head, bytes_per_mask(height, width)), dtype=torch.uint8)
    return cam.new_empty((*head, height, width), dtype=torch.bool)


_cam_mask = backends.define(
    "_cam_mask(Tensor cam, SymInt height, SymInt width, int rule, SymInt k, bool packed) -> Tensor",
    _reference_op,
    _fake,
    kernels="cam_mask",
)


def cam_mask(cam: Tensor, size: tuple[int, int], rule: str = "zscore") -> Tensor:
    """Which pixels keep the full eps: bool (N,M,H,W) from maps (N,h,w), fused: no full-size map is stored.

    size: (H, W), neither smaller than the map's.
    rule: by u = upsample_cam(cam, size), of each image by itself,
        "zscore", M = 1: (u - mean(u)) / std(u) > 1, population std.
        "released", M = 3: what the authors' published code computes, a z-score over the H*W*3 values of jet(u**2)
        as RGB, > 1; matplotlib's 256-entry jet. For reproducing their numbers.
        "quantile:q", 0 < q < 1, M = 1: exactly ceil(q*H*W) largest pixels, ties by lower index.
    A map without evidence (flat, or with NaN or infinity in it) gives all False. Not differentiable.

    Equivalent to, for "zscore":
        `(u - u.mean((1, 2), keepdim=True) > u.std((1, 2), correction=0, keepdim=True))[:, None]`.
    Source: Zhang et al., ICML 2024 (PART), arXiv 2406.00685, section 3.2.
    Errors: TypeError or ValueError that names the argument; an unknown rule lists the known ones.
    """
    cam = checks.maps("cam", cam)
    height, width = checks.size_of(size, cam)
    number, k, _ = parse_rule(rule, height, width, soft=False)
    return _cam_mask(cam.detach(), height, width, number, k, False)
