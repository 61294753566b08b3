"""Drafting with the multi-token modules, and verification that loses nothing (arXiv 2211.17192, 2302.01318).

Letters beside the house's: `k` drafts, of which `a` are accepted; `W` positions of a window.
"""

import jax
import jax.numpy as jnp

from research.decoding.forward import head, mtp_forward
from research.decoding.sampling import Sampling, draw, likeliest, probabilities

ACCEPTING, EMITTING, DRAFTING = range(3)  # independent streams of a row's key at one position


def keys_at(key_B, position_B, stream: int):
    """A key for each row, stream and position: draws do not depend on how the steps before were cut."""
    return jax.vmap(lambda key, p: jax.random.fold_in(jax.random.fold_in(key, p), stream))(key_B, position_B)


def verify(logits_BTV, drafts_Bk, q_BkV, sampling: Sampling, key_B, position_B):
    """Which drafts stand, and the token after them: (accepted_B, next_B).

    logits_BTV: the model's after the last token and after each draft (T = k + 1). Greedy: a draft stands where it is
    the likeliest. Otherwise draft x stands with probability min(1, p(x) / q(x)), and the token in place of the first
    that falls is drawn from max(p - q, 0), renormalised: tokens are distributed as p. q_BkV: what drafts were drawn
    from, None for greedy ones.
    """
    B, k = drafts_Bk.shape
    if sampling.temperature:
        p_BTV = probabilities(logits_BTV, sampling)
        if k:
            p_Bk = jnp.take_along_axis(p_BTV[:, :k], drafts_Bk[..., None], axis=-1)[..., 0]
            q_Bk = jnp.take_along_axis(q_BkV, drafts_Bk[..., None], axis=-1)[..., 0]
            u_Bk = jax.vmap(lambda key: jax.random.uniform(key, (k,)))(keys_at(key_B, position_B, ACCEPTING))
            stands_Bk = u_Bk * q_Bk < p_Bk
        else:
            stands_Bk, q_BkV = jnp.zeros((B, 0), bool), jnp.zeros((B, 0, p_BTV.shape[-1]))
        accepted_B = jnp.sum(jnp.cumprod(stands_Bk, axis=1), axis=1)
        q_BTV = jnp.concatenate([q_BkV, jnp.zeros_like(p_BTV[:, :1])], axis=1)  # after the last draft: p itself
        p_BV, q_BV = (jnp.take_along_axis(x, accepted_B[:, None, None], axis=1)[:, 0] for x in (p_BTV, q_BTV))
        left_BV = jnp.maximum(p_BV - q_BV, 0)
        rest_B1 = jnp.sum(left_BV, axis=-1, keepdims=True)
        left_BV = jnp.where(rest_B1 > 0, left_BV / jnp.maximum(rest_B1, 1e-30), p_BV)  # p = q up to rounding
        return accepted_B, draw(keys_at(key_B, position_B, EMITTING), left_BV)
    best_BT = likeliest(logits_BTV)
    accepted_B = jnp.sum(jnp.cumprod(drafts_Bk == best_BT[:, :k], axis=1), axis=1)
    return accepted_B, jnp.take_along_axis(best_BT, accepted_B[:, None], axis=1)[:, 0]


def emitted(drafts_Bk, accepted_B, next_B):
    """(B, k + 1): the accepted drafts, then the next token; what follows repeats it and counts for nothing."""
    padded = jnp.pad(drafts_Bk, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(padded.shape[1])[None] < accepted_B[:, None], padded, next_B[:, None])


def draft(model, weights, rows: list, hidden_BWD, known_BW, start_B, last_B, k: int, sampling: Sampling, key_B):
    """k drafts after the newest known token: (drafts_Bk, q_BkV or None, rows).

    hidden_BWD: the main model's hidden states of the window of positions start_B, ..., of which index last_B is the
    newest that is valid; known_BW: the token after each of these positions. Module m reads position i's state of depth
    m - 1 with token i + m, of which the newest are the drafts of the modules before. With more drafts than modules the
    last one is used again on its own output, a position further each time, as serving engines do.
    """
    W, M = hidden_BWD.shape[1], len(rows)
    rows, drafts, qs = list(rows), [], []
    tokens = jnp.pad(known_BW, ((0, 0), (0, M)))  # token start + 1 + j in place j, drafts included
    row_B = jnp.arange(known_BW.shape[0])
    for number in range(k):
        depth = min(number + 1, M)
        if number < M:
            positions = start_B[:, None] + jnp.arange(W)[None]
            after, handed_on, rows[depth - 1] = mtp_forward(
                model, weights, depth, rows[depth - 1], hidden_BWD, tokens[:, depth - 1:depth - 1 + W], positions)
            hidden_BWD = handed_on
            after, newest = after[row_B, last_B][:, None], handed_on[row_B, last_B][:, None]
        else:
            positions = (start_B + last_B + number - M + 1)[:, None]
            after, newest, rows[M - 1] = mtp_forward(
                model, weights, M, rows[M - 1], newest, drafts[-1][:, None], positions)
        logits_BV = head(model, weights, after)[:, 0]
        if sampling.temperature:
            qs.append(probabilities(logits_BV, sampling))
            drafts.append(draw(keys_at(key_B, start_B + last_B + number + 2, DRAFTING), qs[-1]))
        else:
            drafts.append(likeliest(logits_BV))
        if number + 1 < M:
            tokens = tokens.at[row_B, last_B + number + 1].set(drafts[-1])
    return jnp.stack(drafts, axis=1), jnp.stack(qs, axis=1) if qs else None, rows
