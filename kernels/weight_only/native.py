"""The product in C++ (native.cc), on a CPU: see kernels/cpp.py."""

from pathlib import Path

import jax
import jax.numpy as jnp

from kernels import cpp
from kernels.weight_only.reference import Narrow

SOURCE = Path(__file__).with_name("native.cc")


def product(x_XD, w: Narrow):
    """See the reference. Where `cpp.available(SOURCE)`; has no gradient."""
    G, F, _ = w.values_GFY.shape
    x_XD = jnp.pad(x_XD.astype(jnp.float32), ((0, 0), (0, G * w.group - w.inputs)))
    return cpp.call(SOURCE, jax.ShapeDtypeStruct((x_XD.shape[0], F), jnp.float32), x_XD, w.values_GFY, w.scales_GF)
