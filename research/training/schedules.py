"""What changes over a run, as functions of the step: learning rate, bias speed, multi-token weight (V3 §4.2)."""

import jax.numpy as jnp


def learning_rate(step, optimizer, steps: int):
    """The rate of step 1, 2, ...: linear warm-up, plateau, cosine, constant, lower constant tail. Float32 scalar.

    Boundaries are fractions of `steps`. The warm-up reaches the plateau at its last step, which it always has.
    """
    o = optimizer
    t = jnp.asarray(step, jnp.float32)
    warmup = max(round(o.warmup_fraction * steps), 1)
    start, end = o.plateau_until * steps, o.cosine_until * steps
    progress = jnp.clip((t - start) / max(end - start, 1e-9), 0, 1)
    factor = o.cosine_final + (1 - o.cosine_final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    factor = jnp.where(t > o.tail_from * steps, o.tail_final, factor)
    return o.learning_rate * jnp.minimum(t / warmup, 1) * factor


def bias_update_speed(step, model, steps: int):
    """gamma of the routing bias: constant, then 0 for the last part."""
    return jnp.where(step > model.bias_update_until * steps, 0.0, model.bias_update_speed)


def mtp_loss_weight(step, mtp, steps: int):
    """lambda: the first value, then the second."""
    return jnp.where(step > mtp.loss_weight_switch * steps, mtp.loss_weight_final, mtp.loss_weight)
