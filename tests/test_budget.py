"""CamBudget: golden maps, no trace left behind, one forward and the tail's backward, any target layer, errors."""

import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from golden_attack import EXPECTED, Failing, Net, assert_untouched, golden_net, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint

import part_fast
from part_fast import AttackModel, CamBudget
from part_fast.budgets.controls import CONTROLS
from part_fast.models.resnet import resnet18, resnet_small
from part_fast.models.wideresnet import wideresnet

X, Y = EXPECTED["x"], EXPECTED["y"]


def plain_gradcam(model, layer, x, target=None):
    """Written apart: hooks, whole backward, one image at a time."""
    maps = []
    for i in range(len(x)):
        kept = {}
        hook = layer.register_forward_hook(lambda m, a, out, kept=kept: kept.update(out=out))
        logits = model(x[i : i + 1])
        hook.remove()
        chosen = logits.argmax(1) if target is None else target[i : i + 1]
        (gradient,) = torch.autograd.grad(logits[0, chosen[0]], kept["out"])
        maps.append((gradient.mean((2, 3), keepdim=True) * kept["out"]).sum(1).relu().detach())
    return torch.cat(maps)


def test_golden_map():
    budget = CamBudget(golden_net(), 8 / 255, 7 / 255, rule="released", target_layer="relu2")
    assert torch.equal(budget(X), EXPECTED["eps"])


def test_golden_cam_of_the_predicted_class():
    net = golden_net()
    cam = plain_gradcam(net, net.relu2, X)
    low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
    # Both are float32 sums of 12 channels in another order.
    torch.testing.assert_close((cam - low) / (high - low), EXPECTED["cam"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", [None, Y])
@pytest.mark.parametrize("rule", ["soft", "quantile:0.3"])
def test_equals_one_image_at_a_time(rule, target):
    net = golden_net()
    cam = plain_gradcam(net, net.relu2, X, target)
    expected = part_fast.epsilon_map(cam, (16, 16), 0.1, 0.02, rule)
    got = CamBudget(net, 0.1, 0.02, rule=rule, target_layer=net.relu2)(X, target)
    # soft: rounding of the CAM only; quantile: a pixel at the limit may change places with its neighbour.
    assert ((got - expected).abs() > 1e-5).float().mean() <= (0 if rule == "soft" else 0.01)
    assert (got > 0.02).flatten(1).any(1).all()


@pytest.mark.parametrize("method", ["gradcam", "xgradcam", "layercam", "hirescam"])
def test_methods_on_resnet_match_the_formula(method):
    torch.manual_seed(0)
    model = resnet18().eval()
    x = torch.rand(2, 3, 32, 32)
    kept = {}
    hook = model.layer4.register_forward_hook(lambda m, a, out: kept.update(out=out))
    logits = model(x)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits.amax(1).sum(), kept["out"])
    expected = part_fast.cam(kept["out"], gradient.contiguous(), method)
    expected = part_fast.epsilon_map(expected, (32, 32), 0.1, 0.0, "soft")
    got = CamBudget(model, 0.1, 0.0, method=method, rule="soft")(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)  # min-max divides rounding by the map's range


@pytest.mark.parametrize("name", ["GradCAM", "GradCAMPlusPlus", "EigenCAM", "LayerCAM", "ScoreCAM"])
def test_grad_cam_classes_give_their_own_output(name):
    grad_cam = pytest.importorskip("pytorch_grad_cam", reason="the grad-cam package is not installed")
    net = Net().train()
    net(X).sum().backward()
    before = snapshot(net)
    got = CamBudget(net, 0.1, 0.0, method=getattr(grad_cam, name), rule="soft", target_layer="relu2")(X)
    assert_untouched(before, net)
    with getattr(grad_cam, name)(model=net.eval(), target_layers=[net.relu2]) as explain:
        own = torch.from_numpy(
            explain(input_tensor=X, targets=None)
        )  # explains the prediction by default, as CamBudget does
    torch.testing.assert_close(got, part_fast.epsilon_map(own, (16, 16), 0.1, 0.0, "soft"))


def test_native_gradcam_ranks_as_the_grad_cam_package():
    grad_cam = pytest.importorskip("pytorch_grad_cam", reason="the grad-cam package is not installed")
    net = golden_net()
    native = CamBudget(net, 1.0, 0.0, rule="soft", target_layer="relu2")(X)
    theirs = CamBudget(net, 1.0, 0.0, method=grad_cam.GradCAM, rule="soft", target_layer="relu2")(X)
    # The same low-resolution map; the package enlarges it linearly, PART bicubically.
    for ours, other in zip(native.flatten(1), theirs.flatten(1), strict=True):
        assert torch.corrcoef(torch.stack([ours, other]))[0, 1] > 0.95


def test_callable_method():
    seen = {}

    def explain(model, x, target):
        seen.update(training=model.training, target=target)
        model(x.requires_grad_()).sum().backward()
        return x.grad.abs().sum(1)

    net = Net().train()
    before = snapshot(net)
    got = CamBudget(net, 0.1, 0.0, method=explain, rule="soft", target_layer="relu2")(X, Y)
    assert_untouched(before, net)
    assert not seen["training"]
    assert torch.equal(seen["target"], Y)
    x = X.clone().requires_grad_()
    net.eval()(x).sum().backward()
    torch.testing.assert_close(got, part_fast.epsilon_map(x.grad.abs().sum(1), (16, 16), 0.1, 0.0, "soft"))


def test_callable_that_gives_no_map():
    with pytest.raises(ValueError, match=r"method must give maps \(8,h,w\), got \(8, 10\)"):
        CamBudget(Net(), method=lambda model, x, target: model(x), target_layer="relu2")(X)


def test_other_class_other_map():
    budget = CamBudget(golden_net(), rule="soft", target_layer="relu2")
    assert not torch.equal(budget(X, Y), budget(X, (Y + 1) % 10))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grads", [True, False])
def test_leaves_no_trace(training, grads):
    net = Net().train(training)
    net.bn1.eval()  # a module that is frozen must stay so
    if grads:
        net(X).sum().backward()
    before = snapshot(net)
    CamBudget(net, target_layer="relu2")(X)
    assert_untouched(before, net)


@pytest.mark.parametrize("where", ["head", "tail"])
def test_leaves_no_trace_after_an_exception(where):
    net = Net().train()
    budget = CamBudget(net, target_layer="relu2")
    if where == "head":
        net.relu1 = Failing()
    else:
        net.dropout = Failing()
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="planted failure"):
        budget(X)
    assert_untouched(before, net)
    assert torch.is_grad_enabled()


