"""DeepSeek-V2-Lite, 15.7B parameters, 2.4B a token: shape as V2 Appendix B.1 and its released config give it.

Question: none; see deepseek_v2.py, of which it is the small sibling. The arm `yarn` is the model after its extension to
32K positions. Command:
    python -m research.account --config=experiments/deepseek_v2_lite.py
    python -m research.main --config=experiments/deepseek_v2_lite.py:smoke --workdir=runs/deepseek_v2_lite_smoke
Result: 15.706B parameters, 2.451B active without the embedding (tests/accounting). The full run: not yet run.
"""

from experiments import base, deepseek_v2


def get_config(arms: str = ""):
    c = deepseek_v2.get_config()
    c.model.update(dict(
        hidden_size=2048, intermediate_size=10944, num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16,
        q_lora_rank=None, n_routed_experts=64, moe_intermediate_size=1408, topk_method="greedy", n_group=1,
        topk_group=1, routed_scaling_factor=1.0, aux_loss_alpha=0.001))
    c.training.steps = 302_000  # 5.7T tokens (derived)
    c.training.batch_size = 4608
    c.training.batch_ramp_start = 0
    c.optimizer.learning_rate = 4.2e-4
    return base.select(c, arms, deepseek_v2.SWEEP)
