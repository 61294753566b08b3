"""Quantisation on Hopper: every entry is read once, and written in each orientation that is asked for.

All take (R, C) or (E, R, C) of 16-bit or 32-bit floats and return E4M3. Sizes that are no multiples of 128 are padded,
which copies x. interpret: for tests without a GPU.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.once import traced_once
from kernels.quantize import division, reference
from kernels.quantize.shapes import Activation, Weight
from kernels.quantize.stream import (
    BLOCK,
    CHUNK,
    Operand,
    Tiles,
    at_block,
    at_block_transposed,
    at_scales,
    at_scales_transposed,
    for_chunks,
    over_blocks,
)
from kernels.tuned import tuned

E4M3 = jnp.float8_e4m3fn
BY_ROWS = plgpu.Layout.WGMMA_8BIT  # four neighbours a thread: a 32-bit word of E4M3
BY_COLUMNS = plgpu.Layout.WGMMA  # in which a transposed block comes in without conflicts
DEFAULTS = {"quantize": Tiles(rows=64, stages=2, places=2), "quantize_transposed": Tiles(), "quantize_both": Tiles(),
            "quantize_weight": Tiles()}


def chosen(operation: str, shape: Activation | Weight) -> Tiles:
    """The tiles that run at a shape: measured ones, or the default."""
    return dataclasses.replace(DEFAULTS[operation], **tuned(operation, shape))


def candidates(operation: str) -> list[Tiles]:
    """What a search tries; some need more shared memory than there is for 32-bit floats."""
    return [Tiles(rows, steps, stages, places)
            for rows in ((64, 128) if operation == "quantize" else (128,)) for steps in (1, 4, 8, 16)
            for stages, places in ((1, 1), (2, 1), (2, 2), (3, 2)) if max(stages, places) <= steps]


def values(R: int, C: int) -> Operand:
    return Operand(jax.ShapeDtypeStruct((R, C), E4M3), at_block)


def scales(R: int, C: int) -> Operand:
    return Operand(jax.ShapeDtypeStruct((C // BLOCK, R), jnp.float32), at_scales)


def values_transposed(R: int, C: int) -> Operand:
    return Operand(jax.ShapeDtypeStruct((C, R), E4M3), at_block_transposed)


def scales_transposed(R: int, C: int) -> Operand:
    return Operand(jax.ShapeDtypeStruct((R // BLOCK, C), jnp.float32), at_scales_transposed)


def _quotients(x, scale, power_of_two: bool):
    """x (n, 128) in registers over the scale of each row: float32 that rounds to E4M3 as the reference does."""
    power, *rest = (lax.broadcast_in_dim(part, x.shape, [0]) for part in division.parts(scale))
    y = x.astype(jnp.float32) * power
    return y if power_of_two else division.quotient(y, *rest)


def quantized_rows(x, power_of_two: bool = False):
    """x (n, 128) in registers as E4M3, and the scale of each row."""
    scale = reference.scale_of(jnp.max(jnp.abs(x), axis=1).astype(jnp.float32), "e4m3", power_of_two)
    return _quotients(x, scale, power_of_two).astype(E4M3), scale


@traced_once("power_of_two", "tiles", "interpret")
def quantize(x_RC, power_of_two: bool = False, *, tiles: Tiles | None = None, interpret=None):
    """See `reference.quantize`, tile (1, 128)."""
    tiles = tiles or chosen("quantize", Activation(x_RC.size // x_RC.shape[-1], x_RC.shape[-1]))

    def compute(r, c, x, values, scales):
        @for_chunks(tiles.rows)
        def _(part):
            values[part], scales[part] = quantized_rows(plgpu.load(x.at[part], layout=BY_ROWS), power_of_two)

    def kernel(x_RC):
        return over_blocks(compute, x_RC.shape, [Operand(x_RC, at_block)], [values(*x_RC.shape), scales(*x_RC.shape)],
                           tiles, name="quantize", interpret=interpret)

    return _on_whole_blocks(kernel, x_RC, lambda R, C, r, c: ((R, C), (c, R)))


def _transpose_into(values_t, scales_t, x, power_of_two: bool):
    @for_chunks(BLOCK)
    def _(part):
        x_t = plgpu.load(x.at[:, part].T, layout=BY_COLUMNS)
        values_t[part], scales_t[part] = quantized_rows(x_t, power_of_two)


@traced_once("power_of_two", "tiles", "interpret")
def quantize_transposed(x_RC, power_of_two: bool = False, *, tiles: Tiles | None = None, interpret=None):
    """See the reference."""
    tiles = tiles or chosen("quantize_transposed", Activation(x_RC.size // x_RC.shape[-1], x_RC.shape[-1]))

    def compute(r, c, x, values_t, scales_t):
        _transpose_into(values_t, scales_t, x, power_of_two)

    def kernel(x_RC):
        results = [values_transposed(*x_RC.shape), scales_transposed(*x_RC.shape)]
        return over_blocks(compute, x_RC.shape, [Operand(x_RC, at_block)], results, tiles, name="quantize_transposed",
                           interpret=interpret)

    return _on_whole_blocks(kernel, x_RC, lambda R, C, r, c: ((C, R), (r, C)))


@traced_once("power_of_two", "tiles", "interpret")
def quantize_both(x_RC, power_of_two: bool = False, *, tiles: Tiles | None = None, interpret=None):
    """See the reference."""
    tiles = tiles or chosen("quantize_both", Activation(x_RC.size // x_RC.shape[-1], x_RC.shape[-1]))

    def compute(r, c, x, values, scales, values_t, scales_t):
        @for_chunks(BLOCK)
        def _(part):
            values[part], scales[part] = quantized_rows(plgpu.load(x.at[part], layout=BY_ROWS), power_of_two)

        _transpose_into(values_t, scales_t, x, power_of_two)

    def kernel(x_RC):
        results = [make(*x_RC.shape) for make in (values, scales, values_transposed, scales_transposed)]
        return over_blocks(compute, x_RC.shape, [Operand(x_RC, at_block)], results, tiles, name="quantize_both",
                           interpret=interpret)

    return _on_whole_blocks(kernel, x_RC, lambda R, C, r, c: ((R, C), (c, R), (C, R), (r, C)))


@traced_once("power_of_two", "tiles", "interpret")
def quantize_weight(w_RC, power_of_two: bool = False, *, tiles: Tiles | None = None, interpret=None):
    """See the reference."""
    tiles = tiles or chosen("quantize_weight", Weight(w_RC.shape[0] if w_RC.ndim == 3 else 1, *w_RC.shape[-2:]))

    def compute(r, c, w, values, scales, values_t, scales_t):
        halves = (plgpu.load(w.at[start:start + CHUNK], layout=BY_ROWS) for start in (0, CHUNK))
        upper, lower = (jnp.max(jnp.abs(half), axis=1) for half in halves)
        amax = jnp.max(jnp.maximum(upper, lower)).astype(jnp.float32)
        scale = reference.scale_of(lax.broadcast_in_dim(amax, (CHUNK,), ()), "e4m3", power_of_two)
        scales[c, r] = scales_t[r, c] = jnp.max(scale)

        @for_chunks(BLOCK)
        def _(part):
            values[part] = _quotients(plgpu.load(w.at[part], layout=BY_ROWS), scale, power_of_two).astype(E4M3)

        @for_chunks(BLOCK)
        def _(part):
            w_t = plgpu.load(w.at[:, part].T, layout=BY_COLUMNS)
            values_t[part] = _quotients(w_t, scale, power_of_two).astype(E4M3)

    def kernel(w_RC):
        R, C = w_RC.shape
        scales = jax.ShapeDtypeStruct((C // BLOCK, R // BLOCK), jnp.float32)
        scales_t = jax.ShapeDtypeStruct((R // BLOCK, C // BLOCK), jnp.float32)
        results = [values(R, C), Operand(scales, None), values_transposed(R, C), Operand(scales_t, None)]
        return over_blocks(compute, (R, C), [Operand(w_RC, at_block)], results, tiles, name="quantize_weight",
                           interpret=interpret)

    return _on_whole_blocks(kernel, w_RC, lambda R, C, r, c: ((R, C), (c, r), (C, R), (r, c)))


def _on_whole_blocks(kernel, x, ends):
    """kernel(x) for x padded with zeros to multiples of 128, for each matrix of (E, R, C); the results cut.

    ends(R, C, r, c): rows and columns of each result, where x has R x C entries in r x c blocks.
    """
    R, C = x.shape[-2:]
    r, c = -(-R // BLOCK), -(-C // BLOCK)
    if R % BLOCK or C % BLOCK:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, r * BLOCK - R), (0, c * BLOCK - C)])
    results = jax.vmap(kernel)(x) if x.ndim == 3 else kernel(x)
    return tuple(result[..., :rows, :columns]
                 for result, (rows, columns) in zip(results, ends(R, C, r, c), strict=True))
