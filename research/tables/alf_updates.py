"""The loss-free paper's Tables 3 and 4: how the routing bias is updated, how fast, whether it adds or multiplies."""

import math

from research.tables.judgement import draw
from research.tables.study import HIGHER, Claim, Study

__all__ = ["draw"]

TITLE = "Updates of the routing bias"
SOURCE = "Auxiliary-loss-free load balancing (2408.15664) Tables 3 and 4, 1B; perplexities as their logarithms"
NOTES = (
    "Our proportional update is relative to the mean load, so that its speed does not depend on the batch; the paper's "
    "error is a count of tokens, and its speeds are none of ours.",
    "The paper's figure on speeds: 1e-4 is slow early on, 1e-2 fluctuates late, both worse than 1e-3; its values are "
    "only plotted.",
)
NATS, VIO, SIGN = "validation loss", "MaxVio", "bias_alone"
ARMS = {SIGN: (9.50, 0.044), "sign_1e-4": None, "sign_1e-2": None, "proportional_1e-2": (9.53, 0.028),
        "proportional_1e-3": (9.51, 0.036), "proportional_1e-4": (9.51, 0.040), "multiplicative_1e-2": (9.52, 0.041),
        "multiplicative_1e-3": (9.52, 0.036), "multiplicative_1e-4": (9.54, 0.048)}
STUDY = Study(
    "balance", tuple(ARMS), (NATS, VIO),
    (*(Claim(NATS, arm, SIGN, math.log(figures[0] / 9.50) if figures else HIGHER,
             f"{figures[0]} over 9.50" if figures else "a curve above that of 1e-3, not printed")
       for arm, figures in ARMS.items() if arm != SIGN),
     *(Claim(VIO, arm, SIGN, figures[1] - 0.044 if figures else HIGHER,
             f"{figures[1]:.3f} for 0.044" if figures else "a curve above that of 1e-3, not printed")
       for arm, figures in ARMS.items() if arm != SIGN)),
    {(quantity, arm): value for arm, figures in ARMS.items() if figures
     for quantity, value in ((NATS, math.log(figures[0])), (VIO, figures[1]))})
