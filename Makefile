# `make help` lists the targets. Everything runs in the virtual environment VENV, made with PYTHON; every target
# installs first, which takes about a second when nothing changed.
VENV ?= .venv
PYTHON ?= python3
PART_FAST_CUDA ?= auto
PYTEST_ARGS ?=
# Processes of the tests, with a thread each; WORKERS=0 runs them in one, as -x and --pdb need.
WORKERS ?= 2
CONSTRAINTS ?= constraints.txt
# What `make test-versions` tests beside the pinned torch: the oldest that pyproject.toml allows, and 2.11. Each gets an
# environment, with a copy of the checkout in it, of 7 GB below VERSIONS.
TORCH_VERSIONS ?= 2.10 2.11
VERSIONS ?= build/versions
EXAMPLES ?= build/examples
DOCS ?= build/docs
WHEEL ?= build/wheel
GPU_ARGS ?=
# What `make sanitize` runs by each number of threads: tests of the C++ ops; with SANITIZE_ARGS=-m '' the slow too.
SANITIZED := bank_start cam cam_mask eps_step epsilon_map packed_epsilon pgd_step project_linf sanitize threads \
    uniform_start upsample_cam winograd
SANITIZE_THREADS ?= 1 2
SANITIZE_ARGS ?= -k "(cpp or winograd or sanitize) and not other_instruction_sets"
export PART_FAST_CUDA

