"""The forms an `eps` argument takes: a float, a tensor that broadcasts to the images, a PackedEpsilon."""

from __future__ import annotations

import dataclasses
from typing import Any, overload

import torch
from torch import Tensor

from part_fast import checks
from part_fast.errors import BadTypeError, BadValueError


@dataclasses.dataclass(frozen=True, eq=False)
class PackedEpsilon:
    """An eps map of two values, one bit per mask value: 1/32 of the memory of the float map.

    bits: uint8 (N, M, ceil(H*W/8)); bit p % 8 (least significant first) of byte p // 8 is row-major pixel p.
        M is 1 (every channel alike) or the images' C. Bits past H*W are not read.
    size: (H, W).
    eps, eps_low: image units, eps where the bit is set and eps_low elsewhere; 0 <= eps_low <= eps.

    Errors: TypeError or ValueError for bits of another dtype or shape and for eps out of order.
    """

    bits: Tensor
    size: tuple[int, int]
    eps: float
    eps_low: float

    def __post_init__(self) -> None:
        if not isinstance(self.bits, Tensor) or self.bits.dtype != torch.uint8:
            got = self.bits.dtype if isinstance(self.bits, Tensor) else type(self.bits).__name__
            raise BadTypeError(f"bits must be a uint8 tensor, got {got}")
        if not isinstance(self.size, (tuple, list)) or len(self.size) != 2:
            raise BadTypeError(f"size must be (H, W), got {self.size!r}")
        size = (checks.count("size", self.size[0]), checks.count("size", self.size[1]))
        if self.bits.ndim != 3 or self.bits.shape[2] != bytes_per_mask(*size):
            raise BadValueError(
                f"bits must have shape (N, M, {bytes_per_mask(*size)}) for size {size}, got {tuple(self.bits.shape)}"
            )
        eps, eps_low = eps_pair(self.eps, self.eps_low)
        for name, value in (("bits", self.bits.contiguous()), ("size", size), ("eps", eps), ("eps_low", eps_low)):
            object.__setattr__(self, name, value)

    @classmethod
    def pack(cls, mask: Tensor, eps: float, eps_low: float) -> PackedEpsilon:
        """From a bool mask (N,M,H,W): eps where it is True.

        Equivalent to: `numpy.packbits(mask.flatten(2), axis=2, bitorder="little")`.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise BadTypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.ndim != 4:
            raise BadValueError(f"mask must have shape (N,M,H,W), got {tuple(mask.shape)}")
        return cls(pack_bits(mask), (mask.shape[2], mask.shape[3]), eps, eps_low)

    def dense(self) -> Tensor:
        """The eps map (N,M,H,W), float32."""
        return unpack_bits(self.bits, self.size, self.eps, self.eps_low, torch.float32)

    def mask(self) -> Tensor:
        """The bool mask (N,M,H,W)."""
        return unpack_bits(self.bits, self.size, 1.0, 0.0, torch.bool)

    def to(self, device: str | torch.device | int, non_blocking: bool = False) -> PackedEpsilon:
        """The same on another device."""
        return dataclasses.replace(self, bits=self.bits.to(device, non_blocking=non_blocking))

    @property
    def shape(self) -> torch.Size:
        """(N,M,H,W) of the dense map."""
        return torch.Size((*self.bits.shape[:2], *self.size))

    @property
    def device(self) -> torch.device:
        return self.bits.device

    @property
    def nbytes(self) -> int:
        """Bytes of the packed bits."""
        return self.bits.nbytes

    def __len__(self) -> int:
        return self.bits.shape[0]

    def __getitem__(self, index: Any) -> PackedEpsilon:
        """The chosen samples, by int (one sample, N = 1), slice, list, index tensor or bool tensor (N,)."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):  # also what ends a for loop over the samples
                raise IndexError(f"index must be in [{-len(self)}, {len(self)}), got {index}")
            index = slice(index % len(self), index % len(self) + 1)
        elif not isinstance(index, (slice, list, Tensor)) or (isinstance(index, Tensor) and index.ndim != 1):
            got = f"a tensor of shape {tuple(index.shape)}" if isinstance(index, Tensor) else repr(index)
            raise BadTypeError(f"index must choose samples: an int, slice, list or 1-D tensor, got {got}")
        return dataclasses.replace(self, bits=self.bits[index])

    @overload
    def index_select(self, index: Tensor, /) -> PackedEpsilon: ...

    @overload
    def index_select(self, dim: int, index: Tensor, /) -> PackedEpsilon: ...

    def index_select(self, *dim_and_index: Any) -> PackedEpsilon:
        """`index_select(index)`, or as torch spells it, `index_select(0, index)`: the samples of a 1-D int tensor."""
        dim, index = dim_and_index if len(dim_and_index) == 2 else (0, *dim_and_index)
        if dim != 0:
            raise BadValueError(f"dim must be 0 (samples), got {dim}")
        return dataclasses.replace(self, bits=self.bits.index_select(0, index))

    def __repr__(self) -> str:
        values = f"eps={self.eps:g}, eps_low={self.eps_low:g}"
        return f"PackedEpsilon(shape={tuple(self.shape)}, {values}, device={self.device})"


