# Every target makes the environment first when it is missing. PYTHON=... names an interpreter (3.12 or newer).
# `make parity` is for comparisons with torch alone: PARITY_PYTHON=... may be an older one.
# `make aot`, `make gpu` and its stages make an environment with CUDA, unless PYTHON=... is given: then that one, which
# has JAX already, is used as it is, and nothing is installed or downloaded.
PYTHON ?= $(shell ./.ci/find_python)
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/nano
PARITY_PYTHON ?= $(PYTHON)

GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),.venv-gpu/bin/python,$(PYTHON))
GPU_READY := $(if $(filter file,$(origin PYTHON)),.venv-gpu/ready)
GPU_OPERATIONS ?= quantize quantize_both quantize_weight product grouped_product weight_gradient swiglu swiglu_backward
GPU_ARMS ?= bfloat16 fp8_deepseek fp8_tensor mxfp8
GPU_SEEDS ?= 0 1 2
PEER_PYTHON ?= $(GPU_PYTHON)

.PHONY: setup run test bench parity aot gpu gpu-device gpu-test gpu-bench gpu-train

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

.venv-gpu/ready: requirements-gpu.txt requirements.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.12 or newer found; install one" >&2; exit 2; }
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/pip install --quiet --disable-pip-version-check -r requirements-gpu.txt
	@touch $@

# Compiles every kernel for an H200, without one.
aot: $(GPU_READY)
	JAX_PLATFORMS=cpu $(GPU_PYTHON) -m kernels.aot

# Everything that needs the GPU. Each command ends within 8 minutes and leaves what it has; `make gpu` again goes on.
gpu:
	$(MAKE) --keep-going gpu-test gpu-bench gpu-train

gpu-device: $(GPU_READY)
	@$(GPU_PYTHON) -c 'import sys; from kernels.choice import gpu_refusal as why; sys.exit(why() and f"error: {why()}")'
	@mkdir -p results/gpu/train runs/gpu

gpu-test: results/gpu/tests.passed

results/gpu/tests.passed: $(wildcard kernels/*.py kernels/*/*.py tests/kernels/*.py) | gpu-device
	JAX_PLATFORMS=cuda,cpu timeout -k 10 470 $(GPU_PYTHON) -m pytest -m gpu -rA --junitxml=results/gpu/tests.xml
	@touch $@

gpu-bench: $(GPU_OPERATIONS:%=gpu-bench-%)

gpu-bench-%: gpu-device
	timeout -k 10 470 $(GPU_PYTHON) -m kernels.bench --op=$* --search --peer --peer_python=$(PEER_PYTHON) --minutes=7 \
		--json=results/gpu/bench.json

gpu-train: $(foreach arm,$(GPU_ARMS),$(foreach seed,$(GPU_SEEDS),runs/gpu/$(arm)-$(seed).finished))

# SIGTERM makes a run save and stop: the next call continues it. arm and seed stand before and after the dash.
runs/gpu/%.finished: | gpu-device
	timeout -k 30 440 $(GPU_PYTHON) -m research.main --workdir=runs/gpu/$* \
		--config=experiments/fp8.py:gpu_$(firstword $(subst -, ,$*)) \
		--config.training.seed=$(lastword $(subst -, ,$*)); \
	status=$$?; cp runs/gpu/$*/metrics.jsonl results/gpu/train/$*.jsonl && exit $$status
	@touch $@
