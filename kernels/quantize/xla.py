"""Quantisation in plain XLA: the reference's results bit for bit, at the cost of two passes over x.

A CPU's training step runs these several times for each linear layer. XLA:CPU converts to and from 8-bit floats one
entry at a time and copies what is padded or repeated; here magnitudes are rounded by float32 additions and packed by
integer operations, which it vectorises, and x is cut into pieces that divide its shape: ragged tiles pad only maxima.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from kernels.once import traced_once
from kernels.quantize import division, reference
from kernels.quantize.reference import LARGEST, STORED_AS

MANTISSA_BITS = {"e4m3": 3, "e5m2": 2, "e5m6": 6}
SMALLEST_NORMAL = {"e4m3": 2.0**-6, "e5m2": 2.0**-14, "e5m6": 2.0**-14}
SIGN, EXPONENT = np.uint32(0x80000000), np.uint32(0x7F800000)  # bits of a float32


def _bits(x):
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _float(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _cut(shape, tile):
    """((pieces, rows, pieces, columns), the tile counted in pieces): no piece lies in two tiles."""
    (R, C), (r, c) = shape, tile
    p, q = math.gcd(R, r), math.gcd(C, c)
    return (R // p, p, C // q, q), (r // p, c // q)


def _pieces(x_RC, tile):
    """x, float32, as (pieces, rows, pieces, columns)."""
    return x_RC.astype(jnp.float32).reshape(_cut(x_RC.shape, tile)[0])


def _spread(scales, tile, shape):
    """The scale of each piece: (pieces, 1, pieces, 1)."""
    view, tile = _cut(shape, tile)
    # the barrier keeps XLA from computing a scale again for each entry of its tile
    return jax.lax.optimization_barrier(reference.spread(scales, tile, view[::2]))[:, None, :, None]


def _rounded(magnitude, kind: str):
    """float32 not below 0, rounded as `reference.cast` does."""
    magnitude = jnp.minimum(magnitude, LARGEST[kind])
    binade = jnp.maximum(_float(_bits(magnitude) & EXPONENT), SMALLEST_NORMAL[kind])
    shift = binade * (1.5 * 2.0 ** (23 - MANTISSA_BITS[kind]))  # the last bit of a sum with it is the format's last
    return (magnitude + shift) - shift


def _code(magnitude):
    """The bits, uint32, of float32 not below 0 cast to E4M3."""
    magnitude = jnp.minimum(magnitude, LARGEST["e4m3"])
    bits = _bits(magnitude)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # to even; then the bias of 127 becomes 7
    subnormal = _bits(magnitude + 2.0**14) & 0xF  # the last bit of this sum is 2**-9, the smallest E4M3
    code = jnp.where(magnitude < SMALLEST_NORMAL["e4m3"], subnormal, normal)
    return jnp.where(jnp.isnan(magnitude), 0x7F, code)


def amax_of(x_RC, tile):
    """See the reference."""
    largest = jnp.max(jnp.abs(_pieces(x_RC, tile)), axis=(1, 3))
    return reference.amax_of(largest, _cut(x_RC.shape, tile)[1])


@traced_once("tile", "kind", "power_of_two")
def quantize(x_RC, tile, kind: str = "e4m3", power_of_two: bool = False):
    """See the reference."""
    scales = reference.scale_of(amax_of(x_RC, tile), kind, power_of_two)
    return quantize_with(x_RC, scales, tile, kind), scales


@traced_once("tile", "kind")
def quantize_with(x_RC, scales, tile, kind: str = "e4m3"):
    """See the reference."""
    x = _pieces(x_RC, tile)
    magnitude, sign = division.divide(jnp.abs(x), _spread(scales, tile, x_RC.shape)), _bits(x) & SIGN
    if kind == "e4m3":
        values = decode((_code(magnitude) | sign >> 24).astype(jnp.uint8))
    else:
        values = _float(_bits(_rounded(magnitude, kind)) | sign).astype(jnp.float16)
        if kind == "e5m2":  # the upper half of a float16
            values = decode((jax.lax.bitcast_convert_type(values, jnp.uint16) >> 8).astype(jnp.uint8), kind)
    return values.reshape(x_RC.shape)


@traced_once("tile")
def dequantize(values_RC, scales, tile):
    """See the reference."""
    values = values_RC.reshape(_cut(values_RC.shape, tile)[0])
    return (_to_float32(values) * _spread(scales, tile, values_RC.shape)).reshape(values_RC.shape)


def _to_float32(values):
    """values.astype(float32)."""
    if values.dtype == STORED_AS["e5m2"]:
        return jax.lax.bitcast_convert_type(encode(values).astype(jnp.uint16) << 8, jnp.float16).astype(jnp.float32)
    if values.dtype != STORED_AS["e4m3"]:
        return values.astype(jnp.float32)
    code = encode(values).astype(jnp.uint32)
    bits = (code & 0x7F) << 20
    normal = bits + (120 << 23)
    subnormal = _bits(_float(bits | 121 << 23) - SMALLEST_NORMAL["e4m3"])
    magnitude = jnp.where(bits < 8 << 20, subnormal, jnp.where(bits == 0x7F << 20, 0x7FC00000, normal))
    return _float(magnitude | (code & 0x80) << 24)


@traced_once("tile", "kind", "power_of_two")
def round_trip(x_RC, tile, kind: str = "e4m3", power_of_two: bool = False):
    """dequantize(*quantize(x)), float32, without the narrow array between."""
    return round_trip_with(x_RC, reference.scale_of(amax_of(x_RC, tile), kind, power_of_two), tile, kind)


@traced_once("tile", "kind")
def round_trip_with(x_RC, scales, tile, kind: str = "e4m3"):
    """dequantize(quantize_with(x, scales), scales), float32, without the narrow array between."""
    x, scales = _pieces(x_RC, tile), _spread(scales, tile, x_RC.shape)
    magnitude = _rounded(division.divide(jnp.abs(x), scales), kind) * scales
    return _float(_bits(magnitude) | _bits(x) & SIGN).reshape(x_RC.shape)


@traced_once("kind", "power_of_two")
def quantize_both(x_RC, kind: str = "e4m3", power_of_two: bool = False):
    """See the reference."""
    return *quantize(x_RC, (1, 128), kind, power_of_two), *quantize_transposed(x_RC, kind, power_of_two)


@traced_once("kind", "power_of_two")
def quantize_transposed(x_RC, kind: str = "e4m3", power_of_two: bool = False):
    """See the reference."""
    values, scales = quantize(x_RC, (128, 1), kind, power_of_two)
    return _transpose(values), scales.T


@traced_once("tile", "kind", "power_of_two", "transposed")
def quantize_blocks(x_RC, tile, first_N, kind: str = "e4m3", power_of_two: bool = False, transposed: bool = False):
    """See the package."""
    N, rows = first_N.size, x_RC.shape[0] // first_N.size
    blocks, tile = tile[0] // rows, (rows, tile[1])
    amax, shared = amax_of(x_RC, tile), 0
    for k in range(blocks):
        block_N = jnp.minimum(first_N + k, N - 1)
        shared = jnp.maximum(shared, jnp.where(first_N[block_N] == first_N, amax[:, block_N], 0))
    scales = reference.scale_of(shared, kind, power_of_two)
    values = quantize_with(x_RC, scales, tile, kind)
    return (_transpose(values), scales.T) if transposed else (values, scales)


@traced_once("kind", "power_of_two")
def quantize_weight(w_RC, kind: str = "e4m3", power_of_two: bool = False):
    """See the reference."""
    values, scales = quantize(w_RC, (128, 128), kind, power_of_two)
    return values, scales, _transpose(values), scales.T


def _transpose(values):
    """values.T; XLA:CPU is four times as fast at bytes as at 8-bit floats."""
    if values.dtype.itemsize > 1:
        return values.T
    return jax.lax.bitcast_convert_type(encode(values).T, values.dtype)


def encode(values):
    """8-bit floats as uint8, which XLA:CPU carries through a scan as they are; floats get a 16-bit copy."""
    return jax.lax.bitcast_convert_type(values, jnp.uint8)


def decode(codes, kind: str = "e4m3"):
    """The inverse of `encode`."""
    return jax.lax.bitcast_convert_type(codes, STORED_AS[kind])