def test_random_generator_is_as_before_even_if_the_model_draws():
    class Noisy(Net):
        def forward(self, x):
            return super().forward(x + 0.01 * torch.randn_like(x))

    net = Noisy()
    before = snapshot(net)
    CamBudget(net, target_layer="relu2")(X)
    assert_untouched(before, net)


def test_one_forward_and_no_graph_before_the_target_layer():
    net = golden_net()
    calls, graphs = [], []
    net.conv1.register_forward_hook(lambda m, a, out: calls.append(out.requires_grad))
    net.conv2.register_forward_hook(lambda m, a, out: graphs.append(out.requires_grad))
    net.fc.register_forward_hook(lambda m, a, out: graphs.append(out.requires_grad))
    eps = CamBudget(net, target_layer="relu2")(X)
    assert calls == [False]
    assert graphs == [False, True]
    assert not eps.requires_grad


def test_works_within_no_grad_and_inference_mode():
    budget = CamBudget(golden_net(), rule="released", target_layer="relu2")
    with torch.no_grad():
        assert torch.equal(budget(X), EXPECTED["eps"])
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert torch.equal(budget(X + 0), EXPECTED["eps"])


def test_in_place_relu_after_the_target_layer():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(body, nn.Linear(4, 10))
    eps = CamBudget(model, 0.1, 0.0, rule="soft", target_layer="0.0")(X)
    out = body[0](X)
    logits = model[1](body[1:](out.clone()))
    (gradient,) = torch.autograd.grad(logits.amax(1).sum(), out)
    cam = part_fast.cam(out, gradient.contiguous())
    torch.testing.assert_close(eps, part_fast.epsilon_map(cam, (16, 16), 0.1, 0.0, "soft"), atol=1e-5, rtol=1e-4)


