"""The definition: a matrix in 8 or 4 bits with a scale a group of inputs, what it stands for, and its product.

Letters beside the house's: `D` inputs, `F` outputs, `G` groups of inputs, `C` inputs of a group, `Y` bytes of a group.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

LARGEST = {8: 127, 4: 7}  # magnitude of a value; symmetric: nothing is added after the product
GROUP = {8: None, 4: 128}  # inputs that share a scale; None: all of an output's


@partial(jax.tree_util.register_dataclass, data_fields=["values_GFY", "scales_GF"],
         meta_fields=["bits", "inputs", "dtype"])
@dataclass(frozen=True)
class Narrow:
    """A matrix (D, F), outputs before inputs, groups first: the order in which a product of one row streams it.

    values_GFY: int8. In 4 bits a byte holds two inputs of its group: 16 times input C/2 + y, and 8 more than input y,
    where y is the byte's place. What D lacks of whole groups is zero. scales_GF: float32. dtype: what rows and products
    of it are given in.
    """

    values_GFY: jax.Array
    scales_GF: jax.Array
    bits: int
    inputs: int
    dtype: str

    @property
    def group(self) -> int:
        """C: inputs that share a scale."""
        return self.values_GFY.shape[2] * (8 // self.bits)

    @property
    def shape(self) -> tuple[int, int]:
        return self.inputs, self.values_GFY.shape[1]

    @property
    def nbytes(self) -> int:
        return self.values_GFY.size + 4 * self.scales_GF.size


def quantize(w_DF, bits: int, group: int | None = None, dtype: str = "float32") -> Narrow:
    """To the nearest of 255 (8 bits) or 15 (4) evenly spaced values up to the largest magnitude of a group.

    group: None is the format's own, GROUP; the error of a weight is at most half its group's scale.
    """
    D, F = w_DF.shape
    C = min(group or GROUP[bits] or D, D + D % 2)
    if bits == 4 and C % 2:
        raise ValueError(f"group={C} must be even: a byte holds two inputs")
    w_FD = jnp.pad(w_DF.astype(jnp.float32).T, ((0, 0), (0, -D % C)))
    w_GFC = w_FD.reshape(F, -1, C).transpose(1, 0, 2)
    largest_GF = jnp.max(jnp.abs(w_GFC), axis=2)
    scales_GF = jnp.where(largest_GF > 0, largest_GF / LARGEST[bits], 1.0)
    q_GFC = jnp.round(w_GFC / scales_GF[:, :, None]).astype(jnp.int8)
    if bits == 4:
        low, high = jnp.split(q_GFC, 2, axis=2)
        q_GFC = 16 * high + (low + 8)
    return Narrow(q_GFC, scales_GF, bits, D, str(jnp.dtype(dtype)))


def unpacked(values_GFY, bits: int):
    """(G, F, C) int8 of the bytes."""
    if bits == 8:
        return values_GFY
    return jnp.concatenate([(values_GFY & 15) - 8, values_GFY >> 4], axis=2)


def dequantize(w: Narrow):
    """The matrix (D, F) that `w` stands for, float32."""
    w_GFC = unpacked(w.values_GFY, w.bits).astype(jnp.float32) * w.scales_GF[:, :, None]
    return w_GFC.transpose(0, 2, 1).reshape(-1, w.shape[1])[:w.inputs]


def product(x_XD, w: Narrow):
    """x_XD times what `w` stands for, in float32."""
    return jnp.dot(x_XD.astype(jnp.float32), dequantize(w), precision="highest")
