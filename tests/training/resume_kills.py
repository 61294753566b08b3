"""Trains a small model under kill -9 at random moments and compares the outcome bit by bit with a run left in peace.

    python -m tests.training.resume_kills --kills=100 [--seed=0] [--folder=DIR]

Each kill comes at a random moment of a process's life, half of them from its start on, half from its first step on.
A run that is done is compared and begun anew until all kills are spent. Prints what each kill met, and a table of the
phases at the end; exits with 1 where a run differs. About 5 s a kill on two cores.
"""

import collections
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from absl import flags

from research import command
from research.errors import RunError
from tests.training import runs

FLAGS = flags.FlagValues()
_KILLS = flags.DEFINE_integer("kills", 100, "How many processes to kill.", flag_values=FLAGS)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.", flag_values=FLAGS)
_FOLDER = flags.DEFINE_string("folder", None, "Where the runs are written and left; without it in a temporary one.",
                              FLAGS)
FIELDS = {"training.steps": 60, "checkpoint.every_steps": 4, "evaluation.every_steps": 10}


def phase(workdir: Path, before: int, fields: dict) -> str:
    """What a run is doing, by its files; `before`: the bytes of its metrics when this process began."""
    if size(workdir) == before:
        return "starting"
    if any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp")):
        return "saving"
    try:
        last = runs.lines(workdir)[-1]
    except ValueError:
        return "writing a line"
    if last["split"] == "train" and last["step"] % fields["evaluation.every_steps"] == 0:
        return "evaluating"
    return "finishing" if last["step"] == fields["training.steps"] else "training"


def size(workdir: Path) -> int:
    """Bytes of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def live(workdir: Path, cache: Path, fields: dict, from_step: bool, delay: float) -> str | None:
    """One process, killed `delay` seconds after its start or its first step. The phase it was in; None when done."""
    process = runs.start(runs.arguments(workdir, cache, **fields), cache)
    before = size(workdir)
    moment = None if from_step else time.monotonic() + delay
    met = None
    while process.poll() is None:
        if moment is None and size(workdir) > before:
            moment = time.monotonic() + delay
        if moment is not None and time.monotonic() >= moment:
            met = phase(workdir, before, fields)
            process.send_signal(signal.SIGKILL)
            break
        before = min(before, size(workdir))  # it cuts its metrics back to its checkpoint
        time.sleep(0.002)
    code, _, err = runs.finish(process)
    if code == -signal.SIGKILL:
        return met
    if code:
        raise RunError(f"a process of {workdir} ended by itself with {code}: {err[-500:]}")
    return None


def reference(workdir: Path, cache: Path, fields: dict) -> tuple[float, float]:
    """Trains in peace. Seconds of the whole process, and from its first step on."""
    start, first = time.monotonic(), None
    process = runs.start(runs.arguments(workdir, cache, **fields), cache)
    while process.poll() is None:
        first = first or (time.monotonic() if size(workdir) else None)
        time.sleep(0.002)
    code, _, err = runs.finish(process)
    if code:
        raise RunError(f"the run in peace ended with {code}: {err[-500:]}")
    return time.monotonic() - start, time.monotonic() - (first or start)


def kill_and_compare(folder: Path, kills: int, seed: int, fields: dict, say=print) -> collections.Counter:
    """Spends the kills on one run after another. Returns the phases they met; raises RunError where a run differs."""
    cache, peace, workdir = folder / "cache", folder / "peace", folder / "killed"
    reference(peace, cache, fields)  # compiles everything
    again = folder / "again"
    whole, training = reference(again, cache, fields)  # from the cache of compiled programs, as every restart
    compare(again, peace)
    say(f"undisturbed, compiled anew and from the cache: equal; {whole:.1f} s a process, {training:.1f} s from its "
        "first step on")
    moments, met, left = random.Random(seed), collections.Counter(), kills
    done = 0
    while left or workdir.exists():
        from_step = moments.random() < 0.5
        delay = moments.uniform(0, training if from_step else whole)
        where = live(workdir, cache, fields, from_step, delay if left else 3600)
        if where is None:
            compare(workdir, peace)
            shutil.rmtree(workdir)
            done += 1
            say(f"run {done} is done and equal, {sum(met.values())} kills so far")
        else:
            left -= 1
            met[where] += 1
            say(f"kill {sum(met.values())} of {kills}: {where}; checkpoints {', '.join(saved(workdir)) or 'none'}")
    say(f"{kills} kills, {done} runs, all equal bit for bit: "
        + ", ".join(f"{count} {name}" for name, count in met.most_common()))
    return met


def saved(workdir: Path) -> list[str]:
    """The steps of the checkpoints that a run has."""
    return sorted((path.name for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()), key=int)


def compare(workdir: Path, peace: Path) -> None:
    """Raises RunError with what differs."""
    found = runs.differences(workdir, peace)
    if found:
        raise RunError(f"{workdir} differs from {peace}: {', '.join(found[:5])}")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(_FOLDER.value or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        kill_and_compare(folder, _KILLS.value, _SEED.value, FIELDS)


if __name__ == "__main__":
    command.run(main, FLAGS)
