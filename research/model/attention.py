"""Multi-head latent attention (V2 §2.1, V3 Eq. 1-11) and grouped-query attention."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from kernels.attention import attention
from research.model import rope
from research.model.layers import Linear, RMSNorm
from research.precision.products import Products

LATENT_NORM_EPS = 1e-6  # the released implementations give rms_norm_eps to every norm but the two of the latents


class MultiHeadLatentAttention(nn.Module):
    """Keys and values from one latent of width R a token, and one rotary key shared by all heads."""

    config: Any  # the settings' `model`
    products: Products

    @nn.compact
    def __call__(self, x_BTD, segments_BT, positions_BT):
        c = self.config
        B, T, D = x_BTD.shape
        N, H, P, J = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        linear = partial(Linear, products=self.products, initializer_range=c.initializer_range)
        norm = partial(RMSNorm, LATENT_NORM_EPS)

        def attend(_, query, latent_BTR, rope_key_BTP, segments_BT, positions_BT):
            """The up-projections and the operator."""
            if c.q_lora_rank is not None:
                query = linear(N * (H + P), name="q_b_proj")(norm(name="q_a_layernorm")(query))
            q_BTNH, q_rope_BTNP = jnp.split(query.reshape(B, T, N, H + P), [H], axis=-1)
            kv = linear(N * (H + J), name="kv_b_proj")(norm(name="kv_a_layernorm")(latent_BTR))
            k_BTNH, v_BTNJ = jnp.split(kv.reshape(B, T, N, H + J), [H], axis=-1)
            cos, sin = rope.rotation(positions_BT, P, c.rope_theta, c.rope_scaling)
            q_rope_BTNP = rope.rotate(q_rope_BTNP, cos, sin, interleaved=True)
            k_rope_BT1P = rope.rotate(rope_key_BTP[:, :, None], cos, sin, interleaved=True)
            q = jnp.concatenate([q_BTNH, q_rope_BTNP], axis=-1)
            k = jnp.concatenate([k_BTNH, jnp.broadcast_to(k_rope_BT1P, (B, T, N, P))], axis=-1)
            return attention(q, k, v_BTNJ, segments_BT, rope.softmax_scale(H + P, c.rope_scaling),
                             c.attention_implementation)

        if c.remat == "up_projections":
            attend = nn.remat(attend, prevent_cse=False)
        query = (linear(N * (H + P), name="q_proj") if c.q_lora_rank is None else
                 linear(c.q_lora_rank, name="q_a_proj"))(x_BTD)
        latent_BTR, rope_key_BTP = jnp.split(linear(c.kv_lora_rank + P, name="kv_a_proj_with_mqa")(x_BTD),
                                             [c.kv_lora_rank], axis=-1)
        o_BTNJ = attend(self, query, latent_BTR, rope_key_BTP, segments_BT, positions_BT)
        return linear(D, name="o_proj")(o_BTNJ.reshape(B, T, N * J))


class GroupedQueryAttention(nn.Module):
    """N query heads over num_key_value_heads keys and values, as in Llama and Qwen2."""

    config: Any
    products: Products

    @nn.compact
    def __call__(self, x_BTD, segments_BT, positions_BT):
        c = self.config
        B, T, D = x_BTD.shape
        N, G, H = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        linear = partial(Linear, products=self.products, initializer_range=c.initializer_range)

        def heads(name, number):
            return linear(number * H, use_bias=c.attention_bias, name=name)(x_BTD).reshape(B, T, number, H)

        q_BTNH, k_BTGH, v_BTGH = heads("q_proj", N), heads("k_proj", G), heads("v_proj", G)
        cos, sin = rope.rotation(positions_BT, H, c.rope_theta, c.rope_scaling)
        q_BTNH = rope.rotate(q_BTNH, cos, sin, interleaved=False)
        k_BTGH = rope.rotate(k_BTGH, cos, sin, interleaved=False)
        o_BTNH = attention(q_BTNH, k_BTGH, v_BTGH, segments_BT, rope.softmax_scale(H, c.rope_scaling),
                           c.attention_implementation)
        return linear(D, name="o_proj")(o_BTNH.reshape(B, T, N * H))


ATTENTION = {"mla": MultiHeadLatentAttention, "gqa": GroupedQueryAttention}
