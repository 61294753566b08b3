"""Multi-head latent attention (V2 §2.1, V3 Eq. 1-11) and grouped-query attention.

With a variable `rows` in the collection `cache`, a module appends what it caches of the new tokens to it and attends to
all of it; token t then stands in the cache slot of its position. `research/decoding/cache.py` says what `rows` is.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from kernels.attention import attention, cached_attention
from kernels.mla_decode import mla_decode
from research.model import rope
from research.model.layers import Kernel, Linear, RMSNorm
from research.precision.products import Products

LATENT_NORM_EPS = 1e-6  # the released implementations give rms_norm_eps to every norm but the two of the latents
ABSORBED_UP_TO = 16  # new tokens: more of them (prefill) expand the cached latents into keys and values


def by_head(x_BTNH, w_NHR):
    """(B, T, N, R), each head with its own matrix. Heads lead: XLA:CPU computes other orders ten times as slowly."""
    B, T, N, H = x_BTNH.shape
    y_NXR = jnp.einsum("NXH,NHR->NXR", x_BTNH.reshape(B * T, N, H).transpose(1, 0, 2), w_NHR)
    return y_NXR.transpose(1, 0, 2).reshape(B, T, N, -1)


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
        scale = rope.softmax_scale(H + P, c.rope_scaling)

        def queries(query, positions_BT):
            """(B, T, N, H) and the rotated (B, T, N, P), from the query's latent where there is one."""
            if c.q_lora_rank is not None:
                query = linear(N * (H + P), name="q_b_proj")(norm(name="q_a_layernorm")(query))
            q_BTNH, q_rope_BTNP = jnp.split(query.reshape(B, T, N, H + P), [H], axis=-1)
            return q_BTNH, rotate(q_rope_BTNP, positions_BT)

        def rotate(x_BTNP, positions_BT):
            return rope.rotate(x_BTNP, *rope.rotation(positions_BT, P, c.rope_theta, c.rope_scaling), interleaved=True)

        def attend(_, query, latent_BTR, rope_key_BTP, segments_BT, positions_BT):
            """The up-projections and the operator."""
            q_BTNH, q_rope_BTNP = queries(query, positions_BT)
            kv = linear(N * (H + J), name="kv_b_proj")(norm(name="kv_a_layernorm")(latent_BTR))
            k_BTNH, v_BTNJ = jnp.split(kv.reshape(B, T, N, H + J), [H], axis=-1)
            k_rope_BT1P = rotate(rope_key_BTP[:, :, None], positions_BT)
            q = jnp.concatenate([q_BTNH, q_rope_BTNP], axis=-1)
            k = jnp.concatenate([k_BTNH, jnp.broadcast_to(k_rope_BT1P, (B, T, N, P))], axis=-1)
            return attention(q, k, v_BTNJ, segments_BT, scale, c.attention_implementation)

        def attend_cached(query, latent_BTR, rope_key_BTP):
            """The same over the cache: in the space of latents (V2 App. C), or of keys and values for many tokens."""
            q_BTNH, q_rope_BTNP = queries(query, positions_BT)
            rows = self.get_variable("cache", "rows").append(
                positions_BT, latent=norm(name="kv_a_layernorm")(latent_BTR),
                rope_key=rotate(rope_key_BTP[:, :, None], positions_BT)[:, :, 0])
            self.put_variable("cache", "rows", rows)
            latent_BSR, rope_key_BSP = rows.read("latent"), rows.read("rope_key")
            k_NHR = Kernel((N, H, c.kv_lora_rank), c.initializer_range, name="k_b_proj")()
            v_NRJ = Kernel((N, c.kv_lora_rank, J), c.initializer_range, name="v_b_proj")()
            if T <= ABSORBED_UP_TO:
                q_latent_BTNR = by_head(q_BTNH, k_NHR)
                o_BTNR = self.products.over_heads(partial(mla_decode, scale=scale), q_latent_BTNR, q_rope_BTNP,
                                                  latent_BSR, rope_key_BSP, positions_BT[:, 0])
                return by_head(o_BTNR, v_NRJ)
            latent_BSR = latent_BSR.astype(x_BTD.dtype)
            k_BSNH = jnp.einsum("BSR,NHR->BSNH", latent_BSR, k_NHR)
            k_rope_BSNP = jnp.broadcast_to(rope_key_BSP[:, :, None], (*k_BSNH.shape[:3], P)).astype(x_BTD.dtype)
            return self.products.over_heads(partial(cached_attention, scale=scale),
                                            jnp.concatenate([q_BTNH, q_rope_BTNP], axis=-1),
                                            jnp.concatenate([k_BSNH, k_rope_BSNP], axis=-1),
                                            jnp.einsum("BSR,NRJ->BSNJ", latent_BSR, v_NRJ), positions_BT)

        if c.remat == "up_projections":
            attend = nn.remat(attend, prevent_cse=False)
        query = (linear(N * (H + P), name="q_proj") if c.q_lora_rank is None else
                 linear(c.q_lora_rank, name="q_a_proj"))(x_BTD)
        latent_BTR, rope_key_BTP = jnp.split(linear(c.kv_lora_rank + P, name="kv_a_proj_with_mqa")(x_BTD),
                                             [c.kv_lora_rank], axis=-1)
        if self.has_variable("cache", "rows"):
            o_BTNJ = attend_cached(query, latent_BTR, rope_key_BTP)
        else:
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
        scale = rope.softmax_scale(H, c.rope_scaling)
        if self.has_variable("cache", "rows"):
            rows = self.get_variable("cache", "rows").append(positions_BT, key=k_BTGH, value=v_BTGH)
            self.put_variable("cache", "rows", rows)
            o_BTNH = self.products.over_heads(partial(cached_attention, scale=scale), q_BTNH, rows.read("key"),
                                              rows.read("value"), positions_BT)
        else:
            o_BTNH = attention(q_BTNH, k_BTGH, v_BTGH, segments_BT, scale, c.attention_implementation)
        return linear(D, name="o_proj")(o_BTNH.reshape(B, T, N * H))


ATTENTION = {"mla": MultiHeadLatentAttention, "gqa": GroupedQueryAttention}
