"""Models: the published key names and what they compute, sizes, errors, checkpoints."""

import argparse
import math
import pathlib
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from part_fast import AttackModel, CamBudget
from part_fast.models.catalogue import build_model
from part_fast.models.checkpoints import export_weights, load_weights
from part_fast.models.preact_resnet import preact_resnet18
from part_fast.models.resnet import resnet18, resnet_small
from part_fast.models.wideresnet import wideresnet


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def bn(state, name, x):
    """Eval-mode BatchNorm straight from its definition."""
    mean, var, weight, bias = (
        state[f"{name}.{k}"].view(1, -1, 1, 1) for k in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias


def resnet_forward(state, x, *, stem_stride=1, strides=(1, 2, 2, 2)):
    """The usual CIFAR ResNet in eval mode, from nothing but its state_dict."""
    out = F.relu(bn(state, "bn1", F.conv2d(x, state["conv1.weight"], stride=stem_stride, padding=1)))
    for stage, stage_stride in enumerate(strides, start=1):
        block = 0
        while f"layer{stage}.{block}.conv1.weight" in state:
            name, stride = f"layer{stage}.{block}", stage_stride if block == 0 else 1
            inner = F.conv2d(out, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            inner = F.conv2d(F.relu(bn(state, f"{name}.bn1", inner)), state[f"{name}.conv2.weight"], padding=1)
            inner = bn(state, f"{name}.bn2", inner)
            if f"{name}.shortcut.0.weight" in state:
                out = bn(state, f"{name}.shortcut.1", F.conv2d(out, state[f"{name}.shortcut.0.weight"], stride=stride))
            out = F.relu(inner + out)
            block += 1
    return out.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]


def preact_resnet_forward(state, x, activation=F.relu, from_input=False):
    """PreActResNet-18 of Rice et al. 2020 in eval mode, from nothing but its state_dict; from_input: Wong et al.'s."""
    out = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            active = activation(bn(state, f"{name}.bn1", out))
            inner = F.conv2d(active, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            inner = F.conv2d(activation(bn(state, f"{name}.bn2", inner)), state[f"{name}.conv2.weight"], padding=1)
            if f"{name}.shortcut.0.weight" in state:
                out = F.conv2d(out if from_input else active, state[f"{name}.shortcut.0.weight"], stride=stride)
            out = out + inner
    return activation(bn(state, "bn", out)).mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]


def same_padded(x, weight, stride):
    """A convolution as TensorFlow and JAX pad it for "SAME": the larger half of what is missing comes last."""
    pads = []
    for length, kernel in ((x.shape[3], weight.shape[3]), (x.shape[2], weight.shape[2])):
        missing = max((math.ceil(length / stride) - 1) * stride + kernel - length, 0)
        pads += [missing // 2, missing - missing // 2]
    return F.conv2d(F.pad(x, pads), weight, stride=stride)


def silu(x):
    return x * torch.sigmoid(x)


def gowal_forward(state, x):
    """The WideResNet of Gowal et al. 2020 in eval mode, from its state_dict, of images that are normalised already."""
    out = same_padded(x, state["init_conv.weight"], 1)
    for stage in (0, 1, 2):
        block = 0
        while f"layer.{stage}.block.{block}.conv_0.weight" in state:
            name, stride = f"layer.{stage}.block.{block}", 2 if stage > 0 and block == 0 else 1
            active = silu(bn(state, f"{name}.batchnorm_0", out))
            inner = same_padded(active, state[f"{name}.conv_0.weight"], stride)
            inner = same_padded(silu(bn(state, f"{name}.batchnorm_1", inner)), state[f"{name}.conv_1.weight"], 1)
            if f"{name}.shortcut.weight" in state:
                out = same_padded(active, state[f"{name}.shortcut.weight"], stride)
            out = out + inner
            block += 1
    out = silu(bn(state, "batchnorm", out))
    return out.mean((2, 3)) @ state["logits.weight"].T + state["logits.bias"]


# Where each part of ours stands under the published names.
GOWAL = (
    (r"^conv1\.", "init_conv."), (r"^bn1\.", "batchnorm."), (r"^fc\.", "logits."),
    (r"^block(\d)\.layer\.(\d+)\.", lambda found: f"layer.{int(found[1]) - 1}.block.{found[2]}."),
    (r"(block\.\d+\.)bn1", r"\1batchnorm_0"), (r"(block\.\d+\.)conv1", r"\1conv_0"),
    (r"(block\.\d+\.)bn2", r"\1batchnorm_1"), (r"(block\.\d+\.)conv2", r"\1conv_1"), (r"convShortcut", "shortcut"),
)  # fmt: skip


def of_gowal(state):
    renamed = {}
    for key, value in state.items():
        for ours, theirs in GOWAL:
            key = re.sub(ours, theirs, key)
        renamed[key] = value
    return renamed


def wideresnet_forward(state, x):
    """The WideResNet of the TRADES checkpoints in eval mode, from nothing but its state_dict."""
    out = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage, stage_stride in ((1, 1), (2, 2), (3, 2)):
        block = 0
        while f"block{stage}.layer.{block}.conv1.weight" in state:
            name, stride = f"block{stage}.layer.{block}", stage_stride if block == 0 else 1
            active = F.relu(bn(state, f"{name}.bn1", out))
            inner = F.conv2d(active, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            inner = F.conv2d(F.relu(bn(state, f"{name}.bn2", inner)), state[f"{name}.conv2.weight"], padding=1)
            if f"{name}.convShortcut.weight" in state:
                out = F.conv2d(active, state[f"{name}.convShortcut.weight"], stride=stride)
            out = out + inner
            block += 1
    out = F.relu(bn(state, "bn1", out))
    return out.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def randomize(model):
    """Nothing at its starting value: an ignored or swapped BatchNorm tensor then changes the output."""
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        if key.endswith("running_var"):
            value.uniform_(0.5, 2.0)
        elif value.dim() == 1:
            value.uniform_(-0.5, 1.5)
    return model


MODELS = {
    "resnet18": (resnet18, resnet_forward),
    "resnet_small": (
        resnet_small,
        lambda state, x: resnet_forward(state, x, stem_stride=2, strides=(1, 2, 1, 1)),
    ),
    "wrn-10-2": (lambda **kw: wideresnet(10, 2, **kw), wideresnet_forward),
    "wrn-16-1": (lambda **kw: wideresnet(16, 1, **kw), wideresnet_forward),
    "preact-resnet18": (preact_resnet18, preact_resnet_forward),
    "preact-resnet18-wong": (
        lambda **kw: preact_resnet18(shortcut="input", **kw),
        lambda state, x: preact_resnet_forward(state, x, from_input=True),
    ),
    "preact-resnet18-silu": (
        lambda **kw: preact_resnet18(activation="silu", **kw),
        lambda state, x: preact_resnet_forward(state, x, silu),
    ),
    "wrn-16-2-silu": (
        lambda **kw: wideresnet(16, 2, activation="silu", **kw),
        lambda state, x: gowal_forward(of_gowal(state), x),
    ),
}


@pytest.mark.parametrize("size", [32, 64, (33, 40)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_computes_what_the_published_definition_computes(name, size):
    build, forward = MODELS[name]
    model = randomize(build(num_classes=7).double().eval())
    x = torch.rand(2, 3, *(size if isinstance(size, tuple) else (size, size)), dtype=torch.float64)
    with torch.no_grad():
        # float64 sums in another order: far below 1e-9 of the logits' size
        torch.testing.assert_close(model(x), forward(model.state_dict(), x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_normalisation_is_inside_and_not_in_the_state_dict(name):
    build, _ = MODELS[name]
    mean, std = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
    plain, normalized = build().eval(), build(mean=mean, std=std).eval()
    assert list(plain.state_dict()) == list(normalized.state_dict())
    normalized.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 32, 32)
    shifted = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        assert torch.equal(normalized(x), plain(shifted))
        assert not torch.allclose(normalized(x), plain(x))


def block_parameters(cin, cout, shortcut):
    return 9 * cin * cout + 9 * cout * cout + shortcut


def test_parameter_counts():
    # ResNet-18: stem, then per stage two blocks, two BatchNorms a block, one more with the 1x1 shortcut.
    widths, expected, cin = (64, 128, 256, 512), 27 * 64 + 2 * 64, 64
    for w in widths:
        expected += block_parameters(cin, w, 0 if cin == w else cin * w + 2 * w) + block_parameters(w, w, 0) + 8 * w
        cin = w
    expected += 512 * 10 + 10
    assert expected == 11_173_962
    with torch.device("meta"):
        assert sum(p.numel() for p in resnet18().parameters()) == expected

    # PreActResNet-18: a BatchNorm before each convolution but stem and shortcuts, and one before the last layer.
    expected, cin = 27 * 64, 64
    for w in widths:
        expected += block_parameters(cin, w, 0 if cin == w else cin * w) + block_parameters(w, w, 0) + 2 * cin + 6 * w
        cin = w
    expected += 2 * 512 + 512 * 10 + 10
    assert expected == 11_172_170
    for activation in ("relu", "silu"):
        with torch.device("meta"):
            assert sum(p.numel() for p in preact_resnet18(activation=activation).parameters()) == expected

    # WRN-34-10: five blocks a stage, BatchNorm before each convolution, a bare 1x1 shortcut where widths change.
    expected, cin = 27 * 16, 16
    for w in (160, 320, 640):
        expected += block_parameters(cin, w, cin * w) + 4 * block_parameters(w, w, 0) + 2 * cin + 2 * 9 * w
        cin = w
    expected += 2 * 640 + 640 * 10 + 10
    assert expected == 46_160_474
    with torch.device("meta"):
        assert sum(p.numel() for p in wideresnet(34, 10, activation="silu").parameters()) == expected
        assert sum(p.numel() for p in wideresnet(34, 10).parameters()) == expected
        assert sum(p.numel() for p in wideresnet(28, 10, activation="silu").parameters()) == 36_479_194
        assert sum(p.numel() for p in resnet_small().parameters()) < 200_000


def test_checkpoint_keys():
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "linear.weight", "linear.bias", *(f"bn1.{k}" for k in norm)}
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name = f"layer{stage}.{block}"
            expected |= {f"{name}.conv1.weight", f"{name}.conv2.weight"}
            expected |= {f"{name}.{b}.{k}" for b in ("bn1", "bn2") for k in norm}
        if stage > 1:
            expected |= {f"layer{stage}.0.shortcut.0.weight", *(f"layer{stage}.0.shortcut.1.{k}" for k in norm)}
    with torch.device("meta"):
        assert set(resnet18().state_dict()) == expected

    expected = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{k}" for k in norm)}
    for stage in (1, 2, 3):
        expected.add(f"block{stage}.layer.0.convShortcut.weight")
        for block in range(5):
            name = f"block{stage}.layer.{block}"
            expected |= {f"{name}.conv1.weight", f"{name}.conv2.weight"}
            expected |= {f"{name}.{b}.{k}" for b in ("bn1", "bn2") for k in norm}
    with torch.device("meta"):
        assert set(wideresnet(34, 10).state_dict()) == expected
        assert set(wideresnet(34, 10, activation="silu").state_dict()) == expected

    expected = {"conv1.weight", "linear.weight", "linear.bias", *(f"bn.{k}" for k in norm)}
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name = f"layer{stage}.{block}"
            expected |= {f"{name}.conv1.weight", f"{name}.conv2.weight"}
            expected |= {f"{name}.{b}.{k}" for b in ("bn1", "bn2") for k in norm}
        if stage > 1:
            expected.add(f"layer{stage}.0.shortcut.0.weight")
    with torch.device("meta"):
        assert set(preact_resnet18().state_dict()) == expected


def test_initialisation():
    model = wideresnet(10, 4)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4:
            k, out = parameter.shape[2], parameter.shape[0]
            # the sample deviation of n normals lies within 5 / sqrt(2n) of the true one
            assert parameter.std().item() == pytest.approx(
                math.sqrt(2 / (k * k * out)), rel=5 / math.sqrt(2 * parameter.numel())
            ), name
    assert model.fc.bias.abs().max() == 0
    bound = 1 / math.sqrt(27)
    stem = resnet18().conv1.weight
    assert 0.9 * bound < stem.abs().max() <= bound  # PyTorch's default: uniform within 1 / sqrt(fan in)


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [
        ("resnet18", "layer4", (2, 512, 4, 4)),
        ("resnet_small", "layer4", (2, 64, 8, 8)),
        ("wrn-10-2", "block3", (2, 128, 8, 8)),
        ("wrn-16-2-silu", "block3", (2, 128, 8, 8)),
        ("preact-resnet18", "layer4", (2, 512, 4, 4)),
    ],
)
def test_cam_layer_keeps_its_true_output(name, layer, shape):
    model = MODELS[name][0]().eval()
    seen = []
    model.get_submodule(layer).register_forward_hook(lambda _m, _i, out: seen.append((out, out.detach().clone())))
    x = torch.rand(2, 3, 32, 32)
    logits = model(x)
    out, copy = seen[0]
    assert out.shape == shape
    assert torch.equal(out, copy)
    (gradient,) = torch.autograd.grad(logits.sum(), out)
    assert gradient.shape == shape
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", MODELS)
def test_channels_last_autocast_and_empty_batch(name):
    model = MODELS[name][0]().eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        model.to(memory_format=torch.channels_last)
        # other convolution kernels, so another order of float32 sums
        torch.testing.assert_close(
            model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()
        )
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
        assert low.dtype == torch.bfloat16
        # bf16 keeps 8 bits: a few per cent of the logits after this many layers
        assert (low.float() - expected).abs().max() < 0.05 * expected.abs().max() + 0.02
        assert model(x[:0]).shape == (0, 10)


def test_trains():
    model = resnet_small(num_classes=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.rand(16, 3, 32, 32)
    y = torch.arange(16) % 2
    x[y == 1, :, :16] *= 0.3
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_compiles_without_a_graph_break():
    model = resnet_small(mean=(0.5,) * 3, std=(0.25,) * 3).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    out, expected = compiled(x), model(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wideresnet(35, 10), "depth takes 6n + 4 with n >= 1 (10, 16, 22, 28, 34, ...), got 35"),
        (lambda: wideresnet(4, 10), "depth takes 6n + 4 with n >= 1 (10, 16, 22, 28, 34, ...), got 4"),
        (lambda: wideresnet(10, 0), "widen_factor takes an integer >= 1, got 0"),
        (lambda: wideresnet(10, 1, 0), "num_classes takes an integer >= 1, got 0"),
        (lambda: resnet18(0), "num_classes takes an integer >= 1, got 0"),
        (lambda: resnet_small(2.5), "num_classes takes an integer >= 1, got 2.5"),
        (lambda: resnet_small(mean=(0.5, 0.5, 0.5)), "mean and std go together, got mean=(0.5, 0.5, 0.5), std=None"),
        (
            lambda: resnet_small(mean=(0.5,), std=(1, 1, 1)),
            "mean takes three finite numbers, one per channel, got (0.5,)",
        ),
        (lambda: resnet_small(mean=(0, 0, 0), std=(1, 1, 0)), "std takes three numbers > 0, got (1, 1, 0)"),
        (
            lambda: build_model("resnet19"),
            "model takes one of resnet18, resnet-small, preact-resnet18, preact-resnet18-wong, preact-resnet18-silu, "
            "wrn-DEPTH-WIDTH "
            "(wrn-34-10, wrn-28-10, ...), wrn-DEPTH-WIDTH-silu (wrn-28-10-silu, ...), torchvision:NAME "
            "(torchvision:resnet50, ...), timm:NAME (timm:convnext_atto, ...), MODULE:FUNCTION (your own, called with "
            "num_classes=), got 'resnet19'",
        ),
        (lambda: wideresnet(10, 1, activation="swish"), "activation takes one of relu, silu, got 'swish'"),
        (lambda: preact_resnet18(activation="gelu"), "activation takes one of relu, silu, got 'gelu'"),
        (lambda: preact_resnet18(shortcut="3x3"), "shortcut must be one of activation, input, got '3x3'"),
        (lambda: build_model("wrn-33-2"), "depth takes 6n + 4 with n >= 1 (10, 16, 22, 28, 34, ...), got 33"),
    ],
)
def test_errors(make, message):
    with torch.device("meta"), pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_weights_are_a_path_or_a_mapping():
    with pytest.raises(TypeError, match=r"^path_or_state must be a path or a mapping, got list$"):
        load_weights(resnet_small(), [])


def test_build_model():
    with torch.device("meta"):
        for name, other in (
            ("resnet18", resnet18(5)),
            ("resnet-small", resnet_small(5)),
            ("wrn-34-10", wideresnet(34, 10, 5)),
            ("wrn-16-4", wideresnet(16, 4, 5)),
            ("preact-resnet18", preact_resnet18(5)),
            ("preact-resnet18-wong", preact_resnet18(5, shortcut="input")),
            ("preact-resnet18-silu", preact_resnet18(5, activation="silu")),
            ("wrn-16-4-silu", wideresnet(16, 4, 5, activation="silu")),
        ):
            for told in ("activation", "shortcut"):
                assert getattr(build_model(name, 5), told, None) == getattr(other, told, None)
            state = build_model(name, 5).state_dict()
            assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in other.state_dict().items()}


# --- checkpoints under the names of Gowal et al. ----------------------------------------------------------------------

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("container", [None, "model_state_dict"])
def test_published_checkpoints_of_silu_networks_give_their_logits(prefix, buffers, container, tmp_path):
    """Computed from the published definition, with its asymmetric padding; the networks normalise."""
    torch.manual_seed(1)
    theirs = of_gowal(randomize(wideresnet(16, 2, 7, activation="silu")).state_dict())
    if buffers:
        theirs |= {"mean": torch.tensor(CIFAR_MEAN).view(3, 1, 1), "std": torch.tensor(CIFAR_STD).view(3, 1, 1)}
    stored = {prefix + key: value for key, value in theirs.items()}
    torch.save(stored if container is None else {container: stored, "epoch": 3}, tmp_path / "published.pt")
    model = build_model("wrn-16-2-silu", 7, mean=CIFAR_MEAN, std=CIFAR_STD).eval()
    load_weights(model, tmp_path / "published.pt")
    x = torch.rand(3, 3, 32, 32)
    shifted = (x - torch.tensor(CIFAR_MEAN).view(3, 1, 1)) / torch.tensor(CIFAR_STD).view(3, 1, 1)
    with torch.no_grad():
        # float32 sums in another order
        torch.testing.assert_close(model(x), gowal_forward(theirs, shifted), rtol=1e-4, atol=1e-4)


def test_published_checkpoints_go_into_no_other_network():
    theirs = of_gowal(randomize(wideresnet(16, 2, activation="silu")).state_dict())
    for other in (wideresnet(16, 2), preact_resnet18(activation="silu")):
        with pytest.raises(ValueError, match="does not fit") as caught:
            load_weights(other, theirs)
        assert "\n" not in str(caught.value)
    broken = {key: value for key, value in theirs.items() if key != "layer.0.block.0.batchnorm_1.bias"}
    with pytest.raises(ValueError, match=r"does not fit WideResNet: missing block1\.layer\.0\.bn2\.bias"):
        load_weights(wideresnet(16, 2, activation="silu"), broken)
    with pytest.warns(UserWarning, match="does not say how its images are normalised"):
        load_weights(wideresnet(16, 2, activation="silu"), theirs)
    with pytest.raises(ValueError, match=r"normalises its images, mean .* and the model does not normalise"):
        load_weights(
            wideresnet(16, 2, activation="silu"),
            theirs | {"mean": torch.tensor(CIFAR_MEAN), "std": torch.tensor(CIFAR_STD)},
        )


@pytest.mark.parametrize("name", ["preact-resnet18", "preact-resnet18-wong", "preact-resnet18-silu", "wrn-16-2-silu"])
def test_the_copy_that_is_attacked_and_the_cams_are_the_model_s(name):
    """SiLU has no fused form on a CPU; it runs as it is."""
    model = randomize(MODELS[name][0]()).eval()
    fast = AttackModel(model)
    x = torch.rand(4, 3, 32, 32)
    assert fast.folded > 0
    assert fast.fused > 0  # of a SiLU network the sums alone
    for of, to in ((model, "model"), (fast, "fast")):
        leaf = x.clone().requires_grad_()
        logits = of(leaf)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, torch.arange(4)), leaf)
        if to == "model":
            expected, expected_gradient = logits.detach(), gradient
    torch.testing.assert_close(logits.detach(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-2, atol=1e-2 * float(expected_gradient.abs().max()))
    maps, _ = CamBudget(fast, rule="soft").evidence(x)
    plain, _ = CamBudget(model, rule="soft", target_layer="block3" if "wrn" in name else "layer4").evidence(x)
    torch.testing.assert_close(maps, plain, rtol=1e-2, atol=1e-2 * float(plain.abs().max()))


@pytest.fixture
def weights():
    return {k: v.clone() for k, v in randomize(wideresnet(10, 1)).state_dict().items()}


def same(model, weights):
    return all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("container", [None, "state_dict", "model_state_dict", "model", "net"])
def test_load_weights_of_every_common_form(weights, prefix, container, tmp_path):
    state = {prefix + key: value for key, value in weights.items()}
    state[prefix + "sub_block1.layer.0.bn1.weight"] = torch.ones(16)
    checkpoint = state if container is None else {"epoch": 3, container: state}
    assert same(load_weights(wideresnet(10, 1), checkpoint), weights)
    torch.save(checkpoint, tmp_path / "model.pt")
    model = wideresnet(10, 1)
    assert load_weights(model, tmp_path / "model.pt") is model
    assert same(model, weights)


def test_load_weights_safetensors_dtypes_and_old_checkpoints(weights, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    assert same(load_weights(wideresnet(10, 1), str(tmp_path / "model.safetensors")), weights)
    old = {k: v.half() for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    model = load_weights(wideresnet(10, 1), old)
    assert model.fc.weight.dtype == torch.float32
    assert torch.equal(model.fc.weight, old["fc.weight"].float())


def test_load_weights_of_a_wrapped_model(weights):
    wrapped = torch.nn.Sequential()
    wrapped.add_module("model", wideresnet(10, 1))
    load_weights(wrapped, {f"model.{key}": value for key, value in weights.items()})
    assert same(wrapped.model, weights)


def test_load_weights_refuses_in_one_line_and_writes_nothing(weights, tmp_path):
    model = wideresnet(10, 1)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def refuses(checkpoint, message, error=ValueError):
        with pytest.raises(error, match=message) as caught:
            load_weights(model, checkpoint)
        assert "\n" not in str(caught.value)
        assert same(model, before)

    without = {k: v for k, v in weights.items() if k != "fc.bias"}
    refuses(without, "does not fit WideResNet: missing fc.bias$")
    refuses(weights | {"extra": torch.ones(1)}, "unexpected extra$")
    refuses(without | {"extra": torch.ones(1)}, "missing fc.bias; unexpected extra$")
    refuses(weights | {"fc.bias": torch.ones(5)}, r"other shapes: fc.bias \(5,\) instead of \(10,\)$")
    refuses(weights | {"module.fc.bias": torch.ones(10)}, "holds 'fc.bias' twice")
    refuses({"fc.bias": torch.ones(10)}, r"missing conv1.weight, .* and \d+ more$")
    refuses(weights | {"epoch": 3}, "holds a int at 'epoch'")
    refuses(tmp_path / "none.pt", "no checkpoint file at .*none.pt$", FileNotFoundError)
    torch.save([1, 2], tmp_path / "list.pt")
    refuses(tmp_path / "list.pt", "holds a list")
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    refuses(tmp_path / "bad.pt", "is not a checkpoint that loads without running code")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 64)
    refuses(tmp_path / "bad.safetensors", "is not a safetensors file that can be read")


def under(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def other_weights():
    return {k: v + 1 if v.is_floating_point() else v for k, v in wideresnet(10, 1).state_dict().items()}


ZERO, ONE = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1), torch.tensor([0.2471, 0.2435, 0.2616]).view(3, 1, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda w: {"n_averaged": torch.tensor(7), **under("module.", w)},
        lambda w: {"net": under("module.basic_net.", w), "acc": 81.2},
        lambda w: {"0.mean": ZERO, **under("1.", w)},
        lambda w: {"mu": ZERO, "sigma": ONE, **w},
        lambda w: {"ema_state_dict": w},
        lambda w: {"model": {"state_dict": w}, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}},
        lambda w: {"model": {**under("module.model.", w), **under("module.attacker.model.", w)}, "epoch": 3},
        lambda w: {"state_dict": under("net.", w) | {"net.normalize.mean": torch.tensor(0.0)}},
        lambda w: {"a": {"b": {"c": under("anything.at.all.", w)}}},
        lambda w: {"state_dict": w, "copy": dict(w)},
    ],
    ids=["AveragedModel", "AttackPGD", "Sequential", "mu", "ema", "nested", "robustness", "inside", "deep", "twice"],
)
def test_load_weights_of_published_layouts(weights, make, tmp_path):
    torch.save(make(weights), tmp_path / "model.pt")
    assert same(load_weights(wideresnet(10, 1), tmp_path / "model.pt"), weights)


