"""Tests of part_fast.attack_model.fold: BatchNorms are part of a convolution where that changes nothing."""

import collections
import copy
import gc
import random
import sys
import threading
import types
import warnings
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2
from torch import nn
from torch.optim.swa_utils import AveragedModel

from part_fast import AttackModel
from part_fast.attack_model import model as attack_model
from part_fast.attack_model.fold import foldable, folded_weights, trace

CLASSES = 4


def batch(n=4):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, 8, 8, generator=generator)


def bn(channels=8):
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.normal_(0, 0.3)
    norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias, 0, 0.3)
    return norm


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), bn()
        self.layer4 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), bn(), nn.ReLU())
        self.fc = nn.Linear(8, CLASSES)

    def body(self, x):
        return self.layer4(F.relu(self.bn(self.conv(x))))

    def head(self, x):
        return self.fc(x.mean((2, 3)))

    def forward(self, x):
        return self.head(self.body(x))


def made(kind=Net):
    torch.manual_seed(0)
    return kind().eval()


def gradient(model, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(leaf), torch.arange(len(x)) % CLASSES), leaf)[0]


def is_the_model(fast, model):
    """Logits and input gradients, up to the roundings of float64 that folding reorders."""
    x = batch().double()
    torch.testing.assert_close(fast(x), model(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient(fast, x), gradient(model, x), rtol=1e-8, atol=1e-10)


class Flags(Net):
    def forward(self, x, features=False, *, mask=None):
        x = self.body(x)
        x = x if mask is None else x * mask
        return x if features else self.head(x)


# As it is written, and not with pytest's own code in the place of its assertions.
ASSERTS = """
class Asserts(Net):
    def forward(self, x):
        assert x.shape[1] == 3, "colour images"
        assert x.ndim == 4 and x.shape[2] == x.shape[3]
        if x.shape[2] < 4:
            raise ValueError(f"too small: {x.shape}")
        torch._assert(x.shape[0] > 0, "no images")
        return super().forward(x)
"""


def asserts():
    defined = dict(globals())
    exec(compile(ASSERTS.replace("super()", "super(Asserts, self)"), "a user's file", "exec"), defined)
    return defined["Asserts"]()


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Identity(), nn.DataParallel(Net()))

    def forward(self, x):
        return self.inner(x)


class Synchronised(Net):
    def __init__(self):
        super().__init__()
        nn.SyncBatchNorm.convert_sync_batchnorm(self)


class TwoNames(Net):
    """Each layer has two names, and the forward calls it by the second; another is in a plain list."""

    def __init__(self):
        super().__init__()
        self.norm, self.convolution = self.bn, self.conv
        self.steps = [self.layer4[0], self.layer4[1]]

    def body(self, x):
        x = F.relu(self.norm(self.convolution(x)))
        for step in self.steps:
            x = step(x)
        return x.relu()


FOLDED = {
    "plain": Net,
    "optional arguments": Flags,
    "checks of the input": asserts,
    "DataParallel within": Wrapped,
    "DataParallel": lambda: nn.DataParallel(Net()),
    "AveragedModel": lambda: AveragedModel(Net()),
    "compiled": lambda: torch.compile(Net(), backend="eager"),
    "SyncBatchNorm": Synchronised,
    "two names": TwoNames,
}


def grow(model):
    """Weights and statistics that are others, as after an update."""
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value.mul_(1.25)


@pytest.mark.parametrize("kind", FOLDED)
def test_both_are_folded(kind):
    model = made(FOLDED[kind]).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = AttackModel(model)
    assert fast.folded == 2
    is_the_model(fast, model)
    grow(model)
    is_the_model(fast, model)


def test_distributed_data_parallel_is_taken_off(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = made().double()
        fast = AttackModel(nn.parallel.DistributedDataParallel(model))
        assert fast.folded == 2
        assert fast.source is model
        is_the_model(fast, model)
    finally:
        torch.distributed.destroy_process_group()


def test_timms_batch_norm_keeps_its_activation(monkeypatch):
    """timm is not installed here: a class of its name that does what timm's does."""
    module = types.ModuleType("timm.layers.norm_act")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class BatchNormAct2d(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.drop, self.act = nn.Identity(), nn.SiLU()

        def forward(self, x):
            torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
            x = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
            )
            return self.act(self.drop(x))

    class Efficient(Net):
        def __init__(self):
            super().__init__()
            self.bn = BatchNormAct2d(8)
            self.bn.load_state_dict(bn().state_dict())

    BatchNormAct2d.__module__ = module.__name__
    model = made(Efficient).double()
    fast = AttackModel(model)
    assert fast.folded == 2
    is_the_model(fast, model)
    BatchNormAct2d.__module__ = "another"  # of which nothing is known
    assert AttackModel(model).folded == 1


class ReadByName(Net):
    def body(self, x):
        return self.layer4(F.relu(self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight, padding=1)))


