"""The directory of a run: one process at a time, and the files that say what is run in it."""

import contextlib
import fcntl
import json
from pathlib import Path

from absl import logging

from research import config, environment
from research.errors import RequestError
from research.experiment import flatten
from research.files import write_whole


@contextlib.contextmanager
def owned(workdir: Path):
    """Makes the workdir and holds it: a second run in it is refused while this one lives, however it ends.

    A RequestError inside leaves the disk as it was: what was made here is removed again.
    """
    lock, made = workdir / ".lock", []
    with contextlib.ExitStack() as held:
        try:
            made = [path for path in (lock, workdir, *workdir.parents) if not path.exists()]
            workdir.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(lock.open("a"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"--workdir={workdir} is in use by another run") from None
        except OSError as error:
            _remove(made)
            raise RequestError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
        try:
            yield
        except RequestError:
            _remove(made)
            raise


def _remove(made: list[Path]) -> None:
    """Files and empty folders, the innermost first."""
    for path in made:
        with contextlib.suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()


def write_files(settings, workdir: Path, corpus, peak: float) -> None:
    """`config.json`, `tokenizer.json` and `environment.json` of the workdir; says which settings a resume changed."""
    path = workdir / "config.json"
    if path.exists():
        with contextlib.suppress(RequestError):
            before, now = (flatten(json.loads(s.to_json())) for s in (config.read(workdir), settings))
            for name in now:
                if before[name] != now[name]:
                    logging.warning("config.%s was %s and is %s now", name, before[name], now[name])
    write_whole(path, settings.to_json())
    corpus.tokenizer.save(workdir / "tokenizer.json")
    record = environment.describe() | {"corpus_hash": corpus.corpus_hash, "matmul_peak_flops": peak}
    write_whole(workdir / "environment.json", json.dumps(record, indent=2) + "\n")
