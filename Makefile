# Everything runs from .venv, which is made at first need and again only when the requirements change.
#   make demo [SEED=n]   make test   make lint   make help
PYTHON ?= python3
SEED ?= 0

hash = $(shell cat $(1) | sha256sum | cut -c1-16)
RUN_READY := .venv/.ready-$(call hash,requirements.txt)
DEV_READY := .venv/.ready-dev-$(call hash,requirements.txt requirements-dev.txt)
BENCH_READY := .venv-bench/.ready-$(call hash,requirements-bench.txt)
PYTEST := .venv/bin/python -m pytest
SHARED := -n auto --maxprocesses 8

# Images often set it; then each process compiles all sources anew, and pytest rewrites all tests: 6 s a process.
export PYTHONDONTWRITEBYTECODE :=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
# Names the packages as they come; warnings and all else are in .venv/pip.log.
PIP_INSTALL := .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off --log .venv/pip.log
BENCH_INSTALL := $(subst .venv/,.venv-bench/,$(PIP_INSTALL))
# Makes folder $(1) anew: of a link the link alone, which --clear would follow; by the interpreter that a .venv, which may
# be this folder, was made of.
VENV = base=$$($(PYTHON) -c 'import sys; print(sys._base_executable)'); [ ! -L $(1) ] || rm $(1); "$$base" -m venv --clear $(1)
PIP_SHOW := sed -un 's/^\(Collecting [^ ]*\).*/   \1/p; s/^\(Installing\).*/   \1/p; /^ERROR/p'

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-unit test-all test-gpu test-packages lint bench-env clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' $(MAKEFILE_LIST) | column -t -s '|'

setup: $(RUN_READY) ## make .venv

demo: setup ## the whole pipeline on a small embedded data set; ends with runs/demo/report.html
	@.venv/bin/python -m eve_ds.demo --seed $(SEED)

test: $(DEV_READY) test-packages test-unit ## what CI runs: the unit tests, whole runs a file per process, clusters one by one
	$(PYTEST) $(SHARED) --dist loadfile -m "not long" tests/e2e tests/multirank tests/gpu
	$(PYTEST) -m "not long" tests/cluster

test-unit: $(DEV_READY) ## unit tests alone, shared among processes (at most 8)
	$(PYTEST) $(SHARED) -m "not long" tests/unit

test-all: $(DEV_READY) test-packages ## the long tests too
	$(PYTEST) tests

test-gpu: $(DEV_READY) ## all checks and figures of a machine with one GPU, in 9 minutes: runs/gpu_kit/table.txt
	.venv/bin/python -m tests.gpu.kit --out runs/gpu_kit --budget 540

test-packages: # root gets Slurm, MPI, pdsh, sshd and Chromium; others are told by the tests of those what to install
	@if [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then launch/install_test_packages.sh; fi

lint: $(DEV_READY) ## ruff and the type checker
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench-env: $(BENCH_READY) ## make .venv-bench, with the loaders that `python -m eve_ds.bench loader` compares ours with

clean: ## remove .venv, .venv-bench, compiled operations and all caches; runs/ stays
	rm -rf .venv .venv-bench build .torch_extensions .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN_READY):
	@echo "== making .venv with $$($(PYTHON) --version) (torch, DeepSpeed and what they need: one to three minutes)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@$(call VENV,.venv)
	@$(PIP_INSTALL) -r requirements.txt 2>&1 | $(PIP_SHOW)
	@touch $@

$(DEV_READY): | $(RUN_READY)
	@echo "== adding the test tools to .venv"
	@$(PIP_INSTALL) -r requirements-dev.txt 2>&1 | $(PIP_SHOW)
	@touch $@

# One package that cannot be installed must not cost the others: then each is tried by itself, and the benchmark names
# what is missing.
$(BENCH_READY):
	@echo "== making .venv-bench (6 GB: torch's own build, CUDA libraries included; five to ten minutes)"
	@$(call VENV,.venv-bench)
	@$(BENCH_INSTALL) -r requirements-bench.txt 2>&1 | $(PIP_SHOW) || \
	    grep -v '^#' requirements-bench.txt | while read -r package; do \
	        $(BENCH_INSTALL) "$$package" 2>&1 | $(PIP_SHOW) || echo "   $$package cannot be installed: .venv-bench/pip.log"; \
	    done
	@touch $@