def test_autocast_weights_are_not_cached_without_their_graph():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    with torch.autocast("cpu", torch.bfloat16):
        CamBudget(model, target_layer="1")(X)
        model(X).float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_channels_last_and_bfloat16():
    net = golden_net().to(memory_format=torch.channels_last)
    budget = CamBudget(net, rule="released", target_layer="relu2")
    got = budget(X.to(memory_format=torch.channels_last))
    # Another convolution algorithm rounds otherwise; one colour step of a pixel may move.
    assert (got != EXPECTED["eps"]).float().mean() < 0.005
    with torch.autocast("cpu", torch.bfloat16):
        assert budget(X).dtype == torch.float32


@pytest.mark.parametrize("make", [resnet18, lambda: wideresnet(10, 1)])
def test_default_target_layer_under_any_prefix(make):
    model = make()
    layer = model.layer4 if hasattr(model, "layer4") else model.block3
    assert CamBudget(model).target_layer is layer
    assert CamBudget(nn.Sequential(nn.Identity(), nn.ModuleDict({"net": model}))).target_layer is layer


@pytest.mark.parametrize(("rule", "channels"), [("zscore", 1), ("released", 3), ("soft", 1)])
def test_empty_batch(rule, channels):
    eps = CamBudget(golden_net(), rule=rule, target_layer="relu2")(X[:0])
    assert eps.shape == (0, channels, 16, 16)
    assert eps.dtype == torch.float32


def test_with_logits_gives_the_clean_eval_logits():
    net = golden_net()
    expected = net(X).detach()
    _, logits = CamBudget(net.train(), target_layer="relu2").with_logits(X)
    assert torch.equal(logits, expected)


class TwoHeads(Net):
    def forward(self, x):
        super().forward(x)
        return self.fc(torch.zeros(len(x), 12))


Output = namedtuple("Output", "logits loss")  # what Hugging Face's networks give looks like it


class Gives(nn.Module):
    """A network whose output is no tensor."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.kind = Net(), kind

    def forward(self, x):
        logits = self.net(x)
        return Output(logits, None) if self.kind is Output else self.kind((logits, None))


class Pairs(Net):
    def __init__(self):
        super().__init__()
        self.pair = Gives(tuple)
        self.pair.net = self.relu2

    def forward(self, x):
        x = self.conv2(self.conv1(x))
        return self.fc(self.pair(x)[0].mean((2, 3)))


class Checkpointed(Net):
    """Its head is run again in the backward."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        x = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        return checkpoint(lambda x: self.fc(x.mean((2, 3))), x, use_reentrant=self.reentrant)


