"""What multi-token modules do for the main model's next token, the modules dropped (V3 §4.5.1, Table 4).

Question: how far does the held-out loss of the next token move with a module of depth 1, and with a second?
Command, for each arm and seed, or all of them with their table:
    python -m research.main --config=experiments/mtp.py:micro:depth_2 --workdir=runs/mtp/depth_2-0
    python -m research.tables --table=v3_mtp --scale=cpu
Cost: micro 2 minutes an arm and seed on a shared machine. Result: results/v3_mtp.md.
"""

from experiments import base, nano

SWEEP = {f"depth_{depth}": {"mtp.num_nextn_predict_layers": depth} for depth in (0, 1, 2)}


def get_config(arms: str = ""):
    c, arms = nano.sized(arms)
    return base.select(c, arms, SWEEP)
