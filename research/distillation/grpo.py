"""Group relative policy optimisation: the advantage of a sample within its group, and the clipped objective.

Q questions, G samples of each; a batch has B = Q·G rows. Log-probabilities are of the tokens that were drawn.
"""

import jax
import jax.numpy as jnp

FORMS = ("token", "sequence")
_MOST = 20.0  # of a log ratio's size: e^20 is far outside of every clip, and finite in the sum of a batch


def rewards(right, formed):
    """Accuracy and format with equal weight (R1 §2.2.2): float32, of two arrays of truths."""
    return jnp.asarray(right, jnp.float32) + jnp.asarray(formed, jnp.float32)


def group_advantages(reward_QG):
    """(R - mean) / standard deviation within each group, float32 (DeepSeekMath §4.1.2, outcome supervision).

    The deviation is the population's (the papers do not say which). A group of equal rewards teaches nothing: zeros.
    """
    reward_QG = jnp.asarray(reward_QG, jnp.float32)
    deviation_Q1 = jnp.std(reward_QG, axis=1, keepdims=True)
    centred_QG = reward_QG - jnp.mean(reward_QG, axis=1, keepdims=True)
    # not deviation > 0: the mean of equal numbers may round to another one
    differ_Q1 = jnp.max(reward_QG, axis=1, keepdims=True) > jnp.min(reward_QG, axis=1, keepdims=True)
    return jnp.where(differ_Q1, centred_QG / jnp.where(differ_Q1, deviation_Q1, 1), 0)


def loss(logp_BT, old_logp_BT, reference_logp_BT, advantage_B, mask_BT, *, form: str, clip: float, kl_weight: float):
    """What is minimised, the negative of the objective, and metrics; mask_BT: which positions the sample drew.

    form: `token` (DeepSeekMath Eq. 3: a ratio and a divergence at each token, averaged over each sample's own length)
    or `sequence` (R1 Eq. 1-3: one ratio and one divergence of the whole sample, no division by its length).
    clip: ratios are clipped to 1 ± clip. kl_weight: beta, of rho - log rho - 1 with rho = reference / policy
    (k3: unbiased, never negative). Metrics: `kl`, mean `ratio`, and `clipped`, the share of ratios whose gradient the
    clip has taken away, over what the form counts, tokens or samples.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is none of {', '.join(FORMS)}")
    mask_BT = jnp.asarray(mask_BT, bool)
    length_B = jnp.sum(mask_BT, axis=1)
    # masked before exp: what stands at other positions may be anything, and 0 * inf is NaN in the gradient
    change = jnp.where(mask_BT, logp_BT - old_logp_BT, 0)
    back = jnp.where(mask_BT, reference_logp_BT - logp_BT, 0)
    if form == "sequence":
        change, back = jnp.sum(change, axis=1, keepdims=True), jnp.sum(back, axis=1, keepdims=True)
        counted = (length_B > 0)[:, None]
        weight = counted.astype(jnp.float32)
    else:
        counted = mask_BT
        weight = mask_BT / jnp.maximum(length_B, 1)[:, None]
    ratio = jnp.exp(jnp.clip(change, -_MOST, _MOST))
    divergence = jnp.exp(jnp.clip(back, -_MOST, _MOST)) - back - 1
    advantage = advantage_B[:, None]
    free, bounded = ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage
    objective = jnp.minimum(free, bounded) - kl_weight * divergence
    mean = jax.tree.map(lambda x: jnp.sum(jnp.where(counted, x, 0)) / jnp.maximum(jnp.sum(counted), 1),
                        {"kl": divergence, "ratio": ratio, "clipped": bounded < free})
    return -jnp.sum(weight * objective) / mask_BT.shape[0], mean
