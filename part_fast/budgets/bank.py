"""MaskBank: the masks of a whole training set, one bit per pixel, refreshed every few epochs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from part_fast import checks, distributed
from part_fast.budgets.cam import CamBudget
from part_fast.data.memory import Augmentation, to_float
from part_fast.errors import BadTypeError, BadValueError
from part_fast.ops.epsilon_map import packed_epsilon_map
from part_fast.ops.packed_epsilon import PackedEpsilon, bytes_per_mask


class MaskBank:
    """Masks of `samples` images, by sample index: filled once every K epochs, looked up in every batch.

    size: (H, W) of the images. channels: M of the masks, 1, or 3 for rule "released". eps, eps_low: image units.
    bits: uint8 (samples, M, ceil(H*W/8)), what a checkpoint keeps; all clear, so eps_low everywhere, until `fill`.
    50,000 images of 32x32 take 6.4 MB.

    Masks are computed on the images as they are stored. A batch that was cropped and flipped gets its masks cropped
    and flipped alike; what the crop padded gets eps_low.
    """

    def __init__(
        self,
        samples: int,
        size: tuple[int, int],
        channels: int,
        eps: float,
        eps_low: float,
        device: torch.device | str = "cpu",
    ):
        if not isinstance(size, (tuple, list)) or len(size) != 2:
            raise BadTypeError(f"size must be (H, W), got {size!r}")
        shape = (checks.count("samples", samples), checks.count("channels", channels, 1), bytes_per_mask(*size))
        self._masks = PackedEpsilon(torch.zeros(shape, dtype=torch.uint8, device=device), size, eps, eps_low)

    @property
    def bits(self) -> Tensor:
        return self._masks.bits

    def fill(
        self,
        budget: CamBudget,
        images: Tensor,
        batch_size: int = 256,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Compute every mask anew by the budget, before its control. images: uint8 (samples,C,H,W), unaugmented.

        Each of several processes computes its share, and every process then has all masks.

        progress: called with the number of images after each batch.
        Errors: ValueError if the images are not as many and as large as the bank's, for a budget of other eps or
            channels or of images that are not in [0,1], and for rules whose maps are no masks of two values, such as
            "soft" and functions. The bank is as before then.
        """
        rule = budget.mask_rule()
        own = (self._masks.eps, self._masks.eps_low, self.bits.shape[1])
        if (budget.eps, budget.eps_low, budget.channels) != own:
            raise BadValueError(
                f"budget must have the bank's eps, eps_low and channels, {own}, got "
                f"{(budget.eps, budget.eps_low, budget.channels)}"
            )
        checks.count("batch_size", batch_size, 1)
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise BadValueError(f"images must be uint8 (N,C,H,W), got {images.dtype} {tuple(images.shape)}")
        if len(images) != len(self._masks) or tuple(images.shape[2:]) != self._masks.size:
            expected = (len(self._masks), "C", *self._masks.size)
            raise BadValueError(f"images must have shape {expected}, got {tuple(images.shape)}")
        low, high = map(torch.as_tensor, checks.clip_range(budget.clip, to_float(images[:1])))
        if (low != 0).any() or (high != 1).any():
            raise BadValueError("budget must have clip (0, 1), the range that stored images become, got another one")
        starts = range(0, len(images), batch_size)
        self.bits.zero_()
        for start in (starts[i] for i in distributed.shares(len(starts))):
            chunk = to_float(images[start : start + batch_size])
            evidence, _ = budget.evidence(chunk)
            masks = packed_epsilon_map(evidence, self._masks.size, budget.eps, budget.eps_low, rule)
            self.bits[start : start + batch_size] = masks.bits
            if progress is not None:
                progress(len(chunk))
        distributed.sum_(self.bits)  # where one process has a mask, all others have zeros

    def lookup(self, indices: Tensor, augmentation: Augmentation | None = None) -> Tensor:
        """Eps maps (B,M,H,W), float32, of the samples `indices` (B,), augmented as their images were.

        indices: int64, on the bank's device. augmentation: what was drawn for the batch; None for images as stored.
        Errors: TypeError or ValueError that names the argument; samples outside the bank where values may be read.
        """
        checks.indices("indices", indices, len(self._masks), self.bits.device)
        eps = self._masks.index_select(indices).dense()
        return eps if augmentation is None else augmentation.apply(eps, fill=self._masks.eps_low)

    def load_bits(self, bits: Tensor) -> None:
        """Take the bits of a checkpoint. Errors: TypeError, ValueError if they belong to another data set."""
        if not isinstance(bits, Tensor):
            raise BadTypeError(f"bits must be a Tensor, got {type(bits).__name__}")
        if bits.dtype != torch.uint8 or bits.shape != self.bits.shape:
            raise BadValueError(f"bits must be uint8 {tuple(self.bits.shape)}, got {bits.dtype} {tuple(bits.shape)}")
        self.bits.copy_(bits)
