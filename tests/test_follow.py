"""Tests of part_fast.attack_model.follow: however a model's weights change, its AttackModel has them."""

import copy
import functools
import gc
import pickle
import time
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from part_fast import AttackModel, CamBudget, pgd
from part_fast.attack_model.follow import Change, Watch
from part_fast.models.catalogue import build_model

EPS = 8 / 255
CLASSES = 4


class Net(nn.Module):
    """A convolution, a normalisation, another convolution and a head; `flag` and `scale` are plain attributes."""

    def __init__(self, norm, frozen=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = norm(16)
        self.layer4 = nn.Conv2d(16, 16, 3, padding=1)
        self.register_buffer("shift", torch.zeros(1, 16, 1, 1))
        self.fc = nn.Linear(16, CLASSES)
        self.frozen, self.scale = frozen, 1.0

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.norm.eval()
        return self

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)) + self.shift)
        return self.fc(F.relu(self.layer4(x)).mean((2, 3))) * self.scale


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.block = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True)
        self.register_buffer("shift", torch.zeros(16))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.shift
        return self.fc(self.block(x).mean(1))


NETWORKS = {
    "BatchNorm": lambda: Net(nn.BatchNorm2d),
    "frozen BatchNorm": lambda: Net(nn.BatchNorm2d, frozen=True),
    "GroupNorm": lambda: Net(lambda channels: nn.GroupNorm(4, channels)),
    "transformer": Transformer,
}


def made(name):
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model.train()


def batch(n=4):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, 8, 8, generator=generator), torch.arange(n) % CLASSES


def stepped(kind, **kwargs):
    def change(model):
        x, y = batch()
        optimizer = kind(model.parameters(), **kwargs)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return change


def without_a_version(model):
    """As when a step is replayed as a CUDA graph: memory is written, and no tensor of torch's knows."""
    parameters = tuple(model.parameters())
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(parameters):
        torch._foreach_mul_(parameters, 1.5)


def assign(model):
    state = {name: value * 1.5 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def new_parameter(model):
    model.fc.weight = nn.Parameter(model.fc.weight.detach() * 2)


def new_head(model):
    model.fc = nn.Linear(16, CLASSES)


def larger_head(model):
    model.fc = nn.Linear(16, CLASSES + 3)


def new_buffer(model):
    model.shift = torch.full_like(model.shift, 0.5)


def set_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def write_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def ema_through_data(model):
    student = copy.deepcopy(model)
    stepped(torch.optim.SGD, lr=1.0)(student)
    for ours, theirs in zip(model.parameters(), student.parameters(), strict=True):
        ours.data.mul_(0.5).add_(theirs.data, alpha=0.5)


def as_a_vector(model):
    vector_to_parameters(parameters_to_vector(model.parameters()) * 1.5, model.parameters())


def to_float64(model):
    model.double()


def swapped_in(model):
    """A model of an average, as utilities for it put it in."""
    torch.utils.swap_tensors(model.fc.weight, nn.Parameter(model.fc.weight.detach() * 2))


def another_activation(model):
    """A module replaced by one of the same names."""
    if isinstance(model, Transformer):
        model.block = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
    else:
        model.norm = nn.GroupNorm(2, 16)


WAYS = {
    "SGD": stepped(torch.optim.SGD, lr=0.5),
    "SGD fused": stepped(torch.optim.SGD, lr=0.5, momentum=0.9, fused=True),
    "Adam fused": stepped(torch.optim.Adam, lr=0.1, fused=True),
    "AdamW fused": stepped(torch.optim.AdamW, lr=0.1, fused=True),
    "Adagrad fused": stepped(torch.optim.Adagrad, lr=0.1, fused=True),
    "CUDA graph": without_a_version,
    "load_state_dict(assign=True)": assign,
    "new Parameter": new_parameter,
    "new head": new_head,
    "new head, more classes": larger_head,
    "new buffer": new_buffer,
    "p.data = ...": set_data,
    "p.data.mul_": write_data,
    "EMA through .data": ema_through_data,
    "vector_to_parameters": as_a_vector,
    "swap_tensors": swapped_in,
    "model.double()": to_float64,
    "module replaced": another_activation,
}
# Folding and packing reorder the roundings of float32; bfloat16 has eight bits.
NEAR = {"fp32": 1e-4, "bf16": 0.03}


def wanted(model, x):
    was = model.training
    with torch.no_grad():
        logits = model.eval()(x.to(next(model.parameters()).dtype))
    model.train(was)
    return logits


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("way", "precision"),
    [(way, precision) for way in WAYS for precision in NEAR if (way, precision) != ("model.double()", "bf16")],
)
def test_every_way_to_change_every_network(way, precision, network):
    model, (x, y) = made(network), batch()
    forwards, attacked = AttackModel(model, precision=precision), AttackModel(model, precision=precision)
    forwards(x), attacked(x)
    before = wanted(model, x)
    WAYS[way](model)
    now = x.to(next(model.parameters()).dtype)
    after = wanted(model, now)
    size = after.abs().max()
    if after.shape == before.shape and after.dtype == before.dtype:
        assert (after - before).abs().max() > 4 * NEAR[precision] * size  # what is stale is seen
    seen = []

    def spy(logits, y):
        seen.append(logits.detach())
        return F.cross_entropy(logits, y, reduction="none")

    pgd(attacked, now, y, EPS, steps=1, start="zero", loss=spy)
    for found in (forwards(now), seen[0]):
        assert found.dtype == after.dtype or precision == "bf16"
        assert (found - after).abs().max() < NEAR[precision] * size


