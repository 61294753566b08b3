"""What multi-token prediction does for the main model (V3 §4.5.1, Table 4), and whether a second depth does more.

Question: how far does the validation loss of the next token move with a module of depth 1, which inference drops, and
with two of them? V3: 0.729 bits per byte both ways at 15.7B, and better answers on most benchmarks.
Command, for each arm and seed, or all of them with their table by the second:
    python -m research.main --config=experiments/mtp.py:depth_2:micro --workdir=runs/mtp/depth_2-0 --config.training.seed=0
    python -m research.tables --table=v3_mtp --scale=cpu
Result: results/v3_mtp.md.
"""

from experiments import base, nano

SWEEP = {
    "depth_0": {"mtp.num_nextn_predict_layers": 0},
    "depth_1": {"mtp.num_nextn_predict_layers": 1},
    "depth_2": {"mtp.num_nextn_predict_layers": 2},
}


def get_config(arms: str = ""):
    return base.select(nano.get_config(), arms, SWEEP | nano.SIZES)
