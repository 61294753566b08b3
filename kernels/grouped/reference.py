"""Products over rows sorted by expert, each expert's rows padded to whole blocks.

The padded rows are (M, ...); `expert_N` names the expert of each of N blocks of M/N rows, -1 for blocks behind the last
one. Padding rows hold zeros. Tiles and layouts of scales: `kernels.quantize.reference`.
"""

import jax.numpy as jnp

from kernels.product import reference

BLOCK = 128  # rows, of the Hopper kernels


def product(a_MC, scales_a, tile_a, b_ESC, scales_b, tile_b, expert_N):
    """Rows of each block times the matrix of its expert: float32 y_MS; zeros in blocks of no expert.

    scales_b: (E, ...), those of each expert's matrix.
    """
    E, rows_E = b_ESC.shape[0], jnp.repeat(expert_N, a_MC.shape[0] // expert_N.size)
    y_MS = jnp.zeros((a_MC.shape[0], b_ESC.shape[1]), jnp.float32)
    for e in range(E):
        y = reference.product(a_MC, scales_a, tile_a, b_ESC[e], scales_b[e], tile_b)
        y_MS = jnp.where((rows_E == e)[:, None], y, y_MS)
    return y_MS


def weight_gradient(a_RM, scales_a, tile_a, b_SM, scales_b, tile_b, expert_N, n_experts: int):
    """The contraction runs over an expert's rows: float32 dw_ERS; zeros for an expert without rows."""
    M = a_RM.shape[1]
    of_M = jnp.repeat(expert_N, M // expert_N.size)
    parts = []
    for e in range(n_experts):
        mine = (of_M == e)[None]
        parts.append(reference.product(jnp.where(mine, a_RM.astype(jnp.float32), 0), scales_a, tile_a,
                                       jnp.where(mine, b_SM.astype(jnp.float32), 0), scales_b, tile_b))
    return jnp.stack(parts)
