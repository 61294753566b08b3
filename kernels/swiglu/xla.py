"""SwiGLU in plain XLA: the reference with the cheap quantisation."""

from functools import partial

from kernels.quantize import xla
from kernels.swiglu import reference

forward = partial(reference.forward, q=xla)
backward = partial(reference.backward, q=xla)
