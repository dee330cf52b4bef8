"""Tests of part_fast.attack_model.cpu.onednn: torch's private calls are tried before anything relies on them."""

import warnings

import pytest
import torch
from conftest import ROOT
from torch import nn

from part_fast import AttackModel
from part_fast.attack_model.cpu import onednn
from part_fast.attack_model.cpu.packed_conv import PackedConv2d

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN, so none of it is called"
)
CALLS = (
    "_reorder_convolution_weight",
    "_convolution_pointwise",
    "_convolution_pointwise.binary",
    "_reorder_convolution_transpose_weight",
    "_convolution_transpose_pointwise",
)


class StandIn:
    """torch.ops.mkldnn, in which `name` (`packet` or `packet.overload`) is another function."""

    def __init__(self, of, name, function):
        self._of = of
        first, _, rest = name.partition(".")
        setattr(self, first, StandIn(getattr(of, first), rest, function) if rest else function)

    def __getattr__(self, name):
        return getattr(self._of, name)

    def __call__(self, *args):
        return self._of(*args)


@pytest.fixture
def stand_in(monkeypatch):
    """stand_in(name, function) puts the function in the place of that call; nothing has been tried yet."""
    onednn.works.cache_clear()
    mkldnn = onednn.mkldnn
    yield lambda name, function: monkeypatch.setattr(onednn, "mkldnn", StandIn(mkldnn, name, function))
    onednn.works.cache_clear()


def gone(*args):
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 5))


@needs_onednn
def test_what_is_tried_works_in_this_torch(stand_in):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert onednn.works(torch.float32)
        assert onednn.works(torch.bfloat16) == onednn.mkldnn._is_mkldnn_bf16_supported()
    assert not onednn.works(torch.float16)
    assert not onednn.works(torch.float64)


def off_by_one(call):
    def function(*args):
        return call(*args) + 1

    return function


def repeated(call):
    """The weights of another convolution."""

    def function(weight, *args):
        return call(weight.flip(0), *args)

    return function


@needs_onednn
@needs_onednn
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("side", "kernel", "stride", "padding"), [(1, 3, 1, 1), (1, 1, 1, 0), (2, 3, 2, 1), (3, 3, 1, 0)]
)
def test_a_sum_of_one_pixel(side, kernel, stride, padding, relu):
    """torch 2.10 raises "could not create a memory" where it is to add within such a convolution."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 8, side, side), torch.randn(16, 8, kernel, kernel), torch.randn(16)
    other = torch.randn(2, 16, 1, 1)
    sizes = (padding, padding), (stride, stride), (1, 1), 1
    found = onednn.convolve(x, onednn.pack(weight, sizes, x.shape), bias, sizes, other, relu)
    expected = torch.nn.functional.conv2d(x, weight, bias, stride, padding) + other
    # Sums of at most 8 * 9 products, in another order.
    torch.testing.assert_close(found, expected.relu() if relu else expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fault", ["raises", "gives another result"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_fails_leaves_convolutions_to_torch_with_one_warning(stand_in, name, fault):
    function = gone
    if fault != "raises":
        call = onednn.mkldnn
        for part in name.split("."):
            call = getattr(call, part)
        function = (repeated if "reorder" in name else off_by_one)(call)
    stand_in(name, function)
    model, x = network().eval(), torch.rand(2, 3, 8, 8)
    with pytest.warns(UserWarning, match=r"leaves torch\.float32 convolutions on the CPU to torch") as caught:
        attack_model, _ = (AttackModel(model) for _ in range(2))
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "\n" not in message
    assert ("AttributeError" if fault == "raises" else "gives other values") in message
    assert not any(isinstance(module, PackedConv2d) for module in attack_model.modules())
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for leaf, way in zip(leaves, (attack_model, model), strict=True):
        way(leaf).square().sum().backward()
    torch.testing.assert_close(attack_model(x), model(x))
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@needs_onednn
def test_a_torch_that_cannot_say_whether_it_takes_bfloat16_keeps_float32(stand_in):
    stand_in("_is_mkldnn_bf16_supported", gone)
    with pytest.warns(UserWarning, match=r"leaves torch\.bfloat16 convolutions") as caught:
        bf16, fp32 = (AttackModel(network(), precision=name) for name in ("bf16", "fp32"))
    assert len(caught) == 1
    for model in (bf16, fp32):
        assert {module.dtype for module in model.modules() if isinstance(module, PackedConv2d)} == {torch.float32}


@needs_onednn
def test_trying_draws_no_random_numbers_and_takes_no_default(stand_in):
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode():
            assert onednn.works(torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_onednn_nothing_is_tried_and_nothing_is_said(stand_in, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    stand_in("_reorder_convolution_weight", gone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not onednn.works(torch.float32)


def test_no_other_file_names_the_private_calls():
    named = {path.name for path in (ROOT / "part_fast").rglob("*.py") if "ops.mkldnn" in path.read_text()}
    assert named == {"onednn.py"}