@pytest.mark.parametrize(("mean", "std"), [("normalizer.new_mean", "normalizer.new_std"), ("0.mean", "0.std")])
def test_load_weights_of_a_network_that_normalises(weights, mean, std):
    checkpoint = {mean: MEAN, std: STD, **under("1.", weights)}
    own = {"mean": MEAN.flatten().tolist(), "std": STD.flatten().tolist()}
    assert same(load_weights(wideresnet(10, 1, **own), checkpoint), weights)
    for plain in (wideresnet(10, 1), wideresnet(10, 1, mean=own["mean"], std=own["mean"])):
        with pytest.raises(
            ValueError, match=r"normalises its images, .* \(0\.\d{4}, .*build it with that mean and std"
        ):
            load_weights(plain, checkpoint)
        assert not same(plain, weights)


def test_load_weights_where_two_sets_fit(weights):
    other = other_weights()
    for name in ("state_dict", "model", "net"):
        with pytest.warns(UserWarning, match=f"two sets .* those in '{name}' are taken, those in 'ema' are not"):
            model = load_weights(wideresnet(10, 1), {"ema": other, name: weights})
        assert same(model, weights)
    message = "'conv1.weight' twice and not alike, under the prefixes 'online.' and 'teacher.'"
    with pytest.raises(ValueError, match=message):
        load_weights(wideresnet(10, 1), {**under("online.", weights), **under("teacher.", other)})


