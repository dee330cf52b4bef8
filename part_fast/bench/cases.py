"""The cases of every op that `bench ops` times, the providers that compute one, and whether they compute the same."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from part_fast import backends
from part_fast.errors import CannotRunError
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
from part_fast.ops.bank_start import _reference as bank_reference
from part_fast.ops.cam_mask import jet
from part_fast.ops.eps_step import _reference_ as eps_step_reference
from part_fast.ops.uniform_start import _reference as uniform_reference
from part_fast.ops.upsample_cam import keys_taps
from part_fast.optional import needs

with needs("pillow", "train"):
    from part_fast.bench.published import published_epsilon_map

EPS, EPS_LOW, ALPHA = 8 / 255, 7 / 255, 2 / 255

OWN = ("cpp", "triton", "cuda")

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class MismatchError(CannotRunError):
    """A provider computes something else than the reference, so its speed means nothing."""


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    run: the call, with the case's inputs as arguments. backend: the part_fast backend it runs on, if any.
    exact: whether its result must be the reference's, bit for bit. captured: whether a CUDA graph can hold it.
    """

    name: str
    run: Callable[..., Any]
    backend: str | None = None
    exact: bool = False
    captured: bool = True


@dataclasses.dataclass(frozen=True)
class Case:
    """An op at one shape, dtype, memory format and form.

    inputs: makes the op's tensors (or PackedEpsilon) on a device, the same ones for the same seed; the first one is
    written if `in_place`. run: the public function of them. plain: makes, for a device, the expression to compile.
    raw: the raw op behind it. exact: the backends that promise the reference's bits.
    near: how far a value may be off where bits are not promised, as a share of the largest value; away: the
    share of values that may be further off (mask values that lie on their threshold).
    """

    op: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[torch.device, int], tuple[Any, ...]]
    run: Callable[..., Any]
    plain: Callable[[torch.device], Callable[..., Any]]
    raw: str
    exact: tuple[str, ...] = ()
    near: float = 0.0
    away: float = 0.0
    in_place: bool = False
    vectorised: bool = False
    published: Callable[..., Any] | None = None
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {dtype_name(self.dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def all_cases() -> list[Case]:
    """Every case of every op, in the order of the tables."""
    cases: list[Case] = []
    dtypes = (torch.float32, torch.bfloat16)
    for op in ("pgd_step", "pgd_step_", "project_linf"):
        sides = ((128, 32), (128, 64), (512, 128))
        for (n, side), dtype, packed, layout in itertools.product(sides, dtypes, (False, True), LAYOUTS):
            quick = side == 32 and not packed and layout == "contiguous"
            cases.append(step_case(op, (n, 3, side, side), dtype, packed, layout, quick))
    for op in ("uniform_start", "bank_start", "eps_step_"):
        for dtype, packed, layout in itertools.product(dtypes, (False, True), LAYOUTS):
            quick = not packed and layout == "contiguous"
            cases.append(fast_case(op, (128, 3, 32, 32), dtype, packed, layout, quick))
    shapes = ((128, 512, 4, 4), (128, 640, 8, 8), (32, 640, 16, 16))
    for shape, dtype, layout in itertools.product(shapes, dtypes, LAYOUTS):
        cases.append(cam_case(shape, dtype, layout, quick=shape[1] == 512))
    sizes = (((128, 8, 8), (32, 32)), ((128, 4, 4), (32, 32)), ((128, 8, 8), (64, 64)), ((32, 7, 7), (224, 224)))
    for op, rule in (("upsample_cam", ""), ("cam_mask", "zscore"), ("epsilon_map", "zscore")):
        cases += [map_case(op, *each, rule, quick=each is sizes[0]) for each in sizes]
        if op != "upsample_cam":
            cases.append(map_case(op, *sizes[0], "released", quick=op == "epsilon_map"))
            cases.append(map_case(op, *sizes[0], "quantile:0.3"))
    cases.append(map_case("epsilon_map", *sizes[0], "soft"))
    cases.append(map_case("epsilon_map", *sizes[0], "zscore", packed=True))
    return cases


OPS = (
    "pgd_step",
    "pgd_step_",
    "project_linf",
    "uniform_start",
    "bank_start",
    "eps_step_",
    "cam",
    "upsample_cam",
    "cam_mask",
    "epsilon_map",
)


def step_case(
    op: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    packed: bool,
    layout: str = "contiguous",
    quick: bool = False,
) -> Case:
    """pgd_step, pgd_step_ or project_linf; eps is a float32 map (N,1,H,W), or the same in packed bits.

    All image tensors have `dtype` and `layout`. Inputs: x_adv, grad, x, eps; of project_linf: x_adv, x, eps.
    """
    size = shape[2:]

    def inputs(device: torch.device, seed: int) -> tuple[Any, ...]:
        draw = torch.Generator(device).manual_seed(seed)
        x = torch.rand(shape, generator=draw, device=device)
        grad = torch.randn(shape, generator=draw, device=device)
        mask = torch.rand((shape[0], 1, *size), generator=draw, device=device) < 0.3
        # Some pixels beyond their bound, some within.
        x_adv = (x + 1.2 * EPS * (2 * torch.rand(shape, generator=draw, device=device) - 1)).clamp(0, 1)
        eps = PackedEpsilon.pack(mask, EPS, EPS_LOW)
        images = (x_adv, x) if op == "project_linf" else (x_adv, grad, x)
        return (*(t.to(dtype, memory_format=LAYOUTS[layout]) for t in images), eps if packed else eps.dense())

    def plain(device: torch.device) -> Callable[..., Any]:
        place = 2 ** torch.arange(8, device=device, dtype=torch.uint8)

        def dense(eps: Any) -> Any:
            if not packed:
                return eps
            bits = (eps.bits[..., None] & place).flatten(2)[..., : size[0] * size[1]]
            return torch.where(bits.view(shape[0], 1, *size) != 0, EPS, EPS_LOW)

        def project(x_adv: Tensor, x: Tensor, eps: Any) -> Tensor:
            bound, natural = dense(eps), x.float()
            return (natural + torch.clamp(x_adv.float() - natural, -bound, bound)).to(dtype)

        def step(x_adv: Tensor, grad: Tensor, x: Tensor, eps: Any) -> Tensor:
            bound, natural = dense(eps), x.float()
            moved = x_adv.float() + ALPHA * grad.float().sign() - natural
            return torch.clamp(natural + torch.clamp(moved, -bound, bound), 0, 1).to(dtype)

        if op == "project_linf":
            return project
        return step if op == "pgd_step" else lambda x_adv, *others: x_adv.copy_(step(x_adv, *others))

    runs: dict[str, Callable[..., Any]] = {
        "project_linf": project_linf,
        "pgd_step": partial(pgd_step, alpha=ALPHA),
        "pgd_step_": partial(pgd_step_, alpha=ALPHA),
    }
    return Case(
        op=op,
        shape=f"{'x'.join(map(str, shape))} {layout}, eps {'packed' if packed else '(N,1,H,W)'}",
        dtype=dtype,
        inputs=inputs,
        run=runs[op],
        plain=plain,
        raw=f"_{op}",
        exact=OWN,
        near=2.0**-23 if dtype == torch.float32 else 2.0**-8,  # one rounding of a value near 1
        in_place=op == "pgd_step_",
        quick=quick,
    )


def fast_case(
    op: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    packed: bool,
    layout: str = "contiguous",
    quick: bool = False,
) -> Case:
    """uniform_start, bank_start or eps_step_, which writes to a bank; eps as in `step_case`.

    Inputs: x, eps; of bank_start: x, eps, bank, places; of eps_step_: x_adv, grad, x, eps, bank, places. The bank has
    as many samples as there are images, each of which is cropped by up to 4 pixels and flipped or not. What is
    compiled beside them is the reference's own expression, for uniform_start with its generator: torch.rand draws other
    numbers.
    """
    of_steps = step_case("pgd_step", shape, dtype, packed, layout).inputs
    n = shape[0]

    def inputs(device: torch.device, seed: int) -> tuple[Any, ...]:
        x_adv, grad, x, eps = of_steps(device, seed)
        if op == "uniform_start":
            return x, eps
        draw = torch.Generator(device).manual_seed(seed + 1)
        bank = torch.randint(-127, 128, shape, generator=draw, device=device, dtype=torch.int8)
        shifts = torch.randint(-4, 5, (2, n), generator=draw, device=device)
        columns = torch.randperm(n, generator=draw, device=device), *shifts, torch.arange(n, device=device) % 2
        kept = bank, torch.stack(columns, 1)
        return (x, eps, *kept) if op == "bank_start" else (x_adv, grad, x, eps, *kept)

    def run(*given: Any) -> Tensor:
        if op == "uniform_start":
            return uniform_start(*given, seed=7)
        if op == "bank_start":
            x, eps, bank, places = given
            return bank_start(x, bank, places, eps, scale=EPS)
        x_adv, grad, x, eps, bank, places = given
        return eps_step_(x_adv, grad, x, eps, 1.25, bank=bank, places=places, scale=EPS)

    def plain(device: torch.device) -> Callable[..., Any]:
        # Not `run` on the backend "reference": Dynamo before torch 2.14 traces no choice of a backend.
        def bounds(x: Tensor, eps: Any) -> tuple[Tensor, float, float]:
            return (eps.bits, EPS, EPS_LOW) if packed else (eps.expand(x.shape), 0.0, 0.0)

        def noise(x: Tensor, eps: Any) -> Tensor:
            return uniform_reference(x, *bounds(x, eps), 1.0, 7, 0.0, 1.0)

        def start(x: Tensor, eps: Any, bank: Tensor, places: Tensor) -> Tensor:
            return bank_reference(x, bank, places, *bounds(x, eps), EPS / 127, 0.0, 1.0)

        def step(x_adv: Tensor, grad: Tensor, x: Tensor, eps: Any, bank: Tensor, places: Tensor) -> Tensor:
            settings = *bounds(x, eps), 1.25, True, True, 0.0, 1.0
            eps_step_reference(x_adv, grad, x, *settings, bank, places, 127 / EPS)
            return x_adv

        made: dict[str, Callable[..., Any]] = {"uniform_start": noise, "bank_start": start, "eps_step_": step}
        return made[op]

    return Case(
        op=op,
        shape=f"{'x'.join(map(str, shape))} {layout}, eps {'packed' if packed else '(N,1,H,W)'}",
        dtype=dtype,
        inputs=inputs,
        run=run,
        plain=plain,
        raw=f"_{op}",
        exact=OWN,
        near=2.0**-23 if dtype == torch.float32 else 2.0**-8,  # one rounding of a value near 1
        in_place=op == "eps_step_",
        quick=quick,
    )


def cam_case(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str = "contiguous", quick: bool = False
) -> Case:
    """Grad-CAM. Inputs: activation, gradient, both `shape`, `dtype` and `layout`; float32 out."""

    def inputs(device: torch.device, seed: int) -> tuple[Any, ...]:
        draw = torch.Generator(device).manual_seed(seed)
        activation, gradient = (torch.randn(shape, generator=draw, device=device) for _ in range(2))
        lay = partial(torch.Tensor.to, dtype=dtype, memory_format=LAYOUTS[layout])
        return lay(activation.relu()), lay(gradient)

    def plain(device: torch.device) -> Callable[..., Any]:
        def gradcam(activation: Tensor, gradient: Tensor) -> Tensor:
            return (gradient.float().mean((2, 3), keepdim=True) * activation.float()).sum(1).relu()

        return gradcam

    name = f"{'x'.join(map(str, shape))} {layout}, gradcam"
    # Sums of up to 640 products in another order, whose own rounding is some 1e-7 of the largest.
    return Case("cam", name, dtype, inputs, cam, plain, "_cam", near=1e-5, quick=quick)


def map_case(
    op: str, maps: tuple[int, int, int], size: tuple[int, int], rule: str, packed: bool = False, quick: bool = False
) -> Case:
    """upsample_cam, cam_mask or epsilon_map. Input: cam, float32 (N,h,w), non-negative."""
    release = op == "epsilon_map" and rule in ("zscore", "released") and not packed

    def inputs(device: torch.device, seed: int) -> tuple[Any, ...]:
        draw = torch.Generator(device).manual_seed(seed)
        return (torch.randn(maps, generator=draw, device=device).relu(),)

    def run(cam: Tensor) -> Tensor:
        if op == "upsample_cam":
            return upsample_cam(cam, size)
        if op == "cam_mask":
            return cam_mask(cam, size, rule)
        if packed:
            return packed_epsilon_map(cam, size, EPS, EPS_LOW, rule).bits
        return epsilon_map(cam, size, EPS, EPS_LOW, rule)

    form = f" {rule}{' packed' if packed else ''}".rstrip()
    return Case(
        op=op,
        shape=f"{maps[0]} {maps[1]}x{maps[2]}->{size[0]}x{size[1]}{form}",
        dtype=torch.float32,
        inputs=inputs,
        run=run,
        plain=lambda device: plain_map(op, maps[1:], size, rule, packed, device),
        raw="_cam_mask" if packed else f"_{op}",
        exact=("cpp",) if rule not in ("", "soft") else (),
        near=2e-6,
        away=0.0 if rule in ("", "soft") else 1e-4,
        vectorised=True,
        published=partial(published_epsilon_map, size=size, rule=rule, eps=EPS, eps_low=EPS_LOW) if release else None,
        quick=quick,
    )


def plain_map(
    op: str, small: tuple[int, ...], size: tuple[int, int], rule: str, packed: bool, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """upsample_cam, cam_mask or epsilon_map as vectorised PyTorch: two matrix products, then means.

    The interpolation's weights and the colours are computed here, once, and not when it is called.
    """
    rows, columns = (_weights(a, b, device) for a, b in zip(small, size, strict=True))
    colours = jet().to(device, torch.float32)
    pixels = size[0] * size[1]
    place = 2 ** torch.arange(8, device=device, dtype=torch.uint8)

    def upsample(cam: Tensor) -> Tensor:
        low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
        return rows @ ((cam - low) / (high - low) @ columns.T)

    def above_one_sigma(values: Tensor) -> Tensor:
        # Not torch.std: several times slower on a CPU.
        deviation = values - values.mean(1, keepdim=True)
        return deviation > deviation.square().mean(1, keepdim=True).sqrt()

    def mask(u: Tensor) -> Tensor:
        if rule == "released":
            entry = (u * u * 256).clamp(max=255).int().flatten()
            rgb = colours.index_select(0, entry).view(len(u), -1)
            return above_one_sigma(rgb).view(-1, *size, 3).permute(0, 3, 1, 2).contiguous()
        if rule == "zscore":
            return above_one_sigma(u.flatten(1)).view(-1, 1, *size)
        keep = math.ceil(float(rule.partition(":")[2]) * pixels)
        flat = u.flatten(1)
        chosen = torch.zeros_like(flat, dtype=torch.bool).scatter(1, flat.topk(keep, sorted=False).indices, True)
        return chosen.view(-1, 1, *size)

    def plain(cam: Tensor) -> Tensor:
        u = upsample(cam)
        if op == "upsample_cam":
            return u
        if rule == "soft":
            return EPS_LOW + (EPS - EPS_LOW) * u.clamp(0, 1)[:, None]
        if op == "cam_mask":
            return mask(u)
        if packed:
            padded = torch.nn.functional.pad(mask(u).flatten(2), (0, -pixels % 8))
            bits: Tensor = (padded.unflatten(2, (-1, 8)).to(torch.uint8) * place).sum(3, dtype=torch.uint8)
            return bits
        return torch.where(mask(u), EPS, EPS_LOW)

    return plain


def _weights(size_in: int, size_out: int, device: torch.device) -> Tensor:
    """Keys bicubic interpolation as a matrix (size_out, size_in)."""
    index, weight = keys_taps(size_in, size_out, torch.float32, device)
    return weight.new_zeros(size_out, size_in).scatter_add_(1, index, weight)


def names_of(case: Case, device: torch.device) -> list[str]:
    """Names of all providers but `copy` that can run the case on that device, the reference first."""
    baselines = {"reference": True, "published": case.published, "vectorised": case.vectorised, "torch.compile": True}
    own = [name for name in OWN if why_not(case.raw, name, device) is None]
    return [name for name, there in baselines.items() if there] + own


def providers_of(case: Case, device: torch.device) -> list[Provider]:
    """The providers of `names_of`."""
    plain = case.plain(device)
    baselines = {
        "reference": Provider("reference", case.run, "reference", captured=False),
        "published": Provider("published", case.published or plain, captured=False),
        "vectorised": Provider("vectorised", plain),
        "torch.compile": Provider("torch.compile", torch.compile(plain, fullgraph=True, dynamic=False)),
    }
    return [
        baselines.get(name) or Provider(name, case.run, name, exact=name in case.exact)
        for name in names_of(case, device)
    ]


def why_not(raw: str, backend: str, device: torch.device) -> str | None:
    """Why a backend's kernel for a raw op cannot be timed on a device; None if it can."""
    reason = backends.why_not(backend, device.type)
    if reason is None and backend == "triton" and device.type == "cpu":
        return "triton is interpreted on a CPU, and the interpreter's speed says nothing"
    if reason is not None:
        return reason
    # What a backend has no kernel for would run as the reference, under the backend's name.
    if backend == "triton":
        there = importlib.util.find_spec(f"part_fast.kernels.{raw.strip('_')}") is not None
    else:
        there = torch._C._dispatch_has_kernel_for_dispatch_key(
            f"part_fast::{raw}", "CPU" if backend == "cpp" else "CUDA"
        )
    return None if there else f"{backend} has no kernel of its own for part_fast::{raw}"


def tensor_bytes(value: Any) -> int:
    """Bytes of a tensor's elements or of a PackedEpsilon's bits."""
    return value.nbytes if isinstance(value, PackedEpsilon) else value.numel() * value.element_size()


def moved_bytes(inputs: Iterable[Any], result: Any) -> int:
    """The formula of every GB/s: each input read once, the result written once. In place, x_adv is both."""
    return sum(map(tensor_bytes, inputs)) + tensor_bytes(result)


def check(case: Case, providers: Sequence[Provider], device: torch.device) -> int:
    """Compare every provider with the first one, in what it returns and in what it writes to; returns the case's bytes.

    Errors: MismatchError, naming the provider and how many values differ.
    """
    inputs = case.inputs(device, 0)

    def results_of(provider: Provider) -> list[Tensor]:
        copies = tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)
        given = copies if case.in_place else inputs
        with torch.no_grad(), backends.backend(provider.backend):
            result: Tensor = provider.run(*given)
        return [result, *(value for value in given[1:] if case.in_place and isinstance(value, Tensor))]

    expected = results_of(providers[0])
    for provider in providers[1:]:
        for got, wanted in zip(results_of(provider), expected, strict=True):
            _compare(case, provider, got, wanted)
    return moved_bytes(inputs, expected[0])


def _compare(case: Case, provider: Provider, got: Tensor, wanted: Tensor) -> None:
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        is_, due = (f"{tuple(t.shape)} {dtype_name(t.dtype)}" for t in (got, wanted))
        raise MismatchError(f"{case.name}: {provider.name} returns {is_}, the reference {due}: not timed")
    reference = wanted.double()
    near = 0.0 if provider.exact or wanted.numel() == 0 else case.near * float(reference.abs().max())
    # Not `difference > near`: a NaN is a mismatch.
    wrong = int((~((got.double() - reference).abs() <= near)).sum())
    if wrong > (0 if provider.exact else case.away * wanted.numel()):
        share = f"{wrong} of {wanted.numel()} values"
        raise MismatchError(f"{case.name}: {provider.name} differs from the reference in {share}: not timed")
