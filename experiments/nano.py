"""A small DeepSeek-V3 that learns real text on a laptop: the default experiment.

Question: does the whole recipe (latent attention, balanced experts, a multi-token module) beat gzip within minutes?
Command: make run, or
    python -m research.main --config=experiments/nano.py --workdir=runs/nano
Its sizes, which ablations take as they are: `micro` and `mini` (nano's shape) are the rungs of the trained tables on a
CPU, 0.2M and 0.5M tokens: 10 arms of 3 seeds within an hour of two quiet cores, by nano's speed. `gpu`, of 124M
parameters, is theirs on a GPU. A size stands before the arm, and the arm has the last word:
`experiments/mtp.py:micro:depth_1`.
"""

from experiments import base

RUNG = {"data.validation_fraction": 0.02, "evaluation.every_steps": 0, "evaluation.samples": 0,
        "evaluation.decode_prompts": 0}

SIZES = {
    "micro": {
        "model.hidden_size": 96, "model.intermediate_size": 256, "model.num_hidden_layers": 3,
        "model.kv_lora_rank": 48, "model.qk_nope_head_dim": 24, "model.qk_rope_head_dim": 8, "model.v_head_dim": 24,
        "model.head_dim": 24, "model.moe_intermediate_size": 48, "data.bpe_vocab_size": 1024,
        "data.sequence_length": 128, "training.steps": 400, **RUNG},
    "mini": {"model.head_dim": 48, "training.steps": 500, **RUNG},
    # widths are multiples of FP8's tiles of 128; 65,536 tokens a step, about 16,000 rows for each expert; documents are
    # not masked, as in V3's pre-training, so that attention is cuDNN's
    "gpu": {
        "model.hidden_size": 512, "model.intermediate_size": 1536, "model.num_hidden_layers": 9,
        "model.num_attention_heads": 8, "model.num_key_value_heads": 8, "model.kv_lora_rank": 256,
        "model.qk_nope_head_dim": 64, "model.qk_rope_head_dim": 32, "model.v_head_dim": 64,
        "model.moe_intermediate_size": 256, "model.n_routed_experts": 32, "model.num_experts_per_tok": 8,
        "data.bpe_vocab_size": 8192, "data.sequence_length": 2048, "data.mask_documents": False,
        "training.batch_size": 32, "training.steps": 1000, "optimizer.learning_rate": 2e-3,
        "optimizer.moment_dtype": "bfloat16", "precision.recipe": "bfloat16", "evaluation.every_steps": 250,
        "evaluation.decode_prompts": 0, "checkpoint.every_steps": 250},
}


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
    return base.select(c, arms, SIZES)


def sized(arms: str):
    """(nano at the size that the arms begin with, or as it is; the arms that follow)."""
    size, _, following = arms.partition(":")
    return (get_config(size), following) if size in SIZES else (get_config(), arms)
