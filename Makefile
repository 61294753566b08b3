# Every target makes the environment first when it is missing. PYTHON=... names an interpreter (3.12 or newer).
PYTHON ?= $(shell ./.ci/find_python)
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/nano
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

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
