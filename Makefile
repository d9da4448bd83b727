# Needs make and Python 3.11 or newer; everything else goes into $(VENV).
# Another interpreter: make setup PYTHON=python3.12     Options for pip: make setup PIP_ARGS="--pre"

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
WORKERS ?= auto

PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install -qq --disable-pip-version-check $(PIP_ARGS)
# One thread a process: test workers share the cores, and sums come out the same on every machine.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PYTEST := $(ONE_THREAD) $(PY) -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: help setup demo test test-slow faults lint bench docs docs-quick clean
.DELETE_ON_ERROR:

help:  ## this list
	@echo "make <what>, where <what> is one of"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 14

setup: $(VENV)/.setup  ## install the project and what it needs into .venv
	@echo "Ready: $(PY) -m zoo --help"

demo: $(VENV)/.setup  ## the whole story on real data: EM, SVI and NUTS side by side, into demo-output/
	@$(PY) -m zoo demo --out demo-output

test: $(VENV)/.setup-test  ## every quick test
	@$(PYTEST) -m "not slow"

test-slow: $(VENV)/.setup-test  ## the tests that take longer
	@$(PYTEST) -m slow

faults: $(VENV)/.setup-test  ## every row of the table of faults, counted; and planted errors
	@$(PYTEST) tests/faults -m ""
	@$(ONE_THREAD) $(PY) tests/mutations.py

lint: $(VENV)/.setup-lint  ## style (ruff) and types (mypy)
	@$(PY) -m ruff check .
	@$(PY) -m mypy

bench: $(VENV)/.setup-bench  ## every benchmark, one after the other
	@for file in benchmarks/[a-z]*.py; do \
	  if [ ! -f "$$file" ]; then echo "No benchmarks here."; exit 1; fi; \
	  echo "== $$file"; $(PY) "$$file" || exit 1; \
	done

docs: $(VENV)/.setup-docs  ## the site, into docs/_build/html; runs the tutorials that changed
	@$(PY) docs/build.py

docs-quick: $(VENV)/.setup-docs  ## the site without running any tutorial
	@$(PY) docs/build.py --skip-tutorials

clean:  ## remove what the other targets made
	rm -rf $(VENV) demo-output docs/_build build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find zoo inference tests tutorials benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Set-up is repeated only when pyproject.toml changes, and once for each extra.
$(VENV)/.setup: pyproject.toml
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	  echo "Python was not found as '$(PYTHON)'. Install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3" >&2; \
	  exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "'$(PYTHON)' is $$("$(PYTHON)" --version 2>&1 | tail -n 1), and 3.11 or newer is needed: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' comes without venv or pip. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV): a few minutes the first time, most of them for PyTorch."
	@"$(PYTHON)" -m venv $(VENV)
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.setup-%: $(VENV)/.setup
	@$(INSTALL) --editable ".[$*]"
	@touch $@
