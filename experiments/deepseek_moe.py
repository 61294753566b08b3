"""DeepSeekMoE-16B: fine-grained and shared experts behind ordinary attention (DeepSeekMoE §5.1.2, Table 7).

Question: none; the shape is for the account and for comparisons. The paper's 2B and 145B models, and the 1B and 3B ones
of 2408.15664, are not here: the widths of their experts are not printed. Command:
    python -m research.account --config=experiments/deepseek_moe.py
    python -m research.main --config=experiments/deepseek_moe.py:smoke --workdir=runs/deepseek_moe_smoke
Result: 16.376B parameters, 2.829B active (tests/accounting). The full run: not yet run. Its learning rate fell in two
steps (to 31.6% at 80% and 90% of the steps); the house's plateau with a cosine stands here.
"""

from experiments import base


def get_config(arms: str = ""):
    c = base.get_config()
    c.model.update(dict(
        attention="gqa", vocab_size=102400, hidden_size=2048, intermediate_size=10944, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=16, head_dim=128, first_k_dense_replace=1, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408, scoring_func="softmax",
        topk_method="greedy", norm_topk_prob=False, bias_update="none", balance_loss="expert", aux_loss_alpha=0.001))
    c.mtp.num_nextn_predict_layers = 0
    c.precision.recipe = "bfloat16"
    c.data.sequence_length = 4096
    c.training.steps = 106_449  # 2T tokens
    c.training.batch_size = 4608
    c.optimizer.learning_rate = 4.2e-4
    return base.select(c, arms)
