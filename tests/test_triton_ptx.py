"""The Triton kernels without a GPU: their compiled PTX run on the CPU by tools/ptx_cpu, their SASS read.

The launch code is the real one: the launchers of part_fast/kernels are called on CPU tensors, and the fixture `ptx`
puts itself in the place of `Launch.run`, so that grid, arguments, constexprs and options are those of a GPU.
Out-of-bounds and misaligned accesses, races and deadlocks raise; what is not written stays NaN. It cannot show speed.
"""

import dataclasses
import importlib
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    EPS,
    EPS_LOW,
    INTERPRETED,
    ROOT,
    assert_same,
    lay,
    make_eps,
    make_images,
    repeated_halfword_adds,
    with_nan,
)
from tools import ptx_cpu
from tools.ptx_cpu import memory
from torch import Tensor

import part_fast.ops  # noqa: F401 - so that sys.modules has the ops
from part_fast.ops.packed_epsilon import eps_arguments

# Modules, not the functions of these names.
CAM, CAM_MASK, EPSILON_MAP, PGD_STEP, PROJECT, UPSAMPLE, UNIFORM, BANK, EPS_STEP = (
    sys.modules[f"part_fast.ops.{name}"]
    for name in (
        "cam", "cam_mask", "epsilon_map", "pgd_step", "project_linf", "upsample_cam",
        "uniform_start", "bank_start", "eps_step",
    )
)  # fmt: skip
ALPHA = 2 / 255
SCALARS = (ALPHA, 0.0, 1.0)
NVIDIA = (80, 90, 100, 120)
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64", torch.uint8: "*u8",
    torch.int8: "*i8", torch.int64: "*i64",
}  # fmt: skip

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels cannot be compiled in a TRITON_INTERPRET=1 process")


