"""FLOP of convolutions and matrix products, counted while they run; and a large product, whose rate is the measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from part_fast.attack_model import PRECISIONS
from part_fast.attack_model.cpu import onednn
from part_fast.bench.clocks import Pass

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}

MATMULS = 3  # timed together


def matmul(precision: str, device: torch.device) -> tuple[Pass, float]:
    """A large matrix product, and its FLOP."""
    n = MATMUL_SIZE["cuda" if device.type == "cuda" else "cpu"]
    a, b = (torch.randn(n, n, device=device).to(PRECISIONS[precision]) for _ in range(2))
    result = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=result), 2.0 * n**3


def _packed_flop(x: Tensor, *args: Any, out_val: Tensor) -> int:
    (weight,) = (arg for arg in args if isinstance(arg, Tensor) and arg.is_mkldnn)
    return conv_flop_count(list(x.shape), list(weight.shape), list(out_val.shape))


def _packed_transposed_flop(x: Tensor, weight: Tensor, *args: Any, out_val: Tensor) -> int:
    return conv_flop_count(list(x.shape), list(weight.shape), list(out_val.shape), transposed=True)


def _winograd_flop(y: Tensor, x: Tensor, *args: Any, out_val: None) -> int:
    # The model's, as for every other convolution; what is multiplied is a quarter of it.
    return conv_flop_count(list(x.shape), [y.shape[1], x.shape[1], 3, 3], list(y.shape))


# What PackedConv2d calls, which torch has no formulas for.
_PACKED_FLOP: dict[str, Callable[..., int]] = {
    "part_fast::_winograd_": _winograd_flop,
    **dict.fromkeys(onednn.FORWARD_OPS, _packed_flop),
    **dict.fromkeys(onednn.BACKWARD_OPS, _packed_transposed_flop),
}


class FlopCount(TorchDispatchMode):
    """`with FlopCount() as count`: count.total, FLOP of the convolutions and matrix products that ran in the block.

    Torch's own FlopCounterMode also says in which module, for which it hooks into backward passes and refuses gradients
    for inputs alone.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = _PACKED_FLOP.get(func.name(), flop_registry.get(func.overloadpacket))
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result
