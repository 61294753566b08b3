"""Experts of few tokens, as in decoding: each token reads the weights of its own experts, and no others."""

import jax
import jax.numpy as jnp
from jax import lax


def experts(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK):
    """As the reference, without a gradient, at the cost of X*K matrix-vector products. Returns float32 y_XD."""
    def of_token(_, token):
        x_D, indices_K, weights_K = token

        def product(a_KD, w_EDF):  # gathered: XLA:CPU slices one expert at a time at half the speed
            return jnp.einsum("KD,KDF->KF", a_KD.astype(w_EDF.dtype), w_EDF[indices_K],
                              preferred_element_type=jnp.float32)

        x_KD = jnp.broadcast_to(x_D, (*indices_K.shape, *x_D.shape))
        a_KF = jax.nn.silu(product(x_KD, gate_EDF)) * product(x_KD, up_EDF)
        return None, weights_K @ product(a_KF, down_EFD)

    return lax.scan(of_token, None, (x_XD, indices_XK, weights_XK))[1]
