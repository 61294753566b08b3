"""From settings to a model and its first weights."""

import functools
import zlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from research.model.balance import initial_bias
from research.model.transformer import Transformer
from research.precision.products import Products
from research.precision.recipe import RECIPES
from research.tree import map_paths


def make_model(settings, mesh: Mesh | None = None) -> Transformer:
    """The model of the settings, whose `model.vocab_size` is resolved; over a mesh, or on one device."""
    p = settings.precision
    names = tuple(filter(None, p.high_precision.split(",")))
    over = {} if mesh is None else {"mesh": mesh, "expert_room": settings.training.expert_room}
    return Transformer(settings.model, settings.mtp, Products(RECIPES[p.recipe], names, p.implementation, **over))


def variable_shapes(model: Transformer, settings):
    """{`params`, `routing`, `amax`} as ShapeDtypeStructs: nothing is allocated, whatever the size.

    They are those of the plainest model that has them, which is traced in a tenth of an FP8 model's time; what the
    model itself refuses is for `check_implementations`.
    """
    products = replace(model.products, mesh=None, experts_implementation="reference")
    if not products.history:
        products = Products(RECIPES["float32"], experts_implementation="reference",
                            redundant_experts=products.redundant_experts)
    config = FrozenConfigDict({**model.config, "attention_implementation": "xla"})  # the others ask for a GPU
    variables = _initialized(model.clone(products=products, config=config), example_length(settings))
    return {name: jax.tree.map(lambda leaf: leaf, variables.get(name, {})) for name in ("params", "routing", "amax")}


def check_implementations(model: Transformer, settings) -> None:
    """Raises what a GPU's kernels say that the settings ask for by name and that cannot run here or on these shapes."""
    if settings.precision.implementation == "mosaic" or settings.model.attention_implementation == "cudnn":
        products = replace(model.products, mesh=None)  # the example's one row is not to be split
        _initialized(model.clone(products=products), example_length(settings))


def example_length(settings) -> int:
    """Positions of what is traced for shapes."""
    return min(8, settings.data.sequence_length)


@functools.lru_cache(maxsize=8)
def _initialized(model: Transformer, length: int):
    """Shapes of all variables; kept, because tracing DeepSeek-V3 takes seconds."""
    example = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), example, example, example)


def init_variables(model: Transformer, settings, seed: int):
    """{`params`, `routing`} at step 0 as NumPy arrays: gains 1, biases 0, all else from N(0, initializer_range).

    The same numbers that the modules' own initializers describe, but each array from a stream of its own, named by its
    path: an array does not change when others come or go, and nothing has to be compiled (4 s of every start).
    """
    def draw(path, leaf):
        if path.endswith("/scale"):
            return np.ones(leaf.shape, leaf.dtype)
        if path.endswith("/bias"):
            return np.zeros(leaf.shape, leaf.dtype)
        stream = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(path.encode())]))
        return stream.standard_normal(leaf.shape, np.float32) * np.float32(settings.model.initializer_range)

    shapes = variable_shapes(model, settings)
    neutral = np.float32(initial_bias(settings.model))
    return {
        "params": map_paths(draw, shapes["params"]),
        "routing": jax.tree.map(lambda leaf: np.full(leaf.shape, neutral), shapes["routing"]),
    }
