"""One linear layer: its three products in the formats of a recipe."""

from functools import partial

import jax
import jax.numpy as jnp

import kernels.product as kernel
from kernels.product import accumulator
from research.precision.quantize import (
    Quantized,
    both,
    kept_weight,
    quantize,
    quantize_transposed,
    weight,
    weight_again,
)
from research.precision.recipe import Recipe


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x_XD, w_DF, formats):
    """y_XF = x w; `formats`: operand dtypes of the forward, input-gradient and weight-gradient products."""
    return jnp.dot(x_XD.astype(formats[0]), w_DF.astype(formats[0]), preferred_element_type=jnp.float32)


def _forward(x_XD, w_DF, formats):
    return matmul(x_XD, w_DF, formats), (x_XD, w_DF)


def _backward(formats, residuals, dy_XF):
    x_XD, w_DF = residuals
    _, dgrad, wgrad = formats
    dx_XD = jax.lax.dot_general(dy_XF.astype(dgrad), w_DF.astype(dgrad), (((1,), (1,)), ((), ())),
                                preferred_element_type=jnp.float32)
    dw_DF = jax.lax.dot_general(x_XD.astype(wgrad), dy_XF.astype(wgrad), (((0,), (0,)), ((), ())),
                                preferred_element_type=jnp.float32)
    return dx_XD.astype(x_XD.dtype), dw_DF.astype(w_DF.dtype)


matmul.defvjp(_forward, _backward)


def product(a: Quantized, b: Quantized, accumulation: str, dtype, implementation: str):
    """a_RC b_SC^T in `dtype`, accumulated as `recipe.Product` says."""
    operands = a.values, a.scales, a.tile, b.values, b.scales, b.tile
    if accumulation == "hopper":
        return accumulator.product(*operands, promote=None).astype(dtype)
    return kernel.product(*operands, out_dtype=dtype, implementation=implementation)


def kept_input(x_XD, recipe: Recipe, after_attention: bool, implementation: str, histories):
    """x for the forward product, and what is kept of it for the weight gradient (never x itself)."""
    if after_attention and recipe.attention_output:
        return (quantize(x_XD, recipe.forward.left, implementation, histories.get("x")),
                quantize(x_XD, recipe.attention_output, implementation))
    if recipe.requantize:
        quantized = quantize(x_XD, recipe.forward.left, implementation, histories.get("x"))
        return quantized, quantized
    return both(x_XD, recipe.forward.left, recipe.weight_gradient.left, implementation, 2 * [histories.get("x")])


def updated(histories: dict, **operands):
    """Histories after this step: each operand's largest magnitude comes first, the oldest goes."""
    return {name: jnp.concatenate([jnp.max(jnp.abs(operands[name])).astype(jnp.float32)[None], history[:-1]])
            for name, history in histories.items()}


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def linear(x_XD, w_DF, histories, recipe: Recipe, after_attention: bool, implementation: str):
    """y_XF = x w, all three products quantised (V3 §3.3); y in the dtype of x, dw in float32.

    histories: {} or, for delayed scaling, the largest magnitudes of earlier steps of `x`, `w` and `dy`, (16,) each;
    their "gradients" are the histories after this step.
    """
    return _linear_forward(x_XD, w_DF, histories, recipe, after_attention, implementation)[0]


def _linear_forward(x_XD, w_DF, histories, recipe, after_attention, implementation):
    x, kept = kept_input(x_XD, recipe, after_attention, implementation, histories)
    w_t, w = weight(w_DF, recipe.forward.right, implementation, histories.get("w"))
    y_XF = product(x, w_t, recipe.forward.accumulation, x_XD.dtype, implementation)
    seen = updated({name: histories[name] for name in histories if name != "dy"}, x=x_XD, w=w_DF)
    return y_XF, (kept.packed(), kept_weight(w), seen, histories.get("dy"))


def _linear_backward(recipe, after_attention, implementation, residuals, dy_XF):
    kept, w, seen, dy_history = residuals
    dy, dy_t = both(dy_XF, recipe.input_gradient.left, recipe.weight_gradient.right, implementation, 2 * [dy_history])
    dx_XD = product(dy, weight_again(w), recipe.input_gradient.accumulation, dy_XF.dtype, implementation)
    x_t = kept.unpacked()
    if recipe.requantize or (after_attention and recipe.attention_output):
        x_t = quantize_transposed(x_t.dequantized(), recipe.weight_gradient.left, implementation)
    dw_DF = product(x_t, dy_t, recipe.weight_gradient.accumulation, jnp.float32, implementation)
    return dx_XD, dw_DF, seen | ({} if dy_history is None else updated({"dy": dy_history}, dy=dy_XF))


linear.defvjp(_linear_forward, _linear_backward)
