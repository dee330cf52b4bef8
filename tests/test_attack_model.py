"""Tests of part_fast.attack_model: the same attacks as on the model, and no trace on it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from part_fast import AttackModel, CamBudget, PackedEpsilon, mart_loss, mma, pgd, trades_loss
from part_fast.attack_model.cpu import onednn
from part_fast.attack_model.cpu.packed_conv import PackedConv2d
from part_fast.attack_model.graph import Graphs
from part_fast.models.catalogue import build_model

EPS = 8 / 255


def trained(name="resnet-small", classes=10):
    """A model whose BatchNorms have statistics and weights that matter."""
    torch.manual_seed(0)
    model = build_model(name, classes)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model


def batch(n=4, side=16):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, side, side, generator=generator), torch.arange(n) % 10


def input_gradient(model, x, y):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)[0]


# All 20 convolutions of ResNet-18 have a BatchNorm after them; in a WRN the stem and the first of each block alone.
@pytest.mark.parametrize(("name", "folded"), [("resnet18", 20), ("resnet-small", 11), ("wrn-10-2", 4)])
def test_logits_and_gradients_are_the_models(name, folded):
    model = trained(name).double()
    fast = AttackModel(model)
    assert fast.folded == folded
    x, y = batch()
    x = x.double()
    model.eval()
    # Folding reorders roundings, of float64 here.
    torch.testing.assert_close(fast(x), model(x), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(input_gradient(fast, x, y), input_gradient(model, x, y), rtol=1e-8, atol=1e-10)


def test_a_forward_takes_over_weights_changed_in_place():
    model = trained()
    fast, (x, y) = AttackModel(model), batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        model.train()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()  # weights and running statistics are others now
        model.eval()
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_nothing_is_computed_anew_while_weights_stay(monkeypatch):
    fast, (x, _) = AttackModel(trained()), batch()
    monkeypatch.setattr(fast, "refresh", lambda: pytest.fail("refreshed"))
    fast(x)
    fast(x)


def test_the_model_keeps_mode_weights_and_gradients():
    model = trained().train()
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    before = copy.deepcopy(model.state_dict())
    fast, (x, y) = AttackModel(model), batch()
    pgd(fast, x, y, EPS, steps=2)
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in fast.modules())
    assert not any(module.training for module in fast.train().modules())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in fast.parameters())
    assert torch.equal(model.conv1.weight.grad, torch.ones_like(model.conv1.weight))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in fast.parameters()}


@pytest.mark.parametrize("attack", [pgd, mma])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attacks_find_the_same(attack, layout):
    model = trained().double()
    x, y = batch()
    x = x.double().contiguous(memory_format=layout)
    found = attack(AttackModel(model), x, y, EPS, 2 / 255, 3, start="zero")
    expected = attack(model, x, y, EPS, 2 / 255, 3, start="zero")
    assert found.is_contiguous(memory_format=layout)
    # In float64 no sign of a gradient is within rounding of zero here.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", [trades_loss, mart_loss])
def test_losses_attack_it_in_the_models_place(loss):
    model = trained().double()
    x, y = batch()
    x = x.double()
    results = []
    for attacked in (None, AttackModel(model)):
        mine = copy.deepcopy(model)
        torch.manual_seed(3)
        value = loss(mine, x, y, None, perturb_steps=2, attack_model=attacked)
        value.backward()
        results.append((value.detach(), mine.conv1.weight.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def test_cam_budget_finds_the_target_layer_and_gives_the_same_map():
    model, (x, _) = trained(), batch(side=32)
    fast = AttackModel(model)
    torch.testing.assert_close(CamBudget(fast, rule="soft")(x), CamBudget(model, rule="soft")(x), rtol=1e-4, atol=1e-6)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        out = self.bn(self.conv(x))
        return out.mean((2, 3)) if out.sum() > 0 else -out.mean((2, 3))


class Twice(nn.Module):
    """The convolution's output is used before its BatchNorm too, and the second pair is called twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.again, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        out = self.conv(x)
        out = self.bn(out) + out
        return self.bn2(self.again(self.bn2(self.again(out)))).mean((2, 3))