class NormReadByName(Net):
    def body(self, x):
        return self.layer4(F.relu(self.bn(self.conv(x)) - self.bn.running_mean.view(1, -1, 1, 1)))


class Looked(Net):
    """Reads a weight without the images."""

    def body(self, x):
        return super().body(x) * self.layer4[0].weight.mean()


class Dual(Net):
    """As in AdvProp: one BatchNorm of several, by a flag."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([bn() for _ in range(3)])
        self.use = 0

    def pick(self):
        return self.use

    def body(self, x):
        return self.layer4(F.relu(self.norms[self.pick()](self.conv(x))))


class AtRandom(Net):
    def body(self, x):
        out = self.conv(x)
        out = self.bn(out) if random.random() < 0.5 else out
        self.normalised = True
        return self.layer4(F.relu(out))


class AtTorchsRandom(AtRandom):
    def body(self, x):
        out = self.conv(x)
        return self.layer4(F.relu(self.bn(out) if torch.rand(()) < 0.5 else out))


class Counting(Net):
    """Every other forward is another one."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.calls = 0

    def body(self, x):
        self.calls += 1
        out = self.conv(x)
        return self.layer4(F.relu(self.bn(out) if self.calls % 2 else out))


@pytest.mark.parametrize(("kind", "folded"), [(ReadByName, 1), (NormReadByName, 1), (Looked, 1), (Dual, 0)])
def test_what_is_read_or_chosen_is_not_folded(kind, folded):
    model = made(kind).double()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fast = AttackModel(model)
    assert fast.folded == folded
    assert len(said) == (folded == 0)
    is_the_model(fast, model)
    if kind is Dual:
        assert "none of the 5 BatchNorms of Dual, and is slower for it: its forward leaves out" in str(said[0].message)
        for use in (2, 1):
            model.use = use
            is_the_model(fast, model)


@pytest.mark.parametrize("kind", [AtRandom, AtTorchsRandom, Counting])
def test_a_forward_that_may_be_another_is_not_folded_and_leaves_no_trace(kind):
    model = made(kind).double()
    states = random.getstate(), torch.get_rng_state()
    with pytest.warns(
        UserWarning, match=rf"none of the 2 BatchNorms of {kind.__name__}.*draws random numbers or changes"
    ):
        fast = AttackModel(model)
    assert fast.folded == 0
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert getattr(model, "calls", 0) == 0
    assert getattr(fast.module, "calls", 0) == 0
    for _ in range(4):
        random.seed(5)
        torch.manual_seed(5)
        found = fast(batch().double())
        random.seed(5)
        torch.manual_seed(5)
        torch.testing.assert_close(found, model(batch().double()), rtol=1e-9, atol=1e-9)


class ByAFlag(Net):
    """With or without BatchNorm, or with its input used as well."""

    way = "normalised"

    def body(self, x):
        out = self.conv(x)
        out = {"normalised": lambda: self.bn(out), "plain": lambda: out, "both": lambda: self.bn(out) + out}[self.way]()
        return self.layer4(F.relu(out))


def test_a_flag_that_is_changed_later():
    model = made(ByAFlag).double()
    fast = AttackModel(model)
    assert fast.folded == 2
    for way in ("plain", "normalised", "both"):
        model.way = way
        is_the_model(fast, model)
        assert fast.folded == 0  # now that it is known to choose
    model = made(ByAFlag).double()
    fast = AttackModel(model)
    model.way = "both"
    is_the_model(fast, model)


def test_what_cannot_be_traced_is_said_once():
    class Loops(Net):
        def body(self, x):
            return super().body(x) if x.mean() > 0 else super().body(-x)

    with pytest.warns(UserWarning, match="AttackModel folded none of the 2 BatchNorms of Loops.*control flow") as said:
        fast = AttackModel(made(Loops))
    assert len(said) == 1
    assert said[0].filename == __file__
    assert fast.folded == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(batch())


KINDS = {
    "register_forward_hook": lambda module, args, out: out * 2,
    "register_forward_pre_hook": lambda module, args: (args[0] * 2,),
    "register_full_backward_hook": lambda module, to, of: (to[0] * 2 if to[0] is not None else None,),
    "register_full_backward_pre_hook": lambda module, of: (of[0] * 2,),
}


@pytest.mark.parametrize("register", KINDS)
@pytest.mark.parametrize("layer", ["conv", "bn", "layer4.0", "layer4.1", "layer4"])
def test_hooks_change_what_they_change_in_the_model(layer, register):
    model = made().double()
    getattr(model.get_submodule(layer), register)(KINDS[register])
    fast = AttackModel(model)
    assert fast.folded == (2 if layer == "layer4" else 1)
    is_the_model(fast, model)


