"""A matrix times few rows, as in decoding: a product that takes as long as the matrix takes to be read."""

from pathlib import Path

import jax
import jax.numpy as jnp

from kernels import cpp

SOURCE = Path(__file__).with_name("native.cc")
ROWS = 8
DTYPES = ("float32", "bfloat16")


def product(x_XD, w_DF):
    """x_XD in the dtype of w_DF times that, summed in float32; no gradient. Returns y_XF, float32.

    Up to ROWS rows on a CPU whose compiler makes it this is C++ (native.cc), which reads the matrix with all of XLA's
    threads, and 16 bits as they are; XLA:CPU reads it with one, and 16 bits by way of a copy.
    """
    if x_XD.shape[0] <= ROWS and w_DF.dtype in DTYPES and cpp.available(SOURCE):
        return cpp.or_batched(_in_cpp, _in_xla, x_XD, w_DF)
    return _in_xla(x_XD, w_DF)


def _in_cpp(x_XD, w_DF):
    result = jax.ShapeDtypeStruct((x_XD.shape[0], w_DF.shape[1]), jnp.float32)
    return cpp.call(SOURCE, result, x_XD.astype(w_DF.dtype).astype(jnp.float32), w_DF)


def _in_xla(x_XD, w_DF):
    return jnp.dot(x_XD.astype(w_DF.dtype), w_DF, preferred_element_type=jnp.float32)
