"""The product in plain XLA: both operands dequantised, one float32 product.

A CPU multiplies float32 matrices of this orientation at its full rate, and its sums need no promotion.
"""

import jax
import jax.numpy as jnp

from kernels.quantize import xla as quantize


def product(a_RC, scales_a, tile_a, b_SC, scales_b, tile_b, out_dtype=jnp.float32):
    """See the reference; y_RS in `out_dtype`."""
    return product_of_floats(quantize.dequantize(a_RC, scales_a, tile_a),
                             quantize.dequantize(b_SC, scales_b, tile_b), out_dtype)


def product_of_floats(a_RC, b_SC, out_dtype=jnp.float32):
    """a b^T of operands that went through quantisation and back, in float32 (on a GPU, too, no faster format)."""
    y_RS = jax.lax.dot_general(a_RC, b_SC, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST,
                               preferred_element_type=jnp.float32)
    return y_RS.astype(out_dtype)
