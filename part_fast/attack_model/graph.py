"""GraphedSteps: the steps of an attack, captured as a CUDA graph once per shape and replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Run = Callable[..., None]


def capture(run: Callable[[], None]) -> Callable[[], object]:
    """Record what `run` launches on the current CUDA device; the result launches it again."""
    # The first runs choose algorithms and allocate, which a capture must not; on a stream of their own, as torch asks.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class GraphedSteps:
    """`graphed(key, run, x_adv, *inputs)` does what `run(x_adv, *inputs)` does, which overwrites x_adv alone.

    Captured is a run on memory of its own, so the tensors given are copied in, and x_adv out again: `run` draws no
    random numbers and reads no other tensor that changes place. key: what else decides what `run` does.
    A batch smaller than the largest so far, such as the last of an epoch, is run as it is.

    record: gets the run on the memory held and returns its replay; what is not a CUDA graph's is the same elsewhere.
    """

    def __init__(self, record: Callable[[Callable[[], None]], Callable[[], object]] = capture) -> None:
        self._record = record
        self._held: dict[Hashable, tuple[list[Tensor], Callable[[], object]]] = {}
        self._largest = 0

    def __len__(self) -> int:
        """How many were captured."""
        return len(self._held)

    def __call__(self, key: Hashable, run: Run, x_adv: Tensor, *inputs: Tensor) -> None:
        tensors = (x_adv, *inputs)
        key = (key, tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in tensors))
        if key not in self._held:
            if len(x_adv) < self._largest:
                run(*tensors)
                return
            self._largest = len(x_adv)
            memory = [tensor.clone() for tensor in tensors]
            self._held[key] = memory, self._record(lambda: run(*memory))
        memory, replay = self._held[key]
        torch._foreach_copy_(memory, tensors)
        replay()
        x_adv.copy_(memory[0])
