"""DeepSeek-V3, 671B parameters, 37B a token: shape and pre-training as V3 §4.2 and its released config give them.

Question: none; this is the recipe. The arm `yarn` is the model after its extension to 128K positions (R1's shape).
Command (its cost; its shape in small, seconds of training):
    python -m research.account --config=experiments/deepseek_v3.py
    python -m research.main --config=experiments/deepseek_v3.py:smoke --workdir=runs/deepseek_v3_smoke
Result: 671,026,419,200 parameters without the multi-token module, 37.55B active (tests/accounting). The full run: not
yet run.
"""

from experiments import base

YARN = {"model.rope_scaling.type": "yarn", "model.rope_scaling.factor": 40.0, "model.max_position_embeddings": 163840}
SWEEP = {"yarn": YARN}


def get_config(arms: str = ""):
    c = base.get_config()
    c.model.update(dict(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61, num_attention_heads=128,
        num_key_value_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, first_k_dense_replace=3, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8,
        moe_intermediate_size=2048, n_group=8, topk_group=4, routed_scaling_factor=2.5, max_position_embeddings=4096,
        initializer_range=0.006, remat="up_projections"))
    c.precision.recipe = "fp8_deepseek"
    c.data.sequence_length = 4096
    c.data.fim_rate = 0.1
    c.data.mask_documents = False
    c.training.steps = 235_000  # 14.8T tokens (derived: the ramp's shape is not printed)
    c.training.batch_size = 15360
    c.training.batch_ramp_start = 3072
    c.training.ema_decay = 0.999  # the report keeps an average and does not print its decay
    c.optimizer.moment_dtype = "bfloat16"
    return base.select(c, arms, SWEEP)
