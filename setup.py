"""Build of the two compiled libraries; everything else about the package is in pyproject.toml.

`part_fast._C` (CPU) is built from csrc/*.cpp where a C++ compiler is found; without one the package holds the reference
and Triton backends alone. `part_fast._C_cuda` is built from csrc/*.cu where a CUDA compiler is found too;
PART_FAST_CUDA=0 leaves it out, PART_FAST_CUDA=1 makes its absence an error. Both use only LibTorch's stable ABI and
Python's limited API, so one wheel serves many versions of torch and Python.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Distribution, Extension, setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
CUDA_MODULE = "csrc/module_cuda.cpp"
OLDEST_SETUPTOOLS = 77  # the first that reads the licence in pyproject.toml
DEFAULT_ARCHS = ("8.0", "9.0", "10.0", "12.0")

# TORCH_TARGET_VERSION 2.10 hides every stable-ABI function that torch 2.10 does not have yet.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Every backend must return the same bits, so a*b+c is never contracted to an fma. Instruction sets beyond the
# baseline are chosen at run time by function clones, hence no -march. The two -fno flags change no value: they
# only let loops with sqrt, floor or comparisons be vectorised.
CXX_FLAGS = ["-O3", "-g0", "-Wall", "-fvisibility=hidden", "-ffp-contract=off"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", *STABLE_ABI]
# PART_FAST_SANITIZE names sanitizers, such as address,undefined. Each stops the process at the first fault. Casts of
# floats that no integer holds are looked for too, which the group `undefined` leaves out. Python compiles with -fwrapv,
# under which no sum overflows.
SANITIZED_FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-fno-wrapv"]
SANITIZED_FLAGS += ["-DPF_SANITIZED", "-Wno-psabi"]
NVCC_FLAGS = ["-O3", "-fmad=false", "-Xcompiler=-ffp-contract=off,-fvisibility=hidden", "-DUSE_CUDA", *STABLE_ABI]


def files(*patterns: str) -> list[str]:
    """Paths below the project root that match any of the patterns, relative as setuptools wants them, sorted."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def why_no_cpp() -> str | None:
    """The reason why nothing can be compiled, or None if it can; then CXX names the compiler for all that compile."""
    named = os.environ.get("CXX")
    known = shlex.split(named)[:1] if named else ["c++", "g++", "clang++"]
    found = next((name for name in known if shutil.which(name)), None)
    if found is None:
        return f"no C++ compiler found: CXX={named}" if named else f"no C++ compiler ({', '.join(known)}) found on PATH"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        return f"no {header}: Python's headers are missing (on Debian the package python3-dev)"
    os.environ.setdefault("CXX", found)
    return None


def toolkit_of(nvcc: Path) -> Path | None:
    """CUDA toolkit folder that an nvcc belongs to, or None. nvcc may be a wrapper script outside the toolkit, so
    its own idea of TOP is asked for first."""
    dryrun = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.MULTILINE)
    home = Path(top[1].strip()).resolve() if top else nvcc.resolve().parents[1]
    return home if (home / "bin" / "nvcc").exists() else None


