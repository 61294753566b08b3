"""The product in C++ (native.cc), on a CPU: see kernels/cpp.py."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kernels import cpp
from kernels.weight_only.reference import FORMATS, Narrow

SOURCE = Path(__file__).with_name("native.cc")


def product(x_XD, w: Narrow, matrix_X=None):
    """See the reference. Where `cpp.available(SOURCE)`; has no gradient. Rows that meet the same matrix should be
    neighbours: up to 8 of them share a pass over its bytes."""
    X, values, scales = x_XD.shape[0], w.values_GFY, w.scales_GF
    if matrix_X is None:
        matrix_X, values, scales = np.zeros(X, np.int32), values[None], scales[None]
    _, G, F, _ = values.shape
    x_XD = jnp.pad(x_XD.astype(jnp.float32), ((0, 0), (0, G * w.group - w.inputs)))
    return cpp.call(SOURCE, jax.ShapeDtypeStruct((X, F), jnp.float32), x_XD, values, scales, matrix_X,
                    format=np.int32(FORMATS.index(w.format)))
