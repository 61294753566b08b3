"""The definition of a product of quantised operands: y_RS = a_RC b_SC^T.

Within each 128 of C the values are multiplied and summed, then scaled and added in float32 (V3 §3.3.2: promotion every
N_C = 128). Tiles and layouts of scales: `kernels.quantize.reference`.
"""

import jax.numpy as jnp


def row_scales(scales, tile, rows: int, width: int, chunk: int):
    """Scales repeated to (ceil(width/chunk), rows): one for each row and chunk of the contraction."""
    by_row = jnp.repeat(scales, tile[0], axis=1)[:, :rows]
    return jnp.repeat(by_row, -(-tile[1] // chunk), axis=0)[: -(-width // chunk)]


def product(a_RC, scales_a, tile_a, b_SC, scales_b, tile_b):
    """float32 y_RS. Contraction tiles are multiples of 128, or all of C, or both the same divisor of 128 (1x32)."""
    (R, C), S = a_RC.shape, b_SC.shape[0]
    chunk = min(128, tile_a[1], tile_b[1])
    sa = row_scales(scales_a, tile_a, R, C, chunk)
    sb = row_scales(scales_b, tile_b, S, C, chunk)
    y_RS = jnp.zeros((R, S), jnp.float32)
    for i, start in enumerate(range(0, C, chunk)):
        part = slice(start, start + chunk)
        partial = jnp.dot(a_RC[:, part].astype(jnp.float32), b_SC[:, part].astype(jnp.float32).T,
                          preferred_element_type=jnp.float32)
        y_RS = y_RS + partial * (sa[i][:, None] * sb[i][None, :])
    return y_RS
