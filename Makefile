PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TRITON_LOWEST := .cache/triton-3.6.0
AOT_TRITONS := $(if $(filter Linux,$(shell uname -s)),$(TRITON_LOWEST)/.installed)
# The build runs in the environment itself, so that the pinned versions are the ones it sees.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
WHEEL := $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation
# Without a GPU to run them one instance of each CUDA kernel template says whether it compiles and what it takes.
INSTANCES := $(if $(KRONAFUSE_CUDA_INSTANCES),$(KRONAFUSE_CUDA_INSTANCES),$(if $(shell nvidia-smi -L 2>/dev/null),all,one))
# Another torch than the pinned one. 2.11 brings Triton 3.6, whose interpreter needs NumPy before 2.4.
TORCH ?= 2.15.0
OTHER_TORCH := .cache/torch-$(TORCH)
OTHER_NUMPY := $(if $(filter 2.11.%,$(TORCH)),numpy<2.4)
SOURCES := $(shell find csrc -type f -not -name '*.pyc')

.PHONY: demo test test-full test-torch test-gpu aot native emulated check fix wheel clean
.DEFAULT_GOAL := test

$(VENV)/.installed: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools wheel ninja
	$(INSTALL) torch
	KRONAFUSE_BUILD_CUDA=0 $(INSTALL) --no-build-isolation -e '.[dev]'
	touch $@

# The libraries of csrc into the package: what changed is compiled again, with what the machine has.
# `make native` looks again, so that it sees other switches; what tests need is made anew when a source changed.
native:
	rm -f $(VENV)/.native
	$(MAKE) --no-print-directory $(VENV)/.native
$(VENV)/.native: $(VENV)/.installed setup.py $(SOURCES)
	KRONAFUSE_CUDA_INSTANCES=$(INSTANCES) $(BIN)/python setup.py --quiet build_native --inplace build_ext --inplace
	touch $@

# The CUDA kernels compiled for the host, for tests without a GPU; on Linux, where there is a compiler.
emulated: $(VENV)/.emulated
$(VENV)/.emulated: $(VENV)/.installed $(SOURCES)
	if [ "$$(uname -s)" = Linux ] && command -v $${CXX:-g++} > /dev/null; then $(BIN)/python -m csrc.rules emulated; fi
	touch $@

# The main job on real data: adapts a small diffusion model to digits it has never seen.
demo: $(VENV)/.installed
	$(BIN)/kronafuse demo

# What CI runs.
test: $(VENV)/.native $(VENV)/.emulated $(AOT_TRITONS)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-full: $(VENV)/.native $(VENV)/.emulated $(AOT_TRITONS)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The operators, modules, models and formats with another torch, by hand: make test-torch TORCH=2.11.0. The libraries are
# those of the pinned one. Its environment, some 5 GB, is kept.
test-torch: $(VENV)/.native $(VENV)/.emulated $(OTHER_TORCH)/.installed
	$(OTHER_TORCH)/bin/python -m pytest -n 2 --dist worksteal -m "not slow" --ignore tests/ops/test_aot.py \
		tests/ops tests/nn tests/models tests/formats tests/test_torch_private.py

# Kernels compiled for every architecture: a set of each kernel with both Tritons, all configurations with the pinned one.
aot: $(VENV)/.installed $(AOT_TRITONS)
	$(BIN)/python -m pytest tests/ops/test_aot.py

# On a machine with a GPU: the tests that need one, then the operators again under compute-sanitizer.
test-gpu: $(VENV)/.native
	$(BIN)/python -m pytest tests/ops tests/native
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest tests/ops -m "not slow" -k triton
	for tool in memcheck racecheck initcheck synccheck; do \
		compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(BIN)/python -m pytest tests/ops tests/native -m "not slow" -k cuda || exit 1; \
	done

# Read-only: lint, format, types, and that the wheel builds.
check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	KRONAFUSE_BUILD_CUDA=0 $(WHEEL) --wheel-dir build/check .

fix: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# For this platform and every Python, with all instances of the CUDA kernels where nvcc is found.
wheel: $(VENV)/.installed
	$(WHEEL) --wheel-dir dist .

# The oldest Triton that the kernels must compile with, beside the one in the environment. It exists for Linux.
$(TRITON_LOWEST)/.installed: | $(VENV)/.installed
	rm -rf $(TRITON_LOWEST)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(TRITON_LOWEST) triton==3.6.0
	touch $@

# The pinned versions of what these tests import; what torch itself brings or forbids is not pinned.
$(OTHER_TORCH)/.installed: constraints.txt
	test -x $(OTHER_TORCH)/bin/python || $(PYTHON) -m venv $(OTHER_TORCH)
	grep -vE '^(torch|triton|setuptools$(if $(OTHER_NUMPY),|numpy))==' constraints.txt > $(OTHER_TORCH)/constraints.txt
	$(OTHER_TORCH)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OTHER_TORCH)/constraints.txt \
		'torch==$(TORCH)' '$(or $(OTHER_NUMPY),numpy)' safetensors accelerate diffusers peft transformers pytest pytest-xdist
	touch $@

clean:
	rm -rf build dist runs .cache *.egg-info kronafuse/lib kronafuse/_C.*.so $(VENV)/.native $(VENV)/.emulated
