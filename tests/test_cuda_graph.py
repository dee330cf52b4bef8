"""CUDA graphs of attacks, on an imagined GPU: what is captured, where, when again, and what is refused."""

import copy
import pickle
import warnings

import pytest
import torch
from fake_gpu import net
from torch._subclasses.fake_tensor import FakeTensorMode

from part_fast import AttackModel, CamBudget, PackedEpsilon, checks, mma, pgd
from part_fast.attack_model.graph import MOST, Graphs

EPS, ALPHA = 0.1, 0.03


def batch(gpu, n=4, index=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 16, 16, generator=generator)
    return gpu.put(x, index), gpu.put(torch.randint(0, 4, (n,), generator=generator), index)


def attacked(gpu, index=0, graph=True, **options):
    return AttackModel(gpu.put(net(), index), cuda_graph=graph, **options)


def attack(model, x, y, **options):
    return pgd(model, x, y, **{"eps": EPS, "alpha": ALPHA, "steps": 2, "start": "zero", **options})


def same(one, other):
    assert one.device == other.device
    return torch.equal(one.inner, other.inner)


@pytest.mark.parametrize("index", [0, 1])
def test_captured_where_the_model_is(gpu, index):
    x, y = batch(gpu, index=index)
    expected = attack(attacked(gpu, index, graph=False), x, y)
    assert not same(expected, x)
    fast = attacked(gpu, index)
    for _ in range(3):
        assert same(attack(fast, x, y), expected)
    (graph,) = gpu.graphs
    assert graph.stream.device == index
    assert graph.replays == 3
    assert gpu.current == 0


def test_another_batch_and_other_weights_are_read_at_replay(gpu):
    model = gpu.put(net())
    fast, plain = AttackModel(model, cuda_graph=True), AttackModel(model)
    for seed in range(3):
        x, y = batch(gpu, seed=seed)
        assert same(attack(fast, x, y), attack(plain, x, y))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    assert len(gpu.graphs) == 1


@pytest.mark.parametrize("loss", ["kl", "margin"])
@pytest.mark.parametrize("form", ["tensor", "packed"])
def test_losses_and_eps_forms(gpu, loss, form):
    fast, plain = attacked(gpu), attacked(gpu, graph=False)
    for seed in range(2):
        x, y = batch(gpu, seed=seed)
        mask = gpu.put(torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) < 0.5)
        packed = PackedEpsilon.pack(mask, EPS, 0.01)
        eps = packed if form == "packed" else packed.dense()
        assert same(attack(fast, x, y, eps=eps, loss=loss), attack(plain, x, y, eps=eps, loss=loss))
    assert len(gpu.graphs) == 1


def test_moved_weights_are_captured_anew(gpu):
    """Other memory, which a graph that lives on would not read."""
    fast, (x, y) = attacked(gpu), batch(gpu)
    attack(fast, x, y)
    gpu.put(fast.module)  # as `.to` does
    with torch.no_grad():
        for parameter in fast.module.parameters():
            parameter.mul_(-1)
    fast._watched = []  # the copy is what was changed, not the model
    fast._versions = []
    found = attack(fast, x, y)
    fast.graphs = None
    assert same(found, attack(fast, x, y))
    assert len(gpu.graphs) == 2


def test_precision_and_kernels_chosen_later_are_captured_anew(gpu):
    from part_fast import backend

    fast, (x, y) = attacked(gpu), batch(gpu)
    attack(fast, x, y)
    with torch.autocast("cuda", torch.bfloat16):
        attack(fast, x, y)
    with backend("reference"):
        attack(fast, x, y)
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        attack(fast, x, y)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    assert len(gpu.graphs) == 4
    attack(fast, x, y)
    assert len(gpu.graphs) == 4


class Nothing:
    """A recorder of graphs that do nothing."""

    def __call__(self, run):
        run()
        return lambda: None


def test_empty_graph_is_refused(gpu):
    fast, (x, y) = attacked(gpu), batch(gpu, index=0)
    fast.graphs = Graphs(record=Nothing())
    before = x.clone()
    with pytest.raises(RuntimeError, match="a graph was captured on cuda:0, and it does nothing"):
        attack(fast, x, y, start=before)
    assert len(fast.graphs) == 0
    # An attack that may not move anything is no empty graph.
    assert same(attack(fast, x, y, eps=0.0), x)
    assert same(attack(fast, x, y, steps=0), x)