def with_objects(kind, weights):
    if kind == "Namespace":
        return {"state_dict": weights, "args": argparse.Namespace(lr=0.1)}, "argparse.Namespace"
    if kind == "numpy":
        return {"state_dict": weights, "best": np.float64(0.5)}, "numpy"
    if kind == "path":
        return {"state_dict": weights, "out": pathlib.PurePosixPath("runs")}, "PurePosixPath"
    return wideresnet(10, 1), "part_fast.models.wideresnet.WideResNet"


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("kind", ["Namespace", "numpy", "path", "model"])
def test_load_weights_names_the_objects_that_it_does_not_read(kind, new, weights, tmp_path):
    checkpoint, named = with_objects(kind, weights)
    path = tmp_path / "c.pt"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match="without running code") as caught:
        load_weights(wideresnet(10, 1), path)
    said = str(caught.value)
    assert named in said
    assert "\n" not in said
    assert "\x1b" not in said
    # What it says to do works.
    take = "torch.load('c.pt', weights_only=False)" + (".state_dict()" if kind == "model" else "['state_dict']")
    assert f"torch.save({take}, 'weights.pt')" in said
    torch.save(eval(take.replace("'c.pt'", "path")), tmp_path / "weights.pt")
    expected = checkpoint.state_dict() if kind == "model" else weights
    assert same(load_weights(wideresnet(10, 1), tmp_path / "weights.pt"), expected)