def near(fast, model, x, tolerance=1e-4):
    expected = wanted(model, x)
    return float((fast(x) - expected).abs().max()) < tolerance * float(expected.abs().max())


@pytest.mark.parametrize("network", ["BatchNorm", "transformer"])
def test_compiled(network, monkeypatch):
    """The same memory is written; new modules are compiled anew. By Dynamo and autograd's part of the compiler alone:
    Inductor takes 10 s and reads weights where these do."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model, (x, _) = made(network), batch()
    fast = AttackModel(model, compile=True)
    leaf = x.clone().requires_grad_()
    fast(leaf)
    for name, way in WAYS.items():
        if name != "model.double()":
            way(model)
            expected = wanted(model, x)
            assert (fast(leaf) - expected).abs().max() < 1e-3 * expected.abs().max(), name


def test_bf16_of_a_float64_model_is_refused_when_made_and_when_it_becomes_one():
    model, (x, _) = made("BatchNorm"), batch()
    fast = AttackModel(model, precision="bf16")
    model.double()
    for use in (lambda: fast(x), lambda: fast(x), lambda: AttackModel(model, precision="bf16")):
        with pytest.raises(ValueError, match=r"precision bf16 needs a float32 model, got torch\.float64"):
            use()
    model.float()
    assert near(fast, model, x, 0.03)


def test_sam_puts_its_weights_back_through_data():
    model, (x, _) = made("GroupNorm"), batch()
    fast = AttackModel(model)
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data.add_(0.2)
    assert near(fast, model, x)
    up = fast(x)
    for parameter, value in zip(model.parameters(), kept, strict=True):
        parameter.data.copy_(value)
    assert near(fast, model, x)
    assert not torch.allclose(fast(x), up)


def test_averages():
    model, (x, _) = made("BatchNorm"), batch()
    for averaged in (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
        AveragedModel(model, use_buffers=True),
    ):
        fast = AttackModel(averaged)
        assert fast.folded == 1
        for _ in range(2):
            stepped(torch.optim.SGD, lr=0.5, fused=True)(model)
            averaged.update_parameters(model)
            assert near(fast, averaged, x)


def test_an_attack_model_of_one_follows_the_model():
    model, (x, _) = made("GroupNorm"), batch()
    fast = AttackModel(AttackModel(model), precision="bf16")
    assert fast.source is model
    write_data(model)
    assert near(fast, model, x, 0.03)


def test_an_attack_model_within_a_model_follows_its_own():
    model, (x, _) = made("GroupNorm"), batch()
    outer = AttackModel(nn.Sequential(nn.Identity(), AttackModel(model)))
    without_a_version(model)
    assert not list(outer.source.parameters())
    assert near(outer, model, x)


@pytest.mark.parametrize("attack_first", [False, True])
def test_a_deepcopy_follows_the_model_or_the_copy_that_was_made_with_it(attack_first):
    model, (x, _) = made("BatchNorm"), batch()
    fast = AttackModel(model)
    alone = copy.deepcopy(fast)
    both = nn.Module()
    for name in ("fast", "net") if attack_first else ("net", "fast"):
        setattr(both, name, {"fast": fast, "net": model}[name])
    copied = copy.deepcopy(both)
    assert copied.fast.source is copied.net
    assert alone.source is model
    stepped(torch.optim.SGD, lr=0.5, fused=True)(model)
    assert near(alone, model, x)
    assert near(copied.fast, copied.net, x)
    write_data(copied.net)
    assert near(copied.fast, copied.net, x)
    assert near(fast, model, x)
    unpickled = pickle.loads(pickle.dumps(both))
    assert unpickled.fast.source is unpickled.net
    write_data(unpickled.net)
    assert near(unpickled.fast, unpickled.net, x)


def test_plain_attributes():
    model, (x, _) = made("BatchNorm"), batch()
    model.mean, model.options = torch.zeros(3, 1, 1), {"gain": 1.0, "more": [1.0]}
    fast = AttackModel(model)

    for value in (5.0, 2.0):
        model.scale = value
        assert near(fast, model, x)
    del model.scale
    Net.scale = 3.0
    try:
        assert near(fast, model, x)
    finally:
        del Net.scale
    model.scale = 1.0
    before = fast(x)
    model.norm.eps = 0.5  # of a layer that is folded
    assert near(fast, model, x)
    assert not torch.allclose(before, fast(x))
    fast.module.scale = 2.0  # the copy's own
    assert near(fast, model, x) is False
    model.scale = 4.0
    assert near(fast, model, x)


class Branches(nn.Module):
    """Reads a tensor, a list and a dict that are plain attributes, and takes one of three ways."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, CLASSES)
        self.mean, self.gains, self.options, self.kept = torch.zeros(3, 1, 1), [1.0], {"normalise": True}, None

    def forward(self, x):
        out = self.conv(x - self.mean)
        out = self.bn(out) if self.options["normalise"] else out
        self.kept = out.relu()
        return self.fc(self.kept.mean((2, 3))) * self.gains[0]


