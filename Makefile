# `make` lists the targets. Each works from a fresh clone: the virtual environment is made on first use.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest
PARALLEL = -n $(WORKERS) --dist worksteal
CHECKED = fastflow methods networks callbacks configs tests benchmarks tools train.py
STAMP = $(VENV)/.fastflow-installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-dist test-faults test-slow test-gpu lint format types bench bench-digits bench-toy \
    docs check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make the virtual environment (.venv) with everything the targets need

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@echo "installing fastflow[$(EXTRAS)] into $(VENV): minutes the first time, seconds later"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check \
	    -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@touch $@

# Threads that wait sleep instead of spinning: on a machine with other work that is much faster.
demo: export OMP_WAIT_POLICY = passive
demo: $(STAMP) ## train a consistency model on the digits, evaluate it, compare it; minutes on a CPU
	$(VENV)/bin/fastflow train --config configs/experiments/Digits/config_cm_digits.py --run-dir runs/demo
	$(VENV)/bin/fastflow evaluate runs/demo
	$(VENV)/bin/fastflow compare runs --measured
	@echo "pictures:"; find runs/demo -name '*.png' | sort | sed 's/^/  /'

test: $(STAMP) ## the tests that need neither GPU nor patience
	$(PYTEST) -q $(PARALLEL)

test-dist: $(STAMP) ## the tests that start several processes
	$(PYTEST) -q -m "dist and not slow and not gpu and not faults"

test-faults: $(STAMP) ## the soak: hundreds of trainings killed, dozens of checkpoints damaged
	$(PYTEST) -q -m faults --timeout 3600

test-slow: $(STAMP) ## the tests that take minutes
	$(PYTEST) -q -m "slow and not gpu and not faults" --timeout 3600

test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(PYTEST) -q -m gpu --timeout 3600

lint: $(STAMP) ## style and formatting, without changing anything
	$(VENV)/bin/ruff check $(CHECKED)
	$(VENV)/bin/ruff format --check $(CHECKED)

format: $(STAMP) ## repair style and formatting
	$(VENV)/bin/ruff check --fix $(CHECKED)
	$(VENV)/bin/ruff format $(CHECKED)

types: $(STAMP) ## the type checker
	$(VENV)/bin/mypy

bench: $(STAMP) ## step, sampling and evaluation time
	$(VENV)/bin/python -m benchmarks

bench-digits: $(STAMP) ## train and measure every method on the digits, against its stated bounds
	$(VENV)/bin/python -m benchmarks.zoo configs/experiments/Digits --jobs $(WORKERS)

bench-toy: $(STAMP) ## the same on points in the plane, where the true flow map is known
	$(VENV)/bin/python -m benchmarks.zoo configs/experiments/Toy --jobs $(WORKERS)

docs: $(STAMP) ## check that links, paths and imports in the documentation hold, and follow its how-tos
	$(PYTEST) -q tests/architecture/test_docs.py

check: lint types test ## what continuous integration runs

clean: ## remove caches and build products; keeps .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
