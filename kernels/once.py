"""One trace of an operation for all operands of the same shapes, of which the layers of a model have hundreds.

A Pallas kernel is then lowered once, and its calls are equal to the byte, debugging information included: only so does
the GPU's compiler see that they are one kernel. Measured for a step of experiments/fp8.py:gpu_fp8_deepseek: see LOG.md.
"""

from functools import partial

import jax


def traced_once(*static: str):
    """A decorator; `static` names the arguments that are no arrays."""
    return partial(jax.jit, static_argnames=static)
