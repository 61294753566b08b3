"""What multi-token modules do for the main model's next token, the modules dropped (V3 §4.5.1, Table 4).

Question: how far does the held-out loss of the next token move with a module of depth 1, and with a second?
Command, for each arm and seed, or all of them with their table:
    python -m research.main --config=experiments/mtp.py:micro:depth_2 --workdir=runs/mtp/depth_2-0
    python -m research.tables --table=v3_mtp --scale=cpu
Cost: micro 2 minutes an arm and seed on a shared machine. Result: results/v3_mtp.md.
`longer_2` and `longer_4` are depth_1 trained for so many times the steps: how far its drafts come to stand more often,
results/mtp_decode.md.
"""

from experiments import base, nano

SWEEP = {f"depth_{depth}": {"mtp.num_nextn_predict_layers": depth} for depth in (0, 1, 2)}
LONGER = {f"longer_{times}": times for times in (2, 4)}


def get_config(arms: str = ""):
    c, arms = nano.sized(arms)
    longer = {arm: SWEEP["depth_1"] | {"training.steps": times * c.training.steps} for arm, times in LONGER.items()}
    return base.select(c, arms, SWEEP | longer)
