"""Experts whose weights are in 8 or 4 bits, as decoding keeps them: a token reads the bytes of its own experts."""

import jax
import jax.numpy as jnp

from kernels.weight_only import product


def experts(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK):
    """As the reference, without a gradient, of stacks of `Narrow`. Returns float32 y_XD.

    Pairs (P of them) are computed in the order of their experts, so that tokens of one share its bytes.
    """
    X, K = indices_XK.shape
    order_P = jnp.argsort(indices_XK.reshape(-1))
    expert_P = indices_XK.reshape(-1)[order_P]
    x_PD = x_XD[order_P // K]
    hidden_PF = jax.nn.silu(product(x_PD, gate_EDF, expert_P)) * product(x_PD, up_EDF, expert_P)
    y_PD = product(hidden_PF, down_EFD, expert_P)
    y_XKD = y_PD[jnp.argsort(order_P)].reshape(X, K, -1)
    return jnp.einsum("XKD,XK->XD", y_XKD, weights_XK)
