"""Weight-only quantisation for decoding: matrices in 8 or 4 bits times activations in floats."""

from kernels import cpp
from kernels.choice import Unavailable
from kernels.weight_only import native, reference, xla
from kernels.weight_only.reference import Narrow, dequantize, quantize

__all__ = ["BITS", "Narrow", "dequantize", "product", "quantize", "rows"]
BITS = {"int8": 8, "int4": 4}
IMPLEMENTATIONS = {"native": native.product, "xla": xla.product, "reference": reference.product}


def product(x_XD, w: Narrow, implementation: str = "auto"):
    """x_XD times the matrix (D, F), summed in float32. Returns y_XF, float32.

    implementation: `native` is C++ for CPUs; `xla` runs anywhere and is made for CPUs; `reference` makes the matrix
    first; `auto` is `native`, or `xla` where that cannot run (said once, on a CPU). Unavailable where it was asked for.
    """
    if implementation == "auto":
        implementation = "native" if cpp.available(native.SOURCE) else "xla"
    elif implementation == "native" and (reason := cpp.refusal(native.SOURCE)):
        raise Unavailable("weight_only", implementation, reason)
    return IMPLEMENTATIONS[implementation](x_XD, w)


def rows(w: Narrow, indices):
    """The outputs of these indices (any shape) as rows of D numbers, in `w.dtype`: of an embedding stored as (D, V)."""
    values_GXY, scales_GX = w.values_GFY[:, indices.reshape(-1)], w.scales_GF[:, indices.reshape(-1)]
    w_GXC = reference.unpacked(values_GXY, w.bits).astype("float32") * scales_GX[:, :, None]
    w_XD = w_GXC.transpose(1, 0, 2).reshape(indices.size, -1)[:, :w.inputs]
    return w_XD.astype(w.dtype).reshape(*indices.shape, w.inputs)
