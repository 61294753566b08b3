"""What keeps the experts evenly loaded: the routing bias and its variants, or a loss (V3 §4.5.2-3, 2408.15664).

Question: which of them reaches the lower validation loss, and which the lower MaxVio, at nano's size?
Command, for each arm: python -m research.main --config=experiments/balance.py:ARM --workdir=runs/balance/ARM
Cost: each arm as long as nano. Result: not yet run.
"""

from experiments import base, nano

SWEEP = {
    "bias": {},  # V3: the sign update, with the sequence-wise loss at 1e-4
    "bias_alone": {"model.balance_loss": "none"},
    "centred": {"model.bias_update": "centred"},
    "proportional": {"model.bias_update": "proportional"},
    "multiplicative": {"model.bias_form": "multiplicative"},
    "sequence_loss": {"model.bias_update": "none", "model.aux_loss_alpha": 1e-3},
    "batch_loss": {"model.bias_update": "none", "model.balance_loss": "batch", "model.aux_loss_alpha": 1e-3},
    "nothing": {"model.bias_update": "none", "model.balance_loss": "none"},
}


def get_config(arms: str = ""):
    return base.select(nano.get_config(), arms, SWEEP | nano.SIZES)
