"""The routed experts of a layer: tokens to their experts and back (V3 Eq. 12)."""

from kernels.experts import few, narrow, reference, xla
from kernels.weight_only import Narrow

IMPLEMENTATIONS = ("auto", "xla", "inference", "reference")


def experts(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK, *,
            formats=("float32", "float32", "float32"), implementation="auto", pairs: tuple[int, int] | None = None):
    """Sum over each token's chosen experts of weight * SwiGLU expert. Returns y_XD.

    indices_XK: int32, distinct within a token. formats: operand dtypes of the forward, input-gradient and
    weight-gradient products (all accumulate in float32). implementation: `auto` is `xla`, which runs anywhere;
    `inference` has no gradient and takes fewer pairs than experts one by one; `reference` computes all experts for all
    tokens; stacks of `Narrow` have their own, on one device. pairs: where padding names no expert by the index E, about
    how many pairs name one, and the most that can.
    """
    if isinstance(gate_EDF, Narrow):
        return narrow.experts(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK)
    if implementation == "inference" and pairs is None and indices_XK.size <= gate_EDF.shape[0]:
        return few.experts(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK)
    if implementation == "reference":
        return reference.experts(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK)
    expected, most = pairs or (indices_XK.size, None)
    capacity, tiles = xla.capacity_and_tiles(expected, gate_EDF.shape[0])
    return xla.experts(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK, capacity, tiles, formats, most)
