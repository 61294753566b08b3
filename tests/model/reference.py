"""The model in numpy float64, one row and one token at a time: obvious, slow, and sharing nothing with the code."""

import numpy as np

LATENT_EPS = 1e-6  # of the two norms inside latent attention


def rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def speeds(width: int, theta: float):
    return np.array([theta ** (-2 * i / width) for i in range(width // 2)])


def turn_pairs(x, position, speed):
    """Channels (2i, 2i+1) are a complex number, turned by position * speed_i."""
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * position * speed)
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def turn_halves(x, position, speed):
    """Channels (i, i + P/2) are a complex number."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * position * speed)
    return np.concatenate([z.real, z.imag], axis=-1)


def attend(q_TNH, k_TGH, v_TGJ, segments_T, scale):
    """Softmax attention, query by query and head by head, over positions up to the query's of the same segment."""
    T, N, _ = q_TNH.shape
    o_TNJ = np.zeros((T, N, v_TGJ.shape[-1]))
    for t in range(T):
        seen = [s for s in range(t + 1) if segments_T is None or segments_T[s] == segments_T[t]]
        for n in range(N):
            g = n // (N // k_TGH.shape[1])
            probability = softmax(np.array([scale * (q_TNH[t, n] @ k_TGH[s, g]) for s in seen]))
            o_TNJ[t, n] = sum(p * v_TGJ[s, g] for p, s in zip(probability, seen, strict=True))
    return o_TNJ


def latent_attention(x_TD, p, c, segments_T, positions_T):
    T, N, H, P, R = len(x_TD), c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank
    if c.q_lora_rank is None:
        q = x_TD @ p["q_proj"]["kernel"]
    else:
        latent = rms_norm(x_TD @ p["q_a_proj"]["kernel"], p["q_a_layernorm"]["scale"], LATENT_EPS)
        q = latent @ p["q_b_proj"]["kernel"]
    q_TNH = q.reshape(T, N, H + P)
    compressed = x_TD @ p["kv_a_proj_with_mqa"]["kernel"]
    latent_TR = rms_norm(compressed[:, :R], p["kv_a_layernorm"]["scale"], LATENT_EPS)
    kv_TNH = (latent_TR @ p["kv_b_proj"]["kernel"]).reshape(T, N, H + c.v_head_dim)
    speed = speeds(P, c.rope_theta)
    k_TNH = np.zeros((T, N, H + P))
    for t in range(T):
        q_TNH[t, :, H:] = turn_pairs(q_TNH[t, :, H:], positions_T[t], speed)
        k_TNH[t, :, :H] = kv_TNH[t, :, :H]
        k_TNH[t, :, H:] = turn_pairs(compressed[t, R:], positions_T[t], speed)
    o_TNJ = attend(q_TNH, k_TNH, kv_TNH[:, :, H:], segments_T, (H + P) ** -0.5)
    return o_TNJ.reshape(T, -1) @ p["o_proj"]["kernel"]


def grouped_attention(x_TD, p, c, segments_T, positions_T):
    T, H = len(x_TD), c.head_dim

    def heads(name):
        y = x_TD @ p[name]["kernel"] + (p[name]["bias"] if c.attention_bias else 0)
        return y.reshape(T, -1, H)

    q_TNH, k_TGH, v_TGH = heads("q_proj"), heads("k_proj"), heads("v_proj")
    speed = speeds(H, c.rope_theta)
    for t in range(T):
        q_TNH[t] = turn_halves(q_TNH[t], positions_T[t], speed)
        k_TGH[t] = turn_halves(k_TGH[t], positions_T[t], speed)
    return attend(q_TNH, k_TGH, v_TGH, segments_T, H ** -0.5).reshape(T, -1) @ p["o_proj"]["kernel"]


def swiglu(x, gate, up, down):
    return (silu(x @ gate) * (x @ up)) @ down


def feed_forward(x, p):
    return swiglu(x, p["gate_proj"]["kernel"], p["up_proj"]["kernel"], p["down_proj"]["kernel"])


def choose(affinity_E, bias_E, c):
    """The chosen experts of one token, best first, by sorting; ties to the lower index (V3 Eq. 16, V2 §2.2.2)."""
    biased = affinity_E * bias_E if c.bias_form == "multiplicative" else affinity_E + bias_E
    candidates = range(len(biased))
    if c.topk_method != "greedy":
        size = len(biased) // c.n_group
        groups = [list(range(g * size, (g + 1) * size)) for g in range(c.n_group)]
        counted = 2 if c.topk_method == "noaux_tc" else 1
        score = [sum(sorted((biased[e] for e in group), reverse=True)[:counted]) for group in groups]
        kept = sorted(range(c.n_group), key=lambda g: (-score[g], g))[:c.topk_group]
        candidates = [e for g in kept for e in groups[g]]
    return sorted(candidates, key=lambda e: (-biased[e], e))[:c.num_experts_per_tok]


def affinities(x_TD, kernel_DE, c):
    logits = x_TD @ kernel_DE
    return 1 / (1 + np.exp(-logits)) if c.scoring_func == "sigmoid" else softmax(logits)


def mixture(x_TD, p, bias_E, c):
    """Routed and shared experts of one row. Returns (y, chosen experts of each token, affinities)."""
    affinity_TE = affinities(x_TD, p["gate"]["kernel"], c)
    chosen, y_TD = [], np.zeros_like(x_TD)
    for t, x in enumerate(x_TD):
        experts = choose(affinity_TE[t], bias_E, c)
        weights = np.array([affinity_TE[t, e] for e in experts])
        if c.norm_topk_prob:
            weights = weights / np.sum(weights)
        for e, weight in zip(experts, weights, strict=True):
            expert = swiglu(x, p["gate_proj"][e], p["up_proj"][e], p["down_proj"][e])
            y_TD[t] += c.routed_scaling_factor * weight * expert
        chosen.append(experts)
    if c.n_shared_experts:
        y_TD = y_TD + feed_forward(x_TD, p["shared_experts"])
    return y_TD, chosen, affinity_TE


def balance(chosen, affinity_TE, valid_T, c):
    """alpha * sum_i f_i P_i of one row of one layer (V3 Eq. 17-20, V2 Eq. 23-25), by counting."""
    E, K, tokens = c.n_routed_experts, c.num_experts_per_tok, [t for t in range(len(valid_T)) if valid_T[t]]
    f, P = np.zeros(E), np.zeros(E)
    for t in tokens:
        if c.balance_loss == "sequence":
            best = sorted(range(E), key=lambda e: (-affinity_TE[t, e], e))[:K]
            P += affinity_TE[t] / np.sum(affinity_TE[t]) / len(tokens)
        else:
            best = chosen[t]
            P += affinity_TE[t] / len(tokens)
        f[best] += E / (K * len(tokens))
    return c.aux_loss_alpha * float(f @ P)


def layer(stack, number):
    """Layer `number` of stacked parameters."""
    return {k: layer(v, number) if isinstance(v, dict) else v[number] for k, v in stack.items()}


class Row:
    """One row through the model: `logits`, `mtp_logits`, and what its routers did in `loads` and `balance`."""

    def __init__(self, params, routing, tokens_T, segments_T, positions_T, settings, attend_across=False):
        self.c, self.mtp = settings.model, settings.mtp
        self.segments, self.positions, self.valid = segments_T, positions_T, segments_T > 0
        self.attention_segments = None if attend_across else segments_T
        self.loads, self.balance = {}, 0.0
        c, T = self.c, len(tokens_T)
        embed = params["embed_tokens"]
        head = embed.T if c.tie_word_embeddings else params["lm_head"]
        n_dense = c.first_k_dense_replace if c.n_routed_experts else c.num_hidden_layers
        x = embed[tokens_T]
        for number in range(n_dense):
            x = self.block(x, layer(params["dense_layers"], number), None)
        for number in range(c.num_hidden_layers - n_dense):
            bias = self.bias(layer(routing["layers"], number)) if routing else self.neutral()
            x = self.block(x, layer(params["layers"], number), bias, ("layers", number))
        hidden = rms_norm(x, params["norm"]["scale"], c.rms_norm_eps)
        self.logits, self.mtp_logits = hidden @ head, []
        carried = hidden if self.mtp.hidden == "after_norm" else x
        for k in range(1, self.mtp.num_nextn_predict_layers + 1):
            p = params[f"mtp_{k}"]
            bias = None
            if c.n_routed_experts:
                bias = self.bias(routing[f"mtp_{k}"]["block"]) if routing else self.neutral()
            joined = np.zeros((T, 2 * c.hidden_size))
            for i in range(T):
                token = tokens_T[i + k] if i + k < T else 0
                joined[i, :c.hidden_size] = rms_norm(embed[token], p["enorm"]["scale"], c.rms_norm_eps)
                joined[i, c.hidden_size:] = rms_norm(carried[i], p["hnorm"]["scale"], c.rms_norm_eps)
            before = self.block(joined @ p["eh_proj"]["kernel"], p["block"], bias, (f"mtp_{k}", 0))
            after = rms_norm(before, p["norm"]["scale"], c.rms_norm_eps)
            carried = after if self.mtp.hidden == "after_norm" else before
            self.mtp_logits.append(after @ head)

    def bias(self, routing):
        return routing["mlp"]["gate"]["e_score_correction_bias"]

    def neutral(self):
        return np.zeros(self.c.n_routed_experts)

    def block(self, x, p, bias, name=None):
        c = self.c
        attention = latent_attention if c.attention == "mla" else grouped_attention
        h = rms_norm(x, p["input_layernorm"]["scale"], c.rms_norm_eps)
        x = x + attention(h, p["attention"], c, self.attention_segments, self.positions)
        h = rms_norm(x, p["post_attention_layernorm"]["scale"], c.rms_norm_eps)
        if bias is None:
            return x + feed_forward(h, p["mlp"])
        y, chosen, affinity = mixture(h, p["mlp"], bias, c)
        self.loads[name] = np.zeros(c.n_routed_experts)
        for t in np.flatnonzero(self.valid):
            self.loads[name][chosen[t]] += 1
        self.balance += balance(chosen, affinity, self.valid, c)
        return x + y


def rows(params, routing, batch, settings):
    """A `Row` for each row of the batch."""
    fields = batch["tokens_BT"], batch["segments_BT"], batch["positions_BT"]
    return [Row(params, routing, *row, settings, attend_across=not settings.data.mask_documents)
            for row in zip(*fields, strict=True)]


def losses(params, routing, batch, settings, weight):
    """The loss of V3 Eq. 17-25 by counting targets one by one, with its parts: {`loss`, `next_token_loss`, ...}."""
    done = rows(params, routing, batch, settings)
    depths = settings.mtp.num_nextn_predict_layers
    main, deeper, targets = 0.0, np.zeros(depths), 0
    for b, row in enumerate(done):
        token, segment, target = batch["tokens_BT"][b], batch["segments_BT"][b], batch["targets_BT"][b]
        for i in range(len(token)):
            if batch["mask_BT"][b, i]:
                targets += 1
                main -= np.log(softmax(row.logits[i])[target[i]])
            for k in range(1, depths + 1):  # predicts token i + k + 1: target number i + k
                j = i + k
                if j < len(token) and segment[i] == segment[j] and batch["mask_BT"][b, j]:
                    deeper[k - 1] -= np.log(softmax(row.mtp_logits[k - 1][i])[target[j]])
    main, deeper = main / targets, deeper / targets
    balance_loss = sum(row.balance for row in done) / len(done)
    total = main + balance_loss + (weight / depths * np.sum(deeper) if depths else 0)
    return {"loss": total, "next_token_loss": main, "mtp_loss": deeper, "balance_loss": balance_loss}
