"""Derivatives of every kind: forward mode, second order, vmap, torch.func nested; right, or refused by name."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, EPS, assert_same, make_eps, make_images
from golden_attack import EXPECTED, golden_net
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from part_fast import (
    AttackModel,
    PackedEpsilon,
    cam,
    cam_mask,
    epsilon_map,
    pgd_step,
    pgd_step_,
    project_linf,
    upsample_cam,
)

ALPHA = 0.125
SHAPE = (2, 3, 3, 4)


def images(device, dtype=torch.float64):
    """(x_adv, gradient, x, eps): pixels inside, beyond and below the bound and the clip, none near either."""
    place = torch.rand(SHAPE, device=device, dtype=dtype)
    x = torch.where(place < 0.3, 0.05, 0.5).to(dtype)
    moved = torch.randint(-2, 3, SHAPE, device=device).to(dtype) * 0.22
    sign = torch.where(torch.rand(SHAPE, device=device) < 0.5, 1.0, -1.0).to(dtype)
    eps = 0.16 + 0.02 * torch.rand(2, 1, 3, 4, device=device, dtype=dtype)
    return x + moved, sign, x, eps


def plain_step(x_adv, gradient, x, eps, clip=(0.0, 1.0)):
    """The definition, which torch differentiates; away from ties there is nothing to choose."""
    moved = x_adv + ALPHA * gradient.sign() - x
    moved = torch.where(moved > eps, eps + 0 * moved, torch.where(moved < -eps, -eps + 0 * moved, moved))
    result = x + moved
    return torch.where((result < clip[0]) | (result > clip[1]), result.detach().clamp(*clip), result)


def steps(eps):
    """name: (function of (x_adv, x, eps), the same in plain PyTorch)."""
    gradient = torch.ones(SHAPE, dtype=eps.dtype, device=eps.device)
    return {
        "project_linf": (
            lambda a, n, e: project_linf(a, n, e),
            lambda a, n, e: plain_step(a - ALPHA, gradient, n, e, (-9, 9)),
        ),
        "pgd_step": (
            lambda a, n, e: pgd_step(a, gradient, n, e, ALPHA),
            lambda a, n, e: plain_step(a, gradient, n, e),
        ),
        "pgd_step, clip per channel": (
            lambda a, n, e: pgd_step(a, gradient, n, e, ALPHA, ([0.1, 0.1, 0.1], 0.9)),
            lambda a, n, e: plain_step(a, gradient, n, e, (0.1, 0.9)),
        ),
    }


STEPS = tuple(steps(torch.zeros(1)))
every_step = pytest.mark.parametrize("op", STEPS)


@every_step
def test_forward_mode_is_that_of_the_definition(backend, op):
    x_adv, _, x, eps = images(backend.device)
    ours, plain = steps(eps)[op]
    inputs = (x_adv, x, eps)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    expected = jvp(plain, inputs, tangents)
    for got, wanted in zip(jvp(ours, inputs, tangents), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert expected[1].abs().sum() > 0
    with forward_ad.dual_level():
        dual = ours(*(forward_ad.make_dual(t, v) for t, v in zip(inputs, tangents, strict=True)))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected[1])
    # One argument alone.
    for i in range(3):
        only = tuple(t if i == j else torch.zeros_like(t) for j, t in enumerate(tangents))
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, tangents[j]) if i == j else t for j, t in enumerate(inputs)]
            got = forward_ad.unpack_dual(ours(*duals)).tangent
        torch.testing.assert_close(got, jvp(plain, inputs, only)[1])


@every_step
def test_forward_and_reverse_agree_on_ties(backend, op):
    """On a bound both say that the value is x_adv's, and a clipped one nobody's."""
    eps, dense = make_eps("(N,C,H,W)", SHAPE, backend.device, torch.float64)
    x_adv, _, x = make_images(SHAPE, torch.float64, backend.device, dense)
    ours, _ = steps(eps)[op]
    inputs = (x_adv, x, eps)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    weight = torch.randn_like(x)
    forward = (jvp(ours, inputs, tangents)[1] * weight).sum()
    reverse = sum((g * t).sum() for g, t in zip(vjp(ours, *inputs)[1](weight), tangents, strict=True))
    torch.testing.assert_close(forward, reverse)


@every_step
def test_gradcheck_of_every_kind(backend, op):
    x_adv, _, x, eps = images(backend.device)
    inputs = tuple(t.requires_grad_() for t in (x_adv, x, eps))
    ours, _ = steps(eps)[op]
    fast = {"fast_mode": True} if backend.interpreted else {}
    assert torch.autograd.gradcheck(
        ours, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True, **fast
    )
    assert torch.autograd.gradgradcheck(lambda *t: ours(*t).square(), inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_backward_in_plain_pytorch_has_the_same_bits(backend, dtype):
    """With create_graph the backward is plain PyTorch, so that it can be differentiated; without, it is the kernel."""
    eps, dense = make_eps("(N,C,H,W)", SHAPE, backend.device, dtype)
    x_adv, gradient, x = make_images(SHAPE, dtype, backend.device, dense)
    maps = torch.rand(2, 3, 4, device=backend.device, dtype=dtype)
    for function, inputs in (
        (lambda a, n, e: pgd_step(a, gradient, n, e, ALPHA), (x_adv, x, eps)),
        (project_linf, (x_adv, x, eps)),
    ):
        leaves = [t.clone().requires_grad_() for t in inputs]
        weight = torch.randn_like(x)
        kernel = torch.autograd.grad(function(*leaves), leaves, weight)
        plain = torch.autograd.grad(function(*leaves), leaves, weight, create_graph=True)
        for one, other in zip(kernel, plain, strict=True):
            assert_same(other.detach(), one)
    leaf = maps.requires_grad_()
    weight = torch.randn(2, 9, 8, device=backend.device, dtype=dtype)
    results = [
        torch.autograd.grad(upsample_cam(leaf, (9, 8)), leaf, weight, create_graph=graph)[0] for graph in (False, True)
    ]
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2  # sums in another order, rounded once
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def maps(device):
    return torch.rand(2, 3, 4, device=device, dtype=torch.float64)


UPSAMPLED = {
    "upsample_cam": lambda c: upsample_cam(c, (5, 6)),
    "epsilon_map": lambda c: epsilon_map(c, (5, 6), 0.5, 0.25, "soft"),
}
upsampled = pytest.mark.parametrize("op", UPSAMPLED)


@upsampled
def test_maps_have_every_order_of_reverse_mode(backend, op):
    inputs = (maps(backend.device).requires_grad_(),)
    function = UPSAMPLED[op]
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True, fast_mode=backend.interpreted)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    if op == "upsample_cam":
        # What once was silent: a second derivative through the saved map alone, beside another term.
        (leaf,) = inputs
        (first,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
        assert first.requires_grad
    flat = torch.ones(1, 2, 2, dtype=torch.float64, device=backend.device, requires_grad=True)
    (first,) = torch.autograd.grad(function(flat).sum(), flat, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), flat)
    assert_same(second, torch.zeros_like(flat))


@upsampled
def test_maps_refuse_forward_mode_by_name(backend, op):
    c = maps(backend.device)
    with pytest.raises(NotImplementedError, match=f"^{op}.* has no forward-mode derivative: use reverse mode"):
        jvp(UPSAMPLED[op], (c,), (torch.rand_like(c),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"^{op}.* has no forward-mode derivative"):
        UPSAMPLED[op](forward_ad.make_dual(c, torch.rand_like(c)))
    with forward_ad.dual_level():  # of something else
        assert_same(UPSAMPLED[op](c), UPSAMPLED[op](c.clone()))


def test_eps_of_a_soft_map_has_forward_mode(backend):
    c, eps = maps(backend.device), torch.tensor(0.5, dtype=torch.float64, device=backend.device)
    value, tangent = jvp(lambda e: epsilon_map(c, (5, 6), e, 0.25, "soft"), (eps,), (torch.ones_like(eps),))
    torch.testing.assert_close(value, 0.25 + 0.25 * tangent)
    assert tangent.max() == 1


def test_cam_refuses_a_tangent_and_masks_have_none(backend):
    a, g = torch.rand(2, 3, 4, 4, device=backend.device), torch.rand(2, 3, 4, 4, device=backend.device)
    for one, other in ((a, g), (g, a)):
        with pytest.raises(NotImplementedError, match="not differentiable"):
            jvp(lambda t, other=other: cam(t, other), (one,), (torch.ones_like(one),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="not differentiable"):
        cam(a, forward_ad.make_dual(g, g))
    c = maps(backend.device)
    assert jvp(lambda t: epsilon_map(t, (5, 6), 0.5, 0.25), (c,), (torch.ones_like(c),))[1].abs().sum() == 0
    assert_same(vmap(lambda t: cam_mask(t, (5, 6)))(torch.stack([c, c])), torch.stack([cam_mask(c, (5, 6))] * 2))


def per_sample(function, *arguments):
    """`function` on each sample alone, the results stacked: what vmap promises."""
    return torch.stack([function(*(a[i] for a in arguments)) for i in range(len(arguments[0]))])


@pytest.mark.parametrize("form", ["()", "(1,H,W)", "(C,H,W)"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_vmap_with_an_eps_per_sample(backend, dtype, form):
    eps, dense = make_eps(
        {"()": "(N,1,1,1)", "(1,H,W)": "(N,1,H,W)", "(C,H,W)": "(N,C,H,W)"}[form], SHAPE, backend.device
    )
    x_adv, gradient, x = make_images(SHAPE, dtype, backend.device, dense)
    eps = eps.flatten() if form == "()" else eps

    def step(a, g, n, e):
        return pgd_step(a[None], g[None], n[None], e, ALPHA)[0]

    def project(a, n, e):
        return project_linf(a[None], n[None], e)[0]

    def in_place(a, g, n, e):
        return pgd_step_(a[None] * 1, g[None], n[None], e, ALPHA)[0]

    assert_same(vmap(step)(x_adv, gradient, x, eps), pgd_step(x_adv, gradient, x, dense, ALPHA))
    assert_same(vmap(in_place)(x_adv, gradient, x, eps), pgd_step(x_adv, gradient, x, dense, ALPHA))
    assert_same(vmap(project)(x_adv, x, eps), project_linf(x_adv, x, dense))
    # Mapped elsewhere, or not at all.
    moved = x_adv.movedim(0, 2).contiguous()
    expected = per_sample(lambda a, e: step(a, gradient[0], x[0], e), x_adv, eps)
    assert_same(vmap(step, in_dims=(2, None, None, 0))(moved, gradient[0], x[0], eps), expected)
    expected = per_sample(lambda e: step(x_adv[0], gradient[0], x[0], e), eps)
    assert_same(vmap(step, in_dims=(None, None, None, 0))(x_adv[0], gradient[0], x[0], eps), expected)


def test_vmap_of_packed_bits_and_float(backend):
    eps, dense = make_eps("PackedEpsilon M=1", SHAPE, backend.device)
    x_adv, gradient, x = make_images(SHAPE, torch.float32, backend.device, dense)

    def step(bits, a, g, n):
        return pgd_step(a[None], g[None], n[None], PackedEpsilon(bits[None], eps.size, eps.eps, eps.eps_low), ALPHA)[0]

    assert_same(vmap(step)(eps.bits, x_adv, gradient, x), pgd_step(x_adv, gradient, x, eps, ALPHA))
    expected = pgd_step(x_adv, gradient, x, EPS, ALPHA)
    assert_same(vmap(lambda a, g, n: pgd_step(a[None], g[None], n[None], EPS, ALPHA)[0])(x_adv, gradient, x), expected)


def test_vmap_of_whole_batches_in_any_layout(backend):
    """An ensemble's (B,N,C,H,W), and a batch that is channels_last under the mapped dimension."""
    x_adv, gradient, x, eps = images(backend.device, torch.float32)
    two = [torch.stack([t, t.flip(0)]) for t in (x_adv, gradient, x, eps)]
    expected = torch.stack([pgd_step(*(t[i] for t in two), ALPHA) for i in range(2)])
    assert_same(vmap(lambda *t: pgd_step(*t, ALPHA))(*two), expected)
    last = two[0].movedim(2, -1).contiguous().movedim(-1, 2)
    assert_same(vmap(lambda *t: pgd_step(*t, ALPHA))(last, *two[1:]), expected)
    nested = vmap(vmap(lambda a, g, n, e: pgd_step(a[None], g[None], n[None], e[None], ALPHA)[0]))(*two)
    assert_same(nested, expected)
    empty = vmap(lambda a: pgd_step(a, a, a, EPS, ALPHA))(x[:, :0, None].movedim(2, 1).expand(2, 1, 0, 3, 4))
    assert empty.shape == (2, 1, 0, 3, 4)


