"""The definition: every expert sees every token, and a token keeps what its gates say."""

import jax
import jax.numpy as jnp


def experts(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK):
    """Sum over a token's chosen experts of weight * SwiGLU expert (V3 Eq. 12), densely.

    x_XD: tokens; indices_XK: distinct chosen experts; weights_XK: their gate values. Returns y_XD.
    The cost is that of all E experts: for tests and for counting, not for training.
    """
    hidden_XEF = jax.nn.silu(jnp.einsum("XD,EDF->XEF", x_XD, gate_EDF)) * jnp.einsum("XD,EDF->XEF", x_XD, up_EDF)
    y_XED = jnp.einsum("XEF,EFD->XED", hidden_XEF, down_EFD)
    chosen_XKE = jax.nn.one_hot(indices_XK, gate_EDF.shape[0], dtype=weights_XK.dtype)
    return jnp.einsum("XED,XKE,XK->XD", y_XED, chosen_XKE, weights_XK)
