"""FP8 blocks as DeepSeek released them: E4M3 values, and a float32 scale for each 128x128 of them, ragged at the edges.

The value is x / s with s = amax / 448, so that dequantised weights quantise to the same bytes and scales again;
`kernels/quantize/reference.py` is the definition. `weight_scale_inv` multiplies, whatever its name says.
"""

from functools import cache, partial
from pathlib import Path

import ml_dtypes
import numpy as np

from research.errors import RequestError

BLOCK = 128
VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)  # of every code
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK],
                "activation_scheme": "dynamic"}  # what config.json says of it
IGNORED = ("modules_to_not_convert",)  # a tensor's own dtype says it
SCALE_FORMAT = {"scale_fmt": "ue8m0"}  # V3.1: every scale is a power of two; they are in float32 all the same


def check_config(path: Path, raw: dict) -> bool:
    """Whether a config.json announces FP8 blocks. Raises RequestError where it announces anything else."""
    given = raw.get("quantization_config")
    if given is None:
        return False
    if not isinstance(given, dict):
        raise RequestError(f"{path}: quantization_config={given!r} must be an object, or null")
    for key, expected in QUANTIZATION.items():
        if key not in given:
            raise RequestError(f"{path} lacks quantization_config.{key}: it must be {expected!r}")
        if given[key] != expected or type(given[key]) is not type(expected):
            raise RequestError(f"{path}: quantization_config.{key}={given[key]!r} is not supported: it must be "
                               f"{expected!r}")
    known = {key for key, value in SCALE_FORMAT.items() if given.get(key) in (None, value)}
    unknown = sorted(given.keys() - QUANTIZATION.keys() - set(IGNORED) - known)
    if unknown:
        raise RequestError(f"{path}: quantization_config.{unknown[0]}={given[unknown[0]]!r} is not supported")
    return True


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a matrix (R, C), or of a stack (..., R, C) of them."""
    *stack, R, C = shape
    return (*stack, -(-R // BLOCK), -(-C // BLOCK))


def dequantize(values_RC: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """values * scales in float32, of (..., R, C) in E4M3 and (..., ceil(R/128), ceil(C/128))."""
    out_RC = np.take(VALUES, values_RC.view(np.uint8), mode="clip")  # ml_dtypes' own cast takes 10 times as long
    for first in range(0, values_RC.shape[-2], BLOCK):
        rows = out_RC[..., first:first + BLOCK, :]
        rows *= np.repeat(scales[..., first // BLOCK, None, :], BLOCK, axis=-1)[..., :values_RC.shape[-1]]
    return out_RC


def quantize(x_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 values (R, C) and float32 scales (ceil(R/128), ceil(C/128)) of a float32 matrix."""
    values_RC, scales = _compiled()(x_RC)
    return np.asarray(values_RC), np.ascontiguousarray(np.asarray(scales).T)  # kernels lay them out columns first


def powers_of_two(scales: np.ndarray) -> bool:
    """Whether every scale is one."""
    return bool(np.all(np.frexp(scales)[0] == 0.5))


def finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; E4M3 has no infinity."""
    if values.dtype == ml_dtypes.float8_e4m3fn:
        return not values.size or int(np.max(values.view(np.uint8) & 0x7F)) != 0x7F
    return bool(np.isfinite(values).all())


@cache
def _compiled():
    import jax  # here: what quantises nothing compiles nothing

    from kernels.quantize import quantize as kernel

    return jax.jit(partial(kernel, tile=(BLOCK, BLOCK)))
