"""Quantised operands: values, scales and the format that ties them; `kernels.quantize` holds the numerics."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

import kernels.quantize as kernel
from kernels.quantize import reference
from research.parallel.rules import kept_in_parts, whole_again
from research.precision.recipe import Format


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A matrix (R, C), or (E, R, C), whose last axis is contracted: values of `format.kind` times scales."""

    values: jax.Array  # (R, C); 8-bit ones as uint8 where `packed`
    scales: jax.Array  # float32 (ceil(C/c), ceil(R/r))
    format: Format = field(metadata={"static": True})

    @property
    def tile(self) -> tuple[int, int]:
        return self.format.tile or self.values.shape[-2:]

    @property
    def stored_bytes(self) -> int:
        """Bytes of the arrays as they are."""
        return self.values.nbytes + self.scales.nbytes

    @property
    def counted_bytes(self) -> float:
        """Bytes that the format needs: E5M6 has 12 bits and is stored in 16, a power-of-two scale has 8 and not 32."""
        scale_bits = 8 if self.format.power_of_two else 32
        return (self.values.size * reference.BITS[self.format.kind] + self.scales.size * scale_bits) / 8

    def dequantized(self) -> jax.Array:
        """values * scales: float32 (R, C)."""
        return kernel.dequantize(self.values, self.scales, self.tile)

    def packed(self) -> "Quantized":
        """Itself with 8-bit values as uint8: XLA:CPU gives scanned FP8 arrays a 16-bit copy, bytes it leaves alone."""
        if reference.BITS[self.format.kind] != 8:
            return self
        return replace(self, values=jax.lax.bitcast_convert_type(self.values, jnp.uint8))

    def unpacked(self) -> "Quantized":
        """The inverse of `packed`."""
        if reference.BITS[self.format.kind] != 8:
            return self
        return replace(self, values=jax.lax.bitcast_convert_type(self.values, reference.STORED_AS[self.format.kind]))


@dataclass(frozen=True)
class Packing:
    """Rows as they travel: 8-bit values and the exponents of the scales of their tiles, which are powers of two, of
    one row each."""

    format: Format
    implementation: str

    def packed(self, x_RC) -> jax.Array:
        """uint8 (R, C + ceil(C/c))."""
        q = quantize(x_RC, self.format, self.implementation).packed()
        exponents = jax.lax.bitcast_convert_type(q.scales.T, jnp.uint32) >> 23
        return jnp.concatenate([q.values, exponents.astype(jnp.uint8)], axis=1)

    def unpacked(self, packed, like_RC) -> jax.Array:
        """What the rows stand for, as wide as `like_RC` and in its dtype: exact in 16 bits. Rows of zeros are zeros."""
        values, exponents = jnp.split(packed, [like_RC.shape[1]], axis=1)
        scales = jax.lax.bitcast_convert_type(exponents.astype(jnp.uint32) << 23, jnp.float32).T
        return Quantized(values, scales, self.format).unpacked().dequantized().astype(like_RC.dtype)


def quantize(x_RC, form: Format, implementation: str, history=None) -> Quantized:
    """x_RC, or (E, R, C), in the format. history: largest magnitudes of earlier steps, for delayed scaling; while they
    are all 0, and where there is none, x scales itself."""
    tile = form.tile or x_RC.shape[-2:]
    if form.delayed and history is not None:
        past, now = jnp.max(history), jnp.max(jnp.abs(x_RC)).astype(jnp.float32)
        scale = reference.scale_of(jnp.where(past > 0, past, now), form.kind, form.power_of_two)
        scales = jnp.broadcast_to(scale, (*x_RC.shape[:-2], 1, 1))
        quantize_with = reference.quantize_with
        if x_RC.ndim == 3:
            quantize_with = jax.vmap(quantize_with, in_axes=(0, 0, None, None))
        return Quantized(quantize_with(x_RC, scales, tile, form.kind), scales, form)
    return Quantized(*kernel.quantize(x_RC, tile, form.kind, form.power_of_two, implementation=implementation), form)


def both(x_RC, form: Format, transposed: Format, implementation: str, histories=(None, None)):
    """x and its transpose, each quantised from x itself; in one pass where both have the same tiles of 128."""
    if form == transposed and form.tile == (1, 128):
        values, scales, values_t, scales_t = kernel.quantize_both(
            x_RC, form.kind, form.power_of_two, implementation=implementation)
        return Quantized(values, scales, form), Quantized(values_t, scales_t, form)
    return (quantize(x_RC, form, implementation, histories[0]),
            quantize_transposed(x_RC, transposed, implementation, histories[1]))


def quantize_transposed(x_RC, form: Format, implementation: str, history=None) -> Quantized:
    """The transpose of x_RC in the format; without making it where tiles are of 128."""
    if form.tile != (1, 128):
        return quantize(x_RC.T, form, implementation, history)
    values, scales = kernel.quantize_transposed(x_RC, form.kind, form.power_of_two, implementation=implementation)
    return Quantized(values, scales, form)


def kept_weight(w: Quantized) -> Quantized:
    """What is kept of a weight for the backward pass, `packed`: on devices that share its gathering, a part of it."""
    w = w.packed()
    return replace(w, values=kept_in_parts(w.values))


def weight_again(w: Quantized) -> Quantized:
    """The inverse of `kept_weight`."""
    return replace(w, values=whole_again(w.values)).unpacked()


def weight(w_DF, form: Format, implementation: str, history=None):
    """w for the two products that read it: (its transpose, for y = x w; itself, for dx = dy w^T).

    Blocks and whole tensors are quantised once: their transpose is theirs. 1x32 tiles follow each contraction (mxfp8).
    """
    if form.tile == (128, 128):
        values, scales, values_t, scales_t = kernel.quantize_weight(
            w_DF, form.kind, form.power_of_two, implementation=implementation)
        return Quantized(values_t, scales_t, form), Quantized(values, scales, form)
    itself = quantize(w_DF, form, implementation, history)
    if form.tile is None:
        swapped = replace(itself, values=itself.values.swapaxes(-1, -2), scales=itself.scales.swapaxes(-1, -2))
        return swapped, itself
    return quantize(w_DF.swapaxes(-1, -2), form, implementation), itself