MAPPED = {
    "cam": lambda c: cam(c[:, None] * torch.ones(1, 4, 1, 1, device=c.device), c[:, None].expand(-1, 4, -1, -1) * 1),
    "upsample_cam": lambda c: upsample_cam(c, (5, 6)),
    "zscore": lambda c: cam_mask(c, (5, 6)),
    "released": lambda c: cam_mask(c, (5, 6), "released"),
    "quantile": lambda c: cam_mask(c, (5, 6), "quantile:0.3"),
    "epsilon_map": lambda c: epsilon_map(c, (5, 6), 0.5, 0.25),
    "soft": lambda c: epsilon_map(c, (5, 6), 0.5, 0.25, "soft"),
    "released map": lambda c: epsilon_map(c, (5, 6), 0.5, 0.25, "released"),
}


@pytest.mark.parametrize("op", MAPPED)
def test_vmap_of_maps(backend, op):
    c = torch.rand(3, 2, 3, 4, device=backend.device)
    assert_same(vmap(MAPPED[op])(c), per_sample(MAPPED[op], c))
    assert_same(vmap(MAPPED[op], in_dims=1)(c), per_sample(MAPPED[op], c.movedim(1, 0)))


@every_step
def test_nestings_of_torch_func(backend, op):
    x_adv, _, x, eps = images(backend.device)
    ours, plain = steps(eps)[op]
    weight = torch.randn_like(x)

    def results(function):
        def one(a, n, e, w):
            return (function(a, n, e) * w).sum() ** 2

        first = grad(one, argnums=(0, 1, 2))
        return [
            *first(x_adv, x, eps, weight),
            jacrev(lambda e: function(x_adv, x, e).sum((1, 2, 3)))(eps),
            jacfwd(lambda e: function(x_adv, x, e).sum((1, 2, 3)))(eps),
            hessian(lambda e: one(x_adv, x, e, weight))(eps),
            jacrev(jacrev(lambda e: one(x_adv, x, e, weight)))(eps),
            jvp(lambda e: grad(one, argnums=2)(x_adv, x, e, weight), (eps,), (eps,))[1],
            grad(lambda e: jvp(lambda t: one(x_adv, x, t, weight), (e,), (e,))[1])(eps),
        ]

    for number, (got, wanted) in enumerate(zip(results(ours), results(plain), strict=True)):
        torch.testing.assert_close(got, wanted, msg=lambda text, number=number: f"{number}: {text}")