class _Touch:
    """Unpickled with pickle's freedom this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_load_weights_runs_no_code(tmp_path):
    torch.save({"state_dict": {}, "trap": _Touch(tmp_path / "ran")}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="without running code"):
        load_weights(resnet_small(), tmp_path / "trap.pt")
    assert not (tmp_path / "ran").exists()


# Export


NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def robustbench_resnet18_keys():
    keys = {"conv1.weight", "linear.weight", "linear.bias"} | {f"bn1.{k}" for k in NORM}
    for stage in range(1, 5):
        for block in range(2):
            name = f"layer{stage}.{block}"
            keys |= {f"{name}.{part}" for part in ("conv1.weight", "conv2.weight")}
            keys |= {f"{name}.{bn}.{k}" for bn in ("bn1", "bn2") for k in NORM}
        if stage > 1:
            keys |= {f"layer{stage}.0.shortcut.0.weight"} | {f"layer{stage}.0.shortcut.1.{k}" for k in NORM}
    return keys


def robustbench_preact_keys():
    """Of RobustBench's PreActResNet of PreActBlockV2, with bn_before_fc, written out."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = ["conv1.weight"]
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name = f"layer{stage}.{block}"
            keys += [f"{name}.bn1.{k}" for k in norm] + [f"{name}.conv1.weight"]
            keys += [f"{name}.bn2.{k}" for k in norm] + [f"{name}.conv2.weight"]
            keys += [f"{name}.shortcut.0.weight"] if stage > 1 and block == 0 else []
    return {*keys, *(f"bn.{k}" for k in norm), "linear.weight", "linear.bias"}


