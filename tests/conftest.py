"""What the tests share: the backends, image layouts, eps forms and comparisons that every op is tested over.

A test that takes the `backend` fixture runs once for each backend. `triton` on CPU tensors needs a process of
its own, because Triton decides at import whether it interprets: `TRITON_INTERPRET=1 pytest -m interpret`.

Tests marked gpu need a CUDA device: `pytest -m gpu` runs them, those of the ops on its backends among them.
"""

import dataclasses
import functools
import os
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from fake_gpu import gpu  # noqa: F401 - a fixture
from safetensors.torch import load_file
from torch import Tensor

import part_fast
from part_fast import PackedEpsilon
from part_fast.config import TrainConfig
from part_fast.errors import MissingPackageError

# cuBLAS reads it when it is first used; without it torch refuses matrix products in deterministic mode.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    import tools.triton_guard  # noqa: F401 - an interpreted kernel cannot leave its tensors unseen

hypothesis.settings.register_profile(
    "default",
    # The interpreter takes milliseconds where a kernel takes microseconds.
    max_examples=2 if INTERPRETED else 25,
    deadline=None,
    derandomize=True,
    database=None,
    # The fixtures that meet a property test set process state alone, the same for every example.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "explore", hypothesis.settings.get_profile("default"), derandomize=False, max_examples=500
)
hypothesis.settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "thin(k): in the interpreter's process run every k-th parameter combination alone"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """An interpreted launch takes up to a second, so the widest tests run a part there. Their k shares no factor with
    the number of dtypes, layouts and so on, so that a part still meets each of them.

    With PART_FAST_TESTS_EACH=k the ops' tests on a GPU run with about each k-th of their parameters.
    """
    each = int(os.environ.get("PART_FAST_TESTS_EACH", "1"))
    if each > 1:
        thin_out(config, items, each)
    if not INTERPRETED:
        return
    seen: dict[str, int] = {}
    kept, dropped = [], []
    for item in items:
        mark = item.get_closest_marker("thin")
        if mark is None or item.get_closest_marker("interpret") is None:
            kept.append(item)
            continue
        test = item.nodeid.partition("[")[0]
        seen[test] = seen.get(test, -1) + 1
        (dropped if seen[test] % mark.args[0] else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def thin_out(config: pytest.Config, items: list[pytest.Item], each: int) -> None:
    """Of the ops' tests on a GPU: the first of each test and backend, and those whose hash is a multiple of `each`."""
    seen: set[tuple[str, str]] = set()
    kept, dropped = [], []
    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")  # type: ignore[attr-defined]
        if item.get_closest_marker("gpu") is None or not isinstance(backend, Backend):
            kept.append(item)
            continue
        test = item.nodeid.partition("[")[0], backend.name
        chosen = test not in seen or zlib.crc32(item.nodeid.encode()) % each == 0
        seen.add(test)
        (kept if chosen else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """A file of tests that cannot be imported since part_fast needs a package that is missing is skipped."""
    report = yield
    raised = None if report.call.excinfo is None else report.call.excinfo.value.__cause__
    if isinstance(raised, MissingPackageError):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {raised}")
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_report_header() -> list[str]:
    lines = [f"part_fast: torch {torch.__version__}, CPU backends {', '.join(part_fast.available_backends())}"]
    if not torch.cuda.is_available():
        lines.append("no CUDA device: backend cuda, and triton on one, are not run here")
    return lines


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order: in another a rounding may turn a ReLU, which moves gradients by more than a tolerance."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """The same random numbers in every run; fresh memory holds NaN or the largest integer, so the unwritten shows."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@dataclasses.dataclass(frozen=True)
class Backend:
    name: str
    device: str

    @property
    def exact(self) -> bool:
        """Whether masks are promised equal to the reference's in every value; the others may sum in float32."""
        return self.name in ("reference", "cpp")

    @property
    def interpreted(self) -> bool:
        return self.name == "triton" and self.device == "cpu"


CPU_BACKENDS = [
    pytest.param(Backend("reference", "cpu"), id="reference"),
    pytest.param(Backend("cpp", "cpu"), id="cpp"),
    pytest.param(Backend("triton", "cpu"), id="triton", marks=pytest.mark.interpret),
]
GPU_BACKENDS = [
    pytest.param(Backend(name, "cuda"), id=f"{name}-gpu", marks=pytest.mark.gpu)
    for name in ("reference", "triton", "cuda")
    if name in part_fast.available_backends("cuda")
]


@pytest.fixture(params=CPU_BACKENDS + GPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The backend that every op of the test runs on."""
    with part_fast.backend(request.param.name):
        yield request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device a test runs on, for tests of what is above the ops."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Tensor]]:
    return lambda name: load_file(ROOT / "tests" / "golden" / f"{name}.safetensors")


DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def image_shapes(backend: Backend, *case: object) -> list[tuple[int, int, int, int]]:
    """(N,C,H,W) with 1, 31, 33 and 1023 elements, H or W of 1, nothing at all, and an ordinary one.

    An interpreted kernel takes milliseconds: there each `case` gets nothing at all and one shape, in turn.
    """
    if backend.interpreted:
        some = [(2, 3, 5, 7), (2, 2, 4, 4), (1, 1, 33, 31), (2, 3, 11, 1)]
        return [some[zlib.crc32(repr(case).encode()) % len(some)], (0, 3, 4, 4)]
    odd = [(1, 1, 1, 1), (1, 1, 1, 31), (1, 1, 33, 1), (1, 3, 11, 1), (1, 1, 33, 31), (3, 2, 9, 1)]
    return [(2, 3, 5, 7), (4, 3, 16, 16), *odd, (0, 3, 4, 4), (2, 3, 0, 4)]


LAYOUTS = ("contiguous", "channels_last", "offset", "offset_channels_last")
layouts = pytest.mark.parametrize("layout", LAYOUTS)
_PAD = 3  # elements: no 16-byte access is aligned


def lay(value: Tensor, layout: str) -> Tensor:
    """A copy of (N,C,H,W) in that layout; `offset` ones lie inside a longer buffer of NaN."""
    n, c, h, w = value.shape
    pad = _PAD if layout.startswith("offset") else 0
    memory = torch.full((value.numel() + 2 * pad,), float("nan"), dtype=value.dtype, device=value.device)
    inside = memory[pad : pad + value.numel()]
    laid = inside.view(n, h, w, c).permute(0, 3, 1, 2) if layout.endswith("channels_last") else inside.view(n, c, h, w)
    laid.copy_(value)
    return laid


def neighbours_untouched(laid: Tensor) -> bool:
    """Whether the memory around a tensor from `lay` is still NaN."""
    memory = laid.new_empty(0).set_(laid.untyped_storage())
    start = laid.storage_offset()
    return bool(memory[:start].isnan().all() and memory[start + laid.numel() :].isnan().all())


def assert_format(result: Tensor, like: Tensor) -> None:
    """`result` is laid out in memory as `like` is, element for element (an empty one has nothing to lay out)."""
    if like.numel() == 0:
        return
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if like.is_contiguous(memory_format=memory_format):
            assert result.is_contiguous(memory_format=memory_format), (result.stride(), like.stride())


# Images in the ways that people slice them, none contiguous or channels_last.
STRIDED = {
    "gray, expanded": lambda n, c, h, w: torch.rand(n, 1, h, w).expand(n, c, h, w),
    "one image, expanded": lambda n, c, h, w: torch.rand(1, c, h, w).expand(n, c, h, w),
    "crop": lambda n, c, h, w: torch.rand(n, c, h + 3, w + 5)[..., 1 : h + 1, 2 : w + 2],
    "crop of channels_last": lambda n, c, h, w: torch.rand(n, h + 3, w + 5, c)[:, 1 : h + 1, :w].permute(0, 3, 1, 2),
    "RGB of RGBA": lambda n, c, h, w: torch.rand(n, c + 1, h, w)[:, :c],
    "every second image": lambda n, c, h, w: torch.rand(2 * n, c, h, w)[::2],
    "every second column": lambda n, c, h, w: torch.rand(n, c, h, 2 * w)[..., ::2],
    "mirrored axes": lambda n, c, h, w: torch.rand(n, c, w, h).transpose(2, 3),
}


def strided(kind: str, shape: tuple[int, int, int, int], device: str = "cpu") -> Tensor:
    """Images in [0,1] of that kind and shape, with their strides."""
    value = STRIDED[kind](*shape)
    assert not any(value.is_contiguous(memory_format=f) for f in (torch.contiguous_format, torch.channels_last))
    return move(value, device)


def move(value: Tensor, device: str) -> Tensor:
    """On the device with the same strides, and elements that share memory still share it: `.to` makes them apart."""
    if device == "cpu" or value.layout != torch.strided:
        return value.to(device)
    memory = value.new_empty(0).set_(value.untyped_storage()).to(device)
    moved = memory.as_strided(value.size(), value.stride(), value.storage_offset())
    return moved.requires_grad_(value.requires_grad)


EPS = 8 / 255
EPS_LOW = 3 / 255
EPS_FORMS = (
    "float",
    "()",
    "(N,1,1,1)",
    "(N,1,H,W)",
    "(N,C,H,W)",
    "(N,C,H,W) channels_last",
    "(1,C,1,1)",
    "(C,1,1)",
    "(H,W)",
    "(N,1,H,W) strided",
    "PackedEpsilon M=1",
    "PackedEpsilon M=C",
)
TENSOR_EPS_FORMS = tuple(form for form in EPS_FORMS if form.startswith("("))
eps_forms = pytest.mark.parametrize("eps_form", EPS_FORMS)

# (dtype, layout, eps form): each two of them together once, a quarter of all combinations.
PAIRS = [
    pytest.param(dtype, layout, form, id=f"{name}-{layout}-{form}")
    for place, form in enumerate(EPS_FORMS)
    for turn, layout in enumerate(LAYOUTS)
    for name, dtype in [list(DTYPES.items())[(place + turn) % len(DTYPES)]]
]
pairs = pytest.mark.parametrize(("dtype", "layout", "eps_form"), PAIRS)


def make_eps(
    form: str, shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32
) -> tuple[float | Tensor | PackedEpsilon, Tensor]:
    """(an eps argument of that form, its value for each pixel as float64 (N,C,H,W)); some pixels have eps 0."""
    n, c, h, w = shape
    if form == "float":
        return EPS, torch.full(shape, EPS, dtype=torch.float64, device=device)
    if form.startswith("PackedEpsilon"):
        mask = torch.rand(n, 1 if form.endswith("1") else c, h, w, device=device) < 0.4
        high, low = np.float32(EPS), np.float32(EPS_LOW)
        dense = torch.where(mask, float(high), float(low)).double()
        return PackedEpsilon.pack(mask, EPS, EPS_LOW), dense.expand(shape)
    sizes = {"": (), "N": n, "C": c, "H": h, "W": w, "1": 1}
    names = form.partition(")")[0].strip("(")
    dims = [sizes[name] for name in names.split(",")] if names else []
    eps = (torch.rand(dims, device=device) * 2 * EPS).to(dtype)
    eps = torch.where(torch.rand(dims, device=device) < 0.1, torch.zeros_like(eps), eps)
    if form.endswith("channels_last"):
        eps = eps.contiguous(memory_format=torch.channels_last)
    elif form.endswith("strided"):
        wide = eps.new_full((n, 2, h, 2 * w), float("nan"))
        wide[:, 1:, :, ::2] = eps
        eps = wide[:, 1:, :, ::2]
    return eps, eps.double().expand(shape)


def make_images(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, dense_eps: Tensor, grad_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_adv, grad, x): pixels inside the ball, outside it and exactly on its bound; x also exactly 0 and 1;
    gradients also 0, -0, NaN and infinite."""
    compute = compute_dtype(dtype)
    x = torch.rand(shape, dtype=torch.float64, device=device)
    corner = torch.rand(shape, device=device)
    x = torch.where(corner < 0.1, 0.0, torch.where(corner > 0.9, 1.0, x)).to(dtype)
    eps = dense_eps.to(compute)
    moved = (torch.rand(shape, dtype=compute, device=device) * 3 - 1.5) * EPS
    place = torch.rand(shape, device=device)
    moved = torch.where(place < 0.2, eps, torch.where(place > 0.8, -eps, moved))
    x_adv = (x.to(compute) + moved).to(dtype)
    grad = torch.randn(shape, device=device)
    special = torch.randint(0, 20, shape, device=device)
    for number, value in enumerate((0.0, -0.0, float("nan"), float("inf"), -float("inf"))):
        grad = torch.where(special == number, value, grad)
    return x_adv, grad.to(grad_dtype or dtype), x


def with_nan(value: Tensor, share: float = 0.15) -> Tensor:
    """A copy with NaN in some places."""
    nan = torch.full_like(value, float("nan"))
    return torch.where(torch.rand(value.shape, device=value.device) < share, nan, value)


def assert_same(actual: Tensor, expected: Tensor, what: object = "") -> None:
    """Equal in every value, NaN where NaN is, and in shape, dtype and device."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, the sign of zero included."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.view(whole), expected.view(whole))


def packed(n: int = 2, m: int = 1, size: tuple[int, int] = (4, 4), device: str = "cpu") -> PackedEpsilon:
    return PackedEpsilon.pack(torch.ones(n, m, *size, dtype=torch.bool, device=device), EPS, 0.0)


# Rows of (value, error, what the message says it got) for an argument of a call on images (2,3,4,4).
BAD_IMAGES = [
    (None, TypeError, "NoneType"),
    (np.zeros((2, 3, 4, 4), np.float32), TypeError, "ndarray"),
    (torch.zeros(2, 3, 4, 4).to_sparse(), TypeError, "torch.sparse_coo"),
    (torch.zeros(2, 3, 4, 4, dtype=torch.int64), TypeError, "torch.int64"),
    (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), TypeError, "torch.uint8"),
    (torch.zeros(2, 3, 4, 4, dtype=torch.bool), TypeError, "torch.bool"),
    (torch.zeros(2, 3, 4, 4, dtype=torch.complex64), TypeError, "torch.complex64"),
    (torch.zeros(3, 4, 4), ValueError, "(3, 4, 4)"),
    (torch.zeros(2, 1, 3, 4, 4), ValueError, "(2, 1, 3, 4, 4)"),
]
UNLIKE_IMAGES = [
    (torch.zeros(1, 3, 4, 4), ValueError, "(1, 3, 4, 4)"),
    (torch.zeros(2, 3, 4, 5), ValueError, "(2, 3, 4, 5)"),
    (torch.zeros(2, 3, 4, 4, device="meta"), ValueError, "meta"),
]
BAD_EPS = [
    (None, TypeError, "NoneType"),
    ("8/255", TypeError, "str"),
    (True, TypeError, "bool"),
    (-1e-9, ValueError, "-1e-09"),
    (float("nan"), ValueError, "nan"),
    (float("inf"), ValueError, "inf"),
    (torch.ones(2, 3, 4, 4, dtype=torch.uint8), TypeError, "torch.uint8"),
    (torch.ones(2, 3, 4, 4, dtype=torch.int32), TypeError, "torch.int32"),
    (torch.ones(2), ValueError, "(2,)"),
    (torch.ones(4), ValueError, "(4,)"),  # N or W, either way what was meant is not said
    (torch.ones(4, 1), ValueError, "(4, 1)"),
    (torch.ones(3, 1, 4, 4), ValueError, "(3, 1, 4, 4)"),
    (torch.ones(2, 2, 4, 4), ValueError, "(2, 2, 4, 4)"),
    (torch.ones(1, 2, 3, 4, 4), ValueError, "(1, 2, 3, 4, 4)"),
    (torch.ones(2, 3, 4, 4, device="meta"), ValueError, "meta"),
    (torch.ones(4, 4).to_sparse(), TypeError, "torch.sparse_coo"),
    (packed(n=3), ValueError, "(3, 1, 4, 4)"),
    (packed(m=2), ValueError, "(2, 2, 4, 4)"),
    (packed(size=(2, 8)), ValueError, "(2, 1, 2, 8)"),
    (packed(device="meta"), ValueError, "meta"),
]
# The same for maps (2,3,4).
BAD_MAPS = [
    (None, TypeError, "NoneType"),
    ([[0.0]], TypeError, "list"),
    (torch.zeros(2, 3, 4).to_sparse(), TypeError, "torch.sparse_coo"),
    (torch.zeros(2, 3, 4, dtype=torch.int64), TypeError, "torch.int64"),
    (torch.zeros(2, 3, 4, dtype=torch.bool), TypeError, "torch.bool"),
    (torch.zeros(3, 4), ValueError, "(3, 4)"),
    (torch.zeros(2, 1, 3, 4), ValueError, "(2, 1, 3, 4)"),
    (torch.zeros(2, 0, 4), ValueError, "(2, 0, 4)"),
    (torch.zeros(2, 3, 0), ValueError, "(2, 3, 0)"),
    (torch.zeros(1, 3, 4).expand(2, 3, 4), ValueError, "strides (0, 4, 1)"),
    (torch.zeros(2, 3, 1).expand(2, 3, 4), ValueError, "strides (3, 1, 0)"),
]
BAD_SIZES = [
    (None, TypeError, "None"),
    ("32", TypeError, "'32'"),
    ((32,), TypeError, "(32,)"),
    ((3, 32, 32), TypeError, "(3, 32, 32)"),
    ((32.0, 32), TypeError, "float"),
    ((True, 32), TypeError, "bool"),
    ((-1, 32), ValueError, "-1"),
    ((2, 32), ValueError, "(2, 32)"),
    ((32, 3), ValueError, "(32, 3)"),
    (3, ValueError, "(3, 3)"),
]


def on_device(value: object, device: str) -> object:
    """A bad argument, or one in a pair, moved to where the good ones are, unless its device is what is bad."""
    if isinstance(value, tuple):
        return tuple(on_device(each, device) for each in value)
    if not isinstance(value, (Tensor, PackedEpsilon)) or value.device.type != "cpu":
        return value
    return move(value, device) if isinstance(value, Tensor) else value.to(device)


def assert_error(call: Callable[[], object], argument: str, error: type[Exception], got: str) -> None:
    """Just that error, in one line that begins with the argument's name and says what it got."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    kind = type(caught.value)
    # An index out of range must stay an IndexError itself, at which a for loop ends.
    assert kind is error is IndexError or kind.__bases__ == (part_fast.UsageError, error)
    assert message.startswith(f"{argument} must ")
    assert got in message
    assert "\n" not in message


def repeated_halfword_adds(ptx: str) -> list[tuple[str, str]]:
    """(kernel, constant) where a kernel has two additions of one constant to pairs of 16-bit integers.

    ptxas of CUDA 12.9 and 13.0 can turn the second of them into an addition of 0 on sm_90 (triton issue 11581), which
    no run of the PTX shows.
    """
    found = []
    for part in re.split(r"\.entry\s+", ptx)[1:]:
        kernel = re.match(r"\w+", part)[0]  # type: ignore[index]
        held = dict(re.findall(r"\bmov\.[bus]32\s+(%\w+),\s*(-?\d\w*);", part))
        seen = set()
        for operands in re.findall(r"\badd\.[us]16x2\s+%\w+,\s*([^;]+);", part):
            for operand in operands.replace(" ", "").split(","):
                constant = held.get(operand, operand)
                if not constant.startswith("%"):
                    value = int(constant, 0) % 2**32
                    if value in seen:
                        found.append((kernel, constant))
                    seen.add(value)
    return found


def keys_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Bicubic enlarging of one axis as a float64 matrix (size_out, size_in), from Keys' kernel with a = -0.5."""
    matrix = np.zeros((size_out, size_in))
    for row in range(size_out):
        centre = ((2 * row + 1) * size_in - size_out) / (2 * size_out)  # exact where it is a whole number
        for column in range(size_in):
            t = abs(column - centre)
            if t < 1:
                matrix[row, column] = 1.5 * t**3 - 2.5 * t**2 + 1
            elif t < 2:
                matrix[row, column] = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return matrix / matrix.sum(1, keepdims=True)


def upsampled(cam: Tensor, size: tuple[int, int]) -> np.ndarray:
    """`upsample_cam` in float64 numpy, map by map."""
    result = []
    for one in cam.double().cpu().numpy():
        spread = one.max() - one.min()
        scaled = (one - one.min()) / spread if spread > 0 else np.zeros_like(one)
        result.append(keys_matrix(one.shape[0], size[0]) @ scaled @ keys_matrix(one.shape[1], size[1]).T)
    return np.array(result).reshape(len(cam), *size)


def map_sizes(backend: Backend, *case: object) -> list[tuple[tuple[int, int, int], tuple[int, int]]]:
    """((N,h,w), (H,W)): whole and broken ratios, the identity, single rows and pixels, no image at all.

    In the interpreter each `case` gets no image at all and one of the others, in turn, as in `image_shapes`.
    """
    if backend.interpreted:
        some = [
            ((2, 4, 4), (9, 8)),
            ((1, 1, 3), (1, 11)),
            ((1, 3, 3), (3, 3)),
            ((1, 4, 4), (32, 32)),
            ((1, 5, 7), (30, 44)),
        ]
        return [some[zlib.crc32(repr(case).encode()) % len(some)], ((0, 4, 4), (8, 8))]
    usual = [((4, 4, 4), (32, 32)), ((2, 8, 8), (32, 32)), ((2, 5, 7), (30, 44)), ((3, 4, 4), (28, 28))]
    odd = [((2, 3, 3), (31, 33)), ((2, 1, 5), (1, 31)), ((2, 5, 1), (33, 1)), ((2, 1, 1), (5, 6)), ((1, 2, 9), (7, 9))]
    return [*usual, *odd, ((2, 6, 6), (6, 6)), ((0, 4, 4), (8, 8)), ((1, 16, 16), (65, 130))]


# An epoch of AT and one of PART, which take a second or so; on the CPU, also where there is a GPU.
TINY_RUN = TrainConfig(
    device="cpu",
    method="part",
    epochs=2,
    warmup_epochs=1,
    batch_size=32,
    train_size=64,
    test_size=20,
    steps=1,
    lr=0.05,
    pgd_test_size=0,
)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAttack with few steps of each attack."""
    pyautoattack = pytest.importorskip("pyautoattack", reason="the package pyautoattack is not installed")
    run = pyautoattack.AutoAttack.run_standard_evaluation

    def short(self: Any, *args: object, **kwargs: object) -> Any:
        for attack in (self.apgd, self.apgd_targeted, self.fab):
            attack.n_iter, attack.n_restarts = 2, 1
        self.square.n_queries = 3
        return run(self, *args, **kwargs)

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", short)


@pytest.fixture
def quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    make_runs_quick(monkeypatch)


def make_runs_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a tiny run's time is unpacking the demo set and drawing curves: once is enough, and none."""
    import part_fast.evaluation.trained
    import part_fast.training.loop
    from part_fast.report import figures

    for module in (part_fast.training.loop, part_fast.evaluation.trained):
        monkeypatch.setattr(module, "load", load_once)
    monkeypatch.setattr(figures, "draw_curves", lambda path, rows, title: path.write_bytes(b"drawn"))


@functools.lru_cache
def load_once(*arguments: object) -> object:
    """`part_fast.data.load`, each data set of a process unpacked once."""
    from part_fast.data.catalogue import load

    return load(*arguments)  # type: ignore[arg-type]
