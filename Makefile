PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TRITON_LOWEST := .cache/triton-3.6.0
AOT_TRITONS := $(if $(filter Linux,$(shell uname -s)),$(TRITON_LOWEST)/.installed)
# The build runs in the environment itself, so that the pinned versions are the ones it sees.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-full test-gpu aot check fix wheel clean
.DEFAULT_GOAL := test

$(VENV)/.installed: constraints.txt pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools wheel
	$(INSTALL) torch
	$(INSTALL) --no-build-isolation -e '.[dev]'
	touch $@

# The main job on real data: adapts a small diffusion model to digits it has never seen.
demo: $(VENV)/.installed
	$(BIN)/kronafuse demo

# What CI runs.
test: $(VENV)/.installed $(AOT_TRITONS)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-full: $(VENV)/.installed $(AOT_TRITONS)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Kernels compiled for every architecture: a set of each kernel with both Tritons, all configurations with the pinned one.
aot: $(VENV)/.installed $(AOT_TRITONS)
	$(BIN)/python -m pytest tests/ops/test_aot.py

# On a machine with a GPU: the tests that need one, then the operators again under compute-sanitizer.
test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest tests/ops
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest tests/ops -m "not slow" -k triton

# Read-only: lint, format, types, and that the wheel builds.
check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(MAKE) wheel

fix: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

# The oldest Triton that the kernels must compile with, beside the one in the environment. It exists for Linux.
$(TRITON_LOWEST)/.installed: | $(VENV)/.installed
	rm -rf $(TRITON_LOWEST)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(TRITON_LOWEST) triton==3.6.0
	touch $@

clean:
	rm -rf build dist runs .cache *.egg-info
