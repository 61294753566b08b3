"""DeepSeek-R1-Distill-Qwen above 1.5B (r1_distill_qwen_1_5b.py): 7B (without a name), `14b`, `32b`.

Question: none yet; shapes of their bases, Qwen2.5-Math-7B and Qwen2.5, fine-tuned as R1 (v2 B.4.3) gives it. Command:
    python -m research.account --config=experiments/r1_distill_qwen.py:32b
    python -m research.main --config=experiments/r1_distill_qwen.py:smoke --workdir=runs/r1_distill_smoke
By the account (--gpu=H200) one H200 of 141 GB holds none of them (204, 342 and 721 GB). Of several, with the 64 rows
shared out, a device holds 101 GB for 7B (--config.mesh.fsdp=4 --config.training.accumulation_steps=16), 110 for `14b`
(8 and 8) and 119 for `32b` (16 and 4).
Result: 7.616B, 14.770B and 32.764B parameters (tests/accounting). The fine-tuning: not yet run.
"""

from experiments import base, qwen2_5
from experiments.r1_distill_qwen_1_5b import fine_tuned

SWEEP = {
    "14b": {**qwen2_5.SWEEP["14b"], "model.rope_theta": 1e6, "optimizer.learning_rate": 7e-5},
    "32b": {**qwen2_5.SWEEP["32b"], "model.rope_theta": 1e6, "optimizer.learning_rate": 6e-5},
}


def get_config(arms: str = ""):
    return base.select(fine_tuned(qwen2_5.get_config("math_7b"), 8e-5), arms, SWEEP)
