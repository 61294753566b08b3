# Every target makes the environment first when it is missing. PYTHON=... names an interpreter (3.12 or newer).
# `make parity` is for comparisons with torch alone: PARITY_PYTHON=... may be an older one.
PYTHON ?= $(shell ./.ci/find_python)
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/nano
PARITY_PYTHON ?= $(PYTHON)

.PHONY: setup run test bench parity

setup: $(VENV)/ready

$(VENV)/ready: requirements.txt requirements-dev.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.12 or newer found; install one or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

run: setup
	$(BIN)/python -m research.main --config=experiments/nano.py --workdir=$(WORKDIR)

test: setup
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -m "not gpu"

bench: setup
	$(BIN)/python -m research.bench

parity: .venv-parity/ready

.venv-parity/ready: requirements-parity.txt
	$(PARITY_PYTHON) -m venv .venv-parity
	.venv-parity/bin/pip install --quiet --disable-pip-version-check --retries 1 -r requirements-parity.txt
	@touch $@
