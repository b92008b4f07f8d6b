PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto
# More for pytest, for example ARGS='-k pruning'.
ARGS ?=
# Instructions that XLA may use in test-isa: AVX, AVX2 or AVX512; empty for all.
# jaxlib needs AVX.
ISA ?= AVX2
# The numerical tests.
NUMBERS := accuracy algebra block_sums direction incremental inverse kernels_xla natural products \
  pruning_robustness pruning_updates reference robustness two_words window

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 20

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-isa test-rest aot compiled gpu-check lint ruff types imports docs bench accuracy clean

help:
	@echo "make demo      run examples/quickstart.py"
	@echo "make test      run the tests and the docstring examples, except slow ones"
	@echo "make test-all  run every test, including builds of the package, the demo and experiments"
	@echo "make test-isa  run the numerical tests, fully optimized, without AVX-512"
	@echo "make test-rest run the tests that test-isa leaves out"
	@echo "make aot       compile the kernels for an H200 and a TPU v5e; neither is needed"
	@echo "make compiled  write the compiler's report on the kernels for an H200 (jax 0.12)"
	@echo "make gpu-check check the kernels on this machine's GPU in 8 minutes; installs nothing"
	@echo "make lint      run ruff, mypy and the check of the direction of imports"
	@echo "make docs      build the documentation into docs/_build"
	@echo "make bench     measure speed and memory, and write the tables and the figure"
	@echo "make accuracy  measure the accuracy figures of the documentation"
	@echo "make clean     remove the virtual environment and everything built"
	@echo
	@echo "Each command first makes $(VENV) from $(PYTHON); set VENV or PYTHON to change that."

demo: $(VENV)/.stamp-test
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.stamp-test
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.stamp-test
	$(PYTEST) $(ARGS)

# Compiles as for users, unlike the other tests: only then does XLA fuse and reorder.
test-isa: export XLA_FLAGS += $(ISA:%=--xla_cpu_max_isa=%)
test-isa: $(VENV)/.stamp-test
	$(PYTEST) --as-users-compile -m "not slow" $(NUMBERS:%=tests/test_%.py) $(ARGS)

test-rest: $(VENV)/.stamp-test
	$(PYTEST) -m "not slow" $(NUMBERS:%=--ignore=tests/test_%.py) $(ARGS)

# Uses a separate environment: it has compilers for devices that the tests must not find.
aot: $(VENV)-aot/.stamp
	$(VENV)-aot/bin/python -m pytest tests/aot/compile_*.py

compiled: $(VENV)-aot/.stamp
	$(VENV)-aot/bin/python benchmarks/compiled.py

# Uses the machine's own Python, which has the packages for its GPU.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

lint: ruff types imports

ruff: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.stamp-dev
	$(BIN)/mypy

imports: $(VENV)/.stamp-dev
	$(BIN)/lint-imports

docs: $(VENV)/.stamp-docs
	$(BIN)/sphinx-build -W --keep-going -E -b html docs docs/_build/html

bench: $(VENV)/.stamp-bench
	$(BIN)/python benchmarks/bench.py

accuracy: $(VENV)/.stamp-test
	$(BIN)/python benchmarks/accuracy.py

clean:
	rm -rf $(VENV) $(VENV)-aot build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache \
	  .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A Python without ensurepip (Debian's without python3-venv) can still fill a new
# environment with its own pip.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(VENV)/bin/python install pip; }

$(VENV)/.stamp-test: EXTRAS := test,examples
$(VENV)/.stamp-dev: EXTRAS := dev
$(VENV)/.stamp-docs: EXTRAS := docs
$(VENV)/.stamp-bench: EXTRAS := bench
$(VENV)/.stamp-aot: EXTRAS := test,aot

$(VENV)/.stamp-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[$(EXTRAS)]'
	@touch $@

$(VENV)-aot/.stamp: pyproject.toml
	$(MAKE) VENV=$(VENV)-aot $(VENV)-aot/.stamp-aot
	@touch $@
