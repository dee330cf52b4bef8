"""Must the copy be refreshed? What of a model tells that its weights are others now."""

from __future__ import annotations

import itertools

from torch import nn


class Watch:
    """The parameters and buffers of a model as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = list(itertools.chain(model.parameters(), model.buffers()))
        self._versions = [tensor._version for tensor in self._tensors]

    def changed(self) -> bool:
        """Whether one of them was written in place since."""
        return [tensor._version for tensor in self._tensors] != self._versions
