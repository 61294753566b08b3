"""What the Hopper kernels take as operands of a product, and how others are brought into that form."""

import jax.numpy as jnp

from kernels.product.reference import row_scales

VALUES = (jnp.float8_e4m3fn, jnp.float8_e5m2)
OUTPUTS = (jnp.float32, jnp.bfloat16)


def check_scales(name: str, values, scales, tile) -> None:
    """ValueError unless the scales of `values` (..., R, C) are (..., ceil(C/c), ceil(R/r))."""
    *leading, R, C = values.shape
    expected = (*leading, -(-C // tile[1]), -(-R // tile[0]))
    if scales.shape != expected:
        raise ValueError(f"{name}: scales of {values.shape} in tiles of {tile} have shape {scales.shape}, expected "
                         f"{expected}: contraction first")


def refusal(out_dtype, *operands) -> str | None:
    """Why the kernels do not take these (values, tile), the contraction last; None if they do."""
    for values, tile in operands:
        if values.dtype not in VALUES:
            return f"values of {values.dtype}: the tensor cores multiply E4M3 and E5M2"
        if tile[1] % 128 and tile[1] < values.shape[-1]:
            return f"tiles of {tile}: scales that change within 128 of the contraction, between promotions"
    if out_dtype not in OUTPUTS:
        return f"out_dtype={jnp.dtype(out_dtype)}: expected float32 or bfloat16"
    return None


def padded(x, **sizes):
    """x with zeros behind its last two axes, up to `rows` and `columns`; itself where they are what it has."""
    more = sizes["rows"] - x.shape[-2], sizes["columns"] - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, n) for n in more]) if any(more) else x


def sized(n: int, least: int, divisor: int) -> int:
    """Rows that a kernel computes for n: n itself, or the next multiple of 128 where that is too few or too odd."""
    return n if n >= least and n % divisor == 0 else -(-max(n, least) // 128) * 128


def scales_of_rows(scales, tile, rows: int, width: int):
    """(ceil(width/128), rows) of tiles of any height: the form of the left operand."""
    return scales if tile == (1, 128) else row_scales(scales, tile, rows, width, 128)


def scales_of_columns(scales, tile, columns: int, width: int):
    """Of the right operand: (ceil(width/128), columns), or (ceil(width/128), ceil(columns/128)) where blocks allow."""
    if tile == (128, 128):
        return scales
    if tile[0] % 128 == 0 or tile[0] >= columns:
        return row_scales(scales, (-(-tile[0] // 128), tile[1]), -(-columns // 128), width, 128)
    return scales_of_rows(scales, tile, columns, width)