PY := $(VENV)/bin/python
TESTED := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile
PIP := $(PY) -m pip install --disable-pip-version-check --constraint $(CONSTRAINTS)
SOURCES := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h csrc/*.cuh)
FORMATTED := $(SOURCES) $(wildcard part_fast/include/*.h examples/cpp/*.cpp tests/tools/*.cpp)
# The environment holds one checkout's editable install, so its stamp carries the checkout's path. The compiled
# libraries lie in the checkout, and so does theirs, with the way they were built.
INSTALLED := $(VENV)/part_fast$(subst /,-,$(CURDIR)).stamp
BUILT := build/built-$(PART_FAST_CUDA).stamp

.PHONY: help install build demo docs test test-slow test-examples test-wheel test-versions sanitize sanitize-threads gpu bench lint analyze format lock clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16
	@echo "Variables: VENV=$(VENV) PYTHON=$(PYTHON) PART_FAST_CUDA=$(PART_FAST_CUDA) (auto, 0, 1) PYTEST_ARGS= GPU_ARGS="

$(PY):
	$(PYTHON) -c 'import sys; sys.exit("constraints.txt needs Python 3.11 or newer: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(CONSTRAINTS) pyproject.toml | $(PY)
	$(PIP) torch setuptools wheel ninja
	$(PIP) --no-build-isolation --editable '.[dev]'
	rm -f $(VENV)/part_fast-*.stamp
	touch $@

$(BUILT): $(INSTALLED) setup.py $(SOURCES)
	$(PY) setup.py --quiet build_ext --inplace
	rm -f build/built-*.stamp
	touch $@

install: $(BUILT) ## virtual environment with pinned dependencies, part_fast in it, compiled
build: $(BUILT) ## the same: compiles what changed in csrc

demo: install ## train AT and PART on real images, evaluate both, show the table and the pictures
	$(VENV)/bin/part-fast demo --out runs/demo --overwrite

# Its environment needs neither torch nor part_fast: docstrings are read, not imported.
$(DOCS)/docs.stamp: $(CONSTRAINTS) pyproject.toml | $(PY)
	test -x $(DOCS)/bin/python || $(PY) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --disable-pip-version-check --constraint $(CONSTRAINTS) \
	    $$($(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@

docs: $(DOCS)/docs.stamp ## the documentation as a site: build/site/index.html; its environment of 0.2 GB is DOCS
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

test: install ## all tests but the slow ones, and the Triton kernels in the interpreter
	TRITON_INTERPRET=1 $(TESTED) -m interpret $(PYTEST_ARGS) || test $$? -eq 5 # 5: no test has the mark
	$(TESTED) $(PYTEST_ARGS)

test-slow: install ## the proofs that take minutes
	$(PY) -m pytest -m slow $(PYTEST_ARGS)

# An environment that adds to VENV what the examples need, and takes torch and the rest from it. The wheel of
# torchattacks 3.5.1 writes an old robustbench without `benchmark` over the other one, so that comes last.
test-examples: install ## the examples, with the libraries that they are for in an environment of 0.2 GB: EXAMPLES
	test -x $(EXAMPLES)/bin/python || $(PY) -m venv $(EXAMPLES)
	$(PY) -c 'import site; print(site.getsitepackages()[0])' \
	    > $$($(EXAMPLES)/bin/python -c 'import site; print(site.getsitepackages()[0])')/part_fast-venv.pth
	grep -v '^setuptools==' $(CONSTRAINTS) > $(EXAMPLES)/constraints.txt
	$(EXAMPLES)/bin/python -m pip install --disable-pip-version-check --constraint $(EXAMPLES)/constraints.txt \
	    $$($(PY) -c 'import tomllib; print(*(name for name in tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["examples"] if "part_fast" not in name))')
	$(EXAMPLES)/bin/python -m pip install --disable-pip-version-check --no-deps torchattacks
	$(EXAMPLES)/bin/python -m pip install --disable-pip-version-check --no-deps --force-reinstall robustbench
	$(EXAMPLES)/bin/python -m pytest -m '' tests/test_examples.py tests/test_budget.py $(PYTEST_ARGS)

# The environment takes torch and the rest from VENV, whose own part_fast pip is to ignore. The tests lie outside the checkout, so that what they import are
# the files of the wheel.
OPS := backends bank_start cam cam_mask eps_step epsilon_map packed_epsilon pgd_step project_linf uniform_start \
    upsample_cam winograd
test-wheel: install ## the tests of the ops on an installed wheel, in an environment of its own: WHEEL
	rm -rf $(WHEEL)
	$(PY) -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir $(WHEEL) .
	$(PY) -m venv --without-pip $(WHEEL)/venv
	$(PY) -c 'import site; print(site.getsitepackages()[0])' \
	    > $$($(WHEEL)/venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/part_fast-venv.pth
	$(PY) -m pip --python $(WHEEL)/venv/bin/python install --disable-pip-version-check --no-deps --ignore-installed $(WHEEL)/*.whl
	mkdir $(WHEEL)/outside
	cp -r tests pyproject.toml $(WHEEL)/outside
	cd $(WHEEL)/outside && ../venv/bin/python -c 'import part_fast; print(part_fast.__file__); assert "/venv/" in part_fast.__file__' \
	    && ../venv/bin/python -m pytest -p no:cacheprovider $(OPS:%=tests/test_%.py) $(PYTEST_ARGS)

test-versions: ## the tests on each of TORCH_VERSIONS and on the pinned torch; a log each, a line each at the end
	@failed=; mkdir -p $(VERSIONS); for version in $(TORCH_VERSIONS); do \
	    echo "torch $$version: $(VERSIONS)/torch-$$version.log"; \
	    $(MAKE) test-torch-$$version > $(VERSIONS)/torch-$$version.log 2>&1 || failed="$$failed $$version"; done; \
	echo "the pinned torch: $(VERSIONS)/pinned.log"; \
	$(MAKE) test > $(VERSIONS)/pinned.log 2>&1 || failed="$$failed pinned"; \
	grep -E '^part_fast: torch|^(=+ )?[0-9]+ (passed|failed).* in ' $(TORCH_VERSIONS:%=$(VERSIONS)/torch-%.log) $(VERSIONS)/pinned.log; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# Triton 3.6, which torch 2.10 and 2.11 ask for, interprets no loop with numpy 2.4 or newer. A new environment brings an
# older setuptools than pyproject.toml needs, and torch 2.11 takes none from 82 on.
test-torch-%: ## the tests on one more torch, such as test-torch-2.10
	mkdir -p $(VERSIONS)/torch-$*/checkout
	rm -rf $(foreach part,part_fast csrc tests,$(VERSIONS)/torch-$*/checkout/$(part)) $(VERSIONS)/torch-$*/checkout/build/*.stamp
	git ls-files -z | xargs -0 cp --preserve=timestamps --parents --target-directory=$(VERSIONS)/torch-$*/checkout
	printf '%s\n' 'torch==$*.*' 'numpy<2.4' 'setuptools>=77,<82' > $(VERSIONS)/torch-$*/constraints.new
	cd $(VERSIONS)/torch-$* && { cmp -s constraints.new constraints.txt || mv constraints.new constraints.txt; }
	$(MAKE) -C $(VERSIONS)/torch-$*/checkout test VENV=$(abspath $(VERSIONS))/torch-$* CONSTRAINTS=../constraints.txt