def test_gradients_per_sample(backend):
    """vmap of grad: every sample's own gradient for its own eps, and the same from one batch."""
    x_adv, gradient, x, eps = images(backend.device)

    def loss(a, g, n, e):
        return pgd_step(a[None], g[None], n[None], e[None], ALPHA).square().sum()

    got = vmap(grad(loss, argnums=(0, 2, 3)))(x_adv, gradient, x, eps)
    leaves = [t.clone().requires_grad_() for t in (x_adv, x, eps)]
    whole = pgd_step(leaves[0], gradient, leaves[1], leaves[2], ALPHA).square().sum()
    for one, other in zip(got, torch.autograd.grad(whole, leaves), strict=True):
        torch.testing.assert_close(one, other)
    # And the gradient of a sum over a vmap.
    mapped = grad(lambda e: vmap(loss)(x_adv, gradient, x, e).sum())(eps)
    torch.testing.assert_close(mapped, got[2])


def test_grad_of_a_soft_map(backend):
    c = maps(backend.device)
    leaf = c.clone().requires_grad_()
    (expected,) = torch.autograd.grad(epsilon_map(leaf, (5, 6), 0.5, 0.25, "soft").square().sum(), leaf)
    torch.testing.assert_close(grad(lambda t: epsilon_map(t, (5, 6), 0.5, 0.25, "soft").square().sum())(c), expected)
    each = vmap(grad(lambda t: upsample_cam(t[None], (5, 6)).square().sum()))(c)
    (expected,) = torch.autograd.grad(upsample_cam(leaf, (5, 6)).square().sum(), leaf)
    torch.testing.assert_close(each, expected)


