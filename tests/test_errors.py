"""Errors that the caller can mend are one type, and the builtin type of such a mistake as well."""

import ast
import inspect
import pickle

import pytest
import torch
from conftest import ROOT

import part_fast
from part_fast import cli, errors

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind is not part_fast.UsageError]

# Where the builtin type itself is raised, and why.
BUILTIN = {
    # Meant for nobody: the line stands where the program cannot come.
    ("part_fast/backends.py", "AssertionError"): 1,
    # torch's own answer to a derivative that does not exist, and a subclass of RuntimeError that callers test for.
    ("part_fast/ops/cam.py", "NotImplementedError"): 1,
    ("part_fast/ops/epsilon_map.py", "NotImplementedError"): 1,
    ("part_fast/ops/upsample_cam.py", "NotImplementedError"): 1,
    # `for eps in packed` ends at an IndexError.
    ("part_fast/ops/packed_epsilon.py", "IndexError"): 1,
    # As the operating system says it; the command line prints every OSError as one line.
    ("part_fast/models/checkpoints.py", "FileExistsError"): 1,
    ("part_fast/atomic.py", "OSError"): 1,
    ("part_fast/data/places.py", "OSError"): 2,
    # Failures of the checks themselves, which the battery writes down and goes on from.
    ("part_fast/gpu/checkout.py", "RuntimeError"): 2,
    ("part_fast/gpu/record.py", "AssertionError"): 1,
}


def raised(path) -> list[str]:
    """Names of what a file raises, or hands to others to raise: `raise X`, `raise X(...)` and `return X(...)`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        value = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
        value = value.func if isinstance(value, ast.Call) else value
        if isinstance(value, ast.Name) and value.id.endswith("Error"):
            found.append(value.id)
    return found


def test_no_builtin_error_is_raised_but_where_it_must_be():
    import builtins

    count: dict[tuple[str, str], int] = {}
    for path in sorted((ROOT / "part_fast").rglob("*.py")):
        for name in raised(path):
            if hasattr(builtins, name):
                key = (path.relative_to(ROOT).as_posix(), name)
                count[key] = count.get(key, 0) + 1
    assert count == BUILTIN


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_a_usage_error_and_one_builtin_type(kind):
    usage, builtin = kind.__bases__
    assert usage is part_fast.UsageError
    assert builtin.__module__ == "builtins"
    again = pickle.loads(pickle.dumps(kind("eps must be >= 0, got -1")))  # a process of a data loader sends it so
    assert (type(again), str(again)) == (kind, "eps must be >= 0, got -1")


def test_both_names_catch_it():
    image = torch.zeros(1, 3, 2, 2)
    for kind in (ValueError, part_fast.UsageError):
        with pytest.raises(kind, match="alpha must be finite"):
            part_fast.pgd_step(image, image, image, 0.1, float("nan"))
    for kind in (TypeError, part_fast.UsageError):
        with pytest.raises(kind, match="alpha must be a number"):
            part_fast.pgd_step(image, image, image, 0.1, "0.1")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_raises_the_same(backend):
    """Dynamo traces the checks; what they refuse comes out of the compiled function as out of the plain one."""
    torch._dynamo.reset()

    def step(x, alpha):
        return part_fast.pgd_step(x, torch.ones_like(x), x, 0.25, alpha)

    compiled = torch.compile(step, backend=backend)
    image = torch.full((1, 3, 2, 2), 0.5)
    assert torch.equal(compiled(image, 0.125), step(image, 0.125))
    assert len(torch._dynamo.explain(step)(image, 0.125).graphs) == 1
    for bad, kind in ((float("inf"), ValueError), ("0.1", TypeError)):
        said = []
        for run in (step, compiled):
            with pytest.raises(kind, match="alpha must be") as caught:
                run(image, bad)
            said.append((type(caught.value), str(caught.value)))
        assert said[0] == said[1]


def test_an_error_in_backward_keeps_its_type():
    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise errors.CannotRunError("weights have changed")

    with pytest.raises(part_fast.UsageError, match="weights have changed"):
        Refusing.apply(torch.ones(2, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("kind", [*KINDS, OSError])
def test_the_command_line_prints_it_as_one_line(kind, monkeypatch, capsys):
    def refuse():
        raise kind("device must be\n  there")

    monkeypatch.setattr("part_fast.report.environment.environment", refuse)
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "part-fast: error: device must be there\n"


@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError, KeyError, ImportError])
def test_every_other_error_keeps_its_traceback(kind, monkeypatch, capsys):
    def broken():
        raise kind("part_fast's own")

    monkeypatch.setattr("part_fast.report.environment.environment", broken)
    with pytest.raises(kind, match="part_fast's own"):
        cli.main(["info"])
    assert capsys.readouterr().err == ""
