# Every target sets up what it needs: a fresh clone, Python >= 3.11 and pip are enough.
#   make reproduce            the main job: train, tabulate, draw (SCALE=tiny|mini|paper, SEEDS=n)
#   make test                 the tests, without the browser and the benchmarks
#   make test-browser         the notebooks in JupyterLab in headless Chromium
#   make test-cluster         batches through Snakemake, on a Slurm that the test starts (root, slurm-wlm, munge)
#   make lint                 ruff
#   make install              the environment alone
#   make lab                  JupyterLab on the notebooks (LAB="--no-browser --port=8889")
#   make clean                remove the environment and caches; results in runs/ and figures/ stay
# PYTHON=python3.12 chooses the interpreter for .venv. Nothing is installed twice.

PYTHON ?= python3
SCALE ?= mini
SEEDS ?=
LAB ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install reproduce test test-browser test-cluster lint lab clean

help:
	@sed -n 's/^#   //p' Makefile

install: $(INSTALLED)

# The interpreter is an order-only prerequisite: its age says nothing. Debian's python3 may lack ensurepip; its pip can
# still fill a foreign environment.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed; {sys.executable} is {v[0]}.{v[1]}. Name another: make PYTHON=python3.12 ...")'
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	else $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV) install pip; fi

reproduce: $(INSTALLED)
	$(BIN)/python -m repro reproduce --scale $(SCALE) $(if $(SEEDS),--seeds $(SEEDS))

# A file of tests is one worker's, so that what its tests share is made once.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PYTEST) -n logical --maxprocesses=8 --dist loadfile tests --ignore=tests/browser --ignore=tests/cluster --ignore=tests/benchmarks --ignore=tests/optional

test-browser: $(INSTALLED)
	$(PYTEST) tests/browser --timeout=600

test-cluster: $(VENV)/.installed-batch
	$(PYTEST) tests/cluster

$(VENV)/.installed-batch: $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[test,batch]"
	@touch $@

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .

lab: $(INSTALLED)
	$(BIN)/python -m jupyterlab $(LAB) notebooks/index.ipynb

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis notebooks/.ipynb_checkpoints
	find repro tests -name __pycache__ -prune -exec rm -rf {} +
