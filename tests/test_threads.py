"""The C++ ops give the same bits on any number of threads; attacks in several threads those of one after another."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import DTYPES, EPS, EPS_LOW, assert_same_bits, lay, make_eps, make_images
from torch import Tensor

import part_fast
from part_fast import AttackModel, CamBudget, pgd
from part_fast.attack_model.cpu import winograd
from part_fast.models import wideresnet
from part_fast.ops.cam import METHODS

cpp = pytest.mark.skipif("cpp" not in part_fast.available_backends(), reason="needs part_fast._C: a C++ compiler")

THREADS = (2, 3, 4, 7, 8)
IMAGES = (3, 3, 131, 127)  # past what one thread is given, and no multiple of a vector
MAPS, SIZE = (67, 8, 8), (33, 32)


def images(dtype: torch.dtype, layout: str, form: str) -> tuple[Tensor, Tensor, Tensor, object]:
    eps, dense = make_eps(form, IMAGES, "cpu")
    return *(lay(t, layout) for t in make_images(IMAGES, dtype, "cpu", dense)), eps


def step(dtype: torch.dtype, layout: str, form: str) -> list[Tensor]:
    x_adv, grad, x, eps = images(dtype, layout, form)
    leaves = [x_adv.clone().requires_grad_(), x.clone().requires_grad_()]
    out = part_fast.pgd_step(leaves[0], grad, leaves[1], eps, 0.01)
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    return [out.detach(), *grads, part_fast.pgd_step_(x_adv.clone(), grad, x, eps, 0.01)]


def projection(dtype: torch.dtype, layout: str, form: str) -> list[Tensor]:
    x_adv, _, x, eps = images(dtype, layout, form)
    leaves = [x_adv.clone().requires_grad_(), x.clone().requires_grad_()]
    out = part_fast.project_linf(*leaves, eps)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


def fast_step(dtype: torch.dtype, layout: str, form: str) -> list[Tensor]:
    """From noise, from a bank, and a step that writes to it."""
    x_adv, grad, x, eps = images(dtype, layout, form)
    bank = torch.randint(-127, 128, (5, *IMAGES[1:]), dtype=torch.int8)
    places = torch.tensor([(4, 3, -2, 1), (0, -1, 4, 0), (2, 0, 0, 1)])
    starts = [
        part_fast.uniform_start(x, eps, seed=2**40 + 1),
        part_fast.bank_start(x, bank, places, eps, scale=0.1),
    ]
    part_fast.eps_step_(x_adv, grad, x, eps, 1.25, bank=bank, places=places, scale=0.1)
    return [*starts, x_adv, bank.to(torch.int16)]


def maps(dtype: torch.dtype) -> Tensor:
    return torch.rand(MAPS).to(dtype)


def enlarged(dtype: torch.dtype) -> list[Tensor]:
    cam = maps(dtype).requires_grad_()
    out = part_fast.upsample_cam(cam, SIZE)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), cam)]


def convolution() -> list[Tensor]:
    x, weight = torch.randn(5, 32, 17, 18), torch.randn(48, 32, 3, 3)
    few = torch.randn(1, 32, 9, 9)
    u = winograd.transform_(None, weight, False)
    return [u, *(winograd.convolve(images, u, 48, torch.randn(48), relu=True) for images in (x, few))]


FORMS = ("float", "(N,1,H,W)", "(N,C,H,W)", "PackedEpsilon M=1", "PackedEpsilon M=C")
# Every op with a C++ kernel, in each dtype, layout, form or rule.
OPS: dict[str, Callable[[], list[Tensor]]] = {
    **{
        f"{name} {dtype} {layout} {form}": (lambda f=f, d=d, layout=layout, form=form: f(d, layout, form))
        for name, f in {"pgd_step": step, "project_linf": projection, "eps_step_": fast_step}.items()
        for dtype, d in DTYPES.items()
        for layout in ("contiguous", "channels_last")
        for form in (FORMS if dtype == "float32" else FORMS[1:2])
    },
    **{
        f"cam {method} {dtype} {layout}": (
            lambda m=method, d=d, layout=layout: [
                part_fast.cam(*(lay(torch.randn(37, 65, 8, 8).to(d), layout) for _ in range(2)), m)
            ]
        )
        for method in METHODS
        for dtype, d in DTYPES.items()
        for layout in ("contiguous", "channels_last")
    },
    **{f"upsample_cam {dtype}": (lambda d=d: enlarged(d)) for dtype, d in DTYPES.items()},
    **{
        f"cam_mask {rule} {dtype}": (lambda d=d, rule=rule: [part_fast.cam_mask(maps(d), SIZE, rule).to(torch.int16)])
        for rule in ("zscore", "released", "quantile:0.3")
        for dtype, d in DTYPES.items()
    },
    **{
        f"epsilon_map {rule} {dtype}": (
            lambda d=d, rule=rule: [part_fast.epsilon_map(maps(d), SIZE, EPS, EPS_LOW, rule)]
        )
        for rule in ("zscore", "released", "quantile:0.3", "soft")
        for dtype, d in DTYPES.items()
    },
    "winograd": convolution,
}


@cpp
@pytest.mark.parametrize("op", OPS)
def test_every_number_of_threads_gives_the_same_bits_cpp(op):
    before = torch.get_num_threads()
    try:
        with part_fast.backend("cpp"):
            torch.set_num_threads(1)
            torch.manual_seed(0)
            expected = OPS[op]()
            for threads in THREADS:
                torch.set_num_threads(threads)
                torch.manual_seed(0)
                for got, one in zip(OPS[op](), expected, strict=True):
                    assert_same_bits(got, one)
    finally:
        torch.set_num_threads(before)


def attacked(model: torch.nn.Module, x: Tensor, y: Tensor, backend: str) -> list[Tensor]:
    """A budget, attacks on the model and its copy within it, from given starts: nothing here draws."""
    with part_fast.backend(backend):
        eps = CamBudget(model, target_layer="block3")(x)
        start = (x + eps * torch.sign(x - 0.5)).clamp(0, 1)
        fast = AttackModel(model)
        found = pgd(fast, x, y, eps, steps=2, start=start)
        return [eps, found, pgd(model, x, y, CamBudget(fast).packed(x), steps=2, start="zero", loss="kl")]


BACKENDS = [name for name in ("cpp", "reference") if name in part_fast.available_backends()]


@pytest.fixture(scope="module")
def nets() -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [wideresnet(10, 1) for _ in range(4)]


def test_threads_with_models_of_their_own_find_what_one_thread_finds(nets):
    """Each on its own backend, and again and again, so that they overlap. No two threads have the same model."""
    x, y = torch.rand(4, 3, 3, 16, 16), torch.randint(10, (4, 3))
    jobs = [(net, x[i], y[i], BACKENDS[i % len(BACKENDS)]) for i, net in enumerate(nets)]
    expected = [attacked(*job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        for rounds, alone in zip(pool.map(lambda job: [attacked(*job) for _ in range(4)], jobs), expected, strict=True):
            for got in rounds:
                for one, other in zip(got, alone, strict=True):
                    assert_same_bits(one, other)
    assert all(net.training for net in nets)


def test_a_seeded_start_is_what_its_thread_was_given(nets):
    """The default start is drawn from the generator of the process: threads pass a start that they drew themselves."""
    x, y = torch.rand(3, 3, 16, 16), torch.zeros(3, dtype=torch.int64)

    def found(seed: int) -> Tensor:
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        return pgd(nets[seed], x, y, EPS, steps=1, start=(x + noise * EPS).clamp(0, 1))

    expected = [found(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for got, one in zip(pool.map(found, range(4)), expected, strict=True):
            assert_same_bits(got, one)


class Disturbed(torch.nn.Module):
    """In its forward another thread draws random numbers, and this one too if it is told to."""

    def __init__(self, noisy: bool = False) -> None:
        super().__init__()
        self.noisy, self.drawn = noisy, []
        self.layer4, self.fc = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: self.drawn.append(torch.rand(3)))
        thread.start()
        thread.join()
        x = x + 0.01 * torch.rand(x.shape) if self.noisy else x
        return self.fc(self.layer4(x).relu().mean((2, 3)))


def test_what_other_threads_draw_while_a_budget_computes_is_not_drawn_again():
    model, x = Disturbed(), torch.rand(2, 3, 8, 8)
    budget = CamBudget(model)
    torch.manual_seed(0)
    expected = torch.rand(300)
    torch.manual_seed(0)
    for _ in range(4):
        budget(x)
    got = torch.cat(model.drawn)
    assert torch.equal(got, expected[: len(got)])
    model.noisy = True  # it is noticed at once, and its own draws are put back
    before = torch.get_rng_state()
    for _ in range(2):
        budget(x)
        assert torch.equal(torch.get_rng_state(), before)


class Noisy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer4, self.fc = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer4(x + 0.01 * torch.rand_like(x)).relu().mean((2, 3)))


def test_budgets_of_models_that_draw_take_turns_and_leave_the_generator_alone():
    budgets, x = [CamBudget(Noisy(), method="layercam", rule="soft") for _ in range(4)], torch.rand(2, 3, 8, 8)
    before = torch.get_rng_state()
    expected = [budget(x) for budget in budgets]  # each from the same state of the generator
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for got, one in zip(pool.map(lambda budget: budget(x), budgets), expected, strict=True):
                assert_same_bits(got, one)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("control", ["permuted", "random"])
def test_controls_draw_from_the_generator_of_their_thread(control, nets):
    x = torch.rand(4, 5, 3, 16, 16)

    def found(i: int) -> list[Tensor]:
        draw = torch.Generator().manual_seed(i)
        budget = CamBudget(nets[i], target_layer="block3", control=control, generator=draw)
        return [*(budget(x[i]) for _ in range(3)), budget.packed(x[i]).dense()]

    before = torch.get_rng_state()
    expected = [found(i) for i in range(4)]
    torch.manual_seed(0)
    plain = CamBudget(nets[0], target_layer="block3", control=control)(x[0])
    assert_same_bits(plain, expected[0][0])  # the same numbers as from torch's own generator with the same seed
    torch.set_rng_state(before)
    with ThreadPoolExecutor(4) as pool:
        for got, alone in zip(pool.map(found, range(4)), expected, strict=True):
            for one, other in zip(got, alone, strict=True):
                assert_same_bits(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_autoattacks_in_two_threads_find_what_one_after_another_finds(monkeypatch):
    pyautoattack = pytest.importorskip("pyautoattack", reason="the package pyautoattack is not installed")
    run = pyautoattack.AutoAttack.run_standard_evaluation

    def short(self: object, *args: object, **kwargs: object) -> object:
        for attack in (self.apgd, self.apgd_targeted, self.fab):
            attack.n_iter, attack.n_restarts = 3, 1
        self.square.n_queries = 30
        return run(self, *args, **kwargs)

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", short)
    models = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5)) for _ in range(2)]
    x = torch.rand(2, 4, 3, 8, 8)

    def found(i: int) -> Tensor:
        # So small an eps that images are left for every attack.
        return part_fast.attacks.autoattack(models[i], x[i], models[i](x[i]).argmax(1), eps=2e-3, seed=i)

    before = torch.get_rng_state()
    expected = [found(i) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for got, one in zip(pool.map(found, range(2)), expected, strict=True):
                assert_same_bits(got, one)
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_that_only_ask_share_one_attack_model(nets):
    """Nobody trains meanwhile, and the copy was run once before, forward and backward."""
    fast = AttackModel(copy.deepcopy(nets[0]).eval())
    x, y = torch.rand(4, 3, 3, 16, 16), torch.randint(10, (4, 3))

    def found(i: int) -> Tensor:
        return pgd(fast, x[i % 4], y[i % 4], EPS, steps=2, start="zero")

    expected = [found(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for number, got in enumerate(pool.map(found, range(24))):
            assert_same_bits(got, expected[number % 4])


def test_a_copy_is_made_while_other_threads_compute(nets):
    """While the one is traced, a network runs in another thread, which draws random numbers and goes on after them."""
    x = torch.rand(2, 3, 16, 16)
    other = copy.deepcopy(nets[0]).eval()
    expected, seen = other(x), []

    def elsewhere() -> None:
        seen.append((other(x), torch.rand(3)))

    class Meeting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = torch.nn.Conv2d(3, 10, 3), torch.nn.BatchNorm2d(10)

        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            return self.bn(self.conv(x)).mean((2, 3))

    torch.manual_seed(0)
    drawn = torch.rand(30)
    torch.manual_seed(0)
    model = Meeting().eval()
    torch.manual_seed(0)
    fast = AttackModel(model)
    assert seen
    assert all(torch.equal(logits, expected) for logits, _ in seen)
    assert torch.equal(torch.cat([numbers for _, numbers in seen]), drawn[: 3 * len(seen)])
    assert fast.folded == 1
