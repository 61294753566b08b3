"""A workdir of ours as a Hugging Face folder in the layout of the release."""

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from research import config
from research.data.tokenizer import Tokenizer
from research.errors import RequestError
from research.interop import blocks, storage
from research.interop.carried import carried
from research.interop.destination import built, put_files
from research.interop.names import SCALE, Place, repeats
from research.interop.release import config_json
from research.interop.shards import Shards, entries_of, lay_out
from research.interop.tensors import DTYPES, FP8, Tensor
from research.interop.transfer import Account, Piece, Work, target, transfer
from research.interop.variables import Array, arrays_of, refuse
from research.interop.weights import stored_dtypes, weights_alone
from research.training.checkpoint import Checkpoints, damage, params_of, saved_tree, sealed


def export_workdir(source: Path, destination: Path, quantize: str | None, dtype: str | None) -> Account:
    """Writes `destination`: config.json, safetensors shards with their index, and the tokenizer's files.

    Of the source's newest intact checkpoint; quantize, dtype: see `transfer.target`. Raises RequestError for a model
    that no released family computes, and for a checkpoint that is not of it.
    """
    settings = config.read(source)
    if settings.model.vocab_size is None:
        raise RequestError(f"{source / 'config.json'}: config.model.vocab_size=None must be a whole number")
    arrays = arrays_of(settings)
    folder, digests = _checkpoint(source, settings)
    saved = saved_tree(folder)
    params = params_of(saved)
    stored = stored_dtypes(source, saved, arrays)
    dtypes = {path: target(stored[path], path, quantize, dtype) for path in arrays}
    tokenizer = Tokenizer.load(source) if (source / "tokenizer.json").is_file() else None
    common = Counter(dtypes[path] for path in arrays if dtypes[path] != FP8).most_common(1)[0][0]
    raw = config_json(settings, common, FP8 in dtypes.values(), tokenizer and tokenizer.bos_id,
                      tokenizer and tokenizer.eos_id)
    repeated = repeats(settings)
    request = {"source": str(source.absolute()), "step": int(folder.name), "quantize": quantize, "dtype": dtype}
    entries = list(entries_of(arrays, dtypes, repeated))
    damaged: list[str] = []
    powers: list[bool] = []  # of each tensor's scales, whether they are powers of two
    with built(destination, request) as written, Shards(written, lay_out(entries)) as shards:
        along = carried(source)
        works = [work for path, array in arrays.items()
                 for work in _works(folder, params, array, stored[path], dtypes[path], repeated, shards, digests,
                                    damaged, powers)]
        account = transfer(works, sum(work.nbytes for work in works))
        account.tensors = len(entries)
        if damaged:
            raise RequestError(f"{folder} is damaged: {', '.join(sorted(damaged))} changed after it was sealed")
        refuse(source, {"not finite (NaN or infinite values)": sorted(account.infinite)})
        if powers and all(powers):
            raw["quantization_config"] |= blocks.SCALE_FORMAT
        put_files(written, {"config.json": (json.dumps(raw, indent=2) + "\n").encode()} | along)
    return account


def _checkpoint(source: Path, settings) -> tuple[Path, dict[str, str]]:
    """The newest intact checkpoint; of one that a conversion wrote {name: digest} of chunks to be checked when read."""
    directory = source / "checkpoints"
    if weights_alone(source):
        folder = directory / "0"
        chunks = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # which `damage` reports
            chunks = {name: digest for name, (_, digest) in sealed(folder).items()
                      if name.startswith("state/") and not name.endswith((".zarray", "_METADATA"))}
        if wrong := damage(folder, unread=chunks):
            raise RequestError(f"{folder} is damaged: {wrong}")
        return folder, chunks
    step = Checkpoints(directory, settings.checkpoint.keep_last, settings.checkpoint.keep_best).newest_intact()
    if step is None:
        raise RequestError(f"{directory} holds no intact checkpoint")
    return directory / str(step), {}


def _works(folder: Path, params: str, array: Array, source: str, to: str, repeated: dict[str, list[str]],
           shards: Shards, digests: dict[str, str], damaged: list[str], powers: list[bool]) -> Iterator[Work]:
    """One for each tensor where a conversion has stored the array, one for all of it where a run has."""
    state, ways = folder / "state", storage.stored(array, source)

    def piece(place: Place, read, read_scales) -> Piece:
        names = (place.name, *repeated.get(place.name, ()))

        def write_scales(made: np.ndarray) -> int:
            powers.append(blocks.powers_of_two(made))
            return _write((place.name + SCALE,), iter((made,)), shards)

        return Piece(place.name, array.their_shape, source, to, read, read_scales,
                     lambda rows: _write(names, rows, shards), write_scales)

    def sealed_reads(tensor: Tensor):
        return storage.Sealed(tensor, digests[tensor.path.relative_to(folder).as_posix()], damaged).read

    if digests:
        for place in array.places:
            tensors = [way.tensor(state, place.index) for way in ways if way]
            made = piece(place, *map(sealed_reads, tensors), *[None] * (2 - len(tensors)))
            yield Work(sum(tensor.nbytes for tensor in tensors), lambda made=made: (made,))
        return

    def pieces() -> Iterator[Piece]:
        group, _, path = array.path.partition("/")
        values = storage.open_array(state, f"{params if group == 'params' else group}/{path}").read().result()
        for place in array.places:
            tensor = values[place.index].T if place.transposed else values[place.index]
            yield piece(place, lambda first, end, tensor=tensor: tensor[first:end], None)

    yield Work(math.prod(array.shape) * DTYPES[source].itemsize, pieces)


def _write(names: tuple[str, ...], rows: Iterator[np.ndarray], shards: Shards) -> int:
    """Writes a tensor, and its copies, as its rows come; returns how many bytes had to be written."""
    offset, written = 0, 0
    for values in rows:
        data = values.view(np.uint8)
        written += sum(shards.put(name, offset, data) for name in names)
        offset += data.nbytes
    return written
