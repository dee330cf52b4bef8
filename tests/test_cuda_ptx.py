"""The CUDA kernels without a GPU: their compiled PTX run on the CPU by tools/ptx_cpu, their SASS read.

The launch code is the real one: csrc/*.cu is compiled by nvcc with the flags of setup.py and linked with
cuda_recorder.cpp instead of the CUDA run time, so an op called on CPU tensors gives the kernel, grid, block, shared
bytes and arguments that a GPU would be given. ptx_cpu then runs that kernel on the op's own tensors: out-of-bounds and
misaligned accesses, races and deadlocks raise; what is not written stays NaN. It cannot show speed.
"""

import concurrent.futures
import csv
import ctypes
import hashlib
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from conftest import (
    DTYPES,
    EPS,
    EPS_FORMS,
    EPS_LOW,
    LAYOUTS,
    ROOT,
    lay,
    make_eps,
    make_images,
    repeated_halfword_adds,
    with_nan,
)
from tools.ptx_cpu import Kernel, memory
from torch import Tensor

# Modules, not the functions of these names.
CAM, CAM_MASK, EPSILON_MAP, PACKED, PGD_STEP, PROJECT, UPSAMPLE, UNIFORM, BANK, EPS_STEP = (
    sys.modules[f"part_fast.ops.{name}"]
    for name in (
        "cam", "cam_mask", "epsilon_map", "packed_epsilon", "pgd_step", "project_linf", "upsample_cam",
        "uniform_start", "bank_start", "eps_step",
    )
)  # fmt: skip
STEMS = sorted(path.stem for path in (ROOT / "csrc").glob("*.cu"))
CCS = (80, 90)
SASS_ARCHS = (80, 90, 100, 120)
ALPHA = 2 / 255


