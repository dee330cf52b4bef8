"""Fast attacks: a step of each is the published formula, banks are written back, training with them resumes exactly."""

import dataclasses
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY_RUN, load_once
from fake_gpu import net as gpu_net
from golden_attack import EXPECTED, golden_net
from safetensors.torch import load_file

import part_fast
from part_fast import AttackModel, CamBudget, PackedEpsilon, PerturbationBank, fgsm_rs, n_fgsm, pgd, pgi, warm
from part_fast.attacks.catalogue import ATTACKS, for_training
from part_fast.config import TrainConfig
from part_fast.data.memory import Augmentation, draw_augmentation
from part_fast.methods import METHODS
from part_fast.training import loop, step
from part_fast.training.checkpoint import STATE, write_state
from part_fast.training.epoch import resets
from part_fast.training.loop import train
from part_fast.training.measures import overfitting_warning
from part_fast.training.step import batch_attack, batch_loss

X, Y, EPS_MAP = EXPECTED["x"], EXPECTED["y"], EXPECTED["eps"]
N, EPS = len(X), 8 / 255
FORMS = {
    "float": EPS,
    "per-image": torch.linspace(0, EPS, N).view(N, 1, 1, 1),
    "per-pixel": EPS_MAP[:, :1],
    "dense": EPS_MAP,
    "packed": PackedEpsilon.pack(EPS_MAP[:, :1] > 7.5 / 255, EPS, 0.01),
}
FORM = pytest.mark.parametrize("eps", FORMS.values(), ids=FORMS)
REMEMBERING = [name for name, attack in ATTACKS.items() if attack.remembers]


def bound_of(eps):
    return eps.dense() if isinstance(eps, PackedEpsilon) else torch.as_tensor(eps)


def bank_of(samples=N, seed=0, shape=tuple(X.shape[1:]), eps=EPS):
    return PerturbationBank(samples, shape, eps, seed=seed)


def recorded(model=None):
    """(network, list) whose list gets the images of every forward."""
    model, seen = model or golden_net(), []

    def forward(x):
        seen.append(x.detach().clone())
        return model(x)

    return forward, seen


def gradient(x, y=Y, loss=F.cross_entropy):
    leaf = x.clone().requires_grad_()
    # Of the sum: no image's gradient may vanish in the mean over the batch.
    return torch.autograd.grad(loss(golden_net()(leaf), y) * len(x), leaf)[0]


def same(found, expected):
    """Equal but for the last bit, which the order of sums and products decides."""
    torch.testing.assert_close(found, expected, rtol=0, atol=2.4e-7)


# --- one step is the published formula --------------------------------------------------------------------------------


@FORM
@pytest.mark.parametrize("factor", [1.25, 0.5])
def test_fgsm_rs(eps, factor):
    forward, seen = recorded()
    bound = bound_of(eps)
    found = fgsm_rs(forward, X, Y, eps, factor)
    (start,) = seen
    assert ((start - X).abs() <= bound + 1.2e-7).all()
    assert start.min() >= 0
    assert start.max() <= 1
    delta = (start - X + factor * bound * gradient(start).sign()).clamp(-bound, bound)
    same(found, (X + delta).clamp(0, 1))
    assert not torch.equal(found, start)


@FORM
@pytest.mark.parametrize(("factor", "noise"), [(1.0, 2.0), (0.75, 1.0)])
def test_n_fgsm(eps, factor, noise):
    forward, seen = recorded()
    bound = bound_of(eps)
    found = n_fgsm(forward, X, Y, eps, factor, noise=noise)
    (noisy,) = seen
    assert ((noisy - X).abs() <= noise * bound + 1.2e-7).all()
    assert noisy.min() >= 0, "the authors' code clips the noisy images before it takes the gradient"
    assert noisy.max() <= 1
    same(found, (noisy + factor * bound * gradient(noisy).sign()).clamp(0, 1))
    if bound.max() > 0.03:
        assert ((found - X).abs() > bound + 1e-6).any(), "it is not projected"


