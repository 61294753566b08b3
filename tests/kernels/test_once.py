"""One trace for all operands of a shape, and so one kernel in the program of a model, wherever its calls stand."""

import re

import jax
import jax.numpy as jnp

from kernels.choice import meant_for_h200
from kernels.quantize import quantize, quantize_transposed


def program(function, *shapes) -> str:
    with meant_for_h200():
        arguments = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def test_calls_of_one_shape_are_one_kernel():
    def in_a_loop(z, x):
        with jax.named_scope("elsewhere"):
            return z, quantize(x, (1, 128))

    def three(x_RC, x_LRC, y_RC):
        return quantize(x_RC, (1, 128)), jax.lax.scan(in_a_loop, 0, x_LRC), quantize(y_RC, (1, 128))

    def kernels(text):
        return re.findall(r'kernel_hash = "((?:\\.|[^"\\])*)"', text)

    assert len(kernels(program(three, (128, 256), (3, 128, 256), (128, 256)))) == 1
    assert len(set(kernels(program(three, (128, 256), (3, 128, 256), (256, 256))))) == 2
    other = kernels(program(lambda x: (quantize(x, (1, 128)), quantize_transposed(x)), (128, 256)))
    assert len(set(other)) == 2
