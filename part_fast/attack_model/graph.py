"""GraphedSteps: the steps of an attack, captured as a CUDA graph once per shape and replayed."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from part_fast import backends
from part_fast.errors import CannotRunError
from part_fast.eval_mode import uncached_autocast
from part_fast.precision import tf32

Run = Callable[..., None]
Replay = Callable[[], object]

# Graphs held at a time. Training needs two or three: the plain method's, the weighted one's, the test's.
MOST = 8


class Capture:
    """`capture(run)` records what `run` launches on the current CUDA device; the result launches it again.

    Its graphs share one memory pool and one stream. They may, as long as no two replay at the same time and none
    leaves a result in the pool: what a run reads and writes beyond its own passing values is allocated outside.

    Errors: RuntimeError for a run that cannot be captured, such as one that reads a value of a tensor.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._streams: dict[int, torch.cuda.Stream] = {}

    def __reduce__(self) -> tuple[type[Capture], tuple[()]]:
        return Capture, ()  # a copy has a pool of its own: it may replay while the original does

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
                    f"cuda_graph must be off for this attack, whose steps cannot be captured: {reason}"
                ) from error
        return graph.replay


@dataclasses.dataclass
class _Graph:
    """A recorded run: its kind, the memory that it reads and writes, how to launch it, how often it was launched."""

    kind: Hashable
    memory: list[Tensor]
    replay: Replay
    replays: int = 0


class GraphedSteps:
    """`graphed(key, run, x_adv, *inputs)` does what `run(x_adv, *inputs)` does, which overwrites x_adv alone.

    A graph runs on memory of its own: the tensors given are copied in, and x_adv is copied out again. So `run` must
    read no other tensor that changes place. key: what else decides what `run` does. Everything happens on the device of
    x_adv, on the current stream, and after the last replay, even if that was on another stream.

    A batch smaller than the largest one held of its kind (key, shapes but for the number of images, dtypes, device),
    such as the last of an epoch, is run as it is. `MOST` graphs are held; one more takes the place of the one that was
    unused for longest, with a warning if that was never used again. A copy (deepcopy, pickle) holds none.

    record: gets the run on the memory held and returns its replay; default: `Capture()`.
    Errors: RuntimeError where the replay does nothing and the run does something; what `record` raises.
    """

    def __init__(self, record: Callable[[Callable[[], None]], Replay] | None = None) -> None:
        self._record = Capture() if record is None else record
        self._held: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._last: torch.cuda.Event | None = None

    def __reduce__(self) -> tuple[type[GraphedSteps], tuple[object]]:
        return GraphedSteps, (self._record,)

    def __len__(self) -> int:
        """How many graphs are held."""
        return len(self._held)

    def __call__(self, key: Hashable, run: Run, x_adv: Tensor, *inputs: Tensor) -> None:
        tensors = (x_adv, *inputs)
        kind = (key, tuple((tuple(t.shape[1:]), t.dtype, t.device) for t in tensors))
        place = (kind, tuple((tuple(t.shape), t.stride()) for t in tensors))
        with torch.cuda.device_of(x_adv):
            graph = self._held.get(place)
            if graph is None:
                if any(len(x_adv) < len(held.memory[0]) for held in self._held.values() if held.kind == kind):
                    run(*tensors)
                    return
                graph = self._hold(kind, place, run, tensors)
            self._held.move_to_end(place)
            if x_adv.is_cuda and self._last is not None:
                torch.cuda.current_stream().wait_event(self._last)
            torch._foreach_copy_(graph.memory, tensors)
            graph.replay()
            if graph.replays == 0 and torch.equal(graph.memory[0], x_adv):
                self._refuse_nothing(place, run, tensors)
            graph.replays += 1
            x_adv.copy_(graph.memory[0])
            if x_adv.is_cuda:
                self._last = torch.cuda.current_stream().record_event()

    def _hold(self, kind: Hashable, place: Hashable, run: Run, tensors: tuple[Tensor, ...]) -> _Graph:
        memory = [tensor.clone() for tensor in tensors]
        graph = _Graph(kind, memory, self._record(lambda: run(*memory)))
        if len(self._held) == MOST:
            if self._last is not None:
                self._last.synchronize()  # the memory may next be used on another stream
            _, oldest = self._held.popitem(last=False)
            if oldest.replays == 1:
                warnings.warn(
                    f"more than {MOST} CUDA graphs of attacks, each used once: capturing takes longer than it saves "
                    "where every attack has another loss, alpha, number of steps, clip or eps: take cuda_graph=False",
                    stacklevel=4,
                )
        self._held[place] = graph
        return graph

    def _refuse_nothing(self, place: Hashable, run: Run, tensors: tuple[Tensor, ...]) -> None:
        """Raise if the run moves x_adv, which the replay left where it was."""
        moved = tensors[0].clone()
        run(moved, *tensors[1:])
        if not torch.equal(moved, tensors[0]):
            del self._held[place]
            raise CannotRunError(
                f"cuda_graph must be off for this attack: a graph was captured on {moved.device}, and it does nothing"
            )


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
