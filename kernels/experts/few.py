"""Experts of few tokens, as in decoding: one (token, choice) pair after another reads the weights of its own expert."""

import jax
import jax.numpy as jnp
from jax import lax


def experts(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK):
    """As the reference, without a gradient, at the cost of X*K matrix-vector products. Returns float32 y_XD."""
    X, K = indices_XK.shape
    indices_P, weights_P = indices_XK.reshape(-1), weights_XK.reshape(-1)

    def product(a_1D, w_EDF, e):
        return jnp.dot(a_1D.astype(w_EDF.dtype), lax.dynamic_index_in_dim(w_EDF, e, keepdims=False),
                       preferred_element_type=jnp.float32)

    def add_pair(p, y_XD):
        x_1D, e = lax.dynamic_slice_in_dim(x_XD, p // K, 1), indices_P[p]
        a_1F = jax.nn.silu(product(x_1D, gate_EDF, e)) * product(x_1D, up_EDF, e)
        y_1D = lax.dynamic_slice_in_dim(y_XD, p // K, 1) + weights_P[p] * product(a_1F, down_EFD, e)
        return lax.dynamic_update_slice_in_dim(y_XD, y_1D, p // K, axis=0)

    return lax.fori_loop(0, X * K, add_pair, jnp.zeros(x_XD.shape, jnp.float32))