class FrozenEnd(Net):
    def forward(self, x):
        x = self.conv2(self.conv1(x))
        with torch.no_grad():
            x = self.relu2(x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CamBudget(lambda x: x), "model must be a torch.nn.Module, got function"),
        (lambda: CamBudget(Net()), "target_layer must be given .*candidates: conv1, conv2"),
        (lambda: CamBudget(Net(), target_layer="conv9"), "target_layer must be one of conv1, conv2, got 'conv9'"),
        (lambda: CamBudget(Net(), target_layer=nn.ReLU()), "target_layer must be a module of the model"),
        (lambda: CamBudget(Net(), target_layer=3), "target_layer must be a module or its name, got int"),
        (lambda: CamBudget(Net(), target_layer="conv1", method="cam"), "method must be one of gradcam, .*got 'cam'"),
        (lambda: CamBudget(Net(), target_layer="conv1", rule="z"), "rule must be one of zscore, released, .*got 'z'"),
        (lambda: CamBudget(Net(), 0.1, 0.2, target_layer="conv1"), "eps_low must be <= eps"),
        (lambda: CamBudget(Net(), -0.1, target_layer="conv1"), "eps must be finite and >= 0, got -0.1"),
        (lambda: CamBudget(Net(), float("nan"), target_layer="conv1"), "eps must be finite and >= 0, got nan"),
        (
            lambda: CamBudget(Net(), target_layer="relu2", rule="released")(X[:, :1] + 0),
            "rule released must have .* got 1",
        ),
        (
            lambda: CamBudget(Net(), target_layer="relu2", rule="released").packed(torch.rand(2, 4, 8, 8)),
            "released.*got 4",
        ),
        (
            lambda: CamBudget(Net(), target_layer="relu2", control="uniform").packed(X),
            "control must not be uniform in a",
        ),
        (
            lambda: CamBudget(Net(), method=Net, target_layer="relu2"),
            "method must be .*, got the class golden_attack.Net",
        ),
        (
            lambda: CamBudget(Gives(tuple), target_layer="net.relu2")(X),
            r"model must give logits .*, got tuple: wrap it",
        ),
        (
            lambda: CamBudget(Gives(Output), target_layer="net.relu2")(X),
            r"model must give logits .*, got Output: wrap it",
        ),
        (
            lambda: CamBudget(Gives(list), method=lambda m, x, t: x[:, 0])(X),
            "model must give logits .*, got list: wrap",
        ),
        (lambda: CamBudget(Pairs(), target_layer="pair")(X), r"target_layer must give a tensor \(N,K,h,w\), got tuple"),
        (
            lambda: CamBudget(FrozenEnd(), target_layer="relu2")(X),
            "target_layer must lead to the logits.*under its own no_",
        ),
        (
            lambda: CamBudget(Checkpointed(True), target_layer="relu2")(X),
            "model must checkpoint with use_reentrant=False",
        ),
        (lambda: CamBudget(torch.jit.script(Net()), target_layer="relu2"), "model must not be TorchScript"),
        (lambda: CamBudget(Net(), target_layer="fc")(X), r"target_layer must give a tensor \(N,K,h,w\), got"),
        (lambda: CamBudget(TwoHeads(), target_layer="relu2")(X), "target_layer must lead to the logits"),
        (lambda: CamBudget(Net(), target_layer="relu2")(X * 255), r"x must be in \[0, 1\], got values from"),
        (lambda: CamBudget(Net(), target_layer="relu2")(X * float("nan")), r"x must be in \[0, 1\], got values"),
        (lambda: CamBudget(Net(), target_layer="relu2")(X[0]), r"x must have shape \(N,C,H,W\)"),
        (lambda: CamBudget(Net(), target_layer="relu2")((X * 255).byte()), "x must be float32, .*got torch.uint8"),
        (lambda: CamBudget(Net(), target_layer="relu2")(X, Y[:3]), r"target must have shape \(8,\)"),
        (lambda: CamBudget(Net(), target_layer="relu2")(X, Y.float()), "target must be an int64 tensor"),
        (lambda: CamBudget(Net(), target_layer="relu2")(X, Y + 10), r"target must be class indices in \[0, 10\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_errors(make, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("control", [control for control in CONTROLS if control != "uniform"])
@pytest.mark.parametrize("rule", ["zscore", "released", "quantile:0.3"])
def test_packed_is_what_a_call_gives(control, rule):
    budget = CamBudget(golden_net(), 0.3, 0.1, rule=rule, control=control, target_layer="relu2")
    torch.manual_seed(0)
    expected = budget(X)
    torch.manual_seed(0)
    # "inverted" subtracts, which rounds once.
    torch.testing.assert_close(budget.packed(X).dense(), expected, atol=1e-7, rtol=0)
    assert len(budget.packed(X[:0])) == 0


def attacked_and_plain():
    torch.manual_seed(0)
    model = resnet_small().eval()
    return AttackModel(model), model


@pytest.mark.parametrize("name", ["layer4", "layer3", "layer2.0.bn1"])
def test_attack_model_takes_its_models_names_and_modules(name):
    fast, model = attacked_and_plain()
    expected = CamBudget(model, rule="soft", target_layer=name)(X)
    for layer in (name, model.get_submodule(name), f"module.{name}", fast.module.get_submodule(name)):
        got = CamBudget(fast, rule="soft", target_layer=layer)(X)
        # eps is a gray level of 8 to 7; what the copy rounds otherwise is a thousandth of that.
        torch.testing.assert_close(got, expected, atol=4e-6, rtol=0)
    with pytest.raises(ValueError, match="target_layer must be one of conv1, layer1, layer2, layer3, layer4, got 'x'"):
        CamBudget(fast, target_layer="x")
    with pytest.raises(ValueError, match="target_layer must be a module of the model, got another Conv2d"):
        CamBudget(fast, target_layer=nn.Conv2d(3, 3, 1))


def test_a_convolution_that_the_attack_model_has_folded_is_refused():
    fast, model = attacked_and_plain()
    for layer in ("layer2.0.conv1", model.layer2[0].conv1):
        with pytest.raises(ValueError, match=r"target_layer must not be .*'layer2.0.conv1'.*'layer2.0.bn1'"):
            CamBudget(fast, target_layer=layer)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, AttackModel, lambda m: AttackModel(AttackModel(m))])