@FORM
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_pgi(eps, factor):
    bank, bound = bank_of(), bound_of(eps)
    indices = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    before = bank.values[indices].float() * (EPS / 127)
    found = pgi(golden_net(), X, Y, eps, factor, start=bank.at(indices, None))
    start = (X + before.clamp(-bound, bound)).clamp(0, 1)
    delta = (start - X + factor * bound * gradient(start).sign()).clamp(-bound, bound)
    expected = (X + delta).clamp(0, 1)
    same(found, expected)
    # What is kept: the perturbation as clipped, to the nearest of 255 levels.
    after = bank.values[indices].float() * (EPS / 127)
    assert (after - (found - X)).abs().max() <= EPS / 254 + 1e-7


@FORM
@pytest.mark.parametrize("steps", [1, 3])
def test_warm(eps, steps):
    bank = bank_of()
    indices = torch.arange(N)
    start = (X + (bank.values.float() * (EPS / 127)).clamp(-bound_of(eps), bound_of(eps))).clamp(0, 1)
    found = warm(golden_net(), X, Y, eps, 2 / 255, steps, start=bank.at(indices, None))
    expected = pgd(golden_net(), X, Y, eps, 2 / 255, steps, start=start)
    # A start that differs in its last bit may turn the sign of a gradient that is about 0.
    assert ((found - expected).abs() > 1e-6).float().mean() < 1e-3
    after = bank.values.float() * (EPS / 127)
    assert (after - (found - X)).abs().max() <= EPS / 254 + 1e-7


def test_the_next_epoch_begins_where_the_last_one_ended_whatever_the_crop():
    """A second attack of other crops starts from what the first one found, moved by hand."""
    bank = bank_of()
    first = Augmentation(torch.full((N,), 2), torch.full((N,), -1), torch.arange(N) % 2 == 0)
    second = Augmentation(torch.full((N,), -3), torch.full((N,), 1), torch.arange(N) % 3 == 0)
    delta = pgi(golden_net(), X, Y, EPS, start=bank.at(torch.arange(N), first)) - X
    forward, seen = recorded()
    pgi(forward, X, Y, EPS, start=bank.at(torch.arange(N), second))
    size, checked = X.shape[2], 0
    for n in range(N):
        for row in range(size):
            for column in range(size):
                # The stored pixel that the second crop shows here, and where the first one showed it.
                here = (row - 3, (size - 1 - column if second.flip[n] else column) + 1)
                there = (here[0] - 2, here[1] + 1)
                if first.flip[n]:
                    there = (there[0], size - 1 - there[1])
                if all(0 <= place < size for place in (*here, *there)):
                    moved = (X[n, :, row, column] + delta[n, :, there[0], there[1]]).clamp(0, 1)
                    assert (seen[0][n, :, row, column] - moved).abs().max() <= EPS / 254 + 1e-7
                    checked += 1
    assert checked > 0.5 * N * size * size


# --- as any attack ----------------------------------------------------------------------------------------------------


def run(name, model, x=X, y=Y, eps=EPS, bank=None, **options):
    """The attack of that name with its defaults; those that remember take the samples of x in order."""
    attack = getattr(part_fast, name.replace("-", "_"))
    if name in REMEMBERING:
        bank = bank_of(len(x), shape=tuple(x.shape[1:])) if bank is None else bank
        options["start"] = bank.at(torch.arange(len(x)).to(bank.values.device), None)
    return attack(model, x, y, eps, **options)


FAST = ("fgsm-rs", "n-fgsm", "pgi", "warm")
EVERY = pytest.mark.parametrize("name", FAST)


