"""Runs the smoke pipeline with kill -9 in each of its stages and compares what it leaves with a run left in peace.

    python -m tests.distillation.kills --folder=DIR

Every stage is killed at a mark that its files show, twice where it trains two models, and started again. Prints a line
a kill; exits with 1 where samples, verdicts, responses, metrics or weights are not those of the other run, bit by bit.
Five minutes on two cores.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from absl import flags

from research import command
from research.errors import RequestError, RunError
from tests.training import runs

FLAGS = flags.FlagValues()
_FOLDER = flags.DEFINE_string("folder", None, "Where both runs are written and left.", FLAGS)
MARKS = (  # (stage, a file, how many lines of it; 0: that it is there)
    ("teacher", "cold_start/checkpoints/50", 0), ("teacher", "teacher/metrics.jsonl", 2),
    ("sample", "samples.jsonl", 48), ("verify", "verified.jsonl", 0), ("student", "base/checkpoints/10", 0),
    ("student", "distilled/metrics.jsonl", 13), ("evaluate", "evaluation/base-20.sampled.jsonl", 1))
MODELS = ("cold_start", "teacher", "base", "distilled")


def start(folder: Path, name: str, stage: str):
    words = [sys.executable, "-m", "research.distill", "--config=experiments/distill.py:smoke", f"--stage={stage}",
             f"--workdir={folder / name}"]
    return runs.start(words, folder)


def finish(process) -> None:
    code, _, err = runs.finish(process)
    if code:
        raise RunError(f"a run ended with {code}: {err[-1000:]}")


def shown(path: Path, lines: int) -> bool:
    return path.exists() and (not lines or path.read_bytes().count(b"\n") >= lines)


def main() -> None:
    if not _FOLDER.value:
        raise RequestError("--folder is required")
    folder = Path(_FOLDER.value).absolute()
    finish(start(folder, "peace", "all"))
    for place, (stage, name, lines) in enumerate(MARKS):
        process = start(folder, "killed", stage)
        while process.poll() is None and not shown(folder / "killed" / name, lines):
            time.sleep(0.01)
        if process.poll() is not None:
            raise RunError(f"{stage} has ended before {name}")
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        print(f"killed: {stage} at {name}", flush=True)
        if place + 1 == len(MARKS) or MARKS[place + 1][0] != stage:
            finish(start(folder, "killed", stage))
    one, other = folder / "peace", folder / "killed"
    kept = ["samples.jsonl", "verified.jsonl", "verification.json",
            *(f"evaluation/{path.name}" for path in (one / "evaluation").glob("*.sampled.jsonl"))]
    wrong = [name for name in kept if (one / name).read_bytes() != (other / name).read_bytes()]
    wrong += [name for name in MODELS if runs.lines(one / name) != runs.lines(other / name)
              or runs.state_of(one / name)[:2] != runs.state_of(other / name)[:2]]
    if json.loads((one / "results.json").read_bytes()) != json.loads((other / "results.json").read_bytes()):
        wrong.append("results.json")
    if wrong:
        raise RunError(f"not as in peace: {', '.join(wrong)}")
    print(f"all as in peace: {', '.join((*kept, *MODELS, 'results.json'))}")


if __name__ == "__main__":
    command.run(main, FLAGS)
