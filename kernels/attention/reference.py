"""The definition: the whole score matrix, masked."""

import jax
import jax.numpy as jnp


def attention(q_BTNH, k_BTGH, v_BTGJ, segments_BT, scale: float):
    """See `kernels.attention.attention`."""
    T, N = q_BTNH.shape[1:3]
    k_BTNH = jnp.repeat(k_BTGH, N // k_BTGH.shape[2], axis=2)
    v_BTNJ = jnp.repeat(v_BTGJ, N // v_BTGJ.shape[2], axis=2)
    score_BNTS = scale * jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH, preferred_element_type=jnp.float32)
    allowed_BTS = jnp.tril(jnp.ones((T, T), bool))[None]
    if segments_BT is not None:
        allowed_BTS = allowed_BTS & (segments_BT[:, :, None] == segments_BT[:, None, :])
    probability_BNTS = jax.nn.softmax(jnp.where(allowed_BTS[:, None], score_BNTS, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNJ->BTNJ", probability_BNTS.astype(v_BTGJ.dtype), v_BTNJ)
