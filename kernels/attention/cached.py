"""Attention of new tokens over a cache that holds their own keys and values already, rows of different lengths."""

import jax
import jax.numpy as jnp


def attention(q_BTNH, k_BSGH, v_BSGJ, positions_BT, scale: float):
    """softmax(scale * q k^T) v over the cache slots s <= positions_BT. Returns o_BTNJ in q's dtype.

    Slot s of row b holds position s of its sequence; slots beyond a query's position may hold any finite numbers.
    Query head n reads key head n // (N/G). Scores and softmax in float32.
    """
    B, T, N, H = q_BTNH.shape
    S, G = k_BSGH.shape[1:3]
    q_BTGQH = q_BTNH.reshape(B, T, G, N // G, H)
    score_BGQTS = scale * jnp.einsum("BTGQH,BSGH->BGQTS", q_BTGQH, k_BSGH.astype(q_BTNH.dtype),
                                     preferred_element_type=jnp.float32)
    seen_BTS = jnp.arange(S)[None, None] <= positions_BT[..., None]
    p_BGQTS = jax.nn.softmax(jnp.where(seen_BTS[:, None, None], score_BGQTS, -jnp.inf), axis=-1)
    o_BTGQJ = jnp.einsum("BGQTS,BSGJ->BTGQJ", p_BGQTS.astype(q_BTNH.dtype), v_BSGJ.astype(q_BTNH.dtype),
                         preferred_element_type=jnp.float32)
    return o_BTGQJ.reshape(B, T, N, -1).astype(q_BTNH.dtype)
