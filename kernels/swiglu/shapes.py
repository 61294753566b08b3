"""Shapes of DeepSeek-V3's SwiGLU: the shared expert, the routed ones' copies of 4096 tokens, a dense layer."""

from typing import NamedTuple


class Shape(NamedTuple):
    """g and u."""

    rows: int
    width: int


SHAPES = (Shape(4096, 2048), Shape(32768, 2048), Shape(4096, 18432))
SMALL = Shape(256, 256)
