"""The kernels as data: what `kernels.bench` measures and `kernels.aot` compiles.

Each folder's `shapes.py` holds its real shapes; here they meet with random arguments, the implementations, and the
counts that turn seconds into rates. Operations have the names under which `kernels.tuned` keeps their tiles.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.grouped import mosaic as grouped_mosaic
from kernels.grouped import shapes as grouped_shapes
from kernels.grouped import xla as grouped_xla
from kernels.grouped.reference import BLOCK
from kernels.product import mosaic as product_mosaic
from kernels.product import shapes as product_shapes
from kernels.product import tiles as product_tiles
from kernels.product import xla as product_xla


@dataclass(frozen=True)
class Operation:
    """One operation at its real shapes, each a NamedTuple of ints of the folder's `shapes.py`.

    A function of a shape gives: `arguments(shape, key)` random arrays, never zeros, whose products draw more power
    than zeros' do (traceable: `jax.eval_shape` gives their shapes alone); `mosaic(shape, tiles)`, `xla(shape)` and
    `bfloat16(shape)` functions of those arrays, the last what a 16-bit program would run instead, None where there is
    no such thing; `bfloat16_arguments(shape, key)` the arrays of that one. The first two give the same results up to
    `tolerance`, relative, of each result's norm.
    """

    name: str
    shapes: tuple[Any, ...]  # DeepSeek-V3's
    small: Any  # one that a CPU runs in milliseconds
    arguments: Callable[[Any, Any], tuple]
    mosaic: Callable[[Any, Any], Callable]
    xla: Callable[[Any], Callable]
    chosen: Callable[[Any], Any]  # the tiles that run at a shape: tuned, or the default
    candidates: Callable[[Any], list[Any]]  # what a search tries
    flops: Callable[[Any], float]  # of 8-bit products; 0 where there are none
    traffic: Callable[[Any], float]  # bytes read once and written once
    tolerance: float
    bfloat16: Callable[[Any], Callable] | None = None
    bfloat16_arguments: Callable[[Any, Any], tuple] | None = None
    warpgroup_fp8: bool = False  # its PTX must hold the FP8 warpgroup instruction
    peer: Callable[[Any], tuple] | None = None  # cuBLASLt's product: rows, columns, contraction, b scaled by blocks


ROW, SQUARE = (1, 128), (128, 128)  # tiles: of activations and gradients, of weights


def values(key, *shape):
    """E4M3 as quantisation leaves it: a normal distribution whose largest entries are the format's."""
    return jnp.clip(128 * jax.random.normal(key, shape), -448, 448).astype(jnp.float8_e4m3fn)


def scales(key, *shape):
    """As values of the size of one have."""
    return jax.random.uniform(key, shape, minval=0.5, maxval=2.0) / 128


