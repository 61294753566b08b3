"""Continuing text, one token after another, by the whole forward pass each time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


@partial(jax.jit, static_argnames=("model", "new_tokens"))
def _continue(model, variables, tokens_BT, start, key, temperature, new_tokens: int):
    segments_BT = jnp.ones_like(tokens_BT)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)

    def append(i, tokens_BT):
        logits_BTV, _ = model.apply(variables, tokens_BT, segments_BT, positions_BT)
        logits_BV = jax.lax.dynamic_index_in_dim(logits_BTV, start + i - 1, axis=1, keepdims=False)
        sampled_B = jax.random.categorical(jax.random.fold_in(key, i), logits_BV / jnp.maximum(temperature, 1e-6))
        chosen_B = jnp.where(temperature > 0, sampled_B, jnp.argmax(logits_BV, axis=-1)).astype(tokens_BT.dtype)
        return jax.lax.dynamic_update_index_in_dim(tokens_BT, chosen_B, start + i, axis=1)

    return jax.lax.fori_loop(0, new_tokens, append, tokens_BT)


def continue_tokens(model, variables, prompts_BT: np.ndarray, new_tokens: int, temperature: float, seed: int):
    """`new_tokens` more tokens for each prompt (all of one length). Returns int32 (B, new_tokens).

    temperature 0 takes the likeliest token. variables: {`params`, `routing`}.
    """
    B, T = prompts_BT.shape
    buffer = np.zeros((B, T + new_tokens), np.int32)
    buffer[:, :T] = prompts_BT
    tokens = _continue(model, variables, buffer, T, jax.random.key(seed), jnp.float32(temperature), new_tokens)
    return np.asarray(tokens)[:, T:]
