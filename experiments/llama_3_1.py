"""Llama 3.1, dense: 8B (without a name), `70b` (Llama 3.3 has the same shape) and `405b`.

Question: none; shapes for the account and for conversion, as the released configs give them. Command:
    python -m research.account --config=experiments/llama_3_1.py:405b
    python -m research.main --config=experiments/llama_3_1.py:smoke --workdir=runs/llama_3_1_smoke
Result: parameters (tests/accounting) 8.030B, 70.554B, 405.853B. Training: not yet run.
"""

from experiments import base

SWEEP = {
    "70b": {"model.hidden_size": 8192, "model.intermediate_size": 28672, "model.num_hidden_layers": 80,
            "model.num_attention_heads": 64},
    "405b": {"model.hidden_size": 16384, "model.intermediate_size": 53248, "model.num_hidden_layers": 126,
             "model.num_attention_heads": 128},
}


def get_config(arms: str = ""):
    c = base.get_config()
    c.model.update(dict(
        attention="gqa", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, n_routed_experts=0, rope_theta=500000.0,
        rms_norm_eps=1e-5, max_position_embeddings=131072, initializer_range=0.02))
    c.model.rope_scaling.update(dict(type="llama3", factor=8.0, original_max_position_embeddings=8192))
    c.mtp.num_nextn_predict_layers = 0
    c.precision.recipe = "bfloat16"
    c.data.sequence_length = 4096
    return base.select(c, arms, SWEEP)
