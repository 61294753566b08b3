"""What keeps the experts evenly loaded: the routing bias and its variants, or a loss (V3 §4.5.2-3, 2408.15664).

Question: which of them reaches the lower validation loss, and which the lower MaxVio, at nano's size?
Command, for each arm: python -m research.main --config=experiments/balance.py:ARM --workdir=runs/balance/ARM
    and for the tables: python -m research.tables --table=v3_balance --scale=cpu (also alf_updates, v3_batchwise)
Cost: each arm as long as nano; micro: 2 minutes. Result: at nano's own steps not yet run; results/v3_balance.md.
"""

from experiments import base, nano

SWEEP = {
    "bias": {},  # V3: the sign update, with the sequence-wise loss at 1e-4
    "bias_alone": {"model.balance_loss": "none"},
    "centred": {"model.bias_update": "centred"},
    "proportional": {"model.bias_update": "proportional"},
    "multiplicative": {"model.bias_form": "multiplicative"},
    **{f"sign_{speed}": {"model.balance_loss": "none", "model.bias_update_speed": float(speed)}
       for speed in ("1e-4", "1e-2")},
    **{f"proportional_{speed}": {"model.balance_loss": "none", "model.bias_update_speed": float(speed),
                                 "model.bias_update": "proportional"} for speed in ("1e-2", "1e-3", "1e-4")},
    **{f"multiplicative_{speed}": {"model.balance_loss": "none", "model.bias_update_speed": float(speed),
                                   "model.bias_form": "multiplicative"} for speed in ("1e-2", "1e-3", "1e-4")},
    "sequence_loss": {"model.bias_update": "none", "model.aux_loss_alpha": 1e-3},
    "batch_loss": {"model.bias_update": "none", "model.balance_loss": "batch", "model.aux_loss_alpha": 1e-3},
    "nothing": {"model.bias_update": "none", "model.balance_loss": "none"},
}


def get_config(arms: str = ""):
    c, arms = nano.sized(arms)
    return base.select(c, arms, SWEEP)