def find_toolkit() -> Path | None:
    """CUDA toolkit to build with: CUDA_HOME or CUDA_PATH, nvcc on PATH, the usual folder, the `cuda-toolkit` wheels."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return Path(named) if (Path(named) / "bin" / "nvcc").exists() else None
    on_path = shutil.which("nvcc")
    wheels = sorted(Path(sysconfig.get_path("platlib")).glob("nvidia/cu*/bin/nvcc"), reverse=True)
    for nvcc in [*([Path(on_path)] if on_path else []), Path("/usr/local/cuda/bin/nvcc"), *wheels]:
        if nvcc.exists() and (home := toolkit_of(nvcc)):
            return home
    return None


def why_no_cuda(toolkit: Path | None, torch_cuda: str | None) -> str | None:
    """The reason why `_C_cuda` cannot be built, or None if it can."""
    if toolkit is None:
        named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        where = f"below CUDA_HOME={named}" if named else "on PATH nor in /usr/local/cuda; set CUDA_HOME"
        return f"no CUDA compiler (nvcc) found {where}"
    if torch_cuda is None:
        return "the installed torch is a build without CUDA"
    version = subprocess.run([toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None or release[1] != torch_cuda.split(".")[0]:
        found = f"{release[1]}.{release[2]}" if release else "of unknown version"
        return f"nvcc in {toolkit} is CUDA {found} but torch was built with CUDA {torch_cuda}"
    return None if files("csrc/*.cu") else "csrc holds no .cu file"


def arch_list(toolkit: Path) -> str:
    """The default architectures that this nvcc knows, in TORCH_CUDA_ARCH_LIST's form, the last one also as PTX."""
    listed = subprocess.run([toolkit / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [arch for arch in DEFAULT_ARCHS if f"compute_{arch.replace('.', '')}" in listed.split()]
    return ";".join(known) + "+PTX"


class FreshBuild(build):
    """The build of a wheel from nothing: a folder of an earlier one may hold modules and libraries that are no more."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def extensions() -> tuple[list[Extension], dict[str, type]]:
    """The extension modules to build and the commands that build them."""
    mode = os.environ.get("PART_FAST_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"PART_FAST_CUDA must be auto, 0 or 1, got {mode!r}")
    if problem := why_no_cpp():
        if mode == "1":
            raise SystemExit(f"PART_FAST_CUDA=1 but part_fast._C_cuda cannot be built: {problem}")
        print(f"part_fast holds the reference and Triton backends alone: {problem}", file=sys.stderr)
        return [], {"build": FreshBuild}
    try:
        import torch
    except ImportError:
        raise SystemExit(
            "building part_fast needs torch>=2.10: install it first, or let pip isolate the build"
        ) from None

    sanitizers = os.environ.get("PART_FAST_SANITIZE", "")
    if sanitizers and mode == "1":
        raise SystemExit("PART_FAST_SANITIZE watches the CPU library alone: leave PART_FAST_CUDA=1 out")
    toolkit = None
    if mode != "0" and not sanitizers:
        toolkit = find_toolkit()
        problem = why_no_cuda(toolkit, torch.version.cuda)
        if problem and mode == "1":
            raise SystemExit(f"PART_FAST_CUDA=1 but part_fast._C_cuda cannot be built: {problem}")
        if problem:
            print(f"part_fast._C_cuda is not built: {problem}", file=sys.stderr)
            toolkit = None
    if toolkit:
        # torch.utils.cpp_extension reads both while it is imported: it takes a wrapper's folder for the toolkit,
        # and asks a GPU for its architecture, which fails where there is none.
        os.environ["CUDA_HOME"] = str(toolkit)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", arch_list(toolkit))
    # ninja from the environment of this Python, also when that environment is not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        """BuildExtension whose objects stay in build/, so that an editable install compiles only what changed too."""

        def build_extension(self, ext: Extension) -> None:
            # A folder each: an op's .cpp and .cu have one stem, so their objects would overwrite each other.
            # A build with sanitizers, which shares no object with the other, has folders of its own too.
            abi = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            suffix = f"-{sanitizers.replace(',', '-')}" if sanitizers else ""
            self.build_temp = str(ROOT / "build" / f"temp.{abi}{suffix}" / ext.name)
            super().build_extension(ext)

        def run(self) -> None:
            super().run()
            if self.inplace and not toolkit:
                for stale in ROOT.glob("part_fast/_C_cuda*.so"):
                    stale.unlink()

    watched = [f"-fsanitize={sanitizers}"] if sanitizers else []
    if "undefined" in sanitizers:
        watched.append("-fsanitize=float-cast-overflow")
    common = {"depends": files("csrc/*.h", "csrc/*.cuh", "setup.py"), "py_limited_api": True}
    cpu = CppExtension(
        "part_fast._C",
        [source for source in files("csrc/*.cpp") if source != CUDA_MODULE],
        extra_compile_args={"cxx": [*CXX_FLAGS, *(SANITIZED_FLAGS if watched else []), *watched]},
        extra_link_args=watched,
        **common,
    )
    if not toolkit:
        return [cpu], {"build": FreshBuild, "build_ext": Build}
    cuda = CUDAExtension(
        "part_fast._C_cuda",
        [CUDA_MODULE, *files("csrc/*.cu")],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        **common,
    )
    versioned = next(toolkit.glob("lib*/libcudart.so.*"), None)
    if versioned and not list(toolkit.glob("lib*/libcudart.so")):
        # The cuda-toolkit wheels ship the run-time library under its versioned name only.
        cuda.libraries[cuda.libraries.index("cudart")] = f":{versioned.name}"
        cuda.library_dirs.append(str(versioned.parent))
    return [cpu, cuda], {"build": FreshBuild, "build_ext": Build}


if __name__ == "__main__":
    if int(setuptools.__version__.partition(".")[0]) < OLDEST_SETUPTOOLS:
        if "build_ext" not in sys.argv:
            raise SystemExit(
                f"building part_fast needs setuptools>={OLDEST_SETUPTOOLS}, got {setuptools.__version__}: "
                f"pip install 'setuptools>={OLDEST_SETUPTOOLS}' ninja, or let pip isolate the build"
            )
        # Compiling in place needs none of the metadata in pyproject.toml, which an older one cannot read.
        Distribution.parse_config_files = lambda *args, **kwargs: None
    ext_modules, commands = extensions()
    setup(
        ext_modules=ext_modules,
        cmdclass=commands,
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
    )