@EVERY
@FORM
def test_each_pixel_obeys_its_eps(name, eps):
    torch.manual_seed(0)
    found = run(name, golden_net(), eps=eps)
    reach = 3 if name == "n-fgsm" else 1  # noise of twice its eps, a step of it
    assert ((found - X).abs() <= reach * bound_of(eps) + 1.2e-7).all()
    assert found.min() >= 0
    assert found.max() <= 1
    assert not torch.equal(found, X)


@EVERY
def test_seed_reproduces_and_draws_differ(name):
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(run(name, golden_net()))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2]) == (name in REMEMBERING)


@EVERY
@pytest.mark.parametrize("loss", ["ce", "kl", "margin", lambda z, y: -z.gather(1, y[:, None])[:, 0]])
def test_losses(name, loss):
    model = golden_net()
    torch.manual_seed(0)
    found = run(name, model, loss=loss)
    assert not torch.equal(found, X)
    torch.manual_seed(0)
    assert name == "warm" or not torch.equal(found, run(name, model, loss=lambda z, y: -F.cross_entropy(z, y)))


@EVERY
def test_soft_labels_of_one_class_are_that_class(name):
    model = golden_net()
    torch.manual_seed(0)
    hard = run(name, model)
    torch.manual_seed(0)
    soft = run(name, model, y=F.one_hot(Y, model(X).shape[1]).float())
    assert ((hard - soft).abs() > 1e-6).float().mean() < 1e-3


@EVERY
def test_leaves_mode_and_gradients_alone_and_takes_an_attack_model(name):
    model = golden_net().train()
    torch.manual_seed(0)
    found = run(name, model)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.manual_seed(0)
    fast = run(name, AttackModel(model))
    assert ((found - fast).abs() > 1e-6).float().mean() < 5e-3  # which rounds otherwise


@EVERY
@pytest.mark.parametrize(
    "clip", [None, (0.2, 0.9), ([0.0, 0.1, 0.2], [0.9, 0.8, 1.0])], ids=["none", "two", "channels"]
)
def test_clip(name, clip):
    low, high = (torch.tensor(-math.inf), torch.tensor(math.inf)) if clip is None else map(torch.tensor, clip)
    low, high = (bound.view(-1, 1, 1).expand(3, 1, 1) for bound in (low, high))
    x = torch.clamp(X, low, high)
    bank = bank_of()
    found = run(name, golden_net(), x=x, clip=clip, bank=bank)
    assert (found >= low).all()
    assert (found <= high).all()
    if name in REMEMBERING:  # what is stored is what is left after the clip
        after = bank.values.float() * (EPS / 127)
        assert (after - (found - x)).abs().max() <= EPS / 254 + 1e-7


@EVERY
@pytest.mark.parametrize("form", ["channels_last", "float64", "empty"])
def test_formats(name, form):
    x = {"channels_last": X.to(memory_format=torch.channels_last), "float64": X.double(), "empty": X[:0]}[form]
    model = golden_net().double() if form == "float64" else golden_net()
    found = run(name, model, x=x, y=Y[: len(x)], bank=bank_of())
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert found.stride() == x.stride()


# --- captured ---------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("form", ["float", "tensor", "packed"])
def test_a_cuda_graph_finds_the_same_and_writes_the_same_bank(gpu, name, form):
    model = gpu.put(gpu_net())
    banks = [PerturbationBank(12, (3, 16, 16), 0.1, seed=1) for _ in range(2)]
    for bank in banks:
        bank.values = gpu.put(bank.values)
    networks = AttackModel(model), AttackModel(model, cuda_graph=True)
    attack = getattr(part_fast, name.replace("-", "_"))
    found = [[], []]
    for turn in range(3):
        generator = torch.Generator().manual_seed(turn)
        x = gpu.put(torch.rand(4, 3, 16, 16, generator=generator))
        y = gpu.put(torch.randint(0, 4, (4,), generator=generator))
        packed = PackedEpsilon.pack(gpu.put(torch.rand(4, 1, 16, 16, generator=generator) < 0.5), 0.1, 0.01)
        eps = {"float": 0.1, "tensor": packed.dense(), "packed": packed}[form]
        drawn = draw_augmentation(4, generator=generator)
        indices = gpu.put(torch.randperm(12, generator=generator)[:4])
        for fast, bank, of in zip(networks, banks, found, strict=True):
            torch.manual_seed(turn)
            of.append(attack(fast, x, y, eps, start=bank.at(indices, drawn) if name in REMEMBERING else "uniform"))
    assert len(gpu.graphs) == 1
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.inner, other.inner)
    assert torch.equal(banks[0].values.inner, banks[1].values.inner)


