"""Files import downwards, and not in circles: which part of part_fast may know which, read from the source."""

import ast
import graphlib
import re

import pytest
from conftest import ROOT

# As docs/structure.md draws them, from the top: a part knows itself and all floors below. "" is part_fast/__init__.py,
# the package as users have it, which nothing but the checks on a GPU and the command line import whole.
(DRAWN,) = re.findall(r"never up:\n\n((?:    .+\n)+)", (ROOT / "docs" / "structure.md").read_text())
FLOORS = [[name.strip() for name in names.split(",")] for names in DRAWN.split(">")]
FLOORS = [["__main__", "assets"], *FLOORS[:2], [""], *FLOORS[2:]]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "part_fast").rglob("*.py"))}


def imports_of(source):
    """{module of part_fast: line} that the source imports, within functions too; "part_fast" is its __init__.py.

    `import part_fast` alone counts as the import of what is used of it, and `part_fast.__version__` as none.
    """
    found = {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name != "part_fast"]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in whole]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "part_fast":
            name = f"part_fast.{node.attr}"
            names = [] if node.attr == "__version__" else [name if name in MODULES else "part_fast"]
        found |= {name: node.lineno for name in names if name in MODULES and name not in found}
    return found


def part_of(module):
    return module.split(".")[1] if "." in module else ""


def upward(module, source):
    """What is wrong with a module's imports: a line for each that goes up."""
    return [
        f"{module}, line {line}: imports {other}, which is not below it"
        for other, line in imports_of(source).items()
        if part_of(other) != part_of(module) and FLOOR[part_of(other)] <= FLOOR[part_of(module)]
    ]


def test_every_part_has_a_floor():
    assert {part_of(module) for module in MODULES} == set(FLOOR)
    assert FLOORS[1:3] == [["cli"], ["gpu"]]


def test_an_import_never_goes_up():
    wrong = [line for module, path in MODULES.items() for line in upward(module, path.read_text())]
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_itself_by_a_detour():
    """Not even within a function: what needs that is one file, or has a third below both."""
    graph = {module: {*imports_of(path.read_text())} - {module} for module, path in MODULES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("part_fast.models.resnet", "from part_fast.attack_model.cpu import onednn"),
        ("part_fast.data.catalogue", "def f():\n    from part_fast.training import loop"),
        ("part_fast.report.files", "import part_fast.evaluation.masks as masks"),
        ("part_fast.attacks.pgd", "from part_fast import losses"),
        ("part_fast.training.step", "import part_fast\nx = part_fast.pgd"),
        ("part_fast.training.step", "from part_fast import pgd"),
        ("part_fast.checks", "if True:\n    import part_fast.ops"),
        ("part_fast.attacks.pgd", "from part_fast.budgets.cam import CamBudget"),
    ],
)
def test_imports_that_go_up_are_seen(module, source):
    assert len(upward(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("part_fast.report.environment", "import part_fast\nx = part_fast.__version__"),
        ("part_fast.bench.ops", "from part_fast import backends, checks"),
        ("part_fast.training.step", "import torch.nn\nfrom part_fast.attacks.pgd import pgd"),
        ("part_fast.gpu.ops", "import part_fast\nx = part_fast.pgd"),
    ],
)
def test_imports_that_go_down_are_not(module, source):
    assert upward(module, source) == []
