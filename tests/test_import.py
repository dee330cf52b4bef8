"""`import part_fast` in processes of their own: without triton, compiled library or GPU, and what it costs.

Also what runs with torch and numpy alone, and the one line that everything else says where its package is missing.
"""

import importlib.metadata
import os
import statistics
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
    assert library == "broken" or ran.stdout == "opcheck of 13\n"


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


def modules_of(*distributions: str) -> set[str]:
    """Names to import of these distributions and of all that they require."""
    closure, todo = set(), [canonicalize_name(name) for name in distributions]
    while todo:
        name = todo.pop()
        closure.add(name)
        for requirement in map(Requirement, importlib.metadata.requires(name) or []):
            other = canonicalize_name(requirement.name)
            if other not in closure and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                todo.append(other)
    provided = importlib.metadata.packages_distributions()
    return {module for module, by in provided.items() if closure & {canonicalize_name(name) for name in by}}


# As if a package were not installed: no finder finds what `hide` names.
HIDING = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if hide(name.partition(".")[0]) else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Hiding, sys.meta_path)
"""


def test_torch_and_numpy_alone_do_for_the_library(tmp_path):
    """As if no other package were installed, Triton neither."""
    code = f"""
{HIDING}
allowed = sys.stdlib_module_names | {modules_of("torch", "numpy") - {"triton"} | {"part_fast"}!r}
hidden = set()
def hide(top):
    if top not in allowed:
        hidden.add(top)
    return top not in allowed
import torch
from torch import nn
import part_fast
from part_fast import data, models

path = {str(tmp_path / "weights.pt")!r}
torch.manual_seed(0)
model = models.resnet_small(num_classes=10)
torch.save({{"state_dict": {{f"module.{{key}}": value for key, value in model.state_dict().items()}}}}, path)
copy = models.load_weights(models.resnet_small(num_classes=10), path)
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), copy.state_dict().values()))

images = data.load("demo", "test").subset(4)
x, y = images.images / 255, images.labels
model.eval()
fast = part_fast.AttackModel(model)
torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
budget = part_fast.CamBudget(fast, eps=8 / 255, eps_low=7 / 255)
eps = budget(x)
packed = part_fast.PackedEpsilon.pack(eps > 7.5 / 255, 8 / 255, 7 / 255)
torch.testing.assert_close(packed.dense(), eps)
for x_adv in (
    part_fast.pgd(fast, x, y, eps, steps=2),
    part_fast.pgd(fast, x, y, packed, steps=2),
    part_fast.mma(fast, x, y, eps, 2 / 255, 2, k=2),
    part_fast.PGD(model, steps=2)(x, y),
):
    moved = (x_adv - x).abs()
    assert 0 < moved.max() and (moved <= 8 / 255 + 1e-6).all()

logits = torch.rand(4, 5, 7, 7)
evidence = part_fast.cam(logits, torch.rand(4, 5, 7, 7))
for rule in ("zscore", "released", "quantile:0.25"):
    assert part_fast.cam_mask(evidence, (28, 28), rule).any()
    part_fast.packed_epsilon_map(evidence, (28, 28), 8 / 255, 7 / 255, rule)
part_fast.project_linf(x + 1, x, 0.1)
part_fast.pgd_step_(x.clone(), torch.rand_like(x), x, eps, 0.1)
part_fast.upsample_cam(evidence.requires_grad_(), (28, 28)).sum().backward()

optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for loss in (part_fast.trades_loss, part_fast.mart_loss):
    value = loss(model, x, y, optimizer, 2 / 255, budget, 2, 6.0)
    value.backward()
    assert value.isfinite()
for name in ("part_fast.attacks", "part_fast.losses", "part_fast.budgets", "part_fast.config", "part_fast.precision"):
    __import__(name)
