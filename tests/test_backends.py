"""Choosing a backend, and what every op owes torch: opcheck, fullgraph compile, fake CUDA tensors, dispatch keys."""

import functools
import os
import subprocess
import sys
import threading

import pytest
import torch
from conftest import INTERPRETED, ROOT, assert_same, make_eps, make_images
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import part_fast
from part_fast import PackedEpsilon, backends

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# ---- every raw op, on small arguments of each kind --------------------------------------------------------------


def raw_arguments(name: str, device: str) -> list[tuple]:
    """Argument lists that raw op `name` meets."""
    cam = torch.rand(2, 3, 4, device=device)
    if name == "_cam":
        pair = torch.rand(2, 5, 3, 4, device=device), torch.randn(2, 5, 3, 4, device=device)
        last = tuple(t.to(memory_format=torch.channels_last) for t in pair)
        return [(*tensors, method) for tensors in (pair, last) for method in range(4)]
    if name == "_upsample_cam":
        return [(cam, 7, 9), (cam.double(), 3, 4), (cam[:0], 8, 8)]
    if name == "_upsample_cam_bwd":
        return [(torch.randn(2, 7, 9, device=device), cam), (torch.randn(0, 7, 9, device=device), cam[:0])]
    if name == "_cam_mask":
        return [(cam, 7, 9, rule, 5 * (rule == 2), packed) for rule in range(3) for packed in (False, True)]
    if name == "_epsilon_map":
        return [(cam, 7, 9, rule, 5 * (rule == 2), 0.5, 0.25) for rule in range(4)]
    result = []
    for memory_format in FORMATS.values():
        for form in ("float", "(N,1,H,W)", "(N,C,H,W)", "PackedEpsilon M=1", "PackedEpsilon M=C"):
            shape = (2, 3, 5, 7)
            eps, dense = make_eps(form, shape, device)
            x_adv, grad, x = (
                t.to(memory_format=memory_format) for t in make_images(shape, torch.float32, device, dense)
            )
            out = torch.randn_like(x)
            if isinstance(eps, PackedEpsilon):
                budget = (eps.bits, eps.eps, eps.eps_low)
            else:
                budget = (eps.expand(shape), 0.0, 0.0) if isinstance(eps, Tensor) else (None, eps, 0.0)
            step = (0.01, 0.0, 1.0)
            bank = torch.randint(-127, 128, (4, *shape[1:]), dtype=torch.int8, device=device)
            places = torch.tensor([(3, 1, -2, 1), (0, -1, 0, 0)], device=device)
            store = (bank, places, 1000.0) if form != "float" else (None, None, 0.0)
            result.append(
                {
                    "_project_linf": (x_adv, x, *budget),
                    "_project_linf_bwd": (out, x_adv, x, *budget),
                    "_pgd_step": (x_adv, grad, x, *budget, *step),
                    "_pgd_step_": (x_adv, grad, x, *budget, *step),
                    "_pgd_step_bwd": (out, x_adv, grad, x, *budget, *step),
                    "_uniform_start": (x, *budget, 1.5, 2**40 + 7, 0.0, 1.0),
                    "_bank_start": (x, bank, places, *budget, 0.001, 0.0, 1.0),
                    "_eps_step_": (x_adv, grad, x, *budget, 1.25, form != "(N,C,H,W)", True, 0.0, 1.0, *store),
                }[name]
            )
    return result