def test_tensors_lists_and_dicts_that_are_plain_attributes():
    torch.manual_seed(0)
    model, (x, _) = Branches(), batch()
    model.bn.running_mean.fill_(1)
    fast = AttackModel(model)
    assert fast.folded == 1
    model(x)
    assert near(fast, model, x)
    model.mean += 0.5
    assert near(fast, model, x)
    model.mean = torch.full((3, 1, 1), -0.5)
    assert near(fast, model, x)
    model.gains[0] = 3.0
    assert near(fast, model, x)
    assert fast.folded == 1
    model.kept = None
    model.options["normalise"] = False  # the BatchNorm is not to be part of the convolution any more
    assert near(fast, model, x)
    assert fast.folded == 0
    fast.module.mean.add_(9)  # the copy's own memory
    assert float(model.mean.max()) == -0.5


def test_one_weight_through_data_is_seen_when_all_are_checked(monkeypatch):
    model, (x, _) = made("BatchNorm"), batch()
    fast = AttackModel(model)
    model.conv.weight.data[0, 0, 0, 0] += 5
    stale = fast(x)
    assert not near(fast, model, x)  # as its docstring says
    monkeypatch.setenv("PART_FAST_CHECK", "1")
    assert near(fast, model, x)
    model.conv.weight.data[0, 0, 0, 0] -= 7
    assert near(fast, model, x)
    monkeypatch.delenv("PART_FAST_CHECK")
    model.conv.weight.data[0, 0, 0, 0] += 7
    assert torch.equal(fast.refresh()(x), AttackModel(model)(x))
    assert not torch.equal(fast(x), stale)


def test_it_is_asked_once_an_attack_and_nothing_is_done_while_nothing_changes(monkeypatch):
    model, (x, y) = made("BatchNorm"), batch()
    fast, asked = AttackModel(model), []
    ask = fast._watch.ask
    monkeypatch.setattr(fast._watch, "ask", lambda: asked.append(ask()) or asked[-1])
    pgd(fast, x, y, EPS, steps=5)
    assert asked == [(Change.NOTHING, [])]
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], 0.1)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()  # on other parameters
    model.eval()
    model(x)
    model.train()
    fast(x)
    assert asked[1:] == [(Change.NOTHING, [])]
    stepped(torch.optim.SGD, lr=0.1)(model)
    pgd(fast, x, y, EPS, steps=5)
    assert [change for change, _ in asked[2:]] == [Change.VALUES]


def test_nan_weights_are_no_change():
    model = made("BatchNorm")
    with torch.no_grad():
        model.fc.weight.fill_(torch.nan)
    assert Watch(model).ask() == (Change.NOTHING, [])


