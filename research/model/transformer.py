"""The Transformer: embedding, dense layers, layers with experts, multi-token modules, one shared head.

Letters of the whole project: B batch, T positions (queries), S positions (keys), D model width, V vocabulary,
N heads, H head width, R latent width, P rotary width, E experts, G groups, K experts chosen a token, F feed-forward
width, M depth of multi-token prediction, L layers.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from kernels.choice import platform
from research.model.attention import ATTENTION
from research.model.layers import FeedForward, RMSNorm
from research.model.moe import MixtureOfExperts
from research.model.mtp import MultiTokenModule, shift_left
from research.precision.matmul import matmul
from research.precision.products import Products


class Block(nn.Module):
    """Pre-norm attention and feed-forward. Returns (x_BTD, routing); routing is None without experts."""

    config: Any
    products: Products
    dense: bool = False

    @nn.compact
    def __call__(self, x_BTD, segments_BT, positions_BT, valid_BT):
        c = self.config

        h_BTD = RMSNorm(c.rms_norm_eps, name="input_layernorm")(x_BTD)
        x_BTD = x_BTD + ATTENTION[c.attention](c, self.products, name="attention")(h_BTD, segments_BT, positions_BT)
        h_BTD = RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x_BTD)
        if self.dense:
            y_BTD = FeedForward(c.intermediate_size, self.products, c.initializer_range, name="mlp")(h_BTD)
            return self.products.placed(x_BTD + y_BTD), None
        y_BTD, routing = MixtureOfExperts(c, self.products, name="mlp")(h_BTD, valid_BT)
        return self.products.placed(x_BTD + y_BTD), routing


class Transformer(nn.Module):
    """A DeepSeek-V2/V3 model, or a dense Qwen2 or Llama 3 (attention `gqa`, no experts).

    config, mtp: the settings' groups of that name, with `config.vocab_size` resolved.
    """

    config: Any
    mtp: Any
    products: Products

    @nn.compact
    def __call__(self, tokens_BT, segments_BT, positions_BT, attend_across: bool = False):
        """Next-token logits and named intermediates.

        segments_BT: document of each position, 0 for padding; attention stays within a document unless
        `attend_across`. Returns (logits_BTV float32, out); out holds `hidden` (after the final norm), `mtp_logits`
        (a tuple, depth k in place k - 1: position i predicts token i + k + 1, where both it and token i + k are of
        one document), `routing` ({`layers`: stacked over L, `mtp`: a tuple}) and `balance_loss`.
        """
        c = self.config
        block = nn.remat(Block, prevent_cse=False) if c.remat == "layer" else Block
        embedding_VD = self.param("embed_tokens", nn.initializers.normal(c.initializer_range),
                                  (c.vocab_size, c.hidden_size), jnp.float32)
        head_DV = embedding_VD.T if c.tie_word_embeddings else self.param(
            "lm_head", nn.initializers.normal(c.initializer_range), (c.hidden_size, c.vocab_size), jnp.float32)
        valid_BT = segments_BT > 0
        attention_segments_BT = None if attend_across else segments_BT
        inputs = (attention_segments_BT, positions_BT, valid_BT)

        def embed(tokens):
            return self.products.placed(embedding_VD[tokens].astype(self.products.dtype))

        def head(hidden_BTD):  # 16 or 32 bits in every recipe; logits in float32
            logits_XV = matmul(hidden_BTD.reshape(-1, c.hidden_size), head_DV, (hidden_BTD.dtype,) * 3)
            return logits_XV.reshape(*hidden_BTD.shape[:2], c.vocab_size)

        def layers(name, length, x_BTD, **kwargs):
            unroll = c.scan_unroll or (length if platform() == "cpu" else 1)
            scan = nn.scan(block, length=length, variable_axes={"params": 0, "routing": 0, "amax": 0},
                           split_rngs={"params": True}, in_axes=nn.broadcast, unroll=unroll)
            return scan(c, self.products, name=name, **kwargs)(x_BTD, *inputs)

        n_dense = c.first_k_dense_replace if c.n_routed_experts else c.num_hidden_layers
        x_BTD = embed(tokens_BT)
        routing = {"layers": None, "mtp": ()}
        if n_dense:
            x_BTD, _ = layers("dense_layers", n_dense, x_BTD, dense=True)
        if n_dense < c.num_hidden_layers:
            x_BTD, routing["layers"] = layers("layers", c.num_hidden_layers - n_dense, x_BTD)
        hidden_BTD = RMSNorm(c.rms_norm_eps, name="norm")(x_BTD)

        mtp_logits, carried = [], hidden_BTD if self.mtp.hidden == "after_norm" else x_BTD
        for k in range(1, self.mtp.num_nextn_predict_layers + 1):
            before, after, block_routing = MultiTokenModule(c, self.products, block, name=f"mtp_{k}")(
                carried, embed(shift_left(tokens_BT, k)), *inputs)
            carried = after if self.mtp.hidden == "after_norm" else before
            mtp_logits.append(head(after))
            routing["mtp"] += (block_routing,)

        balances = [r["balance_loss"].sum() for r in (routing["layers"], *routing["mtp"]) if r is not None]
        return head(hidden_BTD), {
            "hidden": hidden_BTD,
            "mtp_logits": tuple(mtp_logits),
            "routing": routing,
            "balance_loss": sum(balances, jnp.zeros((), jnp.float32)),
        }