@pytest.mark.filterwarnings("ignore:AttackModel folded none")
@pytest.mark.parametrize("kind", [Untraceable, Twice])
def test_what_cannot_be_folded_is_copied(kind):
    model, (x, y) = kind().eval(), batch()
    fast = AttackModel(model)
    assert fast.folded == 0
    torch.testing.assert_close(fast(x), model(x))
    torch.testing.assert_close(input_gradient(fast, x, y), input_gradient(model, x, y))


class Tied(nn.Module):
    """Two convolutions share a weight, and two BatchNorms theirs: folding one pair would change the other."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv3 = nn.Conv2d(3, 3, 3, padding=1)
        self.conv2.weight = self.conv1.weight
        self.bn2.weight = self.bn1.weight
        self.late = nn.BatchNorm2d(3)
        self.late.weight = self.bn1.weight

    def forward(self, x):
        x = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return self.late(self.conv3(x)).mean((2, 3))


class OtherwiseInTraining(nn.Module):
    """In train mode the convolution's output is normalised at once, in eval mode it is looked at first."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        out = self.conv(x)
        seen = self.bn(out)
        return (seen if self.training else seen + out.relu()).mean((2, 3))


@pytest.mark.filterwarnings("ignore:AttackModel folded none")
@pytest.mark.parametrize(("kind", "folded"), [(Tied, 1), (OtherwiseInTraining, 0)])
def test_only_what_is_used_once_is_folded(kind, folded):
    torch.manual_seed(0)
    model, (x, y) = kind(), batch()
    model(x)  # in train mode: statistics
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    fast = AttackModel(model)
    assert fast.folded == folded
    model.eval()
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    y = y % 3
    torch.testing.assert_close(input_gradient(fast, x, y), input_gradient(model, x, y), rtol=1e-4, atol=1e-5)


