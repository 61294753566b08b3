"""The stages of `make gpu`, with a Python that only pretends: what they call, what they leave, how they go on."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments import fp8

MAKEFILE = Path(__file__).parents[1] / "Makefile"
PYTHON = """#!/bin/sh
echo "$*" >>calls
case "$*" in
    -c*) exit 0;;
    *research.main*)
        folder=$(echo "$*" | sed 's/.*--workdir=\\([^ ]*\\).*/\\1/')
        mkdir -p $folder && echo line >>$folder/metrics.jsonl;;
    *research.bench_precision*) echo {} >${*##*--json=};;
esac
eval "$ANSWER"
"""


@pytest.fixture
def call(tmp_path):
    """call(stage, answer) -> (exit code, stderr, what Python was called with); answer: shell that ends each call."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    shutil.copy(MAKEFILE, tmp_path)
    (tmp_path / "kernels/tuned").mkdir(parents=True)
    os.utime(tmp_path / "kernels/tuned", (0, 0))

    def call(stage, answer="exit 0", **variables):
        (tmp_path / "calls").unlink(missing_ok=True)
        words = ["make", stage, "PYTHON=./python", "GPU_ARMS=a b", "GPU_SEEDS=0 1",
                 *(f"{name}={value}" for name, value in variables.items())]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(words, cwd=tmp_path, env=environment | {"ANSWER": answer}, text=True, capture_output=True)
        calls = (tmp_path / "calls").read_text().splitlines()
        return done.returncode, done.stderr, [line for line in calls if re.match(r"-m |.*pytest", line)]

    return call


def runs_of(calls):
    return [re.search(r"--workdir=runs/gpu/(\S+)", line)[1] for line in calls if "research.main" in line]


def test_a_machine_without_a_gpu_is_told_so_in_one_line(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "error: the default device is a cpu, not a GPU" >&2; exit 1\n')
    python.chmod(0o755)
    for stage in ("gpu", "gpu-test", "gpu-bench", "gpu-train"):
        done = subprocess.run(["make", "-f", str(MAKEFILE), stage, "PYTHON=./python"], cwd=tmp_path, text=True,
                              capture_output=True)
        said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
        assert done.returncode and said == ["error: the default device is a cpu, not a GPU"]
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


def test_tests_that_passed_are_not_run_again(call, tmp_path):
    code, _, calls = call("gpu-test", "echo 3 failed; exit 1")
    assert code and len(calls) == 1 and "pytest -m gpu" in calls[0]
    assert (tmp_path / "results/gpu/tests.txt").read_text() == "3 failed\n"
    assert call("gpu-test")[0] == 0
    assert call("gpu-test") == (0, "", [])


def test_the_bench_goes_on_and_then_times_layer_and_step(call, tmp_path):
    code, _, calls = call("gpu-bench", 'case "$*" in *kernels.bench*) exit 1;; esac')
    assert code and [re.search(r"-m (\S+)", line)[1] for line in calls] == [
        "kernels.bench", "research.bench_precision", "research.bench_precision"]
    assert "--search" in calls[0] and "--json=results/gpu/bench.json" in calls[0] and "--minutes=7" in calls[0]
    code, _, calls = call("gpu-bench")
    assert code == 0 and len(calls) == 1  # layer and step are newer than the tiles
    os.utime(tmp_path / "kernels/tuned")
    os.utime(tmp_path / "results/gpu/step.json", (1, 1))
    os.utime(tmp_path / "results/gpu/layer.json", (2e9, 2e9))
    assert "--part=step" in call("gpu-bench")[2][1]


def test_runs_go_on_until_all_are_finished(call, tmp_path):
    code, _, calls = call("gpu-train", 'case "$*" in *seed=1*|*gpu_b*) exit 1;; esac')
    assert code and runs_of(calls) == ["a-0", "b-0", "a-1", "b-1"]
    assert "--config=experiments/fp8.py:gpu_a --config.training.seed=0" in calls[0]
    code, _, calls = call("gpu-train")
    assert code == 0 and runs_of(calls) == ["b-0", "a-1", "b-1"]
    assert runs_of(call("gpu-train")[2]) == []
    lines = {path.name: path.read_text() for path in (tmp_path / "results/gpu/train").iterdir()}
    assert lines == {"a-0.jsonl": "line\n"} | {f"{run}.jsonl": "line\nline\n" for run in ("b-0", "a-1", "b-1")}


@pytest.mark.parametrize("stage", ["gpu-test", "gpu-bench", "gpu-train"])
def test_a_stage_ends_when_its_time_is_over(call, tmp_path, stage):
    code, said, calls = call(stage, "exec sleep 60", GPU_SECONDS=5)
    assert code and len(calls) == 1
    assert stage == "gpu-test" or "error: the time of this stage is over: call it again to go on" in said
    assert not list(tmp_path.glob("runs/gpu/*.finished")) and not list(tmp_path.glob("results/gpu/*.passed"))
    assert stage != "gpu-train" or (tmp_path / "results/gpu/train/a-0.jsonl").exists()


def test_all_stages_are_called_whatever_becomes_of_one(call):
    code, _, calls = call("gpu", 'case "$*" in *pytest*) exit 1;; esac')
    assert code and all(name in " ".join(calls) for name in ("pytest", "kernels.bench", "research.main"))
    assert call("gpu")[0] == 0


def test_the_arms_exist():
    arms = re.search(r"^GPU_ARMS \?= (.*)$", MAKEFILE.read_text(), re.M)[1].split()
    assert arms[0] == "bfloat16" and {f"gpu_{arm}" for arm in arms} <= fp8.SWEEP.keys()
