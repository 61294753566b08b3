"""DeepSeek-R1-Distill-Qwen-1.5B: Qwen2.5-Math-1.5B with a head of its own, fine-tuned on 800K of R1's samples.

Question: none yet; shape and fine-tuning as R1 (v2 B.4.3) gives them: 2 of its 2-3 epochs of 4.31B tokens, packed,
cosine from 1e-4 to a tenth. Command:
    python -m research.account --config=experiments/r1_distill_qwen_1_5b.py
    python -m research.main --config=experiments/r1_distill_qwen_1_5b.py:smoke --workdir=runs/r1_distill_smoke
    python -m research.distill --config=experiments/r1_distill_qwen_1_5b.py --stage=student --workdir=DIR \\
        --config.student.checkpoint.initialize_from=Qwen2.5-Math-1.5B --config.tuning.files=samples.jsonl
The last reads a user's samples (question, response) and trains R1's student from the base's folder; the others' text.
`complete` in research/distillation/settings.py says what of the rest of a pipeline is R1's, and what it does not give.
The 64 rows go one after another through one GPU, and layers are computed again (ours; the paper gives neither): 101.9
GB of an H200's 141 by the account (--gpu=H200).
Result: 1.7771B parameters (tests/accounting). The fine-tuning: not yet run.
"""

from experiments import base, qwen2_5


def fine_tuned(c, learning_rate: float):
    """R1's supervised fine-tuning, which all distilled models share but for the learning rate."""
    c.model.max_position_embeddings = 131072
    c.data.sequence_length = 32768
    c.training.steps = 4110  # 2 epochs (derived)
    c.training.batch_size = 64
    c.training.accumulation_steps = 64  # a row at a time and layers computed again, for memory: not from the paper
    c.model.remat = "layer"
    c.optimizer.update(dict(learning_rate=learning_rate, warmup_fraction=0.0, plateau_until=0.0, cosine_until=1.0,
                            cosine_final=0.1, tail_from=1.0, tail_final=0.1))
    return c


def get_config(arms: str = ""):
    c = fine_tuned(qwen2_5.get_config("math_1_5b"), 1e-4)
    c.model.tie_word_embeddings = False
    return base.select(c, arms)
