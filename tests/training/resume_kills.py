"""Trains a small model under kill -9 at random moments and compares the outcome bit by bit with a run left in peace.

    python -m tests.training.resume_kills --kills=100 [--seed=0] [--folder=DIR]

A run is killed four times, within a fifth of a second after a line of its metrics, drawn from all of them, or, one in
four, while a process starts. Then it is left to its end and compared, and the next one begins, until all kills are
spent. Prints what each kill met, and how often which phase at the end; exits with 1 where a run differs. About 15 s a
kill on two cores.
"""

import collections
import contextlib
import functools
import math
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
FIELDS = {"training.steps": 40, "training.batch_ramp_start": 2, "training.batch_ramp_until": 0.5,
          "checkpoint.every_steps": 4, "evaluation.every_steps": 10}
STARTING = 0.25  # share of the kills that come before a process's first step
KILLS_A_RUN = 4  # more of them would nearly all meet its last steps


def phase(workdir: Path, fields: dict, since: float) -> str:
    """What a run that has begun to step is doing, by its files; `since` is when its process was started."""
    for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"):
        with contextlib.suppress(FileNotFoundError):  # just removed, or just whole
            if path.stat().st_mtime >= since:  # not what an earlier kill has left
                return "saving"
    try:
        last = runs.lines(workdir)[-1]
    except ValueError:
        return "writing a line"
    if last["split"] == "train" and last["step"] % fields["evaluation.every_steps"] == 0:
        return "evaluating"
    return "finishing" if last["step"] == fields["training.steps"] else "training"


def count(workdir: Path) -> int:
    """Whole lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def live(workdir: Path, cache: Path, fields: dict, line: float = math.inf, seconds: float = math.inf):
    """One process, killed `seconds` after it has written a line and its metrics have `line` of them.

    A `line` of 0: so many seconds after its start. Returns the phase it was killed in; None when it was done before.
    Raises RunError for any other end.
    """
    since, process = time.time(), runs.start(runs.arguments(workdir, cache, **fields), cache)
    begun, written, met = count(workdir), 0, None
    moment = math.inf if line else time.monotonic() + seconds
    while process.poll() is None:
        now = count(workdir)
        written, begun = now - begun, min(begun, now)  # it cuts them back to its checkpoint
        if moment == math.inf and written > 0 and now >= line:
            moment = time.monotonic() + seconds
        if time.monotonic() >= moment:
            met = phase(workdir, fields, since) if written > 0 else "starting"
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    code, _, err = runs.finish(process)
    if code == -signal.SIGKILL:
        return met
    if code:
        raise RunError(f"a process of {workdir} ended by itself with {code}: {err[-500:]}")
    return None


def kill_and_compare(folder: Path, kills: int, seed: int, fields: dict, say=print) -> collections.Counter:
    """Spends the kills on one run after another. Returns the phases they met; raises RunError where a run differs."""
    cache, peace, again, workdir = (folder / name for name in ("cache", "peace", "again", "killed"))
    live(peace, cache, fields)  # compiles everything
    begin = time.time()
    live(again, cache, fields)  # from the cache of compiled programs, as every restart
    compare(again, peace)
    lines, startup = count(peace), (again / "environment.json").stat().st_mtime - begin
    say(f"in peace, compiled anew and from the cache: equal; {startup:.1f} s to start a process of "
        f"{time.time() - begin:.1f} s")
    moments, met, done = random.Random(seed), collections.Counter(), 0
    while met.total() < kills:
        for line in sorted(moments.uniform(0, lines) for _ in range(min(KILLS_A_RUN, kills - met.total()))):
            starting = moments.random() < STARTING
            seconds = moments.uniform(0, startup if starting else 0.2)
            where = live(workdir, cache, fields, 0 if starting else line, seconds)
            if where is None:
                break
            met[where] += 1
            say(f"kill {met.total()} of {kills}: {where}; checkpoints {', '.join(saved(workdir)) or 'none'}")
        live(workdir, cache, fields)
        compare(workdir, peace)
        shutil.rmtree(workdir)
        done += 1
        say(f"run {done} is done and equal after {met.total()} kills")
    say(f"{kills} kills in {done} runs, all equal bit for bit: "
        + ", ".join(f"{number} {name}" for name, number in met.most_common()))
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
        kill_and_compare(folder, _KILLS.value, _SEED.value, FIELDS, say=functools.partial(print, flush=True))


if __name__ == "__main__":
    command.run(main, FLAGS)
