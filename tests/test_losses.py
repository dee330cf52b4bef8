"""trades_loss and mart_loss: golden losses and gradients, the published functions, PART-T and PART-M, errors."""

import pytest
import torch
import torch.nn.functional as F
from conftest import STRIDED, strided
from golden_attack import EXPECTED, Net, golden_net
from torch import nn

from part_fast import AttackModel, CamBudget, PackedEpsilon, mart_loss, trades_loss
from part_fast.losses import mart_objective, trades_objective

X, Y, EPS = EXPECTED["x"], EXPECTED["y"], EXPECTED["eps"]


@pytest.mark.parametrize(
    ("objective", "name", "x_adv"), [(trades_objective, "trades", "pgd_kl"), (mart_objective, "mart", "pgd_ce")]
)
def test_golden_losses_and_gradients(objective, name, x_adv):
    net = golden_net().train()
    loss = objective(net(X), net(EXPECTED[x_adv]), Y, 6.0)
    loss.backward()
    torch.testing.assert_close(loss.detach()[None], EXPECTED[f"{name}.loss"], rtol=1e-5, atol=0)
    # Sums over 8 x 16 x 16 positions in float32, in another order than on the machine that made them.
    for layer in ("conv1", "fc"):
        expected = EXPECTED[f"{name}.grad.{layer}"]
        torch.testing.assert_close(getattr(net, layer).weight.grad, expected, rtol=1e-4, atol=1e-4)


def published_attack(model, x, y, eps, step_size, steps, loss):
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(model(x_adv)), x_adv)
        x_adv = torch.min(torch.max(x_adv.detach() + step_size * grad.sign(), x - eps), x + eps).clamp(0, 1)
    return x_adv


def published_trades(model, x, y, eps, step_size, steps, beta):
    model.eval()
    clean = model(x).softmax(1).detach()
    x_adv = published_attack(
        model, x, y, eps, step_size, steps, lambda z: F.kl_div(z.log_softmax(1), clean, reduction="sum")
    )
    model.train()
    natural = F.cross_entropy(model(x), y)
    robust = F.kl_div(model(x_adv).log_softmax(1), model(x).softmax(1), reduction="sum") / len(x)
    return natural + beta * robust


def published_mart(model, x, y, eps, step_size, steps, beta):
    model.eval()
    x_adv = published_attack(model, x, y, eps, step_size, steps, lambda z: F.cross_entropy(z, y))
    model.train()
    probs, probs_adv = model(x).softmax(1), model(x_adv).softmax(1)
    order = torch.argsort(probs_adv, dim=1)[:, -2:]
    wrong = torch.where(order[:, -1] == y, order[:, -2], order[:, -1])
    adv = F.nll_loss(probs_adv.log(), y) + F.nll_loss(torch.log(1.0001 - probs_adv + 1e-12), wrong)
    weight = 1.0000001 - probs.gather(1, y[:, None]).squeeze()
    robust = (F.kl_div(torch.log(probs_adv + 1e-12), probs, reduction="none").sum(1) * weight).sum() / len(x)
    return adv + beta * robust


@pytest.mark.parametrize(("ours", "published"), [(trades_loss, published_trades), (mart_loss, published_mart)])
@pytest.mark.parametrize("eps", [8 / 255, EPS], ids=["float", "map"])
def test_equals_the_published_function(ours, published, eps):
    results = []
    for function in (ours, published):
        torch.manual_seed(0)
        net = golden_net()
        arguments = (net, X, Y, eps, 2 / 255, 5, 6.0)
        if function is ours:
            arguments = (net, X, Y, None, 2 / 255, eps, 5, 6.0)
        loss = function(*arguments)
        loss.backward()
        results.append((loss.detach(), net.conv1.weight.grad, net.fc.weight.grad))
    for got, expected in zip(*results, strict=True):
        # A few signs of rounding-sized gradients turn in the attack; the loss moves by what 0.1% of the pixels do.
        torch.testing.assert_close(got, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("loss", [trades_loss, mart_loss])
def test_packed_and_dense_budgets_are_the_same(loss):
    packed = PackedEpsilon.pack(EPS > 7.5 / 255, 8 / 255, 7 / 255)
    values = []
    for eps in (packed, packed.dense()):
        torch.manual_seed(0)
        values.append(loss(golden_net(), X, Y, None, 2 / 255, eps, 3, 6.0).item())
    assert values[0] == values[1]


@pytest.mark.parametrize(("loss", "forwards"), [(trades_loss, 1 + 3 + 2), (mart_loss, 3 + 2)])
def test_number_of_forwards(loss, forwards):
    """PART-T costs no forward more than TRADES: its CAM comes from the attack's clean forward."""
    for budget in (None, "cam"):
        net, calls = golden_net(), []
        net.conv1.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        eps = CamBudget(net, target_layer="relu2") if budget else 8 / 255
        loss(net, X, Y, None, 2 / 255, eps, 3, 6.0)
        extra = 1 if budget and loss is mart_loss else 0
        assert len(calls) == forwards + extra


@pytest.mark.parametrize("loss", [trades_loss, mart_loss])
def test_cam_budget_is_the_map_it_gives(loss):
    values = []
    for use_map in (True, False):
        net = golden_net()
        budget = CamBudget(net, 0.1, 0.0, target_layer="relu2")
        eps = budget(X) if use_map else budget
        torch.manual_seed(0)
        values.append(loss(net, X, Y, None, 0.02, eps, 4, 6.0).item())
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize("loss", [trades_loss, mart_loss])
@pytest.mark.parametrize("attacked", ["model", "copy"])
def test_a_budget_of_another_network_gives_its_map_alone(loss, attacked):
    """The attack of TRADES moves away from the prediction of the network that is attacked."""
    torch.manual_seed(1)
    budget = CamBudget(Net().eval(), 0.1, 0.0, target_layer="relu2")
    values = []
    for eps in (budget(X), budget):
        net = golden_net()
        torch.manual_seed(0)
        copy = AttackModel(net) if attacked == "copy" else None
        values.append(loss(net, X, Y, None, 0.02, eps, 4, 6.0, attack_model=copy).item())
    assert values[0] == values[1]


@pytest.mark.parametrize("objective", [trades_objective, mart_objective])
@pytest.mark.parametrize("soft", [False, True])
def test_objectives_of_float64_are_computed_in_it(objective, soft):
    torch.manual_seed(0)
    logits, logits_adv = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = torch.rand(6, 5).softmax(1) if soft else torch.randint(0, 5, (6,))
    assert objective(logits, logits_adv, y, 6.0).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda one, other: objective(one, other, y, 6.0), (logits, logits_adv))