def test_wrapped_models_give_the_models_own_maps(wrap):
    _, model = attacked_and_plain()
    expected = CamBudget(model, rule="soft")(X)
    for layer in (None, "layer4"):
        got = CamBudget(wrap(model), rule="soft", target_layer=layer)(X)
        torch.testing.assert_close(got, expected, atol=4e-6, rtol=0)


@pytest.mark.parametrize("name", ["GradCAM", "EigenCAM"])
def test_grad_cam_classes_explain_an_attack_models_model(name):
    kind = getattr(pytest.importorskip("pytorch_grad_cam", reason="the grad-cam package is not installed"), name)
    fast, model = attacked_and_plain()
    before = snapshot(model.train())
    got = CamBudget(fast, method=kind, rule="soft")(X)
    assert_untouched(before, model)
    assert torch.equal(got, CamBudget(model, method=kind, rule="soft")(X))


@pytest.mark.parametrize("name", ["GradCAM", "EigenCAM"])
@pytest.mark.parametrize("wrap", [nn.Sequential, AttackModel, nn.DataParallel], ids=["plain", "AttackModel", "wrapped"])
def test_grad_cam_objects_explain_their_own_layers(name, wrap):
    kind = getattr(pytest.importorskip("pytorch_grad_cam", reason="the grad-cam package is not installed"), name)
    net = golden_net()
    expected = CamBudget(net, method=kind, rule="soft", target_layer="relu2")(X)
    model = net if wrap is nn.Sequential else wrap(net)
    with kind(model=net, target_layers=[net.relu2]) as explain:
        net.train()
        before = snapshot(net)
        got = CamBudget(model, method=explain, rule="soft")(X)
        assert_untouched(before, net)
    # The copy's logits choose the same classes; the maps are the source's.
    assert torch.equal(got, expected)


def torchcam(name):
    return getattr(pytest.importorskip("torchcam.methods", reason="torchcam is not installed"), name)


@pytest.mark.parametrize("name", ["GradCAM", "LayerCAM", "XGradCAM", "ScoreCAM"])
@pytest.mark.parametrize("attacked", [False, True], ids=["plain", "AttackModel"])
def test_torchcam_gives_its_own_output_by_class_and_by_object(name, attacked):
    kind = torchcam(name)
    net = golden_net()
    with kind(net, "relu2") as extractor:
        logits = net(X)
        own = torch.cat([extractor([c], net(X[i : i + 1]))[0] for i, c in enumerate(logits.argmax(1).tolist())])
    expected = part_fast.epsilon_map(own, (16, 16), 0.1, 0.0, "soft")
    net.train()
    before = snapshot(net)
    model = AttackModel(net) if attacked else net
    by_class = CamBudget(model, 0.1, 0.0, method=kind, rule="soft", target_layer="relu2")(X)
    assert_untouched(before, net)
    with kind(net, "relu2") as extractor:
        by_object = CamBudget(model, 0.1, 0.0, method=extractor, rule="soft")(X)
    # One image at a time, and in a batch.
    torch.testing.assert_close(by_class, expected, atol=1e-5, rtol=0)
    assert torch.equal(by_class, by_object)


