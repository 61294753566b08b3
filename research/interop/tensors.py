"""The tensors of a folder of safetensors files: every header is checked before a byte of data is read.

A file is 8 bytes of header length (little-endian), the header as JSON ({name: {dtype, shape, data_offsets}}, offsets
from the header's end), then the data, without gaps. Nothing is unpickled.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from research.errors import RequestError

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_RANK = 8
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2,
              "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
FLOATS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
FP8 = "F8_E4M3"  # read with a scale for each block, see research/interop/blocks.py
DTYPES = FLOATS | {FP8: np.dtype(ml_dtypes.float8_e4m3fn)}  # what is read and written


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `begin` counts from the start of the file."""

    path: Path
    begin: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def read(self, first: int = 0, end: int | None = None) -> np.ndarray:
        """Rows `first` to `end` of the first axis, or all, in the stored dtype, one of DTYPES.

        A copy that depends on the file no more.
        """
        shape = self.shape
        if shape:
            shape = (len(range(*slice(first, end).indices(shape[0]))), *shape[1:])
        count, row = math.prod(shape), math.prod(shape[1:]) * ITEM_BYTES[self.dtype]
        try:
            values = np.fromfile(self.path, DTYPES[self.dtype], count, offset=self.begin + first * row)
        except OSError as error:
            raise RequestError(f"{self.path} cannot be read: {error.strerror}") from None
        if values.size != count:
            raise RequestError(f"{self.path} has become shorter while it was read")
        return values.reshape(shape)


def read_json(path: Path, limit: int = MAX_HEADER_BYTES) -> dict:
    """The JSON object in a file. Raises RequestError when it is anything else, or larger than `limit` bytes."""
    try:
        if not path.is_file():
            raise RequestError(f"{path} " + ("is not a file" if path.exists() else "does not exist"))
        if path.stat().st_size > limit:
            raise RequestError(f"{path} has {path.stat().st_size} bytes; at most {limit} are read")
        return _parse(path, "it", path.read_bytes())
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None


def list_tensors(folder: Path) -> dict[str, Tensor]:
    """{name: Tensor} of the folder's safetensors files, those of its index where it has one.

    Raises RequestError, naming the file, for a header that is wrong about its file, a name that stands twice, or an
    index that does not agree with the files.
    """
    index = folder / INDEX
    indexed = _read_index(index) if index.exists() else None
    files = sorted(set(indexed.values())) if indexed is not None else sorted(
        path.name for path in folder.glob("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_header(folder / file).items():
            if name in tensors:
                raise RequestError(f"{folder / file} holds {name!r}, which is in {tensors[name].path.name} too")
            tensors[name] = tensor
    if indexed is not None:
        for name in sorted({*indexed, *tensors}):
            if name not in tensors:
                raise RequestError(f"{index} places {name!r} in {indexed[name]}, which does not hold it")
            if tensors[name].path.name != indexed.get(name):
                expected = f"places it in {indexed[name]}" if name in indexed else "does not list it"
                raise RequestError(f"{tensors[name].path} holds {name!r}, but {INDEX} {expected}")
    return tensors


def read_header(path: Path) -> dict[str, Tensor]:
    """{name: Tensor} of one file, checked: types, shapes and sizes agree, and the data are covered exactly once."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise RequestError(f"{path} " + ("is not a file" if path.exists() else "does not exist"))
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise RequestError(f"{path} is no safetensors file: it has {size} bytes, fewer than a header's length")
            length = int.from_bytes(start, "little")
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise RequestError(f"{path}: its header says it has {length} bytes; the file has {size}, and a header "
                                   f"at most {MAX_HEADER_BYTES}")
            text = file.read(length)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    header = _parse(path, "its header", text)
    header.pop("__metadata__", None)
    tensors = {name: _place(path, name, entry, 8 + length) for name, entry in header.items()}
    end, before = 8 + length, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if tensor.begin != end:
            what = "overlaps" if tensor.begin < end else "leaves a gap after"
            raise RequestError(f"{path}: the data of {name!r} {what} {before}: data_offsets must follow one another")
        end, before = tensor.begin + tensor.nbytes, repr(name)
    if end != size:
        raise RequestError(f"{path} has {size} bytes where its header describes {end}: "
                           + ("it is truncated" if size < end else "data without a name are left over"))
    return tensors


def _place(path: Path, name: str, entry, data: int) -> Tensor:
    """One entry of a header; `data` is where the file's data begin."""
    def wrong(what: str) -> RequestError:
        return RequestError(f"{path}: tensor {name!r}: {what}")

    def whole(values) -> bool:
        return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

    if not isinstance(entry, dict) or {"dtype", "shape", "data_offsets"} - set(entry):
        raise wrong("its entry must hold dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise wrong(f"dtype={_shown(dtype)} must be one of {', '.join(ITEM_BYTES)}")
    if not whole(shape) or len(shape) > MAX_RANK:
        raise wrong(f"shape={_shown(shape)} must be a list of at most {MAX_RANK} whole numbers from 0")
    if not whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"data_offsets={_shown(offsets)} must be a begin and an end, whole numbers from 0")
    described = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != described:
        raise wrong(f"data_offsets={_shown(offsets)} must span the {_shown(described)} bytes of {dtype} "
                    f"{_shown(shape)}")
    return Tensor(path, data + offsets[0], dtype, tuple(shape))


def _shown(value) -> str:
    """A value of unknown kind and length for an error's one line."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    text = json.dumps(value)
    return text if len(text) < 100 else text[:100] + "..."


def _parse(path: Path, what: str, text: bytes) -> dict:
    def unique(pairs):
        table = {}
        for name, value in pairs:
            if name in table:
                raise RequestError(f"{path}: {what} has the key {_shown(name)} twice")
            table[name] = value
        return table

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: {what} is not JSON: {_line(error)}") from None
    if not isinstance(value, dict):
        raise RequestError(f"{path}: {what} must be a JSON object, not {type(value).__name__}")
    return value


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _read_index(path: Path) -> dict[str, str]:
    """{tensor: file} of an index."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise RequestError(f"{path}: weight_map must be an object that names each tensor's file")
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors") or "\0" in file:
            raise RequestError(f"{path}: weight_map places {name!r} in {_shown(file)}, which is not the name of a "
                               "safetensors file in its folder")
    return places
