"""Products over rows sorted by expert, each expert's padded to whole blocks of 128: see `kernels.grouped.reference`."""

import jax.numpy as jnp

from kernels.choice import choose
from kernels.grouped import reference, xla
from kernels.grouped.reference import BLOCK
from kernels.product.operands import check_scales, refusal


def _check_blocks(name: str, rows: int, expert_N) -> None:
    if rows != BLOCK * expert_N.size:
        raise ValueError(f"{name}: {rows} rows with {expert_N.size} experts of blocks, expected one for each {BLOCK}")


def product(a_MC, scales_a, tile_a, b_ESC, scales_b, tile_b, expert_N, *, out_dtype=jnp.float32,
            implementation: str = "auto"):
    """Rows of each block times the matrix of its expert, transposed: y_MS in `out_dtype`, zeros for no expert.

    expert_N: int32 (M/128,), -1 in blocks behind the last one. Values, scales and implementations: see
    `kernels.product.product`; scales_b have E first. ValueError for scales or blocks of another number.
    """
    _check_blocks("grouped product", a_MC.shape[0], expert_N)
    check_scales("grouped product", a_MC, scales_a, tile_a)
    check_scales("grouped product", b_ESC, scales_b, tile_b)
    operands = a_MC, scales_a, tile_a, b_ESC, scales_b, tile_b, expert_N
    chosen = choose("grouped product", implementation, refusal(out_dtype, (a_MC, tile_a), (b_ESC, tile_b)))
    if chosen == "mosaic":
        from kernels.grouped import mosaic  # here: importing Pallas takes a second that other runs can do without
        return mosaic.product(*operands, out_dtype=out_dtype)
    return {"xla": xla, "reference": reference}[chosen].product(*operands).astype(out_dtype)


def weight_gradient(a_RM, scales_a, tile_a, b_SM, scales_b, tile_b, expert_N, n_experts: int, *,
                    implementation: str = "auto"):
    """a b^T over the rows of each expert, which are the contraction here: float32 dw_ERS, zeros for no rows.

    Each expert's blocks lie together; expert_N, values, scales, implementations and errors as in `product`.
    """
    _check_blocks("grouped weight gradient", a_RM.shape[1], expert_N)
    check_scales("grouped weight gradient", a_RM, scales_a, tile_a)
    check_scales("grouped weight gradient", b_SM, scales_b, tile_b)
    operands = a_RM, scales_a, tile_a, b_SM, scales_b, tile_b, expert_N, n_experts
    chosen = choose("grouped weight gradient", implementation, refusal(jnp.float32, (a_RM, tile_a), (b_SM, tile_b)))
    if chosen == "mosaic":
        from kernels.grouped import mosaic
        return mosaic.weight_gradient(*operands)
    return {"xla": xla, "reference": reference}[chosen].weight_gradient(*operands)