def eps_pair(eps: Any, eps_low: Any) -> tuple[float, float]:
    """Checked floats eps, eps_low: finite, 0 <= eps_low <= eps."""
    eps, eps_low = checks.number("eps", eps, 0), checks.number("eps_low", eps_low, 0)
    if eps_low > eps:
        raise BadValueError(f"eps_low must be <= eps, {eps:g}, got {eps_low:g}")
    return eps, eps_low


def bytes_per_mask(height: int, width: int) -> int:
    return (height * width + 7) // 8


def pack_bits(mask: Tensor) -> Tensor:
    """bool (N,M,H,W) -> uint8 (N, M, ceil(H*W/8))."""
    n, m, height, width = mask.shape
    bits = torch.nn.functional.pad(mask.reshape(n, m, height * width), (0, -(height * width) % 8))
    bits = bits.view(n, m, bytes_per_mask(height, width), 8).to(torch.uint8)
    return (bits << _places(mask.device)).sum(3, dtype=torch.uint8)


def unpack_bits(bits: Tensor, size: tuple[int, int], high: float, low: float, dtype: torch.dtype) -> Tensor:
    """uint8 (N, M, ceil(H*W/8)) -> (N,M,H,W): `high` where the bit is set, else `low`; rounded to float32."""
    places = bits[..., None] >> _places(bits.device) & 1
    mask = places.flatten(2)[..., : size[0] * size[1]].reshape(*bits.shape[:2], *size) != 0
    if dtype == torch.bool:
        return mask
    set_, clear = (torch.full((), value, dtype=torch.float32, device=bits.device).to(dtype) for value in (high, low))
    return torch.where(mask, set_, clear)


def _places(device: torch.device) -> Tensor:
    """How far each bit of a byte is shifted, uint8 (8,); made on the device, so that no GPU waits for a copy."""
    return torch.arange(8, dtype=torch.uint8, device=device)


EpsArguments = tuple[Tensor | None, float, float]


def eps_arguments(eps: Any, x_adv: Tensor) -> EpsArguments:
    """(eps, eps_high, eps_low) as the raw ops take any eps argument; `x_adv` is (N,C,H,W).

    eps is None for a float (which is eps_high), a floating tensor expanded to x_adv's shape, or
    packed bits, uint8 (N,M,ceil(H*W/8)), that choose between eps_high and eps_low.
    """
    if isinstance(eps, PackedEpsilon):
        n, channels, height, width = x_adv.shape
        if len(eps) != n or eps.size != (height, width) or eps.shape[1] not in (1, channels):
            raise BadValueError(f"eps must broadcast to the images, {tuple(x_adv.shape)}, got {eps!r}")
        if eps.device != x_adv.device:
            raise BadValueError(f"eps must be on the device of x_adv, {x_adv.device}, got {eps.device}")
        return eps.bits, eps.eps, eps.eps_low
    if not isinstance(eps, Tensor):
        return None, checks.number("eps", eps, 0), 0.0
    checks.tensor("eps", eps)
    if eps.device != x_adv.device:
        raise BadValueError(f"eps must be on the device of x_adv, {x_adv.device}, got {eps.device}")
    refuse_columns("eps", eps, x_adv.shape[3])
    try:
        return eps.expand(x_adv.shape), 0.0, 0.0
    except RuntimeError:  # asking first, dimension by dimension, takes longer than all other checks together
        shapes = f"{tuple(x_adv.shape)}, got {tuple(eps.shape)}"
    raise BadValueError(f"eps must broadcast to the images, {shapes}")


def refuse_columns(name: str, eps: Tensor, width: int) -> None:
    """An eps per image, (N,) or (N,1), would broadcast to columns or rows of pixels."""
    if (eps.ndim == 1 or (eps.ndim == 2 and eps.shape[1] == 1 != width)) and eps.shape[0] != 1:
        raise BadValueError(
            f"{name} must broadcast to (N,C,H,W) by its own dimensions: (N,1,1,1) for one per image, (1,1,1,W) for "
            f"one per column, got {tuple(eps.shape)}"
        )


def dense_eps(eps: Tensor | None, eps_high: float, eps_low: float, x_adv: Tensor) -> Tensor | float:
    """What the reference computes with: a float, or a tensor in the compute dtype that broadcasts to x_adv."""
    dtype = checks.compute_dtype(x_adv)
    if eps is None:
        return eps_high
    if eps.dtype == torch.uint8:
        return unpack_bits(eps, (x_adv.shape[2], x_adv.shape[3]), eps_high, eps_low, dtype)
    return eps.to(dtype)
