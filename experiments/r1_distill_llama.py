"""DeepSeek-R1-Distill-Llama: 8B (without a name) from Llama 3.1, `70b` from Llama 3.3's instruct model.

Question: none yet; shapes of their bases, fine-tuned as R1 (v2 B.4.3) gives it. Command:
    python -m research.account --config=experiments/r1_distill_llama.py:70b
    python -m research.main --config=experiments/r1_distill_llama.py:smoke --workdir=runs/r1_distill_smoke
By the account (--gpu=H200) one H200 of 141 GB holds neither (204 and 1,552 GB). Of several, with the 64 rows shared
out, a device holds 96 GB for 8B (--config.mesh.fsdp=4 --config.training.accumulation_steps=16) and 134 for `70b` (32
and 2).
Result: 8.030B and 70.554B parameters (tests/accounting). The fine-tuning: not yet run.
"""

from experiments import base, llama_3_1
from experiments.r1_distill_qwen_1_5b import fine_tuned

SWEEP = {"70b": {**llama_3_1.SWEEP["70b"], "optimizer.learning_rate": 2e-5}}


def get_config(arms: str = ""):
    return base.select(fine_tuned(llama_3_1.get_config(), 5e-5), arms, SWEEP)
