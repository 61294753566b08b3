"""Shapes of DeepSeek-V3's dense products, of 4096 tokens: those on which its authors measure their kernels.

The query's two projections, both of the latent with the rotary key, the one after attention, a shared expert's.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """y (rows, columns), and the contraction."""

    rows: int
    columns: int
    contraction: int


TOKENS = 4096
WEIGHTS = ((2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))

FORWARD = tuple(Shape(TOKENS, n, k) for n, k in WEIGHTS)
INPUT_GRADIENT = tuple(Shape(TOKENS, k, n) for n, k in WEIGHTS)
WEIGHT_GRADIENT = tuple(Shape(n, k, TOKENS) for n, k in WEIGHTS)
SMALL = Shape(256, 256, 256)
