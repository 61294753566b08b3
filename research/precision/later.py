"""Gradients of weights apart from those of inputs: the halves B and W of a zero-bubble schedule (2401.10241 §2).

A pass of a model whose tree of parameters has `Later` in the place of weights computes none of their gradients. What
it finds instead, in that place, are the two operands of each, for whoever multiplies them: `Products.weight_gradient`.
"""

from functools import partial
from typing import NamedTuple

import jax


class Later(NamedTuple):
    """A weight, and two arrays that nobody reads: what they get as gradients are the operands of the weight's own.

    It may multiply only once in a pass: the operands of several products would be added up.
    """

    w: jax.Array  # (..., D, F)
    x: jax.Array  # (..., B, T, D), what is multiplied
    dy: jax.Array  # (..., B, T, F), the gradient of what comes out


def is_later(x) -> bool:
    """For trees: whether it is to be taken as a leaf."""
    return isinstance(x, Later)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def put_off(product, x, later: Later):
    """product(x, w), in the dtype of `later.dy`; see `Later` for the gradients."""
    return product(x, later.w)


def _forward(product, x, later):
    y, transpose = jax.vjp(lambda x: product(x, later.w), x)
    return y, (transpose, x)


def _backward(product, kept, dy):
    transpose, x = kept
    return *transpose(dy), Later(None, x, dy)


put_off.defvjp(_forward, _backward)
