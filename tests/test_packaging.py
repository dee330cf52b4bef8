"""The build: how setup.py decides about CUDA, what the compiled libraries may depend on, what the lock pins."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import part_fast

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("part_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def fake_toolkit(
    home: Path, release: str = "13.0", archs: str = "compute_80 compute_90 compute_100 compute_120"
) -> Path:
    """A folder with an nvcc that answers what setup.py asks of one."""
    script(
        home / "bin" / "nvcc",
        f"""case "$1" in
            --dryrun) echo '#$ TOP={home}/bin/..' >&2 ;;
            --version) echo 'Cuda compilation tools, release {release}, V{release}.1' ;;
            --list-gpu-arch) printf '%s\\n' {archs} ;;
        esac""",
    )
    return home


def test_toolkit_is_found_behind_a_wrapper_on_path(setup_py, tmp_path, monkeypatch):
    toolkit = fake_toolkit(tmp_path / "cuda")
    script(tmp_path / "wrapped" / "bin" / "nvcc", f'exec "{toolkit}/bin/nvcc" "$@"')
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'wrapped' / 'bin'}:/usr/bin:/bin")
    assert setup_py.find_toolkit() == toolkit


def test_cuda_home_wins_over_path_and_is_not_replaced_when_wrong(setup_py, tmp_path, monkeypatch):
    on_path, named = fake_toolkit(tmp_path / "on_path"), fake_toolkit(tmp_path / "named")
    monkeypatch.setenv("PATH", f"{on_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(named))
    assert setup_py.find_toolkit() == named
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "absent"))
    assert setup_py.find_toolkit() is None
    assert str(tmp_path / "absent") in setup_py.why_no_cuda(None, "13.0")


def test_compiler_of_another_cuda_or_torch_without_cuda_is_refused(setup_py, tmp_path):
    toolkit = fake_toolkit(tmp_path / "cuda", release="12.6")
    assert "12.6" in setup_py.why_no_cuda(toolkit, "13.0")
    assert "without CUDA" in setup_py.why_no_cuda(toolkit, None)


@pytest.mark.parametrize(
    ("archs", "expected"),
    [
        ("compute_75 compute_80 compute_90 compute_100 compute_120", "8.0;9.0;10.0;12.0+PTX"),
        ("compute_75 compute_80 compute_90 compute_103", "8.0;9.0+PTX"),
    ],
)
def test_default_archs_are_those_the_compiler_knows(setup_py, tmp_path, archs, expected):
    assert setup_py.arch_list(fake_toolkit(tmp_path / "cuda", archs=archs)) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yes", "PART_FAST_CUDA must be auto, 0 or 1, got 'yes'"),
        ("1", "PART_FAST_CUDA=1 but part_fast._C_cuda cannot be built: no CUDA compiler (nvcc) found"),
    ],
)
def test_a_build_that_cannot_be_had_stops_with_one_line(tmp_path, value, message):
    environment = {**os.environ, "PART_FAST_CUDA": value, "CUDA_HOME": str(tmp_path)}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_compiled_library_needs_only_the_stable_abi(name):
    library = ROOT / "part_fast" / f"{name}.abi3.so"
    if not library.exists():
        pytest.skip(f"{library.name} is not built in this checkout")
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is missing")
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert {symbol for symbol in symbols if symbol.startswith(("Py", "_Py"))} == {"PyModule_Create2"}
    assert [symbol for symbol in symbols if re.match(r"_ZN?[A-Z]*K?(2at|3c10|5torch)", symbol)] == []


def test_every_declared_dependency_is_pinned():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    declared = [Requirement(text) for text in importlib.metadata.requires("part_fast") or []]
    assert {"torch", "pytest"} <= {requirement.name for requirement in declared}
    for requirement in declared:
        if requirement.name != "part_fast":
            version = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_source_distribution_holds_the_tests_and_what_they_use(monkeypatch):
    """As setuptools reads MANIFEST.in."""
    from setuptools.command.egg_info import FileList

    monkeypatch.chdir(ROOT)
    listed = FileList()
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        listed.process_template_line(line)
    packed = set(listed.files)
    wanted = [path for path in (ROOT / "tests").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    missing = {str(path.relative_to(ROOT)) for path in [*wanted, ROOT / "CONTRIBUTING.md"]} - packed
    assert not missing
    assert {"tests/tools/ptx_cpu/runtime.h", "tests/tools/triton_guard.py", "tests/golden/cam.safetensors"} <= packed


def test_package_is_marked_as_typed():
    assert resources.files("part_fast").joinpath("py.typed").is_file()


def test_version_is_the_same_everywhere():
    assert part_fast.__version__ == importlib.metadata.version("part_fast")
    assert f"## {part_fast.__version__} " in (ROOT / "CHANGELOG.md").read_text()
