"""Attention by blocks of queries, each against the keys up to its end: what is masked is skipped, not computed."""

from functools import partial

import jax
import jax.numpy as jnp


def _block(q_BGQTH, k_BGSH, v_BGSJ, query_segments_BT, key_segments_BS, scale: float):
    """One block of queries; its last query sees every key. Q: query heads of a key head."""
    T, S = q_BGQTH.shape[3], k_BGSH.shape[2]
    score_BGQTS = scale * jnp.einsum("BGQTH,BGSH->BGQTS", q_BGQTH, k_BGSH, preferred_element_type=jnp.float32)
    allowed_BTS = (jnp.arange(S)[None] <= jnp.arange(S - T, S)[:, None])[None]
    if query_segments_BT is not None:
        allowed_BTS = allowed_BTS & (query_segments_BT[:, :, None] == key_segments_BS[:, None, :])
    score_BGQTS = jnp.where(allowed_BTS[:, None, None], score_BGQTS, -1e30)  # a query sees at least itself
    e_BGQTS = jnp.exp(score_BGQTS - jax.lax.stop_gradient(jnp.max(score_BGQTS, axis=-1, keepdims=True)))
    o_BGQTJ = jnp.einsum("BGQTS,BGSJ->BGQTJ", e_BGQTS.astype(v_BGSJ.dtype), v_BGSJ,
                         preferred_element_type=jnp.float32)
    return (o_BGQTJ / jnp.sum(e_BGQTS, axis=-1, keepdims=True)).astype(v_BGSJ.dtype)


def default_blocks(T: int) -> int:
    """Blocks of queries: 4, or one for every 512 positions if that is more."""
    return max(4, -(-T // 512))


def attention(q_BTNH, k_BTGH, v_BTGJ, segments_BT, scale: float, recompute: bool, blocks: int | None = None):
    """See `kernels.attention.attention`.

    recompute: one block's scores are alive at a time: the blocks wait for one another, in the backward pass too, which
    computes its block's again. On a CPU, whose compiler drops what makes them wait, it changes nothing. blocks: of
    queries; None: `default_blocks`.
    """
    B, T, N, _ = q_BTNH.shape
    G = k_BTGH.shape[2]
    block = -(-T // (blocks or default_blocks(T)))
    q_BGQTH = q_BTNH.reshape(B, T, G, N // G, -1).transpose(0, 2, 3, 1, 4)
    k_BGTH, v_BGTJ = k_BTGH.transpose(0, 2, 1, 3), v_BTGJ.transpose(0, 2, 1, 3)
    one = partial(_block, scale=scale)
    one = jax.checkpoint(one) if recompute else one
    outputs = []
    for start in range(0, T, block):
        end = min(start + block, T)
        if recompute and outputs:  # all that the next block reads comes after this one, and its gradients before
            q_BGQTH, k_BGTH, v_BGTJ, outputs[-1] = jax.lax.optimization_barrier(
                (q_BGQTH, k_BGTH, v_BGTJ, outputs[-1]))
        query_segments = key_segments = None
        if segments_BT is not None:
            query_segments, key_segments = segments_BT[:, start:end], segments_BT[:, :end]
        outputs.append(one(q_BGQTH[:, :, :, start:end], k_BGTH[:, :, :end], v_BGTJ[:, :, :end],
                           query_segments, key_segments))
    o_BGQTJ = jnp.concatenate(outputs, axis=3)
    return o_BGQTJ.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)
