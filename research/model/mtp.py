"""Multi-token prediction: sequential modules that each predict one token further (V3 §2.2, Eq. 21-25)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from research.model.layers import Linear, RMSNorm
from research.precision.products import Products


def shift_left(x_BT, k: int):
    """x at position i + k, zeros past the end."""
    return jnp.pad(x_BT, ((0, 0), (0, k)))[:, k:]


class MultiTokenModule(nn.Module):
    """Depth k: from h^{k-1}_i and the embedding of token i + k to h^k_i, whose head predicts token i + k + 1.

    The released weights read [embedding; hidden] in this order, the reverse of the printed Eq. 21. Positions are those
    of h^{k-1}. Returns the block's output before its norm, after it, and the block's routing.
    """

    config: Any
    products: Products
    block: Any  # the Transformer's block class; with experts where the model has them

    @nn.compact
    def __call__(self, hidden_BTD, embedding_BTD, segments_BT, positions_BT, valid_BT):
        c = self.config
        joined = jnp.concatenate([RMSNorm(c.rms_norm_eps, name="enorm")(embedding_BTD),
                                  RMSNorm(c.rms_norm_eps, name="hnorm")(hidden_BTD)], axis=-1)
        x_BTD = Linear(c.hidden_size, self.products, c.initializer_range, name="eh_proj")(joined)
        x_BTD, routing = self.block(c, self.products, dense=not c.n_routed_experts, name="block")(
            x_BTD, segments_BT, positions_BT, valid_BT)
        return x_BTD, RMSNorm(c.rms_norm_eps, name="norm")(x_BTD), routing