RAW_OPS = {
    "_cam": part_fast.ops.cam.__globals__["_cam"],
    "_upsample_cam": part_fast.ops.upsample_cam.__globals__["_upsample_cam"],
    "_upsample_cam_bwd": part_fast.ops.upsample_cam.__globals__["_upsample_cam_bwd"],
    "_cam_mask": part_fast.ops.cam_mask.__globals__["_cam_mask"],
    "_epsilon_map": part_fast.ops.epsilon_map.__globals__["_epsilon_map"],
    "_project_linf": part_fast.ops.project_linf.__globals__["_project_linf"],
    "_project_linf_bwd": part_fast.ops.project_linf.__globals__["_project_linf_bwd"],
    "_pgd_step": part_fast.ops.pgd_step.__globals__["_pgd_step"],
    "_pgd_step_": part_fast.ops.pgd_step.__globals__["_pgd_step_"],
    "_pgd_step_bwd": part_fast.ops.pgd_step.__globals__["_pgd_step_bwd"],
    "_uniform_start": part_fast.ops.uniform_start.__globals__["_uniform_start"],
    "_bank_start": part_fast.ops.bank_start.__globals__["_bank_start"],
    "_eps_step_": part_fast.ops.eps_step_.__globals__["_eps_step_"],
}
raw_ops = pytest.mark.parametrize("name", RAW_OPS)


def test_the_table_of_raw_ops_is_whole():
    defined = {
        name.removeprefix("part_fast::") for name in torch._C._dispatch_get_all_op_names() if "part_fast::" in name
    }
    for_cpus_alone = {
        name + overload for name in ("_winograd_", "_winograd_weight_") for overload in ("", ".reference")
    }  # see test_winograd.py
    assert (
        defined == {name + overload for name in RAW_OPS for overload in ("", ".reference", ".triton")} | for_cpus_alone
    )


@raw_ops
def test_opcheck(backend, name):
    """Schema, fake shapes and dtypes and strides, compiled with static and with dynamic shapes. `reference` runs here
    through the dispatcher where the compiled library is absent, which test_import.py sees to."""
    op = RAW_OPS[name].triton if backend.name == "triton" else RAW_OPS[name].compiled
    all_arguments = raw_arguments(name, backend.device)[: 1 if backend.interpreted else None]
    for number, arguments in enumerate(all_arguments):
        tests = ["test_schema", "test_faketensor"]
        if number == len(all_arguments) - 1:  # the slow one
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(op, arguments, test_utils=tests)


@raw_ops
def test_fake_describes_what_comes_out(backend, name):
    for arguments in raw_arguments(name, backend.device)[: 1 if backend.interpreted else None]:
        real = RAW_OPS[name](*arguments)
        with FakeTensorMode() as mode:
            op = getattr(torch.ops.part_fast, name).default
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
        if name in ("_pgd_step_", "_eps_step_"):
            assert real is None
            assert fake is None
            continue
        for one, other in zip(*((r,) if isinstance(r, Tensor) else r for r in (real, fake)), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert one.numel() == 0 or one.stride() == other.stride()


@raw_ops
def test_the_cpu_library_implements(name):
    if backends.why_not("cpp", "cpu"):
        pytest.skip(backends.why_not("cpp", "cpu"))
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"part_fast::{name}", "CPU")


@raw_ops
def test_the_cuda_library_implements(name):
    if backends.why_not("cuda", "cuda"):
        pytest.skip(backends.why_not("cuda", "cuda"))
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"part_fast::{name}", "CUDA")


# ---- every public op, under torch.compile and with fake CUDA tensors -----------------------------------------------


