"""Absorbed attention in plain XLA: by blocks of slots, as far as the longest sequence goes.

The products' operands have the cache's dtype, queries and probabilities too: XLA:CPU would otherwise make a float32
copy of a 16-bit cache. Their sums and the softmax are float32.
"""

import jax.numpy as jnp
from jax import lax

FEW = 8  # queries: their scores one by one, as XLA:CPU transposes the latents for a product of several
BLOCK = 512  # slots; up to two of them are one pass


def mla_decode(q_latent_BTNR, q_rope_BTNP, latent_BSR, rope_key_BSP, lengths_B, scale: float, block: int | None = None):
    """See `kernels.mla_decode.mla_decode`. block: slots of a pass."""
    B, T, N, R = q_latent_BTNR.shape
    S, Q = latent_BSR.shape[1], T * N
    q_BQR = q_latent_BTNR.reshape(B, Q, R).astype(latent_BSR.dtype)
    q_BQP = q_rope_BTNP.reshape(B, Q, -1).astype(rope_key_BSP.dtype)
    last_BQ = jnp.repeat(lengths_B[:, None] + jnp.arange(T)[None], N, axis=1)
    block = block or (S if S <= 2 * BLOCK else BLOCK)

    def scores(q_BQR, latent_BSR):
        if Q <= FEW:
            return jnp.stack([jnp.einsum("BR,BSR->BS", q_BQR[:, q], latent_BSR, preferred_element_type=jnp.float32)
                              for q in range(Q)], axis=1)
        return jnp.einsum("BQR,BSR->BQS", q_BQR, latent_BSR, preferred_element_type=jnp.float32)

    def attend(carry, first, latent_BSR, rope_key_BSP, at_S):
        """Adds slots at positions at_S, those from `first` on: earlier ones were seen before."""
        o_BQR, largest_BQ, total_BQ = carry
        score_BQS = scale * (scores(q_BQR, latent_BSR) + scores(q_BQP, rope_key_BSP))
        seen_BQS = (at_S[None, None] >= first) & (at_S[None, None] <= last_BQ[:, :, None])
        score_BQS = jnp.where(seen_BQS, score_BQS, -jnp.inf)
        larger_BQ = jnp.maximum(largest_BQ, jnp.max(score_BQS, axis=-1))
        factor_BQ, p_BQS = jnp.exp(largest_BQ - larger_BQ), jnp.exp(score_BQS - larger_BQ[:, :, None])
        added_BQR = jnp.einsum("BQS,BSR->BQR", p_BQS.astype(latent_BSR.dtype), latent_BSR,
                               preferred_element_type=jnp.float32)
        return (o_BQR * factor_BQ[:, :, None] + added_BQR, larger_BQ,
                total_BQ * factor_BQ + jnp.sum(p_BQS, axis=-1))

    def step(i, carry):
        start = jnp.minimum(i * block, S - block)  # the last block ends where the cache does
        latent, rope_key = (lax.dynamic_slice_in_dim(x, start, block, axis=1) for x in (latent_BSR, rope_key_BSP))
        return attend(carry, i * block, latent, rope_key, start + jnp.arange(block))

    # no infinity is subtracted from another: slot 0 is in the first block, and seen by every query
    carry = jnp.zeros((B, Q, R)), jnp.full((B, Q), -jnp.inf), jnp.zeros((B, Q))
    if block >= S:
        o_BQR, _, total_BQ = attend(carry, 0, latent_BSR, rope_key_BSP, jnp.arange(S))
    else:
        n_blocks = jnp.minimum(jnp.max(lengths_B) + T - 1, S - 1) // block + 1
        o_BQR, _, total_BQ = lax.fori_loop(0, n_blocks, step, carry)
    return (o_BQR / total_BQ[:, :, None]).reshape(B, T, N, R).astype(q_latent_BTNR.dtype)