def test_it_leaves_the_model_as_it_was():
    class Keeps(Net):
        def body(self, x):
            self.feature = super().body(x)
            return self.feature

    model = made(Keeps)
    before = {name: dict(part.__dict__) for name, part in model.named_modules()}
    assert foldable(trace(model))[0] == [("conv", "bn"), ("layer4.0", "layer4.1")]
    assert {name: dict(part.__dict__) for name, part in model.named_modules()} == before
    copy.deepcopy(model)


@pytest.mark.parametrize(
    ("name", "folded"), [("resnet18", 20), ("mobilenet_v3_small", 34), ("regnet_y_400mf", 53), ("efficientnet_b0", 49)]
)
def test_torchvisions_networks(name, folded):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    pairs, why_not = foldable(trace(model.eval()))
    assert (len(pairs), norms, why_not) == (folded, folded, None)


def test_a_part_that_is_for_training_alone_does_not_stop_the_rest():
    """GoogLeNet's two classifiers in the middle have a convolution and a BatchNorm of 128 channels each, as 11 more."""
    torch.manual_seed(0)
    model = torchvision.models.googlenet(num_classes=CLASSES, init_weights=False).eval()
    pairs, why_not = foldable(trace(model))
    assert (len(pairs), why_not) == (3 + 9 * 6, None)
    assert not [conv for conv, _ in pairs if conv.startswith("aux")]
    # The folded copy is compared on the real network's shapes: 64 is the least that its pooling takes.
    fast, x = AttackModel(model.double()), torch.rand(2, 3, 64, 64, dtype=torch.float64)
    assert fast.folded == len(pairs)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-9, atol=1e-9)


class Beside(Net):
    """A second BatchNorm, beside a convolution of its own that is left out, in a module that is not."""

    def __init__(self):
        super().__init__()
        self.part = nn.Module()
        self.part.conv, self.part.norm = nn.Conv2d(3, 8, 3, padding=1), bn()
        self.part.other, self.part.other_norm = nn.Conv2d(3, 8, 3, padding=1), bn()
        self.second = False

    def body(self, x):
        norm = self.part.other_norm if self.second else self.part.norm
        return self.layer4(F.relu(norm(self.part.conv(x))))


class Alone(Beside):
    """A second BatchNorm in a module that is left out, beside a convolution of other channels."""

    def __init__(self):
        super().__init__()
        self.apart = nn.Sequential(nn.Conv2d(3, 4, 3), bn())

    def body(self, x):
        norm = self.apart[1] if self.second else self.part.norm
        return self.layer4(F.relu(norm(self.part.conv(x))))


@pytest.mark.parametrize("kind", [Beside, Alone])
def test_a_batch_norm_that_may_take_the_place_of_another_still_does(kind):
    model = made(kind).double()
    with pytest.warns(UserWarning, match="its forward leaves out BatchNorms that it may choose another time"):
        fast = AttackModel(model)
    assert fast.folded == 0
    for model.second in (False, True):
        is_the_model(fast, model)


class Normalizing(Net):
    def __init__(self, normalize):
        super().__init__()
        self.normalize = normalize

    def forward(self, x):
        return super().forward(self.normalize(x))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", [torchvision.transforms.Normalize, torchvision.transforms.v2.Normalize])
def test_torchvisions_normalize_in_the_forward(kind, inplace):
    model = made(lambda: Normalizing(kind([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])))
    x = batch()
    leaf = (x - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    torch.testing.assert_close(model(x), Net.forward(model, leaf))
    model.normalize.inplace = inplace
    fast = AttackModel(model)
    assert fast.folded == 2
    assert fast.fused == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a graph that computes something else
        torch.testing.assert_close(fast(x.clone()), model(x.clone()))
        if not inplace:
            torch.testing.assert_close(gradient(fast, x), gradient(model, x), rtol=1e-4, atol=1e-6)
    double = model.double()
    torch.testing.assert_close(AttackModel(double)(x.double()), double(x.double()), rtol=1e-9, atol=1e-9)
    # Numbers that are changed are those of the next forward.
    model.float().normalize.mean = [0.1, 0.1, 0.1]
    torch.testing.assert_close(fast(x.clone()), model(x.clone()))


def test_folded_weights_are_those_of_the_two():
    torch.manual_seed(0)
    cases = [
        (nn.Conv2d(3, 8, 3, bias=False), bn()),
        (nn.Conv2d(3, 8, 3), bn()),
        (nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False)),
        (nn.Conv2d(4, 8, 1, groups=2, bias=False), nn.BatchNorm2d(8, affine=False, eps=0.1)),
    ]
    cases[2][1].running_mean.normal_()
    weights, biases = folded_weights([c.weight for c, _ in cases], [c.bias for c, _ in cases], [n for _, n in cases])
    for (conv, norm), weight, bias in zip(cases, weights, biases, strict=True):
        x = torch.randn(2, conv.in_channels, 5, 5, dtype=torch.float64)
        expected = norm.double().eval()(conv.double()(x))
        found = F.conv2d(x, weight.double(), bias.double(), groups=conv.groups)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert folded_weights([], [], []) == ([], [])