def test_torchcam_and_the_native_layercam_agree():
    net = golden_net()
    theirs = CamBudget(net, 1.0, 0.0, method=torchcam("LayerCAM"), rule="soft", target_layer="relu2")(X)
    ours = CamBudget(net, 1.0, 0.0, method="layercam", rule="soft", target_layer="relu2")(X)
    # torchcam divides by the maximum plus 1e-8, and adds channels in another order.
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def test_torchcam_is_given_maps_whose_channels_are_last():
    kind, model = torchcam("LayerCAM"), tiny_swin()
    x = torch.rand(2, 3, 16, 16)
    theirs = CamBudget(model, 1.0, 0.0, method=kind, rule="soft", target_layer="features.3")(x)
    ours = CamBudget(model, 1.0, 0.0, method="layercam", rule="soft", target_layer="features.3")(x)
    # As above; min-max divides rounding by the map's range.
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    assert ours.std() > 0.1


def test_objects_of_another_model_or_beside_a_layer_are_refused():
    grad_cam = pytest.importorskip("pytorch_grad_cam", reason="the grad-cam package is not installed")
    net, other = golden_net(), golden_net()
    with grad_cam.GradCAM(model=net, target_layers=[net.relu2]) as explain:
        with pytest.raises(ValueError, match=r"method must explain the budget's model, got a GradCAM of another Net$"):
            CamBudget(other, method=explain)(X)
        with pytest.raises(ValueError, match=r"target_layer must be None with an object as method, .* a GradCAM"):
            CamBudget(net, method=explain, target_layer="relu2")(X)


def tiny_swin(embed_dim=24):
    models_of_torchvision = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    torch.manual_seed(0)
    return models_of_torchvision.SwinTransformer([2, 2], embed_dim, [1, 1], [1, 2], [4, 4], num_classes=10).eval()