def setup_module_of() -> object:
    spec = importlib.util.spec_from_file_location("setup_of_part_fast", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tool(name: str, toolkit: Path) -> str | None:
    """A CUDA binary tool: the toolkit's, or the one in Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    places = [toolkit / "bin", *([Path(triton.origin).parent / "backends/nvidia/bin"] if triton else [])]
    return shutil.which(name, path=os.pathsep.join(map(str, places)))


def unhashed(kernel: str) -> str:
    """A mangled name without the part of an anonymous namespace that depends on the file compiled."""
    found = re.search(r"(\d+)_GLOBAL__N_", kernel)
    if not found:
        return kernel
    return kernel[: found.start()] + kernel[found.end(1) + int(found[1]) :]


class Launch:
    """One recorded launch: all that a GPU would be given."""

    def __init__(self, kernel, grid, block, shared_bytes, arguments, on_stream, guards):
        self.kernel, self.grid, self.block, self.shared_bytes = kernel, grid, block, shared_bytes
        self.arguments, self.on_stream, self.guards = arguments, on_stream, guards


THREE = ctypes.c_uint32 * 3
CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(THREE), ctypes.POINTER(THREE), ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_int,
)  # fmt: skip


class Recorder:
    """The ops of csrc/*.cu on CPU tensors, each launch run through its PTX."""

    def __init__(self, folder: Path, stems=STEMS):
        self.folder = folder
        self.launches, self.kernels, self.entries = [], {}, {}
        self.stems = {name: stem for stem in stems for name in self._entries_of(stem, 90)}
        # Number of blocks to run, counted from the last one; None: all.
        self.last_blocks: int | None = None
        # Translating a kernel takes a compiler seconds: those that are surely wanted go first, two at a time.
        usual = [(name, 90) for name in self.stems if any(part in name for part in USUAL)]
        usual += [(name, 80) for name in self.stems if USUAL and USUAL[0] in name]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda wanted: self.kernel(*wanted), usual))
        self.library = ctypes.CDLL(str(folder / "recorder.so"))
        self.library.expected_stream.restype = ctypes.c_void_p
        self.stream = self.library.expected_stream()
        self.callback = CALLBACK(self._on_launch)
        self.library.record_launches(self.callback)

    def _entries_of(self, stem: str, cc: int) -> dict[str, tuple[str, str, int]]:
        """Kernel -> (PTX, its name there, bytes of its one argument)."""
        if (stem, cc) not in self.entries:
            path = self.folder / f"{stem}.{cc}.ptx"
            if not path.exists():
                compile_ptx(stem, cc, path)
            text, found = path.read_text(), {}
            assert not repeated_halfword_adds(text), stem
            for name, parameters in re.findall(r"\.entry\s+(\w+)\(([^)]*)\)", text):
                sizes = re.findall(r"\.b8\s+\w+\[(\d+)\]", parameters)
                assert len(sizes) == 1, (name, "takes one struct")
                found[unhashed(name)] = (text, name, int(sizes[0]))
            self.entries[stem, cc] = found
        return self.entries[stem, cc]

    def entry(self, kernel: str, cc: int) -> tuple[str, str, int]:
        return self._entries_of(self.stems[kernel], cc)[kernel]

    def threads(self, kernel: str) -> int:
        """The most threads of a block."""
        text, name, _ = self.entry(kernel, 90)
        return int(re.search(rf"\.entry\s+{name}\([^)]*\)\s*\.maxntid\s+(\d+)", text)[1])

    def _on_launch(self, name, grid, block, shared_bytes, arguments, stream, guards):
        kernel = unhashed(name.decode())
        size = self.entry(kernel, 90)[2]
        self.launches.append(
            Launch(kernel, tuple(grid[0]), tuple(block[0]), shared_bytes, ctypes.string_at(arguments[0], size),
                   stream == self.stream, guards)
        )  # fmt: skip

    def kernel(self, kernel: str, cc: int, opt: str = "-O0"):
        # Unoptimised translations are compiled in half the time; only traffic is counted long enough for -O1.
        if (kernel, cc, opt) not in self.kernels:
            text, name, _ = self.entry(kernel, cc)
            self.kernels[kernel, cc, opt] = Kernel(text, name, opt=opt)
        return self.kernels[kernel, cc, opt]

    def __call__(self, op, *arguments, cc=90, opt="-O0", **options):
        """op(*arguments), a raw op; its launches are run on PTX for `cc`. Returns (result, reports)."""
        self.launches.clear()
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
        result = op.compiled.redispatch(keys, *arguments)
        outputs = [result] if isinstance(result, Tensor) else list(result or ())
        tensors = [t for t in (*arguments, *outputs) if isinstance(t, Tensor) and t.numel()]
        options = {"race": True, "seed": 1 + len(self.kernels), **options}
        reports = []
        for launch in self.launches:
            assert launch.on_stream, "the stream that is current"
            assert launch.guards == 1, "under a device guard"
            if self.last_blocks is not None:
                count = launch.grid[0] * launch.grid[1] * launch.grid[2]
                options["blocks"] = range(count - self.last_blocks, count)
            run = self.kernel(launch.kernel, cc, opt)
            report = run(launch.grid, launch.block, [launch.arguments], launch.shared_bytes, extra=tensors, **options)
            reports.append(report)
        return result, reports


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr[-4000:]}"
    return done.stdout


def nvcc(*options: object) -> None:
    """The compiler with the flags that setup.py and torch give it."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

    settings = setup_module_of()
    flags = [*settings.NVCC_FLAGS, *COMMON_NVCC_FLAGS, "-std=c++17", "-Xcompiler=-fPIC", f"-I{ROOT / 'csrc'}"]
    flags += [f"-I{path}" for path in [*include_paths(), sysconfig.get_path("include")]]
    run(settings.find_toolkit() / "bin" / "nvcc", *flags, *options)


def compile_ptx(stem: str, cc: int, target: Path) -> None:
    nvcc("-ptx", f"-arch=compute_{cc}", ROOT / "csrc" / f"{stem}.cu", "-o", target)


def build(folder: Path, stems=STEMS) -> None:
    """Compile csrc/*.cu to objects and to PTX for sm_90, and link the objects with the recorder, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    cuobjdump = tool("cuobjdump", setup_module_of().find_toolkit())

    def compile_one(stem: str) -> None:
        target = folder / f"{stem}.o"
        nvcc("-c", "-gencode=arch=compute_90,code=compute_90", ROOT / "csrc" / f"{stem}.cu", "-o", target)
        listed = run(cuobjdump, "-ptx", target)
        (folder / f"{stem}.90.ptx").write_text(listed[listed.index(".version") :])

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, stems))
    libraries = Path(torch.__file__).parent / "lib"
    source = Path(__file__).with_name("cuda_recorder.cpp")
    objects = [folder / f"{stem}.o" for stem in stems]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wl,-Bsymbolic", f"-L{libraries}"]
    run("g++", *flags, source, *objects, "-ltorch_cpu", "-lc10", "-ltorch", "-ldl", "-o", folder / "recorder.so")


def why_not() -> str | None:
    toolkit = setup_module_of().find_toolkit()
    if toolkit is None:
        return "no CUDA compiler (nvcc): set CUDA_HOME"
    if shutil.which("g++") is None:
        return "no g++"
    return None if tool("cuobjdump", toolkit) else "no cuobjdump, in the CUDA toolkit or in Triton"


@pytest.fixture(scope="session")
def cuda() -> Recorder:
    """Compiled once for each state of the sources, below build/."""
    if reason := why_not():
        pytest.skip(reason)
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("csrc/*"), ROOT / "setup.py", Path(__file__).with_name("cuda_recorder.cpp")]):
        digest.update(path.read_bytes() if path.suffix in (".h", ".cuh", ".cu", ".py", ".cpp") else b"")
    folder = ROOT / "build" / "ptx" / digest.hexdigest()[:16]
    if not (folder / "recorder.so").exists():
        build(folder)
    return Recorder(folder)


def assert_equal(actual: Tensor, expected: Tensor, what: object) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    if expected.ndim == 4 and expected.numel():
        for layout in (torch.contiguous_format, torch.channels_last):
            agree = actual.is_contiguous(memory_format=layout) == expected.is_contiguous(memory_format=layout)
            assert agree, (what, layout)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


# Kernels that the tests without a mark run, by a part of their mangled names; all others are of the slow tests.
USUAL = (
    "pgd_step_kernelIf",
    "pgd_step_kernelIN3c108BF",
    "pgd_step_runs_kernelIf",
    "pgd_step_runs_kernelIN3c108BF",
    "project_linf_runs_kernelIf",
    "eps_step_runs_kernelIf",
    "pgd_step_bwd_kernelIf",
    "project_linf_fwd_kernelIf",
    "project_linf_bwd_kernelIf",
    "uniform_start_kernelIf",
    "bank_start_kernelIf",
    "eps_step_kernelIf",
    "eps_step_bank_kernelIf",
    "upsample_cam_fwd_kernelIf",
    "upsample_cam_bwd_kernelIf",
    "cam_kernelIfLi4",
    "cam_kernelIfLi1",
    "cam_mask_kernelIf",
    "epsilon_map_kernelIfLi3",
)
IMAGE_SHAPES = (
    (2, 3, 5, 7), (3, 3, 16, 24), (1, 1, 1, 1), (1, 1, 1, 31), (1, 1, 33, 1), (1, 3, 11, 1), (1, 1, 33, 31),
    (3, 2, 9, 1), (0, 3, 4, 4), (2, 3, 0, 4),
)  # fmt: skip
MAP_SIZES = (
    ((3, 8, 8), (32, 32)), ((2, 5, 7), (30, 44)), ((3, 4, 4), (28, 28)), ((2, 3, 3), (31, 33)), ((2, 1, 5), (1, 31)),
    ((2, 5, 1), (33, 1)), ((2, 1, 1), (5, 6)), ((1, 2, 9), (7, 9)), ((2, 6, 6), (6, 6)), ((0, 4, 4), (8, 8)),
    ((1, 16, 16), (65, 130)), ((2, 7, 7), (56, 56)),
)  # fmt: skip
slow = pytest.mark.slow
cc_of_ptx = pytest.mark.parametrize("cc", CCS)


def bits_of(value: Tensor) -> Tensor:
    return value.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])


def image_cases(every: bool):
    """(shape, layout, eps form, gradient's dtype, eps dtype): all, or each of shape x layout and form x layout once."""
    forms, grads, kinds = EPS_FORMS, list(DTYPES.values()), list(DTYPES.values())
    if every:
        shapes = IMAGE_SHAPES[:2] + IMAGE_SHAPES[6:8]
        yield from itertools.product(shapes, LAYOUTS, forms, grads, [torch.float32])
        yield from itertools.product(shapes[:1], LAYOUTS, [f for f in forms if f.startswith("(")], grads[:1], kinds)
        return
    turn = itertools.count()
    for layout in LAYOUTS:
        for pairs in (itertools.product(IMAGE_SHAPES[:2], forms), zip(IMAGE_SHAPES[2:], itertools.cycle(forms[3:]))):
            for shape, form in pairs:
                i = next(turn)
                yield shape, layout, form, grads[i % 4], kinds[i // 4 % 4]


def image_inputs(case, dtype):
    shape, layout, form, grad_dtype, eps_dtype = case
    eps, dense = make_eps(form, shape, "cpu", eps_dtype)
    x_adv, grad, x = (lay(t, layout) for t in make_images(shape, dtype, "cpu", dense, grad_dtype))
    if sum(shape) % 2:
        x_adv.copy_(with_nan(x_adv))
        x.copy_(with_nan(x))
    return x_adv, grad, x, PACKED.eps_arguments(eps, x_adv)


def check(cuda, op, arguments, what, cc=90, compare=None):
    """One launch (none for nothing), the reference's result, inputs left alone."""
    before = [t.clone(memory_format=torch.preserve_format) for t in arguments if isinstance(t, Tensor)]
    expected = op.reference(*arguments)
    result, reports = cuda(op, *arguments, cc=cc)
    pairs = [(result, expected)] if isinstance(result, Tensor) else list(zip(result, expected, strict=True))
    assert len(reports) == (1 if any(t.numel() for t, _ in pairs) else 0), what
    for actual, wanted in pairs:
        (compare or assert_equal)(actual, wanted, what)
    for tensor, kept in zip([t for t in arguments if isinstance(t, Tensor)], before, strict=True):
        assert torch.equal(bits_of(tensor.contiguous()), bits_of(kept.contiguous())), (what, "an input was changed")
    return result


def run_pgd_step(cuda, case, dtype, cc, backward=True):
    x_adv, grad, x, eps = image_inputs(case, dtype)
    clip = (-float("inf"), float("inf")) if case[0][0] == 1 else (0.0, 1.0)
    arguments = (x_adv, grad, x, *eps, ALPHA, *clip)
    expected = check(cuda, PGD_STEP._pgd_step, arguments, case, cc)
    if backward:
        grad_out = lay(torch.randn(case[0]).to(dtype), case[1])
        check(cuda, PGD_STEP._pgd_step_bwd, (grad_out, *arguments), case, cc)
    cuda(PGD_STEP._pgd_step_, *arguments, cc=cc)
    assert_equal(x_adv, expected, ("in place", case))


def run_project_linf(cuda, case, dtype, cc, backward=True):
    x_adv, _, x, eps = image_inputs(case, dtype)
    check(cuda, PROJECT._project_linf, (x_adv, x, *eps), case, cc)
    if backward:
        grad_out = lay(torch.randn(case[0]).to(dtype), case[1])
        check(cuda, PROJECT._project_linf_bwd, (grad_out, x_adv, x, *eps), case, cc)


def run_fast(cuda, case, dtype, cc, backward=False):
    """uniform_start, bank_start, and eps_step_ with and without a bank."""
    shape = case[0]
    x_adv, grad, x, eps = image_inputs(case, dtype)
    bank = torch.randint(-127, 128, (len(x) + 2, *shape[1:]), dtype=torch.int8)
    # From the last to the first sample: crops and flips, one far outside, one that is not in the bank.
    places = torch.tensor([(len(x) - 1 - n, n - 1, 2 - n, n % 2) for n in range(len(x))], dtype=torch.int64)
    places = places.view(-1, 4)
    if len(x) > 2:
        places[1, 2], places[2, 0] = 2**40, len(bank)
    clip = (-float("inf"), float("inf")) if shape[0] == 1 else (0.0, 1.0)
    check(cuda, UNIFORM._uniform_start, (x, *eps, 1.5, 2**62 + 2**31 + 5, *clip), case, cc)
    check(cuda, BANK._bank_start, (x, bank, places, *eps, 0.1 / 127, *clip), case, cc)
    for stored, drawn in ((None, None), (bank, places)):
        steps = (*eps, 1.25, sum(shape) % 3 > 0, sum(shape) % 2 > 0, *clip)
        kept = None if stored is None else stored.clone()
        expected, result = lay(x_adv, case[1]), lay(x_adv, case[1])
        EPS_STEP._eps_step_.reference(expected, grad, x, *steps, kept, drawn, 1270.0)
        _, reports = cuda(EPS_STEP._eps_step_, result, grad, x, *steps, stored, drawn, 1270.0, cc=cc)
        assert len(reports) == (1 if x.numel() else 0)
        assert_equal(result, expected, ("eps_step_", case))
        if stored is not None:
            assert torch.equal(stored, kept), ("the bank", case)


def test_fast(cuda):
    for case in image_cases(every=False):
        run_fast(cuda, case, torch.float32, 90)


def test_pgd_step(cuda):
    for case in image_cases(every=False):
        run_pgd_step(cuda, case, torch.float32, 90)


def test_pgd_step_bfloat16(cuda):
    for case in image_cases(every=False):
        run_pgd_step(cuda, case, torch.bfloat16, 90, backward=False)


# Forms of eps that a thread can read beside its run of the images, see csrc/runs.cuh, by layout.
RUNS = {
    "contiguous": {
        "float", "()", "(N,1,1,1)", "(N,1,H,W)", "(N,C,H,W)", "(H,W)", "PackedEpsilon M=1", "PackedEpsilon M=C",
    },
    "channels_last": {"float", "()", "(N,1,1,1)", "(N,1,H,W)", "(N,C,H,W) channels_last", "PackedEpsilon M=1"},
}  # fmt: skip


def run_runs(cuda, dtype, cc, usual=True):
    """Every form of eps with gradients of the images' type, in the kernels for it and in those for the rest."""
    for shape, layout, form in itertools.product(((3, 3, 16, 24), (2, 5, 8, 8)), RUNS, EPS_FORMS):
        for kind in {torch.float32, dtype}:
            case = (shape, layout, form, dtype, kind)
            run_pgd_step(cuda, case, dtype, cc, backward=False)
            # Float64 is computed in float64, and an eps of another type is not read in runs.
            fits = form in RUNS[layout] and (dtype != torch.float64 or kind == dtype or not form.startswith("("))
            assert ("runs_kernel" in cuda.launches[0].kernel) == fits, case
            if usual or dtype == torch.float32:
                run_project_linf(cuda, case, dtype, cc, backward=False)
                x_adv, grad, x, eps = image_inputs(case, dtype)
                steps = (*eps, 1.25, True, shape[0] == 3, 0.0, 1.0, None, None, 1270.0)
                expected = x_adv.clone(memory_format=torch.preserve_format)
                EPS_STEP._eps_step_.reference(expected, grad, x, *steps)
                cuda(EPS_STEP._eps_step_, x_adv, grad, x, *steps, cc=cc)
                assert_equal(x_adv, expected, ("eps_step_", case))


def test_runs(cuda):
    run_runs(cuda, torch.float32, 90)


def test_runs_bfloat16(cuda):
    run_runs(cuda, torch.bfloat16, 90, usual=False)


@slow
@cc_of_ptx
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_runs_every_dtype(cuda, dtype, cc):
    run_runs(cuda, dtype, cc)


def test_pgd_step_sm_80(cuda):
    # Where bfloat16 becomes float32 by another instruction. Every kernel on both architectures: the slow tests.
    for case in image_cases(every=False):
        run_pgd_step(cuda, case, torch.float32, 80, backward=False)


def test_project_linf(cuda):
    for case in image_cases(every=False):
        run_project_linf(cuda, case, torch.float32, 90)


@slow
@cc_of_ptx
@pytest.mark.parametrize("run", [run_pgd_step, run_project_linf, run_fast])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_images_every_form(cuda, dtype, run, cc):
    for case in image_cases(every=True):
        run(cuda, case, dtype, cc)
    for case in image_cases(every=False):
        run(cuda, case, dtype, cc)


@slow
def test_offsets_beyond_two_to_the_31(cuda):
    # Memory that is never touched takes no room; of a million blocks the last three run.
    numel = 2**31 + 4096 + 5
    torch.utils.deterministic.fill_uninitialized_memory = False
    x_adv, x = (torch.empty((1, 1, 1, numel), dtype=torch.bfloat16) for _ in range(2))
    grad = torch.empty((1, 1, 1, numel), dtype=torch.float16)
    bits = torch.empty((1, 1, (numel + 7) // 8), dtype=torch.uint8)
    tail = slice(numel - 2048, numel)
    x_adv[..., tail], x[..., tail] = torch.rand(2, 2048, dtype=torch.bfloat16)
    grad[..., tail] = torch.randn(2048, dtype=torch.float16)
    bits[..., -300:] = torch.randint(0, 256, (300,), dtype=torch.uint8)
    scalars = (EPS, EPS_LOW, ALPHA, 0.0, 1.0)
    packed = PACKED.unpack_bits(bits[..., -300:], (1, 2400), EPS, EPS_LOW, torch.float32).flatten()
    past = (numel + 7) // 8 * 8 - numel
    eps = packed[2400 - past - 2048 : 2400 - past].view(1, 1, 1, 2048)
    parts = [t[..., tail].clone() for t in (x_adv, grad, x)]
    expected = PGD_STEP._pgd_step.reference(*parts, eps, *scalars)

    cuda.launches.clear()
    cuda.last_blocks = 3
    try:
        cuda(PGD_STEP._pgd_step_, x_adv, grad, x, bits, *scalars)
    finally:
        cuda.last_blocks = None
    assert_equal(x_adv[..., tail].clone(), expected, "tail")


def feature_maps(shape, dtype, channels_last):
    activation, gradient = torch.rand(shape) + 0.1, torch.randn(shape)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return (t.to(dtype).contiguous(memory_format=layout) for t in (activation, gradient))


def run_cam(cuda, shape, dtype, cc, methods=range(4)):
    for method, channels_last in itertools.product(methods, (False, True)):
        activation, gradient = feature_maps(shape, dtype, channels_last)
        a, g = activation.double(), gradient.double()
        exact = CAM._cam.reference(a, g, method)
        weights = g if method >= 2 else g.mean((2, 3), keepdim=True)
        if method == 1:
            weights = (g * a).sum((2, 3), keepdim=True) / (a + 1e-8).sum((2, 3), keepdim=True)
        # Rounding of a sum of K terms in any order; the weights were sums of h*w themselves.
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        spread = (g.abs() if method >= 2 else g.abs().mean((2, 3), keepdim=True) + weights.abs()) * a.abs()
        bound = eps * (shape[1] + shape[2] * shape[3] + 8) * spread.sum(1)

        def close(actual, expected, what, exact=exact, bound=bound):
            assert (actual.dtype, actual.is_contiguous()) == (expected.dtype, True), what
            assert ((actual.double() - exact).abs() <= bound).all(), what

        check(cuda, CAM._cam, (activation, gradient, method), (shape, dtype, method, channels_last), cc, close)


def test_cam(cuda):
    shapes = [(2, 24, 8, 8), (2, 40, 4, 4), (1, 24, 7, 7), (1, 5, 1, 3), (3, 1, 1, 1), (1, 8, 16, 16), (0, 4, 2, 2)]
    for shape in [*shapes, (1, 4100, 2, 2), (1, 3, 31, 33), (1, 520, 3, 3)]:
        run_cam(cuda, shape, torch.float32, 90)
    flat = torch.full((1, 8, 4, 4), float("nan"))
    result = check(cuda, CAM._cam, (flat, flat, 0), "NaN")
    assert result.isnan().all()


@slow
@cc_of_ptx
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_cam_every_dtype(cuda, dtype, cc):
    for shape in [(2, 24, 8, 8), (2, 40, 4, 4), (1, 24, 7, 7), (1, 8, 16, 16), (1, 4104, 2, 2), (2, 640, 8, 8)]:
        run_cam(cuda, shape, dtype, cc)


def maps(shape, dtype=torch.float32):
    """Random maps; the second with many ties, the third flat where there are as many."""
    cam = torch.rand(shape)
    if shape[0] > 1:
        cam[1] = (cam[1] * 3).round() / 3
    if shape[0] > 2:
        cam[2] = 0.25
    return cam.to(dtype)


def without_evidence(shape=(4, 5, 5)):
    cam = torch.rand(shape)
    cam[0, 2, 3], cam[1, 0, 0], cam[2] = float("nan"), float("inf"), -1.0
    cam[3] = torch.finfo(torch.float32).max * (cam[3] - 0.5).sign()
    return cam


def close_gradient(actual, expected, what):
    # Sums of float32 products in another order than a matrix product's.
    assert actual.dtype == expected.dtype, what
    wide = expected.double()
    tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float64: 1e-11}.get(actual.dtype, 2e-5)
    scale = wide.abs().nan_to_num().amax().clamp(min=1) if wide.numel() else 1
    torch.testing.assert_close(
        actual.double(),
        wide,
        rtol=tolerance,
        atol=float(tolerance * scale),
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


def run_upsample_cam(cuda, cam, size, cc):
    check(cuda, UPSAMPLE._upsample_cam, (cam, *size), (cam.shape, size), cc)
    grad_out = torch.randn(len(cam), *size).to(cam.dtype)
    check(cuda, UPSAMPLE._upsample_cam_bwd, (grad_out, cam), (cam.shape, size), cc, close_gradient)


def run_cam_mask(cuda, cam, size, cc, rules=(0, 1, 2)):
    for rule, k in (
        (r, k) for r in rules for k in ((size[0] * size[1] // 3 or 1, size[0] * size[1]) if r == 2 else (0,))
    ):

        def agree(actual, expected, what, rule=rule):
            if rule != 0 or actual.dtype == torch.uint8:
                assert torch.equal(actual, expected), what
                return
            # Statistics are sums in another order: a pixel within 1e-5 of the threshold may differ.
            u = UPSAMPLE.reference(cam, *size).double()[:, None]
            mean = u.mean((2, 3), keepdim=True)
            std = ((u - mean) ** 2).mean((2, 3), keepdim=True).sqrt()
            near = ((u - mean) / std - 1).abs() < 1e-5
            assert ((actual == expected) | near).all(), what

        for packed in (False, True):
            check(cuda, CAM_MASK._cam_mask, (cam, *size, rule, k, packed), (cam.shape, size, rule, packed), cc, agree)


def run_epsilon_map(cuda, cam, size, cc, rules=(3,)):
    for rule in rules:
        k = (size[0] * size[1] // 3 or 1) if rule == 2 else 0
        arguments = (cam, *size, rule, k, EPS, EPS_LOW)
        check(cuda, EPSILON_MAP._epsilon_map, arguments, (cam.shape, size, rule), cc)


@pytest.mark.parametrize("run", [run_upsample_cam, run_cam_mask, run_epsilon_map])
def test_maps(cuda, run):
    for shape, size in MAP_SIZES:
        run(cuda, maps(shape), size, 90)
    run(cuda, without_evidence(), (9, 12), 90)


def test_maps_that_do_not_fit_into_shared_memory(cuda):
    # Rows are prepared in bands: the 170 x 170 map alone would take 115 KB, the enlarged rows of the other 118 KB.
    for shape, size in (((1, 170, 170), (170, 171)), ((1, 90, 2), (90, 330))):
        cam = maps(shape)
        run_upsample_cam(cuda, cam, size, 90)
        check(cuda, CAM_MASK._cam_mask, (cam, *size, 2, 1000, True), (shape, size))
        assert all(launch.shared_bytes <= 96 << 10 for launch in cuda.launches)


@slow
@cc_of_ptx
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_maps_every_dtype_and_rule(cuda, dtype, cc):
    for shape, size in MAP_SIZES:
        cam = maps(shape, dtype)
        run_upsample_cam(cuda, cam, size, cc)
        run_cam_mask(cuda, cam, size, cc)
        run_epsilon_map(cuda, cam, size, cc, rules=range(4))
    run_epsilon_map(cuda, without_evidence().to(dtype), (9, 12), cc, rules=range(4))


def test_golden_masks_and_steps(cuda, golden):
    g = golden("pgd_step")
    scalars = (0.0, 0.0, ALPHA, 0.0, 1.0)
    out, _ = cuda(PGD_STEP._pgd_step, g["x_adv"], g["grad"], g["x"], g["eps"].expand(g["x"].shape), *scalars)
    assert torch.equal(bits_of(out), bits_of(g["out"]))


def sixteen_byte_accesses(report) -> set[str]:
    return {re.sub(r"^@\S+\s+", "", m["instr"]).split()[0] for m in report["mem"] if "global" in m["instr"]}


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=["grad float32", "grad bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["x float32", "x bfloat16"])
@pytest.mark.parametrize("form", ["float", "(N,1,H,W)", "PackedEpsilon M=1"])
def test_every_access_to_an_image_is_16_bytes_and_full(cuda, dtype, grad_dtype, form):
    case = ((2, 3, 32, 32), "contiguous", form, grad_dtype, torch.float32)
    x_adv, grad, x, eps = image_inputs(case, dtype)
    _, (report,) = cuda(PGD_STEP._pgd_step_, x_adv, grad, x, *eps, ALPHA, 0.0, 1.0, stats=True)
    wide = [m for m in report["mem"] if re.search(r"global(\.\w+)*\.v[24]\.", m["instr"])]
    moved = sum(m["bytes"] for m in wide)
    # With gradients of the images' type eps comes in runs too, once for each channel; sixteen bytes are half of what
    # a thread with 16 bytes of bfloat16 reads.
    of_eps = 4 * x.numel() if form == "(N,1,H,W)" and dtype == grad_dtype else 0
    assert moved == 3 * x.nbytes + grad.nbytes + of_eps, "all of x_adv, x, grad and the result, once"
    halves = [m for m in wide if m["sector_efficiency"] != 1]
    assert sum(m["bytes"] for m in halves) == (of_eps if dtype == torch.bfloat16 else 0)
    assert all(m["sectors_per_request"] == 16 for m in wide if m not in halves)
    assert report["shared_bank_conflict_extra"] == 0


# name, of a kernel's threads and of shared memory: what the SMs of an architecture hold.
SM_THREADS = {80: 2048, 90: 2048, 100: 2048, 120: 1536}
SM_SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
SM_BLOCKS = {80: 32, 90: 32, 100: 32, 120: 24}


def occupancy(arch: int, registers: int, threads: int, shared: int) -> float:
    """Share of an SM's threads that can be resident. Registers come in units of 8 a thread, 65536 an SM."""
    by_registers = 65536 // (-(-registers // 8) * 8 * 32) // (threads // 32)
    # cuobjdump counts the kilobyte that the system takes of every block, but not on sm_80, nor where no other is taken.
    by_shared = SM_SHARED[arch] // (shared + 1024 if arch < 90 else max(shared, 1024))
    return min(SM_THREADS[arch] // threads, by_registers, by_shared, SM_BLOCKS[arch]) * threads / SM_THREADS[arch]


def instructions_of(kernel: str) -> tuple[str, ...]:
    """What a kernel's machine code must hold."""
    if re.search("pgd_step|project_linf|eps_step|uniform_start|bank_start", kernel):
        return r"LDG\.E\.(\w+\.)*128", r"STG\.E\.(\w+\.)*128"
    # Lanes of a warp that count the same colour or digit are added up by the instruction, not one after the other.
    if re.search(r"(cam_mask|epsilon_map)_kernelI[fd]Li[12]E", kernel):
        return (r"ATOMS\.POPC\.INC",)
    return ()


def test_machine_code(cuda, capsys):
    """No spills nor local memory, 16-byte accesses, registers for 75% of an SM's threads (float64: 37.5%)."""
    toolkit = setup_module_of().find_toolkit()
    cuobjdump, nvdisasm = tool("cuobjdump", toolkit), tool("nvdisasm", toolkit)
    library = next(iter((ROOT / "part_fast").glob("_C_cuda*.so")), None)
    if library is None:
        pytest.skip("part_fast._C_cuda is not built: PART_FAST_CUDA=1 make build")
    if nvdisasm is None:
        pytest.skip("no nvdisasm, in the CUDA toolkit or in Triton")
    newest = max(path.stat().st_mtime for path in [*ROOT.glob("csrc/*.cu*"), *ROOT.glob("csrc/*.h")])
    if library.stat().st_mtime < newest:
        pytest.skip("part_fast._C_cuda is older than csrc: make build")
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(nvdisasm).parent), os.environ.get("PATH", "")])}

    def read(*options: str) -> str:
        return subprocess.run(
            [cuobjdump, *options, library], capture_output=True, text=True, check=True, env=environment
        ).stdout

    table, problems, archs, names = [], [], set(), set()
    for part in re.split(r"^Fatbin elf code:\n", read("-res-usage"), flags=re.MULTILINE)[1:]:
        arch = int(re.search(r"arch = sm_(\d+)", part)[1])
        archs.add(arch)
        found = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", part)
        for name, registers, stack, shared, local in found:
            names.add(name)
            kernel = unhashed(name)
            share = occupancy(arch, int(registers), cuda.threads(kernel), int(shared))
            table.append((kernel, arch, int(registers), int(stack) + int(local), int(shared), share))
    looked_at = {name for name in names if instructions_of(name)}

    def code_of(arch: int) -> tuple[int, list[str]]:
        # All functions: with -fun, cuobjdump takes three times as long for two thirds of them.
        functions = re.split(r"^\s*Function : ", read("-sass", "-arch", f"sm_{arch}"), flags=re.MULTILINE)[1:]
        return arch, [function for function in functions if function.split()[0] in looked_at]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for arch, functions in pool.map(code_of, sorted(archs)):
            assert len(functions) == len(looked_at), arch
            for function in functions:
                name = unhashed(function.split()[0])
                for instruction in instructions_of(name):
                    if not re.search(instruction, function):
                        problems.append((name, arch, f"no {instruction}"))
    for kernel, arch, registers, stack, _, share in table:
        # Those that compute in float64 have twice the registers to hold.
        least = 0.375 if re.search(r"kernelId", kernel) else 0.75
        if stack or share < least:
            problems.append((kernel, arch, f"{registers} registers, {stack} bytes of stack, occupancy {share:.0%}"))
    with capsys.disabled():
        print(f"\n{'kernel':58}  arch  registers  stack  shared  occupancy")
        for kernel, arch, registers, stack, shared, share in sorted(table):
            print(f"{readable(kernel):58}  {arch:4}  {registers:9}  {stack:5}  {shared:6}  {share:8.0%}")
    assert not problems, problems
    assert archs, "no machine code in the library"
    if missing := set(SASS_ARCHS) - archs:
        pytest.skip(f"the library holds no code for sm_{', sm_'.join(map(str, sorted(missing)))}")


def readable(kernel: str) -> str:
    """Operation, element type and constants of a mangled kernel name."""
    name = re.search(r"\d([a-z_]+_kernel)I", kernel)
    types = {"f": "float", "d": "double", "N3c104HalfE": "half", "N3c108BFloat16E": "bfloat16"}
    argument = re.search(r"_kernelI(f|d|N3c10\d\w+?E)((?:Li\d+E)*)", kernel)
    constants = re.findall(r"Li(\d+)E", argument[2])
    return f"{name[1]}<{', '.join([types[argument[1]], *constants])}>"


def traffic_cases():
    """(shape, what, op, arguments, least bytes): every op at the shapes that matter."""
    for n, c, h, w, of in ((128, 3, 32, 32, 128), (128, 3, 64, 64, 128), (4, 3, 224, 224, 256)):
        shape = (n, c, h, w)
        for dtype, grad_dtype in itertools.product((torch.float32, torch.bfloat16), repeat=2):
            for form in ("float", "(N,1,1,1)", "(N,1,H,W)", "(N,C,H,W)", "PackedEpsilon M=1"):
                if (dtype != grad_dtype and form != "(N,1,H,W)") or (form == "(N,1,1,1)" and dtype != torch.float32):
                    continue
                x_adv, grad, x, eps = image_inputs((shape, "contiguous", form, grad_dtype, torch.float32), dtype)
                of_eps = 0 if eps[0] is None else memory(eps[0]).nbytes
                what = f"x {dtype}, grad {grad_dtype}, eps {form}".replace("torch.", "")
                least = 3 * x.nbytes + grad.nbytes + of_eps
                yield shape, of, what, PGD_STEP._pgd_step, (x_adv, grad, x, *eps, ALPHA, 0.0, 1.0), least
                if dtype == grad_dtype and form in ("float", "(N,1,H,W)"):
                    least = 3 * x.nbytes + of_eps
                    yield (
                        shape,
                        of,
                        what.split(", grad")[0] + f", eps {form}",
                        PROJECT._project_linf,
                        (x_adv, x, *eps),
                        least,
                    )
        x_adv, grad, x, eps = image_inputs(
            (shape, "channels_last", "(N,1,H,W)", torch.float32, torch.float32), torch.float32
        )
        least = 4 * x.nbytes + memory(eps[0]).nbytes
        yield (
            shape,
            of,
            "channels_last, eps (N,1,H,W)",
            PGD_STEP._pgd_step,
            (x_adv, grad, x, *eps, ALPHA, 0.0, 1.0),
            least,
        )
        arguments = (grad.clone(memory_format=torch.preserve_format), x_adv, grad, x, *eps, ALPHA, 0.0, 1.0)
        least = 7 * x.nbytes + memory(eps[0]).nbytes
        yield shape, of, "channels_last, eps (N,1,H,W)", PGD_STEP._pgd_step_bwd, arguments, least
        side = h // 4 if h < 224 else 7
        cam = torch.rand(n, side, side)
        pixels = n * h * w
        yield shape, of, f"from {side}x{side}", UPSAMPLE._upsample_cam, (cam, h, w), cam.nbytes + 4 * pixels
        grad_out = torch.randn(n, h, w)
        least = 2 * cam.nbytes + 4 * pixels
        yield shape, of, f"to {side}x{side}", UPSAMPLE._upsample_cam_bwd, (grad_out, cam), least
        for name, rule, k, channels in (
            ("zscore", 0, 0, 1),
            ("released", 1, 0, 3),
            ("quantile", 2, h * w // 3, 1),
            ("soft", 3, 0, 1),
        ):
            arguments = (cam, h, w, rule, k, EPS, EPS_LOW)
            what = f"{name}, from {side}x{side}"
            yield shape, of, what, EPSILON_MAP._epsilon_map, arguments, cam.nbytes + 4 * channels * pixels
            if name != "soft":
                least = cam.nbytes + channels * pixels // 8
                yield shape, of, f"{what}, packed", CAM_MASK._cam_mask, (cam, h, w, rule, k, True), least
    for n, k, side in ((16, 640, 8), (16, 512, 4), (16, 640, 16)):
        for dtype, channels_last in itertools.product((torch.float32, torch.bfloat16), (False, True)):
            for method, name in enumerate(CAM.METHODS):
                if method in (1, 2) and dtype != torch.float32:
                    continue
                activation, gradient = feature_maps((n, k, side, side), dtype, channels_last)
                what = f"{name}, {str(dtype)[6:]}, {'channels_last' if channels_last else 'contiguous'}"
                least = 2 * activation.nbytes + 4 * n * side * side
                yield (n, k, side, side), 128, what, CAM._cam, (activation, gradient, method), least


def sectors(accesses: list[dict]) -> str:
    """32-byte sectors per request of a warp; more than 1 of each used: lanes that read the same bytes."""
    moved = sum(m["sectors"] for m in accesses)
    share = sum(m["bytes"] for m in accesses) / (32 * moved)
    return f"{moved / sum(m['warp_requests'] for m in accesses):.1f} ({share:.2f} of each used)"


@slow
def test_traffic(cuda):
    """docs/traffic-cuda.csv: bytes moved by each launch over the least possible; each input is read once."""
    rows, worst = [], 0.0
    for shape, of, what, op, arguments, least in traffic_cases():
        result, (report,) = cuda(op, *arguments, stats=True, race=False, opt="-O1")
        footprint = [r for r in report["footprint"] if r["param"] == "extra"]
        moved = sum(r["read_bytes"] + r["written_bytes"] for r in footprint)
        accesses = [m for m in report["mem"] if re.search(r"\b(ld|st)\.(\w+\.)*global", m["instr"])]
        # The columns of docs/traffic-triton.csv, and two more.
        row = {
            "kernel": f"{op.name.strip('_')} {what}",
            "shape": "x".join(map(str, (of, *shape[1:]))),
            "images run": shape[0],
            "least bytes": least,
            "from memory / least": f"{moved / least:.2f}",
            "asked for / least": f"{sum(m['bytes'] for m in accesses) / least:.2f}",
            "sectors per load": sectors([m for m in accesses if re.search(r"\bld\.", m["instr"])]),
            "sectors per store": sectors([m for m in accesses if re.search(r"\bst\.", m["instr"])]),
            "shared bank conflicts": report["shared_bank_conflict_extra"],
            "shared requests": report["shared_requests"],
            "bank conflicts of atomics": report["shared_atomic_conflict_extra"],
            "atomics": report["shared_atomics"],
        }
        worst = max(worst, moved / least)
        rows.append(row)
        if op in (PGD_STEP._pgd_step, PROJECT._project_linf):
            # But for a float32 eps beside bfloat16 images, of which an access takes half and the next one the rest.
            halves = [m for m in accesses if ".v" in m["instr"] and m["sector_efficiency"] != 1]
            assert sum(m["bytes"] for m in halves) in (0, 4 * result.numel()), row
            assert moved <= 1.001 * least, row
        del result, report
    target = ROOT / "docs" / "traffic-cuda.csv"
    target.parent.mkdir(exist_ok=True)
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    assert worst <= 1.05
    assert [row for row in rows if row["shared bank conflicts"]] == []
    # Histograms of what the map holds; colours drawn at random take 2.15.
    assert [row for row in rows if row["bank conflicts of atomics"] > 2.2 * row["atomics"]] == []
