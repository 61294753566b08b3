"""SwiGLU between two quantised products, fused with the quantisation; see `kernels.swiglu.reference`."""

from kernels.choice import choose
from kernels.swiglu import reference, xla

FLOATS = ("float32", "bfloat16", "float16")


def forward(g_RF, u_RF, power_of_two: bool = False, implementation: str = "auto"):
    """silu(g) * u for the next product, and g and u as they are kept: each E4M3 in tiles of 128 along F.

    Returns (a, scales (ceil(F/128), R), kept g, its scales, kept u, its scales). power_of_two: the scales of a.
    """
    chosen = choose("swiglu_forward", implementation, _refusal(g_RF, FLOATS) or _refusal(u_RF, FLOATS))
    if chosen == "mosaic":
        from kernels.swiglu import mosaic  # here: importing Pallas takes a second that other runs can do without
        return mosaic.forward(g_RF, u_RF, power_of_two)
    return {"xla": xla, "reference": reference}[chosen].forward(g_RF, u_RF, power_of_two)


def backward(g_RF, g_scales, u_RF, u_scales, da_RF, weight_R, implementation: str = "auto"):
    """From the kept g and u, the gradient da of the output, and the weight_R that each row of the output is given.

    Returns (dg, its scales, dg^T, its scales), the same of u, ((weight * a)^T, its scales), all E4M3 in tiles of 128
    along the last axis, and the gradient of weight_R, float32.
    """
    refusal = _refusal(da_RF, FLOATS[1:])  # 32-bit gradients need more shared memory than there is
    chosen = choose("swiglu_backward", implementation, refusal)
    operands = g_RF, g_scales, u_RF, u_scales, da_RF, weight_R
    if chosen == "mosaic":
        from kernels.swiglu import mosaic
        return mosaic.backward(*operands)
    return {"xla": xla, "reference": reference}[chosen].backward(*operands)


def _refusal(x, floats) -> str | None:
    """Why the Hopper kernel does not take x; None when it does."""
    if x.dtype.name not in floats:
        return f"it reads {', '.join(floats)}, not {x.dtype}"
    return f"{x.shape} has no entries" if x.size == 0 else None
