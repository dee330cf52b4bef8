"""What conftest.py gives the tests: arguments moved to a GPU as they are, and a choice of tests."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import BAD_MAPS, ROOT, STRIDED, Backend, on_device, strided, thin_out


@pytest.mark.parametrize("kind", STRIDED)
def test_strides_survive_the_way_to_a_gpu(gpu, kind):
    """An expanded tensor too, which `.to` makes dense and nothing can be copied into."""
    there, here = strided(kind, (2, 3, 5, 7), "cuda"), STRIDED[kind](2, 3, 5, 7)
    assert there.device.type == "cuda"
    assert (there.shape, there.stride()) == (here.shape, here.stride())
    torch.manual_seed(0)
    here = strided(kind, (2, 3, 5, 7))
    torch.manual_seed(0)
    assert torch.equal(strided(kind, (2, 3, 5, 7), "cuda").cpu(), here)


def test_bad_arguments_are_bad_on_a_gpu_too(gpu):
    for value, _, got in BAD_MAPS:
        if got.startswith("strides"):
            assert str(on_device(value, "cuda").stride()) in got
    assert on_device("zscore", "cuda") == "zscore"
    assert on_device(torch.zeros(2, device="meta"), "cuda").device.type == "meta"
    low, high = on_device((torch.zeros(4, 4), 1.0), "cuda")
    assert (low.device.type, low.shape, high) == ("cuda", (4, 4), 1.0)
    assert on_device(torch.zeros(3, requires_grad=True), "cuda").requires_grad


def item(name, backend=None, gpu=True):
    parameters = {} if backend is None else {"backend": backend}
    mark = object() if gpu else None
    return SimpleNamespace(
        nodeid=name, callspec=SimpleNamespace(params=parameters), get_closest_marker=lambda wanted: mark
    )


def test_tests_of_a_gpu_are_thinned_out():
    """Each test keeps some parameters on each backend; what is of no backend, or of a CPU, stays whole."""
    fast, slow, here = Backend("cuda", "cuda"), Backend("triton", "cuda"), Backend("cpp", "cpu")
    many = [item(f"test_a[{backend.name}-gpu-{i}]", backend) for backend in (fast, slow) for i in range(300)]
    whole = [item(f"test_a[cpp-{i}]", here, gpu=False) for i in range(9)] + [item(f"test_b[{i}]") for i in range(9)]
    items, dropped = [*many, *whole], []
    config = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: dropped.extend(items)))
    thin_out(config, items, 10)
    assert items[-18:] == whole
    for backend in ("cuda", "triton"):
        assert 15 < sum(f"[{backend}-gpu" in each.nodeid for each in items) < 50
    assert len(items) + len(dropped) == 618
    items = many[:]
    thin_out(config, items, 10**9)
    assert [each.nodeid for each in items] == ["test_a[cuda-gpu-0]", "test_a[triton-gpu-0]"]


def test_a_file_of_tests_that_needs_a_missing_package_is_skipped(tmp_path):
    """As on a machine with a GPU and without what the command line takes; another error of an import stays one."""
    (tmp_path / "tyro.py").write_text("raise ImportError('not here')\n")
    broken = tmp_path / "test_broken.py"
    broken.write_text("raise ImportError('broken')\n")
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "tests")])}

    def collected(*arguments):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-rs", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    done = collected("tests/test_sweep.py")
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout
    assert "tests/test_sweep.py:0: part_fast needs the package tyro for this (not here): pip install" in done.stdout
    assert collected("--rootdir", str(tmp_path), str(broken)).returncode == pytest.ExitCode.INTERRUPTED
