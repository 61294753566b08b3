"""A small DeepSeek-V3 that learns real text on a laptop: the default experiment.

Question: does the whole recipe (latent attention, balanced experts, a multi-token module) beat gzip within minutes?
Command: make run, or
    python -m research.main --config=experiments/nano.py --workdir=runs/nano
"""

from experiments import base


def get_config(arms: str = ""):
    c = base.get_config()
    c.model.update(dict(
        hidden_size=192, intermediate_size=512, num_attention_heads=4, kv_lora_rank=96, qk_nope_head_dim=48,
        qk_rope_head_dim=16, v_head_dim=48, moe_intermediate_size=96, initializer_range=0.02))
    c.data.sequence_length = 256
    c.training.steps = 1800
    c.training.batch_size = 4
    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup_fraction = 0.02
    c.evaluation.every_steps = 300
    c.evaluation.decode_prompts = 8
    c.checkpoint.every_steps = 300
    return base.select(c, arms)
