"""Quantisation in tiles: E4M3, E5M2 and E5M6 with float32 or power-of-two scales; see `kernels.quantize.reference`.

All take a matrix (R, C), or one for each expert, (E, R, C), whose results then have E first. None has a gradient.
"""

from functools import partial

import jax

from kernels.choice import choose
from kernels.quantize import reference, xla
from kernels.quantize.xla import decode, encode

__all__ = ["decode", "dequantize", "encode", "quantize", "quantize_blocks", "quantize_both", "quantize_transposed",
           "quantize_weight", "quantize_with", "round_trip"]

FLOATS = ("float32", "bfloat16", "float16")


def _refusal(x, kind: str) -> str | None:
    """Why the Hopper kernels do not take x; None when they do."""
    if kind != "e4m3":
        return f"they write E4M3, not {kind.upper()}"
    if x.dtype.name not in FLOATS:
        return f"they read {', '.join(FLOATS)}, not {x.dtype}"
    if x.size == 0:
        return f"{x.shape} has no entries"
    return None


def _each(function, *arrays):
    """function(*arrays), for each expert where the first is (E, R, C). ValueError for other ranks."""
    if arrays[0].ndim not in (2, 3):
        raise ValueError(f"quantisation: an array of shape {arrays[0].shape}, expected (R, C) or (E, R, C)")
    return function(*arrays) if arrays[0].ndim == 2 else jax.vmap(function)(*arrays)


def _plain(chosen: str):
    return {"xla": xla, "reference": reference}[chosen]


def quantize(x_RC, tile, kind: str = "e4m3", power_of_two: bool = False, implementation: str = "auto"):
    """(values_RC, scales (ceil(C/c), ceil(R/r))) with x ~ values * scale. kind: e4m3, e5m2, e5m6 (as float16)."""
    tile = tuple(tile)
    refusal = _refusal(x_RC, kind) if tile == (1, 128) else f"tiles of {tile}, not (1, 128) or a weight's (128, 128)"
    chosen = choose("quantize", implementation, refusal)
    if chosen == "mosaic":
        from kernels.quantize import mosaic  # here: importing Pallas takes a second that other runs can do without
        return mosaic.quantize(x_RC, power_of_two)
    return _each(partial(_plain(chosen).quantize, tile=tile, kind=kind, power_of_two=power_of_two), x_RC)


def quantize_transposed(x_RC, kind: str = "e4m3", power_of_two: bool = False, implementation: str = "auto"):
    """quantize(x^T, (1, 128)) without making x^T: (values_CR, scales (ceil(R/128), C))."""
    chosen = choose("quantize_transposed", implementation, _refusal(x_RC, kind))
    if chosen == "mosaic":
        from kernels.quantize import mosaic
        return mosaic.quantize_transposed(x_RC, power_of_two)
    return _each(partial(_plain(chosen).quantize_transposed, kind=kind, power_of_two=power_of_two), x_RC)


def quantize_both(x_RC, kind: str = "e4m3", power_of_two: bool = False, implementation: str = "auto"):
    """x in tiles of 128 along its last axis, and its transpose in tiles of 128 along its own: both from x itself.

    Returns (values_RC, scales (ceil(C/128), R), values_CR, scales (ceil(R/128), C)).
    """
    chosen = choose("quantize_both", implementation, _refusal(x_RC, kind))
    if chosen == "mosaic":
        from kernels.quantize import mosaic
        return mosaic.quantize_both(x_RC, power_of_two)
    return _each(partial(_plain(chosen).quantize_both, kind=kind, power_of_two=power_of_two), x_RC)


def quantize_weight(w_RC, kind: str = "e4m3", power_of_two: bool = False, implementation: str = "auto"):
    """w in blocks of 128x128, with its transpose, whose values and scales are the same ones transposed.

    Returns (values_RC, scales (ceil(C/128), ceil(R/128)), values_CR, scales (ceil(R/128), ceil(C/128))).
    """
    chosen = choose("quantize_weight", implementation, _refusal(w_RC, kind))
    if chosen == "mosaic":
        from kernels.quantize import mosaic
        return mosaic.quantize_weight(w_RC, power_of_two)
    return _each(partial(_plain(chosen).quantize_weight, kind=kind, power_of_two=power_of_two), w_RC)


def quantize_blocks(x_RC, tile, first_N, kind: str = "e4m3", power_of_two: bool = False, transposed: bool = False):
    """x in tiles of at most tile[0] rows, which end where an expert's rows do, without padding to tiles: plain XLA.

    x has N blocks of R/N rows, a divisor of tile[0]; first_N names the first block of each block's tile. Returns
    (values, scales) in tiles of (R/N, tile[1]), equal scales for the blocks of one tile. transposed: x^T, in tiles of
    (tile[1], R/N). ValueError for other blocks.
    """
    if x_RC.shape[0] % first_N.size or tile[0] % (x_RC.shape[0] // first_N.size):
        raise ValueError(
            f"quantize_blocks: {first_N.size} blocks of {x_RC.shape[0]} rows do not divide tiles of {tile}")
    return xla.quantize_blocks(x_RC, tile, first_N, kind, power_of_two, transposed)


def _without_kernel(operation: str, implementation: str):
    """The module of an operation that XLA fuses with what uses its result."""
    return _plain(choose(operation, "xla" if implementation == "auto" else implementation, "there is no such kernel"))


def quantize_with(x_RC, scales, tile, kind: str = "e4m3", implementation: str = "auto"):
    """Values under scales that are given (delayed scaling); what is too large for them saturates."""
    module = _without_kernel("quantize_with", implementation)
    return _each(partial(module.quantize_with, tile=tuple(tile), kind=kind), x_RC, scales)


def dequantize(values_RC, scales, tile, implementation: str = "auto"):
    """values * scale in float32."""
    module = _without_kernel("dequantize", implementation)
    return _each(partial(module.dequantize, tile=tuple(tile)), values_RC, scales)


def round_trip(x_RC, tile, kind: str = "e4m3", power_of_two: bool = False):
    """x quantised and dequantised, float32, where nobody keeps the narrow values: cheaper than one after the other."""
    return _each(partial(xla.round_trip, tile=tuple(tile), kind=kind, power_of_two=power_of_two), x_RC)