@pytest.mark.parametrize("name", REMEMBERING)
def test_another_bank_is_captured_anew(gpu, name):
    fast = AttackModel(gpu.put(gpu_net()), cuda_graph=True)
    x, y = gpu.put(torch.rand(4, 3, 16, 16)), gpu.put(torch.arange(4))
    for seed in range(2):
        bank = PerturbationBank(4, (3, 16, 16), 0.1, seed=seed)
        bank.values = gpu.put(bank.values)
        before = bank.values.inner.clone()
        run(name, fast, x, y, 0.1, bank=bank)
        assert not torch.equal(bank.values.inner, before)
    assert len(gpu.graphs) == 2


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [pgi, warm])
@pytest.mark.parametrize(
    ("start", "eps", "says"),
    [
        ("uniform", EPS, "start must be what PerturbationBank.at gives, got str"),
        (X, EPS, "start must be what PerturbationBank.at gives, got Tensor"),
        (lambda: bank_of().at(torch.arange(N - 1), None), EPS, rf"places must have shape \({N}, 4\), a row"),
        (lambda: bank_of(shape=(3, 8, 8)).at(torch.arange(N), None), EPS, r"bank must have shape \(S, 3, "),
        (
            lambda: bank_of().at(torch.arange(N), None),
            9 / 255,
            "eps must be at most that of the bank, 0.0313725, got 0",
        ),
        (lambda: bank_of().at(torch.arange(N), None), EPS_MAP * 2, "eps must be at most that of the bank, 0.0313725, "),
        (
            lambda: bank_of().at(torch.arange(N), None),
            PackedEpsilon.pack(EPS_MAP > 0, 0.1, 0.0),
            "eps must be at most that of the bank, 0.0313725, got 0.1",
        ),
    ],
)
def test_starts_that_cannot_be(attack, start, eps, says):
    start = start() if callable(start) else start
    with pytest.raises((TypeError, ValueError), match=says):
        attack(golden_net(), X, Y, eps, start=start)


def test_a_bank_on_another_device(gpu):
    bank = bank_of()
    bank.values = gpu.put(bank.values)
    view = bank.at(gpu.put(torch.arange(N)), None)
    with pytest.raises(ValueError, match="bank must be on the device of x, cpu, got cuda:0"):
        pgi(golden_net(), X, Y, EPS, start=view)