@pytest.mark.parametrize("name", ["features.1", "features.3"])
@pytest.mark.parametrize("size", [(16, 16), (32, 16)])
def test_channels_last_maps_of_swin(name, size):
    model = tiny_swin()
    x = torch.rand(2, 3, *size)
    layer = model.get_submodule(name)
    kept = {}
    hook = layer.register_forward_hook(lambda m, a, out: kept.update(out=out))
    logits = model(x)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits.amax(1).sum(), kept["out"])
    cam = (kept["out"] * gradient.mean((1, 2), keepdim=True)).sum(3).relu()  # (N,h,w), by the last dimension
    expected = part_fast.epsilon_map(cam.detach(), size, 0.1, 0.0, "soft")
    got = CamBudget(model, 0.1, 0.0, rule="soft", target_layer=name)(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_a_map_that_can_be_read_either_way():
    x = torch.rand(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"plainly \(N,K,h,w\), got \(N,8,8,8\), .*LayerNorm of 8"):
        CamBudget(tiny_swin(embed_dim=8), target_layer="features.1")(x)
    # A convolutional network with as many channels as rows and columns says which by having no LayerNorm.
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    expected = part_fast.epsilon_map(plain_gradcam(net, net[1], x), (16, 16), 0.1, 0.0, "soft")
    got = CamBudget(net, 0.1, 0.0, rule="soft", target_layer="1")(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("channels", [8, 16])
def test_strides_that_differ_are_no_channels_last(channels):
    net = nn.Sequential(
        nn.Conv2d(3, channels, 3, (1, 2), 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)
    )
    x = torch.rand(2, 3, 16, 16)  # the map is 16x8, with as many channels as rows
    expected = part_fast.epsilon_map(plain_gradcam(net, net[1], x), (16, 16), 0.1, 0.0, "soft")
    got = CamBudget(net, 0.1, 0.0, rule="soft", target_layer="1")(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("classes", [8, 9])
def test_a_convolution_whose_width_is_that_of_a_linear_layer_is_no_channels_last(classes):
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, (2, 4), 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes)
    )
    x = torch.rand(2, 1, 32, 32)  # as of spectrograms: the map is 16x8, with 16 channels
    expected = part_fast.epsilon_map(plain_gradcam(net, net[0], x), (32, 32), 0.1, 0.0, "soft")
    got = CamBudget(net, 0.1, 0.0, rule="soft", target_layer="0")(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_candidates_of_a_transformer_and_a_callable_needs_none():
    vision = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    vit = vision.VisionTransformer(16, 4, 1, 2, 8, 16, num_classes=10)
    with pytest.raises(ValueError, match=r"candidates: encoder.*layer_0\.ln_1 \(tokens\), .*callable") as error:
        CamBudget(vit)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"candidates: .*, or a layer whose output is \(N,h,w,K\), as the stages"):
        CamBudget(tiny_swin())
    with pytest.raises(ValueError, match="none, there is no convolution; give method=callable"):
        CamBudget(nn.Sequential(nn.Flatten(), nn.Linear(768, 10)))
    maps = torch.rand(8, 4, 4)
    budget = CamBudget(vit, method=lambda model, x, target: maps)
    assert torch.equal(budget(X), part_fast.epsilon_map(maps, (16, 16), 8 / 255, 7 / 255))


@pytest.mark.parametrize("prefix", ["", "0.net."])
def test_candidates_are_the_parts_within_the_wrappers(prefix):
    vision = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    with torch.device("meta"):
        model = vision.mobilenet_v2(width_mult=0.1)
    wrapped = nn.Sequential(nn.ModuleDict({"net": model})) if prefix else model
    named = ", ".join(f"{prefix}features.{i}" for i in range(7, 19))
    with pytest.raises(ValueError, match=f"candidates: {named}$"):
        CamBudget(wrapped)


def test_eight_threads_share_a_budget():
    net = golden_net().train()
    budget = CamBudget(net, rule="soft", target_layer="relu2")
    expected = [budget(X[i : i + 1]) for i in range(8)]

    def ask(i):
        return [budget(X[i : i + 1]) for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        for i, got in enumerate(pool.map(ask, range(8))):
            assert all(torch.equal(one, expected[i]) for one in got)
    assert net.training
    assert net.bn1.training


def test_another_threads_forward_is_left_alone():
    net = golden_net()
    seen = []

    def forward_elsewhere(module, args):
        handle.remove()
        thread = threading.Thread(target=lambda: seen.append(net(X.clone().requires_grad_())))
        thread.start()
        thread.join()

    handle = net.relu1.register_forward_pre_hook(forward_elsewhere)
    CamBudget(net, target_layer="relu2")(X)
    x = X.clone().requires_grad_()
    assert torch.equal(seen[0], net(x))
    nodes, names = [seen[0].grad_fn], set()
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [before for before, _ in node.next_functions if before is not None]
    assert "AccumulateGrad" in names
    assert sum("Convolution" in name for name in names) >= 1  # its graph goes on beyond the target layer


def test_checkpoints_that_are_not_reentrant():
    net = Checkpointed(False).eval()
    expected = part_fast.epsilon_map(plain_gradcam(net, net.relu2, X), (16, 16), 0.1, 0.0, "soft")
    got = CamBudget(net, 0.1, 0.0, rule="soft", target_layer="relu2")(X)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_layer_that_is_not_run():
    net = Net()
    net.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="target_layer must be run by the model's forward"):
        CamBudget(net, target_layer="spare")(X)


@pytest.mark.parametrize("named", [False, True])
def test_a_copy_that_is_made_anew_is_explained_too(named):
    """After model.double() the AttackModel has other modules, and the layer is found among them."""
    torch.manual_seed(0)
    model = resnet_small().eval()
    budget = CamBudget(AttackModel(model), target_layer="layer3" if named else None)
    x = torch.rand(2, 3, 16, 16)
    budget(x)
    model.double()
    expected = CamBudget(model, target_layer="layer3" if named else None)(x.double())
    assert torch.equal(budget(x.double()), expected)
