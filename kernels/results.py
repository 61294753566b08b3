"""The file that `kernels.bench --json` writes as results come, and goes on from."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from kernels import record
from kernels.command import RequestError, RunError


class Results:
    """A record for each operation, shape and device; those of other sources or another JAX count as not measured.

    `path` None: nothing is kept. RequestError where the file cannot be written, or is not one of ours.
    """

    def __init__(self, path: str | None):
        self.path = None if path is None else Path(path)
        self.records, self.attempts, self.identity = [], [], {}
        if self.path is None:
            return
        folder = self.path.absolute().parent
        if self.path.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise RequestError(f"--json={path!r} is not a file that can be written")
        if self.path.exists():
            try:
                content = json.loads(self.path.read_text())
                self.records, self.attempts = content["results"], content["attempts"]
            except (OSError, ValueError, TypeError, KeyError):
                raise RequestError(f"--json={path!r} exists and is not a result of kernels.bench") from None

    def identify(self, device: str) -> None:
        """What new results are results of, and old ones must be."""
        self.identity = {"device": device, "code": record.code()} | record.versions("jax")

    def find(self, operation: str, shape: str) -> dict | None:
        """The record of this device, code and JAX."""
        return next((r for r in self.records if r["operation"] == operation and r["shape"] == shape
                     and all(r.get(name) == value for name, value in self.identity.items())), None)

    def keep(self, result: dict) -> None:
        """Adds a record, in place of what stands there for its operation, shape and device."""
        replaced = ("operation", "shape", "device")
        result.update(self.identity | {"date": record.now(), "commit": record.commit()})
        self.records = [r for r in self.records if any(r[name] != result[name] for name in replaced)] + [result]
        self._write()

    def lost(self, what: str) -> bool:
        """Whether a process of the same device, code and JAX ended in the middle of this: a kernel that hangs."""
        return {"what": what} | self.identity in self.attempts

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Notes for `lost` what is being run, until it comes back or raises something other than a RunError."""
        note = {"what": what} | self.identity
        self.attempts = [a for a in self.attempts if a != note] + [note]
        self._write()
        keep = False
        try:
            yield
        except RunError:
            keep = True
            raise
        finally:
            if not keep:
                self.attempts.remove(note)
                self._write()

    def _write(self) -> None:
        if self.path is not None:
            record.write_json(self.path, {"results": self.records, "attempts": self.attempts})
