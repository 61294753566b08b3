"""The matrix products of the model in the formats of a recipe: all that `model/` knows of precision."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from kernels.experts import experts
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


@dataclass(frozen=True)
class Products:
    """The products that a recipe quantises. Hashable: it is part of the model's definition."""

    recipe: Recipe
    experts_implementation: str = "auto"  # see kernels/experts

    @property
    def dtype(self):
        """dtype of activations between layers."""
        return jnp.dtype(self.recipe.activations)

    def linear(self, x, w_DF):
        """x (..., D) times w_DF, in the dtype of activations."""
        y_XF = matmul(x.reshape(-1, x.shape[-1]), w_DF, self.recipe.formats)
        return y_XF.astype(self.dtype).reshape(*x.shape[:-1], w_DF.shape[1])

    def experts(self, x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK):
        """The routed experts, in the dtype of activations; see `kernels.experts.experts`."""
        y_XD = experts(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK,
                       formats=self.recipe.formats, implementation=self.experts_implementation)
        return y_XD.astype(self.dtype)
