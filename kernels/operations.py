"""The kernels as data: what `kernels.bench` measures and `kernels.aot` compiles.

Each folder's `shapes.py` holds its real shapes; here they meet with random arguments, the implementations, and the
counts that turn seconds into rates. Operations have the names under which `kernels.tuned` keeps their tiles.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.grouped import mosaic as grouped_mosaic
from kernels.grouped import shapes as grouped_shapes
from kernels.grouped import xla as grouped_xla
from kernels.grouped.reference import BLOCK
from kernels.mla_decode import mosaic as mla_mosaic
from kernels.mla_decode import shapes as mla_shapes
from kernels.mla_decode import xla as mla_xla
from kernels.product import mosaic as product_mosaic
from kernels.product import shapes as product_shapes
from kernels.product import tiles as product_tiles
from kernels.product import xla as product_xla
from kernels.quantize import mosaic as quantize_mosaic
from kernels.quantize import shapes as quantize_shapes
from kernels.quantize import xla as quantize_xla
from kernels.swiglu import mosaic as swiglu_mosaic
from kernels.swiglu import shapes as swiglu_shapes
from kernels.swiglu import xla as swiglu_xla


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation at its real shapes, each a NamedTuple of ints of the folder's `shapes.py`.

    A function of a shape gives: `arguments(shape, key)` random arrays, never zeros, whose products draw more power
    than zeros' do (traceable: `jax.eval_shape` gives their shapes alone); `mosaic(shape, tiles)`, `xla(shape)` and
    `bfloat16(shape)` functions of those arrays, the last what a 16-bit program would run instead, None where there is
    no such thing; `bfloat16_arguments(shape, key)` the arrays of that one. The first two give the same results up to
    `tolerance`, relative, of each result's norm; 0: the same bits.
    """

    name: str
    shapes: tuple[Any, ...]  # DeepSeek-V3's
    small: Any  # one that a CPU runs in milliseconds
    arguments: Callable[[Any, Any], tuple]
    mosaic: Callable[[Any, Any], Callable]
    xla: Callable[[Any], Callable]
    chosen: Callable[[Any], Any]  # the tiles that run at a shape: tuned, or the default
    candidates: Callable[[Any], list[Any]]  # what a search tries
    tolerance: float
    flops: Callable[[Any], float] = lambda shape: 0.0  # of its products
    bits: int = 8  # of those products' operands
    bfloat16: Callable[[Any], Callable] | None = None
    bfloat16_arguments: Callable[[Any, Any], tuple] | None = None
    warpgroup_fp8: bool = False  # its PTX must hold the FP8 warpgroup instruction
    peer: Callable[[Any], tuple] | None = None  # cuBLASLt's product: rows, columns, contraction, b scaled by blocks

    def traffic(self, shape, name: str = "xla") -> int:
        """Bytes of the arguments and results of `xla` or `bfloat16`: what must be read and written."""
        make = self.bfloat16_arguments if name == "bfloat16" else self.arguments
        arguments = jax.eval_shape(partial(make, shape), jax.random.key(0))
        results = jax.eval_shape(getattr(self, name)(shape), *arguments)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((arguments, results)))


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


