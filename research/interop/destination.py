"""A folder that appears under its name when all of it is on the disk, and is taken up again where it was left.

It is written as `.NAME.partial` beside its place. What stands there from an earlier attempt of the same request is
compared, byte for byte, with what is to stand there, and written again only where it differs.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from research.errors import RequestError, RunError

REQUEST = ".request.json"  # of the attempt that a partial folder is from
LOCK = ".lock"
COMPARED_AT_ONCE = 2**22  # bytes


@contextlib.contextmanager
def built(final: Path, request: dict) -> Iterator[Path]:
    """Yields the partial folder of `final`, which gets its name when the block ends.

    request: what makes two attempts the same; what another request has left is removed. Raises RequestError where
    `final` exists or the folder is in use; one from the block leaves nothing behind, any other error what is written.
    An OSError of the block becomes a RunError.
    """
    flag, final = f"--destination={str(final)!r}", final.absolute()
    if os.path.lexists(final):
        raise RequestError(f"{flag} exists already: nothing is written over")
    partial = final.with_name(f".{final.name}.partial")
    with contextlib.ExitStack() as stack:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((partial / LOCK).open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _adopt(partial, request)
        except BlockingIOError:
            raise RequestError(f"{flag} is being written by another process") from None
        except OSError as error:
            raise RequestError(f"{flag} cannot be written: {error.strerror}") from None
        waits = f"what is written waits in {partial}: the same command goes on from there"
        try:
            yield partial
            os.sync()  # all files at once: a call for each of tens of thousands takes minutes
            for name in (REQUEST, LOCK):
                (partial / name).unlink()
            partial.rename(final)
        except RequestError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        except OSError as error:
            raise RunError(f"writing {final} failed: {error.strerror or error}; {waits}") from None
        except BaseException:
            logging.info("stopped; %s", waits)
            raise


def _adopt(partial: Path, request: dict) -> None:
    """Empties the folder unless it is this request's own."""
    try:
        same = json.loads((partial / REQUEST).read_bytes()) == request
    except (OSError, ValueError):
        same = False
    if same:
        logging.info("goes on with %s; what stands there is compared with the source", partial)
        return
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
    (partial / REQUEST).write_text(json.dumps(request))


class Writer:
    """A file of the partial folder, written where it does not hold what it should."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._standing = os.fstat(self._file).st_size

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        os.close(self._file)

    def put(self, offset: int, data) -> int:
        """Makes `data` (bytes or an array) stand at `offset`; returns how many bytes had to be written."""
        view = memoryview(data).cast("B")
        if offset + len(view) <= self._standing and self._holds(offset, view):
            return 0
        done = 0
        while done < len(view):
            done += os.pwrite(self._file, view[done:], offset + done)
        return len(view)

    def end(self, size: int) -> None:
        """Cuts off what an earlier attempt may have left beyond `size`."""
        if self._standing > size:
            os.ftruncate(self._file, size)

    def _holds(self, offset: int, view: memoryview) -> bool:
        for start in range(0, len(view), COMPARED_AT_ONCE):
            part = view[start:start + COMPARED_AT_ONCE]
            if os.pread(self._file, len(part), offset + start) != part:
                return False
        return True


def put_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Makes files of a folder, by name, hold these contents."""
    for name, data in contents.items():
        put_file(folder / name, data)


def put_file(path: Path, data: bytes) -> str:
    """Makes a whole file hold `data`; returns its SHA-256."""
    with Writer(path) as writer:
        writer.put(0, data)
        writer.end(len(data))
    return hashlib.sha256(data).hexdigest()
