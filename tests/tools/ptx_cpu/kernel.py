"""Compiles a translated kernel with g++ and launches it."""

import ctypes
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .parse import PtxError, parse
from .translate import Translator

HERE = Path(__file__).parent
# Compiled kernels, kept from one run of the tests to the next.
CACHE = HERE.parents[2] / "build" / "ptx_cpu"
FLAGS = [
    "-std=c++17", "-w", "-fPIC", "-shared", "-fno-strict-aliasing", "-mavx2", "-mfma", "-mf16c",
    # Each operation is rounded as it is written.
    "-ffp-contract=off", "-fno-fast-math",
]  # fmt: skip
MOST_THREADS, MOST_SHARED = 1024, 227 << 10


class Region(ctypes.Structure):
    _fields_ = (("first", ctypes.c_uint64), ("end", ctypes.c_uint64), ("touched", ctypes.c_void_p))


class Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        *((name, ctypes.c_uint32) for name in ("shared_bytes", "parameter_bytes")),
        *((name, ctypes.c_void_p) for name in ("parameters", "regions")),
        ("region_count", ctypes.c_uint32),
        ("counts", ctypes.c_void_p),
        *((name, ctypes.c_uint32) for name in ("stats", "race", "fill")),
        *((name, ctypes.c_uint64) for name in ("seed", "max_steps")),
        ("error", ctypes.c_char_p),
        ("error_size", ctypes.c_uint32),
        *(
            (name, ctypes.c_uint64)
            for name in ("shared_requests", "shared_conflicts", "shared_atomics", "shared_atomic_conflicts")
        ),
    )


