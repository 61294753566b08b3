"""The directory of a run: one run at a time, and the files that say what is run in it."""

import contextlib
import fcntl
import json
import time
import uuid
from pathlib import Path

from absl import logging

from research import config, environment
from research.errors import RequestError
from research.experiment import flatten
from research.files import write_whole
from research.parallel import hosts

_SECONDS_TO_SEE = 20  # what another host has written: a network's file system may be late


@contextlib.contextmanager
def owned(workdir: Path):
    """Makes the workdir and holds it: a second run in it is refused while this one lives, however it ends.

    A RequestError inside leaves the disk as it was: what was made here is removed again. Of several processes the
    first holds it, and the others make sure that theirs is the same.
    """
    lock, made = workdir / ".lock", []
    with contextlib.ExitStack() as held:
        def hold() -> str:
            nonlocal made
            try:
                made = [path for path in (lock, workdir, *workdir.parents) if not path.exists()]
                workdir.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(lock.open("a"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return _sign(file) if hosts.several() else ""
            except BlockingIOError:
                raise RequestError(f"--workdir={workdir} is in use by another run") from None
            except OSError as error:
                _remove(made)
                raise RequestError(f"--workdir={workdir} cannot be written: {error.strerror}") from None

        holder = hosts.from_first(hold)
        try:
            if hosts.several():
                _check_shared(workdir, holder)
            yield
        except RequestError:
            _remove(made)
            raise


def _sign(file) -> str:
    file.truncate(0)
    file.write(name := uuid.uuid4().hex)
    file.flush()
    return name


def _check_shared(workdir: Path, holder: str) -> None:
    end, seen = time.monotonic() + _SECONDS_TO_SEE, ""
    while seen != holder and time.monotonic() < end:
        with contextlib.suppress(OSError):
            seen = (workdir / ".lock").read_text()
        time.sleep(0 if seen == holder else 0.1)
    alone = [number for number, sees in enumerate(hosts.from_all(seen == holder)) if not sees]
    if alone:
        raise RequestError(f"--workdir={workdir} is another folder on process {alone[0]} than on process 0: all "
                           "processes of a run write to one shared folder")


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
                    logging.warning("config.%s was %r and is %r now", name, before[name], now[name])
    write_whole(path, settings.to_json())
    corpus.tokenizer.save(workdir / "tokenizer.json")
    record = environment.describe() | {"corpus_hash": corpus.corpus_hash, "matmul_peak_flops": peak}
    write_whole(workdir / "environment.json", json.dumps(record, indent=2) + "\n")
