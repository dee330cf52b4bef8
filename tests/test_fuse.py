"""Tests of part_fast.attack_model.fuse: which convolutions are fused, in whose networks, and that nothing else changes.

How many are fused in a named network is counted by hand from its paper's figure, as the comments say.
"""

import copy
import pathlib
import pickle
import types
import warnings
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from part_fast import AttackModel, CamBudget, models
from part_fast.attack_model import fuse
from part_fast.attack_model.cpu.packed_conv import PackedConv2d
from part_fast.attack_model.fold import Folded

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN, so no convolution is packed"
)

CLASSES = 4


def batch(n=2, side=8):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def made(kind):
    torch.manual_seed(0)
    model = kind().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def both(model, x):
    """Logits, and gradients of them for the images."""
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    return out.detach(), torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), leaf)[0]


def is_the_model(fast, model, x=None, deep=False):
    """Up to float32's rounding; of gradients relative to the largest, since what cancels leaves rounding alone. A
    second call would find what the first has spoilt.

    deep: of hundreds of thousands of ReLUs some are at 0 up to rounding, which depends on the number of threads. One
    that is cut off on one side alone changes an image's gradient by some percent, so that one image of all suffices.
    """
    x = batch() if x is None else x
    for _ in range(2):
        (found, gradient), (expected, theirs) = both(fast, x), both(model, x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        near = (gradient - theirs).abs().amax((1, 2, 3)) < 1e-3 * theirs.abs().amax((1, 2, 3))
        assert near.any() if deep else near.all()


def passes(fast, x=None):
    """How many convolutions added or did a ReLU in their pass while `fast` ran. Not those of Winograd's blocks."""
    x = batch() if x is None else x
    fast(x)  # compares, the first time
    with mock.patch.object(PackedConv2d, "with_relu", autospec=True, side_effect=PackedConv2d.with_relu) as called:
        fast(x)
    found = [(call.args[2:], call.kwargs.get("relu", True)) for call in called.call_args_list]
    return sum(relu or any(other is not None for other in added) for added, relu in found)


def calls(fast):
    graph = fast.module.forward.graph
    return Counter(node.target for node in graph.nodes)


def timm(name):
    return pytest.importorskip("timm", reason="timm is not installed").create_model(name, num_classes=CLASSES)


# Name: network, blocks that are one call, other fused convolutions, casts for several convolutions.
NETWORKS = {
    # 8 blocks of two convolutions, and the stem. In three blocks the shortcut is a third one of the same input.
    "torchvision resnet18": (lambda: torchvision.models.resnet18(num_classes=CLASSES), 5, 1 + 3 * 2, 3),
    "timm resnet18": (lambda: timm("resnet18"), 5, 1 + 3 * 2, 3),
    "resnet18": (lambda: models.resnet18(CLASSES), 5, 1 + 3 * 2, 3),
    # 3 + 4 + 6 + 3 blocks of three, and the stem; four shortcuts have a convolution.
    "torchvision resnet50": (lambda: torchvision.models.resnet50(num_classes=CLASSES), 0, 1 + 16 * 3, 4),
    # Four stages whose first block has a convolution in its shortcut, 1 + 3 + 6 + 6 blocks: three convolutions each of
    # which the last adds, and squeeze and excitation with one ReLU between two; the stem.
    "torchvision regnet_y_400mf": (lambda: torchvision.models.regnet_y_400mf(num_classes=CLASSES), 0, 1 + 16 * 4, 4),
    # A stage of n blocks has n - 1 sums, but for the first and last, of one block each: 1 + 2 + 3 + 2 + 2. All else
    # is followed by ReLU6, or by nothing.
    "torchvision mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=CLASSES), 0, 10, 0),
    # A stage of n blocks has n - 1 sums: 1 + 1 + 2 + 2 + 3. All activations are SiLU.
    "timm efficientnet_b0": (lambda: timm("efficientnet_b0"), 0, 9, 0),
    # Three blocks, each with a ReLU after its first convolution and a sum after the second; the first BatchNorm of the
    # first block is alone behind the stem. Each block changes the shape, so that its shortcut is a convolution.
    "wrn-10-2": (lambda: models.wideresnet(10, 2, CLASSES), 0, 3 * 2 + 1, 3),
    # Four blocks of which the first and the third keep their shape (16 to 16, 32 to 32).
    "resnet-small": (lambda: models.resnet_small(CLASSES), 2, 1 + 2 * 2, 2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_named_networks(name):
    kind, blocks, others, casts = NETWORKS[name]
    model, x = made(kind), batch(4, side=32)
    fast = AttackModel(model)
    found = calls(fast)
    assert (found[fuse.residual], found[fuse.conv_add_relu], found[fuse.cast]) == (blocks, others, casts)
    assert fast.fused == 2 * blocks + others
    assert f"fused={fast.fused}" in repr(fast)
    is_the_model(fast, model, x, deep=True)
    model.load_state_dict({k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()})
    is_the_model(fast, model, x, deep=True)


def test_networks_know_nothing_of_it():
    for path in pathlib.Path(models.__file__).parent.glob("*.py"):
        assert "attack_model" not in path.read_text(), path


# ---- ways to write it ----


class Stem(nn.Module):
    """A convolution, its BatchNorm and a head; what comes between is the case."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, CLASSES)

    def body(self, x):
        return F.relu(self.bn(self.stem(x)))

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


class Net(Stem):
    """With two blocks."""

    def __init__(self):
        super().__init__()
        self.layer4 = nn.Sequential(Block(), Block())

    def body(self, x):
        return self.layer4(super().body(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


def net(forward, *, init=lambda self: None, kind=Stem):
    """A `kind` whose `body` is `forward`."""

    class Case(kind):
        def __init__(self):
            super().__init__()
            init(self)

        body = forward

    return Case


def inplace(self):
    self.relu = nn.ReLU(inplace=True)


def own(self, x):
    """The convolution's output, which each case goes on with."""
    return self.bn(self.stem(x))


def conv8(self):
    self.more = nn.Conv2d(8, 8, 1)


def same_shape(self):
    self.more = nn.Conv2d(3, 8, 3, padding=1)


def sums_in_place(self, x):
    out = own(self, x)
    out += self.more(x)
    return out


def methods(self, x):
    return own(self, x).add_(self.more(x)).relu_()


def later(self, x):
    other = self.more(x)
    return own(self, x) + other


def before_in_place(self, x):
    out = own(self, x)
    return out + self.more(self.relu(x - 0.5))


def more_in_place(self):
    inplace(self)
    same_shape(self)


def identities(self, x):
    return self.relu(nn.Sequential.forward(self.identity, own(self, x)))


def add_identities(self):
    inplace(self)
    self.identity = nn.Sequential(nn.Identity(), nn.Identity())


WRITTEN = {
    "relu as a layer in place": (lambda self, x: self.relu(own(self, x)), inplace, 1),
    "F.relu": (lambda self, x: F.relu(own(self, x)), None, 1),
    "F.relu in place": (lambda self, x: F.relu(own(self, x), inplace=True), None, 1),
    "F.relu in place, by position": (lambda self, x: F.relu(own(self, x), True), None, 1),
    "torch.relu": (lambda self, x: torch.relu(own(self, x)), None, 1),
    ".relu()": (lambda self, x: own(self, x).relu(), None, 1),
    "behind nn.Identity": (identities, add_identities, 1),
    "sum": (lambda self, x: own(self, x) + self.more(x), same_shape, 1),
    "sum, reversed": (lambda self, x: x.mean(1, keepdim=True).expand(-1, 8, -1, -1) + own(self, x), None, 1),
    "sum in place": (sums_in_place, same_shape, 1),
    "torch.add": (lambda self, x: torch.add(own(self, x), self.more(x)), same_shape, 1),
    "methods in place": (methods, same_shape, 1),
    "sum of two convolutions, one ReLU": (lambda self, x: F.relu(own(self, x) + self.more(x)), same_shape, 1),
    "sum of two convolutions, the left one later": (later, same_shape, 1),
    "sum of two convolutions, the left one before something in place": (before_in_place, more_in_place, 1),
    "both add": (
        lambda self, x: self.more(F.relu(own(self, x))) + x.mean(1, keepdim=True).expand(-1, 8, -1, -1),
        conv8,
        2,
    ),
    # Not, because something else sees the convolution's output:
    "ReLU and more": (lambda self, x: (lambda out: F.relu(out) - out)(own(self, x)), None, 0),
    "sum and more": (lambda self, x: (lambda out: (out + 2 * self.more(x)) * out)(own(self, x)), same_shape, 0),
    "to itself": (lambda self, x: (lambda out: out + out)(own(self, x)), None, 0),
    # Or because it is another operation:
    "scaled sum": (lambda self, x: torch.add(own(self, x), self.more(x), alpha=2), same_shape, 0),
    "a number": (lambda self, x: own(self, x) + 1, None, 0),
    "ReLU6": (lambda self, x: F.relu6(own(self, x)), None, 0),
    "difference": (lambda self, x: own(self, x) - self.more(x), same_shape, 0),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_every_way_to_write_it(case):
    forward, init, count = WRITTEN[case]
    model = made(net(forward, init=init or (lambda self: None)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = AttackModel(model)
        is_the_model(fast, model)
    assert fast.fused == count
    assert passes(fast) == count


# What is added is broadcast, or decides about the dtype: seen when it runs.
SHAPES = {
    "per channel": lambda x: x.mean((1, 2, 3)).view(-1, 1, 1, 1),
    "a row": lambda x: x[:, :1, :1],
    "float64": lambda x: x.mean(1, keepdim=True).expand(-1, 8, -1, -1).double(),
    "one image's": lambda x: x[:1].mean(1, keepdim=True).expand(-1, 8, -1, -1),
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_sum_that_convolutions_do_not_compute(case):
    model = made(net(lambda self, x: F.relu(own(self, x) + SHAPES[case](x)).float()))
    fast = AttackModel(model)
    is_the_model(fast, model)
    assert fast.fused == 1  # as far as the graph tells
    assert passes(fast) == 0
    added = net(lambda self, x: own(self, x) + SHAPES[case](x))()
    assert added.body(batch()).dtype == AttackModel(added).module.body(batch()).dtype


def test_a_block_whose_shortcut_is_broadcast():
    def init(self):
        self.squeeze, self.expand = nn.Conv2d(3, 3, 8), nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = x.mean(1, keepdim=True)
        return F.relu(self.two(F.relu(self.one(x))) + x)

    model = made(net(forward, init=init))
    fast = AttackModel(model)
    assert calls(fast)[fuse.residual] == 1
    is_the_model(fast, model)


def test_what_is_written_in_place_between_is_read_as_in_the_model():
    def input_written(self, x):
        x = x * 1
        out = own(self, x)
        x.mul_(0.5)  # the convolution has read x before
        return F.relu(out) + self.more(x)

    def addend_written(self, x):
        x, other = x * 1, self.more(x)
        out = own(self, x) + other
        other.zero_()
        return F.relu(out) + other

    def by_a_layer(self, x):
        x = x - 0.5
        out = own(self, x)
        return F.relu(out + self.more(self.relu(x)))

    def first_of_a_block(self, x):
        x = self.more(x) * 1
        out = F.relu(self.one(x))
        x.mul_(0.5)
        return F.relu(self.two(out) + x)

    def init(self):
        inplace(self)
        same_shape(self)

    def init_of_a_block(self):
        init(self)
        self.one, self.two = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    for forward in (input_written, addend_written, by_a_layer, first_of_a_block):
        model = made(net(forward, init=init_of_a_block))
        fast = AttackModel(model)
        with torch.no_grad():  # torch's own convolutions cannot do without what is overwritten
            for _ in range(2):
                torch.testing.assert_close(fast(batch()), model(batch()), rtol=1e-4, atol=1e-5)
        if forward is first_of_a_block:
            assert (calls(fast)[fuse.residual], fast.fused) == (0, 2)


def test_layers_and_blocks_that_are_used_twice():
    def init(self):
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())

    shared = net(lambda self, x: self.block(self.block(F.relu(own(self, x)))), init=init)
    same_conv = net(lambda self, x: F.relu(self.more(F.relu(self.more(F.relu(own(self, x)))))), init=conv8)
    for kind, count in ((shared, 3), (same_conv, 3)):
        model = made(kind)
        fast = AttackModel(model)
        is_the_model(fast, model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        is_the_model(fast, model)
        assert fast.fused == passes(fast) == count


def test_a_relu_that_all_blocks_share_and_a_convolution_with_two_names():
    def init(self):
        self.layer4[1].relu = self.layer4[0].relu
        self.again = self.stem

    model = made(net(lambda self, x: self.layer4(F.relu(self.bn(self.again(x)))), init=init, kind=Net))
    fast = AttackModel(model)
    is_the_model(fast, model)
    assert fast.fused == passes(fast) == 5


def test_a_cast_serves_all_that_compute_in_one_dtype():
    x = torch.rand(1, 8, 4, 4)
    one, two = (PackedConv2d(nn.Conv2d(8, 8, 1).requires_grad_(False)) for _ in range(2))
    assert fuse.cast(x, one, two) is x
    one.dtype = torch.bfloat16
    assert fuse.cast(x, one, two) is x  # which then cast for themselves
    two.dtype = torch.bfloat16
    assert fuse.cast(x, one, two).dtype == torch.bfloat16


# ---- who looks in ----


HOOKS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")
WITHIN = ["", *(name for name, _ in Net().named_modules() if name)]


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("name", WITHIN)
def test_a_hook_sees_what_it_sees_in_the_model(name, register):
    model, seen = made(Net), []

    def hook(module, *values):
        seen.append([v for value in values for v in (value if isinstance(value, tuple) else (value,))])

    fast = AttackModel(model)
    fast(batch())  # fused
    for module in (fast.module, model):
        handle = getattr(module.get_submodule(name), register)(hook)
        both(fast if module is fast.module else model, batch())
        handle.remove()
    half = len(seen) // 2
    assert half >= 1
    for ours, theirs in zip(seen[:half], seen[half:], strict=True):
        # Folded, a convolution gives what its BatchNorm gives, which takes it. Each has one input, and then outputs.
        if "conv" in name or name == "stem":
            ours, theirs = (values[:-1] if register != HOOKS[2] else values[:1] for values in (ours, theirs))
        elif "bn" in name:
            ours, theirs = (values[1:] for values in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert passes(fast) == 5  # again


def test_with_hooks_only_what_they_are_in_is_unfused():
    fast = AttackModel(made(Net))
    assert passes(fast) == 5
    # The stem belongs to the network, in which the layer is; the two blocks are others.
    for name, fused in (("layer4", 4), ("layer4.1", 4), ("layer4.1.bn1", 2), ("fc", 4), ("", 5)):
        handle = fast.module.get_submodule(name).register_forward_hook(lambda *_: None)
        assert passes(fast) == fused, name
        handle.remove()
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert passes(fast) == 0
    assert passes(fast) == 5


@pytest.mark.parametrize("layer", ["layer4", "layer4.0", "layer4.1.bn1", "layer4.0.relu"])
def test_cam_budget_explains_the_same_layer(layer):
    model = made(Net)
    fast = AttackModel(model)
    theirs, ours = (CamBudget(m, rule="soft", target_layer=layer)(batch()) for m in (model, fast))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert passes(fast) == 5


def test_hooks_that_the_model_had_when_it_was_copied():
    model = made(Net)
    model.layer4[1].conv2.register_forward_hook(lambda module, args, out: out * 2)
    fast = AttackModel(model)
    is_the_model(fast, model)
    assert passes(fast) == 2  # of the other block
    for part in fast.module.modules():
        part._forward_hooks.clear()
    model.layer4[1].conv2._forward_hooks.clear()
    is_the_model(fast, model)


# ---- forwards that are not what torch.fx sees ----


class Doubles(torch.autograd.Function):
    """Gives what it takes, and twice the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Halves(Doubles):
    @staticmethod
    def forward(ctx, x):
        return x * 0.5


def without_gradient(self, x):
    with torch.no_grad():
        out = F.relu(own(self, x))
    return self.layer4(out + self.more(x))


def raises(self, x):
    if x.shape[2] != x.shape[3]:
        raise ValueError("not square")
    return Net.body(self, x)


def by_value(self, x):
    return Net.body(self, x if x.mean() > 0.4 else 1 - x)


def by_kind(self, x):
    return Net.body(self, x * 2 if isinstance(x, torch.Tensor) else x)


def keeps(self, x):
    self.features = Net.body(self, x)
    return self.features


kept = []


def keeps_elsewhere(self, x):
    kept[:] = [Net.body(self, x)]
    return kept[0]


def sets(self, x):
    self.seen = [True]
    return Net.body(self, x)


def reads(self, x):
    x = (x - self.mean) / self.std
    return self.layer4(F.relu(own(self, x) * self.gamma)) * self.gamma


def own_tensors(self):
    self.register_buffer("mean", torch.rand(1, 3, 1, 1))
    self.register_buffer("std", torch.rand(1, 3, 1, 1) + 0.5)
    self.register_buffer("calls", torch.zeros(2))
    self.gamma = nn.Parameter(torch.rand(8, 1, 1) + 0.5)


@pytest.mark.parametrize("where", ["buffer", "parameter"])
def test_tensors_of_its_own_that_a_forward_reads(where):
    """Normalisation in the forward, say: four convolutions are fused, and the stem's is not, which is multiplied."""
    model = made(net(reads, init=own_tensors, kind=Net))
    fast = AttackModel(model)
    assert fast.fused == passes(fast) == 4
    assert fast.module.forward.graph is not None, "all of it is one graph"
    is_the_model(fast, model)
    changed = {"buffer": model.mean, "parameter": model.gamma}[where]
    with torch.no_grad():
        changed.mul_(2)
    is_the_model(fast, model)
    setattr(model, {"buffer": "mean", "parameter": "gamma"}[where], type(changed)(changed.detach() * 2))
    fast.refresh()
    is_the_model(fast, model)


@pytest.mark.parametrize(
    "write",
    [
        lambda self: self.calls.add_(1),
        lambda self: self.calls[:].add_(1),
        lambda self: torch.add(self.calls, 1, out=self.calls),
    ],
    ids=["in place", "view", "out"],
)
def test_a_buffer_that_a_forward_writes_into_is_written_once_each_time(write):
    def counts(self, x):
        write(self)
        return Net.body(self, x)

    model = made(net(counts, init=own_tensors, kind=Net))
    fast = AttackModel(model)
    before = fast.module.calls.clone()
    fast(batch())
    fast(batch())
    assert (fast.module.calls - before).tolist() == [2, 2]
    assert fast.fused == passes(fast) == 4, "of the blocks"


UNSEEN = {
    # Name: body, how many are fused all the same, of the blocks that the graph has whole.
    "a custom backward": (lambda self, x: self.layer4(Halves.apply(F.relu(own(self, x)))), 4),
    "no_grad": (without_gradient, 4),
    "autocast": (lambda self, x: autocast_off(self, x), 4),
    "checkpoint": (lambda self, x: self.layer4(checkpoint(lambda x: F.relu(own(self, x)), x, use_reentrant=False)), 4),
    "an error for some images": (raises, 4),
    "control flow": (by_value, 0),
    "kept on the module": (keeps, 0),
    "kept elsewhere": (keeps_elsewhere, 0),
    "sets an attribute": (sets, 0),
}


def autocast_off(self, x):
    with torch.autocast("cpu", enabled=False):
        out = F.relu(own(self, x))
    return self.layer4(out)


@pytest.mark.parametrize("case", UNSEEN)
def test_forwards_that_do_more_than_the_graph_run_as_they_are(case):
    forward, count = UNSEEN[case]
    model = made(net(forward, init=same_shape, kind=Net))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="AttackModel folded none")
        fast = AttackModel(model)
    is_the_model(fast, model)
    assert fast.fused == passes(fast) == count
    is_the_model(fast, model, 0.2 * batch())
    if case == "kept on the module":
        torch.testing.assert_close(fast.module.features.mean((2, 3)), model.features.mean((2, 3)), rtol=1e-4, atol=1e-4)
    if case == "an error for some images":
        with pytest.raises(ValueError, match="not square"):
            fast(batch()[:, :, :4])


@pytest.mark.parametrize("body", [by_kind, lambda self, x: Net.body(self, Doubles.apply(x))], ids=["kind", "backward"])
def test_what_the_tracer_cannot_notice_is_found_by_comparing(body):
    model = made(net(body, kind=Net))
    fast = AttackModel(model)
    with pytest.warns(UserWarning, match="Case computes something else where torch.fx traces it: AttackModel runs"):
        fast(batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        is_the_model(fast, model)
    assert passes(fast) == 4


@pytest.mark.parametrize("name", ["layer4", "layer4.1", "layer4.1.conv1", "layer4.1.bn1", "layer4.1.relu"])
def test_a_forward_of_the_objects_own(name):
    def forward(self, x):
        return 0.5 * type(self).forward(self, x)

    model = made(Net)
    part = model.get_submodule(name)
    part.forward = types.MethodType(forward, part)
    fast = AttackModel(model)
    is_the_model(fast, model)
    part, theirs = fast.module.layer4[0].relu, model.layer4[0].relu
    part.forward, theirs.forward = types.MethodType(forward, part), types.MethodType(forward, theirs)
    fast(batch(), follow=False)
    torch.testing.assert_close(fast(batch(), follow=False), model(batch()), rtol=1e-4, atol=1e-4)


def test_a_forward_of_the_networks_own():
    def forward(self, x):
        return self.fc((self.stem(x) - self.layer4(F.relu(self.bn(self.stem(x))))).mean((2, 3)))

    model = made(Net)
    model.forward = types.MethodType(forward, model)
    with pytest.warns(UserWarning, match="folded none of the 5 BatchNorms of Net.*: its forward is not its class's"):
        fast = AttackModel(model)
    is_the_model(fast, model)
    assert fast.fused == passes(fast) == 0


# ---- what changes later ----


class Switched(Net):
    way = "one"

    def __init__(self):
        super().__init__()
        self.way, self.scale, self.of = "one", 1.0, {"one": 1}

    def body(self, x):
        out = own(self, x) * self.scale if self.way == "scaled" else own(self, x)
        return self.layer4(F.relu(out) * self.scale)


def test_flags_and_numbers_that_are_changed_later():
    model = made(Switched)
    fast = AttackModel(model)
    assert passes(fast) == 5
    model.scale = 0.25
    is_the_model(fast, model)
    assert passes(fast) == 5
    model.scale = 1.0
    for way, fused in (("scaled", 4), ("one", 5)):
        model.way = way
        is_the_model(fast, model)
        assert passes(fast) == fast.fused == fused


def test_what_is_changed_on_the_copy_itself():
    fast, model = AttackModel(made(Switched)), made(Switched)
    is_the_model(fast, model)
    fast.module.scale = model.scale = 0.25
    is_the_model(fast, model)
    assert passes(fast) == 4
    fast.module.layer4[0].relu = model.layer4[0].relu = nn.Tanh()
    is_the_model(fast, model)
    fast.module.layer4.append(nn.Tanh())
    model.layer4.append(nn.Tanh())
    is_the_model(fast, model)


def test_train_mode_of_the_copys_modules_is_theirs():
    model = made(net(lambda self, x: F.dropout(F.relu(own(self, x)), 0.5, self.training)))
    fast = AttackModel(model)
    assert passes(fast) == 1
    fast.module.training = True
    torch.manual_seed(0)
    dropped = fast(batch())
    fast.module.training = False
    assert not torch.allclose(dropped, fast(batch()))
    is_the_model(fast, model)


def test_an_attack_model_that_is_copied_or_pickled_is_fused_again():
    model = made(Net)
    fast = AttackModel(model)
    fast(batch())
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        is_the_model(copied, model)
        assert passes(copied) == copied.fused == 5
        assert copied.module.forward.module is copied.module
    module = copy.deepcopy(fast.module)  # without its AttackModel
    torch.testing.assert_close(module(batch()), model(batch()), rtol=1e-4, atol=1e-5)
    assert module.layer4[0].forward.module is module.layer4[0]


def test_a_network_of_another_structure_is_fused_anew():
    model = made(Net)
    fast = AttackModel(model)
    assert passes(fast) == 5
    model.layer4.append(made(Block))
    is_the_model(fast, model)
    assert passes(fast) == fast.fused == 7


def test_what_is_not_packed_is_not_fused():
    model = made(Net)
    compiled, doubled = AttackModel(model, compile=True), AttackModel(copy.deepcopy(model).double())
    for fast in (compiled, doubled):
        assert fast.fused == 0
        assert not any("forward" in vars(part) for part in fast.module.modules())


def test_torch_func_and_empty_batches():
    model = made(Net)
    fast = AttackModel(model)
    fast(batch())
    assert fast(batch()[:0]).shape == (0, CLASSES)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: fast(x[None])[0]))(batch())
    expected = torch.func.vmap(torch.func.jacrev(lambda x: model(x[None])[0]))(batch())
    torch.testing.assert_close(jacobian, expected, rtol=1e-3, atol=1e-5)


def test_unfuse():
    model = made(Net)
    fast = AttackModel(model)
    fuse.unfuse(fast.module)
    assert fast.fused == passes(fast) == 0
    assert any(isinstance(part, Folded) for part in fast.module.modules())
    is_the_model(fast, model)