def test_inference_tensors():
    with torch.inference_mode():
        model = made("GroupNorm")
        watch = Watch(model)
        assert watch.ask() == (Change.NOTHING, [])
        model.fc.weight.mul_(2)
        assert watch.ask()[0] is Change.VALUES


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_a_fused_step_is_heard_of_where_nothing_shows_it(kind):
    """One weight changes, out of sight of the sample, and fused optimizers count no version."""
    model, (x, _) = made("GroupNorm"), batch()
    fast = AttackModel(model)
    optimizer = kind([model.conv.weight], lr=5.0, fused=True)
    model.conv.weight.grad = torch.zeros_like(model.conv.weight)
    model.conv.weight.grad[0, 0, 0, 0] = -1.0
    version = model.conv.weight._version
    optimizer.step()
    assert model.conv.weight._version == version
    assert near(fast, model, x)


def test_told():
    model = made("GroupNorm")
    fast = AttackModel(model)
    assert fast._watch.ask()[0] is Change.NOTHING
    fast.tell()
    assert fast._watch.ask()[0] is Change.VALUES


def test_what_cannot_be_read_is_taken_over_each_time(monkeypatch):
    """As with a model on a GPU, and a backward through a forward before it does not mind."""
    model, (x, _) = made("GroupNorm"), batch()
    fast = AttackModel(model)
    monkeypatch.setattr(Watch, "unread", True)
    monkeypatch.setattr(Watch, "_read", lambda self: [])
    monkeypatch.setattr(Watch, "_values_changed", lambda self: False)
    leaf = x.clone().requires_grad_()
    loss = fast(leaf).sum()
    fast(x)
    loss.backward()
    fast.module.fc.weight.zero_()
    assert near(fast, model, x)


def test_a_model_and_its_watch_are_collected():
    model = made("BatchNorm")
    fast = AttackModel(model)
    kept = weakref.ref(model)
    del model, fast
    gc.collect()
    assert kept() is None


def test_a_rebuild_that_would_lose_hooks_is_refused():
    model, (x, _) = made("BatchNorm"), batch()
    fast = AttackModel(model)
    fast.module.layer4.register_forward_hook(lambda module, args, output: output * 0)
    new_buffer(model)
    assert torch.allclose(fast(x), model.fc.bias)
    larger_head(model)
    with pytest.raises(ValueError, match=r"model, the Net of this AttackModel, has other modules.*make a new"):
        fast(x)


def test_cam_of_a_changed_model():
    model, (x, _) = made("BatchNorm"), batch()
    budget = CamBudget(AttackModel(model), rule="soft")
    x = F.interpolate(x, 16)
    for way in ("SGD fused", "p.data.mul_", "load_state_dict(assign=True)"):
        WAYS[way](model)
        torch.testing.assert_close(budget(x), CamBudget(model, rule="soft")(x), rtol=1e-4, atol=1e-5)