def public_calls(device: str) -> dict:
    """name: (function of tensors alone, tensors, which of them may require a gradient)."""
    pf = part_fast
    shape = (2, 3, 4, 4)
    # Sums of small binary fractions, whose sums and products are exact: compiled code may contract or reorder them.
    x = torch.randint(0, 65, shape, device=device) / 64
    x_adv = torch.randint(0, 65, shape, device=device) / 64
    grad = torch.randint(-2, 3, shape, device=device).float()
    eps = torch.randint(0, 17, (2, 1, 4, 4), device=device) / 64
    bits = torch.randint(0, 256, (2, 1, 2), device=device).to(torch.uint8)
    bank = torch.randint(-64, 65, (3, 3, 4, 4), dtype=torch.int8, device=device)
    places = torch.tensor([(2, 1, -2, 1), (0, -1, 0, 0)], device=device)
    cam = torch.randint(0, 9, (2, 2, 2), device=device).float()
    cam[:, 0, 0], cam[:, 1, 1] = 0, 8
    activation, gradient = torch.rand(2, 5, 2, 2, device=device), torch.randn(2, 5, 2, 2, device=device)

    def packed(bits):
        return PackedEpsilon(bits, (4, 4), 0.25, 0.125)

    return {
        "cam": (lambda a, g: pf.cam(a, g, "layercam"), (activation, gradient), ()),
        "upsample_cam": (lambda c: pf.upsample_cam(c, (4, 4)), (cam,), (0,)),
        "cam_mask": (lambda c: pf.cam_mask(c, (4, 4)), (cam,), ()),
        "cam_mask quantile": (lambda c: pf.cam_mask(c, (4, 4), "quantile:0.3"), (cam,), ()),
        "epsilon_map": (lambda c: pf.epsilon_map(c, (4, 4), 0.25, 0.125, "released"), (cam,), ()),
        "epsilon_map soft": (lambda c: pf.epsilon_map(c, (4, 4), 0.25, 0.125, "soft"), (cam,), (0,)),
        "epsilon_map learned": (lambda c, e: pf.epsilon_map(c, (4, 4), e, 0.0), (cam, eps), (1,)),
        "packed_epsilon_map": (lambda c: pf.packed_epsilon_map(c, (4, 4), 0.25, 0.125).bits, (cam,), ()),
        "project_linf": (pf.project_linf, (x_adv, x, eps), (0, 1, 2)),
        "project_linf packed": (lambda a, n, b: pf.project_linf(a, n, packed(b)), (x_adv, x, bits), (0, 1)),
        "pgd_step": (lambda a, g, n, e: pf.pgd_step(a, g, n, e, 0.125), (x_adv, grad, x, eps), (0, 2, 3)),
        "pgd_step float": (lambda a, g, n: pf.pgd_step(a, g, n, 0.25, 0.125), (x_adv, grad, x), (0, 2)),
        "pgd_step packed": (lambda a, g, n, b: pf.pgd_step(a, g, n, packed(b), 0.125), (x_adv, grad, x, bits), (0, 2)),
        "pgd_step clip": (
            lambda a, g, n: pf.pgd_step(a, g, n, 0.25, 0.125, ([0.25, 0.0, 0.5], 0.75)),
            (x_adv, grad, x),
            (0, 2),
        ),
        "pgd_step_ clip": (
            lambda a, g, n: pf.pgd_step_(a, g, n, 0.25, 0.125, (0.25, torch.full((3, 1, 1), 0.75, device=a.device))),
            (x_adv, grad, x),
            (),
        ),
        "pgd_step_": (lambda a, g, n, e: pf.pgd_step_(a, g, n, e, 0.125), (x_adv, grad, x, eps), ()),
        "uniform_start": (lambda n, e: pf.uniform_start(n, e, seed=7), (x, eps), ()),
        "uniform_start clip": (lambda n: pf.uniform_start(n, 0.25, 2, ([0.25, 0.0, 0.5], 0.75), seed=7), (x,), ()),
        "bank_start": (lambda n, b, p, e: pf.bank_start(n, b, p, e, scale=127 / 64), (x, bank, places, eps), ()),
        "eps_step_": (lambda a, g, n, e: pf.eps_step_(a, g, n, e, 1.25), (x_adv, grad, x, eps), ()),
        "eps_step_ bank": (
            lambda a, g, n, e, b, p: pf.eps_step_(a, g, n, e, alpha=0.125, bank=b, places=p, scale=127 / 64),
            (x_adv, grad, x, eps, bank, places),
            (),
        ),
        "eps_step_ bank clip": (
            lambda a, g, n, e, b, p: pf.eps_step_(
                a, g, n, e, 0.5, ([0.25, 0.0, 0.5], 0.75), bank=b, places=p, scale=127 / 64
            ),
            (x_adv, grad, x, eps, bank, places),
            (),
        ),
    }


