"""Controls: eps maps that keep a PART map's amounts but not its meaning, to tell whether the CAM matters."""

from __future__ import annotations

import torch
from torch import Tensor

from part_fast.errors import BadValueError

CONTROLS = ("none", "permuted", "random", "inverted", "uniform")


def check_control(control: str) -> str:
    """`control` if it is known. Errors: ValueError that lists the known ones."""
    if control not in CONTROLS:
        raise BadValueError(f"control must be one of {', '.join(CONTROLS)}, got {control!r}")
    return control


def control_map(
    eps_map: Tensor, control: str, eps: float, eps_low: float, generator: torch.Generator | None = None
) -> Tensor:
    """An eps map (N,M,H,W) of values in [eps_low, eps], changed as the control says; a new tensor or the same.

    none      as it is
    permuted  each image gets the map of another image of the batch (a batch of one keeps its own); this is what
              the authors' published code does by mistake
    random    each image's pixels are shuffled: as many with each eps, anywhere
    inverted  eps where there was eps_low and the other way round
    uniform   each image's mean eps everywhere

    "permuted" and "random" draw from `generator`, on whatever device, or else from torch's generators of the process.
    Errors: ValueError that lists the known controls.
    """
    check_control(control)
    n, m, height, width = eps_map.shape
    if control == "none" or n == 0:
        return eps_map
    if control == "permuted":
        # After a rotation by at least one no image has its own map; it is drawn on the CPU, so that no GPU waits.
        device = "cpu" if generator is None else generator.device
        return eps_map.roll(int(torch.randint(1, n, (), generator=generator, device=device)) if n > 1 else 0, 0)
    if control == "random":
        device = eps_map.device if generator is None else generator.device
        noise = torch.rand(n, 1, height * width, generator=generator, device=device)
        place = noise.to(eps_map.device).argsort(2)
        return eps_map.flatten(2).gather(2, place.expand(n, m, -1)).view_as(eps_map)
    if control == "inverted":
        return (eps + eps_low) - eps_map
    return eps_map.mean((1, 2, 3), keepdim=True).expand_as(eps_map).contiguous()