def test_parametrized_and_affineless_layers():
    torch.manual_seed(0)
    model = nn.Sequential(
        torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4, affine=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    model(torch.rand(8, 3, 8, 8))
    model.eval()
    fast, (x, _) = AttackModel(model), batch()
    assert fast.folded == 1
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_bf16_weights_are_cast_once_and_logits_are_float32():
    model = trained()
    fast, (x, y) = AttackModel(model, precision="bf16"), batch(8, 32)
    weights = [m.weight for m in fast.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weights) == 12
    # A packed convolution keeps float32, and packs in bfloat16 what oneDNN multiplies; all but that of the images.
    packed = [m for m in fast.modules() if isinstance(m, PackedConv2d)]
    dtypes = {m.dtype for m in packed if m.in_channels > 3}
    assert dtypes <= {torch.bfloat16 if onednn.works(torch.bfloat16) else torch.float32}
    assert sum(weight.dtype == torch.bfloat16 for weight in weights) == 12 - len(packed)
    logits = fast(x)
    assert logits.dtype == torch.float32
    # Eight bits of mantissa through eleven layers.
    torch.testing.assert_close(logits, model.eval()(x), rtol=0.1, atol=0.1)
    x_adv = pgd(fast, x, y, EPS, steps=2)
    assert x_adv.dtype == torch.float32
    assert (x_adv - x).abs().max() <= EPS + 1e-7


def test_compiled_serves_the_short_last_batch_without_compiling_anew():
    torch._dynamo.reset()
    model = trained()
    fast = AttackModel(model, compile=True)
    x, y = batch(6)
    expected = input_gradient(AttackModel(model), x, y)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            torch.testing.assert_close(input_gradient(fast, x, y), expected, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(input_gradient(fast, x[:2], y[:2]), expected[:2], rtol=1e-3, atol=1e-6)
            model.train(step % 2 == 0)  # whatever the model's mode
            CamBudget(fast)(x)  # has a hook in it, and is not compiled
        with torch.no_grad():
            model.linear.bias.add_(1)
        assert input_gradient(fast, x, y).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"precision": "int8"}, "precision must be one of fp32, bf16, fp16, got 'int8'"),
        ({"precision": "fp16"}, "precision fp16 needs a CUDA model, got one on cpu"),
        ({"cuda_graph": True}, "cuda_graph needs a CUDA model, got one on cpu"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        AttackModel(trained(), **arguments)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        AttackModel(lambda x: x)


def test_float16_gradients_are_scaled_and_keep_their_signs():
    from part_fast.attack_model.model import FP16_SCALE, _scaled

    logits = torch.randn(3, 4, requires_grad=True)
    _scaled(logits).sum().backward()
    assert torch.equal(logits.grad, torch.full((3, 4), FP16_SCALE))
    # What would be zero in float16 no longer is.
    assert torch.tensor(2e-8).half() == 0
    assert torch.tensor(2e-8 * FP16_SCALE).half() > 0


def eps_forms(n, side):
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(n, 1, side, side, generator=generator) < 0.3
    return {"float": EPS, "tensor": torch.where(mask, EPS, 7 / 255), "packed": PackedEpsilon.pack(mask, EPS, 7 / 255)}


class Recorder:
    """In a CUDA graph's place: keeps what it is to record and replays it by running it, as it lies in memory."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, run):
        self.recorded += 1
        run()  # a capture runs first, and overwrites the memory it holds

        def replay():
            self.replayed += 1
            run()

        return replay


@pytest.mark.parametrize("form", ["float", "tensor", "packed"])
@pytest.mark.parametrize("loss", ["ce", "kl", "margin"])
def test_graphed_steps_are_the_attack(form, loss):
    model, recorder = trained(), Recorder()
    fast = AttackModel(model)
    for n in (4, 4, 2):
        x, y = batch(n)
        x = x.flip(0) if n == 2 else x
        eps = eps_forms(n, 16)[form]
        fast.graphs = None
        expected = pgd(fast, x, y, eps, steps=3, start="zero", loss=loss)
        fast.graphs = graphs = getattr(fast, "kept", None) or Graphs(record=recorder)
        fast.kept = graphs
        assert torch.equal(pgd(fast, x, y, eps, steps=3, start="zero", loss=loss), expected)
        with torch.no_grad():
            model.linear.weight.mul_(1.1)  # another step of training: the graph reads the weights where they are
    # Twice the same shape is one recording; the smaller batch is run as it is.
    assert (recorder.recorded, recorder.replayed, len(graphs)) == (1, 2, 1)


def test_graphed_mma_and_another_alpha_are_recordings_of_their_own():
    fast, recorder, (x, y) = AttackModel(trained()), Recorder(), batch()
    fast.graphs = None
    expected = [mma(fast, x, y, EPS, alpha, 2, start="zero") for alpha in (2 / 255, 1 / 255)]
    fast.graphs = Graphs(record=recorder)
    for _ in range(2):
        for alpha, result in zip((2 / 255, 1 / 255), expected, strict=True):
            assert torch.equal(mma(fast, x, y, EPS, alpha, 2, start="zero"), result)
    assert (recorder.recorded, recorder.replayed) == (2, 4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.float64, "list"])
def test_images_that_the_model_refuses_are_refused(kind, precision):
    model, (x, _) = trained().eval(), batch()
    fast = AttackModel(model, precision=precision)
    given = x.tolist() if kind == "list" else (x * 255).to(kind)
    with pytest.raises((TypeError, RuntimeError)):
        model(given)
    with pytest.raises((TypeError, RuntimeError)) as refused:
        fast(given)
    if kind is not torch.float64:  # for which torch has its own words
        assert str(refused.value).startswith("x must be ")


def test_packed_convolutions_cast_between_float32_and_bfloat16_alone():
    conv = PackedConv2d(nn.Conv2d(4, 4, 3).requires_grad_(False))
    assert conv(torch.rand(1, 4, 8, 8).bfloat16()).dtype == torch.float32
    for dtype in (torch.float64, torch.float16, torch.uint8, torch.int64):
        with pytest.raises(RuntimeError, match="should be the same"):
            conv(torch.ones(1, 4, 8, 8, dtype=dtype))


@pytest.mark.filterwarnings("ignore:AttackModel folded none")
def test_compiled_fills_up_no_batch_whose_statistics_are_used():
    torch.manual_seed(0)
    norm, (x, _) = nn.BatchNorm2d(8, track_running_stats=False), batch(6)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    fast = AttackModel(model, compile=True)
    with torch.compiler.set_stance("force_eager"):  # what is filled up is decided before
        for n in (6, 2):
            leaf = x[:n].clone().requires_grad_()
            torch.testing.assert_close(fast(leaf), model(leaf), rtol=1e-4, atol=1e-5)
    norm = nn.InstanceNorm2d(8)  # of each image for itself
    assert AttackModel(nn.Sequential(nn.Conv2d(3, 8, 3), norm), compile=True).batch_sizes is not None