from part_fast.report.environment import environment, environment_text
environment_text(environment())
assert "triton" in hidden and not hidden & set(sys.modules), hidden
print("done")
"""
    assert run(code).stdout == "done\n"


# The module that is missing, its name for pip, the extra, and the command lines that need it.
MISSING = [
    ("tyro", "tyro", "train", [["train", "--out", "OUT"], ["demo", "--out", "OUT"], ["--help"]]),
    (
        "tqdm",
        "tqdm",
        "train",
        [["train", "--out", "OUT"], ["evaluate", "RUN", "--out", "OUT"], ["bench", "ops", "--out", "OUT", "--quick"]],
    ),
    (
        "safetensors",
        "safetensors",
        "train",
        [["train", "--out", "OUT"], ["evaluate", "RUN", "--out", "OUT"], ["demo", "--out", "OUT"]],
    ),
    (
        "matplotlib",
        "matplotlib",
        "train",
        [
            ["train", "--out", "OUT"],
            ["masks", "RUN", "--out", "OUT/grid.png"],
            ["bench", "ops", "--out", "OUT", "--quick"],
            ["bench", "step", "--out", "OUT", "--quick"],
            ["study", "--out", "OUT"],
        ],
    ),
    ("tensorboard", "tensorboard", "train", [["train", "--tensorboard", "--out", "OUT"]]),
    (
        "PIL",
        "pillow",
        "train",
        [
            ["train", "--dataset", "folder:PICTURES", "--out", "OUT"],
            ["bench", "ops", "--out", "OUT", "--quick"],
            ["bench", "step", "--out", "OUT", "--quick"],
        ],
    ),
    (
        "pyautoattack",
        "pyautoattack",
        "aa",
        [
            ["evaluate", "RUN", "--attacks", "natural,aa", "--out", "OUT"],
            ["reproduce", "--table", "cifar10", "--scale", "small", "--out", "OUT"],
        ],
    ),
    ("scipy", "scipy", "study", [["study", "--out", "OUT"]]),
    (
        "torchvision",
        "torchvision",
        "download",
        [["train", "--dataset", "cifar10", "--root", "EMPTY", "--download", "--out", "OUT"]],
    ),
]


def test_a_missing_package_is_one_line_before_anything_is_written(tmp_path):
    from PIL import Image

    for name in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(path)
    (tmp_path / "empty").mkdir()
    cases = [
        (module, package, extra, [word.replace("OUT", str(tmp_path / "out")) for word in line])
        for module, package, extra, lines in MISSING
        for line in lines
    ]
    places = {"RUN": "run", "PICTURES": "pictures", "EMPTY": "empty"}
    for *_, line in cases:
        for word, folder in places.items():
            line[:] = [argument.replace(word, str(tmp_path / folder)) for argument in line]
    code = f"""
{HIDING}
import contextlib, io, pathlib
missing = None
def hide(top):
    return top == missing
import torch, part_fast, tensorboard, torch.utils.tensorboard
wings = ("cli", "__main__", "training", "evaluation", "experiments", "report", "data", "bench")

def ran(module, line):
    global missing
    missing = module
    for name in list(sys.modules):
        top, _, rest = name.partition(".")
        if top == module or name == "torch.utils.tensorboard" or (top == "part_fast" and rest.split(".")[0] in wings):
            del sys.modules[name]
    sys.argv = ["part-fast", *line]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        from part_fast.__main__ import main
        return main(), said.getvalue()

for module, package, extra, line in {cases!r}:
    code, said = ran(module, line)
    said = "".join(row for row in said.splitlines(True) if "warning:" not in row)
    assert code == 2, (module, line, code, said)
    assert said.count("\\n") == 1, (module, line, said)
    assert said.startswith(f"part-fast: error: part_fast needs the package {{package}} for this ("), (line, said)
    assert f": pip install {{package}}" in said and f"pip install '.[{{extra}}]'" in said, (module, line, said)
    assert (f" torch=={{torch.__version__.partition('+')[0]}}" in said) == (package == "torchvision"), said
    assert not pathlib.Path({str(tmp_path / "out")!r}).exists(), (module, line)
code, said = ran("tyro", ["info"])  # what an installation lacks is said without any package
assert code == 0 and not said, said
"""
    assert "\npart_fast " in run(code, PART_FAST_DATA=str(tmp_path / "empty")).stdout
