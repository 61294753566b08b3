"""Documents: where the text comes from, in a fixed order, and which of them are held out."""

import dataclasses
import functools
import glob
import gzip
import hashlib
import itertools
import json
import math
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import base
from research.errors import RequestError

READ_BY = {  # fields that some sources alone read
    "files": ("files",), "text_field": ("files", "huggingface"), "huggingface_dataset": ("huggingface",),
    "huggingface_config": ("huggingface",), "huggingface_split": ("huggingface",)}
# not the library, or its tests: three fifths of the text where they are installed, absent from many Pythons
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and where it comes from: a path, or `path:line` of a file with a document a line."""

    name: str
    text: str

    @functools.cached_property
    def digest(self) -> bytes:
        """16 bytes that depend on the text alone."""
        return hashlib.blake2b(self.text.encode(), digest_size=16).digest()


def documents(data: Any) -> list[Document]:
    """All documents of `data.source` (settings' data group), at most `data.max_documents`, in a fixed order.

    Blank documents are left out. Raises RequestError for an unknown source, for a field that another source would
    read, for files that are missing, unreadable or malformed, and where nothing is left.
    """
    readers = {"stdlib": _stdlib, "files": _files, "huggingface": _huggingface}
    if data.source not in readers:
        raise RequestError.field("data.source", data.source, f"is none of {', '.join(readers)}")
    default = base.get_config().data
    for name, those in READ_BY.items():
        if data[name] != default[name] and data.source not in those:
            wanted = " or ".join(map(repr, those))
            raise RequestError.field(f"data.{name}", data[name], f"is read with config.data.source={wanted} alone, not "
                                     f"{data.source!r}: set it to {default[name]!r}")
    found = list(itertools.islice(readers[data.source](data), data.max_documents or None))
    if not found:
        raise RequestError.field("data.source", data.source, "yields no document with text in it")
    return found


def place_of(digest: bytes) -> float:
    """Where a text stands in [0, 1) by its hash: the same on every machine, in every order and in every corpus."""
    return int.from_bytes(digest[:8], "big") / 2**64


def split(found: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """(training, validation) documents: held out are those whose hash, as a number in [0, 1), is below `fraction`.

    The same text is on the same side on every machine, in every order and in every corpus; order is kept. Of one text
    alone, as a book in a file, the last `fraction` of its characters is held out.
    Raises RequestError where a `fraction` above 0 and below 1 leaves either side empty, naming one that does not.
    """
    if 0 < fraction < 1 and len(found) == 1:
        name, text = found[0].name, found[0].text
        end = math.ceil(len(text) * (1 - fraction))
        if text[:end].strip() and text[end:].strip():
            return [Document(name, text[:end])], [Document(name, text[end:])]
        raise RequestError.field("data.validation_fraction", fraction, f"leaves nothing of a text of {len(text)} "
                                 f"characters for {'validation' if text[:end].strip() else 'training'}")
    places = [place_of(document.digest) for document in found]
    train = [document for document, place in zip(found, places, strict=True) if place >= fraction]
    validation = [document for document, place in zip(found, places, strict=True) if place < fraction]
    if 0 < fraction < 1 and not (train and validation):
        distinct = sorted(set(places))
        side = "validation" if train else "training"
        if len(distinct) == 1:
            way = "they are one text, again and again"
        else:
            enough = math.floor(distinct[0] * 1e4 + 1) / 1e4 if train else math.floor(distinct[-1] * 1e4) / 1e4
            way = f"{enough:.4f} is {'the least' if train else 'the most'} that does not"
        raise RequestError.field(
            "data.validation_fraction", fraction, f"leaves none of {len(found)} documents for {side}: {way}"
        )
    return train, validation


def corpus_hash(found: Sequence[Document]) -> str:
    """Hexadecimal digest of the texts in their order; names do not count."""
    return hashlib.blake2b(b"".join(document.digest for document in found), digest_size=16).hexdigest()


def utf8_bytes(found: Sequence[Document]) -> int:
    """UTF-8 bytes of the texts: the denominator of bits per byte."""
    return sum(len(document.text.encode()) for document in found)


def gzip_bits_per_byte(found: Sequence[Document]) -> float | None:
    """What `gzip -9` takes for the documents, concatenated in their order, in bits a byte; None of nothing."""
    raw = b"".join(document.text.encode() for document in found)
    return 8 * len(gzip.compress(raw, compresslevel=9, mtime=0)) / len(raw) if raw else None


def _stdlib(data: Any) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    if not names:
        raise RequestError.field("data.source", data.source, f"finds no source files of this Python in {root}")
    for name in sorted(names):
        try:
            text = (root / name).read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            yield Document(name, text)


def _files(data: Any) -> Iterator[Document]:
    for path in _matching(data.files):
        count = 0
        for document in _documents_of(path, data):
            count += 1
            yield document
        if not count:
            raise RequestError.field("data.files", data.files, f"{path} holds no document: the file is empty")


def _matching(patterns: str) -> list[str]:
    paths = set()
    for pattern in filter(None, map(str.strip, patterns.split(","))):
        expanded = os.path.expanduser(pattern)
        matches = [expanded] if os.path.exists(expanded) else glob.glob(expanded, recursive=True)
        files = [Path(match).as_posix() for match in matches if os.path.isfile(match)]
        if not files:
            folder = os.path.isdir(expanded)
            reason = "is a folder: name its files, as in folder/**/*.txt" if folder else "matches no file"
            raise RequestError.field("data.files", patterns, reason if pattern == patterns else f"{pattern!r} {reason}")
        paths.update(files)
    if not paths:
        raise RequestError.field("data.files", patterns, "names no file: expected globs separated by commas")
    return sorted(paths)


def _documents_of(path: str, data: Any) -> Iterator[Document]:
    def refuse(expectation: str, line: int | None = None) -> RequestError:
        return RequestError.field("data.files", data.files, f"{path}{f':{line}' if line else ''} {expectation}")

    try:
        raw = Path(path).read_bytes()
        if path.endswith(".gz"):
            raw = gzip.decompress(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise refuse(f"is not an intact gzip file: {error}") from None
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror or error}") from None
    try:
        content = raw.decode()
    except UnicodeDecodeError as error:
        raise refuse(f"is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}") from None

    if not path.removesuffix(".gz").endswith((".jsonl", ".json")):
        if content.strip():
            yield Document(path, content)
        return
    for number, line in enumerate(content.removeprefix("\ufeff").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise refuse(f"is not JSON ({reason}): expected one object a line", number) from None
        if not isinstance(row, dict) or data.text_field not in row:
            raise refuse(f"has no field {data.text_field!r} (config.data.text_field)", number)
        text = row[data.text_field]
        if not isinstance(text, str) or not _is_unicode(text):
            raise refuse(f"has a field {data.text_field!r} that is not text (config.data.text_field)", number)
        if text.strip():
            yield Document(f"{path}:{number}", text)


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _huggingface(data: Any) -> Iterator[Document]:
    def refuse(error: Exception) -> RequestError:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return RequestError.field("data.huggingface_dataset", data.huggingface_dataset, f"cannot be read: {reason}")

    if not data.huggingface_dataset:
        raise RequestError.field("data.huggingface_dataset", "", "is empty: expected a dataset's name")
    if not data.max_documents:
        raise RequestError.field("data.max_documents", 0, "must say how many documents at most: a dataset is read into "
                                 "memory before the first step (a number that is large enough gives all of it)")
    try:
        import datasets  # optional: this source alone needs it
    except ImportError:
        raise RequestError.field(
            "data.source", data.source, "needs a package that is not installed: pip install -r requirements-data.txt"
        ) from None
    name, config, part = data.huggingface_dataset, data.huggingface_config, data.huggingface_split
    try:
        rows = iter(datasets.load_dataset(name, config or None, split=part, streaming=True))
    except Exception as error:  # whatever the library raises, the request cannot be served
        raise refuse(error) from None
    for number in itertools.count(1):
        try:
            row = next(rows, None)
        except Exception as error:  # the same, in the middle of a download
            raise refuse(error) from None
        if row is None:
            return
        text = row.get(data.text_field)
        if not isinstance(text, str):
            fields = ", ".join(map(str, row))
            raise RequestError.field("data.text_field", data.text_field, f"is no text of {name}: it has {fields}")
        if text.strip():
            yield Document(f"{name}:{number}", text)
