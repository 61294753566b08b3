"""Products of quantised matrices: y_RS = a_RC b_SC^T, promoted to float32 every 128 of C (V3 §3.3.2)."""

import jax.numpy as jnp

from kernels.choice import choose
from kernels.product import reference, xla
from kernels.product.operands import check_scales, refusal


def product(a_RC, scales_a, tile_a, b_SC, scales_b, tile_b, *, out_dtype=jnp.float32, implementation: str = "auto"):
    """a b^T in `out_dtype`. Values E4M3 or E5M2 (E5M6 too, but on a GPU only in plain XLA), contraction last.

    Scales are float32 (ceil(C/c), ceil(R/r)) for tiles (r, c); see `kernels.quantize.reference`. implementation: see
    `kernels.choice`. ValueError for scales of another shape. Nothing here has a gradient.
    """
    check_scales("product", a_RC, scales_a, tile_a)
    check_scales("product", b_SC, scales_b, tile_b)
    operands = a_RC, scales_a, tile_a, b_SC, scales_b, tile_b
    chosen = choose("product", implementation, refusal(out_dtype, (a_RC, tile_a), (b_SC, tile_b)))
    if chosen == "mosaic":
        from kernels.product import mosaic  # here: importing Pallas takes a second that other runs can do without
        return mosaic.product(*operands, out_dtype=out_dtype)
    return {"xla": xla, "reference": reference}[chosen].product(*operands).astype(out_dtype)
