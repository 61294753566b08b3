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


def depths(config) -> tuple[int, int]:
    """Layers of the two stacks: `dense_layers`, and behind them `layers`, which have experts."""
    dense = config.first_k_dense_replace if config.n_routed_experts else config.num_hidden_layers
    return dense, config.num_hidden_layers - dense


class Transformer(nn.Module):
    """A DeepSeek-V2/V3 model, or a dense Qwen2 or Llama 3 (attention `gqa`, no experts).

    config, mtp: the settings' groups of that name, with `config.vocab_size` resolved. A pipeline's stages call
    `begin`, `main` and `end` one by one; their `inputs` are those of a block.
    """

    config: Any
    mtp: Any
    products: Products

    def setup(self):
        c = self.config
        block = nn.remat(Block, prevent_cse=False) if c.remat == "layer" else Block
        initial = nn.initializers.normal(c.initializer_range)

        def stack(length, **kwargs):
            unroll = c.scan_unroll or (length if platform() == "cpu" else 1)
            scan = nn.scan(block, length=length, variable_axes={"params": 0, "routing": 0, "amax": 0},
                           split_rngs={"params": True}, in_axes=nn.broadcast, unroll=unroll)
            return scan(c, self.products, **kwargs)

        dense, rest = depths(c)
        self.embed_tokens = self.param("embed_tokens", initial, (c.vocab_size, c.hidden_size), jnp.float32)
        if not c.tie_word_embeddings:
            self.lm_head = self.param("lm_head", initial, (c.hidden_size, c.vocab_size), jnp.float32)
        if dense:
            self.dense_layers = stack(dense, dense=True)
        if rest:
            self.layers = stack(rest)
        self.norm = RMSNorm(c.rms_norm_eps)
        for k in range(1, self.mtp.num_nextn_predict_layers + 1):
            setattr(self, f"mtp_{k}", MultiTokenModule(c, self.products, block))

    def __call__(self, tokens_BT, segments_BT, positions_BT, attend_across: bool = False):
        """Next-token logits and named intermediates.

        segments_BT: document of each position, 0 for padding; attention stays within a document unless
        `attend_across`. Returns (logits_BTV float32, out); out holds `hidden` (after the final norm), `mtp_hidden` and
        `mtp_logits` (tuples, depth k in place k - 1: position i predicts token i + k + 1, where both it and token i + k
        are of one document), `routing` ({`layers`: stacked over L, `mtp`: a tuple}) and `balance_loss`.
        """
        inputs = block_inputs(segments_BT, positions_BT, attend_across)
        x_BTD, routing = self.main(self.begin(tokens_BT, inputs), inputs)
        logits_BTV, out = self.end(x_BTD, tokens_BT, inputs)
        return logits_BTV, out | {
            "routing": {"layers": routing, "mtp": out["routing"]},
            "balance_loss": balance_of(routing, *out["routing"]),
        }

    def begin(self, tokens_BT, inputs):
        """x_BTD of the embedding and, in a model with experts, of the dense layers before them."""
        dense, rest = depths(self.config)
        x_BTD = self._embed(tokens_BT)
        return self.dense_layers(x_BTD, *inputs)[0] if dense and rest else x_BTD

    def main(self, x_BTD, inputs):
        """(x_BTD, routing) of the layers with experts, stacked; in a model without, of its layers, and None."""
        return (self.layers if depths(self.config)[1] else self.dense_layers)(x_BTD, *inputs)

    def end(self, x_BTD, tokens_BT, inputs):
        """(logits_BTV, {`hidden`, `mtp_hidden`, `mtp_logits`, `routing`: of the multi-token modules})."""
        hidden_BTD = self.norm(x_BTD)
        mtp_hidden, routing, carried = [], [], hidden_BTD if self.mtp.hidden == "after_norm" else x_BTD
        for k in range(1, self.mtp.num_nextn_predict_layers + 1):
            before, after, block_routing = getattr(self, f"mtp_{k}")(
                carried, self._embed(shift_left(tokens_BT, k)), *inputs)
            carried = after if self.mtp.hidden == "after_norm" else before
            mtp_hidden.append(after)
            routing.append(block_routing)
        return self._head(hidden_BTD), {
            "hidden": hidden_BTD, "mtp_hidden": tuple(mtp_hidden), "mtp_logits": tuple(map(self._head, mtp_hidden)),
            "routing": tuple(routing)}

    def logits_together(self, out):
        """`end`'s logits of all depths, one behind another, (B, (1 + M) T, V), by one product: with one gradient."""
        return self._head(jnp.concatenate([out["hidden"], *out["mtp_hidden"]], axis=1))

    def _embed(self, tokens_BT):
        return self.products.looked_up(self.embed_tokens, tokens_BT)

    def _head(self, hidden_BTD):  # 16 or 32 bits in every recipe; logits in float32
        c = self.config
        head_DV = self.embed_tokens.T if c.tie_word_embeddings else self.lm_head
        logits_XV = matmul(hidden_BTD.reshape(-1, c.hidden_size), head_DV, (hidden_BTD.dtype,) * 3)
        return logits_XV.reshape(*hidden_BTD.shape[:2], c.vocab_size)


def block_inputs(segments_BT, positions_BT, attend_across: bool) -> tuple:
    """What every block is given besides x: the documents that attention keeps apart, positions, what is no padding."""
    return None if attend_across else segments_BT, positions_BT, segments_BT > 0


def balance_of(*routings):
    """The sum of the balance losses of layers, stacked or single; a routing is None where there are no experts."""
    return sum((r["balance_loss"].sum() for r in routings if r is not None), jnp.zeros((), jnp.float32))
