"""The plain parts of the Transformer: norm, linear, embedding, dense feed-forward."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.precision.matmul import Products


def rms_norm(x, scale, eps: float):
    """x / rms(x) * scale over the last axis, in float32 whatever x is; returns x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        return rms_norm(x, self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32), self.eps)


class Linear(nn.Module):
    """y = x w (+ b); the product is the recipe's."""

    features: int
    products: Products
    initializer_range: float
    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(self.initializer_range)
        y = self.products.linear(x, self.param("kernel", init, (x.shape[-1], self.features), jnp.float32))
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
        def linear(name, features):
            return Linear(features, self.products, self.initializer_range, name=name)

        hidden_BTF = jax.nn.silu(linear("gate_proj", self.features)(x_BTD)) * linear("up_proj", self.features)(x_BTD)
        return linear("down_proj", x_BTD.shape[-1])(hidden_BTF)
