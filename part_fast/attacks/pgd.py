"""Projected gradient descent with a budget per pixel, and as a drop-in for attack libraries."""

from __future__ import annotations

from torch import Tensor

from part_fast import checks
from part_fast.attacks.ascend import Model, attack, starting_point
from part_fast.attacks.objectives import Loss
from part_fast.checks import Clip
from part_fast.ops.packed_epsilon import PackedEpsilon


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
    return attack(model, x, y, eps, alpha, steps, lambda x: starting_point(x, eps, start, clip), loss, clip)


class PGD:
    """PGD as an object, `PGD(model)(images, labels)`, as in attack libraries such as torchattacks.

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
