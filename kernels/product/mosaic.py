"""The product on Hopper's tensor cores: see `kernels.product.pipeline`."""

import dataclasses

import jax.numpy as jnp

from kernels.once import traced_once
from kernels.product.operands import padded, scales_of_columns, scales_of_rows, sized
from kernels.product.pipeline import Work, multiply, walk
from kernels.product.shapes import Shape
from kernels.product.tiles import ROWS, STEP, Tiles, default
from kernels.tuned import tuned


def chosen(shape: Shape, by_block: bool = True) -> Tiles:
    """The tiles that run at a shape: measured ones, or the default."""
    operation = "product" if by_block else "weight_gradient"
    return dataclasses.replace(default(shape.rows, shape.columns, by_block), **tuned(operation, shape))


@traced_once("tile_a", "tile_b", "out_dtype", "tiles", "promote", "sms", "interpret")
def product(a_RC, scales_a, tile_a, b_SC, scales_b, tile_b, *, out_dtype=jnp.float32, tiles: Tiles | None = None,
            promote: bool = True, sms: int | None = None, interpret=None):
    """See the reference; y_RS in `out_dtype`.

    promote=False leaves all sums along C to the tensor cores, for showing what that costs: only where no scale changes
    along C. sms, interpret: for tests without a GPU. Odd sizes are padded, which copies the operand.
    """
    (R, C), S = a_RC.shape, b_SC.shape[0]
    scales_a, scales_b = scales_of_rows(scales_a, tile_a, R, C), scales_of_columns(scales_b, tile_b, S, C)
    by_block = scales_b.shape[1] != S
    tiles = tiles or chosen(Shape(max(R, ROWS), max(S, ROWS), C), by_block)
    rows, columns, width = sized(R, ROWS, 8), sized(S, tiles.columns, 32), -(-C // STEP) * STEP
    down, across = tiles.counts(rows, columns)

    def work(index):
        return Work(*walk(index, rows, columns, tiles), None, 0, width // STEP)

    y_RS = multiply(
        padded(a_RC, rows=rows, columns=width), padded(scales_a, rows=width // STEP, columns=rows),
        padded(b_SC, rows=columns, columns=width),
        padded(scales_b, rows=width // STEP, columns=-(-columns // 128) if by_block else columns),
        (), work, down * across // tiles.cluster, (rows, columns), out_dtype if promote else jnp.float32,
        name="fp8_product", tiles=tiles, promote=promote, sms=sms, interpret=interpret)[:R, :S]
    if not promote:
        of_columns = jnp.repeat(scales_b[0], 128)[:S] if by_block else scales_b[0]
        y_RS = (y_RS * scales_a[0][:, None] * of_columns[None]).astype(out_dtype)
    return y_RS