class ByKind(Net):
    """What torch.fx passes is no tensor: it sees another way than the one that is taken."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def body(self, x):
        out = self.conv(x)
        if isinstance(out, torch.Tensor):
            return self.layer4(
                F.relu({"clamp": self.clamped, "relu": self.positive, "beside": self.beside}[self.way](out))
            )
        return self.layer4(F.relu(self.bn(out)))

    def clamped(self, out):
        return self.bn(out.clamp(-0.1, 0.1))

    def positive(self, out):
        return self.bn(out.relu())

    def beside(self, out):
        return self.bn(out) + out.abs().mean()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("way", ["clamp", "relu", "beside"])
def test_a_forward_that_is_another_than_the_traced_one_is_unfolded(way, compile):
    model, x = made(lambda: ByKind(way)).double(), batch().double()
    fast = AttackModel(model, compile=compile)
    said = "ByKind computes something else where torch.fx traces it: AttackModel folds none of its BatchNorms"
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ByKind computes .* runs its own forward")
        with pytest.warns(UserWarning, match=said):
            fast(x)
        assert fast.folded == 0
        is_the_model(fast, model)
        grow(model)
        is_the_model(fast, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_what_is_folded_rightly_is_proven_bit_for_bit_and_once(affine, dtype, monkeypatch):
    """In whatever precision the forward computes, roundings are the same."""

    class Autocast(Net):
        def __init__(self):
            super().__init__()
            self.layer4[1] = self.layer4[1] if affine else nn.BatchNorm2d(8, affine=False)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                return super().forward(x).float()

    model, compared = made(Autocast), []
    far = attack_model._far
    monkeypatch.setattr(attack_model, "_far", lambda *given: compared.append(far(*given)) or compared[-1])
    fast = AttackModel(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            fast(batch())
    assert compared == [0]
    assert fast.folded == 2


# ---- what a traced forward keeps ----


class Lazy(Net):
    """A cache that the first forward fills, which all have in common or not."""

    shared: ClassVar = {}

    def __init__(self):
        super().__init__()
        self.cache, self.options = {}, types.SimpleNamespace(last=None, calls=[])

    def where(self):
        return self.cache

    def head(self, x):
        held = self.where()
        if "window" not in held:
            held["window"] = torch.ones_like(x[:1, :1]) / x[0, 0].numel()
        self.options.last = x
        self.options.calls.append((x,))
        return self.fc((x * held["window"]).sum((2, 3)))


class OfItsClass(Lazy):
    def where(self):
        return self.shared


GLOBAL = {"kept": [1]}


class InAGlobal(Lazy):
    def where(self):
        return GLOBAL


def in_a_closure():
    kept = collections.deque([1])

    class InAClosure(Lazy):
        def where(self):
            kept.append(self.conv(torch.zeros(1, 3, 8, 8)))
            return self.cache

        def head(self, x):
            kept.append([x])
            return super().head(x)

    InAClosure.kept = kept
    return InAClosure()


@pytest.mark.parametrize("kind", [Lazy, OfItsClass, InAGlobal, in_a_closure])
def test_tracing_leaves_nothing_behind(kind):
    Lazy.shared.clear()
    GLOBAL.pop("window", None)
    model = made(kind)
    seen, hidden, last = [], threading.local(), None

    def hook(module, args, out):
        nonlocal last
        seen.append(out.mean((2, 3)))
        hidden.seen = {"of": (out,)}
        last = out

    model.layer4.register_forward_hook(hook)
    fast = AttackModel(model)
    assert (seen, last, Lazy.shared, GLOBAL) == ([], None, {}, {"kept": [1]})
    assert getattr(hidden, "seen", {}) == {}
    assert list(getattr(kind if kind is not in_a_closure else model, "kept", [1])) == [1]
    for copied in (fast.module, model):
        assert copied.cache == {}
        assert (copied.options.last, copied.options.calls) == (None, [])
    gc.collect()
    assert not [held for held in gc.get_objects() if issubclass(type(held), torch.fx.Proxy)]
    found = fast(batch())
    torch.testing.assert_close(found, model(batch()), rtol=1e-4, atol=1e-5)
    assert {type(value) for value in seen} == {torch.Tensor}
    assert type(last) is torch.Tensor