def test_offsets_have_64_bits_where_the_end_of_the_last_block_needs_them():
    """The end of the last block may lie beyond the images, and 32 bits beyond 2^31 - 1 are negative: no mask then."""
    images = importlib.import_module("part_fast.kernels.images")
    for dtype, block in ((torch.float32, 512), (torch.float16, 1024)):
        for numel in (2**31 + 5, 2**31 - 1, 2**31 - block, 2**31 - 1 - block, 2**30):
            constants = images.walk(
                torch.empty((1, 1, 1, numel), dtype=dtype, device="meta"), None, EPS, EPS_LOW, dtype.itemsize
            ).constants
            assert constants["BLOCK"] == block
            end = -(-numel // block) * block  # in the kernels: start + BLOCK, compared with the number of elements
            bits = 64 if constants["INDEX"] is triton.language.int64 else 32
            assert end < 2 ** (bits - 1), (dtype, numel)
    assert bits == 32  # of few, whose arithmetic is quicker


def source_of(launch):
    """(what triton.compile takes, the arguments left after specialisation), as Triton's own launcher specialises."""
    names = [parameter.name for parameter in launch.kernel.params]
    annotations = {parameter.name: parameter.annotation_type for parameter in launch.kernel.params}
    general = {parameter.name for parameter in launch.kernel.params if parameter.do_not_specialize}
    assert names[: len(launch.arguments)] == list(launch.arguments), "arguments are given in the kernel's order"
    signature, constants, attributes, passed = {}, dict(launch.constants), {}, []
    for place, (name, value) in enumerate(launch.arguments.items()):
        if value is None or (isinstance(value, int) and value == 1 and name not in general):
            constants[name] = value
            continue
        if isinstance(value, Tensor):
            signature[name], sixteen = POINTERS[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float) or name in general:
            signature[name], sixteen = annotations[name], False
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            sixteen = value % 16 == 0
        if sixteen:
            attributes[(place,)] = [["tt.divisibility", 16]]
        passed.append(value)
    signature = {name: signature.get(name, "constexpr") for name in names}
    source = triton.compiler.ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return source, passed


_compiled = {}


def compiled(launch, cc=80, backend="cuda"):
    """The launch's kernel for sm_<cc>, or for AMD's gfx942."""
    source, _ = source_of(launch)
    key = source.hash(), cc, backend, launch.num_warps, launch.fuse
    if key not in _compiled:
        lanes = 32 if backend == "cuda" else 64
        target = triton.backends.compiler.GPUTarget(backend, cc, lanes)
        options = {"num_warps": launch.warps(lanes), "enable_fp_fusion": launch.fuse}
        _compiled[key] = triton.compile(source, target=target, options=options)
        if backend == "cuda":  # every kernel that any test compiles
            assert not repeated_halfword_adds(_compiled[key].asm["ptx"])
    return _compiled[key]


class Runner:
    """In the place of `Launch.run`: keeps the launches, and runs them on their PTX unless told not to."""

    def __init__(self):
        self.cc, self.execute, self.options = 80, True, {}
        self.launches, self.reports, self.kernels, self.twins = [], [], {}, {}

    def run(self, launch) -> None:
        self.launches.append(launch)
        if not self.execute or launch.programs == 0:
            return
        arguments = [memory(a) if isinstance(a, Tensor) else a for a in source_of(launch)[1]]
        compiled_ = compiled(launch, self.cc)
        text, name = compiled_.asm["ptx"], compiled_.metadata.name
        options = {"race": True, "seed": len(self.launches), **self.options}
        before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        while True:
            changed = with_exchanges(text, self.twins.get(text, ()))
            if changed not in self.kernels:
                # -O0: translating takes longer than running.
                self.kernels[changed] = ptx_cpu.Kernel(changed, name, opt="-O0")
            try:
                report = self.kernels[changed](
                    launch.programs, 32 * launch.num_warps, arguments, compiled_.metadata.shared, **options
                )
                self.reports.append(report)
                return
            except ptx_cpu.PtxError as error:
                store = re.search(r"shared-memory race.*instr: (.*st\.shared.*)", str(error))
                if store is None or launch.kernel.__name__ not in TWINS:
                    raise
                self.twins.setdefault(text, []).append(store[1].strip())
                for argument, was in zip(arguments, before, strict=True):
                    if isinstance(argument, Tensor):
                        argument.copy_(was)  # it stopped halfway


# In these kernels a tensor is summed over one dimension only; the warps that hold the same part of the result all
# store it, to the same place, where Triton changes its layout: a race to ptx_cpu, whatever is stored. A store that it
# names is run as an atomic exchange, of which two do not race with each other, but with any load that no barrier
# separates; and the result must be the same to the bit in another order.
TWINS = ("cam_kernel", "upsample_cam_bwd_kernel")


def with_exchanges(text: str, stores: list[str]) -> str:
    """The PTX with exchanges in the place of these stores to shared memory."""
    if not stores:
        return text
    text = re.sub(r"^\{$", "{\n.reg .b32 %old32;\n.reg .b64 %old64;", text, count=1, flags=re.MULTILINE)
    for store in dict.fromkeys(stores):
        # An offset of 0 is left out in some versions, and what ptx_cpu names has single spaces.
        predicate, bits, base, offset, values = re.fullmatch(
            r"(@!?%\w+ )?st\.shared(?:::cta)?(?:\.v\d)?\.b(\d+) \[ ?(%\w+) ?(?:\+ ?(\d+) ?)?\], \{?([^{}]*)\}?", store
        ).groups()
        exchange = f"{predicate or ''}atom.shared.exch.b{bits} %old{bits}"
        step = int(bits) // 8
        parts = [
            f"{exchange}, [{base}+{int(offset or 0) + i * step}], {value.strip()};"
            for i, value in enumerate(values.split(","))
        ]
        as_written = r"\s+".join(map(re.escape, f"{store};".split()))
        text, count = re.subn(as_written, "\n".join(parts), text)
        assert count, store
    return text


@pytest.fixture
def ptx(monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    from part_fast import kernels

    runner = Runner()
    monkeypatch.setattr(kernels.Launch, "run", lambda launch: runner.run(launch))
    return runner


@pytest.fixture
def launches(monkeypatch):
    """The launches of the calls made, none run."""
    from part_fast import kernels

    recorded = []
    monkeypatch.setattr(kernels.Launch, "run", lambda launch: recorded.append(launch))
    return recorded


def launcher(name: str):
    import importlib

    stem = name.rstrip("_").removesuffix("_bwd")
    return getattr(importlib.import_module(f"part_fast.kernels.{stem}"), name)


def images(shape, layout, eps_form, dtype, grad_dtype, eps_dtype=torch.float32):
    """(x_adv, grad, x, (eps, eps_high, eps_low)), with NaN and ties."""
    eps, dense = make_eps(eps_form, shape, "cpu", eps_dtype)
    x_adv, grad, x = make_images(shape, dtype, "cpu", dense, grad_dtype)
    x_adv, x = with_nan(x_adv, 0.02), with_nan(x, 0.02)
    x_adv, grad, x = (lay(value, layout) for value in (x_adv, grad, x))
    return x_adv, grad, x, eps_arguments(eps, x_adv)


def check_elementwise(ptx, shape, layout, eps_form, dtype, grad_dtype, eps_dtype=torch.float32, ops=None) -> None:
    """pgd_step, pgd_step_, project_linf and their backward, each compared with the reference, value for value."""
    x_adv, grad, x, eps = images(shape, layout, eps_form, dtype, grad_dtype, eps_dtype)
    grad_out = lay(torch.randn(shape).to(dtype), layout)
    calls = {
        "pgd_step": (PGD_STEP._reference, (x_adv, grad, x, *eps, *SCALARS)),
        "pgd_step_bwd": (PGD_STEP._reference_bwd, (grad_out, x_adv, grad, x, *eps, *SCALARS)),
        "project_linf": (PROJECT._reference, (x_adv, x, *eps)),
        "project_linf_bwd": (PROJECT._reference_bwd, (grad_out, x_adv, x, *eps)),
    }
    for name, (reference, arguments) in calls.items():
        if ops and name not in ops:
            continue
        expected, actual = reference(*arguments), launcher(name)(*arguments)
        pairs = zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]
        for one, other in pairs:
            assert_same(one, other, (name, shape, layout, eps_form, dtype, grad_dtype, ptx.cc))
    if ops is None or "pgd_step_" in ops:
        expected = PGD_STEP._reference(x_adv, grad, x, *eps, *SCALARS)
        assert launcher("pgd_step_")(x_adv, grad, x, *eps, *SCALARS) is None
        assert_same(x_adv, expected, ("pgd_step_", shape, layout, eps_form))


F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
STEP = ("pgd_step",)
# Every eps form, every layout, every storage type, both compute capabilities, whole tiles and tails.
COVERING = [
    (80, (2, 3, 32, 32), "contiguous", "(N,1,H,W)", F32, F32, F32, STEP),
    (90, (2, 3, 32, 32), "channels_last", "(N,C,H,W) channels_last", BF16, F32, F32, STEP),
    (80, (1, 1, 33, 31), "offset", "float", F16, BF16, F32, ("pgd_step", "pgd_step_")),
    (90, (1, 1, 1, 31), "contiguous", "(N,1,1,1)", F32, BF16, F32, STEP),
    (90, (2, 3, 31, 33), "contiguous", "PackedEpsilon M=1", BF16, BF16, F32, STEP),
    (80, (2, 3, 32, 32), "contiguous", "PackedEpsilon M=C", F32, F32, F32, ("pgd_step_bwd",)),
    (90, (2, 3, 16, 16), "channels_last", "PackedEpsilon M=1", F32, F32, F32, STEP),
    (90, (2, 3, 11, 13), "contiguous", "(N,1,H,W) strided", F32, F32, F16, ("pgd_step_bwd",)),
    (80, (2, 3, 32, 32), "contiguous", "(N,C,H,W)", F32, F32, F32, ("project_linf_bwd",)),
    (90, (1, 3, 11, 31), "offset_channels_last", "(1,C,1,1)", F64, F32, F64, ("project_linf",)),
]


def name_of(row) -> str:
    cc, shape, layout, eps_form, dtype, grad_dtype, *_ = row
    text = f"{row[-1][0]}-sm_{cc}-{shape}-{layout}-{eps_form}-{dtype}-{grad_dtype}"
    return text.replace("torch.", "").replace(" ", "")


@pytest.mark.parametrize("row", COVERING, ids=name_of)
def test_elementwise_ptx_equals_reference(ptx, row):
    ptx.cc, shape, layout, eps_form, dtype, grad_dtype, eps_dtype, ops = row
    check_elementwise(ptx, shape, layout, eps_form, dtype, grad_dtype, eps_dtype, ops)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "offset", "offset_channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 3, 31, 33), (1, 1, 33, 31)], ids=str)
def test_elementwise_ptx_equals_reference_everywhere(ptx, shape, layout):
    """Every eps form and every pair of storage types at once, for the forward; the backward in two types."""
    from conftest import EPS_FORMS

    for place, eps_form in enumerate(EPS_FORMS):
        ptx.cc = (80, 90)[place % 2]
        pairs = [(F32, F32), (F32, BF16), (BF16, F32), (F16, BF16)]
        dtype, grad_dtype = pairs[place % len(pairs)]
        check_elementwise(ptx, shape, layout, eps_form, dtype, grad_dtype)


def check_fast(ptx, shape, layout, eps_form, dtype, grad_dtype, eps_dtype=torch.float32) -> None:
    """uniform_start, bank_start, and eps_step_ with and without a bank, as the reference has them, value for value."""
    x_adv, grad, x, eps = images(shape, layout, eps_form, dtype, grad_dtype, eps_dtype)
    what = (shape, layout, eps_form, dtype, grad_dtype, ptx.cc)
    bank = torch.randint(-127, 128, (len(x) + 2, *shape[1:]), dtype=torch.int8)
    # From the last to the first sample: crops and flips, one far outside, one that is not in the bank.
    places = torch.tensor([(len(x) - 1 - n, n - 1, 2 - n, n % 2) for n in range(len(x))])
    if len(x) > 2:
        places[1, 2], places[2, 0] = 2**40, len(bank)
    for seed in (1, 2**62 + 2**31):  # the same kernel: a seed of 1 is no constant
        noise = (*eps, 1.5, seed, 0.0, 1.0)
        assert_same(launcher("uniform_start")(x, *noise), UNIFORM._reference(x, *noise), ("uniform_start", what))
    start = (bank, places, *eps, 0.1 / 127, 0.0, 1.0)
    assert_same(launcher("bank_start")(x, *start), BANK._reference(x, *start), ("bank_start", what))
    for stored, drawn in ((None, None), (bank, places)):
        steps = (*eps, 1.25, drawn is not None, shape[0] > 1, 0.0, 1.0)
        kept = None if stored is None else stored.clone()
        expected = x_adv.clone(memory_format=torch.preserve_format)
        EPS_STEP._reference_(expected, grad, x, *steps, kept, drawn, 1270.0)
        result = lay(x_adv, layout)
        assert launcher("eps_step_")(result, grad, x, *steps, stored, drawn, 1270.0) is None
        assert_same(result, expected, ("eps_step_", what))
        if stored is not None:
            assert_same(stored, kept, ("the bank", what))


FAST = [
    (80, (3, 3, 16, 16), "contiguous", "(N,1,H,W)", F32, F32),
    (90, (3, 3, 16, 16), "channels_last", "PackedEpsilon M=1", BF16, F32),
    (90, (3, 3, 11, 13), "contiguous", "PackedEpsilon M=C", F32, BF16),
    (80, (1, 1, 33, 31), "offset", "float", F16, F16),
    pytest.param(90, (1, 3, 5, 7), "offset_channels_last", "(1,C,1,1)", F64, F32, marks=pytest.mark.slow),
    pytest.param(80, (3, 3, 32, 32), "contiguous", "(N,C,H,W)", F32, F32, marks=pytest.mark.slow),
    pytest.param(90, (3, 2, 31, 33), "contiguous", "(N,1,1,1)", BF16, BF16, marks=pytest.mark.slow),
    pytest.param(90, (3, 3, 32, 32), "channels_last", "(N,1,H,W) strided", F32, F32, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("cc", "shape", "layout", "eps_form", "dtype", "grad_dtype"), FAST)
def test_fast_ptx_equals_reference(ptx, cc, shape, layout, eps_form, dtype, grad_dtype):
    ptx.cc = cc
    check_fast(ptx, shape, layout, eps_form, dtype, grad_dtype)


def test_nothing_is_launched_for_no_images(ptx):
    x_adv, grad, x, eps = images((0, 3, 4, 4), "contiguous", "(N,1,H,W)", F32, F32)
    assert launcher("pgd_step")(x_adv, grad, x, *eps, *SCALARS).shape == (0, 3, 4, 4)
    assert launcher("cam")(x_adv, grad, 0).shape == (0, 4, 4)
    maps = torch.zeros(0, 4, 4)
    assert launcher("upsample_cam")(maps, 8, 8).shape == (0, 8, 8)
    assert launcher("upsample_cam_bwd")(torch.zeros(0, 8, 8), maps).shape == (0, 4, 4)
    assert launcher("cam_mask")(maps, 8, 8, 0, 0, False).shape == (0, 1, 8, 8)
    assert launcher("epsilon_map")(maps, 8, 8, 1, 0, EPS, EPS_LOW).shape == (0, 3, 8, 8)
    assert [launch.programs for launch in ptx.launches] == [0] * 6
    assert not ptx.reports


def twice(ptx, name: str, *arguments) -> Tensor:
    """The result, the same to the bit in another order of warps and with other bytes in uninitialised memory."""
    first = launcher(name)(*arguments)
    ptx.options = {**ptx.options, "seed": 7, "fill": 0x55}
    assert_same(launcher(name)(*arguments), first, (name, "in another order"))
    return first


@pytest.mark.parametrize(
    ("cc", "shape", "layout", "dtype", "method"),
    [
        (80, (2, 20, 8, 8), "contiguous", BF16, 0),
        (90, (2, 33, 4, 4), "channels_last", F32, 1),
        pytest.param(90, (1, 640, 16, 16), "channels_last", F32, 2, marks=pytest.mark.slow),
        pytest.param(80, (1, 512, 4, 4), "contiguous", F16, 3, marks=pytest.mark.slow),
        pytest.param(80, (1, 3, 80, 80), "contiguous", F32, 1, marks=pytest.mark.slow),
        pytest.param(90, (1, 1, 31, 33), "contiguous", F64, 0, marks=pytest.mark.slow),
    ],
)
def test_cam_ptx(ptx, cc, shape, layout, dtype, method):
    ptx.cc = cc
    activation, gradient = (lay(value.to(dtype), layout) for value in (torch.randn(shape).relu(), torch.randn(shape)))
    expected = CAM._reference(activation.double(), gradient.double(), method)
    scale = (activation.double().abs().amax() * gradient.double().abs().amax()) * shape[1] ** 0.5
    result = twice(ptx, "cam", activation, gradient, method)
    # Sums of K terms in float32 in another order: within sqrt(K) roundings of the largest term, and some.
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=float(1e-6 * scale))


@pytest.mark.parametrize(
    ("cc", "maps", "size", "dtype"),
    [
        (80, (2, 8, 8), (32, 32), F32),
        (90, (2, 3, 5), (31, 33), BF16),
        pytest.param(90, (1, 7, 7), (224, 224), F32, marks=pytest.mark.slow),
        pytest.param(80, (1, 31, 1), (31, 1023), F64, marks=pytest.mark.slow),
        pytest.param(80, (1, 40, 40), (40, 40), F16, marks=pytest.mark.slow),
    ],
)
def test_upsample_cam_ptx_equals_reference(ptx, cc, maps, size, dtype):
    ptx.cc = cc
    cam = torch.randn(maps).to(dtype)
    cam[-1] = cam[-1] if maps[0] == 1 else 0.5
    result = twice(ptx, "upsample_cam", cam, *size)
    assert_same(result, UPSAMPLE._reference_op(cam, *size), (maps, size, dtype))


@pytest.mark.parametrize(
    ("cc", "maps", "size"), [(80, (2, 4, 4), (9, 11)), pytest.param(80, (1, 8, 8), (32, 32), marks=pytest.mark.slow)]
)
def test_upsample_cam_bwd_ptx(ptx, cc, maps, size):
    ptx.cc = cc
    cam = torch.randint(0, 4, maps).float()  # ties at the minimum and at the maximum
    cam[-1] = cam[-1] if maps[0] == 1 else 0.5
    grad = torch.randn(maps[0], *size)
    expected = UPSAMPLE._reference_bwd(grad.double(), cam.double())
    result = twice(ptx, "upsample_cam_bwd", grad, cam)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


def assert_masks(actual: Tensor, expected: Tensor, cam: Tensor, size: tuple[int, int], rule: int) -> None:
    """Equal, but for zscore pixels within 1e-5 of their threshold: its sums are in float32 here."""
    differ = actual != expected
    if CAM_MASK.RULES[rule] != "zscore":
        assert not differ.any(), (CAM_MASK.RULES[rule], int(differ.sum()))
        return
    u = UPSAMPLE.reference(cam.double(), *size)
    score = u - u.mean((1, 2), keepdim=True) - u.std((1, 2), correction=0, keepdim=True)
    assert (score[:, None][differ].abs() < 1e-5).all(), int(differ.sum())


@pytest.mark.parametrize(
    ("cc", "maps", "size", "rule", "form"),
    [
        (80, (3, 8, 8), (32, 32), "zscore", "bits"),
        (90, (3, 4, 4), (16, 16), "released", "mask"),
        (80, (3, 3, 5), (9, 11), "quantile", "eps"),
        (90, (2, 4, 4), (16, 16), "soft", "eps"),
        pytest.param(80, (3, 7, 5), (31, 33), "zscore", "bits", marks=pytest.mark.slow),
        pytest.param(90, (3, 7, 5), (31, 33), "released", "bits", marks=pytest.mark.slow),
        pytest.param(90, (3, 8, 8), (32, 32), "quantile", "mask", marks=pytest.mark.slow),
        pytest.param(90, (1, 16, 16), (64, 64), "quantile", "eps", marks=pytest.mark.slow),
        pytest.param(80, (1, 7, 7), (224, 224), "zscore", "eps", marks=pytest.mark.slow),
        pytest.param(80, (1, 7, 7), (224, 224), "soft", "eps", marks=pytest.mark.slow),
        pytest.param(90, (1, 31, 1), (31, 1023), "released", "mask", marks=pytest.mark.slow),
    ],
)
def test_image_kernels_ptx(ptx, cc, maps, size, rule, form):
    ptx.cc = cc
    number = CAM_MASK.RULES.index(rule)
    k = math.ceil(0.3 * size[0] * size[1]) if rule == "quantile" else 0
    cam = torch.rand(maps)
    if maps[0] > 1:
        cam[1] = 0.25  # no evidence
    if maps[0] > 2:
        cam[2] = torch.randint(0, 2, maps[1:]).float()  # many equal pixels, for the ties of quantile
    if form == "eps":
        arguments = (cam, *size, number, k, EPS, EPS_LOW)
        result = twice(ptx, "epsilon_map", *arguments)
        expected = EPSILON_MAP._reference(*arguments)
        assert result.dtype == expected.dtype
        if rule == "soft":
            assert_same(result, expected, (maps, size))
        else:
            assert set(result.unique().tolist()) <= set(expected.new_tensor([EPS, EPS_LOW]).tolist())
            assert_masks(result, expected, cam, size, number)
        return
    result = twice(ptx, "cam_mask", cam, *size, number, k, form == "bits")
    expected = CAM_MASK._reference_op(cam, *size, number, k, form == "bits")
    if form == "bits":
        result, expected = (CAM_MASK_unpacked(bits, size) for bits in (result, expected))
    assert_masks(result, expected, cam, size, number)


def CAM_MASK_unpacked(bits: Tensor, size: tuple[int, int]) -> Tensor:  # noqa: N802
    """All bits of every byte, those past the last pixel included."""
    every = (bits[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    pixels = every.flatten(2)
    assert not pixels[..., size[0] * size[1] :].any(), "bits past the last pixel are 0"
    return pixels[..., : size[0] * size[1]].bool().view(*bits.shape[:2], *size)


@pytest.mark.parametrize("size", [(1, 8), (4, 16), (3, 24), (64, 64)], ids=str)
@pytest.mark.parametrize("maps", [(1, 1), (2, 4), (3, 8)], ids=str)
def test_small_maps_compile(launches, maps, size):
    """A table of fewer elements than threads once stopped Triton's compiler."""
    size = tuple(max(pair) for pair in zip(maps, size, strict=True))
    launcher("upsample_cam")(torch.zeros(1, *maps), *size)
    assert compiled(launches[0], 90).asm["cubin"]


def representative(launches) -> dict[str, object]:
    """One launch of each kernel at the sizes that matter, by a name for the tables."""
    images_of = lambda dtype: torch.zeros(4, 3, 32, 32, dtype=dtype)  # noqa: E731
    found = {}

    def call(label: str, name: str, *arguments) -> None:
        launches.clear()
        launcher(name)(*arguments)
        (found[label],) = launches

    pixel = torch.zeros(4, 1, 32, 32).expand(4, 3, 32, 32)
    bits = torch.zeros(4, 1, 128, dtype=torch.uint8)
    for dtype, grad_dtype in ((F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32)):
        x, grad = images_of(dtype), images_of(grad_dtype)
        label = f"pgd_step {dtype}, {grad_dtype} grad".replace("torch.", "")
        call(f"{label}, float eps", "pgd_step", x, grad, x, None, EPS, 0.0, *SCALARS)
    x = images_of(F32)
    call("pgd_step float32, (N,1,H,W) eps", "pgd_step", x, x, x, pixel, 0.0, 0.0, *SCALARS)
    call("pgd_step float32, packed eps", "pgd_step", x, x, x, bits, EPS, EPS_LOW, *SCALARS)
    call("pgd_step_bwd float32", "pgd_step_bwd", x, x, x, x, x, 0.0, 0.0, *SCALARS)
    call("project_linf float32", "project_linf", x, x, None, EPS, 0.0)
    call("project_linf_bwd float32", "project_linf_bwd", x, x, x, None, EPS, 0.0)
    call_fast = (None, EPS, 0.0, 1.0)
    bank, places = torch.zeros(4, 3, 32, 32, dtype=torch.int8), torch.zeros(4, 4, dtype=torch.int64)
    for dtype in (F32, BF16):
        x = images_of(dtype)
        kind = str(dtype).removeprefix("torch.")
        call(f"uniform_start {kind}", "uniform_start", x, *call_fast, 7, 0.0, 1.0)
        call(f"bank_start {kind}", "bank_start", x, bank, places, *call_fast, 0.0, 1.0)
        step = (*call_fast, True, True, 0.0, 1.0)
        call(f"eps_step_ {kind}", "eps_step_", x, x, x, *step, None, None, 0.0)
        call(f"eps_step_ {kind} with a bank", "eps_step_", x, x, x, *step, bank, places, 1000.0)
    x = images_of(F64)
    call("pgd_step float64, float eps", "pgd_step", x, x, x, None, EPS, 0.0, *SCALARS)
    features = torch.zeros(2, 640, 8, 8)
    call("cam gradcam float32", "cam", features, features, 0)
    call("cam xgradcam bfloat16 channels_last", "cam",
         *[features.bfloat16().contiguous(memory_format=torch.channels_last)] * 2, 1)  # fmt: skip
    maps = torch.zeros(2, 8, 8)
    call("upsample_cam 8x8 to 32x32", "upsample_cam", maps, 32, 32)
    call("upsample_cam_bwd 8x8 to 32x32", "upsample_cam_bwd", torch.zeros(2, 32, 32), maps)
    call("cam_mask zscore bits 8x8 to 32x32", "cam_mask", maps, 32, 32, 0, 0, True)
    for rule, name in enumerate(CAM_MASK.RULES):
        call(f"epsilon_map {name} 8x8 to 32x32", "epsilon_map", maps, 32, 32, rule, 100 * (rule == 2), EPS, EPS_LOW)
    call("epsilon_map quantile float64 8x8 to 32x32", "epsilon_map", maps.double(), 32, 32, 2, 100, EPS, EPS_LOW)
    # Small images, and those of more than one tile.
    for side, size in ((4, 16), (16, 64), (7, 224)):
        maps = torch.zeros(2, side, side)
        for rule, name in enumerate(CAM_MASK.RULES):
            label = f"{name} {side}x{side} to {size}x{size}"
            call(f"epsilon_map {label}", "epsilon_map", maps, size, size, rule, 50 * (rule == 2), EPS, EPS_LOW)
            if name != "soft":
                call(f"cam_mask {label} bits", "cam_mask", maps, size, size, rule, 50 * (rule == 2), True)
    return found


def test_pgd_step_ptx_is_sixteen_bytes_wide(launches):
    """In every pair of storage types, also where only the last tile is not whole."""
    for dtype in (F32, BF16, F16):
        for grad_dtype in (F32, BF16, F16):
            for shape in ((2, 3, 32, 32), (1, 3, 31, 33)):
                launches.clear()
                x, grad = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=grad_dtype)
                launcher("pgd_step")(x, grad, x, None, EPS, 0.0, *SCALARS)
                text = compiled(launches[0], 90).asm["ptx"]
                assert "ld.global.v4.b32" in text, (dtype, grad_dtype, shape)
                assert "st.global.v4.b32" in text, (dtype, grad_dtype, shape)
                if shape == (2, 3, 32, 32):
                    narrow = set(re.findall(r"(?:ld|st)\.global\.\S+", text)) - {"ld.global.v4.b32", "st.global.v4.b32"}
                    assert not narrow, (dtype, grad_dtype, narrow)


def test_offsets_beyond_two_billion_elements_take_64_bits(launches):
    """On a meta tensor: nothing is run, the arguments and the PTX show it."""
    x = torch.empty(30000, 3, 160, 160, device="meta")
    launcher("pgd_step")(x, x, x, None, EPS, 0.0, *SCALARS)
    (launch,) = launches
    assert x.numel() >= 2**31
    assert launch.constants["INDEX"] == triton.language.int64
    assert launch.programs * launch.constants["BLOCK"] >= x.numel() > (launch.programs - 1) * launch.constants["BLOCK"]
    assert launch.programs < 2**31, "the first dimension of a grid"


ADDS = """
.visible .entry one(.param .u64 p) {
    mov.b32 %r9, 65537;
    mov.b32 %r8, 0x20002;
    add.s16x2 %r1, %r2, {first};
    add.s16x2 %r3, {second}, %r4;
}
.visible .entry two() { add.s16x2 %r1, %r2, 65537; }
"""


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [("%r9", "%r9", 1), ("65537", "%r9", 1), ("0x10001", "65537", 1), ("%r8", "%r9", 0), ("%r5", "%r5", 0)],
)
def test_two_additions_of_one_constant_are_seen(first, second, count):
    ptx = ADDS.replace("{first}", first).replace("{second}", second)
    assert [kernel for kernel, _ in repeated_halfword_adds(ptx)] == ["one"] * count


@pytest.mark.slow
def test_every_kernel_compiles_for_every_gpu(launches):
    for name, launch in representative(launches).items():
        for cc in NVIDIA:
            assert compiled(launch, cc).asm["cubin"], (name, cc)
        assert compiled(launch, "gfx942", "hip").asm["amdgcn"], name


@pytest.mark.parametrize("method", range(4))
def test_cam_of_one_pixel_ptx(ptx, method):
    """Triton makes a constant of an argument that is 1, here the number of pixels, and a constant has no `.to`."""
    ptx.cc = 90
    activation, gradient = torch.rand(2, 5, 1, 1), torch.randn(2, 5, 1, 1)
    result = launcher("cam")(activation, gradient, method)
    expected = CAM._reference(activation.double(), gradient.double(), method)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


def of_one(launch, names):
    """The launch with 1 in the place of these arguments, to be compiled and not run."""
    return dataclasses.replace(launch, arguments={**launch.arguments, **dict.fromkeys(names, 1)})


def whole_numbers(launch) -> list[str]:
    """The arguments of which Triton makes a constant where they are 1."""
    general = {parameter.name for parameter in launch.kernel.params if parameter.do_not_specialize}
    return [name for name, value in launch.arguments.items() if isinstance(value, int) and name not in general]


def each_form(launches) -> dict[str, object]:
    """Launches of every kernel, one for each set of the constants that choose what its arguments are used in."""
    found = representative(launches)
    many = torch.zeros(2, 3, 80, 80)  # more than a tile
    for method in (0, 1):
        launches.clear()
        launcher("cam")(many, many, method)
        found[f"cam {method}, more than a tile"] = launches[0]
    every = {}
    for name, launch in found.items():
        chosen = (launch.constants.get(key) for key in ("METHOD", "WHOLE", "SOURCE", "RULE", "FORM", "KEPT"))
        every.setdefault((launch.kernel.__name__, *chosen), (name, launch))
    return dict(every.values())


def test_every_kernel_compiles_where_all_its_arguments_are_1(launches):
    for name, launch in each_form(launches).items():
        names = whole_numbers(launch)
        assert compiled(of_one(launch, names), 90).asm["cubin"], (name, names)


@pytest.mark.slow
def test_every_kernel_compiles_where_an_argument_is_1(launches):
    for name, launch in each_form(launches).items():
        for one in whole_numbers(launch):
            assert compiled(of_one(launch, [one]), 90).asm["cubin"], (name, one)


def test_pgd_step_compiles_for_amd(launches):
    launch = representative(launches)["pgd_step float32, float32 grad, float eps"]
    assert "s_endpgm" in compiled(launch, "gfx942", "hip").asm["amdgcn"]


# Warps and blocks that a multiprocessor holds, and registers it has.
WARPS_OF = {80: 64, 90: 64, 100: 64, 120: 48}
BLOCKS_OF = {80: 32, 90: 32, 100: 32, 120: 24}
REGISTERS = 65536


def sass_row(name: str, launch, cc: int, folder: Path) -> dict[str, object]:
    """Registers, occupancy, local memory and wide accesses, read from the machine code."""
    kernel = compiled(launch, cc)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}

    def run(flag: str) -> str:
        command = [str(tools / "cuobjdump"), flag, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    usage, sass = run("-res-usage"), run("-sass")
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    shared = kernel.metadata.shared
    per_warp = math.ceil(registers / 8) * 8 * 32
    blocks = min(REGISTERS // (per_warp * launch.num_warps), WARPS_OF[cc] // launch.num_warps, BLOCKS_OF[cc])
    if shared:
        blocks = min(blocks, (100 if cc == 120 else 164) * 1024 // (shared + 1024))
    return {
        "kernel": name, "sm": cc, "registers": registers, "shared_bytes": shared,
        "occupancy": round(blocks * launch.num_warps / WARPS_OF[cc], 2),
        "local_bytes": sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        "local_accesses": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "LDG.128": len(re.findall(r"LDG\S*\.128", sass)), "STG.128": len(re.findall(r"STG\S*\.128", sass)),
    }  # fmt: skip


def show(rows: list[dict[str, object]]) -> None:
    print()
    print("  ".join(rows[0]))
    for row in rows:
        print("  ".join(str(value) for value in row.values()))


def assert_sass(row: dict[str, object]) -> None:
    assert row["local_bytes"] == 0, row
    assert row["local_accesses"] == 0, row
    name, least = row["kernel"], 0.75
    if "float64" in name:
        least = 0.5  # twice the registers
    elif "quantile" in name and ("64x64" in name or "224x224" in name):
        # Beside the map's tables, a count a thread and the digits so far: more registers than 40 on newer GPUs.
        least = {80: 0.75, 90: 0.75, 100: 0.62, 120: 0.66}[row["sm"]]
    assert row["occupancy"] >= least, row
    if name.startswith(("pgd_step", "project_linf", "uniform_start", "bank_start", "eps_step_")):
        assert row["LDG.128"], row
        assert row["STG.128"], row


def test_sass_of_pgd_step(launches, tmp_path):
    names = ["pgd_step float32, float32 grad, float eps", "pgd_step bfloat16, float32 grad, float eps"]
    found = representative(launches)
    rows = [sass_row(name, found[name], cc, tmp_path) for name in names for cc in NVIDIA]
    show(rows)
    for row in rows:
        assert_sass(row)


@pytest.mark.slow
def test_sass_of_every_kernel(launches, tmp_path):
    rows = [sass_row(name, launch, cc, tmp_path) for name, launch in representative(launches).items() for cc in NVIDIA]
    show(rows)
    for row in rows:
        assert_sass(row)


def least_bytes(launch) -> int:
    """Each input read once, each output written once."""
    tensors = [value for value in launch.arguments.values() if isinstance(value, Tensor)]
    return sum(memory(tensor).numel() * tensor.element_size() for tensor in tensors)


def traffic_row(name: str, shape: str, run: str, launch, report) -> dict[str, object]:
    loads = [m for m in report["mem"] if re.search(r"\bld\.", m["instr"])]
    stores = [m for m in report["mem"] if re.search(r"\b(?:st|atom|red)\.", m["instr"])]
    least = least_bytes(launch)
    # 32-byte sectors of device memory that were read or written at all: what is read again comes from the caches.
    touched = sum(f["read_bytes"] + f["written_bytes"] for f in report["footprint"])

    def sectors(accesses: list) -> str:
        requests = sum(m["warp_requests"] for m in accesses)
        moved = sum(m["sectors"] for m in accesses)
        full = sum(m["bytes"] for m in accesses) / (32 * moved)
        return f"{moved / requests:.1f} ({full:.2f} of each used)"

    return {
        "kernel": name, "shape": shape, "images run": run, "least bytes": least,
        "from memory / least": f"{touched / least:.2f}",
        "asked for / least": f"{sum(m['bytes'] for m in report['mem']) / least:.2f}",
        "sectors per load": sectors(loads), "sectors per store": sectors(stores),
        "shared bank conflicts": report["shared_bank_conflict_extra"], "shared requests": report["shared_requests"],
    }  # fmt: skip


@pytest.mark.slow
def test_traffic_table(ptx):
    """Writes docs/traffic-triton.csv. Every image is treated alike, so few of a batch are run for the large shapes."""
    import csv

    ptx.options = {"race": False, "stats": True}
    rows = []

    def measure(label: str, shape: str, run: int, name: str, *arguments) -> None:
        launcher(name)(*arguments)
        rows.append(traffic_row(label, shape, str(run), ptx.launches[-1], ptx.reports[-1]))

    for n, run, side, small in ((128, 32, 32, 8), (128, 8, 64, 16), (256, 1, 224, 7)):
        shape = f"{n}x3x{side}x{side}"
        for dtype, grad_dtype in ((F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32)):
            x, grad = torch.rand(run, 3, side, side).to(dtype), torch.randn(run, 3, side, side).to(grad_dtype)
            label = f"pgd_step {dtype}, {grad_dtype} grad".replace("torch.", "")
            measure(f"{label}, float eps", shape, run, "pgd_step", x, grad, x.clone(), None, EPS, 0.0, *SCALARS)
            if dtype == grad_dtype == F32:
                pixel = torch.rand(run, 1, side, side).expand(run, 3, side, side)
                bits = torch.randint(0, 256, (run, 1, side * side // 8), dtype=torch.uint8)
                last = [value.contiguous(memory_format=torch.channels_last) for value in (x, grad, x.clone())]
                measure(
                    f"{label}, (N,1,H,W) eps", shape, run, "pgd_step", x, grad, x.clone(), pixel, 0.0, 0.0, *SCALARS
                )
                measure(
                    f"{label}, packed eps", shape, run, "pgd_step", x, grad, x.clone(), bits, EPS, EPS_LOW, *SCALARS
                )
                measure(f"{label}, channels_last, float eps", shape, run, "pgd_step", *last, None, EPS, 0.0, *SCALARS)
                measure(
                    f"{label}, channels_last, packed eps", shape, run, "pgd_step", *last, bits, EPS, EPS_LOW, *SCALARS
                )
        x = torch.rand(run, 3, side, side)
        measure(
            "pgd_step_bwd float32",
            shape,
            run,
            "pgd_step_bwd",
            x,
            x.clone(),
            x.clone(),
            x.clone(),
            None,
            EPS,
            0.0,
            *SCALARS,
        )
        measure("project_linf float32", shape, run, "project_linf", x, x.clone(), None, EPS, 0.0)
        maps = torch.rand(run, small, small)
        measure(f"upsample_cam from {small}x{small}", shape, run, "upsample_cam", maps, side, side)
        measure(f"cam_mask zscore bits from {small}x{small}", shape, run, "cam_mask", maps, side, side, 0, 0, True)
        for rule in ("zscore", "released", "quantile", "soft"):
            number = CAM_MASK.RULES.index(rule)
            k = side * side // 5 if rule == "quantile" else 0
            measure(
                f"epsilon_map {rule} from {small}x{small}",
                shape,
                run,
                "epsilon_map",
                maps,
                side,
                side,
                number,
                k,
                EPS,
                EPS_LOW,
            )
    for channels, side in ((640, 8), (512, 4), (640, 16)):
        for dtype, layout in ((F32, "contiguous"), (BF16, "channels_last")):
            features = [lay(torch.rand(2, channels, side, side).to(dtype), layout) for _ in range(2)]
            label = f"cam gradcam {dtype} {layout}".replace("torch.", "")
            measure(label, f"128x{channels}x{side}x{side}", 2, "cam", *features, 0)
    show(rows)
    with (ROOT / "docs" / "traffic-triton.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        assert row["from memory / least"] == "1.00", row
