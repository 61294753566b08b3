"""The definition of SwiGLU between two quantised products: its input is kept in FP8, its output is recomputed.

All quantised arrays here are E4M3 in tiles of 128 along their last axis (V3 §3.3.3). Layouts of scales:
`kernels.quantize.reference`.
"""

import jax
import jax.numpy as jnp

from kernels.quantize import reference as q

TILE = (1, 128)


def forward(g_RF, u_RF, power_of_two: bool = False):
    """a = silu(g) * u, quantised for the next product, and g and u as they are kept for the backward pass.

    Returns (a, scales, kept g, its scales, kept u, its scales).
    """
    g, u = g_RF.astype(jnp.float32), u_RF.astype(jnp.float32)
    a = q.quantize(jax.nn.silu(g) * u, TILE, power_of_two=power_of_two)
    return *a, *q.quantize(g, TILE), *q.quantize(u, TILE)


def backward(g_RF, g_scales, u_RF, u_scales, da_RF, weight_R):
    """From the kept input and the gradient `da` of an output not yet weighted by the gate `weight`.

    Returns the quantised gradients of g and u in both orientations, each as `q.quantize_both` gives them, the
    transpose of weight * a quantised for the gradient of the next weight (values_FR, scales), and the gradient of
    `weight`, float32 (R,).
    """
    g, u = q.dequantize(g_RF, g_scales, TILE), q.dequantize(u_RF, u_scales, TILE)
    da, weight_R1 = da_RF.astype(jnp.float32), weight_R.astype(jnp.float32)[:, None]
    s = jax.nn.sigmoid(g)
    a = g * s * u
    d = da * weight_R1
    dg, du = d * u * s * (1 + g * (1 - s)), d * g * s
    return (q.quantize_both(dg), q.quantize_both(du), q.quantize((a * weight_R1).T, TILE), jnp.sum(a * da, axis=-1))
