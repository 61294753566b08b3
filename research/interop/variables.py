"""The tensors of a Hugging Face folder as our variables: strict, one tensor at a time."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from kernels.weight_only import Blocks
from research.errors import RequestError
from research.interop import blocks
from research.interop.huggingface import check_counts, list_weights
from research.interop.names import SCALE, TOP, Place, copies, in_blocks, places
from research.interop.tensors import DTYPES, FLOATS, FP8, Tensor
from research.model.build import make_model, variable_shapes
from research.tree import paths


class Array(NamedTuple):
    """One of our arrays: `params/layers/mlp/gate_proj`, its shape, and the tensors of theirs that make it up."""

    path: str
    shape: tuple[int, ...]
    places: tuple[Place, ...]

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Of each of its tensors."""
        shape = self.shape[len(self.places[0].index):]
        return shape[::-1] if self.places[0].transposed else shape


@lru_cache(maxsize=4)  # tracing a model takes a second
def arrays_of(settings) -> dict[str, Array]:
    """{path: Array} of the settings' model, from shapes alone."""
    shapes = variable_shapes(make_model(settings), settings)
    return {path: Array(path, leaf.shape, tuple(places(path.split("/", 1)[1], leaf.shape, settings.model)))
            for path, leaf in paths({name: shapes[name] for name in ("params", "routing")}).items()}


def checked_tensors(folder: Path, settings, arrays: dict[str, Array]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The folder's tensors by name, and {copy: original} of those that only repeat another one.

    Every tensor that is missing, left over, of another shape or of a dtype that is not read stands in one RequestError.
    """
    tensors = list_weights(folder)
    check_counts(folder / "config.json", settings.model, settings.mtp.num_nextn_predict_layers, len(tensors))
    repeated = copies(settings)
    if settings.model.tie_word_embeddings and TOP["lm_head"] in tensors:
        repeated[TOP["lm_head"]] = TOP["embed_tokens"]
    owners = {place.name: array for array in arrays.values() for place in array.places}
    shapes = {name: array.their_shape for name, array in owners.items()}
    shapes |= {name: shapes[original] for name, original in repeated.items()}
    narrow = {name for name, array in owners.items()
              if name in tensors and tensors[name].dtype == FP8 and in_blocks(array.path)}
    scales = {name + SCALE: blocks.scale_shape(shapes[name]) for name in narrow}
    alone = {name for name in tensors if name.endswith(SCALE)} - scales.keys()
    expected = shapes | scales
    shared = sorted(tensors.keys() & expected.keys())
    refuse(folder, {
        "missing": sorted(shapes.keys() - tensors.keys()),
        "left over": sorted(tensors.keys() - expected.keys() - alone),
        f"in {FP8} without their scales": sorted(name for name in narrow if name + SCALE not in tensors),
        f"scales without a weight in {FP8}": sorted(alone),
        "of another shape": [f"{name} is {list(tensors[name].shape)} and must be {list(expected[name])}"
                             for name in shared if tensors[name].shape != expected[name]],
        "of a dtype that is not read": [
            f"{name} is {tensors[name].dtype} and must be {'F32' if name in scales else ', '.join(FLOATS)}"
            for name in shared if name not in narrow
            and tensors[name].dtype not in (("F32",) if name in scales else FLOATS)],
    })
    return tensors, repeated


def read_variables(folder: Path, settings, stored: bool = False) -> dict:
    """{`params`, `routing`} of the settings' model as float32 numpy arrays, FP8 blocks dequantised.

    stored: each as a `Stored` instead, of which nothing is read yet. Strict: see `checked_tensors`; tensors with NaN or
    infinite values, and copies that differ from their original, stand in a RequestError too.
    """
    folder = Path(folder)
    arrays = arrays_of(settings)
    tensors, repeated = checked_tensors(folder, settings, arrays)
    found, infinite = {array.path: Stored(folder, array, tensors) for array in arrays.values()}, []
    if not stored:
        found = {path: each.read((), infinite, np.dtype(np.float32)) for path, each in found.items()}
    refuse(folder, {NOT_FINITE: infinite})
    different = [f"{name} (a copy of {original})" for name, original in repeated.items()
                 if not np.array_equal(tensors[name].read(), tensors[original].read())]
    refuse(folder, {"different from the tensor that they repeat": different})
    return {"params": {}, "routing": {}} | unflatten_dict(found, sep="/")


NOT_FINITE = "not finite (NaN or infinite values)"


@dataclass(frozen=True)
class Stored:
    """One of our arrays, read when it is asked for: x[...], or x[i] of a stack, in the dtype of its tensors.

    Of FP8 tensors these are `Blocks`; where the tensors' dtypes differ, float32. RequestError for values that are not
    finite.
    """

    folder: Path
    array: Array
    tensors: dict[str, Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def __getitem__(self, index) -> np.ndarray | Blocks:
        infinite = []
        found = self.read(() if index is ... else (range(self.shape[0])[index],), infinite)
        refuse(self.folder, {NOT_FINITE: infinite})
        return found

    def read(self, index: tuple[int, ...], infinite: list[str], dtype: np.dtype | None = None) -> np.ndarray | Blocks:
        """What stands under an index; the names of tensors that are not finite are added to `infinite`.

        dtype: None is what `__getitem__` gives.
        """
        places = [place for place in self.array.places if place.index[:len(index)] == index]
        shape, kinds = self.array.shape[len(index):], {self.tensors[place.name].dtype for place in places}
        dtype = dtype or (DTYPES[kinds.pop()] if len(kinds) == 1 else np.dtype(np.float32))
        values, scales = np.empty(shape, dtype), None
        if dtype == DTYPES[FP8]:
            scales = np.empty(blocks.scale_shape(shape), np.float32)
        for place in places:
            at, read = place.index[len(index):], self.tensors[place.name].read()
            if not blocks.finite(read):
                infinite.append(place.name)
            if self.tensors[place.name].dtype == FP8:
                own = self.tensors[place.name + SCALE].read()
                if not blocks.finite(own):
                    infinite.append(place.name + SCALE)
                    continue
                if scales is None:
                    read = blocks.dequantize(read, own)
                else:
                    scales[at] = own.T if place.transposed else own
            _bytes(values)[at] = _bytes(read.T if place.transposed else read)
        return values if scales is None else Blocks(values, scales)


def _bytes(x: np.ndarray) -> np.ndarray:
    """8-bit floats as integers, which numpy copies as they are; others as they come."""
    return x.view(np.uint8) if x.dtype == DTYPES[FP8] else x


def refuse(folder: Path, problems: dict[str, list[str]]) -> None:
    """Raises one RequestError that lists every name, by problem, unless there are none."""
    found = [f"{len(names)} {problem}: " + ", ".join(name if name.isprintable() else repr(name) for name in names)
             for problem, names in problems.items() if names]
    if found:
        raise RequestError(f"{folder}: the tensors are not those of its config.json: {'; '.join(found)}")
