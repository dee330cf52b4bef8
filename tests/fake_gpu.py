"""A GPU in a test's imagination: tensors that say they lie on cuda:N and compute on the CPU, with streams and graphs.

What makes a real GPU wait for the host, or the host for it, raises `HostWaitError` inside `gpu.without_waits()`:
reading a value (`item`, `bool`, `nonzero`, a bool index, ...) and copies between host and device. A graph records the
operations launched on the stream that captures, and nothing else: replayed, they read and write the memory of that
time. Not imagined: asynchrony, and the dtypes and kernels of CUDA.
"""

import contextlib

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

MAKES_FROM_HOST = (torch.tensor, torch.as_tensor, torch.asarray)
INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
READS_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class HostWaitError(AssertionError):
    """Host and device wait for each other."""


class GpuTensor(Tensor):
    """`inner`, as if it lay on cuda:`index`."""

    @staticmethod
    def __new__(cls, gpu, inner, index=0):
        return Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
        )

    def __init__(self, gpu, inner, index=0):
        self.gpu, self.inner, self.index = gpu, inner, index

    device = property(lambda self: torch.device("cuda", self.index))
    is_cuda = property(lambda self: True)

    def get_device(self):
        return self.index

    def data_ptr(self):
        return self.inner.data_ptr()

    def __repr__(self):
        return f"GpuTensor({self.inner!r}, cuda:{self.index})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = self.detach().clone()
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if is_parameter(self) else copied
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_gpu = [t for t in there if isinstance(t, GpuTensor)]
        assert all((t.dtype, t.shape, t.stride()) == (t.inner.dtype, t.inner.shape, t.inner.stride()) for t in on_gpu)
        gpu, index = on_gpu[0].gpu, on_gpu[0].index
        if len({t.index for t in on_gpu}) > 1:
            raise RuntimeError(f"{func}: tensors on two GPUs")
        on_host = [t for t in there if not isinstance(t, GpuTensor)]
        # A kernel takes a 0-dim tensor of the host as a number; torch.where's takes none, and copies it.
        numbers = torch.Tag.pointwise in func.tags and func.overloadpacket is not torch.ops.aten.where
        if on_host and not (numbers and all(t.ndim == 0 for t in on_host)):
            gpu.copies(f"{func} copies {tuple(on_host[0].shape)} from the host")
        if func.overloadpacket in INDEXING:
            if any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
                gpu.copies(f"{func} by a mask counts it")
        elif set(func.tags) & set(READS_VALUES):
            gpu.copies(f"{func} reads values")
        inner_args, inner_kwargs = tree_map_only(GpuTensor, lambda t: t.inner, (args, kwargs))
        result = gpu.launch(func, inner_args, inner_kwargs, index)
        wrapped = tree_map_only(Tensor, lambda t: GpuTensor(gpu, t, index), result)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


def is_parameter(value):
    return isinstance(value, torch.nn.Parameter)


class Stream:
    def __init__(self, gpu, device):
        self.gpu, self.device, self.recording, self.waited = gpu, device, None, []

    def wait_stream(self, other):
        self.waited.append(other)

    def wait_event(self, event):
        self.waited.append(event.stream)

    def record_event(self):
        return Event(self)


class Event:
    def __init__(self, stream):
        self.stream, self.synchronized = stream, 0

    def synchronize(self):
        self.synchronized += 1


class Graph:
    def __init__(self):
        self.launches, self.replays = None, 0

    def replay(self):
        self.replays += 1
        for func, args, kwargs, outputs in self.launches:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


