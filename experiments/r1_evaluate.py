"""R1 v1 Table 5: pass@1 of any checkpoint on AIME 2024, MATH-500 or GSM8K, the paper's row beside it.

Protocol (R1 v1 §3; k by benchmark as v2, supplement D): temperature 0.6, top-p 0.95, up to 32,768 tokens, pass@1 as
the mean over k responses, no system prompt, the thought opened by the prompt. Problems are a user's own JSON lines.
Command:
    python -m research.distill --config=experiments/r1_evaluate.py:aime --stage=evaluate --workdir=runs/aime \\
        --config.evaluation.checkpoint=DeepSeek-R1-Distill-Qwen-1.5B --config.task.test_files=aime_2024.jsonl
Arms: `aime`, `math500` (both with the fields problem and answer), `gsm8k` (as it is; not in the paper's table), each
for R1-Distill-Qwen-1.5B, or for another row: `aime:qwen_7b`, ... Without one of the three: one's own benchmark, in the
fields question and answer, 8 responses to each problem, and no row of the paper. `evaluate` is the one stage.
Result: not yet run on a released checkpoint; tests/distillation tries it on a tiny one.
"""

from experiments import base

BENCHMARKS = {
    "aime": {"evaluation.samples": 64, "task.question_field": "problem", "task.check": "numeric"},
    "math500": {"evaluation.samples": 16, "task.question_field": "problem", "task.check": "latex"},
    "gsm8k": {"evaluation.samples": 4},
}
TABLE = {  # R1 v1 Table 5: AIME 2024 pass@1 and cons@64, MATH-500 pass@1
    "qwen_1_5b": ("R1-Distill-Qwen-1.5B", 28.9, 52.7, 83.9), "qwen_7b": ("R1-Distill-Qwen-7B", 55.5, 83.3, 92.8),
    "qwen_14b": ("R1-Distill-Qwen-14B", 69.7, 80.0, 93.9), "qwen_32b": ("R1-Distill-Qwen-32B", 72.6, 83.3, 94.3),
    "llama_8b": ("R1-Distill-Llama-8B", 50.4, 80.0, 89.1), "llama_70b": ("R1-Distill-Llama-70B", 70.0, 86.7, 94.5),
}
SMOKE = {"evaluation.samples": 2, "evaluation.max_tokens": 16, "evaluation.batch_size": 16}


def get_config(arms: str = ""):
    c = base.get_distillation_config()
    c.template = "deepseek"
    c.task.update(dict(source="files", count=0))
    c.evaluation.update(dict(temperature=0.6, top_p=0.95, max_tokens=32768, batch_size=8, greedy=False))
    c = base.select(c, arms, BENCHMARKS | {name: {} for name in TABLE}, SMOKE)
    chosen = arms.split(":")
    name, aime, consensus, math = TABLE[next((arm for arm in chosen if arm in TABLE), "qwen_1_5b")]
    if "aime" in chosen:
        c.evaluation.update(dict(published=name, published_pass_at_1=aime, published_cons_at_k=consensus))
    elif "math500" in chosen:
        c.evaluation.update(dict(published=name, published_pass_at_1=math))
    return c
