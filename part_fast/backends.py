"""Which implementation of each raw op runs: `reference`, `cpp`, `triton` or `cuda`.

Every raw op is defined once, in Python (`define`), with its plain PyTorch reference. The compiled
libraries `_C` and `_C_cuda` only add their dispatch key to it. Triton has an overload of its own,
`<op>.triton`, so that it can be asked for by name where CUDA C++ is built too.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from part_fast.errors import BadValueError, CannotRunError

BACKENDS = ("reference", "cpp", "triton", "cuda")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _load(library: str) -> str | None:
    """Load a compiled library; None, or why it could not be loaded."""
    if library == "_C_cuda" and torch.version.cuda is None:
        return "this torch is built without CUDA"
    if importlib.util.find_spec(f"part_fast.{library}") is None:
        need = "a CUDA compiler (nvcc) and PART_FAST_CUDA=1" if library == "_C_cuda" else "a C++ compiler (such as g++)"
        how = "pip install --force-reinstall --no-deps --no-build-isolation ."
        return f"part_fast.{library} is not built: with {need}, in a checkout of part_fast, {how}"
    try:
        importlib.import_module(f"part_fast.{library}")
    except (ImportError, OSError) as error:
        return f"part_fast.{library} does not load: {' '.join(str(error).split())}"
    return None


# Why a backend cannot run on any machine like this one; None where it can. Settled at import, so that
# choosing a backend costs a dictionary look-up and torch.compile can trace it.
_missing: dict[str, str | None] = {
    "reference": None,
    "cpp": _load("_C"),
    "triton": None if importlib.util.find_spec("triton") else "triton is not installed: pip install triton",
    "cuda": _load("_C_cuda"),
}

if _missing["cpp"]:
    warnings.warn(f"part_fast runs its slower reference ops on the CPU: {_missing['cpp']}", stacklevel=2)
if torch.version.cuda is not None and _missing["triton"] and _missing["cuda"]:
    warnings.warn(
        f"part_fast runs its slower reference ops on a GPU: {_missing['triton']}; {_missing['cuda']}", stacklevel=2
    )


def _known(name: str, argument: str) -> str:
    if name not in BACKENDS:
        raise BadValueError(f"{argument}: unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    return name


def why_not(name: str, device_type: str) -> str | None:
    """Why backend `name` cannot serve tensors on a device of that type; None if it can."""
    if _missing[name]:
        return _missing[name]
    if name == "cpp" and device_type != "cpu":
        return f"cpp takes CPU tensors, not {device_type}"
    if name == "cuda" and device_type != "cuda":
        return f"cuda takes CUDA tensors, not {device_type}"
    if name == "triton" and device_type != "cuda" and not (device_type == "cpu" and INTERPRETED):
        return (
            f"triton takes CUDA tensors, or CPU tensors in a process started with TRITON_INTERPRET=1, not {device_type}"
        )
    return None


def available_backends(device: str | torch.device = "cpu") -> list[str]:
    """Names of the backends that can serve tensors on `device`, fastest first.

    Empty for a CUDA device on a machine without one.
    """
    device_type = torch.device(device).type
    if device_type == "cuda" and not torch.cuda.is_available():
        return []
    return [name for name in _fastest_first(device_type) if why_not(name, device_type) is None]


def _fastest_first(device_type: str) -> tuple[str, ...]:
    # The interpreter computes what a GPU would, thousands of times slower than the reference.
    return ("cuda", "triton", "reference") if device_type == "cuda" else ("cpp", "reference", "triton")


# The choice of the process, and in a block of `backend` that of its thread (or asyncio task), as a tuple of one name.
_chosen: str | None = None
_block: contextvars.ContextVar[tuple[str | None] | None] = contextvars.ContextVar("part_fast.backend", default=None)
# torch.compile traces, and guards on, a ContextVar in torch 2.14. Before, it needs a global: the choice made last.
_TRACES_BLOCKS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)
_latest: str | None = None


def set_backend(name: str | None) -> None:
    """Use one backend for every op of this process, in every thread; None goes back to the fastest available.

    Inside a block of `backend` the block's choice goes before it.
    Errors: ValueError for an unknown name; RuntimeError, saying why, for one that is not available here.
    """
    global _chosen, _latest
    _check_available(name)
    _chosen = name
    _latest = chosen()


def _check_available(name: str | None) -> None:
    if name is not None:
        _known(name, "set_backend")
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        reasons = [why_not(name, device_type) for device_type in devices]
        if None not in reasons:
            no_gpu = "" if len(devices) == 2 or _missing[name] else " (and this machine has no CUDA device)"
            raise CannotRunError(f"backend {name!r} is not available: {reasons[-1]}{no_gpu}")


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """`with part_fast.backend("reference"):` uses one backend inside the block, in this thread alone.

    A backward runs on the backend of its forward. None is the fastest available. On torch older than 2.14 a compiled
    function takes the choice that any thread made last.
    Errors: those of `set_backend`.
    """
    global _latest
    _check_available(name)
    token = _block.set((name,))
    _latest = name
    try:
        yield
    finally:
        _block.reset(token)
        _latest = chosen()


def chosen() -> str | None:
    """The backend asked for in this thread; None for the fastest available."""
    if not _TRACES_BLOCKS and torch.compiler.is_compiling():
        return _latest
    block = _block.get()
    return _chosen if block is None else block[0]


def current_backend(device: str | torch.device = "cpu") -> str:
    """Name of the backend that runs for tensors on `device`.

    Errors: RuntimeError, saying why, if the one asked for cannot serve that device.
    """
    return _select(chosen(), torch.device(device).type)


def _select(asked: str | None, device_type: str) -> str:
    if asked is not None:
        if asked not in BACKENDS:  # set_backend checks its argument at once, the environment's is checked here
            check_environment()
        reason = why_not(asked, device_type)
        if reason is not None:
            raise CannotRunError(f"backend {asked!r} is not available: {reason}")
        return asked
    for name in _fastest_first(device_type):
        if why_not(name, device_type) is None:
            return name
    raise AssertionError("the reference serves every device")


_library = torch.library.Library("part_fast", "DEF")


class RawOp:
    """A raw op: no checks, no autograd; calling it runs the implementation of the chosen backend."""

    def __init__(self, name: str, reference: Callable[..., Any]):
        packet = getattr(torch.ops.part_fast, name)
        self.name = name
        self.reference = reference
        self.compiled = packet.default
        self.by_name = packet.reference
        self.triton = getattr(packet, "triton", None)

    def __call__(self, *args: Any) -> Any:
        """The first argument is a tensor, whose device must be one of the backend's."""
        return self.on(chosen(), *args)

    def on(self, asked: str | None, *args: Any) -> Any:
        """A call on a backend, None for the fastest: a backward's, which torch runs on CUDA in a thread of its own."""
        name = _select(asked, args[0].device.type)
        if name == "reference":
            # By name it has a rule for torch.vmap; called plainly its in-place ops would meet torch's rules.
            return (self.by_name if torch._C._are_functorch_transforms_active() else self.reference)(*args)
        if name != "triton":
            return self.compiled(*args)
        if self.triton is None:
            raise CannotRunError(f"part_fast::{self.name} runs on CPUs alone and has no triton kernel")
        return self.triton(*args)


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    kernels: str | None = None,
    *,
    by_place: bool = False,
) -> RawOp:
    """Define raw op `part_fast::<schema>`.

    `reference` is its implementation in plain PyTorch for every device, `fake` gives the outputs' shapes.
    Under torch.vmap a mapped dimension becomes part of the samples, the first dimension of every tensor and result;
    `by_place`: not where a value of the result depends on where it lies, so that each sample has a call of its own.
    `kernels` is the module of part_fast/kernels/ with its Triton launcher, named as the op without the
    underscore in front; it is imported at the first call, since importing Triton takes long. An op of the
    CPU alone has none.
    """
    name = schema.partition("(")[0]
    launcher = name.removeprefix("_")

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"part_fast.kernels.{kernels}"), launcher)(*args)

    for overload in ("", ".reference", ".triton") if kernels else ("", ".reference"):
        _library.define(schema.replace("(", f"{overload}(", 1), tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"part_fast::{name}{overload}", fake, lib=_library)
        if "!" not in schema:
            over = _one_by_one if by_place else _over_samples
            rule = functools.partial(over, name, overload.removeprefix(".") or "default")
            torch.library.register_vmap(f"part_fast::{name}{overload}", rule, lib=_library)
    for overload in ("", ".reference"):
        _library.impl(f"{name}{overload}", reference, "CompositeExplicitAutograd")
    for key in (("CUDA", "CPU") if INTERPRETED else ("CUDA",)) if kernels else ():
        _library.impl(f"{name}.triton", launch, key)
    return RawOp(name, reference)


