"""R1's second half in small: a teacher that learns by reward, and small students that inherit from it, or do not.

Question: R1 v1 Table 6 in small. Is a small dense model better when it is fine-tuned on what a larger one says, where
the answer is right, than when it is reinforced itself? Arms, all from the same student after the same worked solutions:
`distilled` (the default), `reinforced`, `reference` (answers without reasoning), `unverified` (samples as they came),
`logits` (the teacher's distributions at the kept samples), `on_policy` (the same at the student's own samples). Arms of
one folder share its teacher and its samples:
    python -m research.distill --config=experiments/distill.py --stage=all --workdir=runs/distill
    python -m research.distill --config=experiments/distill.py:reinforced --stage=student --workdir=runs/distill
    python -m research.distill --config=experiments/distill.py:reinforced --stage=evaluate --workdir=runs/distill
    python -m research.distill --config=experiments/distill.py:smoke --stage=all --workdir=runs/distill_smoke
Task: two operations on digits modulo 10, written out one a line; who always says 0 is right in one of six cases. The
teacher is a DeepSeek-V3 of 0.9M parameters, the students are Qwen2-shaped, of 0.2M; after the worked solutions these
have the form and hardly the sums, so that a reward tells them little. 120 reinforced updates cost a student about what
its 600 steps of fine-tuning do, rollouts included, and so do 150 on policy, which no reference reads; the report has
the operations of all, and a teacher's beside them. `problems_320` and `problems_1280` learn as `distilled` does from
the samples of the first so many problems, in folders of their own.
Three seeds of all arms, judged: python -m research.tables --table=r1_distill --scale=cpu
Claims, written before the arms were run: distilled above reinforced (R1 v1 Table 6: 72.6 and 47.0 on AIME 2024), the
teacher above distilled (79.8 and 72.6). Without a figure of the paper: distilled above reference and above unverified,
more samples above fewer.
Result (bf3acdc, seeds 0-2, mean and range of pass@1): teacher 87.4% (80.0-97.3), base 12.4 (11.0-13.2), reinforced 16.2
(14.3-18.0), distilled 20.1 (16.7-21.9): above reinforced by 2.4 to 5.2 points, the paper's direction. reference 18.7
(15.6-21.6), unverified 22.3 (20.9-23.9), logits 29.3 (18.3-35.5), on_policy 16.9 (14.8-19.3): within noise of
distilled. By samples taught: 17.0 (11.0-23.1) with 295 on average, 23.9 (22.2-25.8) with 1,195, 20.1 with 2,996: no
difference of neighbours is beyond noise. results/r1_distill.md. At 7de5567, on an older machine, whose roundings gave
other teachers (62.5%, 36.5-90.9), distilled had 29.5 (27.5-30.9), above reinforced by 10.6 to 17.0 points.
on_policy.student_data_fraction below 1: not yet run.
Cost: the first command 3 minutes on two cores of the newest machine, beside other work; all arms 5 to 7 minutes a seed.
"""

from experiments import base

SWEEP = {name: {"method": name} for name in (
    "reference", "reinforced", "distilled", "unverified", "logits", "on_policy")} | {
    f"problems_{number}": {"sampling.problems": number} for number in (320, 1280)}
SMOKE = {
    "task.count": 200, "task.operations": 1, "task.modulus": 0,
    "cold_start.problems": 120, "cold_start.student_steps": 20,
    "reinforcement.teacher_steps": 4, "reinforcement.student_steps": 4, "reinforcement.questions": 4,
    "reinforcement.group_size": 4, "on_policy.steps": 4,
    "sampling.batch_size": 16, "sampling.problems": 0,
    "evaluation.samples": 2, "evaluation.batch_size": 16,
    "teacher.model.hidden_size": 64, "teacher.model.intermediate_size": 128, "teacher.model.num_hidden_layers": 1,
    "teacher.model.first_k_dense_replace": 0, "teacher.model.moe_intermediate_size": 32,
    "teacher.model.kv_lora_rank": 32, "teacher.model.qk_nope_head_dim": 16, "teacher.model.v_head_dim": 16,
    "student.model.hidden_size": 32, "student.model.intermediate_size": 64, "student.model.head_dim": 8,
    "teacher.training.steps": 100, "student.training.steps": 20,
    "teacher.checkpoint.every_steps": 50, "student.checkpoint.every_steps": 10,
}


def get_config(arms: str = ""):
    c = base.get_distillation_config()
    c.task.update(dict(count=6000, operations=2, modulus=10))
    c.cold_start.update(dict(problems=4000, student_steps=300))
    c.reinforcement.update(dict(teacher_steps=40, student_steps=120, max_tokens=32))
    c.on_policy.steps = 150
    c.sampling.update(dict(problems=3200, samples=2, max_tokens=32))
    c.evaluation.update(dict(samples=4, max_tokens=32, greedy=False))
    c.teacher.model.update(dict(
        hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4, kv_lora_rank=64,
        qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=64))
    c.student.model.update(dict(
        attention="gqa", attention_bias=True, n_routed_experts=0, tie_word_embeddings=True, rope_theta=1e6,
        hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=24))
    c.teacher.training.steps, c.student.training.steps = 800, 600
    for model in (c.teacher, c.student):
        model.model.update(dict(max_position_embeddings=1024, initializer_range=0.02))
        model.mtp.num_nextn_predict_layers = 0
        model.data.sequence_length = 52  # an example a row: attention over many of them would cost more than the rest
        model.training.batch_size = 44
        model.optimizer.update(dict(learning_rate=2e-3 if model is c.teacher else 4e-3, warmup_fraction=0.05))
        model.evaluation.update(dict(batch_size=64, samples=0))
        model.checkpoint.update(dict(every_steps=100, keep_best=0))
    return base.select(c, arms, SWEEP, SMOKE)