@pytest.mark.parametrize("loss", [trades_loss, mart_loss])
def test_modes_and_optimizer(loss):
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(X).sum().backward()
    net.eval()
    loss(net, X, Y, optimizer, perturb_steps=1).backward()
    assert all(module.training for module in net.modules())  # as the published functions leave it
    cleared = net.conv1.weight.grad.clone()
    net.bn1.eval()
    loss(net, X, Y, None, perturb_steps=1)
    assert not net.bn1.training  # frozen inside a model in train mode: stays frozen
    assert torch.equal(net.conv1.weight.grad, cleared)  # no optimizer, nothing cleared


@pytest.mark.parametrize("loss", [trades_loss, mart_loss])
def test_attack_does_not_move_batchnorm_statistics(loss):
    net = golden_net().train()
    loss(net, X, Y, None, perturb_steps=7)
    assert net.bn1.num_batches_tracked == EXPECTED["state.bn1.num_batches_tracked"] + 2  # clean and adversarial, once


@pytest.mark.parametrize(
    ("ours", "published", "step_size", "beta"),
    [(trades_loss, published_trades, 0.003, 1.0), (mart_loss, published_mart, 0.007, 6.0)],
)
def test_the_defaults_are_those_of_the_published_function(ours, published, step_size, beta):
    torch.manual_seed(0)
    expected = published(golden_net(), X, Y, 0.031, step_size, 10, beta)
    torch.manual_seed(0)
    # Sums in another order; another default moves the loss by percents.
    torch.testing.assert_close(ours(golden_net(), X, Y, None), expected, rtol=1e-5, atol=0)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    values = []
    for _ in range(25):
        loss = trades_loss(net, X, Y, optimizer, perturb_steps=2, beta=1.0)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert sum(values[-5:]) < 0.8 * sum(values[:5])


@pytest.mark.parametrize("loss", [trades_loss, mart_loss])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_natural": X * 255}, r"x_natural must be in \[0, 1\]"),
        ({"x_natural": X[:0], "y": Y[:0]}, "x_natural must hold at least one image"),
        ({"y": Y + 10}, r"y must be class indices in \[0, 10\)"),
        ({"y": Y[:2]}, r"y must have shape \(8,\)"),
        ({"epsilon": -1.0}, "eps must be finite and >= 0, got -1"),
        ({"epsilon": EPS - 1}, "eps must be finite and >= 0, got values"),
        ({"epsilon": "all"}, "eps must be a number, got str"),
        ({"beta": -1.0}, "beta must be finite and >= 0"),
        ({"step_size": "fast"}, "alpha must be a number"),
        ({"perturb_steps": 1.5}, "perturb_steps must be a whole number"),
        ({"distance": "l_2"}, "distance must be 'l_inf', got 'l_2'"),
        ({"optimizer": 0.1}, "optimizer must be a torch.optim.Optimizer or None, got float"),
        ({"model": lambda x: x}, "model must be a torch.nn.Module, got function"),
    ],
)
def test_errors(loss, change, message):
    arguments = {"model": golden_net(), "x_natural": X, "y": Y, "optimizer": None, "perturb_steps": 1} | change
    with pytest.raises((ValueError, TypeError), match=message) as error:
        loss(**arguments)
    assert "\n" not in str(error.value)


def test_loss_of_a_model_with_own_layers():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    loss = trades_loss(net, X, Y, None, epsilon=CamBudget(net, target_layer="1"), perturb_steps=1)
    loss.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


# ---- images of other ranges, strides and labels ----------------------------------------------------------------

