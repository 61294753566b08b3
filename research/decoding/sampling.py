"""From logits to a distribution, and a token out of it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

LEAST = 1e-6  # temperature and top_p in float32: logits over less overflow, and nothing is below a number that is 0


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Filters apply one after another, as they are listed, each to what the one before left.

    temperature: 0 takes the likeliest token. top_k: the k likeliest, 0: all. top_p: the fewest likeliest tokens whose
    probabilities reach p. min_p: those at least so likely, relative to the likeliest. A temperature or top_p below
    LEAST is as LEAST.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def problem(self) -> str | None:
        """`field=value must be ...` for the first field out of its range, or None."""
        for name, good, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "must be a number of at least 0"),
            ("top_k", self.top_k >= 0, "must be at least 0 (0: all tokens)"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "must be from 0 to 1"),
        ):
            if not good:
                return f"{name}={getattr(self, name)} {expected}"
        return None


def probabilities(logits, sampling: Sampling):
    """The distribution (..., V) that tokens are drawn from, float32. ValueError at temperature 0, which draws none."""
    if not sampling.temperature:
        raise ValueError("temperature=0 takes the likeliest token: there is no distribution")
    scaled = logits.astype(jnp.float32) / max(sampling.temperature, LEAST)
    V = logits.shape[-1]
    if 0 < sampling.top_k < V:
        least = jax.lax.top_k(scaled, sampling.top_k)[0][..., -1:]
        scaled = jnp.where(scaled < least, -jnp.inf, scaled)
    if sampling.top_p < 1:
        order = jnp.argsort(-scaled, axis=-1)
        p_sorted = jax.nn.softmax(jnp.take_along_axis(scaled, order, axis=-1), axis=-1)
        kept_sorted = jnp.cumsum(p_sorted, axis=-1) - p_sorted < max(sampling.top_p, LEAST)
        kept = jnp.take_along_axis(kept_sorted, jnp.argsort(order, axis=-1), axis=-1)
        scaled = jnp.where(kept, scaled, -jnp.inf)
    p = jax.nn.softmax(scaled, axis=-1)
    if sampling.min_p:
        p = jnp.where(p >= sampling.min_p * jnp.max(p, axis=-1, keepdims=True), p, 0)
        p = p / jnp.sum(p, axis=-1, keepdims=True)
    return p


def draw(keys_B, p_BV):
    """A token of each row's distribution, int32 (B,); a row's key and distribution alone decide."""
    return jax.vmap(lambda key, p_V: jax.random.categorical(key, jnp.log(p_V)))(keys_B, p_BV).astype(jnp.int32)


def likeliest(logits):
    """int32 (...,); ties go to the lower id, and so do logits that are all NaN."""
    V = logits.shape[-1]
    is_best = logits == jnp.max(logits, axis=-1, keepdims=True)  # two plain reductions: XLA:CPU's argmax is serial
    return jnp.minimum(jnp.min(jnp.where(is_best, jnp.arange(V), V), axis=-1), V - 1).astype(jnp.int32)
