"""Division that rounds once, whatever the platform makes of `/`.

XLA:CPU divides exactly, but turns x / (a broadcast) or x / (a constant) into a product with the inverse. On a GPU both
XLA and Pallas divide with div.full.f32, which may be two units in the last place off. Either moves scales and, at ties,
values, and quantising twice would change bits. Here an approximate quotient is corrected by its remainder, whose terms
are products without an error: it makes no difference whether a compiler joins them to multiply-adds.
"""

import jax
import jax.numpy as jnp
import numpy as np

EXPONENT, SIGNIFICAND = np.int32(0x7F800000), np.int32(0x007FFFFF)  # bits of a float32
ONE = np.int32(0x3F800000)
HIGH = np.int32(~0xFFF)  # the upper half of a significand


def bits_of(x):
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def float_of(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _corrected(x, high, low, inverse):
    """x / (high + low) to 2**-32, where `high` and `low` have 12 significant bits and 1 / (high + low) ~ inverse."""
    near = float_of(bits_of(x * inverse) + 0x8000 & ~0xFFFF)  # eight bits: no error in its products with those of 12
    excess = (near * high - x) + near * low
    return near - excess * inverse  # and not near + rest * inverse, which is 0 where this is -0


def by_constant(x, divisor: float):
    """x / divisor for float32 x >= 0. divisor: 7 or 127 times a power of two above 1."""
    small = x < 2.0**-64  # the remainder would be too small for a float32
    x = jnp.where(small, x * 2.0**64, x)
    quotient = _corrected(x, divisor, 0.0, float(np.float32(1 / divisor)))
    return jnp.where(jnp.isinf(x), x, jnp.where(small, quotient * 2.0**-64, quotient))


def parts(scales):
    """What `quotient` needs to know of float32 scales >= 2**-126: (power of two, high, low, inverse).

    For scales that are powers of two the first is the inverse: a product with it is the quotient.
    """
    power = float_of(jnp.maximum(np.int32(254 << 23) - (bits_of(scales) & EXPONENT), 0))  # infinity: 0
    power = jnp.where(scales == scales, power, scales)
    significand = float_of(bits_of(scales) & SIGNIFICAND | ONE)
    high = float_of(bits_of(significand) & HIGH)
    return power, high, significand - high, 1 / significand


def quotient(x_times_power, high, low, inverse):
    """x / scale from x * power, both float32, and the other `parts` of the scale.

    Rounded to the nearest E4M3, E5M2 or E5M6 it is what the exact x / scale, rounded to float32, is: for every x of
    16 bits and every scale; for float32 x, at most 14 of the 2**46 pairs of significands go to the neighbour.
    """
    return _corrected(x_times_power, high, low, inverse)


def divide(x, scales):
    """x / scales for narrow formats: exact on a CPU, `quotient` elsewhere. scales broadcast to x."""
    def exactly(x, scales):
        return x / jnp.where(jnp.isnan(x), x, scales)  # the select, which changes nothing, hides the broadcast

    def corrected(x, scales):
        power, *rest = parts(scales)
        return quotient(jnp.clip(x * power, -(2.0**20), 2.0**20), *rest)  # infinity would become a NaN

    return jax.lax.platform_dependent(x, scales, cpu=exactly, default=corrected)