def robustbench_wideresnet_keys(blocks, width, sub_block1):
    keys = {"conv1.weight", "fc.weight", "fc.bias"} | {f"bn1.{k}" for k in NORM}
    for stage in ("block1", "block2", "block3", *(["sub_block1"] if sub_block1 else [])):
        for block in range(blocks):
            name = f"{stage}.layer.{block}"
            keys |= {f"{name}.{part}" for part in ("conv1.weight", "conv2.weight")}
            keys |= {f"{name}.{bn}.{k}" for bn in ("bn1", "bn2") for k in NORM}
        if width > 1 or stage in ("block2", "block3"):
            keys.add(f"{stage}.layer.0.convShortcut.weight")
    return keys


@pytest.mark.parametrize(
    ("name", "sub_block1", "keys"),
    [
        ("resnet18", False, robustbench_resnet18_keys()),
        ("preact-resnet18", False, robustbench_preact_keys()),
        ("wrn-10-2", False, robustbench_wideresnet_keys(1, 2, False)),
        ("wrn-16-1", True, robustbench_wideresnet_keys(2, 1, True)),
        ("wrn-10-2", True, robustbench_wideresnet_keys(1, 2, True)),
        ("resnet-small", False, None),
    ],
)
@pytest.mark.parametrize("file", ["model.safetensors", "model.pt", "model.pth"])
def test_export_and_back(tmp_path, name, sub_block1, keys, file):
    if file.endswith(".safetensors"):
        pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    # As after training: channels_last weights that require gradients, in training mode.
    model = randomize(build_model(name, 7)).to(memory_format=torch.channels_last)
    path = export_weights(model, str(tmp_path / file), sub_block1=sub_block1)
    assert path == tmp_path / file
    assert [f.name for f in tmp_path.iterdir()] == [file]
    if file.endswith(".safetensors"):
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, weights_only=True)
    assert keys is None or set(state) == keys
    for key, value in state.items():
        assert torch.equal(value, model.state_dict()[key.removeprefix("sub_")])
        assert value.is_contiguous()
        assert not value.requires_grad
    assert path.stat().st_size < 1.5 * sum(v.nbytes for v in state.values()) + 50_000  # each value once

    torch.manual_seed(1)
    again = load_weights(build_model(name, 7), path)
    assert same(again, model.state_dict())
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        # channels_last convolutions sum in another order
        torch.testing.assert_close(again.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def test_export_writes_whole_files_and_replaces_none_unasked(tmp_path, monkeypatch):
    model, path = randomize(resnet_small()), tmp_path / "model.pt"
    export_weights(model, path)
    before = path.read_bytes()
    other = randomize(resnet_small())
    with pytest.raises(FileExistsError, match=r"model.pt is there already: pass overwrite=True \(--overwrite\)"):
        export_weights(other, path)
    assert path.read_bytes() == before

    def breaks(state, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", breaks)
        with pytest.raises(OSError, match="disk full"):
            export_weights(other, path, overwrite=True)
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["model.pt"]
    export_weights(other, path, overwrite=True)
    assert same(load_weights(resnet_small(), path), other.state_dict())


def test_export_leaves_the_model_alone(tmp_path):
    model = randomize(wideresnet(10, 1)).to(memory_format=torch.channels_last)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export_weights(model, tmp_path / "model.pt", sub_block1=True)
    assert list(model.state_dict()) == list(before)
    assert same(model, before)
    assert model.training
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_export_of_a_normalised_model(tmp_path):
    model = resnet_small(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    for network in (preact_resnet18(activation="silu"), wideresnet(10, 1, activation="silu")):
        with pytest.raises(ValueError, match=r"^format robustbench takes a model with ReLU"):
            export_weights(network, tmp_path / "silu.pt")
    with pytest.raises(ValueError, match=r"^format robustbench takes a model without mean and std"):
        export_weights(model, tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())
    pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    again = resnet_small(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    load_weights(again, export_weights(model, tmp_path / "model.safetensors"))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("file", "options", "message", "error"),
    [
        ("m.onnx", {}, "path takes a name that ends in one of .safetensors, .pt, .pth, got ", ValueError),
        ("m.pt", {"format": "onnx"}, "format takes one of safetensors, robustbench, got 'onnx'", ValueError),
        (
            "m.pt",
            {"format": "safetensors"},
            "path takes a name that ends in .safetensors for safetensors, got",
            ValueError,
        ),
        ("m.safetensors", {"format": "robustbench"}, "ends in .pt or .pth for robustbench, got ", ValueError),
        ("m.pt", {"sub_block1": True}, "sub_block1 takes a WideResNet, got ResNet, which has no block1", ValueError),
        ("none/m.pt", {}, "no folder at .*none to write m.pt in", FileNotFoundError),
        (
            "m.pt",
            {"model": torch.nn.Linear(2, 2)},
            "model takes a ResNet, PreActResNet or WideResNet .*, got Linear",
            TypeError,
        ),
    ],
)
def test_export_refuses_in_one_line(tmp_path, file, options, message, error):
    with pytest.raises(error, match=message) as caught:
        export_weights(**({"model": resnet_small(), "path": tmp_path / file} | options))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
