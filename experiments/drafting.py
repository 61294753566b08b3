"""Is drafting faster on a CPU, where a model is too large for its caches and its text is as sure as worked solutions?

Question: V3 §5.4.3 has 85 to 90% of second tokens accepted and 1.8 times the tokens a second. Nano's shape, whose
weights lie in a CPU's cache, never gains (`research.bench_decoding --part=drafting`), and two thirds of what it drafts
of Python's library stand at most. Here is a V3 without experts, of the ladder's 300m width and depth (65M parameters),
with one multi-token module, taught distill.py's worked sums and not reinforced. It writes solutions to training
problems one at a time, plain (the default) and with one to three drafts of that module; more than one: used again on
its own output.
Command, the first once:
    python -m research.distill --config=experiments/drafting.py --stage=teacher --workdir=runs/drafting
    python -m research.distill --config=experiments/drafting.py --stage=sample --workdir=runs/drafts_0 \\
        --config.sampling.checkpoint=runs/drafting/cold_start
    python -m research.distill --config=experiments/drafting.py:drafts_1 --stage=sample --workdir=runs/drafts_1 \\
        --config.sampling.checkpoint=runs/drafting/cold_start
The last for `drafts_2` and `drafts_3` as well. Claims, written before it was trained: at least 85% of first drafts
accepted; at least 1.5 times plain decoding with the best number of drafts.
Result (two cores of the newest machine, quiet, two turns, --config.sampling.problems=100, 2,854 tokens each; trained at
bf3acdc with this file, 24 minutes beside other work, to 0.128 bits a byte): plain 119-121 tokens/s; one draft 169-175,
98.9% accepted; two 192-193, 95.5%; three 224-235, 95.5%: 1.42, 1.60 and 1.91 times plain, prompts included. Both
claims hold, for text that is as sure as this.
"""

from experiments import base, distill

SWEEP = {f"drafts_{number}": {"sampling.draft_tokens": number} for number in (1, 2, 3)}


def get_config(arms: str = ""):
    c = distill.get_config()
    c.teacher.model.update(dict(
        hidden_size=672, intermediate_size=1728, num_hidden_layers=11, first_k_dense_replace=11, n_routed_experts=0,
        num_attention_heads=24, kv_lora_rank=256, q_lora_rank=144, qk_nope_head_dim=64, qk_rope_head_dim=32,
        v_head_dim=64))
    c.teacher.mtp.num_nextn_predict_layers = 1
    c.teacher.training.steps = 200
    c.teacher.optimizer.learning_rate = 1e-3
    c.teacher.checkpoint.every_steps = 100
    c.reinforcement.teacher_steps = 0
    c.sampling.update(dict(problems=200, samples=1, batch_size=1))
    return base.select(c, arms, SWEEP, distill.SMOKE | {"reinforcement.teacher_steps": 0, "sampling.problems": 2})
