"""DeepSeek-V2, 236B parameters, 21B a token: shape as V2 §3.1.2 and its released config give it.

Question: none; the shape is for the account, for conversion and for comparisons. The arm `yarn` is the model after its
extension to 128K positions. Command:
    python -m research.account --config=experiments/deepseek_v2.py
    python -m research.main --config=experiments/deepseek_v2.py:smoke --workdir=runs/deepseek_v2_smoke
Result: 235.741B parameters, 21.376B active (tests/accounting). The full run: not yet run. V2 lowered its learning rate
in two steps (to 31.6% at 60% and 90% of the tokens) and balanced devices and communication too; the schedule and the
loss here are the house's plateau with a cosine, and the balance of experts alone.
"""

from experiments import base, deepseek_v3

SWEEP = {"yarn": deepseek_v3.YARN | {"model.rope_scaling.mscale": 0.707, "model.rope_scaling.mscale_all_dim": 0.707}}


def get_config(arms: str = ""):
    c = base.get_config()
    c.model.update(dict(
        vocab_size=102400, hidden_size=5120, intermediate_size=12288, num_hidden_layers=60, num_attention_heads=128,
        num_key_value_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, first_k_dense_replace=1, n_routed_experts=160, n_shared_experts=2, num_experts_per_tok=6,
        moe_intermediate_size=1536, scoring_func="softmax", topk_method="group_limited_greedy", n_group=8, topk_group=3,
        norm_topk_prob=False, routed_scaling_factor=16.0, bias_update="none", balance_loss="expert",
        aux_loss_alpha=0.003, max_position_embeddings=4096, initializer_range=0.006, remat="up_projections"))
    c.mtp.num_nextn_predict_layers = 0
    c.precision.recipe = "bfloat16"
    c.data.sequence_length = 4096
    c.training.steps = 214_600  # 8.1T tokens (derived)
    c.training.batch_size = 9216
    c.training.batch_ramp_start = 2304
    c.optimizer.learning_rate = 2.4e-4
    return base.select(c, arms, SWEEP)
