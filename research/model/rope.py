"""Rotary position embedding: plain, YaRN (arXiv 2309.00071) and Llama 3's scaling."""

import math

import jax.numpy as jnp
import numpy as np


def inverse_frequencies(width: int, theta: float, scaling) -> np.ndarray:
    """The P/2 angular speeds of a rotary width P, radians a position, float32.

    scaling: the config's `rope_scaling`. YaRN as the released models implement it: dimensions that turn more than
    beta_fast times within the original context keep their speed, those below beta_slow turns are slowed by `factor`,
    with a linear ramp over the dimension index between.
    """
    speed = 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
    if scaling.type == "yarn":
        def dimension(turns: float) -> float:
            return width * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (
                2 * math.log(theta))

        low = max(math.floor(dimension(scaling.beta_fast)), 0)
        high = min(math.ceil(dimension(scaling.beta_slow)), width - 1)
        ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0, 1)
        speed = speed * ((1 - ramp) + ramp / scaling.factor)
    elif scaling.type == "llama3":
        turns = scaling.original_max_position_embeddings * speed / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0, 1)
        speed = speed * (keep + (1 - keep) / scaling.factor)
    return speed.astype(np.float32)


def mscale(factor: float, multiplier: float) -> float:
    """YaRN's sqrt(1/t) = 0.1 * multiplier * ln(factor) + 1."""
    return 0.1 * multiplier * math.log(factor) + 1 if factor > 1 else 1.0


def softmax_scale(width: int, scaling) -> float:
    """1/sqrt(width) of a query-key product, times YaRN's squared mscale where it applies."""
    yarn = mscale(scaling.factor, scaling.mscale_all_dim) ** 2 if scaling.type == "yarn" else 1.0
    return yarn / math.sqrt(width)


def rotation(positions_BT, width: int, theta: float, scaling):
    """cos and sin, each (B, T, P/2) float32, of a position's angles."""
    angle = positions_BT[..., None].astype(jnp.float32) * inverse_frequencies(width, theta, scaling)[None, None]
    size = mscale(scaling.factor, scaling.mscale) / mscale(scaling.factor, scaling.mscale_all_dim) \
        if scaling.type == "yarn" else 1.0
    return jnp.cos(angle) * size, jnp.sin(angle) * size


def rotate(x_BTNP, cos, sin, interleaved: bool):
    """Turns each pair of channels by its angle, in float32; returns x's dtype.

    interleaved: pairs are (2i, 2i+1), as DeepSeek stores them, otherwise (i, i + P/2), as Qwen and Llama do. The
    result is in halves either way: a fixed permutation, the same for queries and keys, leaves their product alone.
    """
    x = x_BTNP.astype(jnp.float32)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
    else:
        a, b = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNP.dtype)
