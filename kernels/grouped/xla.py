"""Grouped products in plain XLA: dequantised, then one float32 product for each block of rows of one expert.

A loop as long as the routing needs. Measured on one CPU core (6,144 rows of width 256 by 16, 64 and 256 experts of
width 128): 7, 9 and 27 ms; all blocks as one batch, with a matrix gathered for each, 11, 15 and 62; 4 to 16 blocks at a
time between these. The weight gradient: 5, 10 and 55 ms; expert by expert 7, 11 and 56; from operands that are
transposed first, at least twice as much.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels.product.xla import product_of_floats
from kernels.quantize import xla as quantize


def product(a_MC, scales_a, tile_a, b_ESC, scales_b, tile_b, expert_N, out_dtype=jnp.float32):
    """See the reference; y_MS in `out_dtype`."""
    b_ESC = jax.vmap(quantize.dequantize, in_axes=(0, 0, None))(b_ESC, scales_b, tile_b)
    return product_of_floats_by_expert(quantize.dequantize(a_MC, scales_a, tile_a), b_ESC, expert_N, out_dtype)


def product_of_floats_by_expert(a_MC, b_ESC, expert_N, out_dtype=jnp.float32):
    """The same of float32 operands that went through quantisation and back. Blocks have M / N rows, here any number."""
    (M, C), S = a_MC.shape, b_ESC.shape[1]
    block = M // expert_N.size

    def one(i, y_MS):
        y = product_of_floats(lax.dynamic_slice(a_MC, (i * block, 0), (block, C)), b_ESC[expert_N[i]], out_dtype)
        return lax.dynamic_update_slice(y_MS, y, (i * block, 0))

    return lax.fori_loop(0, jnp.sum(expert_N >= 0), one, jnp.zeros((M, S), out_dtype))


def weight_gradient(a_RM, scales_a, tile_a, b_SM, scales_b, tile_b, expert_N, n_experts: int):
    """See the reference."""
    return weight_gradient_of_floats(quantize.dequantize(a_RM, scales_a, tile_a),
                                     quantize.dequantize(b_SM, scales_b, tile_b), expert_N, n_experts)


def weight_gradient_of_floats(a_RM, b_SM, expert_N, n_experts: int):
    """The same of float32 operands that went through quantisation and back. Blocks have M / N rows, here any number."""
    (R, M), S = a_RM.shape, b_SM.shape[0]
    block = M // expert_N.size

    def one(i, dw_ERS):
        a, b = (lax.dynamic_slice(x, (0, i * block), (rows, block)) for x, rows in ((a_RM, R), (b_SM, S)))
        return dw_ERS.at[expert_N[i]].add(product_of_floats(a, b))

    return lax.fori_loop(0, jnp.sum(expert_N >= 0), one, jnp.zeros((n_experts, R, S), jnp.float32))
