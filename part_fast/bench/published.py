"""Training steps as published code takes them, for benchmarks to compare with; nothing of part_fast is used here.

Each is one update: mask where there is one, attack, loss, backward, optimizer. What makes them slow is kept: fp32,
contiguous images, parameter gradients where the published loop computes them, the clean softmax of TRADES recomputed
with its graph in every attack step, masks one image at a time through hooks, PIL and matplotlib.

x: images (N,C,H,W) in [0,1]; y: class indices (N,). start: where the attack begins, like x; default: a random start as
published. eps: a float, or a tensor (N,M,H,W) of each pixel's own. The model is left in train mode. All return the
training loss, a scalar.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer

Eps = float | Tensor


def madry_step(
    model: nn.Module,
    optimizer: Optimizer,
    x: Tensor,
    y: Tensor,
    eps: Eps,
    alpha: float,
    steps: int,
    start: Tensor | None,
) -> Tensor:
    """AT: every attack step calls loss.backward(), which computes all parameters' gradients too.

    Source of the method: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018.
    """
    model.eval()
    attacked = _uniform(x, eps) if start is None else start.clone()
    for _ in range(steps):
        attacked.requires_grad_(True)
        model.zero_grad()
        F.cross_entropy(model(attacked), y).backward()
        assert attacked.grad is not None
        moved = attacked.detach() + alpha * attacked.grad.sign()
        attacked = _within(moved, x, eps)
    return _update(model, optimizer, lambda: F.cross_entropy(model(attacked), y))


def input_gradient_step(
    model: nn.Module,
    optimizer: Optimizer,
    x: Tensor,
    y: Tensor,
    eps: float,
    alpha: float,
    steps: int,
    start: Tensor | None,
) -> Tensor:
    """AT with the PGD of attack libraries such as torchattacks: gradients for the images only."""
    model.eval()
    attacked = _uniform(x, eps).clamp(0, 1) if start is None else start.clone()
    for _ in range(steps):
        attacked.requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(attacked), y), attacked)
        difference = attacked.detach() + alpha * gradient.sign() - x
        attacked = (x + torch.clamp(difference, min=-eps, max=eps)).clamp(0, 1)
    return _update(model, optimizer, lambda: F.cross_entropy(model(attacked), y))


def trades_step(
    model: nn.Module,
    optimizer: Optimizer,
    x: Tensor,
    y: Tensor,
    eps: Eps,
    alpha: float,
    steps: int,
    start: Tensor | None,
    beta: float,
) -> Tensor:
    """TRADES: the clean softmax is computed anew, with its graph, in every attack step, and twice in the loss.

    Source of the method: Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019.
    """
    model.eval()
    attacked = x + 0.001 * torch.randn_like(x) if start is None else start.clone()
    for _ in range(steps):
        attacked.requires_grad_(True)
        with torch.enable_grad():
            loss = F.kl_div(F.log_softmax(model(attacked), 1), F.softmax(model(x), 1), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, [attacked])
        attacked = _within(attacked.detach() + alpha * gradient.sign(), x, eps)

    def objective() -> Tensor:
        natural = F.cross_entropy(model(x), y)
        robust = F.kl_div(F.log_softmax(model(attacked), 1), F.softmax(model(x), 1), reduction="sum") / len(x)
        return natural + beta * robust

    return _update(model, optimizer, objective)


def hooked_eps_map(model: nn.Module, layer: nn.Module, x: Tensor, eps: float, eps_low: float) -> Tensor:
    """PART's eps map (N,3,H,W) as released: Grad-CAM by hooks, an image at a time, then `published_epsilon_map`.

    The score's backward goes through the whole network and computes all parameters' gradients too.
    """
    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        kept["activation"] = output
        output.register_hook(lambda gradient: kept.update(gradient=gradient))

    model.eval()
    handle = layer.register_forward_hook(keep)
    maps = []
    try:
        for i in range(len(x)):
            logits = model(x[i : i + 1])
            model.zero_grad()
            logits[0, int(logits[0].argmax())].backward()
            weights = kept["gradient"].mean((2, 3), keepdim=True)
            evidence = F.relu((weights * kept["activation"].detach()).sum(1))
            size = (x.shape[2], x.shape[3])
            maps.append(published_epsilon_map(evidence, size=size, rule="released", eps=eps, eps_low=eps_low))
    finally:
        handle.remove()
    return torch.cat(maps)


def published_epsilon_map(cam: Tensor, *, size: tuple[int, int], rule: str, eps: float, eps_low: float) -> Tensor:
    """Eps maps of maps (N,h,w) as published PART code makes them: one by one, PIL, matplotlib's colours, numpy.

    rule: "released" is that code's own; "zscore" is the same without the colours. A flat map gives eps_low.
    """
    import matplotlib

    colour = matplotlib.colormaps["jet"]
    result = []
    for one in cam.float().cpu().numpy():
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = (one - one.min()) / (one.max() - one.min())
            u = np.asarray(Image.fromarray(scaled).resize((size[1], size[0]), Image.Resampling.BICUBIC))
            values = colour(u**2)[..., :3].transpose(2, 0, 1) if rule == "released" else u[None]
            mask = (values - values.mean()) / values.std() > 1
        result.append(torch.from_numpy(np.where(mask, np.float32(eps), np.float32(eps_low))))
    return torch.stack(result).to(cam.device)


def _uniform(x: Tensor, eps: Eps) -> Tensor:
    """As published: drawn by numpy, and with the largest eps for every pixel."""
    noise = torch.from_numpy(np.random.uniform(-1.0, 1.0, tuple(x.shape))).to(x)
    return x + noise * (eps.max() if isinstance(eps, Tensor) else eps)


def _within(moved: Tensor, x: Tensor, eps: Eps) -> Tensor:
    return torch.min(torch.max(moved, x - eps), x + eps).clamp(0.0, 1.0)


def _update(model: nn.Module, optimizer: Optimizer, objective: Callable[[], Tensor]) -> Tensor:
    model.train()
    optimizer.zero_grad()
    loss = objective()
    loss.backward()
    optimizer.step()
    return loss.detach()
