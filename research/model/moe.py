"""DeepSeekMoE: a gate that chooses K of E routed experts, beside shared ones (V3 Eq. 12-16, V2 Eq. 20-22)."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.model.balance import balance_loss, count, initial_bias
from research.model.layers import FeedForward, histories, matrix
from research.precision.experts import HISTORIES
from research.precision.products import FEED_FORWARD, Products


def choose_experts(affinity_XE, bias_E, config):
    """The K experts of each token, best first. Returns int32 indices_XK.

    bias_E (None: no bias) takes part in the choice only. With groups, the `topk_group` best of `n_group` groups stay
    (a group counts the sum of its two best biased affinities, V3, or its best one, V2), the others are -inf: 0 would
    beat a negative biased affinity. Ties go to the lower index.
    """
    score_XE = jax.lax.stop_gradient(affinity_XE)
    if bias_E is not None:
        bias_1E = bias_E[None]
        score_XE = score_XE * bias_1E if config.bias_form == "multiplicative" else score_XE + bias_1E
    if config.topk_method != "greedy" and config.n_group > 1:
        score_XGE = score_XE.reshape(score_XE.shape[0], config.n_group, -1)
        best = min(2, score_XGE.shape[-1]) if config.topk_method == "noaux_tc" else 1
        group_XG = jnp.sum(jax.lax.top_k(score_XGE, best)[0], axis=-1)
        kept = jax.lax.top_k(group_XG, config.topk_group)[1]
        kept_XG1 = jnp.any(kept[:, :, None] == jnp.arange(config.n_group)[None, None], axis=1)[..., None]
        score_XE = jnp.where(kept_XG1, score_XGE, -jnp.inf).reshape(score_XE.shape)
    return jax.lax.top_k(score_XE, config.num_experts_per_tok)[1]


def groups_reached(indices_XK, config):
    """In how many of the gate's groups, V3's nodes or V2's devices, a token's experts lie. Returns (...,) int32."""
    group_XK = indices_XK // (config.n_routed_experts // config.n_group)
    reached_XG = jnp.any(jax.nn.one_hot(group_XK, config.n_group, dtype=bool), axis=-2)
    return jnp.sum(reached_XG, axis=-1, dtype=jnp.int32)


def gate_weights(affinity_XE, indices_XK, config):
    """The chosen experts' weights, from unbiased affinities. Returns float32 weights_XK."""
    weights_XK = jnp.take_along_axis(affinity_XE, indices_XK, axis=-1)
    if config.norm_topk_prob:
        weights_XK = weights_XK / (jnp.sum(weights_XK, axis=-1, keepdims=True) + 1e-20)
    return weights_XK * config.routed_scaling_factor


def in_turn(indices_XK, slots_EC):
    """The slot of each of a token's experts: copies take an expert's tokens in turn, by the token's index. slots_EC:
    see `parallel.placement`."""
    copies_E = jnp.sum(slots_EC >= 0, axis=1, dtype=jnp.int32)
    return slots_EC[indices_XK, jnp.arange(indices_XK.shape[0])[:, None] % copies_E[indices_XK]]


@partial(jax.checkpoint, prevent_cse=False)
def in_float32(x_XD, kernel_DE):
    """The gate's product, which keeps x as it is for the backward pass; as the experts' exchange does."""
    return jnp.dot(x_XD.astype(jnp.float32), kernel_DE)


class Gate(nn.Module):
    """Affinities in float32 and the choice of experts; its bias is state (`routing`), not a parameter."""

    config: Any
    products: Products

    @nn.compact
    def __call__(self, x_XD):
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        kernel_DE = self.param("kernel", init, (x_XD.shape[-1], c.n_routed_experts), jnp.float32)
        logits_XE = in_float32(x_XD, kernel_DE)
        affinity_XE = jax.nn.sigmoid(logits_XE) if c.scoring_func == "sigmoid" else jax.nn.softmax(logits_XE)
        bias_E = None
        if c.topk_method == "noaux_tc":
            bias_E = self.variable("routing", "e_score_correction_bias", jnp.full, (c.n_routed_experts,),
                                   initial_bias(c), jnp.float32).value
        indices_XK = self.products.on_own_rows(partial(choose_experts, config=c), affinity_XE, bias_E)
        return affinity_XE, indices_XK, gate_weights(affinity_XE, indices_XK, c)


class MixtureOfExperts(nn.Module):
    """Routed experts plus shared ones. Returns (y_BTD, routing): choices, loads, affinities and the balance loss.

    With `products.redundant_experts` the weights are those of S slots, and `slots` says which ones each expert has.
    """

    config: Any
    products: Products

    @nn.compact
    def __call__(self, x_BTD, valid_BT):
        c = self.config
        B, T, D = x_BTD.shape
        E, F, redundant = c.n_routed_experts, c.moe_intermediate_size, self.products.redundant_experts
        S, x_XD = E + redundant, x_BTD.reshape(B * T, D)
        affinity_XE, indices_XK, weights_XK = Gate(c, self.products, name="gate")(x_XD)
        slots_XK = indices_XK
        if redundant:
            slots_EC = self.variable("routing", "slots", jnp.zeros, (E, 1 + redundant), jnp.int32).value
            slots_XK = in_turn(indices_XK, slots_EC)
        y_XD = self.products.experts(
            x_XD,
            matrix(self, "gate_proj", c.initializer_range, (S, D, F)),
            matrix(self, "up_proj", c.initializer_range, (S, D, F)),
            matrix(self, "down_proj", c.initializer_range, (S, F, D)),
            slots_XK, weights_XK,
            histories(self, self.products, *HISTORIES) if self.products.quantizes(*FEED_FORWARD) else {})
        y_BTD = y_XD.reshape(B, T, D)
        if c.n_shared_experts:
            y_BTD = y_BTD + FeedForward(c.n_shared_experts * F, self.products, c.initializer_range,
                                        name="shared_experts")(x_BTD)
        indices_BTK, affinity_BTE = indices_XK.reshape(B, T, -1), affinity_XE.reshape(B, T, E)
        slots = {"slot_loads": jnp.sum(count(slots_XK.reshape(B, T, -1), valid_BT, S), axis=0)} if redundant else {}
        return y_BTD, slots | {
            "indices": indices_BTK,
            "affinity": affinity_BTE,
            "loads": jnp.sum(count(indices_BTK, valid_BT, E), axis=0),
            "balance_loss": balance_loss(affinity_BTE, indices_BTK, valid_BT, c, self.products.on_own_rows),
        }
