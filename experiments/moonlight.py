"""Moonlight-16B-A3B: V2-Lite's size with V3's router, trained by Muon (Moonlight §3.3, Appendix C).

Question: none; the shape is for the account, for conversion and for comparisons. Command:
    python -m research.account --config=experiments/moonlight.py
    python -m research.main --config=experiments/moonlight.py:smoke --workdir=runs/moonlight_smoke
Result: 15.960B parameters, 2.244B active without embedding and head (tests/accounting). The full run: not yet run. Its
schedule (a second rise to 1e-4 for the last 500B tokens) is not reproduced; the plateau with a cosine stands here.
"""

from experiments import base, deepseek_v2_lite


def get_config(arms: str = ""):
    c = deepseek_v2_lite.get_config()
    c.model.update(dict(
        vocab_size=163840, intermediate_size=11264, scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True,
        routed_scaling_factor=2.446, bias_update="centred", balance_loss="sequence", rope_theta=50000.0,
        rms_norm_eps=1e-5, max_position_embeddings=8192))
    c.data.sequence_length = 8192
    c.training.steps = 170_000  # 5.7T tokens (derived)
    c.training.batch_size = 4096
    c.optimizer.name = "muon"
    return base.select(c, arms)
