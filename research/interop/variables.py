"""The tensors of a Hugging Face folder, or of a workdir made of one, as our variables: strict, in pieces of rows."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from kernels.weight_only import Blocks
from research.errors import RequestError
from research.interop import blocks
from research.interop.huggingface import check_counts, list_weights
from research.interop.names import SCALE, TOP, Place, copies, in_blocks, places
from research.interop.tensors import DTYPES, FLOATS, FP8, Tensor
from research.interop.transfer import row_blocks
from research.model.build import make_model, variable_shapes
from research.parallel import hosts
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


def stored_variables(folder: Path, settings) -> dict:
    """{`params`, `routing`} of the settings' model as `Stored` arrays, of which nothing is read yet.

    Strict: see `checked_tensors`; copies that differ from their original stand in a RequestError too, of several
    processes the first's.
    """
    arrays = arrays_of(settings)
    tensors, repeated = checked_tensors(folder, settings, arrays)
    refuse(folder, {"different from the tensor that they repeat": [
        f"{name} (a copy of {original})" for name, original in repeated.items()
        if hosts.is_first() and not same(tensors[name], tensors[original])]})
    return tree_of({path: Stored(folder, array, tensors) for path, array in arrays.items()})


def read_whole(folder: Path, stored: dict) -> dict:
    """`Stored` arrays as float32 numpy arrays. RequestError for all that have values that are not finite."""
    infinite: list[str] = []
    read = {path: each.read((), infinite, np.dtype(np.float32)) for path, each in paths(stored).items()}
    refuse(folder, {NOT_FINITE: infinite})
    return tree_of(read)


def tree_of(arrays: dict) -> dict:
    """{`params`, `routing`} of what stands under the paths of arrays."""
    return {"params": {}, "routing": {}} | unflatten_dict(arrays, sep="/")


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of a shape have the same values, and where they are of one dtype the same bytes."""
    kind = np.uint8 if one.dtype == other.dtype else None
    return all(np.array_equal(*(each.read(*rows).view(kind or DTYPES[each.dtype]) for each in (one, other)))
               for rows in row_blocks(one.shape, one.dtype))


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
        values = np.empty(shape, dtype)
        if dtype == DTYPES[FP8]:
            scales = np.empty(blocks.scale_shape(shape), np.float32)
            for place, (ending, whole) in product(places, (("", values), (SCALE, scales))):
                read = self.tensors[place.name + ending].read()
                if not blocks.finite(read):
                    infinite.append(place.name + ending)
                _bytes(whole)[place.index[len(index):]] = _bytes(read.T if place.transposed else read)
            return Blocks(values, scales)
        for place in places:
            part = values[place.index[len(index):]]
            self._pour(place, [(tuple((0, length) for length in part.shape), part)], infinite)
        return values

    def split(self, sharding, infinite: list[str]) -> jax.Array:
        """All of it in float32, split as a sharding says; names of tensors that are not finite are added to `infinite`.

        This process holds what its own devices do and a piece of a tensor, and reads the rows of which they hold any
        part, each once.
        """
        def bounds(index) -> tuple[tuple[int, int], ...]:
            return tuple(part.indices(length)[:2] for part, length in zip(index, self.shape, strict=True))

        held = {each: np.empty([end - first for first, end in each], np.float32) for each in map(
            bounds, set(sharding.addressable_devices_indices_map(self.shape).values()))}
        for place in self.array.places:
            depth = len(place.index)
            self._pour(place, [
                (each[depth:], part[tuple(i - first for i, (first, _) in zip(place.index, each, strict=False))])
                for each, part in held.items()
                if all(first <= i < end for i, (first, end) in zip(place.index, each, strict=False))], infinite)
        return jax.make_array_from_callback(self.shape, sharding, lambda index: held[bounds(index)])

    def _pour(self, place: Place, parts: list[tuple], infinite: list[str]) -> None:
        """Reads the rows of a tensor that `parts` of it hold, once and in pieces, into each, dequantised.

        parts: (first, end) along each axis, and the array of them, as we hold them.
        """
        if not parts:
            return
        if place.transposed:
            parts = [(each[::-1], part.T) for each, part in parts]
        tensor, scales, aligned = self.tensors[place.name], None, 1
        if tensor.dtype == FP8:
            scales, aligned = self.tensors[place.name + SCALE].read(), blocks.BLOCK
            if not blocks.finite(scales):
                infinite.append(place.name + SCALE)
                return
        lowest, highest = min(each[0][0] for each, _ in parts), max(each[0][1] for each, _ in parts)
        finite = True
        for first, end in row_blocks(tensor.shape, tensor.dtype):
            first, end = max(first, lowest - lowest % aligned), min(end, highest)
            if first >= end:
                continue
            values = tensor.read(first, end)
            finite = finite and blocks.finite(values)
            if scales is not None:
                values = blocks.dequantize(values, scales[first // aligned:-(-end // aligned)])
            for ((low, high), *others), part in parts:
                low_here, high_here = max(low, first), min(high, end)
                if low_here < high_here:
                    part[low_here - low:high_here - low] = values[
                        (slice(low_here - first, high_here - first), *(slice(*other) for other in others))]
        if not finite:
            infinite.append(place.name)


def _bytes(x: np.ndarray) -> np.ndarray:
    """8-bit floats as integers, which numpy copies as they are; others as they come."""
    return x.view(np.uint8) if x.dtype == DTYPES[FP8] else x


def refuse(folder: Path, problems: dict[str, list[str]]) -> None:
    """Raises one RequestError that lists every name, by problem, unless there are none."""
    found = [f"{len(names)} {problem}: " + ", ".join(name if name.isprintable() else repr(name) for name in names)
             for problem, names in problems.items() if names]
    if found:
        raise RequestError(f"{folder}: the tensors are not those of its config.json: {'; '.join(found)}")
