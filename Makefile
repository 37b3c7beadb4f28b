# Two commands do everything on a machine with python3, make and g++:
#   make demo    train on real images with wrong labels, compare the rules
#   make test    the test suite, and every benchmark once
# and make experiment ARGS=linear reproduces a paper's result.
# PYTHON, TORCH, NUMPY and VENV can be given, e.g. make test PYTHON=python3.12 TORCH=torch==2.13.0

PYTHON ?= python3
TORCH ?= torch==2.13.0
NUMPY ?= numpy
VENV ?= .venv
ARGS ?=
# Files side by side, one process per core with its share of the threads, in the order of
# tests/conftest.py; the tests of a file share what it compiles.
SPREAD := -n auto --dist loadfile --no-loadscope-reorder
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: demo experiment test test-all test-mutants test-oldest test-pure test-sanitize bench lint
.PHONY: types format clean sweep

# With what the commands need. torch first and by itself: the build compiles against the torch that
# is installed, whatever its version.
$(VENV)/.installed: $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13) and "htv needs Python 3.10 to 3.13")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" "$(NUMPY)" "setuptools>=77" wheel ninja pybind11
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[cli,methods]"
	touch $@

# Real models for tests/test_models.py; torch is named again so that none of them brings another.
$(VENV)/.models: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test,models]" "$(TORCH)" "$(NUMPY)"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/htv demo $(ARGS)

# A paper's result, by name; without ARGS all are listed.
experiment: $(VENV)/.installed
	$(BIN)/htv experiment $(ARGS)

test: $(VENV)/.models
	$(BIN)/python -m pytest -q -m "not slow" $(SPREAD) $(ARGS)
	$(BIN)/python -m pytest -q -n auto bench --benchmark-disable

test-all: $(VENV)/.models
	$(BIN)/python -m pytest -q $(SPREAD) $(ARGS)
	$(BIN)/python -m pytest -q -n auto bench --benchmark-disable

# One-line mistakes in how the batch is followed, each of which a test must notice; writes
# tests/results/mutants.json.
test-mutants: $(VENV)/.models
	$(BIN)/python tests/mutants/run.py $(ARGS)

# Every architecture of transformers, timm and PEFT against one example at a time, in some fifteen
# minutes; writes tests/results/zoo.json and docs/coverage.md.
sweep: $(VENV)/.models
	$(BIN)/python tests/zoo_sweep.py $(ARGS)

# The oldest supported torch, with the Triton it comes with (whose interpreter needs an older NumPy).
test-oldest:
	$(MAKE) test VENV=.venv-oldest TORCH=torch==2.11.0 NUMPY="numpy<2.4"

# No compiler, no kernels: the reference serves everything.
test-pure:
	HTV_BUILD=0 $(MAKE) test VENV=.venv-pure

# Ten minutes beyond a build of its own: the CPU kernels under ASan and UBSan, fuzzed. Needs GCC.
test-sanitize: $(VENV)/.installed
	HTV_SANITIZE=1 HTV_CUDA=0 $(BIN)/python setup.py --quiet build_ext --build-temp build/sanitize \
		--build-lib build/sanitized
	$(BIN)/python tests/sanitize/fuzz.py build/sanitized/htv/_C.abi3.so \
		--out tests/results/sanitize.json $(ARGS)

# What `htv bench` compares with; torch is named again for the same reason.
$(VENV)/.peers: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[cli,peers]" \
		"$(TORCH)" "$(NUMPY)"
	touch $@

# Everything, in some fifteen minutes on a quiet machine; the README's numbers come from bench/results.
bench: $(VENV)/.peers
	$(BIN)/htv bench --out bench/results $(ARGS)
	$(BIN)/python -m htv.bench.floors --out bench/results
	$(BIN)/python -m htv.bench.bars --all-levels --out bench/results
	$(BIN)/python -m htv.bench.breakdown resnet18 --out bench/results
	$(BIN)/python docs/fill_readme.py

# One version of clang-format: others break lines elsewhere.
CXX_FILES := $(shell find csrc tests/cuda -name '*.h' -o -name '*.cpp' -o -name '*.cu')

$(VENV)/.lint: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[cli,methods,lint]"
	touch $@

lint: $(VENV)/.lint types
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

# What users import, by `mypy --strict`; [tool.mypy] in pyproject.toml says which modules.
types: $(VENV)/.lint
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) .venv-oldest .venv-pure build dist *.egg-info htv/*.so
