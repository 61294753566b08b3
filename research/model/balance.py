"""What keeps the experts evenly loaded: the losses, and the routing bias that needs none (arXiv 2408.15664)."""

import jax
import jax.numpy as jnp


def count(indices_BTK, valid_BT, n_experts: int):
    """Number of valid tokens of each row that chose each expert. Returns (B, E) float32."""
    B, T, K = indices_BTK.shape
    row = jnp.arange(B)[:, None, None]
    return jnp.zeros((B, n_experts), jnp.float32).at[row, indices_BTK].add(
        jnp.broadcast_to(valid_BT[..., None], (B, T, K)).astype(jnp.float32))


def here(function, *arrays):
    """As `Products.on_own_rows` on one device."""
    return function(*arrays)


def balance_loss(affinity_BTE, indices_BTK, valid_BT, config, on_own_rows=here):
    """The auxiliary loss of one layer, alpha included; alpha exactly for a uniform router. Returns a float32 scalar.

    sequence: V3 Eq. 17-20, a sequence is one row without its padding: f counts the K best unbiased affinities, P is
        the mean of affinities normalised over experts; the mean over rows of sum_i f_i P_i.
    batch: the same with f and P over all rows (V3 §4.5.3).
    expert: V2 Eq. 23-25: f counts the experts really chosen, P is the mean affinity; a sequence is one row.

    on_own_rows: how each device of a mesh chooses for its own rows.
    """
    if config.balance_loss == "none" or config.aux_loss_alpha == 0:
        return jnp.zeros((), jnp.float32)
    E, K = config.n_routed_experts, config.num_experts_per_tok
    if config.balance_loss == "expert":
        counted_BTK, p_BTE = indices_BTK, affinity_BTE
    else:
        counted_BTK = on_own_rows(lambda x_BTE: jax.lax.top_k(x_BTE, K)[1], jax.lax.stop_gradient(affinity_BTE))
        p_BTE = affinity_BTE / jnp.sum(affinity_BTE, axis=-1, keepdims=True)
    f_BE = count(counted_BTK, valid_BT, E)
    p_BE = jnp.sum(jnp.where(valid_BT[..., None], p_BTE, 0), axis=1)
    tokens_B1 = jnp.sum(valid_BT, axis=1, keepdims=True).astype(jnp.float32)
    if config.balance_loss == "batch":
        f_BE, p_BE, tokens_B1 = (jnp.sum(z, axis=0, keepdims=True) for z in (f_BE, p_BE, tokens_B1))
    filled_B1 = jnp.maximum(tokens_B1, 1)
    loss_B = jnp.sum((E / K) * (f_BE / filled_B1) * (p_BE / filled_B1), axis=-1)
    rows = jnp.maximum(jnp.sum(tokens_B1 > 0), 1)
    return config.aux_loss_alpha * jnp.sum(loss_B) / rows


def initial_bias(config):
    """The neutral value of the routing bias: 0 where it is added, 1 where it multiplies."""
    return 1.0 if config.bias_form == "multiplicative" else 0.0


def update_bias(bias, loads, config, speed):
    """The bias after a step whose whole global batch loaded the experts so; `speed` is gamma, 0 freezes it.

    bias, loads: (..., E), float32. sign: b += gamma * sign(mean load - load) (V3 §2.1.2, 2408.15664 Algorithm 1).
    centred: the sign less its mean over experts (Moonlight App. C). proportional: gamma * (mean - load) / mean
    (2408.15664 Table 3, the error relative to the mean load so that gamma does not depend on the batch).
    """
    mean = jnp.mean(loads, axis=-1, keepdims=True)
    if config.bias_update == "none":
        return bias
    if config.bias_update == "proportional":
        error = (mean - loads) / jnp.maximum(mean, 1)
    else:
        error = jnp.sign(mean - loads)
        if config.bias_update == "centred":
            error = error - jnp.mean(error, axis=-1, keepdims=True)
    return bias + speed * error


def relative_load(loads):
    """Each expert's load over the mean of the last axis (V3 Figure 9): 1 is even, 0 is an expert that nobody chose."""
    return loads / jnp.maximum(jnp.mean(loads, axis=-1, keepdims=True), 1e-9)


def load_violation(loads):
    """MaxVio = (max load - mean load) / mean load over the last axis (2408.15664)."""
    mean = jnp.mean(loads, axis=-1)
    return (jnp.max(loads, axis=-1) - mean) / jnp.maximum(mean, 1e-9)