# The library lies in a copy of the package, and -P keeps the checkout's out of the way. Leaks are not looked for: torch
# and Python keep memory until they end. Torch is not instrumented, so what it does with a tensor is not seen. Pytest
# would keep what the sanitizers say if it captured all that goes to stderr.
sanitize: $(INSTALLED) ## the tests of the C++ ops under AddressSanitizer and UndefinedBehaviorSanitizer; needs g++
	PART_FAST_SANITIZE=address,undefined $(PY) setup.py --quiet build --build-lib build/sanitize
	@for threads in $(SANITIZE_THREADS); do echo "threads: $$threads"; \
	    OMP_NUM_THREADS=$$threads PYTHONPATH=build/sanitize ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so.6)" \
	    $(PY) -P -m pytest -q --capture=sys -p no:cacheprovider $(SANITIZED:%=tests/test_%.py) $(SANITIZE_ARGS) || exit 1; done

# Interceptors report what torch does with memory, whose threads' order is not seen, unless they are told not to; of the
# library itself `parallel_for` of csrc/cpu.h says what a parallel loop orders.
sanitize-threads: $(INSTALLED) ## the same tests, on two threads, under ThreadSanitizer; needs g++
	PART_FAST_SANITIZE=thread $(PY) setup.py --quiet build --build-lib build/sanitize-threads
	OMP_NUM_THREADS=2 PYTHONPATH=build/sanitize-threads TSAN_OPTIONS=ignore_noninstrumented_modules=1 \
	    LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libtsan.so)" \
	    $(PY) -P -m pytest -q --capture=sys -p no:cacheprovider $(SANITIZED:%=tests/test_%.py) $(SANITIZE_ARGS)

gpu: $(INSTALLED) ## everything on the GPU that is there: build for it, check, time, report; runs/gpu, 9 minutes
	$(PY) -m part_fast.gpu $(GPU_ARGS)

bench: install ## benchmarks of the ops; all cases with PYTEST_ARGS=--full
	$(PY) -m pytest benchmarks $(PYTEST_ARGS)

# Cppcheck reads no header of torch and Python, so it gets what their macros mean. What it has to say of arguments passed
# by value is left to clang-tidy, which knows the size of their types; and `|` in the place of `||` is meant, since loops
# without branches become vectors.
CPPCHECK := --std=c++20 --language=c++ --quiet --error-exitcode=1 --check-level=exhaustive --inconclusive --inline-suppr \
    --enable=warning,performance,portability --suppress=passedByValue --suppress=bitwiseOnBoolean \
    '-D__has_builtin(name)=1' '-DPyAPI_FUNC(type)=type' '-DPyMODINIT_FUNC=PyObject*' \
    '-DSTABLE_TORCH_LIBRARY_IMPL(library, key, m)=static void implement(Library& m)' \
    '-DSTABLE_TORCH_LIBRARY_FRAGMENT(library, m)=static void define(Library& m)'
# As setup.py and torch compile.
TIDY := import sysconfig, torch.utils.cpp_extension as torch, setup; \
    headers = [*torch.include_paths(), sysconfig.get_path("include")]; \
    print("-std=c++20 -Wextra -DPy_LIMITED_API=0x030A0000", *setup.CXX_FLAGS, *("-isystem" + path for path in headers))

lint: install ## ruff, mypy, clang-format, cppcheck, clang-tidy: checks only
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(FORMATTED)
	$(VENV)/bin/cppcheck $(CPPCHECK) csrc/*.cpp
	$(VENV)/bin/clang-tidy --quiet csrc/*.cpp -- $$($(PY) -c '$(TIDY)')

# What it finds that cppcheck does not is rare, and it takes minutes.
analyze: install ## clang's static analyzer on the C++ sources: 10 minutes
	$(VENV)/bin/clang-tidy --quiet --checks='-*,clang-analyzer-*' csrc/*.cpp -- $$($(PY) -c '$(TIDY)')

format: install ## rewrite the sources as `make lint` wants them
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(FORMATTED)

lock: install $(DOCS)/docs.stamp ## rewrite constraints.txt from what is installed in VENV and DOCS
	grep '^#' constraints.txt > build/constraints.txt
	{ $(PY) -m pip freeze --all --exclude-editable --exclude pip; $(DOCS)/bin/python -m pip freeze; } \
	    | LC_ALL=C sort --ignore-case --unique >> build/constraints.txt
	mv build/constraints.txt constraints.txt

clean: ## remove what was compiled, and the environments of test-versions and test-examples; VENV and runs stay
	rm -rf build dist part_fast.egg-info part_fast/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
