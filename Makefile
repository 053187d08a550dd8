# Needs Python 3.11 with pip and venv, make and g++. Everything else goes into .venv.
#   TORCH_INDEX=URL   take torch from this package index (for instance CPU wheels)
#   BENCH=NAME        which file of benchmarks/ `make bench` runs, all when empty; ARGS="..." goes to it

PYTHON ?= python3
TORCH_INDEX ?=
BENCH ?=
ARGS ?=
BENCHES := $(filter-out common cases packed_values peers same_bytes make_% gpu_%,$(basename $(notdir $(wildcard benchmarks/*.py))))
GPU_BENCHES := $(filter gpu_%,$(basename $(notdir $(wildcard benchmarks/*.py))))
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: quickstart test verify check docs bench bench-gpu clean
.DEFAULT_GOAL := quickstart

quickstart: .venv/.installed
	$(BIN)/dsc run quickstart

test: .venv/.installed-dev check
	$(PYTEST) -m "not gpu and not verify and not bench"

# At most an hour: the quickstart, every engine, the long kill tests and the real clients, besides what `make test` runs.
verify: .venv/.installed-dev .venv-genai/.installed .venv-axe/.installed check
	$(PYTEST) -m "not gpu and not bench"

check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict deepseek_compress cuda_ops

docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/.installed-dev
	@set -e; for name in $(or $(BENCH),$(BENCHES)); do $(BIN)/python -m benchmarks.$$name $(ARGS); done

# From a bare checkout too: a Python with torch, and nvcc, are all it needs.
bench-gpu:
	@set -e; for name in $(or $(BENCH),$(GPU_BENCHES)); do \
	  $(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.$$name $(ARGS); done

clean:
	rm -rf .venv .venv-genai .venv-axe build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.torch: .venv/bin/python constraints.txt
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	touch $@

# Apart: onnxruntime-genai brings onnxruntime, which overwrites onnxruntime-gpu.
.venv-genai/.installed: constraints.txt
	$(PYTHON) -m venv .venv-genai
	.venv-genai/bin/python -m pip install --quiet onnxruntime-genai==0.18.0 numpy
	touch $@

# axe-core, which judges how accessible the report page is; without npm those tests skip.
.venv-axe/.installed:
	mkdir -p .venv-axe
	! command -v npm > /dev/null || npm install --silent --no-save --prefix .venv-axe axe-core@4.14.1
	touch $@

.venv/.installed: .venv/.torch pyproject.toml
	$(PIP) -e '.[tensorrt-rtx]'
	touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) -e '.[tensorrt-rtx,dev]'
	touch $@

.venv/.installed-docs: .venv/.installed
	$(PIP) -e '.[docs]'
	touch $@
