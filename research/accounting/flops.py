"""Floating-point operations of training, from the parameters' shapes."""

from research.accounting.parameters import is_routed_expert, shapes


def training_per_token(settings) -> float:
    """FLOPs of one token's forward and backward pass, multi-token modules included, causal attention.

    Six for each weight of a matrix that the token meets (K of E experts; the head once for itself and once for each
    depth), plus 3 * T * (key width + value width) * heads for each attention layer. Recomputation does not count.
    """
    m, depth = settings.model, settings.mtp.num_nextn_predict_layers
    latent = m.qk_nope_head_dim + m.qk_rope_head_dim + m.v_head_dim
    widths = latent if m.attention == "mla" else 2 * m.head_dim
    met = 0.0
    for path, leaf in shapes(settings).items():
        if path == "lm_head" or (path == "embed_tokens" and m.tie_word_embeddings):
            met += leaf.size * (1 + depth)
        elif is_routed_expert(path):
            met += leaf.size * m.num_experts_per_tok / m.n_routed_experts
        elif path.endswith("/kernel"):
            met += leaf.size
    attention = 3 * settings.data.sequence_length * widths * m.num_attention_heads
    return 6 * met + attention * (m.num_hidden_layers + depth)
