"""Products over rows sorted by expert, each expert's padded to whole blocks: see `kernels.grouped.reference`."""

import jax.numpy as jnp

from kernels.choice import choose, gpu_refusal
from kernels.grouped import reference, xla
from kernels.grouped.reference import BLOCK
from kernels.product.operands import check_scales, refusal

SMALL_BLOCK = 32  # rows, in plain XLA: with many experts most rows of blocks of 128 would be padding


def block_rows(implementation: str) -> int:
    """How many rows to pad to: what the Hopper kernels and the reference take, or fewer where plain XLA will run."""
    plain = implementation == "xla" or (implementation == "auto" and gpu_refusal() is not None)
    return SMALL_BLOCK if plain else BLOCK


def _blocks_refusal(name: str, rows: int, expert_N) -> str | None:
    """Why the Hopper kernels do not take these blocks; None when they do. ValueError for blocks that are not whole."""
    if rows % expert_N.size:
        raise ValueError(f"{name}: {rows} rows are not {expert_N.size} blocks, as many as expert_N names")
    if rows != BLOCK * expert_N.size:
        return f"blocks of {rows // expert_N.size} rows, not {BLOCK}"
    return None


def product(a_MC, scales_a, tile_a, b_ESC, scales_b, tile_b, expert_N, *, out_dtype=jnp.float32,
            implementation: str = "auto"):
    """Rows of each block times the matrix of its expert, transposed: y_MS in `out_dtype`, zeros for no expert.

    expert_N: int32, one for each of N blocks of M/N rows, -1 behind the last one. Values, scales and implementations:
    see `kernels.product.product`; scales_b have E first. ValueError for scales or blocks of another number.
    """
    blocks = _blocks_refusal("grouped product", a_MC.shape[0], expert_N)
    check_scales("grouped product", a_MC, scales_a, tile_a)
    check_scales("grouped product", b_ESC, scales_b, tile_b)
    operands = a_MC, scales_a, tile_a, b_ESC, scales_b, tile_b, expert_N
    chosen = choose("grouped product", implementation, blocks or refusal(out_dtype, (a_MC, tile_a), (b_ESC, tile_b)))
    if chosen == "mosaic":
        from kernels.grouped import mosaic  # here: importing Pallas takes a second that other runs can do without
        return mosaic.product(*operands, out_dtype=out_dtype)
    return {"xla": xla, "reference": reference}[chosen].product(*operands).astype(out_dtype)


def weight_gradient(a_RM, scales_a, tile_a, b_SM, scales_b, tile_b, expert_N, n_experts: int, *,
                    implementation: str = "auto"):
    """a b^T over the rows of each expert, which are the contraction here: float32 dw_ERS, zeros for no rows.

    Each expert's blocks lie together; expert_N, values, scales, implementations and errors as in `product`.
    """
    blocks = _blocks_refusal("grouped weight gradient", a_RM.shape[1], expert_N)
    check_scales("grouped weight gradient", a_RM, scales_a, tile_a)
    check_scales("grouped weight gradient", b_SM, scales_b, tile_b)
    operands = a_RM, scales_a, tile_a, b_SM, scales_b, tile_b, expert_N, n_experts
    chosen = choose("grouped weight gradient", implementation,
                    blocks or refusal(jnp.float32, (a_RM, tile_a), (b_SM, tile_b)))
    if chosen == "mosaic":
        from kernels.grouped import mosaic
        return mosaic.weight_gradient(*operands)
    return {"xla": xla, "reference": reference}[chosen].weight_gradient(*operands)