def chunks(n: int) -> int:
    """Tiles of 128 along n."""
    return -(-n // 128)


def dot(a_RC, b_SC, out_dtype):
    """What the library makes of a b^T in 16 bits, with leading axes if they have any."""
    batch = tuple(range(a_RC.ndim - 2))
    return jax.lax.dot_general(a_RC, b_SC, (((a_RC.ndim - 1,), (b_SC.ndim - 1,)), (batch, batch)),
                               preferred_element_type=jnp.float32).astype(out_dtype)


def normal(key, *shape):
    return jax.random.normal(key, shape, jnp.bfloat16)


def _product(name: str, shapes, tile_b, out_dtype, tolerance: float) -> Operation:
    """A dense product: its right operand scaled by blocks (forward, input gradient) or by rows (weight gradient)."""
    by_block = tile_b == SQUARE

    def arguments(shape, key):
        (R, S, C), keys = shape, jax.random.split(key, 4)
        columns = chunks(S) if by_block else S
        return (values(keys[0], R, C), scales(keys[1], chunks(C), R), values(keys[2], S, C),
                scales(keys[3], chunks(C), columns))

    def run(function, a, scales_a, b, scales_b):
        return function(a, scales_a, ROW, b, scales_b, tile_b, out_dtype=out_dtype)

    def traffic(shape):
        R, S, C = shape
        scales = 4 * chunks(C) * (R + (chunks(S) if by_block else S))
        return R * C + S * C + scales + R * S * jnp.dtype(out_dtype).itemsize

    return Operation(
        name, shapes, product_shapes.SMALL, arguments,
        mosaic=lambda shape, tiles: partial(run, partial(product_mosaic.product, tiles=tiles)),
        xla=lambda shape: partial(run, product_xla.product),
        chosen=lambda shape: product_mosaic.chosen(shape, by_block),
        candidates=lambda shape: product_tiles.candidates(shape.columns, by_block),
        flops=lambda shape: 2.0 * shape.rows * shape.columns * shape.contraction,
        traffic=traffic, tolerance=tolerance,
        bfloat16=lambda shape: partial(dot, out_dtype=out_dtype),
        bfloat16_arguments=lambda shape, key: (normal(key, shape.rows, shape.contraction),
                                               normal(jax.random.fold_in(key, 1), shape.columns, shape.contraction)),
        warpgroup_fp8=True, peer=lambda shape: (*shape, by_block))


def experts_of_blocks(n_experts: int, rows: int) -> np.ndarray:
    """(rows/128,) int32: every block is some expert's, none has the load of another (0.7 to 1.3 of the mean)."""
    loads_E = np.random.default_rng(0).uniform(0.7, 1.3, n_experts)
    ends_E = np.round(np.cumsum(loads_E) / np.sum(loads_E) * (rows // BLOCK))
    return np.searchsorted(ends_E, np.arange(rows // BLOCK), side="right").astype(np.int32)


def _grouped_product() -> Operation:
    def arguments(shape, key):
        (E, M, S, C), keys = shape, jax.random.split(key, 4)
        return (values(keys[0], M, C), scales(keys[1], chunks(C), M), values(keys[2], E, S, C),
                scales(keys[3], E, chunks(C), chunks(S)), jnp.asarray(experts_of_blocks(E, M)))

    def run(function, a, scales_a, b, scales_b, expert_N):
        return function(a, scales_a, ROW, b, scales_b, SQUARE, expert_N, out_dtype=jnp.bfloat16)

    def traffic(shape):
        E, M, S, C = shape
        return M * C + E * S * C + 4 * chunks(C) * (M + E * chunks(S)) + 2 * M * S

    def bfloat16_arguments(shape, key):
        E, M, S, C = shape
        return normal(key, E, M // E, C), normal(jax.random.fold_in(key, 1), E, S, C)

    return Operation(
        "grouped_product", grouped_shapes.PRODUCT, grouped_shapes.SMALL_PRODUCT, arguments,
        mosaic=lambda shape, tiles: partial(run, partial(grouped_mosaic.product, tiles=tiles)),
        xla=lambda shape: partial(run, grouped_xla.product),
        chosen=grouped_mosaic.chosen_for_product,
        candidates=lambda shape: product_tiles.candidates(shape.columns, by_block=True),
        flops=lambda shape: 2.0 * shape.rows * shape.columns * shape.contraction,
        traffic=traffic, tolerance=5e-3, warpgroup_fp8=True,
        bfloat16=lambda shape: partial(dot, out_dtype=jnp.bfloat16), bfloat16_arguments=bfloat16_arguments)


def _grouped_weight_gradient() -> Operation:
    def arguments(shape, key):
        (E, R, S, M), keys = shape, jax.random.split(key, 4)
        return (values(keys[0], R, M), scales(keys[1], chunks(M), R), values(keys[2], S, M),
                scales(keys[3], chunks(M), S), jnp.asarray(experts_of_blocks(E, M)))

    def run(function, shape, a, scales_a, b, scales_b, expert_N):
        return function(a, scales_a, ROW, b, scales_b, ROW, expert_N, shape.experts)

    def traffic(shape):
        E, R, S, M = shape
        return (R + S) * (M + 4 * chunks(M)) + 4 * E * R * S

    def bfloat16_arguments(shape, key):
        E, R, S, M = shape
        return normal(key, E, R, M // E), normal(jax.random.fold_in(key, 1), E, S, M // E)

    return Operation(
        "grouped_weight_gradient", grouped_shapes.WEIGHT_GRADIENT, grouped_shapes.SMALL_WEIGHT_GRADIENT, arguments,
        mosaic=lambda shape, tiles: partial(run, partial(grouped_mosaic.weight_gradient, tiles=tiles), shape),
        xla=lambda shape: partial(run, grouped_xla.weight_gradient, shape),
        chosen=grouped_mosaic.chosen_for_weight_gradient,
        candidates=lambda shape: product_tiles.candidates(shape.columns, by_block=False),
        flops=lambda shape: 2.0 * shape.rows * shape.columns * shape.contraction,
        traffic=traffic, tolerance=1e-3, warpgroup_fp8=True,
        bfloat16=lambda shape: partial(dot, out_dtype=jnp.float32), bfloat16_arguments=bfloat16_arguments)


OPERATIONS = {operation.name: operation for operation in (
    _product("product", product_shapes.FORWARD + product_shapes.INPUT_GRADIENT, SQUARE, jnp.bfloat16, 5e-3),
    _product("weight_gradient", product_shapes.WEIGHT_GRADIENT, ROW, jnp.float32, 1e-3),
    _grouped_product(),
    _grouped_weight_gradient(),
)}
