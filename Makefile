# Each target makes its own environment in .venv if there is none: Python 3.10 or newer, make and a
# package index are all it takes. Run `make help` for what there is.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Options for the command behind a target, such as: make study ARGS="--seed 1 --digits 2 3"
ARGS ?=
# Test processes at a time; each computes on one thread.
JOBS ?= 2
# Installing shows its progress, but not in the log of a CI run.
QUIET := $(if $(CI),--quiet)
# What the linters read; those that this checkout has.
CODE := $(wildcard paramlora experiments tests benchmarks notebooks)

.PHONY: help study test lint clean
.DELETE_ON_ERROR:

help:
	@echo "make study   run the digit study; options by ARGS=\"...\", see ARGS=--help"
	@echo "make test    run all tests, the README and the notebooks; options to pytest by ARGS"
	@echo "make lint    check style, format and types"
	@echo "make clean   remove the environment and everything built; runs and data stay"
	@echo "PYTHON=...   the interpreter to make the environment with, now $(PYTHON)"

study: $(VENV)/ready-experiments
	$(PY) -m experiments digits $(ARGS)

# Without a compiler what it builds is left out, and its tests are skipped.
test: $(VENV)/ready-test
	-$(PY) -m paramlora.native.build
	$(PY) -m pytest -n $(JOBS) $(ARGS)

lint: $(VENV)/ready-dev
	$(PY) -m ruff check $(CODE)
	$(PY) -m ruff format --check $(CODE)
	$(PY) -m mypy $(filter-out notebooks,$(CODE))

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp an extra of setup.cfg, so that setting up a second time costs nothing.
$(VENV)/ready-%: setup.cfg | $(PY)
	@echo "Installing paramlora[$*] into $(VENV); the first time fetches PyTorch, some gigabytes."
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	$(PY) -m pip install $(QUIET) --disable-pip-version-check --editable ".[$*]"
	@touch $@

# An environment that came out half made would be taken for a whole one the next time: remove it.
$(PY):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("paramlora needs Python 3.10 \
	or newer, and $(PYTHON) is %d.%d; name another: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