@pytest.mark.parametrize(
    ("attack", "arguments", "says"),
    [
        (fgsm_rs, {"factor": math.inf}, "factor must be finite, got inf"),
        (fgsm_rs, {"start": "corner"}, "start must be one of uniform, zero or a tensor, got 'corner'"),
        (n_fgsm, {"noise": -1.0}, "noise must be finite and >= 0, got -1.0"),
        (n_fgsm, {"eps": -0.1}, "eps must be finite and >= 0"),
        (warm, {"steps": 0, "start": None}, "steps must be >= 1, got 0"),
    ],
)
def test_arguments_that_cannot_be(attack, arguments, says):
    with pytest.raises(ValueError, match=says):
        attack(golden_net(), X, Y, **{"eps": EPS, **arguments})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attack": "pgi", "eps": 0.0}, "eps must be > 0 with attack pgi, whose perturbations are stored, got 0"),
        ({"attack": "warm", "steps": 0}, "steps must be >= 1, got 0"),
        ({"pgi_lambda": -1.0}, "pgi_lambda must be finite and >= 0, got -1.0"),
        ({"perturbation_reset": -1}, "perturbation_reset must be >= 0, got -1"),
    ],
)
def test_configurations_that_cannot_be(changes, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(TINY_RUN, method="at", **changes).check()


# --- training ---------------------------------------------------------------------------------------------------------

TINY = dataclasses.replace(
    TINY_RUN, method="part", epochs=2, warmup_epochs=1, train_size=24, batch_size=8, test_size=10, augment=True
)


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


def silent(line):
    pass


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_pgi_has_its_regulariser_and_gradients_through_both_forwards(method):
    model = golden_net().train()
    config = tiny(method=method, attack="pgi", pgi_lambda=10.0, beta=2.0)
    bank = bank_of()
    start = (X + bank.values.float() * (EPS / 127)).clamp(0, 1)
    attacked = batch_attack(method, model, X, Y, EPS, config, bank.at(torch.arange(N), None))
    same(attacked.start, start)
    loss = batch_loss(method, model, X, attacked, Y, config).loss
    found = torch.autograd.grad(loss, list(model.parameters()))
    expected = METHODS[method].objective(model, X, attacked.x_adv, Y, 2.0)
    expected = expected + 10 * ((model(attacked.x_adv) - model(attacked.start)) ** 2).mean()
    torch.testing.assert_close(loss, expected)
    for one, other in zip(found, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        # Autograd adds up the forwards' gradients in another order.
        assert (one - other).norm() < 1e-4 * other.norm()


def test_without_its_weight_there_is_no_forward_of_the_start():
    config = tiny(method="at", attack="pgi", pgi_lambda=0.0)
    attacked = batch_attack("at", golden_net(), X, Y, EPS, config, bank_of().at(torch.arange(N), None))
    assert attacked.start is None
    loss = batch_loss("at", golden_net(), X, attacked, Y, config).loss
    torch.testing.assert_close(loss, F.cross_entropy(golden_net()(attacked.x_adv), Y))


def test_an_attack_that_remembers_needs_a_view():
    with pytest.raises(ValueError, match="view must be of a PerturbationBank for attack warm, got None"):
        batch_attack("at", golden_net(), X, Y, EPS, tiny(attack="warm"))


@EVERY
def test_a_method_with_an_attack_of_its_own_lets_these_attack(name):
    """TRADES would start beside the images and follow the divergence."""
    config = tiny(method="trades", attack=name, steps=2)
    found = []
    for method in ("trades", "at"):
        torch.manual_seed(0)
        view = bank_of().at(torch.arange(N), None)
        found.append(batch_attack(method, golden_net(), X, Y, EPS, config, view).x_adv)
    assert torch.equal(*found)


@EVERY
def test_part_gives_each_pixel_its_own_eps(name):
    model = golden_net()
    budget = CamBudget(model, EPS, 2 / 255, target_layer="relu2")
    eps = budget(X)
    view = bank_of().at(torch.arange(N), None)
    torch.manual_seed(0)
    found = batch_attack("part", model, X, Y, budget, tiny(attack=name, steps=2), view).x_adv
    assert 0 < (eps < EPS).float().mean() < 1
    assert ((found - X).abs() <= (3 if name == "n-fgsm" else 1) * eps + 1.2e-7).all()


@pytest.mark.usefixtures("quick_runs")
@pytest.mark.parametrize(
    "changes",
    [
        {"attack": "n-fgsm", "accumulate": 2},
        {"attack": "pgi", "refresh": "1", "validation": 5, "accumulate": 2},
        {"attack": "pgi", "method": "part-t", "average": "ema:0.9", "augment": False},
        {"attack": "warm", "method": "part-m", "perturbation_reset": 1, "precision": "bf16", "control": "inverted"},
    ],
    ids=lambda changes: ", ".join(map(str, changes.values())),
)
def test_trains_and_goes_on_bit_for_bit_when_killed_in_mid_epoch(changes, tmp_path, monkeypatch):
    config = tiny(**changes)
    train(config, tmp_path / "whole", save_every=0, log=silent)
    real, calls = batch_loss, []

    def stop(*arguments, **named):
        calls.append(1)
        if len(calls) == 6:  # in the second epoch, behind a batch whose state is saved
            raise KeyboardInterrupt
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(step, "batch_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "cut", save_every=0, log=silent)
    assert (
        torch.load(tmp_path / "cut" / STATE, weights_only=True)["processes"][0]["done"] > 0 or "accumulate" in changes
    )
    torch.manual_seed(99)
    train(config, tmp_path / "cut", resume=True, log=silent)
    assert_same_run(tmp_path / "whole", tmp_path / "cut", config.attack in REMEMBERING)


def assert_same_run(whole, cut, remembers):
    weights = [load_file(folder / "model.safetensors") for folder in (whole, cut)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    states = [torch.load(folder / STATE, weights_only=True)["processes"] for folder in (whole, cut)]
    assert len(states[0]) == len(states[1])
    for one, other in zip(*states, strict=True):
        assert ("perturbations" in one) == remembers
        if remembers:
            assert torch.equal(one["perturbations"], other["perturbations"])


@pytest.mark.usefixtures("quick_runs")
def test_the_bank_has_what_the_last_epoch_found_for_every_sample(tmp_path):
    """Every sample's perturbation has changed, and to what a step of eps leads to: mostly the bounds."""
    config = tiny(attack="pgi", method="at", warmup_epochs=0, epochs=1, augment=False, validation=4)
    train(config, tmp_path / "run", log=silent)
    (state,) = torch.load(tmp_path / "run" / STATE, weights_only=True)["processes"]
    first = PerturbationBank(20, (3, 32, 32), config.eps, seed=config.seed)
    assert state["perturbations"].shape == first.values.shape, "the validation images are not trained on"
    moved = (state["perturbations"] != first.values).float().mean((1, 2, 3))
    assert (moved > 0.5).all()


def test_when_perturbations_are_drawn_anew():
    epochs = [loop.Epoch(number, torch.device("cpu")) for number in range(7)]
    assert [epoch.number for epoch in epochs if resets(TrainConfig(perturbation_reset=3), epoch)] == [3, 6]
    assert not [epoch for epoch in epochs if resets(TrainConfig(perturbation_reset=0), epoch)]
    epochs[3].order_rng = torch.get_rng_state()  # a resumed epoch has its own already
    assert not resets(TrainConfig(perturbation_reset=3), epochs[3])


@pytest.mark.usefixtures("quick_runs")
def test_a_state_of_another_bank_is_refused(tmp_path):
    config = tiny(attack="warm", method="at", epochs=1)
    train(config, tmp_path / "run", log=silent)
    state = torch.load(tmp_path / "run" / STATE, weights_only=True)
    state["processes"][0]["perturbations"] = torch.zeros(24, 3, 32, 31, dtype=torch.int8)
    write_state(tmp_path / "run", state)
    with pytest.raises(
        ValueError, match=r"perturbations of another data set: process 0 must have int8 \(24, 3, 32, 32\)"
    ):
        train(dataclasses.replace(config, epochs=2), tmp_path / "run", resume=True, log=silent)


SHARED = """
    import dataclasses, functools, sys
    import torch
    from pathlib import Path
    from part_fast.config import TrainConfig
    from part_fast.data.catalogue import load
    from part_fast.report import figures
    from part_fast.training import loop, step

    torch.set_num_threads(1)
    figures.draw_curves = lambda path, rows, title: path.write_bytes(b"drawn")
    out, config = Path(sys.argv[1]), TrainConfig(**eval(sys.argv[2]))
    loop.train(config, out / "whole", save_every=0, log=print)
    real, calls = step.batch_loss, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    step.batch_loss = stop
    try:
        loop.train(config, out / "cut", save_every=0, log=print)
    except KeyboardInterrupt:
        pass
    step.batch_loss = real
    loop.train(config, out / "cut", resume=True, log=print)
"""


@pytest.mark.usefixtures("quick_runs")
def test_two_processes_keep_their_own_samples_and_go_on_bit_for_bit(tmp_path):
    """47 samples: the second process has 23, and goes over one of them twice."""
    config = tiny(attack="pgi", train_size=47, method="at", precision="fp32", device="cpu", lr_drops=())
    script = tmp_path / "work.py"
    script.write_text(textwrap.dedent(SHARED))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, str(script), str(tmp_path), repr(dataclasses.asdict(config))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "whole", tmp_path / "cut", True)
    shards = [p["perturbations"] for p in torch.load(tmp_path / "cut" / STATE, weights_only=True)["processes"]]
    assert [len(shard) for shard in shards] == [24, 23]
    first = PerturbationBank(47, (3, 32, 32), config.eps, seed=config.seed).values
    for rank, shard in enumerate(shards):
        assert ((shard != first[rank::2]).float().mean((1, 2, 3)) > 0.3).all()
    # Between two epochs any number of processes goes on, here one, with what both have found.
    rows = train(dataclasses.replace(config, epochs=3), tmp_path / "cut", resume=True, log=silent)
    assert len(rows) == 3
    (alone,) = torch.load(tmp_path / "cut" / STATE, weights_only=True)["processes"]
    assert len(alone["perturbations"]) == 47


@pytest.mark.parametrize("name", ["fgsm-rs", "n-fgsm"])
def test_an_attack_that_the_released_code_lacks_starts_as_its_own_authors_say(name, monkeypatch):
    starts = []
    row = dataclasses.replace(ATTACKS[name], run=lambda *arguments: starts.append(arguments[6]) or arguments[1])
    monkeypatch.setitem(ATTACKS, name, row)
    batch_attack("part", golden_net(), X, Y, EPS_MAP, tiny(method="part", attack=name, released=True))
    assert starts == ["uniform"]


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "reach"), [("fgsm-rs", 1), ("n-fgsm", 2)])
def test_an_evaluation_starts_within_reach_and_repeats(name, reach, monkeypatch):
    from part_fast.evaluation.accuracy import AttackSettings, is_correct
    from part_fast.models.resnet import resnet_small

    data = load_once("demo", "test").subset(20)
    starts = []
    row = ATTACKS[name]

    def spy(model, x, y, eps, alpha, steps, start, seed):
        starts.append((start - x).abs().max().item() / eps)
        return row.run(model, x, y, eps, alpha, steps, start, seed)

    monkeypatch.setitem(ATTACKS, name, dataclasses.replace(row, run=spy))
    model = resnet_small().eval()
    found = [is_correct(model, data, name, AttackSettings()) for _ in range(2)]
    assert torch.equal(*found)
    assert starts[0] == pytest.approx(reach, rel=0.01)


# --- catastrophic overfitting -----------------------------------------------------------------------------------------


def rows_of(column, *pairs):
    return [{"epoch": i, "train_robust": trained, column: resists} for i, (trained, resists) in enumerate(pairs, 1)]


@pytest.mark.parametrize(
    ("column", "named"),
    [
        ("validation_pgd20", "PGD-20 on the validation images has fallen from 40.0% in epoch 2 to 2.0%"),
        ("test_pgd20", "PGD-20 on the test images has fallen from 40.0% in epoch 2 to 2.0%"),
        ("train_pgd10", "PGD-10 on training images has fallen from 40.0% in epoch 2 to 2.0%"),
    ],
)
def test_overfitting_is_said_of_whatever_images_are_watched(column, named):
    said = overfitting_warning(rows_of(column, (0.3, 0.3), (0.4, 0.4), (0.9, 0.02)), "fgsm")
    assert said.startswith(named)
    assert "from 40.0% to 90.0%: catastrophic overfitting" in said
    assert "--attack pgi" in said
    assert ("--weights best" in said) == (column == "validation_pgd20")
    assert overfitting_warning(rows_of(column, (0.3, 0.3), (0.4, 0.4), (0.5, 0.35)), "fgsm") is None
    assert overfitting_warning(rows_of(column, (0.3, 0.3), (0.4, 0.4), (0.2, 0.02)), "fgsm") is None, "learns nothing"


@pytest.mark.parametrize("attack", for_training())
def test_what_is_advised_against_overfitting_is_what_the_attack_takes(attack):
    said = overfitting_warning(rows_of("test_pgd20", (0.3, 0.3), (0.4, 0.4), (0.9, 0.02)), attack)
    advised = {"pgd", "warm", "mma"} & {attack}
    assert ("train with more --steps or a smaller --alpha, and" in said) == bool(advised)
    assert (f"--attack {'pgd' if attack == 'pgi' else 'pgi'}, and" in said) == (not advised)


@pytest.mark.usefixtures("quick_runs")
@pytest.mark.parametrize("attack", for_training())
def test_steps_and_alpha_that_an_attack_does_not_read_are_said(attack, tmp_path):
    reads = attack in ("pgd", "warm", "mma")
    for number, (changes, expected) in enumerate(
        [
            ({}, []),
            ({"steps": 1}, []),
            ({"steps": 7}, ["steps 7 is not used"]),
            ({"alpha": 10 / 255}, ["alpha 0.0392157 is that of PGD in tests alone"]),
        ]
    ):
        said = []
        config = {"method": "at", "epochs": 1, "attack": attack, "steps": 10, "alpha": 2 / 255, **changes}
        train(tiny(preset="cifar10-resnet18", **config), tmp_path / str(number), log=said.append)
        own = f"warning: attack {attack} takes one step, of each pixel's own eps: "
        assert [line for line in said if "takes one step" in line] == ([] if reads else [own + e for e in expected])


def test_validation_images_are_asked_before_test_images():
    rows = rows_of("validation_pgd20", (0.3, 0.3), (0.4, 0.4), (0.9, 0.35))
    for row in rows:
        row["test_pgd20"] = 0.5 / row["epoch"] ** 3
    assert overfitting_warning(rows, "fgsm") is None


@pytest.mark.usefixtures("quick_runs")
@pytest.mark.parametrize(
    ("changes", "watched"),
    [
        ({"attack": "fgsm"}, True),
        ({"attack": "pgi"}, True),
        ({"attack": "pgd", "steps": 1}, True),
        ({"attack": "warm", "steps": 2}, False),
        ({"attack": "fgsm", "pgd_test_size": 5}, False),
        ({"attack": "fgsm", "validation": 4}, False),
    ],
)
def test_training_images_are_watched_where_one_step_attacks_and_nothing_else_would_tell(changes, watched, tmp_path):
    (row,) = train(tiny(method="at", epochs=1, **changes), tmp_path / "run", log=silent)
    assert ("train_pgd10" in row) == watched
    assert not watched or 0 <= row["train_pgd10"] <= 1


@pytest.mark.slow
def test_a_run_that_overfits_is_warned_of(tmp_path):
    """FGSM at an eps that it cannot train with: the model learns to resist its one step, and PGD finds every image.

    When it does depends on every rounding; within 14 epochs of 2,000 images it did, for one of them, in the twelfth.
    """
    said = []
    config = dataclasses.replace(
        TINY_RUN, method="at", attack="fgsm", eps=32 / 255, alpha=8 / 255, epochs=14, warmup_epochs=0, train_size=2000,
        test_size=20, batch_size=50, lr=0.1, lr_drops=(), augment=False,
    )  # fmt: skip
    train(config, tmp_path / "run", log=said.append)
    assert any("PGD-10 on training images has fallen" in line and "catastrophic overfitting" in line for line in said)