class FakeGpu(TorchFunctionMode):
    """The machine: `devices` GPUs, of which `current` is the current one. graphs: all captured, with how."""

    def __init__(self, devices=2):
        self.current = 0
        self.streams = [Stream(self, i) for i in range(devices)]  # the current one of each device
        self.graphs, self.pools, self.watching, self.asked = [], 0, False, False

    # --- tensors

    def put(self, value, index=None):
        """`value`, a tensor or a module, on the GPU."""
        if isinstance(value, torch.nn.Module):
            for module in value.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        there = self.put(parameter, index)
                        module._parameters[name] = torch.nn.Parameter(there, parameter.requires_grad)
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else self.put(buffer, index)
            return value
        value = value.detach().clone()
        inner = value.inner if isinstance(value, GpuTensor) else value
        return GpuTensor(self, inner, self.current if index is None else index)

    def copies(self, what):
        if self.watching:
            raise HostWaitError(what)
        if any(stream.recording is not None for stream in self.streams):
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}\nmore lines")

    @contextlib.contextmanager
    def without_waits(self):
        self.watching = True
        try:
            yield
        finally:
            self.watching = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (Tensor.cpu, Tensor.numpy, Tensor.tolist) and isinstance(args[0], GpuTensor):
            self.copies(f"{func.__name__} copies to the host")
            return func(args[0].detach().inner)
        if func in (Tensor.to, Tensor.cuda):
            return self.move(args[0], *(args[1:] or (["cuda"] if func is Tensor.cuda else [])), **kwargs)
        device = kwargs.get("device")
        self.asked = not any(isinstance(value, GpuTensor) for value in tree_leaves((args, kwargs)))
        try:
            if device is None or torch.device(device).type != "cuda":
                return func(*args, **kwargs)
            if func in MAKES_FROM_HOST:
                self.copies(f"{func.__name__} copies Python numbers to the device")
            result = func(*args, **{**kwargs, "device": "cpu"})
        finally:
            self.asked = False
        return result if isinstance(result, GpuTensor) else self.put(result, torch.device(device).index)

    def move(self, value, *args, **kwargs):
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype)
        copy = kwargs.pop("copy", False)  # which the parser does not know
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        changed = Tensor.to(value, dtype=dtype or value.dtype, memory_format=memory_format, copy=copy)
        if device is None or device.type == value.device.type:
            return changed
        self.copies(f"to({device}) copies {tuple(value.shape)}")
        return self.put(changed, device.index) if device.type == "cuda" else changed.detach().inner.clone()

    # --- launches, streams and graphs

    def launch(self, func, args, kwargs, index):
        if func.namespace == "part_fast" and func._overloadname == "triton":
            # What runs where the CUDA library is not built. Its kernel needs a real device, the reference none.
            func = func.overloadpacket.reference
        result = func(*args, **kwargs)
        if self.streams[index].recording is not None:
            self.streams[index].recording.append((func, args, kwargs, result))
        return result

    @contextlib.contextmanager
    def device(self, index):
        before = self.current
        self.current = before if index < 0 else index
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def stream(self, stream):
        before, device = self.streams[stream.device], self.current
        self.streams[stream.device], self.current = stream, stream.device
        try:
            yield
        finally:
            self.streams[stream.device], self.current = before, device

    @contextlib.contextmanager
    def capture(self, graph, pool=None, stream=None, capture_error_mode="global"):
        graph.pool, graph.stream, graph.mode, stream.recording = pool, stream, capture_error_mode, []
        before, self.streams[stream.device] = self.streams[stream.device], stream
        try:
            yield
        finally:
            graph.launches, stream.recording = stream.recording, None
        self.streams[stream.device] = before  # not where the capture fails, as in torch
        self.graphs.append(graph)

    def pool(self):
        self.pools += 1
        return self.pools


class Formulas(TorchDispatchMode):
    """What derivatives make inside of torch, `scalar_tensor(0, grad.options())`, they make where the gradient is."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.gpu.asked or any(isinstance(value, Tensor) for value in tree_leaves((args, kwargs or {}))):
            return result
        return tree_map_only(Tensor, lambda made: GpuTensor(self.gpu, made, self.gpu.current), result)


class Net(torch.nn.Module):
    """Two convolutions with BatchNorm, small enough for tensors that compute in Python."""

    def __init__(self, classes=4):
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        self.layer4 = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, 2), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        self.linear = torch.nn.Linear(8, classes)

    def forward(self, x):
        return self.linear(self.layer4(self.stem(x)).mean((2, 3)))


def net(classes=4):
    """The same weights in every call."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Net(classes).eval()


@pytest.fixture
def gpu(monkeypatch):
    """Two imagined GPUs, and torch.cuda as a program finds it where there are some."""
    gpu = FakeGpu()
    autocast, enabled, dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype
    # The CPU's kernels compute, so it is their autocast.
    monkeypatch.setattr(torch, "autocast", lambda device, *a, **k: autocast("cpu", *a, **k))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device=None: enabled("cpu"))
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: dtype("cpu"))
    for name, value in {
        "device_of": lambda value: gpu.device(value.get_device() if value.is_cuda else -1),
        "current_device": lambda: gpu.current,
        "current_stream": lambda device=None: gpu.streams[gpu.current if device is None else device],
        "Stream": lambda: Stream(gpu, gpu.current),
        "stream": gpu.stream,
        "CUDAGraph": Graph,
        "graph": gpu.capture,
        "graph_pool_handle": gpu.pool,
        "is_current_stream_capturing": lambda: gpu.streams[gpu.current].recording is not None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # `module.to` would leave `inner` as it was
    try:
        with gpu, Formulas(gpu):
            yield gpu
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
