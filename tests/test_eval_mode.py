"""Tests of part_fast.eval_mode: every module comes back as it was, whatever its train() does and whatever happens."""

import functools

import pytest
import torch
from test_any_model import LoRA, LoRAThroughData, Net, OwnMode, images, state, with_layer
from torch import nn

from part_fast import AttackModel, CamBudget, mma, pgd, trades_loss
from part_fast.eval_mode import eval_mode, grads_kept, input_gradient, modules_of, unwrapped

EPS = 8 / 255


class DropoutStaysOn(nn.Dropout):
    def train(self, mode=True):
        return super().train(True)


class Breaks(Net):
    """Raises in its n-th forward from now."""

    left = 0

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("broken")
        return super().forward(x)


def batch():
    x, y = images(dtype=torch.float32)
    return x, y


def test_modes_of_every_module_come_back_also_after_an_exception():
    model = Net().train()
    model.bn1.eval()
    before = [module.training for module in model.modules()]

    def raise_within():
        with eval_mode(model):
            assert not any(module.training for module in model.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        raise_within()
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("merging", [LoRA, LoRAThroughData])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_come_apart_bit_for_bit(merging, dtype):
    torch.manual_seed(0)
    model = with_layer(merging).to(dtype).train()
    layer, before = model.layer4[0], state(model)
    weight = layer.conv.weight.detach().clone()
    for _ in range(20):  # each of which would round twice
        with eval_mode(model):
            assert layer.merged
            assert not torch.equal(layer.conv.weight, weight)
    assert not layer.merged
    after = state(model)
    assert all(map(torch.equal, after.pop("values"), before.pop("values")))
    assert after == before


def test_one_that_is_merged_and_in_eval_mode_stays_so():
    model = with_layer(LoRA).train()
    model.layer4.eval()
    with eval_mode(model):
        assert model.layer4[0].merged
    assert model.layer4[0].merged
    assert not model.layer4.training
    assert model.bn1.training


def test_dropout_that_stays_on_is_no_fault_and_a_flag_that_is_not_set_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), DropoutStaysOn()).train()
    with eval_mode(model):
        assert (model[0].training, model[1].training) == (False, True)
    assert model[0].training
    own = OwnMode().train()
    with pytest.raises(ValueError, match=r"model must set `training` in its train\(\), got a OwnMode"), eval_mode(own):
        pytest.fail("entered")
    assert own.learning
    assert own.bn1.training


@pytest.mark.parametrize("kind", ["partial", "of arguments", "method", "decorated", "nested"])
def test_modules_behind_callables_are_put_in_eval_mode(kind):
    model = Net().train()

    @functools.wraps(model.forward)
    def decorated(x):
        return model(x)

    call = {
        "partial": functools.partial(model),
        "of arguments": functools.partial(lambda net, x: net(x), model),
        "method": model.forward,
        "decorated": decorated,
        "nested": functools.partial(functools.partial(model.forward)),
    }[kind]
    assert modules_of(call) == list(model.modules())
    with eval_mode(call):
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())
    assert modules_of(lambda x: x) == []


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize(
    "call",
    [
        lambda model, x, y: pgd(model, x, y, EPS, steps=2, loss="kl"),
        lambda model, x, y: mma(model, x, y, EPS, steps=1),
        lambda model, x, y: trades_loss(model, x, y, None, perturb_steps=1),
        lambda model, x, y: [CamBudget(model)(x) for _ in range(2)],
        lambda model, x, y: [CamBudget(model, method=lambda *_: model(x)[:, 0])(x) for _ in range(2)],
    ],
    ids=["pgd", "mma", "trades_loss", "CamBudget", "callable method"],
)
def test_a_forward_that_raises_leaves_modes_hooks_and_gradients(call, at):
    model, (x, y) = Breaks().train(), batch()
    before, random = state(model), torch.get_rng_state()
    model.left = at
    with pytest.raises(RuntimeError, match="broken"):
        call(model, x, y)
    after = state(model)
    assert all(map(torch.equal, after.pop("values"), before.pop("values")))
    assert after == before
    if "CamBudget" in call.__code__.co_names:
        assert torch.equal(torch.get_rng_state(), random)


def test_grads_are_put_back_and_not_added_to():
    model = Net()
    model.fc.weight.grad = mine = torch.ones_like(model.fc.weight)

    def raise_within():
        with grads_kept(model):
            model(batch()[0]).sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        raise_within()
    assert model.fc.weight.grad is mine
    assert torch.equal(mine, torch.ones_like(mine))
    assert model.conv1.weight.grad is None


def test_autoattack_leaves_gradients_alone(monkeypatch):
    pyautoattack = pytest.importorskip("pyautoattack", reason="the package pyautoattack is not installed")
    from part_fast.attacks.autoattack import autoattack

    def run(self, x, y, batch_size):
        self.model(x).sum().backward()  # as FAB does
        return x, y

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", run)
    model, (x, y) = Net(), batch()
    autoattack(model, x, y)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_input_gradient_is_none_where_nothing_leads_there():
    x = torch.ones(2, requires_grad=True)
    assert torch.equal(input_gradient((3 * x).sum(), x), torch.full((2,), 3.0))
    assert input_gradient(torch.ones(2, requires_grad=True).sum(), x) is None
    assert input_gradient(x.detach().sum(), x) is None


def test_a_wrapper_with_hooks_of_its_own_stays():
    model = Net()
    wrapped = nn.DataParallel(nn.DataParallel(model))
    assert unwrapped(wrapped) is model
    wrapped.module.register_forward_hook(lambda module, args, out: out + 1)
    assert unwrapped(wrapped) is wrapped.module
    x = batch()[0]
    torch.testing.assert_close(AttackModel(wrapped)(x), model.eval()(x) + 1)
