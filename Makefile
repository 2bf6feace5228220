# make demo    the main job: trains, adapts and compares on real text      make bench     the benchmark of the README
# make test    builds everything and runs the test suite                   make wheel     dist/*.whl
# make build   only the set-up                                             make lint      ruff, clang-format
# make test-kernels    the kernels without torch: C++ tests, nvcc          make clean     removes what was built
# make emulated        where nvcc is: the CUDA kernels on the CPU as torch operators, which make test runs
# make test-floor      the suite against the oldest supported transformers and peft
# make gpu-check       all of it on a machine with an NVIDIA GPU, with its PYTHON: no .venv, no network
# make test-all        all tests: the slow ones, test-kernels and test-floor too
#
# Needs Python >= 3.11 with venv, a C++ compiler and pip's package index; everything else goes into .venv.
# Settings: PYTHON, VENV, CXX, PK_CUDA=auto|0|1, PK_CUDA_ARCHS, WORKERS (processes of the test suite), ARGS (for the
# command that is run), and pip's own.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes or more, which share the cores: threads that wait must not spin.
WORKERS ?= $(shell sh -c 'cores=$$(nproc); echo $$((cores < 8 ? cores : 8))')
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --timeout=600 -n $(WORKERS) --dist worksteal
FLOOR := transformers==5.17.0 peft==0.21.0
FLOOR_FREE := ^(transformers|peft|huggingface_hub)==
SOURCES := $(wildcard csrc csrc/* csrc/*/*)
CMAKE := $(or $(shell sh -c 'command -v cmake'),$(BIN)/cmake)
NVCC := $(shell sh -c 'PATH="$${CUDA_HOME:-/usr/local/cuda}/bin:$$PATH" command -v nvcc')
EMULATED := $(if $(filter 0,$(PK_CUDA)),,$(NVCC))
REVISION := $(shell git rev-parse --short HEAD 2>/dev/null)
export CXX
export PIP_DISABLE_PIP_VERSION_CHECK := 1
MAKEFLAGS += --no-print-directory

.PHONY: build demo test test-all emulated test-kernels test-floor gpu-check bench wheel lint clean check-machine
.DELETE_ON_ERROR:

build: $(VENV)/command

demo: build
	$(BIN)/peft-kernels demo $(ARGS)

test: build emulated $(if $(REPLACED),,$(VENV)/triton-3.6)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: build emulated $(VENV)/triton-3.6 test-kernels
	$(PYTEST) $(ARGS)
	$(MAKE) test-floor

test-floor:
	$(MAKE) test VENV=.venv-floor REPLACED="$(FLOOR)"

# Both share one build folder, and the emulator's objects in it. Without a torch the kernels are built and tested alone.
CONFIGURE = $(CMAKE) -S . -B build/cmake -DCMAKE_BUILD_TYPE=Release \
  -U'PK_CUDA*' $(if $(PK_CUDA),-DPK_CUDA=$(PK_CUDA)) $(if $(PK_CUDA_ARCHS),"-DPK_CUDA_ARCHS=$(PK_CUDA_ARCHS)") \
  -DPK_TORCH_DIR=$(abspath $(dir $(firstword $(wildcard $(VENV)/lib/python*/site-packages/torch/version.py))))

test-kernels: $(CMAKE)
	$(CONFIGURE)
	$(CMAKE) --build build/cmake --parallel $(shell nproc)
	$(dir $(CMAKE))ctest --test-dir build/cmake --output-on-failure --no-tests=error

emulated: $(VENV)/environment $(if $(EMULATED),$(CMAKE))
ifdef EMULATED
	$(CONFIGURE)
	$(CMAKE) --build build/cmake --parallel $(shell nproc) --target emulated
else
	@echo "emulated: the CUDA kernels are not built: there is no nvcc, or PK_CUDA=0"
endif

gpu-check:
	@PK_REVISION=$(or $(PK_REVISION),$(REVISION)) $(PYTHON) .ci/gpu_check.py $(ARGS)

bench: build
	$(BIN)/python benchmarks/run.py --op lora_linear --grid cpu $(ARGS)

wheel: $(VENV)/environment
	rm -rf build/lib* build/bdist*
	PK_REVISION=$(REVISION) $(BIN)/pip wheel -q --no-deps --no-build-isolation -w dist .
	@ls -l dist/*.whl

lint: $(VENV)/environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

clean:
	rm -rf build dist *.egg-info peft_kernels/*.so .pytest_cache .ruff_cache .venv*/library .venv*/command

# Three stamps in the environment: its packages are there; the libraries are newer than their sources; the command
# `peft-kernels` and the metadata are installed (the package itself is used from the tree).
$(VENV)/environment: constraints.txt | check-machine
	@echo "Installing the pinned packages into $(VENV): the first time, a minute or more"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
ifdef REPLACED
	grep -vE '$(FLOOR_FREE)' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/pip install -q -r $(VENV)/constraints.txt $(REPLACED)
else
	$(BIN)/pip install -q -r constraints.txt
endif
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install -q --no-deps triton==3.9.0
	@touch $@

$(VENV)/library: $(VENV)/environment setup.py $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(VENV)/command: $(VENV)/library pyproject.toml
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@touch $@

# The oldest Triton that is supported, beside the pinned one: test_triton.py compiles the kernels with both.
$(VENV)/triton-3.6: | $(VENV)/environment
	$(BIN)/pip install -q --no-deps --target $@ triton==3.6.0

$(BIN)/cmake: $(VENV)/environment
	$(BIN)/pip install -q cmake==4.4.4

check-machine:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "peft_kernels needs Python 3.11 or newer as '$(PYTHON)': apt-get install python3, or make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "peft_kernels sets itself up in a virtual environment: apt-get install python3-venv"; exit 1; }
	@$(CXX) --version >/dev/null 2>&1 || \
	  { echo "peft_kernels compiles C++ and found no '$(CXX)': apt-get install g++"; exit 1; }
