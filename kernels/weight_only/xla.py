"""The product in plain XLA, which streams the bytes of the matrix: no copy of it in floats is made.

XLA:CPU converts an operand of a dot into a copy. A sum of products over the minor dimension it hands to a library
(YNNPACK) that converts in registers, if what is done to the bytes is in its vocabulary: conversion of int8, sums,
products, floor; neither shifts and masks of bytes, nor types of 4 bits, nor E4M3: that is made floats in blocks.
"""

from dataclasses import replace

import jax.numpy as jnp
from jax import lax

from kernels.weight_only.reference import Narrow, numbers

FEW = 8  # rows: each streams the matrix; more of them share blocks of it in floats
BLOCK = 512  # outputs of a block: 3 MB of floats at 1,536 inputs


def product(x_XD, w: Narrow, matrix_X=None):
    """See the reference. Of a stack each row reads its own matrix, one row after the other: slow for a long prompt."""
    if matrix_X is not None:
        def of_row(_, row):
            x_D, e = row
            values, scales = (lax.dynamic_index_in_dim(x, e, keepdims=False) for x in (w.values_GFY, w.scales_GF))
            return None, product(x_D[None], replace(w, values_GFY=values, scales_GF=scales))[0]

        return lax.scan(of_row, None, (x_XD, matrix_X))[1]
    G, F, _ = w.values_GFY.shape
    # Tied to x: the conversion of a matrix alone is hoisted out of the loop over tokens, into a copy of the model.
    # The constant too: one that several products share is made an array of their size, which each of them reads.
    x_XD, values_GFY, sixteenth = lax.optimization_barrier((x_XD, w.values_GFY, jnp.float32(1 / 16)))
    w = replace(w, values_GFY=values_GFY)
    x_XGC = jnp.pad(x_XD.astype(jnp.float32), ((0, 0), (0, G * w.group - w.inputs))).reshape(-1, G, w.group)
    if x_XGC.shape[0] <= FEW and w.format != "e4m3":
        return jnp.stack([_row(x_GC, w, sixteenth) for x_GC in x_XGC])
    return _blocks(x_XGC, w, min(BLOCK, F))


def _row(x_GC, w: Narrow, sixteenth):
    """y_F of one row."""
    values_GFY, x_G1C = w.values_GFY.astype(jnp.float32), x_GC[:, None]
    if w.format == "int8":
        y_GF = jnp.sum(values_GFY * x_G1C, axis=2)
    else:
        # byte = 16 high + (low + 8), so low a + high b = byte a + floor(byte / 16) (b - 16 a) - 8 a
        a_G1Y, b_G1Y = jnp.split(x_G1C, 2, axis=2)
        y_GF = (jnp.sum(values_GFY * a_G1Y, axis=2)
                + jnp.sum(jnp.floor(values_GFY * sixteenth) * (b_G1Y - 16 * a_G1Y), axis=2)
                - 8 * jnp.sum(a_G1Y, axis=2))
    return jnp.sum(y_GF * w.scales_GF, axis=0)


def _blocks(x_XGC, w: Narrow, block: int):
    """y_XF; `block` outputs at a time are made floats."""
    F = w.shape[1]
    x_XD = x_XGC.reshape(x_XGC.shape[0], -1)

    def step(i, y_XF):
        start = jnp.minimum(i * block, F - block)  # the last block ends where the matrix does
        values_GFY, scales_GF = (lax.dynamic_slice_in_dim(x, start, block, axis=1)
                                 for x in (w.values_GFY, w.scales_GF))
        w_GFC = numbers(values_GFY, w.format) * scales_GF[:, :, None]
        w_FD = w_GFC.transpose(1, 0, 2).reshape(block, -1)
        return lax.dynamic_update_slice_in_dim(y_XF, lax.dot_general(x_XD, w_FD, (((1,), (1,)), ((), ()))), start, 1)

    return lax.fori_loop(0, -(-F // block), step, jnp.zeros((x_XD.shape[0], F)))
