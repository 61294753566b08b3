"""AdamW as V3 trains with it, or Muon, with rules for weight decay that must cover every parameter."""

import re

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from research.training.schedules import learning_rate
from research.tree import map_paths

DECAY_RULES = (  # the first that matches a parameter's path decides; none is an error
    (r"/scale$", False),  # norm gains
    (r"/bias$", False),
    (r"/kernel$", True),
    (r"/mlp/(gate|up|down)_proj$", True),  # experts
    (r"^(embed_tokens|lm_head)$", True),
)
ADAM_UNDER_MUON = r"(^(embed_tokens|lm_head)|/scale|/bias|/gate/kernel)$"  # what is no hidden matrix


def decay_mask(params):
    """True where weight decay applies. Raises ValueError for a parameter that no rule covers."""
    def decays(path, _):
        for pattern, decay in DECAY_RULES:
            if re.search(pattern, path):
                return decay
        raise ValueError(f"no rule of DECAY_RULES covers the parameter {path}")

    return map_paths(decays, params)


def stored_in(inner: optax.GradientTransformation, dtype) -> optax.GradientTransformation:
    """`inner` with its float state stored in `dtype` and used in float32 (V3 §3.3.2: moments in bfloat16)."""
    def cast(state, to):
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def init(params):
        return cast(inner.init(params), dtype)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """As optax's of this name, by one scalar factor: XLA writes no clipped copy of the gradients for the moments."""
    def update(updates, _):
        factor = jnp.minimum(1, largest / optax.tree.norm(updates))
        return jax.tree.map(lambda u: u * factor, updates)

    return optax.stateless(update)


def make_optimizer(settings) -> optax.GradientTransformation:
    """From gradients to updates: clip by global norm, moments, decoupled decay, learning rate.

    The state's own count is the number of steps done; the rate is that of the step about to be done.
    """
    o, steps = settings.optimizer, settings.training.steps

    def rate(count):
        return learning_rate(count + 1, o, steps)

    moment_dtype = jnp.dtype(o.moment_dtype)
    direction = stored_in(optax.scale_by_adam(o.beta1, o.beta2, o.epsilon), moment_dtype)
    if o.name == "muon":
        direction = optax.partition({"adam": direction, "muon": _orthogonal(moment_dtype)}, _muon_labels)
    clip = [clip_by_global_norm(o.clip_norm)] if o.clip_norm else []
    return optax.chain(*clip, direction, optax.add_decayed_weights(o.weight_decay, decay_mask),
                       optax.scale_by_learning_rate(rate))


def _muon_labels(params):
    return map_paths(lambda path, _: "adam" if re.search(ADAM_UNDER_MUON, path) else "muon", params)


def _orthogonal(moment_dtype) -> optax.GradientTransformation:
    """Muon's direction for stacks of matrices (..., in, out), each orthogonalised by itself.

    Scaled by 0.2 * sqrt(the larger side): the size of AdamW's update, so that both share a learning rate (Moonlight
    Eq. 4).
    """
    def matrices(params):
        return jax.tree.map(lambda x: MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), params)

    resize = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u * 0.2 * max(u.shape[-2:]) ** 0.5, updates))
    return optax.chain(scale_by_muon(mu_dtype=moment_dtype, weight_dimension_numbers=matrices), resize)
