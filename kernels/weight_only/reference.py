"""The definition: a matrix in 8 or 4 bits with scales for groups of inputs, what it stands for, and its product.

Letters beside the house's: `D` inputs, `F` outputs, `G` groups of inputs, `C` inputs of a group, `Y` bytes of a group.
Leading axes may stand before a matrix's own: a stack of matrices, one an expert.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels.quantize import quantize as quantize_tiles

FORMATS = ("int8", "int4", "e4m3")
LARGEST = {"int8": 127, "int4": 7}  # magnitude of a value; symmetric: nothing is added after the product
GROUP = {"int8": None, "int4": 128}  # inputs that share a scale; None: all of an output's
BLOCK = 128  # of inputs and of outputs that share a scale in E4M3, as DeepSeek-V3's weights are released


@partial(jax.tree_util.register_dataclass, data_fields=["values_GFY", "scales_GF"],
         meta_fields=["format", "inputs", "dtype"])
@dataclass(frozen=True)
class Narrow:
    """A matrix (D, F), outputs before inputs, groups first: the order in which a product of one row streams it.

    values_GFY: int8. In int4 a byte holds two inputs of its group: 16 times input C/2 + y, and 8 more than input y,
    where y is the byte's place. In e4m3 a byte is the code of a float. What D lacks of whole groups is zero. scales_GF:
    float32. dtype: what rows and products of it are given in.
    """

    values_GFY: jax.Array
    scales_GF: jax.Array
    format: str
    inputs: int
    dtype: str

    @property
    def group(self) -> int:
        """C: inputs that share a scale."""
        return self.values_GFY.shape[-1] * (2 if self.format == "int4" else 1)

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.values_GFY.shape[:-3], self.inputs, self.values_GFY.shape[-2]

    @property
    def nbytes(self) -> int:
        return self.values_GFY.size + 4 * self.scales_GF.size


@partial(jax.tree_util.register_dataclass, data_fields=["values_DF", "scales_GB"], meta_fields=[])
@dataclass(frozen=True)
class Blocks:
    """A matrix, or a stack of them, as FP8 checkpoints hold it: E4M3 (D, F), and a float32 scale for each BLOCK inputs
    and BLOCK outputs, ragged at the end."""

    values_DF: jax.Array
    scales_GB: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values_DF.shape


def quantize(w_DF, format: str, group: int | None = None, dtype: str = "float32") -> Narrow:
    """int8, int4: to the nearest of 255 or 15 evenly spaced values up to the largest magnitude of a group.

    group: None is the format's own, GROUP; the error of a weight is at most half its group's scale. e4m3: in blocks, as
    the release has them (kernels/quantize); its groups are BLOCK.
    """
    if format == "e4m3":
        values_DF, scales_BG = quantize_tiles(w_DF, (BLOCK, BLOCK))  # contraction first: here the outputs' blocks
        return of_blocks(Blocks(values_DF, scales_BG.T), dtype)
    D, F = w_DF.shape
    C = min(group or GROUP[format] or D, D + D % 2)
    if format == "int4" and C % 2:
        raise ValueError(f"group={C} must be even: a byte holds two inputs")
    w_GFC = _in_groups(w_DF.astype(jnp.float32), C)
    largest_GF = jnp.max(jnp.abs(w_GFC), axis=2)
    scales_GF = jnp.where(largest_GF > 0, largest_GF / LARGEST[format], 1.0)
    q_GFC = jnp.round(w_GFC / scales_GF[:, :, None]).astype(jnp.int8)
    if format == "int4":
        low, high = jnp.split(q_GFC, 2, axis=2)
        q_GFC = 16 * high + (low + 8)
    return Narrow(q_GFC, scales_GF, format, D, str(jnp.dtype(dtype)))


def of_blocks(w_DF: Blocks, dtype: str = "float32") -> Narrow:
    """The same bytes in the order of a product."""
    D, F = w_DF.shape
    codes_DF = lax.bitcast_convert_type(w_DF.values_DF, jnp.int8)
    scales_GF = jnp.repeat(w_DF.scales_GB, BLOCK, axis=1)[:, :F]
    return Narrow(_in_groups(codes_DF, BLOCK), scales_GF, "e4m3", D, str(jnp.dtype(dtype)))


def _in_groups(w_DF, C: int):
    D, F = w_DF.shape
    return jnp.pad(w_DF.T, ((0, 0), (0, -D % C))).reshape(F, -1, C).transpose(1, 0, 2)


def numbers(values_GFY, format: str):
    """(..., G, F, C) float32 of the bytes, without their scales."""
    if format == "e4m3":
        return lax.bitcast_convert_type(values_GFY, jnp.float8_e4m3fn).astype(jnp.float32)
    if format == "int4":
        values_GFY = jnp.concatenate([(values_GFY & 15) - 8, values_GFY >> 4], axis=-1)
    return values_GFY.astype(jnp.float32)


def dequantize(w: Narrow):
    """The matrix (D, F), or the stack of them, that `w` stands for, float32."""
    w_GFC = numbers(w.values_GFY, w.format) * w.scales_GF[..., None]
    *stack, D, F = w.shape
    return jnp.swapaxes(w_GFC, -1, -2).reshape(*stack, -1, F)[..., :D, :]


def product(x_XD, w: Narrow, matrix_X=None):
    """x_XD times what `w` stands for, in float32. matrix_X: of a stack (E, D, F), which one each row meets."""
    x_XD, floats = x_XD.astype(jnp.float32), dequantize(w)
    if matrix_X is None:
        return jnp.dot(x_XD, floats, precision="highest")
    return jnp.einsum("XD,XDF->XF", x_XD, floats[matrix_X], precision="highest")
