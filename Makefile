# Every target makes the environment first when it is missing. PYTHON=... names an interpreter (3.12 or newer).
# `make parity` is for comparisons with torch alone: PARITY_PYTHON=... may be an older one. PARITY_BUILD= (nothing) takes
# PyPI's torch, on Linux a CUDA build of several GB, in place of the CPU build from PyTorch's own index.
# `make aot`, `make gpu` and its stages make an environment with CUDA, unless PYTHON=... is given: then that one, which
# has JAX already, is used as it is, and nothing is installed or downloaded.
PYTHON ?= $(shell ./.ci/find_python)
VENV := .venv
BIN := $(VENV)/bin
# What is imported is compiled to bytecode when it is: all of it would take most of the time of an installation.
INSTALL := pip install --quiet --disable-pip-version-check --no-compile
WORKDIR ?= runs/nano
PARITY_PYTHON ?= $(PYTHON)
PARITY_BUILD ?= +cpu

GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),.venv-gpu/bin/python,$(PYTHON))
GPU_READY := $(if $(filter file,$(origin PYTHON)),.venv-gpu/ready)
GPU_ARMS ?= bfloat16 fp8_deepseek fp8_tensor mxfp8
GPU_SEEDS ?= 0 1 2
GPU_SECONDS ?= 440
PEER_PYTHON ?= $(GPU_PYTHON)

.PHONY: setup run test bench tables colabs parity eval eval-test aot gpu gpu-device gpu-test gpu-bench gpu-train

setup: $(VENV)/ready

$(VENV)/ready: requirements.txt requirements-dev.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.12 or newer found; install one or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) -r requirements-dev.txt
	@touch $@

run: setup
	$(BIN)/python -m research.main --config=experiments/nano.py --workdir=$(WORKDIR)

# What a compiler allocates lies on large pages, as in the commands themselves: a tenth of the compilations' time.
test: setup
	$(BIN)/ruff check .
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python -m pytest -m "not gpu" --numprocesses=2 --dist=loadfile

bench: setup
	$(BIN)/python -m research.bench

tables: setup
	$(BIN)/python -m research.tables --table=all

# Executes every notebook, or NOTEBOOKS="cost mla", and writes the outputs back; an environment with Jupyter's kernel.
colabs: .venv-colabs/ready
	.venv-colabs/bin/python -m colabs $(NOTEBOOKS)

.venv-colabs/ready: requirements-colabs.txt requirements.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.12 or newer found; install one" >&2; exit 2; }
	$(PYTHON) -m venv .venv-colabs
	.venv-colabs/bin/$(INSTALL) -r requirements-colabs.txt
	@touch $@

parity: .venv-parity/ready

.venv-parity/ready: requirements-parity.txt
	$(PARITY_PYTHON) -m venv .venv-parity
	@sed 's/+cpu/$(PARITY_BUILD)/' requirements-parity.txt >.venv-parity/requirements.txt
	@.venv-parity/bin/$(INSTALL) --retries 1 -r .venv-parity/requirements.txt || \
	{ echo "error: no environment for the comparison: torch's CPU build is in https://download.pytorch.org/whl/cpu alone." \
	"Where that cannot be reached, \`make parity PARITY_BUILD=\` takes PyPI's, a CUDA build of several GB" >&2; exit 2; }
	@touch $@

# lm-evaluation-harness, in an environment of its own, and the tests of our model in it.
eval: .venv-eval/ready

eval-test: .venv-eval/ready
	.venv-eval/bin/python -m pytest tests/interop/with_lm_eval.py

.venv-eval/ready: requirements-eval.txt requirements.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.12 or newer found; install one" >&2; exit 2; }
	$(PYTHON) -m venv .venv-eval
	.venv-eval/bin/$(INSTALL) -r requirements-eval.txt
	@touch $@

.venv-gpu/ready: requirements-gpu.txt requirements.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.12 or newer found; install one" >&2; exit 2; }
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/$(INSTALL) -r requirements-gpu.txt
	@touch $@

# Compiles every kernel for an H200, without one.
aot: $(GPU_READY)
	JAX_PLATFORMS=cpu $(GPU_PYTHON) -m kernels.aot

# Everything that needs the GPU, in stages. Each ends within 8 minutes, leaves what it has in results/gpu/, and goes on
# from there when it is called again: until all pass.
gpu: gpu-device
	@status=0; for stage in gpu-test gpu-bench gpu-train; do $(MAKE) --no-print-directory $$stage || status=1; done; \
	exit $$status

# Bounds a stage: `within COMMAND` runs it for what is left of its seconds, and ends the stage where nothing is.
WITHIN = end=$$(($$(date +%s) + $(GPU_SECONDS))); within() { left=$$((end - $$(date +%s))); \
	[ $$left -gt 0 ] || { echo "error: the time of this stage is over: call it again to go on" >&2; exit 1; }; \
	timeout --foreground --kill-after=30 $$left "$$@"; }

gpu-device: $(GPU_READY)
	@$(GPU_PYTHON) -c 'import logging, sys; logging.disable(); from kernels.choice import gpu_refusal as why; \
		sys.exit(why() and f"error: {why()}")'
	@mkdir -p results/gpu/train runs/gpu

gpu-test: results/gpu/tests.passed

results/gpu/tests.passed: $(wildcard kernels/*.py kernels/*/*.py research/precision/*.py tests/*/*.py) | gpu-device
	@$(WITHIN); { within env JAX_PLATFORMS=cuda,cpu $(GPU_PYTHON) -m pytest -m gpu -v --junitxml=results/gpu/tests.xml; \
		echo $$? >results/gpu/tests.status; } 2>&1 | tee results/gpu/tests.txt; exit $$(cat results/gpu/tests.status)
	@touch $@

gpu-bench: gpu-device
	@$(WITHIN); status=0; \
	within $(GPU_PYTHON) -m kernels.bench --search --peer --peer_python=$(PEER_PYTHON) --minutes=7 \
		--json=results/gpu/bench.json || status=1; \
	for part in layer step; do [ results/gpu/$$part.json -nt kernels/tuned ] || \
		within $(GPU_PYTHON) -m research.bench_precision --part=$$part --json=results/gpu/$$part.json || status=1; done; \
	exit $$status

# SIGTERM, which comes when the time is over, makes a run save and stop: the next call continues it.
gpu-train: gpu-device
	@$(WITHIN); status=0; \
	for run in $(foreach seed,$(GPU_SEEDS),$(foreach arm,$(GPU_ARMS),$(arm)-$(seed))); do \
		[ -e runs/gpu/$$run.finished ] && continue; \
		within $(GPU_PYTHON) -m research.main --workdir=runs/gpu/$$run --config=experiments/fp8.py:gpu_$${run%-*} \
			--config.training.seed=$${run##*-} && touch runs/gpu/$$run.finished || status=1; \
		[ ! -e runs/gpu/$$run/metrics.jsonl ] || cp runs/gpu/$$run/metrics.jsonl results/gpu/train/$$run.jsonl; \
	done; exit $$status
