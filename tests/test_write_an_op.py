"""docs/write_an_op.md: its files, written into a copy of the checkout, pass the test that is on the page."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "write_an_op.md").read_text()
FILES = dict(re.findall(r'^```(?:python|cpp) title="(\S+)"\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture
def checkout(tmp_path):
    """What the op's test needs of the checkout, with the page's files in it."""
    for part in ("part_fast", "tests"):
        shutil.copytree(
            ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "golden", "test_*.py")
        )
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name, text in FILES.items():
        assert not (tmp_path / name).exists(), f"{name} is a file of the checkout: the page must take another name"
        (tmp_path / name).write_text(text)
    return tmp_path


def page_test(checkout, *arguments, **environment):
    """The output of the page's test in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON", "PART_FAST"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_mix.py", *arguments]
    done = subprocess.run(
        command,
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=600,
        env={**kept, "PYTHONPATH": str(checkout), **environment},
    )
    return done.returncode, done.stdout + done.stderr


def test_the_page_has_the_files_of_an_op():
    assert list(FILES) == ["part_fast/ops/mix.py", "part_fast/kernels/mix.py", "csrc/mix.cpp", "tests/test_mix.py"]


def test_its_reference_and_its_triton_kernel_pass_its_test(checkout):
    pytest.importorskip("triton", reason="triton is not installed")
    code, said = page_test(checkout, "-m", "", TRITON_INTERPRET="1")
    assert code == 0, said
    assert re.search(r"\d{2} passed", said), said


@pytest.mark.slow
def test_a_kernel_without_its_mask_is_seen(checkout):
    pytest.importorskip("triton", reason="triton is not installed")
    kernel = checkout / "part_fast" / "kernels" / "mix.py"
    kernel.write_text(FILES["part_fast/kernels/mix.py"].replace(", mask=inside)) - second)", ")) - second)"))
    assert kernel.read_text() != FILES["part_fast/kernels/mix.py"]
    code, said = page_test(checkout, "-m", "interpret", "-k", "numpy", "-x", TRITON_INTERPRET="1")
    assert code == 1, said
    assert "outside" in said, said


@pytest.mark.slow
def test_its_compiled_files_pass_its_test(checkout):
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    for library in (checkout / "part_fast").glob("_C*.so"):
        library.unlink()
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(
        build, cwd=checkout, capture_output=True, text=True, env={**os.environ, "PART_FAST_CUDA": "0"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    asked = "torch._C._dispatch_has_kernel_for_dispatch_key('part_fast::_mix', 'CPU')"
    code = f"import torch, part_fast.ops.mix; print({asked})"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stdout + done.stderr
    code, said = page_test(checkout)
    assert code == 0, said
