# Every target starts from a fresh clone: the environment is a stamp, rebuilt when its inputs change.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.installed
LOWEST := .venv-lowest
# One thread: sums keep their order, so that a test can say "equal".
export OMP_NUM_THREADS := 1

# A process for each core; a file's tests stay together, for they share what is slow to make.
PYTEST := -m pytest -n auto --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo reports test test-full test-lowest check fmt bench gpu bench-diagnosis experiments experiments-quick clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(SETUP) ## Let SwiGLU diverge in FP8, then write the report that says why
	$(BIN)/fp8lab run swiglu_divergence --out runs/demo
	$(BIN)/fp8lab report runs/demo -o runs/demo/report.html

reports: demo ## Renew what reports/ holds, from a demo
	$(BIN)/fp8lab report runs/demo -o reports/swiglu_divergence.html
	$(BIN)/python -c 'from fp8lab.report import write_pictures as w; w(["runs/demo/divergence/fp8-delayed/seed-9"], "runs/demo/pictures")'
	cp runs/demo/pictures/timeline.png reports/swiglu_divergence.png

test: $(SETUP) ## Run the tests that take seconds
	$(BIN)/python $(PYTEST) -m "not slow and not long"

# A stamp a file of tests, older than what it was run on or not: a run that was stopped goes on.
SOURCES = $(shell find fp8lab experiments tests docs -type f ! -path '*/__pycache__/*')
PASSED := build/passed
test-full: $(SETUP) ## Run every test; what was stopped or failed goes on where it was
	$(MAKE) --no-print-directory --keep-going --output-sync --jobs 2 \
	  $(patsubst tests/%.py,$(PASSED)/%,$(sort $(wildcard tests/test_*.py))) $(PASSED)/experiments

.SECONDEXPANSION:
$(PASSED)/test_%: tests/test_%.py $$(SOURCES)
	@mkdir -p $(@D)
	$(BIN)/python -m pytest -q $<
	@touch $@

$(PASSED)/experiments: $$(SOURCES)
	@mkdir -p $(@D)
	$(MAKE) --no-print-directory experiments-quick
	@touch $@

test-lowest: $(LOWEST)/.installed ## Run the tests on the oldest libraries that pyproject.toml allows
	$(LOWEST)/bin/python $(PYTEST) -m "not slow"

check: $(SETUP) ## Everything a change must pass: lint, types, tests, wheel (this is CI)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python $(PYTEST) -m "not slow"
	tests/wheel_check.sh $(BIN)/python

fmt: $(SETUP) ## Format, and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(SETUP) ## Time the casts, the watching and the mitigations
	$(BIN)/python tests/bench.py
	$(BIN)/python tests/bench_mitigations.py

# What is measured lies in runs/gpu; TE's folder, if it is not installed, belongs on PYTHONPATH.
gpu: $(SETUP) ## Run the GPU suite on a Hopper (ten minutes), and write reports/gpu.md
	-$(BIN)/python experiments/gpu/run_all.py --out runs/gpu
	$(BIN)/python experiments/gpu/write_report.py runs/gpu

bench-diagnosis: $(SETUP) ## Diagnose trainings whose cause is known, and count what is right
	$(BIN)/python tests/bench_diagnosis.py

# Each experiment that has a conclusion; finished runs are kept, so that this goes on where it stopped.
EXPERIMENTS := $(sort $(notdir $(basename $(wildcard experiments/e[0-9][0-9]_*.py))))
experiments: $(SETUP) ## Run every experiment, one thread a run, and write their pages into reports/
	@for name in $(EXPERIMENTS); do echo "$$name, of $(words $(EXPERIMENTS))"; \
	  $(BIN)/fp8lab run $$name --out runs/experiments/$$name --report reports || exit 1; done
	$(BIN)/python -c 'from pathlib import Path as P; from fp8lab.lab.result import write_log as w; w(P("reports"), P("experiments/LOG.md"))'

experiments-quick: $(SETUP) ## See that every experiment runs: one seed, few steps; nothing follows
	@for name in $(EXPERIMENTS); do rm -rf runs/quick/$$name; \
	  $(BIN)/fp8lab run $$name --quick --out runs/quick/$$name --report runs/quick || exit 1; done

clean: ## Remove the environments, the build outputs and the caches; keep runs/
	rm -rf .venv $(LOWEST) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first, alone: the constraint picks its build, and nothing that follows moves it.
.venv/.installed: pyproject.toml constraints.txt
.venv-lowest/.installed: pyproject.toml constraints-lowest.txt
%/.installed:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fp8lab needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "setting up $*: torch and other libraries, some minutes"
	$(PYTHON) -m venv $*
	$*/bin/pip install -q -c $(filter constraints%,$^) torch
	$*/bin/pip install -q -c $(filter constraints%,$^) -e ".[dev]"
	@touch $@
