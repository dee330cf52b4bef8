"""PerturbationBank: the perturbation that each training image had an epoch ago, a byte per value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from part_fast import checks, distributed
from part_fast.data.memory import Augmentation
from part_fast.errors import BadTypeError, BadValueError
from part_fast.ops.bank_view import BankView

_CHUNK = 1024  # samples that are drawn at a time


class PerturbationBank:
    """Perturbations of `samples` images, by sample index: what `pgi` and `warm` start from, and write back to.

    shape: (C,H,W) of the images. eps: the largest that a pixel ever gets, image units, > 0.
    values: int8, a sample's perturbation in units of eps / 127, in the coordinates of the stored, unaugmented image: a
        write and a read are off by at most eps / 254. 50,000 images of 3x32x32 take 153.6 MB.
    seed: of the first values, uniform within eps; see `reset`.

    Of several processes each keeps the samples that it trains alone, those of `distributed.shares(samples)`, and no
    other: `values` has their number.

    A batch that was cropped and flipped starts from perturbations that are cropped and flipped alike, and what its
    attack found is moved back; pixels that the crop left out keep what they had, and pixels that it padded start at 0.

    Equivalent to, for images as stored: `start = (x + values[indices].float() * (eps / 127)).clamp(*clip)` before the
    attack and `values[indices] = ((x_adv - x) * (127 / eps)).round().to(torch.int8)` after it.
    Source: Jia et al., "Prior-guided adversarial initialization for fast adversarial training", ECCV 2022, section 3.
    Errors: TypeError or ValueError that names the argument.
    """

    def __init__(
        self,
        samples: int,
        shape: Sequence[int],
        eps: float,
        device: torch.device | str = "cpu",
        *,
        seed: int = 0,
    ):
        self.samples = checks.count("samples", samples, 1)
        if not isinstance(shape, Sequence) or len(shape) != 3:
            raise BadValueError(f"shape must be (C,H,W), got {shape!r}")
        self.shape = tuple(checks.count("shape", size, 1) for size in shape)
        self.eps = checks.number("eps", eps)
        if self.eps <= 0:
            raise BadValueError(f"eps must be > 0 for a bank of perturbations, got {eps:g}")
        self._rank, self._size = distributed.rank(), distributed.size()
        if self.samples < self._size:
            raise BadValueError(f"samples must be at least one for each of {self._size} processes, got {samples}")
        own = len(range(self._rank, self.samples, self._size))
        self.values = torch.empty((own, *self.shape), dtype=torch.int8, device=device)
        self.reset(seed)

    def __len__(self) -> int:
        """How many samples there are, in all processes."""
        return self.samples

    def reset(self, seed: int = 0) -> None:
        """Fill the bank with uniform noise of the seed: a sample gets the same in every number of processes.

        Torch's default generators stay as they are.
        """
        generator = torch.Generator().manual_seed(checks.seed("seed", seed))
        done = 0
        for first in range(0, self.samples, _CHUNK):
            count = min(_CHUNK, self.samples - first)
            drawn = torch.randint(-127, 128, (count, *self.shape), dtype=torch.int8, generator=generator)
            own = drawn[(self._rank - first) % self._size :: self._size]
            self.values[done : done + len(own)] = own.to(self.values.device)
            done += len(own)

    def at(self, indices: Tensor, augmentation: Augmentation | None) -> BankView:
        """The places of the samples `indices`, for an attack of the images that they were augmented to.

        indices: int64 (B,), on the bank's device, each sample once.
        augmentation: what was drawn for the batch; None for images as stored.
        Errors: TypeError or ValueError that names the argument. Samples outside the bank, of another process or twice
            in the batch are errors where values may be read, on a CPU; on a GPU under PART_FAST_CHECK=1, and elsewhere
            the first two make images of NaN.
        """
        checks.indices("indices", indices, self.samples, self.values.device)
        if not isinstance(augmentation, Augmentation | None):
            raise BadTypeError(
                f"augmentation must be the Augmentation that was drawn, or None, got {type(augmentation).__name__}"
            )
        if augmentation is not None and len(augmentation.dy) != len(indices):
            raise BadValueError(
                f"augmentation must be drawn for the {len(indices)} samples of the batch, got one for "
                f"{len(augmentation.dy)}"
            )
        if checks.readable(indices):
            self._check_indices(indices)
        rows = indices
        if self._size > 1:
            rows = torch.div(indices, self._size, rounding_mode="floor")
            rows = torch.where(indices % self._size == self._rank, rows, -1)
        if augmentation is None:
            zero = torch.zeros_like(rows)
            columns = (rows, zero, zero, zero)
        else:
            dy, dx, flip = (t.to(rows.device) for t in (augmentation.dy, augmentation.dx, augmentation.flip))
            columns = (rows, dy, dx, flip.long())
        return BankView(self.values, torch.stack(columns, 1), self.eps)

    def _check_indices(self, indices: Tensor) -> None:
        if self._size > 1 and bool((indices % self._size != self._rank).any()):
            strange = int(indices[indices % self._size != self._rank][0])
            raise BadValueError(
                f"indices must be of process {self._rank} of {self._size}, which keeps {self._rank}, "
                f"{self._rank + self._size}, ..., got {strange}"
            )
        if indices.unique().numel() < len(indices):
            raise BadValueError("indices must be of different samples, got one twice: the bank keeps one perturbation")

    def load(self, shards: Sequence[Tensor]) -> None:
        """Take over the `values` of a checkpoint: those of each process, in order; of any number of processes.

        Errors: before anything is written, TypeError if they are no list of tensors, ValueError if they are not of a
            bank of as many images of this shape.
        """
        if not isinstance(shards, Sequence) or not shards:
            got = f"{type(shards).__name__}" if not isinstance(shards, Sequence) else "none"
            raise BadTypeError(f"shards must be a list of the values of each process, got {got}")
        for rank, shard in enumerate(shards):
            takes = (len(range(rank, self.samples, len(shards))), *self.shape)
            if not isinstance(shard, Tensor) or shard.dtype != torch.int8 or tuple(shard.shape) != takes:
                got = f"{shard.dtype} {tuple(shard.shape)}" if isinstance(shard, Tensor) else type(shard).__name__
                raise BadValueError(
                    f"perturbations of another data set: process {rank} must have int8 {takes}, got {got}"
                )
        if len(shards) == self._size:
            self.values.copy_(shards[self._rank])
            return
        whole = torch.empty((self.samples, *self.shape), dtype=torch.int8)
        for rank, shard in enumerate(shards):
            whole[rank :: len(shards)] = shard.cpu()
        self.values.copy_(whole[self._rank :: self._size])