def test_graph_captured_on_another_device_is_refused(gpu, monkeypatch):
    """What happened on cuda:1 before the capture was made there."""
    monkeypatch.setattr(torch.cuda, "device_of", lambda value: gpu.device(-1))
    x, y = batch(gpu, index=1)
    with pytest.raises(RuntimeError, match="captured on cuda:1, and it does nothing"):
        attack(attacked(gpu, 1), x, y)


def test_how_it_is_captured(gpu):
    """One pool and one stream for all graphs, other than the warm-up's; NCCL's threads do not end a capture."""
    fast, (x, y) = attacked(gpu), batch(gpu)
    for steps in (1, 2):
        attack(fast, x, y, steps=steps)
    first, second = gpu.graphs
    assert first.pool == second.pool is not None
    assert first.stream is second.stream
    assert {first.mode, second.mode} == {"thread_local"}
    assert gpu.pools == 1
    attack(attacked(gpu), x, y)
    assert gpu.pools == 2  # two models may be attacked at the same time


def test_replays_follow_one_another_on_any_stream(gpu):
    fast, (x, y) = attacked(gpu), batch(gpu)
    attack(fast, x, y)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        attack(fast, x, y)
    assert gpu.streams[0] in side.waited
    attack(fast, x, y)
    assert side in gpu.streams[0].waited


def test_random_numbers_are_those_of_a_run_without_graphs(gpu):
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x + 0.1 * torch.randn_like(x))

    model, (x, y) = gpu.put(Noisy()), batch(gpu)
    found = []
    for graph in (False, True):
        torch.manual_seed(0)
        fast = AttackModel(model, cuda_graph=graph)
        found.append([attack(fast, x, y) for _ in range(2)])
    assert not same(found[0][0], found[0][1])
    assert all(same(one, other) for one, other in zip(*found, strict=True))


def test_largest_batch_per_kind_of_attack(gpu):
    """An mma's batch is k times as large: it does not keep pgd from being captured."""
    fast, (x, y) = attacked(gpu), batch(gpu)
    mma(fast, x, y, EPS, ALPHA, 2, start="zero")
    assert len(fast.graphs) == 1
    attack(fast, x, y)
    assert len(fast.graphs) == 2
    attack(fast, x[:3].clone(), y[:3].clone())  # the last batch of an epoch
    assert len(fast.graphs) == 2
    attack(fast, *batch(gpu, 5))
    assert len(fast.graphs) == 3
    replays = [graph.replays for graph in gpu.graphs]
    attack(fast, x, y)  # which is held still
    assert [graph.replays for graph in gpu.graphs] == [replays[0], replays[1] + 1, replays[2]]


@pytest.mark.parametrize("clip", [[0, 1], (0, 1), (0.0, 1.0), None])
def test_every_form_of_clip(gpu, clip):
    fast, plain, (x, y) = attacked(gpu), attacked(gpu, graph=False), batch(gpu)
    for _ in range(2):
        assert same(attack(fast, x, y, clip=clip), attack(plain, x, y, clip=clip))
    assert len(gpu.graphs) == 1


def test_no_value_is_looked_at_while_steps_are_captured(monkeypatch):
    """Not even where PART_FAST_CHECK=1 asks for it: the GPU would have to be waited for."""
    monkeypatch.setenv("PART_FAST_CHECK", "1")
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 4, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert checks.readable(x) is not capturing
    assert checks.readable(torch.zeros(2))


