"""The definition of SwiGLU between two quantised products: its input is kept in FP8, its output is recomputed.

All quantised arrays here are E4M3 in tiles of 128 along their last axis (V3 §3.3.3). Layouts of scales:
`kernels.quantize.reference`, whose place as `q` another implementation of quantisation may take.
"""

import jax
import jax.numpy as jnp

from kernels.quantize import reference

TILE = (1, 128)


def output(g, u):
    """silu(g) * u."""
    return jax.nn.silu(g) * u


def gradient_of_gate(g, u, d):
    """Of g, from the gradient d of the output."""
    s = jax.nn.sigmoid(g)
    return d * u * s * (1 + g * (1 - s))


def gradient_of_up(g, d):
    """Of u, from the gradient d of the output."""
    return d * g * jax.nn.sigmoid(g)


def forward(g_RF, u_RF, power_of_two: bool = False, q=reference):
    """a = silu(g) * u, quantised for the next product, and g and u as they are kept for the backward pass.

    Returns (a, scales, kept g, its scales, kept u, its scales). power_of_two: the scales of a.
    """
    a = output(g_RF.astype(jnp.float32), u_RF.astype(jnp.float32))
    return *q.quantize(a, TILE, power_of_two=power_of_two), *q.quantize(g_RF, TILE), *q.quantize(u_RF, TILE)


def backward(g_RF, g_scales, u_RF, u_scales, da_RF, weight_R, q=reference):
    """From the kept input and the gradient `da` of an output not yet weighted by the gate `weight`.

    Returns the quantised gradients of g and u in both orientations, each as `quantize_both` gives them, the transpose
    of weight * a quantised for the gradient of the next weight (values_FR, scales), and the gradient of `weight`,
    float32 (R,).
    """
    g, u = q.dequantize(g_RF, g_scales, TILE), q.dequantize(u_RF, u_scales, TILE)
    da, weight_R1 = da_RF.astype(jnp.float32), weight_R.astype(jnp.float32)[:, None]
    a, d = output(g, u), da * weight_R1
    return (q.quantize_both(gradient_of_gate(g, u, d)), q.quantize_both(gradient_of_up(g, d)),
            q.quantize_transposed(a * weight_R1), jnp.sum(a * da, axis=-1))