both = pytest.mark.parametrize("loss", [trades_loss, mart_loss])
OTHER = (Y + 3) % 10
SOFT = 0.7 * F.one_hot(Y, 10) + 0.3 * F.one_hot(OTHER, 10)


class Normalised(nn.Module):
    def __init__(self, mean, std):
        super().__init__()
        self.net, self.mean, self.std = golden_net(), mean, std

    def forward(self, x):
        return self.net(x * self.std + self.mean)


@both
@pytest.mark.parametrize("mean", [0.5, torch.tensor([0.49, 0.48, 0.45]).view(3, 1, 1)], ids=["number", "per channel"])
def test_clip_for_images_of_another_range(loss, mean):
    std = 0.0625
    clip = ((0 - mean) / std, (1 - mean) / std)
    arguments = {"optimizer": None, "perturb_steps": 4, "beta": 6.0}
    seen = []
    net = Normalised(mean, std).eval()  # so that all of it is put in train mode
    net.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    torch.manual_seed(0)
    got = loss(net, (X - mean) / std, Y, step_size=0.02 / std, epsilon=0.05 / std, clip=clip, **arguments)
    x_adv = seen[-1]
    low, high = (torch.as_tensor(bound) for bound in clip)
    assert (x_adv >= low).all()
    assert (x_adv <= high).all()
    assert ((x_adv == low) | (x_adv == high)).any()
    torch.manual_seed(0)
    expected = loss(golden_net(), X, Y, step_size=0.02, epsilon=0.05, **arguments)
    # The start is x + 0.001 N(0,1) in either unit: it is nearer here, and a few signs turn.
    assert got.item() == pytest.approx(expected.item(), rel=0.02)
    with pytest.raises(ValueError, match=r"x_natural must be in \[0, 1\]"):
        loss(net, (X - mean) / std, Y, **arguments)
    budget = CamBudget(net, target_layer="net.relu2", clip=clip)
    assert loss(net, (X - mean) / std, Y, epsilon=budget, clip=clip, **arguments).isfinite()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_hot_labels_are_class_indices(loss, dtype):
    values = []
    for y in (Y, F.one_hot(Y, 10).to(dtype)):
        torch.manual_seed(0)
        values.append(loss(golden_net(), X, y, None, perturb_steps=2).item())
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_soft_objectives_are_means_over_the_label():
    """Linear in the label, as mixup takes them: 0.7 of the loss of one and 0.3 of that of the other; gradients too."""
    torch.manual_seed(0)
    for objective in (trades_objective, mart_objective):
        results = []
        for soft in (True, False):
            torch.manual_seed(1)
            logits = [(3 * torch.randn(8, 10)).requires_grad_() for _ in range(2)]
            if soft:
                value = objective(*logits, SOFT, 6.0)
            else:
                value = 0.7 * objective(*logits, Y, 6.0) + 0.3 * objective(*logits, OTHER, 6.0)
            results.append((value.detach(), *torch.autograd.grad(value, logits)))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_soft_mart_knows_the_wrong_class_of_every_label():
    logits_adv = torch.tensor([[4.0, 3.0, 0.0]])  # of class 0 the most likely wrong one is 1, of the others it is 0
    probs = logits_adv.softmax(1)[0]
    for label, wrong in ((0, 1), (1, 0), (2, 0)):
        soft = F.one_hot(torch.tensor([label]), 3).float()
        expected = -probs[label].log() - (1.0001 - probs[wrong]).log()
        for y in (soft, torch.tensor([label])):
            got = mart_objective(torch.zeros(1, 3), logits_adv, y, 0.0)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@both
def test_soft_labels_train(loss):
    net = golden_net()
    loss(net, X, SOFT, None, perturb_steps=1, epsilon=CamBudget(net, target_layer="relu2")).backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    with pytest.raises(ValueError, match="y must have rows that sum to 1"):
        loss(net, X, SOFT * 2, None, perturb_steps=1)
    with pytest.raises(ValueError, match=r"y must have shape \(8, 10\) if it holds probabilities"):
        loss(net, X, F.one_hot(Y, 11).float(), None, perturb_steps=1)


@both
@pytest.mark.parametrize("kind", STRIDED)
def test_strided_images_are_copied(loss, kind):
    x = strided(kind, (8, 3, 16, 16))
    whole = x.contiguous(memory_format=torch.channels_last if "channels_last" in kind else torch.contiguous_format)
    values = []
    for images in (x, whole):
        torch.manual_seed(0)
        values.append(loss(golden_net(), images, Y, None, perturb_steps=2).item())
    assert values[0] == values[1]


@both
def test_rounding_outside_the_range_and_eps_in_gray_levels(loss):
    x = X.clone()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 1 + 9e-7, -9e-7
    assert loss(golden_net(), x, Y, None, perturb_steps=1).isfinite()
    with pytest.warns(UserWarning, match="eps is in the units of the images, whose whole range is 1: got 8;") as caught:
        loss(golden_net(), x, Y, None, epsilon=8, perturb_steps=0)
    assert caught[0].filename == __file__