def test_gradient_argument_gets_zeros_in_every_mode(backend):
    x_adv, gradient, x, eps = images(backend.device)

    def step(g):
        return pgd_step(x_adv, g, x, eps, ALPHA)

    assert grad(lambda g: step(g).sum())(gradient).abs().sum() == 0
    assert jvp(step, (gradient,), (gradient,))[1].abs().sum() == 0


def test_in_place_with_a_tangent(backend):
    x_adv, gradient, x, eps = images(backend.device)
    expected = jvp(lambda e: pgd_step(x_adv, gradient, x, e, ALPHA), (eps,), (eps,))
    got = jvp(lambda e: pgd_step_(x_adv * torch.ones_like(e), gradient, x, e, ALPHA), (eps,), (eps,))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    with forward_ad.dual_level():
        written = x_adv.clone()
        assert pgd_step_(written, gradient, x, forward_ad.make_dual(eps, eps), ALPHA) is written
        torch.testing.assert_close(forward_ad.unpack_dual(written).tangent, expected[1])


def test_hooks_on_results_run(backend):
    x_adv, gradient, x, eps = images(backend.device)
    leaf = eps.clone().requires_grad_()
    result = pgd_step(x_adv, gradient, x, leaf, ALPHA)
    result.register_hook(lambda g: g * 3)
    (tripled,) = torch.autograd.grad(result.sum(), leaf)
    (once,) = torch.autograd.grad(pgd_step(x_adv, gradient, x, leaf, ALPHA).sum(), leaf)
    torch.testing.assert_close(tripled, 3 * once)
    assert isinstance(tripled, Tensor)


def test_attack_model_under_transforms():
    """The copy computes plainly there: the model's own derivatives of every kind."""
    net = golden_net().eval()
    copy = AttackModel(net)
    x, y = EXPECTED["x"], EXPECTED["y"]
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(net(leaf), y), leaf)
    got = grad(lambda t: F.cross_entropy(copy(t), y))(x)
    # BatchNorm is folded: the same sums in another order.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    each = vmap(grad(lambda t, label: F.cross_entropy(copy(t[None]), label[None])))(x, y) / len(x)
    torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(vmap(copy)(x[:, None])[:, 0], net(x), rtol=1e-4, atol=1e-5)
    for got, wanted in zip(jvp(copy, (x,), (x,)), jvp(net, (x,), (x,)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
