"""Runs of seconds, of the real command in a process of its own, and the comparison of what they leave bit by bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from research import config, experiment
from research.model.build import make_model
from research.training.checkpoint import Checkpoints
from research.training.step import abstract_state

ROOT = Path(__file__).parents[2]
EXPERIMENT = "experiments/nano.py:smoke"
PIPELINES = {"distill", "drafting", "r1_evaluate"}  # of research.distill, whose models are two fields of the config
MICRO = {  # with all that a state can hold, but for dense layers
    "model.hidden_size": 32, "model.intermediate_size": 32, "model.num_attention_heads": 2, "model.n_routed_experts": 8,
    "model.moe_intermediate_size": 16, "model.num_hidden_layers": 1, "model.first_k_dense_replace": 0,
    "model.num_experts_per_tok": 2,
    "model.n_group": 4, "model.topk_group": 2, "model.scan_unroll": 1, "data.sequence_length": 32,
    "data.max_documents": 30, "data.validation_fraction": 0.1, "data.fim_rate": 0.2,
    "training.steps": 12, "training.batch_size": 4, "training.ema_decay": 0.9, "optimizer.moment_dtype": "bfloat16",
    "evaluation.every_steps": 6, "evaluation.batches": 2, "evaluation.batch_size": 32, "evaluation.sample_tokens": 4,
    "checkpoint.every_steps": 3,
}
TIMES = {"tokens_per_second", "mfu"}  # what no two runs share


def arguments(workdir: Path, cache: Path, **fields) -> list[str]:
    """The command of a micro run in `workdir`; `fields` are `group.field` values that differ from MICRO."""
    values = MICRO | {"data.cache": cache / "data"} | fields
    return [sys.executable, "-m", "research.main", f"--config={EXPERIMENT}", f"--workdir={workdir}",
            *(f"--config.{name}={value}" for name, value in values.items())]


def start(command: list[str], cache: Path, **variables: str) -> subprocess.Popen:
    """The process of a command, whose compiled programs are kept in `cache`; `variables` of its environment."""
    environment = os.environ | variables | {
        "JAX_COMPILATION_CACHE_DIR": str(cache / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def settings_of(cache: Path, **fields) -> config.Settings:
    """The checked settings of a micro run."""
    values = MICRO | {"data.cache": cache / "data"} | fields
    chosen = experiment.load(str(ROOT / EXPERIMENT))
    return config.check(experiment.change(chosen, [f"{name}={value}" for name, value in values.items()]))


def lines(workdir: Path, split: str | None = None, times: bool = False) -> list[dict]:
    """The lines of metrics.jsonl, of one split or all; without what depends on the clock unless `times`."""
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if times or name not in TIMES}
            for line in found if split in (None, line["split"])]


def state_of(workdir: Path) -> tuple[int, dict[str, tuple], dict]:
    """The newest intact checkpoint: its step, {path: (dtype, shape, bytes)} of the state, and its record."""
    settings = config.read(workdir)
    checkpoints = Checkpoints(workdir / "checkpoints", 2, 1)
    step = checkpoints.newest_intact()
    model = make_model(settings)
    state, record = checkpoints.restore(step, abstract_state(model, settings))
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return step, {path: (x.dtype.name, x.shape, x.tobytes()) for path, x in arrays.items()}, record


def differences(one: Path, other: Path) -> list[str]:
    """Where two runs differ, a phrase each: states bit for bit, data position, tokens, metrics but times, files."""
    (step, state, record), (other_step, other_state, other_record) = state_of(one), state_of(other)
    found = [f"{path} of the state" for path in sorted({*state, *other_state})
             if state.get(path) != other_state.get(path)]
    found += [f"{name} of the record" for name in ("data", "tokens") if record[name] != other_record[name]]
    found += [] if step == other_step else [f"steps {step} and {other_step}"]
    found += [] if lines(one) == lines(other) else ["metrics.jsonl"]
    found += [name for name in ("config.json", "tokenizer.json", "samples.md")
              if (one / name).read_bytes() != (other / name).read_bytes()]
    return found
