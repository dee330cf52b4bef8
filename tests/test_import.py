"""`import part_fast` in processes of their own: without triton, compiled library or GPU, and what it costs."""

import os
import statistics
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

STEP = """
import torch
x = torch.full((1, 3, 4, 4), 0.5)
eps = part_fast.epsilon_map(torch.eye(4)[None], (4, 4), 0.25, 0.125)
result = part_fast.pgd_step(x, torch.ones_like(x), x, eps, 0.5)
assert sorted(set(result.flatten().tolist())) == [0.625, 0.75], result
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    dropped = ("TRITON_INTERPRET", "PART_FAST_BACKEND", "PYTHONWARNINGS")
    full = {name: value for name, value in os.environ.items() if name not in dropped}
    full |= {"PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    ran = subprocess.run(command, env=full, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr + ran.stdout
    return ran


def test_without_triton():
    code = f"""
    import sys
    sys.modules["triton"] = None  # every import of it fails
    import part_fast
    {textwrap.indent(STEP, "    ").strip()}
    assert "triton" not in part_fast.available_backends()
    try:
        part_fast.set_backend("triton")
    except RuntimeError as error:
        print(error)
    """
    assert run(code).stdout == "backend 'triton' is not available: triton is not installed: pip install triton\n"


@pytest.mark.parametrize("library", ["absent", "broken"])
def test_without_the_compiled_library(library):
    """The reference runs, and one warning says why; every raw op keeps torch's contract through the dispatcher."""
    block = {
        "absent": 'sys.modules["part_fast._C"] = sys.modules["part_fast._C_cuda"] = None',
        "broken": """
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name in ("part_fast._C", "part_fast._C_cuda"):
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise ImportError("undefined symbol: aoti_torch_what\\nmore")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Broken())
""",
    }[library]
    why = {
        "absent": r"part_fast\._C is not built: .*a C\+\+ compiler",
        "broken": r"does not load: undefined symbol: .* more",
    }
    code = f"""
import importlib.machinery, re, sys, warnings
{block}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import part_fast
messages = [str(w.message) for w in caught if "part_fast" in str(w.message)]
assert len(messages) == 1 and re.search({why[library]!r}, messages[0]), messages
assert part_fast.available_backends() == ["reference"], part_fast.available_backends()
{STEP}
for name in ("cpp", "cuda"):
    try:
        part_fast.set_backend(name)
        raise SystemExit(name)
    except RuntimeError as error:
        assert "\\n" not in str(error)
import torch
assert not torch._C._dispatch_has_kernel_for_dispatch_key("part_fast::_pgd_step", "CPU")
"""
    if library == "absent":
        code += """
sys.path.insert(0, "tests")
import test_backends, conftest
for name in test_backends.RAW_OPS:
    test_backends.test_opcheck(conftest.Backend("reference", "cpu"), name)
print("opcheck of", len(test_backends.RAW_OPS))
"""
    ran = run(code)
    assert library == "broken" or ran.stdout == "opcheck of 10\n"


def test_a_gpu_that_would_run_the_reference_is_warned_of():
    """A torch for CUDA with neither the compiled library nor Triton; the other tests here have nothing said of it."""
    code = """
    import sys, warnings
    import torch
    torch.version.cuda = "13.0"
    sys.modules["triton"] = sys.modules["part_fast._C_cuda"] = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import part_fast
    print(*[w.message for w in caught if "on a GPU" in str(w.message)], sep="\\n")
    """
    said = run(code).stdout
    assert said.startswith("part_fast runs its slower reference ops on a GPU: triton is not installed"), said
    assert "part_fast._C_cuda is not built" in said
    assert said.count("\n") == 1


def test_without_a_gpu():
    code = f"""
    import torch
    assert not torch.cuda.is_available()
    import part_fast
    {textwrap.indent(STEP, "    ").strip()}
    assert part_fast.available_backends("cuda") == []
    assert not torch.cuda.is_initialized()
    """
    run(code, CUDA_VISIBLE_DEVICES="")


def test_light():
    """At most 0.3 s over `import torch`, in processor time, since the machine may be busy; and nothing heavy."""
    code = """
    import sys, time
    import torch
    before = set(sys.modules)
    start = time.process_time()
    import part_fast
    took = time.process_time() - start
    heavy = {"triton", "matplotlib", "torchvision", "PIL", "scipy", "pytorch_grad_cam", "tensorboard", "tqdm", "tyro"}
    assert not heavy & (set(sys.modules) - before), heavy & (set(sys.modules) - before)
    print(took)
    """
    times = [float(run(code).stdout) for _ in range(3)]
    assert statistics.median(times) < 0.3, times
