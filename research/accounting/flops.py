"""Floating-point operations of a token, from the parameters' shapes. A product of matrices counts two for each weight;
what works element by element counts nothing (1-4% of a small model's step, less of a large one's)."""

from kernels.attention.xla import default_blocks
from research.accounting.parameters import is_routed_expert, shapes

CAUSAL, FULL = 0.5, 1.0  # share of the T x T pairs of positions that attention computes


def weights_met(settings) -> dict[str, float]:
    """Weights of matrices that a token is multiplied with, by kind.

    `linear`: attention, feed-forward networks, K of E routed experts; `router`; `head`; `mtp`: those of the multi-token
    modules, their routers and the head once for each depth.
    """
    m, depth = settings.model, settings.mtp.num_nextn_predict_layers
    met = dict.fromkeys(("linear", "router", "head", "mtp"), 0.0)
    for path, leaf in shapes(settings).items():
        if path == "lm_head" or (path == "embed_tokens" and m.tie_word_embeddings):
            met["head"] += leaf.size
            met["mtp"] += leaf.size * depth
            continue
        kind = "mtp" if path.startswith("mtp_") else "router" if path.endswith("/gate/kernel") else "linear"
        if is_routed_expert(path):
            met[kind] += leaf.size * m.num_experts_per_tok / m.n_routed_experts
        elif path.endswith("/kernel"):
            met[kind] += leaf.size
    return met


def attention_per_layer(settings, share: float) -> float:
    """Forward and backward, of the products with T keys and values, of which `share` is computed."""
    m = settings.model
    latent = m.qk_nope_head_dim + m.qk_rope_head_dim + m.v_head_dim
    widths = latent if m.attention == "mla" else 2 * m.head_dim
    return 3 * 2 * settings.data.sequence_length * widths * m.num_attention_heads * share


def training_per_token(settings) -> float:
    """One token's forward and backward pass, multi-token modules included, causal attention; no recomputation."""
    layers = settings.model.num_hidden_layers + settings.mtp.num_nextn_predict_layers
    return 6 * sum(weights_met(settings).values()) + attention_per_layer(settings, CAUSAL) * layers


def by_isca_rule(settings) -> dict[str, float]:
    """Training as 2505.09343 counts it (its rule is not printed; this is the one that gives its digits).

    The main model's linear weights and the head; router, embedding and multi-token modules left out. `training_causal`
    takes the lower triangle of attention, `training_full` the square (§5.1.2).
    """
    met, layers = weights_met(settings), settings.model.num_hidden_layers
    return {f"training_{name}": 6 * (met["linear"] + met["head"]) + attention_per_layer(settings, share) * layers
            for name, share in (("causal", CAUSAL), ("full", FULL))}


def executed(settings, gpu: bool) -> float:
    """What a training step runs: router and multi-token modules too, and attention as it is computed, not as it would
    be at best. Neither recomputation in the backward pass nor the padding of experts' blocks."""
    layers = settings.model.num_hidden_layers + settings.mtp.num_nextn_predict_layers
    attention = attention_per_layer(settings, computed_share(settings, gpu)) * layers
    return 6 * sum(weights_met(settings).values()) + attention


def computed_share(settings, gpu: bool) -> float:
    """Share of the T x T pairs that the config's implementation of attention computes; on a GPU or a CPU."""
    name, T = settings.model.attention_implementation, settings.data.sequence_length
    if name == "reference":
        return FULL
    if name == "cudnn" or (name == "auto" and gpu and not settings.data.mask_documents):
        return CAUSAL  # tiles above the diagonal are skipped
    block = -(-T // default_blocks(T))
    return sum((min(start + block, T) - start) * min(start + block, T) for start in range(0, T, block)) / T**2


def inference(settings) -> dict[str, float]:
    """A token's forward pass without multi-token modules, at the config's length T.

    `prefill_causal` and `prefill_full`: among T tokens, as training counts them; `decode`: one new token over a cache
    of T, latents attended to where they are (absorbed, V2 App. C).
    """
    m, T, met = settings.model, settings.data.sequence_length, weights_met(settings)
    products = 2 * (met["linear"] + met["router"] + met["head"])
    wide = 2 * m.kv_lora_rank + m.qk_rope_head_dim if m.attention == "mla" else 2 * m.head_dim
    found = {f"prefill_{name}": products + attention_per_layer(settings, share) / 3 * m.num_hidden_layers
             for name, share in (("causal", CAUSAL), ("full", FULL))}
    return found | {"decode": products + 2 * T * wide * m.num_attention_heads * m.num_hidden_layers}