def memory(tensor: Tensor) -> Tensor:
    """One-dimensional, all that the tensor's elements span and no more."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.as_strided((span if tensor.numel() else 0,), (1,))


class Kernel:
    """One kernel of a PTX text. `unsupported` lists instructions that are not known; they raise when they are reached.

    name: of the kernel, or a part of it that no other has. opt: of g++. -O0 compiles in half the time of -O1.
    """

    def __init__(self, ptx: str, name: str, opt: str = "-O1"):
        module = parse(ptx)
        names = [name] if name in module.entries else [entry for entry in module.entries if name in entry]
        if len(names) != 1:
            raise ValueError(f"name must be that of one kernel, got {name!r} of {', '.join(module.entries)}")
        self.entry = module.entries[names[0]]
        translator = Translator(module, self.entry)
        self.instructions = [i.text for i in translator.instructions]
        self.unsupported = translator.unsupported
        self.library = ctypes.CDLL(str(compiled(translator.source, opt)))
        # Variables of the module, 16-byte aligned as a GPU's are at least where the PTX does not ask for more.
        self.variables = {}
        addresses = (ctypes.c_uint64 * max(1, len(translator.variables))).in_dll(self.library, "variables")
        for place, variable_name in enumerate(translator.variables):
            variable = module.variables[variable_name]
            data = torch.zeros(max(1, variable.size), dtype=torch.uint8)
            if variable.data:
                data[: len(variable.data)] = torch.frombuffer(bytearray(variable.data), dtype=torch.uint8)
            self.variables[variable_name] = data
            addresses[place] = data.data_ptr()

    def __call__(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        arguments: Sequence[Tensor | int | float | bytes | None],
        shared_bytes: int = 0,
        *,
        extra: Sequence[Tensor] = (),
        race: bool = False,
        seed: int = 0,
        fill: int = 0xFF,
        stats: bool = False,
        blocks: Sequence[int] | None = None,
        max_steps: int = 10**8,
    ) -> dict | None:
        """Runs the grid in place on CPU tensors. A fault that it finds is a PtxError, which names the instruction.

        arguments: tensors for pointers, numbers, bytes for a struct, None for a null pointer. Trailing pointers that
            are not given are null.
        extra: further memory that the kernel may access, through pointers in structs.
        race: look for accesses of two warps to the same bytes of shared memory without a barrier between them.
        seed: blocks and warps run in another order for each; 0: in order.
        fill: the byte that registers, shared and local memory hold before they are written; 0xFF makes NaN of floats.
        stats: return counts. "mem" has, for each instruction that accessed global memory, "instr", "warp_requests",
            "sectors" (of 32 bytes), "bytes", "sectors_per_request" and "sector_efficiency", the part of the sectors'
            bytes that was asked for. "footprint" has the bytes of the sectors read and written at all of each argument
            ("param") and each of `extra`. "shared_requests" and "shared_atomics" count those of a warp to shared
            memory, "shared_bank_conflict_extra" and "shared_atomic_conflict_extra" the cycles that they take beyond
            one each.
        blocks: only these, by number, in this order.
        max_steps: of a warp, each a run of instructions without a branch.
        """
        grid, block = three(grid), three(block)
        check_launch(self.entry.head, block, shared_bytes)
        parameters, pointers = self.arguments(arguments)
        owned = [*pointers, *(("extra", memory(tensor)) for tensor in extra), *self.variables.items()]
        regions = (Region * max(1, len(owned)))()
        touched = []
        for region, (_, tensor) in zip(regions, owned, strict=False):
            region.first = tensor.data_ptr()
            region.end = region.first + tensor.nbytes
            touched.append(np.zeros(tensor.nbytes // 32 + 2 if stats else 1, np.uint8))
            region.touched = touched[-1].ctypes.data
        counts, error = np.zeros((len(self.instructions) + 1, 3), np.uint64), ctypes.create_string_buffer(1024)
        launch = Launch(
            grid=(ctypes.c_uint32 * 3)(*grid),
            block=(ctypes.c_uint32 * 3)(*block),
            shared_bytes=shared_bytes,
            parameter_bytes=len(parameters),
            parameters=parameters.ctypes.data,
            regions=ctypes.addressof(regions),
            region_count=len(owned),
            counts=counts.ctypes.data,
            stats=stats,
            race=race,
            fill=fill,
            seed=seed,
            max_steps=max_steps,
            error=ctypes.addressof(error),
            error_size=len(error),
        )
        total = grid[0] * grid[1] * grid[2]
        if blocks is None:
            blocks = np.random.default_rng(seed).permutation(total) if seed else np.arange(total)
        order = np.ascontiguousarray(blocks, np.uint64)
        if order.size and int(order.max()) >= total:
            raise ValueError(f"blocks must be numbers below {total}, got {int(order.max())}")
        failed = self.library.run_blocks(
            ctypes.byref(launch), ctypes.c_void_p(order.ctypes.data), ctypes.c_uint64(order.size)
        )
        if failed:
            raise PtxError(error.value.decode())
        return self.report(launch, counts, owned, touched) if stats else None

    def arguments(self, arguments: Sequence) -> tuple[np.ndarray, list[tuple[str, Tensor]]]:
        """The bytes of all parameters, and (name, memory) of those that are pointers."""
        parameters = self.entry.parameters
        if len(arguments) > len(parameters):
            raise ValueError(f"arguments must be at most {len(parameters)}, got {len(arguments)}")
        values, pointers = np.zeros(self.entry.parameter_bytes, np.uint8), []
        for parameter in parameters[len(arguments) :]:
            if parameter.type not in ("u64", "b64"):
                raise ValueError(f"arguments must have one for {parameter.name}, got {len(arguments)}")
        for parameter, value in zip(parameters, arguments, strict=False):
            if isinstance(value, Tensor):
                tensor = memory(value)
                pointers.append((parameter.name, tensor))
                value = tensor.data_ptr()
            if isinstance(value, float):
                code = {"f32": np.float32, "f64": np.float64}.get(parameter.type)
                value = code(value).tobytes() if code else value
            elif isinstance(value, int) and parameter.type not in ("f32", "f64"):
                value = (value % (1 << 8 * parameter.size)).to_bytes(parameter.size, "little")
            elif value is None:
                value = bytes(parameter.size)
            if not isinstance(value, bytes) or len(value) != parameter.size:
                kind = f"{parameter.size} bytes of type {parameter.type}"
                raise ValueError(f"{parameter.name} must be {kind}, got {value!r}")
            values[parameter.offset : parameter.offset + parameter.size] = np.frombuffer(value, np.uint8)
        return values, pointers

    def report(self, launch: Launch, counts: np.ndarray, owned: list, touched: list[np.ndarray]) -> dict:
        accesses = []
        for text, row in zip(self.instructions, counts.tolist(), strict=False):
            requests, sectors, size = row
            if requests:
                accesses.append(
                    {
                        "instr": text,
                        "warp_requests": requests,
                        "sectors": sectors,
                        "bytes": size,
                        "sector_efficiency": size / (32 * sectors),
                        "sectors_per_request": sectors / requests,
                    }
                )
        footprint = [
            {"param": name, "read_bytes": 32 * int((seen & 1).sum()), "written_bytes": 32 * int((seen >> 1).sum())}
            for (name, _), seen in zip(owned, touched, strict=True)
        ]
        return {
            "mem": accesses,
            "footprint": footprint,
            "shared_requests": launch.shared_requests,
            "shared_bank_conflict_extra": launch.shared_conflicts,
            "shared_atomics": launch.shared_atomics,
            "shared_atomic_conflict_extra": launch.shared_atomic_conflicts,
        }


def three(size: int | Sequence[int]) -> tuple[int, int, int]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return (*sizes, 1, 1, 1)[:3]


def check_launch(head: str, block: tuple[int, int, int], shared_bytes: int) -> None:
    """What a GPU would refuse."""
    threads = block[0] * block[1] * block[2]
    if threads > MOST_THREADS:
        raise PtxError(f"a block has at most {MOST_THREADS} threads, got {threads}")
    if shared_bytes > MOST_SHARED:
        raise PtxError(f"a block has at most {MOST_SHARED} bytes of shared memory, got {shared_bytes}")
    bound = re.search(r"\.(reqntid|maxntid)\s+([\d,\s]+)", head)
    if bound:
        sizes = three([int(size) for size in bound[2].split(",")])
        if block != sizes if bound[1] == "reqntid" else threads > sizes[0] * sizes[1] * sizes[2]:
            raise PtxError(f"the kernel was compiled for .{bound[1]} {sizes}, got a block of {block}")


def compiled(source: str, opt: str) -> Path:
    """The library of this source, compiled unless it is there already."""
    text = "".join([source, opt, *FLAGS, *((HERE / name).read_text() for name in ("runtime.h", "scheduler.h"))])
    library = CACHE / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            path, built = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
            path.write_text(source)
            command = ["g++", *FLAGS, opt, f"-I{HERE}", path, "-o", built]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise PtxError(f"g++: {done.stderr[:3000]}")
            built.rename(library)
    return library
