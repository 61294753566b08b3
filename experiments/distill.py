"""R1's second half in small: a teacher that learns by reward, and small students that inherit from it or do not.

Question: R1 v1 Table 6 in small. Command:
    python -m research.distill --config=experiments/distill.py --stage=all --workdir=runs/distill
"""

from experiments import base

SWEEP = {name: {"method": name} for name in ("reference", "reinforced", "distilled", "unverified", "logits")}
SMOKE = {
    "task.count": 200, "task.operations": 1,
    "cold_start.problems": 120, "cold_start.student_steps": 20,
    "reinforcement.teacher_steps": 4, "reinforcement.student_steps": 4, "reinforcement.questions": 4,
    "reinforcement.group_size": 4, "reinforcement.max_tokens": 32, "sampling.samples": 2, "sampling.max_tokens": 32,
    "sampling.batch_size": 16, "evaluation.samples": 2, "evaluation.batch_size": 16, "evaluation.max_tokens": 32,
    "teacher.model.hidden_size": 64, "teacher.model.intermediate_size": 128, "teacher.model.num_hidden_layers": 1,
    "teacher.model.first_k_dense_replace": 0,
    "teacher.model.n_routed_experts": 8, "teacher.model.num_experts_per_tok": 2,
    "teacher.model.moe_intermediate_size": 32, "teacher.model.kv_lora_rank": 32, "teacher.model.qk_nope_head_dim": 16,
    "teacher.model.v_head_dim": 16, "teacher.data.sequence_length": 64, "student.data.sequence_length": 64,
    "teacher.training.steps": 150, "student.training.steps": 20, "teacher.training.batch_size": 8,
    "student.training.batch_size": 8, "student.model.hidden_size": 32, "student.model.intermediate_size": 64,
    "student.model.head_dim": 8, "teacher.checkpoint.every_steps": 50, "student.checkpoint.every_steps": 10}


def get_config(arms: str = ""):
    c = base.get_distillation_config()
    dense = dict(attention="gqa", attention_bias=True, n_routed_experts=0, tie_word_embeddings=True,
                 initializer_range=0.02, rope_theta=1e6, max_position_embeddings=256)
    c.student.model.update(dense | dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, head_dim=16))
    c.student.mtp.num_nextn_predict_layers = 0
    c.teacher.model.update(dict(
        hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, kv_lora_rank=64,
        qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, moe_intermediate_size=64, initializer_range=0.02,
        max_position_embeddings=256))
    for model in (c.teacher, c.student):
        model.data.sequence_length = 128
        model.data.validation_fraction = 0.05
        model.training.steps = 600
        model.training.batch_size = 16
        model.optimizer.learning_rate = 2e-3
        model.optimizer.warmup_fraction = 0.05
        model.evaluation.samples = 0
        model.evaluation.batch_size = 16
        model.checkpoint.every_steps = 100
        model.checkpoint.keep_best = 0
    return base.select(c, arms, SWEEP, SMOKE)
