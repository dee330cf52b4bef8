"""Every op on one backend against an independent oracle: values, gradients, streams, CUDA graphs, 2^31 elements.

Bits are compared where they are promised (pgd_step, pgd_step_, project_linf, their gradients, uniform_start,
bank_start, eps_step_, upsample_cam, quantile, soft), `cam` within a bound on the rounding of any order of summation,
zscore and released masks by how many values lie on another side of their threshold than PIL and matplotlib have them.
Inputs are drawn on the CPU and results compared there; freed memory is filled with NaN before each call, so that what
is not written shows.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import part_fast
from part_fast.gpu import oracle
from part_fast.gpu.record import ALPHA, EPS, MissingError, Recorder, differing, parser, require, synchronize, timed
from part_fast.ops import (
    PackedEpsilon,
    bank_start,
    cam,
    cam_mask,
    eps_step_,
    epsilon_map,
    packed_epsilon_map,
    pgd_step,
    pgd_step_,
    project_linf,
    uniform_start,
    upsample_cam,
)
from part_fast.ops.cam import METHODS
from part_fast.ops.pgd_step import _pgd_step_bwd
from part_fast.ops.project_linf import _project_linf_bwd
from part_fast.ops.upsample_cam import _upsample_cam_bwd

EPS_LOW = 3 / 255  # further from EPS than in training: what is mixed up shows
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
IMAGE_FORMS = ("(N,1,H,W)", "(N,C,H,W)", "(N,C,H,W) last", "strided")
FORMS = ("float", "()", "(N,1,1,1)", "(1,C,1,1)", *IMAGE_FORMS, "bits1", "bitsC")
LAYOUTS = ("contiguous", "channels_last", "offset", "offset_channels_last")
SHAPES = [(2, 3, 5, 7), (4, 3, 32, 32), (1, 1, 33, 31), (1, 3, 11, 1), (3, 2, 9, 1), (128, 3, 32, 32), (0, 3, 4, 4)]
CAM_SHAPES = [
    (2, 512, 4, 4),
    (1, 640, 8, 8),
    (3, 16, 7, 7),
    (2, 33, 5, 3),
    (2, 5, 1, 1),
    (5, 3, 1, 33),
    (128, 512, 4, 4),
    (2, 5000, 2, 2),
]
SIZES = [
    ((4, 4, 4), (32, 32)),
    ((128, 8, 8), (32, 32)),
    ((2, 5, 7), (30, 44)),
    ((2, 3, 3), (31, 33)),
    ((2, 1, 5), (1, 31)),
    ((2, 8, 8), (64, 64)),
    ((2, 7, 7), (224, 224)),
    ((2, 6, 6), (6, 6)),
    ((2, 16, 16), (65, 130)),
    ((2, 12, 12), (512, 384)),
]
RULES = ("zscore", "released", "quantile:0.3", "quantile:0.01")
BIG_BYTES = 32 * 10**9
KINDS = ("step", "backward", "fast", "cam", "upsample", "soft", "mask", "stream", "graph", "big", "host")
# Of a value's gradient by upsample_cam, as a share of the largest: sums of float32, then one rounding.
NEAR = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

Shape = tuple[int, int, int, int]
Maps = tuple[int, int, int]
Size = tuple[int, int]
# Name, check and its arguments.
Case = tuple[Any, ...]


class Checks:
    """The checks of the ops for tensors on `device`, by the backend that is chosen; a failed one raises."""

    def __init__(self, device: torch.device, dry: bool = False) -> None:
        self.device, self.dry = device, dry
        self.draw = torch.Generator().manual_seed(1)

    # --- inputs, on the CPU, and where they lie on the device ---------------------------------------------------------

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.draw)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw)

    def maps(self, shape: Maps, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.randn(*shape).relu().to(dtype)

    def lay(self, value: Tensor, layout: str) -> Tensor:
        """A copy on the device in that layout; `offset` ones lie three elements into a longer buffer of NaN."""
        n, c, h, w = value.shape
        pad = 3 if layout.startswith("offset") else 0
        memory = torch.full((value.numel() + 2 * pad,), math.nan, dtype=value.dtype, device=self.device)
        inside = memory[pad : pad + value.numel()]
        last = layout.endswith("channels_last")
        laid = inside.view(n, h, w, c).permute(0, 3, 1, 2) if last else inside.view(n, c, h, w)
        return laid.copy_(value)

    def eps(self, form: str, shape: Shape) -> tuple[float | Tensor | PackedEpsilon, Tensor]:
        """(an eps argument on the device, each pixel's eps on the CPU, float64); some are 0."""
        n, c, h, w = shape
        if form == "float":
            return EPS, torch.full(shape, EPS, dtype=torch.float64)
        if form.startswith("bits"):
            mask = self.rand(n, 1 if form == "bits1" else c, h, w) < 0.4
            dense = torch.where(mask, float(np.float32(EPS)), float(np.float32(EPS_LOW))).double()
            return PackedEpsilon.pack(mask.to(self.device), EPS, EPS_LOW), dense.expand(shape)
        sizes: dict[str, tuple[int, ...]] = {"()": (), "(N,1,1,1)": (n, 1, 1, 1), "(1,C,1,1)": (1, c, 1, 1)}
        size = sizes.get(form, (n, c if form.startswith("(N,C") else 1, h, w))
        drawn = self.rand(*size) * 2 * EPS
        drawn = torch.where(self.rand(*size) < 0.1, 0.0, drawn)
        eps = drawn.to(self.device)
        if form.endswith("last"):
            eps = eps.contiguous(memory_format=torch.channels_last)
        if form == "strided":
            wide = torch.full((n, 2, h, 2 * w), math.nan, device=self.device)
            wide[:, 1:, :, ::2] = eps
            eps = wide[:, 1:, :, ::2]
        return eps, drawn.double().expand(shape)

    def images(
        self, shape: Shape, dtype: torch.dtype, dense: Tensor, grad_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(x_adv, grad, x): inside the ball, outside, on its bound; x also 0 and 1; gradients also 0, -0, NaN, inf."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        corner, place = self.rand(*shape), self.rand(*shape)
        x = torch.where(corner < 0.1, 0.0, torch.where(corner > 0.9, 1.0, self.rand(*shape).double())).to(dtype)
        moved = (self.rand(*shape).to(compute) * 3 - 1.5) * EPS
        bound = dense.to(compute)
        moved = torch.where(place < 0.2, bound, torch.where(place > 0.8, -bound, moved))
        grad = self.randn(*shape)
        special = torch.randint(0, 20, shape, generator=self.draw)
        for number, value in enumerate((0.0, -0.0, math.nan, math.inf, -math.inf)):
            grad = torch.where(special == number, value, grad)
        return (x.to(compute) + moved).to(dtype), grad.to(grad_dtype or dtype), x

    def poison(self) -> None:
        """Leave NaN in freed memory, where the next results come to lie."""
        if self.device.type == "cuda":
            junk = [torch.full((1 << k,), math.nan, device=self.device) for k in range(6, 22, 2)]
            del junk

    # --- values -------------------------------------------------------------------------------------------------------

    def step(
        self, shape: Shape, dtype: torch.dtype, layout: str, form: str, grad_dtype: torch.dtype | None = None
    ) -> None:
        """pgd_step, project_linf and pgd_step_: the oracle's bits, x_adv's strides, nothing written beside it."""
        eps, dense = self.eps(form, shape)
        given = self.images(shape, dtype, dense, grad_dtype)
        x_adv, grad, x = (self.lay(value, layout) for value in given)
        wanted = oracle.pgd_step(*given, dense, ALPHA)
        self.poison()
        result = pgd_step(x_adv, grad, x, eps, ALPHA)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            same = result.is_contiguous(memory_format=memory_format) or not x_adv.is_contiguous(
                memory_format=memory_format
            )
            require(same or not x_adv.numel(), f"pgd_step: strides {result.stride()} for {x_adv.stride()}")
        _same("pgd_step", result, wanted)
        projected = oracle.pgd_step(*given, dense, 0.0, clip=None)
        _same("project_linf", project_linf(x_adv, x, eps), projected)
        pgd_step_(x_adv, grad, x, eps, ALPHA)
        _same("pgd_step_", x_adv, wanted)
        if layout.startswith("offset"):
            for laid in (x_adv, grad, x):
                memory = laid.new_empty(0).set_(laid.untyped_storage()).cpu()
                at = laid.storage_offset()
                beside = torch.cat([memory[:at], memory[at + laid.numel() :]])
                require(beside.isnan().all(), "wrote beside its tensors")

    def backward(self, shape: Shape, dtype: torch.dtype, layout: str, form: str) -> None:
        """Gradients of project_linf and pgd_step: the CPU reference's bits."""
        eps, dense = self.eps(form, shape)
        given = self.images(shape, dtype, dense)
        weight = self.randn(*shape).to(dtype)
        last = layout.endswith("channels_last")
        memory_format = torch.channels_last if last else torch.contiguous_format
        for op, images, scalars in (
            (_project_linf_bwd, (given[0], given[2]), ()),
            (_pgd_step_bwd, given, (ALPHA, 0.0, 1.0)),
        ):
            tensors = [value.contiguous(memory_format=memory_format) for value in (weight, *images)]
            wanted = op.reference(*tensors, *_raw_eps(eps, shape, "cpu"), *scalars)
            self.poison()
            laid = [self.lay(value, layout) for value in (weight, *images)]
            got = op(*laid, *_raw_eps(eps, shape, str(self.device)), *scalars)
            for name, one, other in zip(("x_adv", "x", "eps"), got, wanted, strict=True):
                _same(f"{op.name}, gradient of {name}", one, other)

    def bank(self, shape: Shape, samples: int | None = None) -> tuple[Tensor, Tensor]:
        """(bank, places) on the CPU: for each image another sample, crop and flip."""
        n, c, h, w = shape
        samples = n + 2 if samples is None else samples
        bank = torch.randint(-127, 128, (samples, c, h, w), generator=self.draw, dtype=torch.int8)
        shifts = torch.randint(-4, 5, (2, n), generator=self.draw)
        return bank, torch.stack([torch.randperm(samples, generator=self.draw)[:n], *shifts, torch.arange(n) % 2], 1)

    def fast(
        self, shape: Shape, dtype: torch.dtype, layout: str, form: str, grad_dtype: torch.dtype | None = None
    ) -> None:
        """uniform_start, bank_start, and eps_step_ with and without a bank: the CPU reference's bits."""
        eps, dense = self.eps(form, shape)
        given = self.images(shape, dtype, dense, grad_dtype)
        bank, places = self.bank(shape)
        last = torch.channels_last if layout.endswith("channels_last") else torch.contiguous_format
        own: Any = eps if isinstance(eps, float) else eps.to("cpu")
        results = []
        for name, bound, device in (("reference", own, torch.device("cpu")), (None, eps, self.device)):
            if name is None:
                self.poison()
                x_adv, grad, x = (self.lay(value, layout) for value in given)
            else:
                x_adv, grad, x = (value.clone(memory_format=last) for value in given)
            stored, rows = bank.to(device, copy=True), places.to(device)
            with part_fast.backend(name) if name else contextlib.nullcontext():
                found = [
                    uniform_start(x, bound, 1.5, seed=2**40 + 3),
                    bank_start(x, stored, rows, bound, scale=0.1),
                    eps_step_(x_adv.clone(), grad, x, bound, alpha=ALPHA, project=False),
                    eps_step_(x_adv, grad, x, bound, 1.25, bank=stored, places=rows, scale=0.1),
                ]
            results.append([*found, stored])
        names = ("uniform_start", "bank_start", "eps_step_", "eps_step_ with a bank", "the bank")
        for name, one, other in zip(names, *results[::-1], strict=True):
            _same(name, one, other)

    def cam(self, shape: Shape, dtype: torch.dtype, layout: str, method: str) -> None:
        """cam within the rounding of its float32 sums, in any order, of the float64 oracle."""
        a, g = self.randn(*shape).relu(), self.randn(*shape).to(dtype)
        if method == "xgradcam":
            a = a + 0.05  # its weights divide by the sum of activations
        a = a.to(dtype)
        self.poison()
        got = cam(self.lay(a, layout), self.lay(g, layout), method).double().cpu()
        wanted = oracle.cam(a, g, method)
        unit = 2.0 ** (-53 if dtype == torch.float64 else -24)
        ad, gd, places = a.double(), g.double(), shape[2] * shape[3]
        error = torch.zeros(())  # of a weight, in units
        if method == "gradcam":
            weight = gd.mean((2, 3), keepdim=True)
            error = gd.abs().mean((2, 3), keepdim=True) * (places + 2)
        elif method == "xgradcam":
            total = (ad + 1e-8).sum((2, 3), keepdim=True)
            weight = (gd * ad).sum((2, 3), keepdim=True) / total
            error = (gd * ad).abs().sum((2, 3), keepdim=True) / total * (2 * places + 6)
        else:
            weight = gd.clamp_min(0) if method == "layercam" else gd
        bound = (error * ad.abs() + (weight * ad).abs() * (shape[1] + 2)).sum(1) * unit * 1.05 + 1e-30
        off = (got - wanted).abs()
        require((off <= bound).all(), f"off by {off.max():.3g}, {(off - bound).max():.3g} over the bound")

    def upsample(self, maps: Maps, size: Size, dtype: torch.dtype) -> None:
        """upsample_cam: the CPU reference's bits, PIL's values; its gradient near the float64 reference's."""
        small = self.maps(maps, dtype)
        self.poison()
        got = upsample_cam(small.to(self.device), size).cpu()
        with part_fast.backend("reference"):
            _same("upsample_cam", got, upsample_cam(small, size))
        if dtype == torch.float32:
            for one, u in zip(small, got, strict=True):
                off = float((u - oracle.enlarged(oracle.normalised(one), size)).abs().max())
                require(off <= 2e-6, f"off PIL's by {off:.3g}")
        weight = self.randn(maps[0], *size).to(dtype)
        grad = _upsample_cam_bwd(weight.to(self.device), small.to(self.device)).double().cpu()
        right = _upsample_cam_bwd.reference(weight.double(), small.double())
        off = float((grad - right).abs().max() / right.abs().max().clamp_min(1e-12))
        require(off <= NEAR[dtype] or maps[1] * maps[2] == 1, f"gradient off by {off:.3g} of the largest")

    def soft(self, maps: Maps, size: Size, dtype: torch.dtype) -> None:
        """epsilon_map by rule soft: the CPU reference's bits."""
        small = self.maps(maps, dtype)
        got = epsilon_map(small.to(self.device), size, EPS, EPS_LOW, "soft")
        with part_fast.backend("reference"):
            _same("soft", got, epsilon_map(small, size, EPS, EPS_LOW, "soft"))

    def mask(self, maps: Maps, size: Size, rule: str, dtype: torch.dtype) -> None:
        """cam_mask, epsilon_map and packed_epsilon_map: one mask, the reference's and the oracle's."""
        small = self.maps(maps, dtype)
        small[0] = 0.25  # no evidence
        self.poison()
        laid = small.to(self.device)
        mask = cam_mask(laid, size, rule).cpu()
        require(not mask[0].any(), "a flat map has a mask")
        with part_fast.backend("reference"):
            reference = cam_mask(small, size, rule)
        off, quantile = differing(mask, reference), rule.startswith("quantile")
        # Sums of float32 in another order move a threshold by some 1e-7: values on it change sides.
        allowed = 0 if quantile else max(2, int(2e-4 * mask.numel()))
        require(off <= allowed, f"{off} of {mask.numel()} mask values are not the CPU reference's")
        eps = epsilon_map(laid, size, EPS, EPS_LOW, rule).cpu()
        high, low = (torch.tensor(value, dtype=eps.dtype) for value in (EPS, EPS_LOW))
        _same("epsilon_map", eps, torch.where(mask, high, low))
        _same("packed_epsilon_map", packed_epsilon_map(laid, size, EPS, EPS_LOW, rule).mask(), mask)
        if quantile:
            keep = math.ceil(float(rule.partition(":")[2]) * size[0] * size[1] - 1e-9)
            flat = small.amax((1, 2)) == small.amin((1, 2))
            require((mask.flatten(1).sum(1) == torch.where(flat, 0, keep)).all(), "not exactly k pixels")
        elif dtype in (torch.float32, torch.float64) and min(maps[1:]) > 1:
            find = oracle.released_mask if rule == "released" else oracle.zscore_mask
            some = [(one, m) for one, m in zip(small[1:5].float(), mask[1:5], strict=True) if one.max() > one.min()]
            far = sum(differing(find(oracle.normalised(one), size), m) for one, m in some)
            require(far <= max(4, int(5e-3 * mask[1:5].numel())), f"{far} values are not PIL's and matplotlib's")

    # --- what only a GPU has ------------------------------------------------------------------------------------------

    def calls(self, n: int = 16) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
        """Every public op at an ordinary shape, float32, as a function of tensors; and the tensors."""
        size, shape = (32, 32), (n, 3, 32, 32)
        bits, dense = self.eps("bits1", shape)
        assert isinstance(bits, PackedEpsilon)
        x_adv, grad, x = (self.lay(value, "contiguous") for value in self.images(shape, torch.float32, dense))
        eps = dense[:, :1].float().to(self.device)
        a, g = (self.randn(n, 64, 8, 8).relu().to(self.device) for _ in range(2))
        small = self.maps((n, 8, 8)).to(self.device)
        bank, places = (value.to(self.device) for value in self.bank(shape))

        def step_packed(x_adv: Tensor, grad: Tensor, x: Tensor, bits: Tensor) -> Tensor:
            return pgd_step(x_adv, grad, x, PackedEpsilon(bits, size, EPS, EPS_LOW), ALPHA)

        return {
            "pgd_step": (lambda a, g, n, e: pgd_step(a, g, n, e, ALPHA), (x_adv, grad, x, eps)),
            "pgd_step packed": (step_packed, (x_adv, grad, x, bits.bits)),
            "pgd_step_": (lambda a, g, n, e: pgd_step_(a, g, n, e, ALPHA), (x_adv.clone(), grad, x, eps)),
            "project_linf": (project_linf, (x_adv, x, eps)),
            "uniform_start": (lambda n, e: uniform_start(n, e, seed=5), (x, eps)),
            "bank_start": (lambda n, b, p, e: bank_start(n, b, p, e, scale=0.1), (x, bank, places, eps)),
            "eps_step_": (
                lambda a, g, n, e, b, p: eps_step_(a, g, n, e, 1.25, bank=b, places=p, scale=0.1),
                (x_adv.clone(), grad, x, eps, bank, places),
            ),
            "cam": (cam, (a, g)),
            "cam xgradcam": (lambda a, g: cam(a, g, "xgradcam"), (a, g)),
            "upsample_cam": (lambda c: upsample_cam(c, size), (small,)),
            "cam_mask": (lambda c: cam_mask(c, size), (small,)),
            "cam_mask quantile": (lambda c: cam_mask(c, size, "quantile:0.3"), (small,)),
            "epsilon_map": (lambda c: epsilon_map(c, size, EPS, EPS_LOW, "released"), (small,)),
            "epsilon_map soft": (lambda c: epsilon_map(c, size, EPS, EPS_LOW, "soft"), (small,)),
            "packed_epsilon_map": (lambda c: packed_epsilon_map(c, size, EPS, EPS_LOW).bits, (small,)),
        }

    def stream(self, function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> None:
        """On a side stream that writes the inputs after a wait: a launch on another stream reads what was before."""
        wanted = function(*_clones(tensors)).clone()  # the first call, which compiles and allocates
        late = [torch.zeros_like(value) for value in tensors]
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
            for to, of in zip(late, tensors, strict=True):
                to.copy_(of)
            result = function(*late)
        require(not side.query(), "the call waited for the GPU")
        side.synchronize()
        _same("on a side stream", result, wanted)

    def graph(self, function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> None:
        """Captured by a CUDA graph, replayed on other inputs in the same memory."""
        held = _clones(tensors)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(*_clones(held))
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function(*held)
        for replay in range(3):
            inputs = [value.flip(0) if replay % 2 else value for value in tensors]
            for to, of in zip(held, inputs, strict=True):
                to.copy_(of)
            graph.replay()
            _same(f"replay {replay}", result, function(*_clones(inputs)))

    def big(self, what: str) -> None:
        """More than 2^31 elements, up to 30 GB: images at both ends and about 2^31 are what the op gives them alone."""
        elements, side = (2**17, 32) if self.dry else (2**31, 1024)
        device = self.device
        if device.type == "cuda" and (free := torch.cuda.mem_get_info()[0]) < BIG_BYTES:
            raise MissingError(f"needs {BIG_BYTES / 1e9:.0f} GB of free GPU memory, there are {free / 1e9:.0f}")
        if what.startswith("step"):
            middle = elements // (3 * side * side)
            n = middle + 3
            memory_format = torch.channels_last if "last" in what else torch.contiguous_format

            def draw() -> Tensor:
                shape = (n, 3, side, side)
                return torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=memory_format).uniform_()

            x, grad = draw(), draw().sub_(0.5)
            x_adv = draw().mul_(0.1).add_(x)
            mask = torch.rand(n, 1, side, side, device=device) < 0.3
            eps: Any = EPS if "float" in what else torch.where(mask, EPS, EPS_LOW)
            if "bits" in what:
                eps = PackedEpsilon.pack(mask, EPS, EPS_LOW)
            del mask
            stepped, projected = pgd_step(x_adv, grad, x, eps, ALPHA), project_linf(x_adv, x, eps)
            for i in sorted({0, 1, middle - 1, middle, middle + 1, n - 1}):
                part = slice(i, i + 1)
                own = eps if isinstance(eps, float) else eps[part]
                _same(f"image {i}", stepped[part], pgd_step(x_adv[part], grad[part], x[part], own, ALPHA))
                _same(f"project_linf, image {i}", projected[part], project_linf(x_adv[part], x[part], own))
            return
        if what == "bank":
            samples = elements // (3 * 32 * 32) + 2
            bank = torch.randint(-127, 128, (samples, 3, 32, 32), dtype=torch.int8, device=device)
            few, (x_adv, grad, x) = (4, 3, 32, 32), (self.rand(3, 4, 3, 32, 32) - 0.5).to(device)
            places = self.bank(few)[1].to(device)
            places[:, 0] = torch.tensor([0, samples // 2, samples - 2, samples - 1])
            own = bank[places[:, 0]]
            renamed = places.clone()
            renamed[:, 0] = torch.arange(4)
            started = bank_start(x, bank, places, EPS, scale=0.1)
            _same("bank_start", started, bank_start(x, own, renamed, EPS, scale=0.1))
            for stored, rows in ((bank, places), (own, renamed)):
                eps_step_(x_adv.clone(), grad, x, EPS, 1.25, bank=stored, places=rows, scale=0.1)
            _same("the bank", bank[places[:, 0]], own)
            return
        shape = (elements // (512 * 16) + 2, 512, 4, 4)
        if what == "cam":
            a, g = (torch.empty(shape, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
            functions: dict[str, Callable[[slice], Tensor]] = {"cam": lambda part: cam(a[part], g[part])}
        else:
            shape = (elements // 1024 + 2, 4, 4, 1)
            small = torch.empty(shape[:3], device=device).normal_()
            functions = {
                "cam_mask": lambda part: cam_mask(small[part], (32, 32)),
                "upsample_cam": lambda part: upsample_cam(small[part], (32, 32)),
            }
        for name, function in functions.items():
            result = function(slice(None))
            for i in (0, shape[0] // 2, shape[0] - 1):
                _same(f"{name}, image {i}", result[i : i + 1], function(slice(i, i + 1)))
            del result

    @torch.no_grad()
    def host(self, recorder: Recorder, backend: str) -> None:
        """Microseconds of Python and launch of a call that nobody waits for, and of the call on the device."""
        n, repeats = (2, 1) if self.dry else (128, 40)
        for name, (function, tensors) in self.calls(n).items():
            for _ in range(repeats // 2):
                function(*tensors)
            host = math.inf
            for _ in range(5):
                synchronize(self.device)
                begin = time.perf_counter()
                for _ in range(repeats):
                    function(*tensors)
                host = min(host, (time.perf_counter() - begin) / repeats)
            device, _, _ = timed(lambda f=function, t=tensors: f(*t), self.device, calls=repeats)  # type: ignore[misc]
            recorder.value(f"host, {backend}, {name}", host_us=1e6 * host, call_us=1e6 * device)

    # --- which of them ------------------------------------------------------------------------------------------------

    def cases(self, kinds: set[str], thin: int) -> Iterator[Case]:
        """The checks of values: the wide products thinned to every `thin`-th, the small ones to a share of that."""
        if "step" in kinds:
            wide = itertools.product(DTYPES, LAYOUTS, FORMS, SHAPES)
            for d, layout, form, shape in itertools.islice(wide, 0, None, thin):
                yield f"step {d} {layout} {form} {shape}", self.step, shape, DTYPES[d], layout, form
            for d, g in itertools.permutations(DTYPES, 2):
                shape, form = SHAPES[1], "(N,1,H,W)"
                yield f"step {d}, gradient {g}", self.step, shape, DTYPES[d], LAYOUTS[0], form, DTYPES[g]
        if "backward" in kinds:
            wide = itertools.product(DTYPES, LAYOUTS, FORMS, SHAPES[:4])
            for d, layout, form, shape in itertools.islice(wide, 0, None, thin):
                yield f"backward {d} {layout} {form} {shape}", self.backward, shape, DTYPES[d], layout, form
        if "fast" in kinds:
            wide = itertools.product(DTYPES, LAYOUTS, FORMS, SHAPES)
            for d, layout, form, shape in itertools.islice(wide, 0, None, thin):
                yield f"fast {d} {layout} {form} {shape}", self.fast, shape, DTYPES[d], layout, form
            for d, g in itertools.permutations(DTYPES, 2):
                shape, form = SHAPES[1], "(N,1,H,W)"
                yield f"fast {d}, gradient {g}", self.fast, shape, DTYPES[d], LAYOUTS[0], form, DTYPES[g]
        if "cam" in kinds:
            products = itertools.product(DTYPES, LAYOUTS, METHODS, CAM_SHAPES)
            for d, layout, method, shape in itertools.islice(products, 0, None, thin):
                yield f"cam {d} {layout} {method} {shape}", self.cam, shape, DTYPES[d], layout, method
        for kind, check, sizes in (("upsample", self.upsample, SIZES), ("soft", self.soft, SIZES[:6])):
            if kind in kinds:
                some = itertools.islice(itertools.product(sizes, DTYPES), 0, None, max(1, thin // 11))
                for (maps, size), d in some:
                    yield f"{kind} {d} {maps} {size}", check, maps, size, DTYPES[d]
        if "mask" in kinds:
            masks = itertools.product(SIZES, RULES, DTYPES)
            for (maps, size), rule, d in itertools.islice(masks, 0, None, thin):
                yield f"mask {d} {rule} {maps} {size}", self.mask, maps, size, rule, DTYPES[d]


def _same(what: str, got: Tensor, wanted: Tensor) -> None:
    wrong = differing(got, wanted)
    require(wrong == 0, f"{what}: {wrong} of {wanted.numel()} values differ")


def _clones(tensors: Any) -> list[Tensor]:
    return [value.clone() for value in tensors]


def _raw_eps(eps: float | Tensor | PackedEpsilon, shape: Shape, device: str) -> tuple[Tensor | None, float, float]:
    """An eps argument as the raw ops take it."""
    if isinstance(eps, float):
        return None, eps, 0.0
    if isinstance(eps, PackedEpsilon):
        return eps.bits.to(device), eps.eps, eps.eps_low
    return (eps if eps.device.type == torch.device(device).type else eps.to(device)).expand(shape), 0.0, 0.0


def main(arguments: list[str] | None = None) -> int:
    """Check backends, or a share of their cases."""
    flags = parser(__doc__)
    flags.add_argument("--backends", required=True, help="one after another, separated by commas")
    flags.add_argument("--shard", default="0/1", help="i/n: the i-th of every n cases of values")
    flags.add_argument("--kinds", default=",".join(KINDS))
    flags.add_argument("--thin", type=int, default=1, help="every k-th case of the wide products")
    args = flags.parse_args(arguments)
    recorder = Recorder("ops", args)
    kinds = set(args.kinds.split(","))
    shard = tuple(map(int, args.shard.split("/")))
    for name in args.backends.split(","):
        if name in part_fast.available_backends(recorder.device):
            with part_fast.backend(name):
                check(recorder, name, kinds, shard, args.thin)
        else:
            device = recorder.device.type
            recorder.skip(name, part_fast.backends.why_not(name, device) or f"there is no {device} device")
    return recorder.code


def check(recorder: Recorder, name: str, kinds: set[str], shard: tuple[int, ...], thin: int) -> None:
    """The checks of those kinds by the backend called `name`, which is chosen; of the values' every shard[1]-th."""
    device = recorder.device
    checks = Checks(device, recorder.dry)
    for case, function, *given in itertools.islice(checks.cases(kinds, thin), shard[0], None, shard[1]):
        recorder.case(f"{name}: {case}", function, *given, quiet=True)
    for kind in ("stream", "graph"):
        if kind in kinds and device.type != "cuda":
            recorder.skip(f"{name}: {kind}", "needs a CUDA device")
        elif kind in kinds and shard[0] == 0:
            for call, (function, tensors) in checks.calls().items():
                recorder.case(f"{name}: {kind} {call}", getattr(checks, kind), function, tensors, quiet=True)
    if "big" in kinds:
        for what in ("step float", "step tensor", "step bits", "step bits last", "bank", "cam", "maps"):
            recorder.case(f"{name}: big {what}", checks.big, what)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if "host" in kinds:
        recorder.case(f"{name}: host", checks.host, recorder, name)


if __name__ == "__main__":
    sys.exit(main())