def flops(shape) -> float:
    """Of a product."""
    return 2.0 * shape.rows * shape.columns * shape.contraction


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

    return Operation(
        name, shapes, product_shapes.SMALL, arguments,
        mosaic=lambda shape, tiles: partial(run, partial(product_mosaic.product, tiles=tiles)),
        xla=lambda shape: partial(run, product_xla.product),
        chosen=lambda shape: product_mosaic.chosen(shape, by_block),
        candidates=lambda shape: product_tiles.candidates(shape.columns, by_block),
        flops=flops, tolerance=tolerance, bfloat16=lambda shape: partial(dot, out_dtype=out_dtype),
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

    def bfloat16_arguments(shape, key):
        E, M, S, C = shape
        return normal(key, E, M // E, C), normal(jax.random.fold_in(key, 1), E, S, C)

    return Operation(
        "grouped_product", grouped_shapes.PRODUCT, grouped_shapes.SMALL_PRODUCT, arguments,
        mosaic=lambda shape, tiles: partial(run, partial(grouped_mosaic.product, tiles=tiles)),
        xla=lambda shape: partial(run, grouped_xla.product),
        chosen=grouped_mosaic.chosen_for_product,
        candidates=lambda shape: product_tiles.candidates(shape.columns, by_block=True),
        flops=flops, tolerance=5e-3, warpgroup_fp8=True,
        bfloat16=lambda shape: partial(dot, out_dtype=jnp.bfloat16), bfloat16_arguments=bfloat16_arguments)


def _grouped_weight_gradient() -> Operation:
    def arguments(shape, key):
        (E, R, S, M), keys = shape, jax.random.split(key, 4)
        return (values(keys[0], R, M), scales(keys[1], chunks(M), R), values(keys[2], S, M),
                scales(keys[3], chunks(M), S), jnp.asarray(experts_of_blocks(E, M)))

    def run(function, shape, a, scales_a, b, scales_b, expert_N):
        return function(a, scales_a, ROW, b, scales_b, ROW, expert_N, shape.experts)

    def bfloat16_arguments(shape, key):
        E, R, S, M = shape
        return normal(key, E, R, M // E), normal(jax.random.fold_in(key, 1), E, S, M // E)

    return Operation(
        "grouped_weight_gradient", grouped_shapes.WEIGHT_GRADIENT, grouped_shapes.SMALL_WEIGHT_GRADIENT, arguments,
        mosaic=lambda shape, tiles: partial(run, partial(grouped_mosaic.weight_gradient, tiles=tiles), shape),
        xla=lambda shape: partial(run, grouped_xla.weight_gradient, shape),
        chosen=grouped_mosaic.chosen_for_weight_gradient,
        candidates=lambda shape: product_tiles.candidates(shape.columns, by_block=False),
        flops=flops, tolerance=1e-3, warpgroup_fp8=True,
        bfloat16=lambda shape: partial(dot, out_dtype=jnp.float32), bfloat16_arguments=bfloat16_arguments)


def activation(shape, key):
    return (normal(key, *shape),)


def weight(shape, key):
    """One matrix or all experts': float32, as weights are kept."""
    return (jax.random.normal(key, shape if shape.experts > 1 else shape[1:]),)


def quantize_weight(w):
    """In plain XLA, (R, C) or (E, R, C)."""
    return (jax.vmap(quantize_xla.quantize_weight) if w.ndim == 3 else quantize_xla.quantize_weight)(w)


def _quantizer(name: str, xla: Callable, shapes=quantize_shapes.ACTIVATIONS, small=quantize_shapes.SMALL_ACTIVATION,
               arguments=activation) -> Operation:
    return Operation(
        name, shapes, small, arguments,
        mosaic=lambda shape, tiles: partial(getattr(quantize_mosaic, name), tiles=tiles), xla=lambda shape: xla,
        chosen=partial(quantize_mosaic.chosen, name), candidates=lambda shape: quantize_mosaic.candidates(name),
        tolerance=0.0)


def _weighted_swiglu(g_RF, u_RF, weight_R):
    return jax.nn.silu(g_RF) * u_RF * weight_R[:, None]


# An exponential that is off by 2**-22 moves one value in 2**16 or so to its neighbour, 2**-4 away: 2e-4 of the norm.
SWIGLU_TOLERANCE = 1e-3


def _swiglu_forward() -> Operation:
    def arguments(shape, key):
        return normal(key, *shape), normal(jax.random.fold_in(key, 1), *shape)

    return Operation(
        "swiglu_forward", swiglu_shapes.SHAPES, swiglu_shapes.SMALL, arguments,
        mosaic=lambda shape, tiles: partial(swiglu_mosaic.forward, tiles=tiles),
        xla=lambda shape: swiglu_xla.forward,
        chosen=swiglu_mosaic.chosen_for_forward, candidates=lambda shape: swiglu_mosaic.FORWARD_CANDIDATES,
        tolerance=SWIGLU_TOLERANCE,
        bfloat16=lambda shape: lambda g, u: jax.nn.silu(g) * u, bfloat16_arguments=arguments)


def _swiglu_backward() -> Operation:
    def arguments(shape, key):
        (R, F), keys = shape, jax.random.split(key, 6)
        return (values(keys[0], R, F), scales(keys[1], chunks(F), R), values(keys[2], R, F),
                scales(keys[3], chunks(F), R), normal(keys[4], R, F), jax.random.uniform(keys[5], (R,)))

    def bfloat16(g, u, da, weight):
        return jax.vjp(_weighted_swiglu, g, u, weight)[1](da)

    def bfloat16_arguments(shape, key):
        *g_u_da, last = jax.random.split(key, 4)
        return *(normal(k, *shape) for k in g_u_da), jax.random.uniform(last, shape[:1], jnp.bfloat16)

    return Operation(
        "swiglu_backward", swiglu_shapes.SHAPES, swiglu_shapes.SMALL, arguments,
        mosaic=lambda shape, tiles: partial(swiglu_mosaic.backward, tiles=tiles),
        xla=lambda shape: swiglu_xla.backward,
        chosen=swiglu_mosaic.chosen_for_backward, candidates=lambda shape: swiglu_mosaic.BACKWARD_CANDIDATES,
        tolerance=SWIGLU_TOLERANCE,
        bfloat16=lambda shape: bfloat16, bfloat16_arguments=bfloat16_arguments)


def _mla_decode() -> Operation:
    scale = 192**-0.5  # of keys of 128 numbers and 64 rotary ones

    def arguments(shape, key):
        (B, T, N, S), keys = shape, jax.random.split(key, 4)
        widths = mla_shapes.LATENT, mla_shapes.ROTARY
        queries = (normal(k, B, T, N, width) for k, width in zip(keys, widths, strict=False))
        cache = (normal(k, B, S, width) for k, width in zip(keys[2:], widths, strict=True))
        return *queries, *cache, jnp.full((B,), S - T, jnp.int32)

    def flops(shape):
        B, T, N, S = shape
        return 2.0 * B * T * N * S * (2 * mla_shapes.LATENT + mla_shapes.ROTARY)

    # bfloat16 rounds results by 1.7e-3 of their norm, and probabilities by as much before they are summed
    return Operation(
        "mla_decode", mla_shapes.SHAPES, mla_shapes.SMALL, arguments,
        mosaic=lambda shape, tiles: partial(mla_mosaic.mla_decode, scale=scale, tiles=tiles),
        xla=lambda shape: partial(mla_xla.mla_decode, scale=scale),
        chosen=mla_mosaic.chosen, candidates=mla_mosaic.candidates, tolerance=5e-3, flops=flops, bits=16)


OPERATIONS = {operation.name: operation for operation in (
    _quantizer("quantize", partial(quantize_xla.quantize, tile=ROW)),
    _quantizer("quantize_transposed", quantize_xla.quantize_transposed),
    _quantizer("quantize_both", quantize_xla.quantize_both),
    _quantizer("quantize_weight", quantize_weight, quantize_shapes.WEIGHTS, quantize_shapes.SMALL_WEIGHT, weight),
    _product("product", product_shapes.FORWARD + product_shapes.INPUT_GRADIENT, SQUARE, jnp.bfloat16, 5e-3),
    _product("weight_gradient", product_shapes.WEIGHT_GRADIENT, ROW, jnp.float32, 1e-3),
    _grouped_product(),
    _grouped_weight_gradient(),
    _swiglu_forward(),
    _swiglu_backward(),
    _mla_decode(),
)}
