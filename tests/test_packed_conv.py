"""Tests of part_fast.attack_model.cpu.packed_conv: what nn.Conv2d gives, forward and for the input."""

import copy
import itertools
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from part_fast import AttackModel, CamBudget, backends
from part_fast.attack_model.cpu import onednn, winograd
from part_fast.attack_model.cpu.packed_conv import PackedConv2d, residual
from part_fast.models.catalogue import build_model
from part_fast.models.resnet import resnet18, resnet_small

ONEDNN = torch.backends.mkldnn.is_available()
pytestmark = pytest.mark.skipif(not ONEDNN, reason="this torch is built without oneDNN, so no convolution is packed")
# oneDNN adds up in another order where weights lie otherwise; in bfloat16 a sum that ends beside the middle of two
# values then rounds to the other one, 2**-8 away.
NEAR = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7}}
HAS_BF16 = onednn.works(torch.bfloat16)
WITHOUT_BF16 = "this CPU has no AVX512, without which oneDNN takes no bfloat16 and no such convolution is packed"
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not HAS_BF16, reason=WITHOUT_BF16))]


def frozen(*args, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    return nn.Conv2d(*args, **kwargs).to(dtype).requires_grad_(False)


def gradient(function, x, grad_out):
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = function(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, grad_out(out))[0]


def ramp(out):
    return torch.linspace(-1, 1, out.numel()).to(out.dtype).view_as(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_geometry(dtype, layout):
    for kernel, stride, padding, dilation, groups in itertools.product((1, 3), (1, 2, 3), (0, 1), (1, 2), (1, 2, 4)):
        conv = frozen(4, 8, kernel, stride, padding, dilation, groups, bias=stride != 2, dtype=dtype)
        packed = PackedConv2d(conv)
        for size in ((9, 11), (16, 16)):  # the second with the weights packed for the first
            x = torch.randn(2, 4, *size).to(dtype).contiguous(memory_format=layout)
            expected, found = gradient(conv, x, ramp), gradient(packed, x, ramp)
            torch.testing.assert_close(found, expected, **NEAR[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_other", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_sum_and_relu_in_one_pass(dtype, with_other, relu):
    conv = frozen(4, 8, 3, padding=1, dtype=dtype)
    x, other = torch.randn(2, 4, 6, 6).to(dtype), torch.randn(2, 8, 6, 6).to(dtype)
    pair = [value.clone().requires_grad_() for value in (x, other)]
    out = PackedConv2d(conv).with_relu(pair[0], pair[1] if with_other else None, relu=relu)
    twin = [value.double().requires_grad_() for value in (x, other)]
    exact = copy.deepcopy(conv).double()(twin[0])
    exact = exact + twin[1] if with_other else exact
    exact = exact.relu() if relu else exact
    torch.testing.assert_close(out.double(), exact, **NEAR[dtype])
    wanted = slice(2 if with_other else 1)
    found = torch.autograd.grad(out, pair[wanted], ramp(out))
    expected = torch.autograd.grad(exact, twin[wanted], ramp(out).double())
    # Sums over 72 products of numbers rounded to 8 bits.
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, **near)


def test_gradients_and_images_whose_elements_are_shared_or_skipped():
    conv = frozen(4, 8, 3, padding=1)
    packed, x = PackedConv2d(conv), torch.randn(2, 4, 6, 12)[..., ::2]
    shared = lambda out: torch.tensor(0.5).expand(out.shape)  # noqa: E731
    torch.testing.assert_close(gradient(packed, x, shared), gradient(conv, x, shared), rtol=1e-5, atol=1e-5)


def test_weights_are_packed_once_until_they_change():
    class Packs(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Packs.count += "reorder" in str(func)
            return func(*args, **(kwargs or {}))

    packed, x = PackedConv2d(frozen(4, 8, 3)), torch.randn(2, 4, 6, 6)
    with Packs():
        for _ in range(3):
            gradient(packed, x, torch.ones_like)
    assert Packs.count == 2  # for the forward, and for the backward
    before = packed(x)
    packed.weight.mul_(2)
    assert torch.equal(packed(x), before)
    packed.repack()
    assert not torch.equal(packed(x), before)


def test_a_second_derivative_is_an_error_and_not_zero():
    packed, x = PackedConv2d(frozen(4, 8, 3)), torch.randn(2, 4, 6, 6, requires_grad=True)
    (first,) = torch.autograd.grad(packed(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="to not have been used"):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("way", ["alone", "with ReLU", "residual"])
def test_a_backward_through_other_weights_is_an_error_as_in_torch(way):
    packed, x = PackedConv2d(frozen(16, 16, 3, padding=1)), torch.randn(2, 16, 8, 8, requires_grad=True)
    run = {
        "alone": packed,
        "with ReLU": packed.with_relu,
        "residual": lambda x: residual(packed, PackedConv2d(frozen(16, 16, 3, padding=1)), x),
    }[way]
    expected = torch.autograd.grad(run(x).sum(), x)[0]
    out = run(x)
    packed.weight.mul_(4)
    packed.repack()
    with pytest.raises(RuntimeError, match="have changed between its forward and its backward"):
        out.sum().backward()
    assert not torch.allclose(torch.autograd.grad(run(x).sum(), x)[0], expected)


def test_an_attack_model_refreshed_before_its_backward_raises_and_asking_does_not():
    model, x = resnet_small(), torch.rand(2, 3, 16, 16, requires_grad=True)
    fast = AttackModel(model)
    out = fast(x)
    fast(x)  # asks, and finds nothing
    out.sum().backward()
    out = fast(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    fast(x)
    with pytest.raises(RuntimeError, match=r"between its forward and its backward|modified by an inplace operation"):
        out.sum().backward()


def test_an_empty_batch_copies_and_pickles():
    packed, x = PackedConv2d(frozen(4, 8, 3)), torch.randn(2, 4, 6, 6)
    out = packed(x)
    assert packed(x[:0]).shape == (0, 8, 4, 4)
    assert torch.equal(copy.deepcopy(packed)(x), out)
    assert torch.equal(pickle.loads(pickle.dumps(packed))(x), out)


def test_what_is_not_packed():
    conv = frozen(4, 8, 3)
    assert PackedConv2d.takes(conv)
    assert PackedConv2d.takes(copy.deepcopy(conv).to(torch.bfloat16)) == HAS_BF16
    refused = {
        "float64": copy.deepcopy(conv).double(),
        "another padding": frozen(4, 8, 3, padding=1, padding_mode="reflect"),
        "padding by name": frozen(4, 8, 3, padding="same"),
        "packed": PackedConv2d(conv),
        "another layer": nn.ConvTranspose2d(4, 8, 3),
        "another device": nn.Conv2d(4, 8, 3, device="meta"),
    }
    for what, module in refused.items():
        assert not PackedConv2d.takes(module), what


@pytest.mark.parametrize("has_bf16", [False, True])
def test_bf16_is_computed_in_float32_where_onednn_has_none(has_bf16, monkeypatch):
    """Torch's own bf16 convolution takes ten times as long on such a CPU."""
    monkeypatch.setattr(onednn, "works", lambda dtype: has_bf16 or dtype == torch.float32)
    conv = frozen(16, 16, 1)
    packed = PackedConv2d(conv, torch.bfloat16)
    assert packed.dtype == (torch.bfloat16 if has_bf16 else torch.float32)
    if not has_bf16:
        x = torch.randn(2, 16, 4, 4)
        torch.testing.assert_close(packed(x), conv(x), **NEAR[torch.float32])


def without_winograd(function, *args):
    with mock.patch.object(winograd, "pays", return_value=False):
        return function(*args)


needs_cpp = pytest.mark.skipif(backends.why_not("cpp", "cpu") is not None, reason=str(backends.why_not("cpp", "cpu")))


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_other", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_winograd_gives_what_onednn_gives(dtype, with_other, relu):
    packed = PackedConv2d(frozen(16, 32, 3, padding=1), dtype)
    assert packed.by_winograd
    x, other = torch.randn(3, 16, 10, 9), torch.randn(3, 32, 10, 9)

    def both(x, other):
        leaves = [x.clone().requires_grad_(), other.clone().requires_grad_()]
        out = packed.with_relu(leaves[0], leaves[1] if with_other else None, relu=relu)
        return out, *torch.autograd.grad(out, leaves[: 1 + with_other], ramp(out))

    with mock.patch.object(winograd, "convolve", wraps=winograd.convolve) as called:
        found = both(x, other)
    assert called.call_count == 2  # forward and backward
    assert {value.dtype for value in found} == {torch.float32}  # whatever oneDNN would have computed in
    expected = without_winograd(both, x, other)
    assert expected[0].dtype == dtype
    packed.dtype = torch.float32
    packed.repack()
    torch.testing.assert_close(found, without_winograd(both, x, other), rtol=1e-5, atol=2e-5)
    if dtype == torch.bfloat16:
        # Eight bits of each of 144 products. Not of the gradients: a ReLU may stop another one.
        torch.testing.assert_close(expected[0].float(), found[0], rtol=0.05, atol=0.1)


@needs_cpp
def test_winograd_weights_follow_repack():
    packed = PackedConv2d(frozen(16, 16, 3, padding=1))
    x = torch.randn(2, 16, 8, 8)
    before = gradient(packed, x, torch.ones_like)
    packed.weight.mul_(2)
    packed.bias.zero_()
    torch.testing.assert_close(gradient(packed, x, torch.ones_like)[1], before[1])
    packed.repack()
    torch.testing.assert_close(gradient(packed, x, torch.ones_like)[1], 2 * before[1])
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(copied(x), packed(x))


@needs_cpp
@pytest.mark.parametrize("few", [1 << 19, 16 * 64])  # all images at once; one at a time
def test_residual(few):
    first, second = (PackedConv2d(frozen(16, 16, 3, padding=1)) for _ in range(2))
    second.weight.mul_(-1)
    x = torch.randn(9, 16, 8, 8)
    with mock.patch("part_fast.attack_model.cpu.packed_conv.CACHED_VALUES", few):
        found = gradient(lambda leaf: residual(first, second, leaf), x, ramp)

    def unpacked(leaf):
        middle = F.conv2d(leaf, first.weight, first.bias, padding=1).relu()
        return (F.conv2d(middle, second.weight, second.bias, padding=1) + leaf).relu()

    plain = gradient(unpacked, x, ramp)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=2e-5)
    other = without_winograd(gradient, lambda leaf: residual(first, second, leaf), x, ramp)
    torch.testing.assert_close(found, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["resnet18", "wrn-10-2"])
def test_attack_model_packs_all_and_gives_the_models_gradients(name):
    torch.manual_seed(0)
    model = build_model(name)
    fast, x = AttackModel(model), torch.rand(2, 3, 32, 32)
    convolutions = [m for m in fast.modules() if isinstance(m, nn.Conv2d)]
    assert all(isinstance(m, PackedConv2d) for m in convolutions)
    assert len(convolutions) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    loss = lambda logits: F.cross_entropy(logits, torch.tensor([1, 2]))  # noqa: E731
    model.eval()
    found, expected = (gradient(lambda leaf, m=m: loss(m(leaf)), x, torch.ones_like) for m in (fast, model))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    # Relative to the largest: where gradients cancel, rounding is all that is left.
    assert (found[1] - expected[1]).abs().max() < 1e-3 * expected[1].abs().max()


@pytest.mark.parametrize("layer", ["layer4.1.bn1", "layer4.1.bn2"])
def test_a_hook_inside_a_block_sees_what_it_sees_in_the_model(layer):
    torch.manual_seed(0)
    model, x = resnet18().eval(), torch.rand(2, 3, 32, 32)
    theirs = CamBudget(model, rule="soft", target_layer=layer)(x)
    ours = CamBudget(AttackModel(model), rule="soft", target_layer=f"module.{layer}")(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    # A folded convolution gives what its BatchNorm gave, and not its own output.
    with pytest.raises(ValueError, match="target_layer must not be the convolution"):
        CamBudget(AttackModel(model), target_layer=f"module.{layer.replace('bn', 'conv')}")


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
@pytest.mark.parametrize("layer", ["module.conv1", "module.bn1"])
def test_every_kind_of_hook_is_called(register, layer):
    fast, x = AttackModel(resnet_small()), torch.rand(2, 3, 16, 16)
    called = []
    getattr(fast.get_submodule(layer), register)(lambda module, *rest: called.append(module))
    gradient(lambda leaf: fast(leaf).sum(), x, torch.ones_like)
    assert called == [fast.get_submodule(layer)]
