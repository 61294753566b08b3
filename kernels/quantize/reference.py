"""The definition of quantisation: tiles, scales, rounding.

Every operand of a product is a matrix (R, C) whose last axis is contracted. It is cut into tiles of `tile` = (r, c)
entries, ragged at the far edges; each tile has one float32 scale. Scales are laid out contraction first,
(ceil(C/c), ceil(R/r)): a product that walks along C reads whole rows of them.
"""

import jax.numpy as jnp

from kernels.quantize import division

STORED_AS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2, "e5m6": jnp.float16}  # JAX has no 12-bit type
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "e5m6": 65024.0}
BITS = {"e4m3": 8, "e5m2": 8, "e5m6": 12}
SMALLEST_SCALE = 2.0**-126  # the smallest normal float32, not the 1e-4 of inference kernels: gradients are small


def scale_of(amax, kind: str, power_of_two: bool):
    """The scale s of tiles whose largest magnitude is `amax`: amax / LARGEST, 1 for tiles of zeros.

    power_of_two: rounded up to one, so that moving a value between tilings changes its exponent only (V3 §3.3.2).
    """
    scale = jnp.maximum(division.by_constant(amax, LARGEST[kind]), SMALLEST_SCALE)
    if power_of_two:
        up = division.float_of(division.bits_of(scale) + division.SIGNIFICAND & division.EXPONENT)
        scale = jnp.where(scale < jnp.inf, up, scale)
    return jnp.where(amax == 0, 1.0, scale)


def cast(x, kind: str):
    """x rounded to the nearest value of the format, ties to even; beyond the largest, that one (a cast gives NaN)."""
    x = jnp.clip(x.astype(jnp.float32), -LARGEST[kind], LARGEST[kind])
    if kind == "e5m6":
        exponent = jnp.maximum(jnp.frexp(x)[1] - 1, -14)
        x = jnp.ldexp(jnp.round(jnp.ldexp(x, 6 - exponent)), exponent - 6)
    return x.astype(STORED_AS[kind])


def spread(scales, tile, shape):
    """Scales (ceil(C/c), ceil(R/r)) repeated to one for each entry of `shape` = (R, C)."""
    return jnp.repeat(jnp.repeat(scales.T, tile[0], axis=0), tile[1], axis=1)[: shape[0], : shape[1]]


def amax_of(x_RC, tile):
    """Largest magnitude of each tile, float32, laid out as scales are."""
    (R, C), (r, c) = x_RC.shape, tile
    padded = jnp.pad(jnp.abs(x_RC.astype(jnp.float32)), ((0, -R % r), (0, -C % c)))
    return jnp.max(padded.reshape(-(-R // r), r, -(-C // c), c), axis=(1, 3)).T


def quantize(x_RC, tile, kind: str = "e4m3", power_of_two: bool = False):
    """(values_RC, scales) with x ~ values * scale; values are x / s, so that quantising twice changes no bit."""
    scales = scale_of(amax_of(x_RC, tile), kind, power_of_two)
    return quantize_with(x_RC, scales, tile, kind), scales


def quantize_with(x_RC, scales, tile, kind: str = "e4m3"):
    """Values under scales that are given (delayed scaling); what is too large for them saturates."""
    return cast(division.divide(x_RC.astype(jnp.float32), spread(scales, tile, x_RC.shape)), kind)


def dequantize(values_RC, scales, tile):
    """values * scale in float32."""
    return values_RC.astype(jnp.float32) * spread(scales, tile, values_RC.shape)


def quantize_both(x_RC, kind: str = "e4m3", power_of_two: bool = False):
    """x in tiles of 128 along its last axis, and its transpose in tiles of 128 along its own: both from x itself.

    Returns (values_RC, scales (ceil(C/128), R), values_CR, scales (ceil(R/128), C)).
    """
    return *quantize(x_RC, (1, 128), kind, power_of_two), *quantize_transposed(x_RC, kind, power_of_two)


def quantize_transposed(x_RC, kind: str = "e4m3", power_of_two: bool = False):
    """The transpose of x in tiles of 128 along its last axis: (values_CR, scales (ceil(R/128), C))."""
    return quantize(x_RC.T, (1, 128), kind, power_of_two)


def quantize_weight(w_RC, kind: str = "e4m3", power_of_two: bool = False):
    """w in blocks of 128x128, with its transpose, whose values and scales are the same ones transposed.

    Returns (values_RC, scales (ceil(C/128), ceil(R/128)), values_CR, scales (ceil(R/128), ceil(C/128))).
    """
    values, scales = quantize(w_RC, (128, 128), kind, power_of_two)
    return values, scales, values.T, scales.T