PUBLIC = tuple(public_calls("cpu"))
public = pytest.mark.parametrize("call", PUBLIC)


def fresh(tensors, differentiable=()):
    return [t.clone().requires_grad_(i in differentiable) for i, t in enumerate(tensors)]


@pytest.mark.thin(5)
@public
def test_compiles_to_one_graph_once(backend, call):
    function, tensors, differentiable = public_calls(backend.device)[call]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    with torch.no_grad():
        for _ in range(3):
            given, expected_given = fresh(tensors), fresh(tensors)
            assert_same(compiled(*given), function(*expected_given))
            for one, other in zip(given, expected_given, strict=True):
                assert_same(one, other)  # written where the op writes, and nowhere else
    assert counter.frame_count == 1
    if not differentiable:
        return
    for _ in range(2):
        gradients = []
        for f in (compiled, function):
            leaves = fresh(tensors, differentiable)
            result = f(*leaves)
            weight = torch.arange(result.numel(), device=result.device).view(result.shape).to(result.dtype) / 16
            gradients.append(torch.autograd.grad(result, [leaves[i] for i in differentiable], weight))
        for one, other in zip(*gradients, strict=True):
            assert_same(one, other)
    assert counter.frame_count == 2  # with a gradient it is another graph


def test_compiled_in_place_voids_saved_values(backend):
    function, tensors, _ = public_calls(backend.device)["pgd_step_"]
    torch._dynamo.reset()
    x_adv, *others = tensors
    leaf = x_adv.clone().requires_grad_()
    product = leaf * 1
    loss = (product * product).sum()
    with torch.no_grad():
        torch.compile(function, fullgraph=True, backend="aot_eager")(product, *others)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_inductor(name):
    """One attack step on a learned budget, through the default compiler, forward and backward."""
    _, (cam, eps), _ = public_calls("cpu")["epsilon_map learned"]
    _, (x_adv, grad, x, _), _ = public_calls("cpu")["pgd_step"]

    def attack(cam, eps, x_adv):
        return part_fast.pgd_step(x_adv, grad, x, part_fast.epsilon_map(cam, (4, 4), eps, 0.0, "soft"), 0.125)

    torch._dynamo.reset()
    results = []
    with part_fast.backend(name):
        for f in (torch.compile(attack, fullgraph=True), attack):
            leaves = fresh((cam, eps, x_adv), (0, 1, 2))
            out = f(*leaves)
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # inductor may contract and reorder sums


@public
def test_fake_cuda_tensors(call):
    """The Python of every op, on tensors that claim to be CUDA's: nothing reads a value or needs a GPU."""
    function, tensors, _ = public_calls("cpu")[call]
    expected = function(*fresh(tensors))
    for memory_format in FORMATS.values():
        with FakeTensorMode(allow_non_fake_inputs=False):
            fakes = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors]
            fakes = [t.to(memory_format=memory_format) if t.shape == (2, 3, 4, 4) else t for t in fakes]
            result = function(*fakes)
        assert result.device.type == "cuda"
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
        if call.startswith(("pgd_step", "project_linf", "uniform_start", "bank_start", "eps_step_")):
            assert result.is_contiguous(memory_format=memory_format)
        else:
            assert result.is_contiguous()
        if call.startswith(("pgd_step_", "eps_step_")):
            assert result is fakes[0]


# ---- choosing --------------------------------------------------------------------------------------------------


@pytest.fixture
def _unchosen():
    before = backends._chosen
    part_fast.set_backend(None)
    yield
    part_fast.set_backend(before)


@pytest.fixture
def no_cpp(monkeypatch):
    monkeypatch.setitem(backends._missing, "cpp", "part_fast._C is not built: reinstall part_fast with a C++ compiler")


