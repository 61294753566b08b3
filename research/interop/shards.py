"""Safetensors files of bounded size and their index, laid out before a byte of data is read."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from research.interop import blocks
from research.interop.destination import Writer, put_file
from research.interop.names import SCALE
from research.interop.tensors import FP8, INDEX, ITEM_BYTES
from research.interop.variables import Array

SHARD_BYTES = 5_000_000_000


class Entry(NamedTuple):
    """A tensor that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def entries_of(arrays: dict[str, Array], dtypes: dict[str, str], repeated: dict[str, list[str]]) -> Iterator[Entry]:
    """The tensors of arrays that leave in these dtypes, by path, with their scales and copies.

    repeated: {original: its copies}.
    """
    for path, array in arrays.items():
        for place in array.places:
            for name in (place.name, *repeated.get(place.name, ())):
                yield Entry(name, dtypes[path], array.their_shape)
            if dtypes[path] == FP8:
                yield Entry(place.name + SCALE, "F32", blocks.scale_shape(array.their_shape))


def lay_out(entries: Iterable[Entry], limit: int = SHARD_BYTES) -> list[list[Entry]]:
    """The entries by shard, layer after layer; no shard has more than `limit` bytes unless one tensor does."""
    shards, size = [[]], 0
    for entry in sorted(entries, key=lambda entry: _order(entry.name)):
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


class Shards:
    """The files of a layout in a folder, opened for writing, each with its header in place."""

    def __init__(self, folder: Path, layout: list[list[Entry]]):
        self._places: dict[str, tuple[Writer, int]] = {}
        self._writers = []
        files = {}
        for number, entries in enumerate(layout, start=1):
            # wide items first: torch reads a tensor in place only where its offset is a multiple of its item
            entries = sorted(entries, key=lambda entry: -ITEM_BYTES[entry.dtype])
            file = f"model-{number:05d}-of-{len(layout):05d}.safetensors"
            header, offset = {"__metadata__": {"format": "pt"}}, 0
            for entry in entries:
                header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape),
                                      "data_offsets": [offset, offset + entry.nbytes]}
                offset += entry.nbytes
                files[entry.name] = file
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            writer = Writer(folder / file)
            writer.put(0, len(text).to_bytes(8, "little") + text)
            writer.end(8 + len(text) + offset)
            self._writers.append(writer)
            self._places |= {entry.name: (writer, 8 + len(text) + header[entry.name]["data_offsets"][0])
                             for entry in entries}
        for stray in set(folder.glob("*.safetensors")) - {writer.path for writer in self._writers}:
            stray.unlink()  # of an earlier attempt, when the source was another one
        total = sum(entry.nbytes for entries in layout for entry in entries)
        put_file(folder / INDEX, (json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=1)
                                  + "\n").encode())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for writer in self._writers:
            writer.close()

    def put(self, name: str, offset: int, data) -> int:
        """Makes `data` stand at `offset` of a tensor; returns how many bytes had to be written."""
        writer, begin = self._places[name]
        return writer.put(begin + offset, data)


def _order(name: str) -> tuple:
    """Embedding, layers by number, final norm, head; numbers in a name count as numbers."""
    parts = tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))
    first = ("model.embed_tokens" in name and ".layers." not in name, ".layers." in name, name.startswith("model.norm"))
    return first.index(True) if True in first else len(first), parts
