"""Qwen2.5, dense: the models that DeepSeek-R1 was distilled into, and the 72B that it is compared with.

Question: none; shapes for the account and for conversion, as the released configs give them. Arms: `math_1_5b` and
`math_7b` (Qwen2.5-Math), `14b`, `32b`, `72b`; without a name 1.5B. Command:
    python -m research.account --config=experiments/qwen2_5.py:32b
    python -m research.main --config=experiments/qwen2_5.py:smoke --workdir=runs/qwen2_5_smoke
Result: parameters (tests/accounting) 1.544B, 7.616B, 14.770B, 32.764B, 72.706B. Training: not yet run.
"""

from experiments import base

WIDE = {"model.vocab_size": 152064, "model.tie_word_embeddings": False}  # from 7B on
SWEEP = {
    "math_1_5b": {"model.rope_theta": 1e4, "model.max_position_embeddings": 4096},
    "math_7b": WIDE | {
        "model.hidden_size": 3584, "model.intermediate_size": 18944, "model.num_attention_heads": 28,
        "model.num_key_value_heads": 4, "model.rope_theta": 1e4, "model.max_position_embeddings": 4096},
    "14b": WIDE | {
        "model.hidden_size": 5120, "model.intermediate_size": 13824, "model.num_hidden_layers": 48,
        "model.num_attention_heads": 40, "model.num_key_value_heads": 8, "model.rms_norm_eps": 1e-5},
    "32b": WIDE | {
        "model.hidden_size": 5120, "model.intermediate_size": 27648, "model.num_hidden_layers": 64,
        "model.num_attention_heads": 40, "model.num_key_value_heads": 8, "model.rms_norm_eps": 1e-5},
    "72b": WIDE | {
        "model.hidden_size": 8192, "model.intermediate_size": 29568, "model.num_hidden_layers": 80,
        "model.num_attention_heads": 64, "model.num_key_value_heads": 8, "model.rms_norm_eps": 1e-5},
}


def get_config(arms: str = ""):
    c = base.get_config()
    c.model.update(dict(
        attention="gqa", attention_bias=True, vocab_size=151936, hidden_size=1536, intermediate_size=8960,
        num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, head_dim=128, n_routed_experts=0,
        rope_theta=1e6, max_position_embeddings=131072, tie_word_embeddings=True, initializer_range=0.02))
    c.mtp.num_nextn_predict_layers = 0
    c.precision.recipe = "bfloat16"
    c.data.sequence_length = 4096
    return base.select(c, arms, SWEEP)
