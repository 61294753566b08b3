"""Arrays on disk: memory-mapped, written whole or not at all, never believed without their digest.

A file is a magic line, the digest of all that follows, the length of a JSON header, the header
(name -> dtype, shape, start) and the arrays themselves. Nothing in it is ever executed.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from research.errors import RequestError

Arrays = dict[str, np.ndarray]

_MAGIC = b"parsimony arrays 1\n".ljust(32, b"\0")
_DIGEST_BYTES = 32
_ALIGNMENT = 64


def remember(folder: str, name: str, build: Callable[[], Arrays]) -> Arrays:
    """The arrays of `folder/name`; built and stored where the file is absent or damaged.

    Raises RequestError, before building, where `folder` (`data.cache`) cannot be written.
    """
    path = Path(folder).expanduser() / name
    arrays = load(path)
    if arrays is not None:
        return arrays
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass  # an unwritable folder is better known before the work than after it
        built = build()
        save(path, built)
    except OSError as error:
        raise RequestError.field("data.cache", folder, f"cannot be written: {error.strerror or error}") from None
    return load(path) or built


def save(path: Path, arrays: Arrays) -> None:
    """Writes `arrays` beside `path` and renames the file when it is complete: readers see all or nothing."""
    header, start = {}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": array.dtype.str, "shape": array.shape, "start": start}
        start += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    encoded = json.dumps(header).encode()
    lead = len(_MAGIC) + _DIGEST_BYTES + 8
    encoded = encoded.ljust(-(-(lead + len(encoded)) // _ALIGNMENT) * _ALIGNMENT - lead)

    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_MAGIC + bytes(_DIGEST_BYTES))
            for piece in (len(encoded).to_bytes(8, "little"), encoded, *_padded(arrays)):
                digest.update(piece)
                file.write(piece)
            file.seek(len(_MAGIC))
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path: Path) -> Arrays | None:
    """The arrays of a file, memory-mapped and read-only; None where it is absent, cut short or altered."""
    lead = len(_MAGIC) + _DIGEST_BYTES + 8
    try:
        if path.stat().st_size < lead:
            return None
        raw = np.asarray(np.memmap(path, np.uint8, mode="r"))
    except OSError:
        return None
    if raw[: len(_MAGIC)].tobytes() != _MAGIC:
        return None
    body = raw[len(_MAGIC) + _DIGEST_BYTES :]
    if hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() != raw[len(_MAGIC) : lead - 8].tobytes():
        return None
    data = lead + int.from_bytes(raw[lead - 8 : lead].tobytes(), "little")
    header = json.loads(raw[lead:data].tobytes())
    arrays = {}
    for name, entry in header.items():
        dtype, start = np.dtype(entry["dtype"]), data + entry["start"]
        count = int(np.prod(entry["shape"], dtype=np.int64))
        arrays[name] = raw[start : start + count * dtype.itemsize].view(dtype).reshape(entry["shape"])
    return arrays


def _padded(arrays: Arrays):
    for array in arrays.values():
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        yield bytes(-array.nbytes % _ALIGNMENT)