class Launches(TorchDispatchMode):
    """Counts operations that compute; views and what is known of a tensor cost nothing on a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = ("view", "detach", "alias", "as_strided", "empty", "slice", "select")
        if not any(name in func.__name__ for name in views):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["resnet18", "resnet-small", "wrn-10-2"])
def test_a_refresh_is_few_launches(name, precision):
    model = build_model(name, 10)
    fast = AttackModel(model, precision=precision)
    with Launches() as launches:
        fast._take_values(noticed=False)
    assert 4 <= len(launches.found) <= 12, launches.found


def test_asking_is_quick():
    """Of WRN-34-10 it took about 0.2 ms; the bound leaves room for a machine that is busy."""
    with torch.device("meta"):
        shapes = [tensor.shape for tensor in build_model("wrn-34-10", 10).parameters()]
    assert len(shapes) == 98
    torch.manual_seed(0)
    watch = Watch(build_model("wrn-34-10", 10))
    laps = []
    for _ in range(30):
        begin = time.perf_counter()
        assert watch.ask()[0] is Change.NOTHING
        laps.append(time.perf_counter() - begin)
    assert min(laps) < 1e-3


class Training(nn.Module):
    """As a LightningModule: a network and what attacks it."""

    def __init__(self, attacks=True):
        super().__init__()
        self.net = made("BatchNorm")
        if attacks:
            self.attacked = AttackModel(self.net)


def test_it_is_no_part_of_a_module_that_holds_it():
    training, without = Training(), Training(attacks=False)
    assert training.state_dict().keys() == without.state_dict().keys()
    assert [name for name, _ in training.named_parameters()] == [name for name, _ in without.named_parameters()]
    assert [name for name, _ in training.named_buffers()] == [name for name, _ in without.named_buffers()]
    for state in (training.state_dict(), without.state_dict()):
        training.load_state_dict(state)
        without.load_state_dict(state)
    # What a version saved that kept it among the modules.
    older = {**training.state_dict(), "attacked.module.conv.weight": torch.zeros(16, 3, 3, 3)}
    training.load_state_dict(older)
    assert training.attacked.state_dict() == {}
    training.train()
    assert not any(module.training for module in training.attacked.modules())
    x, _ = batch()
    write_data(training.net)
    assert near(training.attacked, training.net, x)
    names = [name for name, _ in training.attacked.named_modules()]
    assert names[:3] == ["", "module", "module.conv"]
    assert training.attacked.get_submodule("module.layer4") is training.attacked.module.layer4
    assert "Net, precision=fp32, folded=1" in repr(training)


@pytest.mark.parametrize("attack_first", [False, True])
def test_it_moves_with_the_model_and_not_alone(attack_first):
    model, (x, _) = made("BatchNorm"), batch()
    fast = AttackModel(model)
    assert fast.to("cpu") is fast
    fast.float()(x)
    fast.double()
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"model must be moved, .*float32 on cpu, .* to become torch.float64 on cpu"
        ):
            fast(x)
    model.double()
    assert near(fast, model, x.double())
    model.float()
    both = nn.ModuleList([fast, model] if attack_first else [model, fast]).double()
    assert near(fast, model, x.double())
    assert len(both) == 2


class Apart(nn.Module):
    """Keeps modules where torch does not register them, one of which holds a registered one."""

    def __init__(self, where):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 16, 3), nn.Linear(16, CLASSES)
        self.encoder = {"tuple": tuple, "list": list, "dict": lambda held: dict(enumerate(held)), "object": held_in}[
            where
        ]([nn.Conv2d(3, 16, 3), nn.Sequential(self.conv, nn.Conv2d(16, 16, 1))])
        self.config = types.SimpleNamespace(scale=1.0, of={"deep": [1.0]})

    def forward(self, x):
        held = self.encoder.held if isinstance(self.encoder, types.SimpleNamespace) else self.encoder
        out = (held[0](x) + held[1](x)).relu().mean((2, 3))
        return self.fc(out) * self.config.scale * self.config.of["deep"][0]


class Fused(nn.Module):
    """Runs as a graph, in which a number of its class is what it was when it was traced."""

    gain = 1.0

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3))) * self.gain


def held_in(held):
    return types.SimpleNamespace(held=held)


@pytest.mark.parametrize("where", ["tuple", "list", "dict", "object"])
def test_modules_that_are_not_registered(where):
    torch.manual_seed(0)
    model, (x, y) = Apart(where), batch()
    fast = AttackModel(model)
    copied = copy.deepcopy(fast)
    encoder = getattr(model.encoder, "held", model.encoder)
    unregistered = [*encoder[0].parameters(), *encoder[1].parameters()]
    optimizer = torch.optim.SGD({id(p): p for p in (*model.parameters(), *unregistered)}.values(), 0.5)
    before = wanted(model, x)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert near(fast, model, x)
        assert near(copied, model, x)
    assert not torch.allclose(before, wanted(model, x), rtol=1e-2)
    grads = [parameter.grad.clone() for parameter in unregistered]
    pgd(fast, x, y, EPS, steps=2)
    assert all(map(torch.equal, grads, (parameter.grad for parameter in unregistered)))
    both = nn.ModuleList([model, fast])
    both = copy.deepcopy(both)
    with torch.no_grad():
        getattr(both[0].encoder, "held", both[0].encoder)[0].weight.mul_(3)
    assert near(both[1], both[0], x)
    assert near(fast, model, x)


def test_refresh_takes_over_what_is_not_noticed(monkeypatch):
    torch.manual_seed(0)
    model, (x, _) = Apart("list"), batch()
    fast = AttackModel(model)
    fast(x)
    for change in (
        lambda: setattr(model.config, "scale", 3.0),
        lambda: model.config.of["deep"].__setitem__(0, 2.0),
    ):
        change()
        assert not near(fast, model, x)  # as its docstring says
        fast.refresh()
        assert near(fast, model, x)
        assert fast.module.config is not model.config
    model = Fused()
    fast = AttackModel(model)
    fast(x)
    assert (fast.folded, fast.fused) == (1, 1)
    monkeypatch.setattr(Fused, "gain", 3.0)
    assert not near(fast, model, x)
    assert near(fast.refresh(), model, x)
    assert (fast.folded, fast.fused) == (1, 1)
