"""Shapes of DeepSeek-V3's routed experts, those on which its authors measure their kernels.

On one of a few GPUs that share the experts: 4 with about 8192 rows each, or 8 with 4096.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """Of the output; of all experts' rows together where those are a product's rows, or its contraction."""

    experts: int
    rows: int
    columns: int
    contraction: int


ROWS = ((4, 8192), (8, 4096))  # experts, rows of each
WEIGHTS = ((4096, 7168), (7168, 2048), (6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048))

PRODUCT = tuple(Shape(e, e * m, n, k) for e, m in ROWS for n, k in WEIGHTS)
WEIGHT_GRADIENT = tuple(Shape(e, n, k, e * m) for e, m in (*ROWS, (16, 2048)) for n, k in WEIGHTS[:2])
SMALL_PRODUCT = Shape(4, 1024, 256, 256)
SMALL_WEIGHT_GRADIENT = Shape(4, 256, 256, 1024)
