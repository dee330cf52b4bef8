"""docs/determinism.md: the tests that it names are there, and what no other file tests."""

import ast
import re

import pytest
import torch
from conftest import ROOT

from part_fast import AttackModel
from part_fast.models import resnet18

PAGE = (ROOT / "docs" / "determinism.md").read_text()
NAMED = re.findall(r"`(tests/test_\w+\.py)::(\w+)`", PAGE)


@pytest.mark.parametrize(("file", "test"), NAMED, ids=lambda value: str(value).removeprefix("tests/"))
def test_the_tests_that_the_page_names_are_there(file, test):
    tree = ast.parse((ROOT / file).read_text())
    assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_names_a_test():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| What |")]
    assert len(rows) > 10
    assert [row for row in rows if "::test_" not in row] == []


def test_threads_change_a_network_by_rounding_at_most():
    torch.manual_seed(0)
    net = resnet18().eval()
    x = torch.rand(5, 3, 32, 32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for model in (net, AttackModel(net)):
                leaf = x.clone().requires_grad_()
                logits = model(leaf)
                found.append((logits.detach(), *torch.autograd.grad(logits.square().sum(), leaf)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(found[:2], found[2:], strict=True):
        for a, b in zip(one, other, strict=True):
            # Sums of some thousand terms, layer after layer.
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))
