"""The plain parts of the Transformer: norm, linear, embedding, dense feed-forward."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.precision.experts import HISTORIES
from research.precision.later import Later
from research.precision.products import FEED_FORWARD, Narrow, Products


@partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def rms_norm(x, scale, eps: float):
    """x / rms(x) * scale over the last axis, in float32 whatever x is; returns x's dtype.

    Computed again in the backward pass, which would keep four float32 copies of x otherwise (V3 §3.2.3).
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        return rms_norm(x, self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32), self.eps)


def histories(module: nn.Module, products: Products, *names: str) -> dict:
    """The state of delayed scaling of a module's operands, {} where there is none (most recipes; evaluation)."""
    if not products.history or not (module.is_initializing() or module.has_variable("amax", "history")):
        return {}
    zeros = {name: jnp.zeros(products.history) for name in names}
    return module.variable("amax", "history", lambda: zeros).value


def matrix(module: nn.Module, name: str, initializer_range: float, shape: tuple[int, ...]):
    """A module's parameter: float32, or as decoding keeps it, or with a gradient that waits (flax would compare the
    shapes of their parts)."""
    if module.has_variable("params", name) and isinstance(kept := module.get_variable("params", name), (Narrow, Later)):
        return kept
    return module.param(name, nn.initializers.normal(initializer_range), shape, jnp.float32)


class Kernel(nn.Module):
    """The matrix of a projection that another module multiplies with."""

    shape: tuple[int, ...]
    initializer_range: float

    @nn.compact
    def __call__(self):
        return matrix(self, "kernel", self.initializer_range, self.shape)


class Linear(nn.Module):
    """y = x w (+ b); the product is the recipe's."""

    features: int
    products: Products
    initializer_range: float
    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        w_DF = matrix(self, "kernel", self.initializer_range, (x.shape[-1], self.features))
        past = histories(self, self.products, "x", "w", "dy") if self.products.quantizes(self.name) else {}
        y = self.products.linear(x, w_DF, self.name, past)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(y.dtype)
            y = y + jnp.expand_dims(bias, range(y.ndim - 1))
        return y


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    features: int  # F
    products: Products
    initializer_range: float

    @nn.compact
    def __call__(self, x_BTD):
        D, F = x_BTD.shape[-1], self.features
        gate_DF, up_DF, down_FD = (Kernel(shape, self.initializer_range, name=name)() for name, shape in
                                   zip(FEED_FORWARD, ((D, F), (D, F), (F, D)), strict=True))
        past = histories(self, self.products, *HISTORIES) if self.products.quantizes(*FEED_FORWARD) else {}
        return self.products.feed_forward(x_BTD, gate_DF, up_DF, down_FD, past)
