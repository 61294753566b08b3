"""Experts of few tokens, as in decoding: each token reads the weights of its own experts, and no others."""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from kernels import cpp

SOURCE = Path(__file__).with_name("few.cc")
UNROLLED = 4  # tokens: a loop of so few costs more than its products, on a CPU


def experts(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK):
    """As the reference, without a gradient, at the cost of X*K matrix-vector products. Returns float32 y_XD.

    In float32 on a CPU whose compiler makes it, this is C++ (few.cc): a call, where XLA has a dozen products in turn.
    """
    operands = x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK
    if gate_EDF.dtype == jnp.float32 and cpp.available(SOURCE):
        return cpp.or_batched(_in_cpp, in_xla, *operands)
    return in_xla(*operands)


def _in_cpp(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK):
    floats = (z.astype(jnp.float32) for z in (x_XD, gate_EDF, up_EDF, down_EFD, weights_XK))
    return cpp.call(SOURCE, jax.ShapeDtypeStruct(x_XD.shape, jnp.float32), *floats, indices_XK)


def in_xla(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK):
    """The same in plain XLA."""
    def product(a_1D, w_EDF, e):
        return jnp.dot(a_1D.astype(w_EDF.dtype), lax.dynamic_index_in_dim(w_EDF, e, keepdims=False),
                       preferred_element_type=jnp.float32)

    def of_token(_, token):
        x_1D, indices_K, weights_K = token
        y_1D = jnp.zeros(x_1D.shape, jnp.float32)
        for e, weight in zip(indices_K, weights_K, strict=True):
            a_1F = jax.nn.silu(product(x_1D, gate_EDF, e)) * product(x_1D, up_EDF, e)
            y_1D += weight * product(a_1F, down_EFD, e)
        return None, y_1D

    X, D = x_XD.shape
    y_X1D = lax.scan(of_token, None, (x_XD[:, None], indices_XK, weights_XK), unroll=X <= UNROLLED)[1]
    return y_X1D.reshape(X, D)
