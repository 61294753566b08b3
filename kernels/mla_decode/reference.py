"""The definition: the whole score matrix, masked."""

import jax
import jax.numpy as jnp


def mla_decode(q_latent_BTNR, q_rope_BTNP, latent_BSR, rope_key_BSP, lengths_B, scale: float):
    """See `kernels.mla_decode.mla_decode`."""
    T, S = q_latent_BTNR.shape[1], latent_BSR.shape[1]
    q_BTNR, q_BTNP, k_BSR, k_BSP = (
        x.astype(jnp.float32) for x in (q_latent_BTNR, q_rope_BTNP, latent_BSR, rope_key_BSP))
    score_BTNS = scale * (jnp.einsum("BTNR,BSR->BTNS", q_BTNR, k_BSR) + jnp.einsum("BTNP,BSP->BTNS", q_BTNP, k_BSP))
    seen_BTS = jnp.arange(S)[None, None] <= (lengths_B[:, None] + jnp.arange(T)[None])[:, :, None]
    probability_BTNS = jax.nn.softmax(jnp.where(seen_BTS[:, :, None], score_BTNS, -jnp.inf), axis=-1)
    return jnp.einsum("BTNS,BSR->BTNR", probability_BTNS, k_BSR).astype(q_latent_BTNR.dtype)
