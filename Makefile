# Each target creates the environment .venv if it does not exist. This needs Python 3.10 or newer,
# make and a package index. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Options for the command of a target, for example: make study ARGS="--seed 1 --digits 2 3"
ARGS ?=
# Parallel test processes; each computes on one thread.
JOBS ?= 2
# Show the progress of pip, except in the log of a CI run.
QUIET := $(if $(CI),--quiet)
# Folders for the linters, if this checkout has them.
CODE := $(wildcard paramlora experiments tests benchmarks notebooks docs/hooks.py)

.PHONY: help study test fuzz lint docs site clean
.DELETE_ON_ERROR:

help:
	@echo "make study   run the digit study; set options with ARGS=\"...\", see ARGS=--help"
	@echo "make test    run the tests and the README; pass options to pytest with ARGS"
	@echo "make fuzz    compare 10,000 random sequences of verbs with a dense reference; options: ARGS"
	@echo "make lint    check style, format, types and spelling"
	@echo "make docs    build the site and serve it; pass options to mkdocs serve with ARGS"
	@echo "make site    build the site in build/site, with warnings as errors"
	@echo "make clean   remove the environment and build outputs; keep runs and data"
	@echo "PYTHON=...   the interpreter for the environment, now $(PYTHON)"

study: $(VENV)/ready-experiments
	$(PY) -m experiments digits $(ARGS)

# Without a compiler the native extension is not built, and its tests are skipped.
test: $(VENV)/ready-test
	-$(PY) -m paramlora.native.build
	$(PY) -m pytest -n $(JOBS) --dist worksteal -m "not thorough" $(ARGS)

# Random sequences in batches with seeds of their own, then threads, tasks and requests under load.
fuzz: $(VENV)/ready-test
	$(PY) -m tests.verbs.test_stateful $(ARGS)
	$(PY) -m tests.stack.test_load

lint: $(VENV)/ready-dev
	$(PY) -m ruff check $(CODE)
	$(PY) -m ruff format --check $(CODE)
	$(PY) -m mypy $(filter-out notebooks docs/hooks.py,$(CODE))
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) -m codespell_lib $(CODE) docs *.md

docs: $(VENV)/ready-docs
	$(PY) -m mkdocs serve --no-strict $(ARGS)

site: $(VENV)/ready-docs
	$(PY) -m mkdocs build --strict $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp file per extra of setup.cfg, so that a second call installs nothing.
$(VENV)/ready-%: setup.cfg | $(PY)
	@echo "Installing paramlora[$*] into $(VENV); the first time fetches PyTorch, some gigabytes."
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	$(PY) -m pip install $(QUIET) --disable-pip-version-check --editable ".[$*]"
	@touch $@

# Remove an incomplete environment, as the next call would take it for a complete one.
$(PY):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("paramlora needs Python 3.10 \
	or newer, and $(PYTHON) is %d.%d; name another: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