@pytest.mark.usefixtures("_unchosen")
class TestChoosing:
    def test_the_fastest_is_the_default(self, monkeypatch):
        monkeypatch.setitem(backends._missing, "cpp", None)
        assert part_fast.current_backend() == "cpp"
        assert part_fast.available_backends()[:2] == ["cpp", "reference"]

    @pytest.mark.usefixtures("no_cpp")
    def test_without_the_library_the_reference_runs(self):
        assert part_fast.current_backend() == "reference"
        assert "cpp" not in part_fast.available_backends("cpu")
        with pytest.raises(RuntimeError, match=r"^backend 'cpp' is not available: part_fast\._C is not built"):
            part_fast.set_backend("cpp")
        assert part_fast.current_backend() == "reference"

    def test_available_backends(self):
        assert "reference" in part_fast.available_backends()
        assert part_fast.available_backends("cpu") == part_fast.available_backends(torch.device("cpu"))
        assert ("triton" in part_fast.available_backends("cpu")) == INTERPRETED
        assert "cuda" not in part_fast.available_backends("cpu")
        if not torch.cuda.is_available():
            assert part_fast.available_backends("cuda") == []

    def test_order_on_a_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for name in ("triton", "cuda"):
            monkeypatch.setitem(backends._missing, name, None)
        assert part_fast.available_backends("cuda:0") == ["cuda", "triton", "reference"]
        assert part_fast.current_backend("cuda") == "cuda"
        monkeypatch.setitem(backends._missing, "cuda", "not built")
        assert part_fast.current_backend("cuda") == "triton"
        monkeypatch.setitem(backends._missing, "triton", "not installed")
        assert part_fast.current_backend("cuda") == "reference"
        assert part_fast.current_backend("cpu") != "triton"

    def test_set_and_unset(self):
        part_fast.set_backend("reference")
        assert part_fast.current_backend() == "reference"
        part_fast.set_backend(None)
        assert part_fast.current_backend() == part_fast.available_backends()[0]

    def test_inside_the_block_alone(self):
        before = part_fast.current_backend()
        with part_fast.backend("reference"):
            assert part_fast.current_backend() == "reference"
            with part_fast.backend(None):
                assert part_fast.current_backend() == before
            assert part_fast.current_backend() == "reference"
        assert part_fast.current_backend() == before

    def test_restored_after_an_exception(self):
        part_fast.set_backend("reference")
        with pytest.raises(KeyError), part_fast.backend(None):
            raise KeyError
        assert backends.chosen() == "reference"
        with pytest.raises(ValueError, match="unknown backend"), part_fast.backend("cudnn"):
            pass
        assert backends.chosen() == "reference"

    @pytest.mark.parametrize("name", ["", "CPP", "cudnn", 3])
    def test_unknown_names_the_known(self, name):
        for choose in (part_fast.set_backend, lambda name: part_fast.backend(name).__enter__()):
            with pytest.raises(
                ValueError, match=r"^set_backend: unknown backend .*; known: reference, cpp, triton, cuda$"
            ):
                choose(name)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no CUDA device")
    @pytest.mark.parametrize("built", [False, True])
    def test_cuda_without_a_gpu_says_why(self, monkeypatch, built):
        reason = None if built else "part_fast._C_cuda is not built: reinstall part_fast with a CUDA compiler"
        monkeypatch.setitem(backends._missing, "cuda", reason)
        why = "cuda takes CUDA tensors, not cpu.*no CUDA device" if built else "_C_cuda is not built.*CUDA compiler"
        with pytest.raises(RuntimeError, match=f"^backend 'cuda' is not available: .*{why}"):
            part_fast.set_backend("cuda")

    @pytest.mark.skipif(INTERPRETED, reason="in the interpreter's process triton does take CPU tensors")
    @pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device triton may be chosen for it")
    def test_triton_without_a_gpu_says_why(self, monkeypatch):
        monkeypatch.setitem(backends._missing, "triton", None)
        with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET=1.*no CUDA device"):
            part_fast.set_backend("triton")

    @pytest.mark.parametrize("name", ["cuda", "triton"])
    def test_a_backend_of_another_device_is_not_replaced(self, monkeypatch, name):
        """Chosen for a GPU, then given CPU tensors: no silent fallback."""
        if name == "triton" and INTERPRETED:
            pytest.skip("in the interpreter's process triton does take CPU tensors")
        monkeypatch.setitem(backends._missing, name, None)
        monkeypatch.setattr(backends, "_chosen", name)
        x = torch.rand(1, 1, 2, 2)
        with pytest.raises(RuntimeError, match=f"^backend '{name}' is not available: {name} takes CUDA tensors"):
            part_fast.pgd_step(x, x, x, 0.1, 0.1)

    def test_the_chosen_one_runs(self, monkeypatch):
        called = []
        raw = RAW_OPS["_cam"]
        monkeypatch.setattr(raw, "reference", lambda *a: called.append("reference") or torch.ops.part_fast._cam(*a))
        features = torch.rand(1, 2, 3, 3)
        with part_fast.backend("reference"):
            part_fast.cam(features, features)
        assert called == ["reference"]
        if "cpp" in part_fast.available_backends():
            part_fast.cam(features, features)
            assert called == ["reference"]


