"""BankView: the places of a batch in a bank of perturbations, from which an attack starts and to which it writes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from part_fast.checks import Clip
from part_fast.ops.bank_start import bank_start
from part_fast.ops.packed_epsilon import PackedEpsilon


@dataclass(frozen=True)
class BankView:
    """What `PerturbationBank.at` gives for a batch of N images, and `pgi` and `warm` take as `start`.

    bank: the bank's own int8 (S,C,H,W), which a step writes to: value q stands for q * scale / 127, image units.
    places: int64 (N,4), rows (sample, dy, dx, flip) as in `part_fast.ops.bank_start`.
    scale: the largest perturbation that the bank holds, image units.
    """

    bank: Tensor
    places: Tensor
    scale: float

    def start(self, x: Tensor, eps: float | Tensor | PackedEpsilon, clip: Clip = (0.0, 1.0)) -> Tensor:
        """Images x (N,C,H,W), augmented as the view says, moved by their perturbations, within eps and clip.

        Equivalent to, and errors: `part_fast.ops.bank_start(x, bank, places, eps, clip, scale=scale)`.
        """
        return bank_start(x, self.bank, self.places, eps, clip, scale=self.scale)
