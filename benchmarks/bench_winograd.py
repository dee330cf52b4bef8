"""Speed of 3x3 convolutions as an attack multiplies them on a CPU, forward, against oneDNN with packed weights.

Shapes are those of ResNet-18 at batch 32 and WRN-34-10 at batch 4 on 32x32 images. extra_info has the GFLOP/s of the
convolution, of which Winograd multiplies a quarter, and the largest error over the largest value.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from part_fast.attack_model.cpu import onednn, winograd
from part_fast.attack_model.cpu.packed_conv import PackedConv2d

SHAPES = [(32, 64, 32), (32, 128, 16), (32, 256, 8), (32, 512, 4), (4, 160, 32), (4, 320, 16), (4, 640, 8)]
PROVIDERS = {"oneDNN float32": torch.float32, "oneDNN bfloat16": torch.bfloat16, "winograd": torch.float32}
# Of the largest value: roundings of sums of up to 5760 products.
NEAR = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("n", "channels", "side"), SHAPES, ids=lambda value: str(value))
def test_speed(benchmark, monkeypatch, n, channels, side, provider):
    dtype = PROVIDERS[provider]
    if not onednn.works(dtype):
        pytest.skip(f"oneDNN does not multiply {dtype} here")
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False).requires_grad_(False)
    x = torch.randn(n, channels, side, side).contiguous(memory_format=torch.channels_last)
    packed = PackedConv2d(conv, dtype)
    given = x.to(dtype)
    exact = F.conv2d(x.double(), conv.weight.double(), padding=1)
    monkeypatch.setattr(winograd, "pays", lambda *_: provider == "winograd")
    with torch.no_grad():
        error = float((packed(given).double() - exact).abs().max() / exact.abs().max())
        assert error < NEAR[dtype]
        benchmark.group = f"{n}x{channels}x{side}x{side}"
        benchmark.pedantic(packed, (given,), rounds=21, iterations=3, warmup_rounds=2)
    flop = 2 * 9 * channels**2 * n * side**2
    benchmark.extra_info |= {"gflop_per_s": flop / benchmark.stats.stats.median / 1e9, "error": error}
