"""The build: how setup.py decides about CUDA, what the compiled libraries may depend on, what the lock pins."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch._C import parse_schema

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
    of_python = {tuple(line.split()[-2:]) for line in listed.stdout.splitlines() if "Py" in line}
    asks = {("w", "Py_IsInitialized")} if name == "_C" else set()
    # Weak, since a program without Python loads the library too.
    assert of_python == {("w", "PyModule_Create2"), *asks}
    assert [symbol for symbol in symbols if re.match(r"_ZN?[A-Z]*K?(2at|3c10|5torch)", symbol)] == []


def test_every_declared_dependency_is_pinned():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    declared = [Requirement(text) for text in importlib.metadata.requires("part_fast") or []]
    assert {"torch", "pytest"} <= {requirement.name for requirement in declared}
    for requirement in declared:
        # The examples have an environment of their own, with the current version of each library.
        if requirement.name != "part_fast" and "examples" not in str(requirement.marker):
            version = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} against {version}"


def named_by_the_manifest(monkeypatch) -> set[str]:
    """The files of MANIFEST.in, as setuptools reads it."""
    from setuptools.command.egg_info import FileList

    monkeypatch.chdir(ROOT)
    listed = FileList()
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        listed.process_template_line(line)
    return set(listed.files)


def test_source_distribution_holds_the_tests_and_what_they_use(monkeypatch):
    packed = named_by_the_manifest(monkeypatch)
    wanted = [path for path in (ROOT / "tests").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    missing = {str(path.relative_to(ROOT)) for path in [*wanted, ROOT / "CONTRIBUTING.md"]} - packed
    assert not missing
    assert {"tests/tools/ptx_cpu/runtime.h", "tests/tools/triton_guard.py", "tests/golden/cam.safetensors"} <= packed


def test_source_distribution_holds_every_file_of_the_repository(monkeypatch):
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no checkout by git, or git is missing")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    # Setuptools packs these by itself: the modules, their data by pyproject.toml, and what builds them.
    by_itself = re.compile(
        r"part_fast/(.*\.py|assets/.*|report/.*\.html|py\.typed)|pyproject\.toml|setup\.py|MANIFEST\.in"
    )
    packed = named_by_the_manifest(monkeypatch)
    left_out = {
        path
        for path in listed.stdout.split("\0")
        if path and (ROOT / path).exists() and path not in packed and not by_itself.fullmatch(path)
    }
    assert {"csrc/schemas.cpp", "examples/cpp/CMakeLists.txt", "part_fast/include/part_fast.h"} <= packed
    assert {path for path in left_out if not path.startswith(".ci/")} == {".gitignore"}


def test_package_is_marked_as_typed():
    assert resources.files("part_fast").joinpath("py.typed").is_file()


def test_version_is_the_same_everywhere():
    assert part_fast.__version__ == importlib.metadata.version("part_fast")
    assert f"## {part_fast.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def run_setup(arguments: list[str], version: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    """setup.py with these arguments, as by the setuptools of `version`."""
    pretend = "" if version is None else f"setuptools.__version__ = {version!r}; "
    code = f"import runpy, sys, setuptools; {pretend}sys.argv = {['setup.py', *arguments]!r}; "
    command = [sys.executable, "-c", code + "runpy.run_path('setup.py', run_name='__main__')"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def test_an_old_setuptools_is_one_line_and_compiles_in_place_all_the_same(tmp_path):
    done = run_setup(["dist_info"], "65.5.0", PATH=str(tmp_path))
    assert done.returncode != 0
    assert done.stderr.startswith("building part_fast needs setuptools>=77, got 65.5.0: pip install 'setuptools>=77'")
    assert done.stderr.count("\n") == 1
    assert run_setup(["build_ext", "--help"], "65.5.0", PATH=str(tmp_path), CXX="").returncode == 0


def test_without_a_compiler_one_line_says_so(setup_py, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert setup_py.why_no_cpp() == "no C++ compiler (c++, g++, clang++) found on PATH"
    monkeypatch.setenv("CXX", "no-such -O2")
    assert setup_py.why_no_cpp() == "no C++ compiler found: CXX=no-such -O2"
    compiler = script(tmp_path / "clang++", "exit 1")
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(setup_py.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python's headers are missing" in setup_py.why_no_cpp()
    (tmp_path / "Python.h").touch()
    assert setup_py.why_no_cpp() is None
    assert os.environ["CXX"] == compiler.name
    done = run_setup(["--version"], PATH=str(tmp_path / "empty"), CXX="", PART_FAST_CUDA="1")
    assert done.returncode != 0
    assert "PART_FAST_CUDA=1 but part_fast._C_cuda cannot be built: no C++ compiler" in done.stderr


def test_without_a_compiler_a_wheel_for_every_machine_holds_what_is_there_now(tmp_path):
    """Nothing of an earlier build, whose folder holds a module and a library that are no more."""
    stale = tmp_path / "build" / "lib" / "part_fast"
    stale.mkdir(parents=True)
    for name in ("no_more.py", "_C_cuda.abi3.so"):
        (stale / name).touch()
    arguments = ["egg_info", "--egg-base", str(tmp_path), "build", "--build-base", str(tmp_path / "build")]
    arguments += ["bdist_wheel", "--dist-dir", str(tmp_path), "--bdist-dir", str(tmp_path / "bdist")]
    done = run_setup(arguments, PATH=str(tmp_path), CXX="", PART_FAST_CUDA="auto")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("part_fast holds the reference and Triton backends alone: no C++ compiler") == 1
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    data = {"part_fast/py.typed", "part_fast/report/page.html", "part_fast/assets/fashion-mnist-demo.npz.xz"}
    assert {"part_fast/ops/pgd_step.py", *data} <= names
    assert not [name for name in names if name.endswith((".so", "no_more.py"))]


def test_extras_bring_what_the_errors_say_and_nothing_else_is_required():
    tomllib = pytest.importorskip("tomllib", reason="this Python has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {Requirement(text).name for text in project["dependencies"]} == {
        "torch",
        "numpy",
        "typing_extensions",
        "triton",
    }
    extras = {
        name: {Requirement(text).name for text in texts} for name, texts in project["optional-dependencies"].items()
    }
    said = {
        pair
        for path in (ROOT / "part_fast").rglob("*.py")
        for pair in re.findall(r'with needs\("([\w-]+)", "(\w+)"\)', path.read_text())
    }
    assert said >= {("tyro", "train"), ("pyautoattack", "aa"), ("scipy", "study"), ("torchvision", "download")}
    assert [pair for pair in said if pair[0] not in extras[pair[1]]] == []
    everything = Requirement(project["optional-dependencies"]["all"][0]).extras
    assert everything == set(extras) - {"all", "test", "dev", "examples", "docs"}


def test_schemas_for_processes_without_python_are_those_of_python():
    text = (ROOT / "csrc" / "schemas.cpp").read_text()
    calls = re.findall(r"m\.def\(((?:\s*\"[^\"]*\")+)\);", text)
    assert len(calls) == text.count("m.def(")
    schemas = {parse_schema("part_fast::" + "".join(re.findall(r'"([^"]*)"', call))) for call in calls}
    packets = [
        name.removeprefix("part_fast::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("part_fast::") and "." not in name
    ]
    assert {str(schema) for schema in schemas} == {
        str(getattr(torch.ops.part_fast, name).default._schema) for name in packets
    }
    registered = {
        name for path in (ROOT / "csrc").glob("*.cpp") for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())
    }
    assert registered == set(packets)
