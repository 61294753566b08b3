"""Grouped products on Hopper's tensor cores: the kernel of `kernels.product.pipeline` with experts.

Rows and contractions start at multiples of 128, so that a tile lies in one expert's block and the fetching warpgroup
finds its matrix, or its part of the contraction, by a number: no descriptor changes. Tiles of no expert, and of an
expert without rows, have no steps and are written as zeros.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from kernels.grouped.reference import BLOCK
from kernels.grouped.shapes import Shape
from kernels.once import traced_once
from kernels.product.operands import padded, scales_of_columns, scales_of_rows, sized
from kernels.product.pipeline import Work, multiply, walk
from kernels.product.tiles import ROWS, STEP, Tiles, default
from kernels.tuned import tuned


def chosen_for_product(shape: Shape) -> Tiles:
    """The tiles that run at a shape: measured ones, or the default."""
    return dataclasses.replace(default(shape.rows, shape.columns, by_block=True), **tuned("grouped_product", shape))


def chosen_for_weight_gradient(shape: Shape) -> Tiles:
    """The tiles that run at a shape: measured ones, or the default."""
    return dataclasses.replace(default(shape.rows, shape.columns, by_block=False),
                               **tuned("grouped_weight_gradient", shape))


@traced_once("tile_a", "tile_b", "out_dtype", "tiles", "sms", "interpret")
def product(a_MC, scales_a, tile_a, b_ESC, scales_b, tile_b, expert_N, *, out_dtype=jnp.float32,
            tiles: Tiles | None = None, sms: int | None = None, interpret=None):
    """See the reference; y_MS in `out_dtype`. sms, interpret: for tests without a GPU."""
    (M, C), (E, S, _) = a_MC.shape, b_ESC.shape
    scales_a = scales_of_rows(scales_a, tile_a, M, C)
    scales_b = jnp.stack([scales_of_columns(s, tile_b, S, C) for s in scales_b]) if tile_b != (128, 128) else scales_b
    by_block = scales_b.shape[-1] != S
    tiles = tiles or chosen_for_product(Shape(E, M, max(S, ROWS), C))
    columns, width = sized(S, tiles.columns, 32), -(-C // STEP) * STEP
    down, across = tiles.counts(M, columns)

    def work(index, experts):
        row, column = walk(index, M, columns, tiles)
        expert = experts[lax.div(row, BLOCK)]
        return Work(row, column, jnp.maximum(expert, 0), 0, jnp.where(expert >= 0, width // STEP, 0))

    return multiply(
        padded(a_MC, rows=M, columns=width), padded(scales_a, rows=width // STEP, columns=M),
        padded(b_ESC, rows=columns, columns=width),
        padded(scales_b, rows=width // STEP, columns=-(-columns // 128) if by_block else columns),
        (expert_N,), work, down * across // tiles.cluster, (M, columns), out_dtype,
        name="fp8_grouped_product", tiles=tiles, sms=sms, interpret=interpret)[:, :S]


@traced_once("tile_a", "tile_b", "n_experts", "tiles", "sms", "interpret")
def weight_gradient(a_RM, scales_a, tile_a, b_SM, scales_b, tile_b, expert_N, n_experts: int, *,
                    tiles: Tiles | None = None, sms: int | None = None, interpret=None):
    """See the reference; each expert's blocks lie together. sms, interpret: for tests without a GPU."""
    (R, M), S = a_RM.shape, b_SM.shape[0]
    scales_a, scales_b = scales_of_rows(scales_a, tile_a, R, M), scales_of_columns(scales_b, tile_b, S, M)
    by_block = scales_b.shape[1] != S
    tiles = tiles or chosen_for_weight_gradient(Shape(n_experts, max(R, ROWS), max(S, ROWS), M))
    rows, columns = sized(R, ROWS, 8), sized(S, tiles.columns, 32)
    down, across = tiles.counts(rows, columns)
    of_expert = down * across // tiles.cluster
    mine_EN = expert_N[None] == jnp.arange(n_experts, dtype=expert_N.dtype)[:, None]
    first_E, blocks_E = jnp.argmax(mine_EN, axis=1).astype(jnp.int32), jnp.sum(mine_EN, axis=1, dtype=jnp.int32)

    def work(index, first, blocks):
        expert = lax.div(index, of_expert)
        return Work(*walk(lax.rem(index, of_expert), rows, columns, tiles), expert, first[expert], blocks[expert])

    return multiply(
        padded(a_RM, rows=rows, columns=M), padded(scales_a, rows=M // STEP, columns=rows),
        padded(b_SM, rows=columns, columns=M),
        padded(scales_b, rows=M // STEP, columns=-(-columns // 128) if by_block else columns),
        (first_E, blocks_E), work, n_experts * of_expert, (n_experts, rows, columns), jnp.float32,
        name="fp8_grouped_weight_gradient", tiles=tiles, sms=sms, interpret=interpret)[:, :R, :S]