def test_held_graphs_are_bounded(gpu):
    fast, (x, y) = attacked(gpu), batch(gpu)
    alphas = [0.01 + 0.001 * i for i in range(MOST + 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for alpha in alphas[:MOST]:
            attack(fast, x, y, steps=1, alpha=alpha)
        assert len(fast.graphs) == MOST
        attack(fast, x, y, steps=1, alpha=alphas[0])
        attack(fast, x, y, steps=1, alpha=alphas[1])
    with pytest.warns(UserWarning, match=f"more than {MOST} CUDA graphs of this attack, each used once"):
        attack(fast, x, y, steps=1, alpha=alphas[MOST])  # in the place of the third, which nobody asked for again
    assert len(fast.graphs) == MOST
    captured = len(gpu.graphs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(fast, x, y, steps=1, alpha=alphas[0])
        attack(fast, x, y, steps=1, alpha=alphas[1])
    assert len(gpu.graphs) == captured
    with pytest.warns(UserWarning, match="each used once"):
        attack(fast, x, y, steps=1, alpha=alphas[2])
    assert len(gpu.graphs) == captured + 1


def test_too_many_graphs_of_training_are_called_so():
    def record(run):
        run()
        return run

    graphs = Graphs("this network's training", record)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for key in range(MOST):
            graphs(key, lambda x: [x + 1], torch.zeros(2))
    with pytest.warns(UserWarning, match=f"more than {MOST} CUDA graphs of this network's training, each used once"):
        graphs(MOST, lambda x: [x + 1], torch.zeros(2))


def test_replaced_graphs_are_done_before_their_memory_goes(gpu):
    fast, (x, y) = attacked(gpu), batch(gpu)
    for i in range(MOST):
        for _ in range(2):
            attack(fast, x, y, steps=1, alpha=0.01 + 0.001 * i)
    last = fast.graphs._last
    attack(fast, x, y, steps=1, alpha=0.05)
    assert last.synchronized == 1


def test_what_cannot_be_captured_says_why(gpu):
    def reads(logits, y):
        return logits.sum(1) * float(logits.detach().amax())

    fast, (x, y), stream = attacked(gpu), batch(gpu), torch.cuda.current_stream()
    said = "cuda_graph must be off for this attack, which cannot be captured: CUDA error: operation not permitted"
    with pytest.raises(RuntimeError, match=said) as error:
        attack(fast, x, y, loss=reads)
    assert "\n" not in str(error.value)
    assert len(fast.graphs) == 0
    assert torch.cuda.current_stream() is stream

    class Loss:
        __hash__ = None

        def __call__(self, logits, y):
            return logits.sum(1)

    with pytest.raises(TypeError, match="loss must be hashable where an attack is captured, got Loss"):
        attack(fast, x, y, loss=Loss())
    with pytest.raises(TypeError, match="alpha must be a number, got str"):
        attack(fast, x, y, steps=1, alpha="2/255")


def test_copies_hold_no_graphs(gpu):
    fast, (x, y) = attacked(gpu), batch(gpu)
    expected = attack(fast, x, y)
    other = copy.deepcopy(fast)
    assert (len(fast.graphs), len(other.graphs)) == (1, 0)
    assert same(attack(other, x, y), expected)
    assert gpu.graphs[0].pool != gpu.graphs[1].pool
    again = pickle.loads(pickle.dumps(fast.graphs))
    assert isinstance(again, Graphs)
    assert len(again) == 0


@pytest.mark.parametrize("options", [{}, {"method": "ensemble"}, {"rule": "soft"}], ids=str)
def test_a_budget_of_a_copy_with_graphs_is_captured_and_follows_the_weights(gpu, options):
    model = gpu.put(net())
    fast, plain = (CamBudget(AttackModel(model, cuda_graph=graph), EPS, 0.01, **options) for graph in (True, False))
    given, kept = [], []
    for seed in range(3):
        x, _ = batch(gpu, seed=seed)
        for got, expected in zip(fast.with_logits(x), plain.with_logits(x), strict=True):
            assert same(got, expected)
            given.append(got)
            kept.append(got.clone())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    assert len(gpu.graphs) == 1
    assert all(map(same, given, kept))  # what one call gave is not overwritten by the next
    assert not same(given[1], given[3])
    target = gpu.put(torch.tensor([3, 2, 1, 0]))
    assert same(fast(x, target), plain(x, target))
    assert len(gpu.graphs) == 1  # a target that is given is checked, which a graph cannot


def test_budgets_of_one_copy_have_graphs_of_their_own(gpu):
    fast = attacked(gpu)
    x, _ = batch(gpu)
    first, second = (CamBudget(fast, EPS, 0.01, target_layer=layer) for layer in ("layer4", "stem"))
    expected = CamBudget(attacked(gpu, graph=False), EPS, 0.01, target_layer="stem")(x)
    assert not same(first(x), expected)
    assert same(second(x), expected)
    assert len(gpu.graphs) == 2
