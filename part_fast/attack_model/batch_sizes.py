"""BatchSizes: the batch sizes that a compiled model runs at, so that it is compiled for few of them."""

from __future__ import annotations

from collections.abc import Hashable

# How many sizes below the largest are compiled; other batches are filled up to one of these.
MOST = 6
# A size that comes this often in a row is not the last batch of an epoch, and is compiled.
MANY = 32


class BatchSizes:
    """`sizes(n, kind)` is how many images a batch of n is filled up to.

    kind: of attack. The first batch of each kind and each larger one run as they are; a smaller one, such as the last
    of an epoch, is filled up to the next size that there is, until it has come MANY times in a row.
    """

    def __init__(self) -> None:
        self._sizes: set[int] = set()
        self._largest: dict[Hashable, int] = {}
        self._row = (0, 0)  # a size that was filled up, and how often in a row

    def __len__(self) -> int:
        """How many sizes there are."""
        return len(self._sizes)

    def __call__(self, n: int, kind: Hashable = None) -> int:
        if n in self._sizes:
            self._row = (0, 0)
        else:
            self._row = (n, self._row[1] + 1 if self._row[0] == n else 1)
            usual = n > self._largest.get(kind, 0) or self._row[1] > MANY
            if n > max(self._sizes, default=0) or (usual and len(self._sizes) < MOST):
                self._sizes.add(n)
        self._largest[kind] = max(n, self._largest.get(kind, 0))
        return min(size for size in self._sizes if size >= n)
