"""A ladder of sizes in DeepSeek-V3's proportions: what holds on one rung is tried on the next.

Question: how do bits per byte, MaxVio and multi-token accuracy go with size, at 20 tokens an active parameter?
Command, for each arm (10m is the one without a name):
    python -m research.main --config=experiments/ladder.py:30m --workdir=runs/ladder/30m \\
        --config.data.source=files --config.data.files='corpus/*.jsonl.gz'
    (the default source, Python's own library, is some millions of tokens: a rung would read it over and over)
Cost, by shapes alone (tests/test_experiments.py computes it again); at the 110 GFLOP/s that nano reaches on two cores
10m would take 21 hours, the others ask for GPUs:

    arm   parameters    active  steps   tokens    FLOPs
    10m       10.66M     5.84M   3563   0.117B  8.3e+15
    30m       27.75M    11.50M   3508   0.230B  3.2e+16
    100m      97.79M    30.36M   4632   0.607B  2.1e+17
    300m     293.39M    76.63M   5846   1.532B  1.2e+18
    1b      1012.04M   231.70M   8838   4.634B  9.8e+18

Result: not yet run.
"""

from experiments import base, deepseek_v3

TOKENS_PER_PARAMETER = 20  # active ones, embedding and head included

SWEEP = {  # width, depth and head width make a rung; its batch and learning rate are guesses, to be tuned
    "10m": {},
    "30m": {"model.hidden_size": 336, "model.num_hidden_layers": 4, "training.batch_size": 32,
            "optimizer.learning_rate": 2.5e-3},
    "100m": {"model.hidden_size": 448, "model.num_hidden_layers": 8, "model.qk_nope_head_dim": 64,
             "training.batch_size": 64, "optimizer.learning_rate": 2e-3},
    "300m": {"model.hidden_size": 672, "model.num_hidden_layers": 11, "model.qk_nope_head_dim": 64,
             "training.batch_size": 128, "optimizer.learning_rate": 1.5e-3},
    "1b": {"model.hidden_size": 1008, "model.num_hidden_layers": 17, "model.qk_nope_head_dim": 64,
           "training.batch_size": 256, "optimizer.learning_rate": 1e-3},
}


def get_config(arms: str = ""):
    c = deepseek_v3.get_config()
    m, d, t = c.model, c.data, c.training
    m.update(dict(hidden_size=224, num_hidden_layers=3, first_k_dense_replace=1, qk_nope_head_dim=32,
                  n_routed_experts=64, initializer_range=0.02))
    d.update(dict(bpe_vocab_size=8192, sequence_length=2048))
    t.update(dict(batch_size=16, batch_ramp_start=0, ema_decay=0.0))
    c.precision.recipe = "bfloat16"
    c.optimizer.learning_rate = 3e-3
    c.evaluation.every_steps = 500
    c.checkpoint.every_steps = 500

    width, head = m.get_ref("hidden_size"), m.get_ref("qk_nope_head_dim")
    m.vocab_size = d.get_ref("bpe_vocab_size") * 1
    m.intermediate_size = width * 18 // 7  # V3: 18432 of 7168
    m.moe_intermediate_size = width * 2 // 7  # 2048
    m.q_lora_rank = width * 3 // 14  # 1536
    m.num_attention_heads = width * 16 // (7 * head)  # 128 heads of 128
    m.num_key_value_heads = m.get_ref("num_attention_heads") * 1
    m.v_head_dim = head * 1
    m.qk_rope_head_dim = head // 2
    m.kv_lora_rank = head * 4  # V2 §3.1.2: all of DeepSeek's models keep these two ratios
    t.steps = active_parameters(m) * TOKENS_PER_PARAMETER // (t.get_ref("batch_size") * d.get_ref("sequence_length"))
    return base.select(c, arms, SWEEP)


def active_parameters(model):
    """Those of one token, without the multi-token modules, as a reference that follows every field it is made of."""
    D, L, N, R, Q, F, E, K = (model.get_ref(name) for name in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank", "q_lora_rank",
        "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok"))
    H, P, J = (model.get_ref(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    dense = model.get_ref("first_k_dense_replace")
    attention = D * Q + Q + Q * N * (H + P) + D * (R + P) + R + R * N * (H + J) + N * J * D
    experts = 3 * D * F * (K + model.get_ref("n_shared_experts")) + E * D + E
    layers = L * (attention + 2 * D) + dense * (3 * D * model.get_ref("intermediate_size")) + (L - dense) * experts
    return layers + 2 * model.get_ref("vocab_size") * D + D
