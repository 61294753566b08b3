"""Weight-only quantisation for decoding: matrices in 8 or 4 bits times activations in floats."""

from kernels import cpp
from kernels.choice import Unavailable
from kernels.weight_only import native, reference, xla
from kernels.weight_only.reference import FORMATS, Blocks, Narrow, dequantize, of_blocks, quantize

__all__ = ["FORMATS", "Blocks", "Narrow", "dequantize", "of_blocks", "product", "quantize", "rows"]
IMPLEMENTATIONS = {"native": native.product, "xla": xla.product, "reference": reference.product}


def product(x_XD, w: Narrow, matrix_X=None, implementation: str = "auto"):
    """x_XD times the matrix (D, F), summed in float32. Returns y_XF, float32.

    matrix_X: int32, of a stack (E, D, F) which matrix each row meets. implementation: `native` is C++ for CPUs; `xla`
    runs anywhere and is made for CPUs; `reference` makes the matrix first; `auto` is `native`, or `xla` where that
    cannot run (said once, on a CPU). Unavailable where it was asked for.
    """
    if implementation == "auto":
        implementation = "native" if cpp.available(native.SOURCE) else "xla"
    elif implementation == "native" and (reason := cpp.refusal(native.SOURCE)):
        raise Unavailable("weight_only", implementation, reason)
    return IMPLEMENTATIONS[implementation](x_XD, w, matrix_X)


def rows(w: Narrow, indices):
    """The outputs of these indices (any shape) as rows of D numbers, in `w.dtype`: of an embedding stored as (D, V)."""
    values_GXY, scales_GX = w.values_GFY[:, indices.reshape(-1)], w.scales_GF[:, indices.reshape(-1)]
    w_GXC = reference.numbers(values_GXY, w.format) * scales_GX[:, :, None]
    w_XD = w_GXC.transpose(1, 0, 2).reshape(indices.size, -1)[:, :w.inputs]
    return w_XD.astype(w.dtype).reshape(*indices.shape, w.inputs)
