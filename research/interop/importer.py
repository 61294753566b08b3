"""A Hugging Face folder as a workdir of ours at step 0."""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from research.data.tokenizer import Tokenizer
from research.interop import storage
from research.interop.carried import carried
from research.interop.destination import Writer, built, put_file, put_files
from research.interop.huggingface import read_settings
from research.interop.names import SCALE, Place
from research.interop.tensors import Tensor
from research.interop.transfer import Account, Piece, Work, target, transfer
from research.interop.variables import Array, arrays_of, checked_tensors, refuse, same
from research.training.checkpoint import files_of, seal


def import_folder(source: Path, destination: Path, quantize: str | None, dtype: str | None) -> Account:
    """Writes `destination`: config.json, the tokenizer's files, and a sealed checkpoint of weights alone.

    quantize, dtype: see `transfer.target`. Raises RequestError, with a list of names, for tensors that are not exactly
    those of the source's config.json.
    """
    settings = read_settings(source)
    if (source / "tokenizer.json").is_file():
        Tokenizer.load(source)  # refuses what would be carried along torn
    arrays = arrays_of(settings)
    tensors, repeated = checked_tensors(source, settings, arrays)
    dtypes = _dtypes(source, arrays, tensors, quantize, dtype)
    refuse(source, {"different from the tensor that they repeat": [
        f"{name} (a copy of {original})" for name, original in repeated.items()
        if tensors[name].dtype != tensors[original].dtype or not same(tensors[name], tensors[original])]})
    request = {"source": str(source.absolute()), "quantize": quantize, "dtype": dtype}
    with built(destination, request) as folder:
        along, step, digests = carried(source), folder / "checkpoints" / "0", {}
        state = step / "state"
        works = [_work(array, place, tensors, dtypes[path], state, digests)
                 for path, array in arrays.items() for place in array.places]
        account = transfer(works, sum(work.nbytes for work in works))
        account.tensors = len(tensors)
        refuse(source, {"not finite (NaN or infinite values)": sorted(account.infinite)})
        written = [to for path, array in arrays.items() for to in storage.stored(array, dtypes[path]) if to]
        for name, content in (
            *((f"state/{to.folder}/.zarray", to.declaration()) for to in written),
            ("state/_METADATA", storage.metadata([to.path for to in written])),
            ("record/metadata", json.dumps({"weights_of": request}).encode()),
            ("metrics/metrics", json.dumps({"loss": None}).encode()),
        ):
            digests[name] = put_file(step / name, content)
        for name, file in files_of(step).items():
            if name not in digests:
                file.unlink()  # of an earlier attempt, when the source was another one
        os.sync()  # so that each file that is sealed is on the disk already
        seal(step, digests)
        put_files(folder, {"config.json": settings.to_json().encode()} | along)
    return account


def _dtypes(source: Path, arrays: dict[str, Array], tensors: dict[str, Tensor], quantize, dtype) -> dict[str, str]:
    """{path: dtype} in which our arrays are stored; each has one."""
    dtypes, mixed = {}, []
    for path, array in arrays.items():
        found = {place.name: target(tensors[place.name].dtype, path, quantize, dtype) for place in array.places}
        (dtypes[path], _), *others = Counter(found.values()).most_common()
        if others:
            mixed += [f"{name} is {kind} among {dtypes[path]}" for name, kind in found.items() if kind != dtypes[path]]
    refuse(source, {"of another dtype than the rest of their stack, which --dtype or --quantize makes one": mixed})
    return dtypes


def _work(array: Array, place: Place, tensors: dict[str, Tensor], dtype: str, state: Path, digests: dict) -> Work:
    tensor, scales = tensors[place.name], tensors.get(place.name + SCALE)
    chunk, scales_chunk = (to and to.tensor(state, place.index).path for to in storage.stored(array, dtype))

    def pieces() -> Iterable[Piece]:
        yield Piece(place.name, tensor.shape, tensor.dtype, dtype, tensor.read, scales and scales.read,
                    lambda rows: _write(chunk, rows, state.parent, digests),
                    lambda values: _write(scales_chunk, iter((values,)), state.parent, digests))

    return Work(tensor.nbytes + (scales.nbytes if scales else 0), pieces)


def _write(file: Path, rows: Iterator[np.ndarray], step: Path, digests: dict) -> int:
    """Writes a chunk as its rows come, and notes its digest; returns how many bytes had to be written."""
    digest, size, written = hashlib.sha256(), 0, 0
    with contextlib.ExitStack() as stack:
        writer = None
        for values in rows:
            writer = writer or stack.enter_context(Writer(file))
            data = values.view(np.uint8)
            written += writer.put(size, data)
            digest.update(data)
            size += data.nbytes
        if writer:
            writer.end(size)
            digests[file.relative_to(step).as_posix()] = digest.hexdigest()
    return written