@pytest.mark.usefixtures("_unchosen")
class TestThreads:
    """A block's choice is its thread's; set_backend's is the process's."""

    def test_a_block_is_seen_by_its_thread_alone(self):
        """Two blocks that overlap, the outer ends first: each thread keeps its own, and nothing stays behind."""
        entered, left = threading.Event(), threading.Event()
        seen = []

        def other():
            seen.append(backends.chosen())
            with part_fast.backend(None):
                entered.set()
                assert left.wait(10)
                seen.append(backends.chosen())
            seen.append(backends.chosen())

        thread = threading.Thread(target=other)
        with part_fast.backend("reference"):
            thread.start()
            assert entered.wait(10)
            assert backends.chosen() == "reference"
        left.set()
        thread.join()
        assert seen == [None, None, None]
        assert backends.chosen() is None

    def test_set_backend_is_seen_by_every_thread(self):
        seen = []
        part_fast.set_backend("reference")
        thread = threading.Thread(target=lambda: seen.append(backends.chosen()))
        thread.start()
        thread.join()
        assert seen == ["reference"]

    @pytest.mark.parametrize("call", ["pgd_step", "project_linf", "upsample_cam", "epsilon_map soft"])
    def test_a_backward_in_another_thread_runs_on_the_backend_of_its_forward(self, call, monkeypatch):
        """As CUDA's backward does, which torch runs in a thread of its own."""
        raw = {"pgd_step": ["_pgd_step_bwd"], "project_linf": ["_project_linf_bwd"]}.get(
            call, ["_upsample_cam", "_upsample_cam_bwd"][call == "upsample_cam" :]
        )
        called = []
        for name in raw:
            plain = RAW_OPS[name].reference
            record = functools.partial(lambda name, plain, *args: called.append(name) or plain(*args), name, plain)
            monkeypatch.setattr(RAW_OPS[name], "reference", record)
        function, tensors, differentiable = public_calls("cpu")[call]
        with part_fast.backend("reference"):
            leaves = fresh(tensors, differentiable)
            loss = function(*leaves).sum()
        called.clear()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        assert called == raw
        assert leaves[differentiable[0]].grad is not None

    @pytest.mark.parametrize("traced", [True, False], ids=["torch traces blocks", "older torch"])
    def test_compiled_code_takes_the_block_of_its_thread(self, traced, monkeypatch):
        if traced and not backends._TRACES_BLOCKS:
            pytest.skip("this torch traces no ContextVar")
        monkeypatch.setattr(backends, "_TRACES_BLOCKS", traced)
        torch._dynamo.reset()
        targets = []

        def record(graph, inputs):
            targets.append([str(node.target) for node in graph.graph.nodes if "part_fast" in str(node.target)])
            return graph.forward

        x = torch.rand(1, 3, 2, 2)
        step = torch.compile(lambda x: part_fast.cam(x, x), fullgraph=True, backend=record)
        step(x)
        with part_fast.backend("reference"):
            step(x)
        step(x)
        others = threading.Thread(target=step, args=(x,))
        with part_fast.backend("reference"):
            others.start()
            others.join()
        assert len(targets) == 2
        assert len(targets[0]) == 1 if part_fast.current_backend() == "cpp" else targets[0] == []
        assert targets[1] == []


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    full = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", **environment}
    return subprocess.run([sys.executable, "-c", code], env=full, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_environment_variable():
    ran = in_a_process("import part_fast; print(part_fast.current_backend())", PART_FAST_BACKEND="reference")
    assert (ran.returncode, ran.stdout) == (0, "reference\n"), ran.stderr


def test_environment_variable_unknown():
    code = """
import part_fast, torch
x = torch.rand(1, 1, 2, 2)
print("imported")
part_fast.pgd_step(x, x, x, 0.1, 0.1)
"""
    ran = in_a_process(code, PART_FAST_BACKEND="fast")
    assert ran.returncode != 0
    assert ran.stdout == "imported\n"
    last = ran.stderr.strip().splitlines()[-1]
    known = "known: reference, cpp, triton, cuda"
    assert last == f"part_fast.errors.BadValueError: PART_FAST_BACKEND: unknown backend 'fast'; {known}"


def test_environment_variable_that_is_empty_chooses_nothing():
    ran = in_a_process("import part_fast; print(part_fast.current_backend())", PART_FAST_BACKEND="")
    assert (ran.returncode, ran.stdout) == (0, f"{part_fast.available_backends()[0]}\n"), ran.stderr


def test_environment_variable_unavailable_raises_at_the_first_op():
    code = """
import part_fast, torch
x = torch.rand(1, 1, 2, 2)
print("imported")
part_fast.pgd_step(x, x, x, 0.1, 0.1)
"""
    ran = in_a_process(code, PART_FAST_BACKEND="cuda", CUDA_VISIBLE_DEVICES="")
    assert ran.returncode != 0
    assert ran.stdout == "imported\n"
    assert (
        ran.stderr.strip()
        .splitlines()[-1]
        .startswith("part_fast.errors.CannotRunError: backend 'cuda' is not available: ")
    )


@pytest.mark.interpret
def test_interpreted_kernels_are_range_checked():
    """A kernel that accesses one element too far is caught, whatever the access, so those that pass do not."""
    import triton
    import triton.language as tl

    @triton.jit
    def copy_kernel(source, target, n, BLOCK: tl.constexpr):
        place = tl.arange(0, BLOCK)
        tl.store(target + place, tl.load(source + place, mask=place < n, other=0.0), mask=place < n - 1)

    @triton.jit
    def one_kernel(target, place, ACCESS: tl.constexpr):
        if ACCESS == "load":
            tl.store(target, tl.load(target + place))
        elif ACCESS == "store":
            tl.store(target + place, 1)
        elif ACCESS == "atomic_add":
            tl.atomic_add(target + place, 1)
        else:
            tl.atomic_cas(target + place, 0, 1)

    source, target = torch.rand(7), torch.empty(7)
    copy_kernel[(1,)](source, target, 7, BLOCK=8)
    assert torch.equal(source[:6], target[:6])
    with pytest.raises(Exception, match="create_masked_load: 1 lane"):
        copy_kernel[(1,)](source, target, 8, BLOCK=8)
    with pytest.raises(Exception, match="create_masked_store: 1 lane"):
        copy_kernel[(1,)](source, target[:5], 7, BLOCK=8)
    for access in ("load", "store", "atomic_add", "atomic_cas"):
        numbers = torch.zeros(9, dtype=torch.int32)[1:8]
        for place in (0, 6):
            one_kernel[(1,)](numbers, place, ACCESS=access)
        for place in (-1, 7):
            with pytest.raises(Exception, match="out of bounds"):
                one_kernel[(1,)](numbers, place, ACCESS=access)
