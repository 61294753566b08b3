"""How a converted checkpoint is stored: as Orbax's PyTree handler reads it, with a file for each tensor of the release.

An array is a Zarr folder `params.layers.mlp.gate_proj` (not OCDBT), not compressed; a chunk is one layer's, and where
experts are stacked one expert's, file `3.17.0.0`. Chunks of arrays that we hold transposed are in Fortran order: their
bytes are those of the release's tensor, which a conversion copies, and Zarr turns when it reads.
Weights in FP8 blocks stay E4M3 under `params`; their scales are float32 under `scales`, at the same path, with a number
for each 128x128 block of (in, out).
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research.interop import blocks
from research.interop.names import scales_path
from research.interop.tensors import FP8, Tensor
from research.interop.variables import Array

KINDS = {"F32": "<f4", "F16": "<f2", "BF16": "bfloat16", FP8: "float8_e4m3fn"}  # in Zarr's words
DICT_KEY = 2  # Orbax's key_type


class Stored(NamedTuple):
    """An array of the state: its path in the tree, and how many of its first axes have a chunk for each index."""

    path: str
    shape: tuple[int, ...]
    dtype: str  # in safetensors' words
    depth: int
    transposed: bool

    @property
    def folder(self) -> str:
        return self.path.replace("/", ".")

    def declaration(self) -> bytes:
        """Its `.zarray`."""
        return json.dumps({
            "zarr_format": 2, "shape": list(self.shape), "chunks": [1] * self.depth + list(self.shape[self.depth:]),
            "dtype": KINDS[self.dtype], "order": "F" if self.transposed else "C", "compressor": None, "filters": None,
            "fill_value": None, "dimension_separator": "."}).encode()

    def tensor(self, state: Path, index: tuple[int, ...]) -> Tensor:
        """The chunk at `index` of the first axes, as the release's tensor that it is."""
        shape = self.shape[self.depth:]
        name = ".".join(map(str, (*index, *[0] * len(shape))))
        return Tensor(state / self.folder / name, 0, self.dtype, shape[::-1] if self.transposed else shape)


def stored(array: Array, dtype: str) -> tuple[Stored, Stored | None]:
    """How an array is stored, and its scales where the dtype is FP8."""
    depth, transposed = len(array.places[0].index), array.places[0].transposed
    weights = Stored(array.path, array.shape, dtype, depth, transposed)
    if dtype != FP8:
        return weights, None
    return weights, Stored(scales_path(array.path), blocks.scale_shape(array.shape), "F32", depth, transposed)


def metadata(paths: list[str]) -> bytes:
    """Orbax's `_METADATA`: the tree of arrays; `params` and `routing` without any are empty dicts."""
    leaves = [tuple(path.split("/")) for path in paths]
    empty = [(group,) for group in ("params", "routing") if not any(leaf[0] == group for leaf in leaves)]
    tree = {str(keys): {
        "key_metadata": [{"key": key, "key_type": DICT_KEY} for key in keys],
        "value_metadata": {"value_type": "Dict" if keys in empty else "np.ndarray", "skip_deserialize": keys in empty},
    } for keys in [*leaves, *empty]}
    return json.dumps({"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False,
                       "store_array_data_equal_to_fill_value": True, "custom_metadata": None}).encode()


class Sealed:
    """A chunk that is read once, in order; where it is not as it was sealed, its path comes to stand in `damaged`."""

    def __init__(self, tensor: Tensor, digest: str, damaged: list[str]):
        self._tensor, self._digest, self._damaged, self._read = tensor, digest, damaged, hashlib.sha256()

    def read(self, first: int = 0, end: int | None = None) -> np.ndarray:
        """Rows `first` to `end`."""
        values = self._tensor.read(first, end)
        self._read.update(values.view(np.uint8))
        if end in (None, self._tensor.shape[0]) and self._read.hexdigest() != self._digest:
            self._damaged.append(str(self._tensor.path))
        return values


def open_array(state: Path, path: str) -> Any:
    """TensorStore's handle of an array of any checkpoint of ours, as Orbax wrote it."""
    import tensorstore

    store = {"driver": "file", "path": f"{state.absolute()}/"}
    if (state / "manifest.ocdbt").exists():
        store = {"driver": "ocdbt", "base": store, "path": ""}
    store["path"] += path.replace("/", ".") + "/"
    return tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()
