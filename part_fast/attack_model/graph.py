"""Graphs: what a batch launches, captured as a CUDA graph once per shape and replayed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from part_fast import backends
from part_fast.errors import CannotRunError
from part_fast.eval_mode import uncached_autocast
from part_fast.precision import tf32

Run = Callable[..., Sequence[Tensor]]
Replay = Callable[[], object]

# Graphs held at a time. Training needs two or three: the plain method's, the weighted one's, the test's.
MOST = 8


class Capture:
    """`capture(run)` records what `run` launches on the current CUDA device; the result launches it again.

    Its graphs share one memory pool and one stream. They may, as long as no two replay at the same time and what one
    leaves in the pool is copied before the next replays: what else a run reads and writes is allocated outside.

    Errors: RuntimeError for a run that cannot be captured, such as one that reads a value of a tensor.
    """

    def __init__(self, of: str = "this attack") -> None:
        self._of = of
        self._pool: Any = None
        self._streams: dict[int, torch.cuda.Stream] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Capture, (self._of,)  # a copy has a pool of its own: it may replay while the original does

    def __call__(self, run: Callable[[], None]) -> Replay:
        device = torch.cuda.current_device()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        # Runs that are thrown away draw no random numbers, and leave no cast weights behind in autocast's cache.
        with torch.random.fork_rng([device]), uncached_autocast():
            # The first runs choose algorithms, compile and allocate, which a capture must not do. They run on another
            # stream than the capture, so that its cuBLAS workspace is allocated in the pool and lives with the graphs.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            try:
                # "thread_local", since NCCL's watchdog thread calls the driver, which would end a "global" capture. The
                # thread of the backward still launches on the capture's stream.
                how: dict[str, Any] = {
                    "pool": self._pool,
                    "stream": self._streams[device],
                    "capture_error_mode": "thread_local",
                }
                # The outer block restores the current stream, which torch leaves changed when a capture fails.
                with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, **how):
                    run()
            except RuntimeError as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise CannotRunError(
                    f"cuda_graph must be off for {self._of}, which cannot be captured: {reason}"
                ) from error
        return graph.replay


@dataclasses.dataclass
class _Graph:
    """A recorded run: its kind, the memory that it reads, its results, how to launch it, how often it was launched."""

    kind: Hashable
    memory: list[Tensor]
    results: list[Tensor]
    replay: Replay
    replays: int = 0


class Graphs:
    """`graphs(key, run, *inputs)` gives what `run(*inputs)` returns, tensors, by one launch.

    A graph runs on memory of its own: the inputs are copied in, and what it returns is copied out. `run` may overwrite
    its inputs, and return them. It must read no other tensor that changes place, and change no other tensor but
    `changes`. key: what else decides what `run` does. Everything happens on the device of the first input, on the
    current stream, and after the last replay, even if that was on another stream.

    A batch smaller than the largest one held of its kind (key, shapes but for the number of images, dtypes, device),
    such as the last of an epoch, is run as it is. `MOST` graphs are held; one more takes the place of the one that was
    unused for longest, with a warning if that was never used again. A copy (deepcopy, pickle) holds none.

    of: what is captured, for messages. record: gets the run on the memory held and returns its replay; default:
    `Capture(of)`.
    Errors: RuntimeError where the replay does nothing and the run does something; what `record` raises.
    """

    def __init__(self, of: str = "this attack", record: Callable[[Callable[[], None]], Replay] | None = None) -> None:
        self._of = of
        self._record = Capture(of) if record is None else record
        self._held: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._last: torch.cuda.Event | None = None

    def __reduce__(self) -> tuple[type[Graphs], tuple[object, ...]]:
        return Graphs, (self._of, self._record)

    def __len__(self) -> int:
        """How many graphs are held."""
        return len(self._held)

    def clear(self) -> None:
        """Let go of all graphs, and of the memory that they ran on."""
        self._held.clear()
        self._record = copy.copy(self._record)  # whose pool is a new one

    def __call__(self, key: Hashable, run: Run, *inputs: Tensor, changes: Sequence[Tensor] = ()) -> Sequence[Tensor]:
        first = inputs[0]
        kind = (key, tuple((tuple(t.shape[1:]), t.dtype, t.device) for t in inputs))
        place = (kind, tuple((tuple(t.shape), t.stride()) for t in inputs))
        with torch.cuda.device_of(first):
            graph = self._held.get(place)
            if graph is None:
                if any(len(first) < len(held.memory[0]) for held in self._held.values() if held.kind == kind):
                    return run(*inputs)
                graph = self._hold(kind, place, run, inputs, changes)
            self._held.move_to_end(place)
            if first.is_cuda and self._last is not None:
                torch.cuda.current_stream().wait_event(self._last)
            torch._foreach_copy_(graph.memory, inputs)
            if graph.replays == 0:
                self._first_replay(place, graph, run, inputs, changes)
            else:
                graph.replay()
            graph.replays += 1
            results = [torch.empty_like(result) for result in graph.results]
            torch._foreach_copy_(results, graph.results)
            if first.is_cuda:
                self._last = torch.cuda.current_stream().record_event()
        return results

    def _hold(
        self, kind: Hashable, place: Hashable, run: Run, inputs: tuple[Tensor, ...], changes: Sequence[Tensor]
    ) -> _Graph:
        memory = [tensor.clone() for tensor in inputs]
        results: list[Tensor] = []

        def record() -> None:
            results[:] = run(*memory)

        with _put_back(changes):
            replay = self._record(record)
        graph = _Graph(kind, memory, results, replay)
        if len(self._held) == MOST:
            if self._last is not None:
                self._last.synchronize()  # the memory may next be used on another stream
            _, oldest = self._held.popitem(last=False)
            if oldest.replays == 1:
                warnings.warn(
                    f"more than {MOST} CUDA graphs of {self._of}, each used once: capturing takes longer than it saves "
                    "where no two batches have the same shape and settings (of an attack: loss, alpha, number of "
                    "steps, clip, eps): take cuda_graph=False",
                    stacklevel=4,
                )
        self._held[place] = graph
        return graph

    def _first_replay(
        self, place: Hashable, graph: _Graph, run: Run, inputs: tuple[Tensor, ...], changes: Sequence[Tensor]
    ) -> None:
        """Replay, and raise where that leaves the results as they were and the run would not."""
        for result in graph.results:
            if result.is_floating_point() and not any(result is tensor for tensor in graph.memory):
                result.fill_(math.nan)
        before = [result.clone() for result in graph.results]
        graph.replay()
        if not _all_equal(graph.results, before):
            return
        with _put_back(changes):
            expected = run(*(tensor.clone() for tensor in inputs))
        if not _all_equal(expected, before):
            del self._held[place]
            device = inputs[0].device
            raise CannotRunError(
                f"cuda_graph must be off for {self._of}: a graph was captured on {device}, and it does nothing"
            )


@contextlib.contextmanager
def _put_back(tensors: Sequence[Tensor]) -> Iterator[None]:
    """The tensors are after the block as before."""
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, kept in zip(tensors, before, strict=True):
            tensor.copy_(kept)


def _all_equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(
        torch.allclose(one, other, rtol=0, atol=0, equal_nan=True) for one, other in zip(some, others, strict=True)
    )


def capturing(x: Tensor) -> bool:
    """Whether what is done with x now is recorded, so that no value can be read."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def surroundings(module: nn.Module, device: torch.device) -> Hashable:
    """What decides what a captured run of `module` computes besides its arguments: part of the key of a graph.

    Where the weights lie (in-place changes are followed, `.to` and new tensors are not), autocast, TF32, and which
    kernels are chosen.
    """
    weights = itertools.chain(module.parameters(), module.buffers())
    return (
        tuple(weight.data_ptr() if weight.layout is torch.strided else id(weight) for weight in weights),
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        tuple(tf32().values()),
        torch.are_deterministic_algorithms_enabled(),
        backends.current_backend(device),
    )