def _one_by_one(name: str, overload: str, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """The vmap rule of a raw op of one result that depends on where in a tensor a value lies: a call a sample."""
    op = getattr(getattr(torch.ops.part_fast, name), overload)
    results = []
    for i in range(info.batch_size):
        sample = [arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)]
        results.append(op(*(_dense(arg) if isinstance(arg, Tensor) else arg for arg in sample)))
    return torch.stack(results), 0


def _dense(value: Tensor) -> Tensor:
    """Contiguous or channels_last, as it is where it is either."""
    last = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return value if last else value.contiguous()


def _over_samples(name: str, overload: str, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """The vmap rule of a raw op: one call for all samples of the mapped dimension, (B,N,...) as (B*N,...)."""
    op = getattr(getattr(torch.ops.part_fast, name), overload)
    samples, flat = 0, []
    for arg, dim, argument in zip(args, in_dims, op._schema.arguments, strict=True):
        if isinstance(arg, Tensor):
            arg = arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            samples = arg.shape[1]
            arg = arg.flatten(0, 1)
            # Kernels read eps by its strides, everything else as it lies in memory.
            arg = arg if argument.name == "eps" and arg.dtype != torch.uint8 else arg.contiguous()
        flat.append(arg)
    results = op(*flat)
    several = isinstance(results, tuple)
    # The gradient of an eps that has none is one empty tensor, for all samples.
    mapped = [r.ndim > 1 for r in results] if several else [True]
    results = [
        r.unflatten(0, (info.batch_size, samples)) if m else r
        for r, m in zip(results if several else (results,), mapped, strict=True)
    ]
    out_dims = [0 if m else None for m in mapped]
    return (tuple(results), tuple(out_dims)) if several else (results[0], out_dims[0])


def check_environment() -> None:
    """Errors: ValueError for a backend in PART_FAST_BACKEND that nobody knows."""
    if _chosen is not None:
        _known(_chosen, "PART_FAST_BACKEND")


# Asked at the first op, whether it is known and can serve a tensor: importing works everywhere.
_chosen = _latest = os.environ.get("PART_FAST_BACKEND") or None
