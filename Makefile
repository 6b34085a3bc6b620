# The short commands of this repository; `make` alone lists them. Everything lives in .venv, and every target installs
# what it needs. What gets installed is pinned in requirements/.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# The one place of this repository that holds a package index's address. Asked only when the plain index has no
# torch==…+cpu, which the public one has not.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# Any Python from 3.11 on. PYTHON=/path/to/python chooses another.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p) 2>/dev/null)))

# GPU=1 takes the CUDA build of the same engine. Once installed so, the other targets keep to it.
GPU ?= $(if $(wildcard $(VENV)/.installed-gpu),1,0)
FLAVOUR := $(if $(filter 1 yes true,$(GPU)),gpu,cpu)
LOCKS := $(FLAVOUR).txt build.txt tools.txt
STAMP := $(VENV)/.installed-$(FLAVOUR)

# Byte code is wanted here, whatever the environment says: the engine's start is mostly imports.
unexport PYTHONDONTWRITEBYTECODE
unexport PYTHONPATH

TYPED := adapters serve train tests docker $(if $(wildcard examples/*/*.py),examples) $(if $(wildcard benchmarks/*.py),benchmarks)

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: install
install: $(STAMP) ## everything into .venv (GPU=1: with the CUDA engine)

$(STAMP): pyproject.toml requirements/install.sh $(wildcard requirements/*.txt)
	@[ -n "$(PYTHON)" ] && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: Loradock needs Python 3.11 or newer; found: $$("$(or $(PYTHON),python3)" --version 2>&1 || true)." >&2; \
	    echo "Install it (Debian, Ubuntu: apt install python3.11 python3.11-venv) or say where it is: make install PYTHON=/path/to/python3.11" >&2; \
	    exit 1; }
	@# The two engines install files of the same names: never one over the other, nor over an older Python.
	@if [ -e $(VENV) ] && { [ -e $(VENV)/.installed-$(if $(filter gpu,$(FLAVOUR)),cpu,gpu) ] || ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }; then \
	    echo "making $(VENV) anew"; rm -rf $(VENV); fi
	@echo "installing into $(VENV) ($(FLAVOUR)): minutes the first time"
	@PYTHON="$(PYTHON)" TORCH_CPU_INDEX="$(TORCH_CPU_INDEX)" requirements/install.sh $(VENV) $(LOCKS)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@[ $(FLAVOUR) = gpu ] || $(BIN)/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || \
	    echo "note: the CPU engine needs the system library libnuma.so.1 (Debian, Ubuntu: apt install libnuma1)" >&2
	@touch $@

.PHONY: quickstart
quickstart: $(STAMP) ## a base from scratch, three fine-tunes, pushed, served and asked; stays up until Ctrl-C
	@$(BIN)/python examples/quickstart/run.py $(ARGS)

.PHONY: quickstart-check
quickstart-check: $(STAMP) ## the same on a free port, with its promises asserted; exits
	@$(BIN)/python examples/quickstart/run.py --check $(ARGS)

.PHONY: test
test: $(STAMP) ## unit tests and tests against a real engine (ARGS="-k name" goes to pytest)
	@$(BIN)/python -m pytest $(if $(filter cpu,$(FLAVOUR)),-m "not gpu") $(ARGS)

.PHONY: check
check: $(STAMP) ## ruff and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy $(TYPED)

.PHONY: format
format: $(STAMP) ## ruff: format and mend what can be mended
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

.PHONY: bench
bench: $(STAMP) ## benchmarks: tables, then one JSON line each (BENCH=multi_adapter: that one; ARGS goes to it)
	@shopt -s nullglob; found=0; for file in benchmarks/$(or $(BENCH),*).py; do found=1; $(BIN)/python $$file $(ARGS); done; \
	    [ $$found = 1 ] || { echo "no benchmarks/$(or $(BENCH),*).py" >&2; exit 1; }

.PHONY: bench-gateway
bench-gateway: $(STAMP) ## the gateway beside vllm-router and LiteLLM, each installed in an environment of its own
	@$(BIN)/python benchmarks/gateway_overhead.py --others $(VENV)/other-gateways $(ARGS)

.PHONY: image-cpu image-gpu
image-cpu: ## builds the CPU image (BUILD="buildah build" or another builder)
	@$(or $(BUILD),docker build) -f docker/Dockerfile.cpu --build-arg TORCH_CPU_INDEX="$(TORCH_CPU_INDEX)" -t loradock:cpu .
image-gpu: ## builds the GPU image
	@$(or $(BUILD),docker build) -f docker/Dockerfile -t loradock:gpu .

.PHONY: docker-check
docker-check: $(STAMP) ## builds both images without a daemon, runs the CPU one, pushes to it, restarts it
	@TORCH_CPU_INDEX="$(TORCH_CPU_INDEX)" PYTHON="$(BIN)/python" docker/check.sh $(ARGS)

.PHONY: lock
lock: ## makes the lock files again (UPGRADE=1: with the newest versions)
	@PYTHON="$(PYTHON)" TORCH_CPU_INDEX="$(TORCH_CPU_INDEX)" UPGRADE="$(UPGRADE)" requirements/lock.sh
