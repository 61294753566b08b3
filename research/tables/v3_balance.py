"""DeepSeek-V3's Table 5 and the loss-free paper's Table 2: balance by a routing bias, by a loss, by nothing."""

from research.tables.judgement import draw
from research.tables.study import Claim, Study

__all__ = ["draw"]

TITLE = "Loss-free balancing beside a loss"
SOURCE = "Auxiliary-loss-free load balancing (2408.15664) Table 2, 1B: perplexities 9.56 and 9.50, here as their " \
         "logarithms; DeepSeek-V3 (2412.19437) Table 5: Pile-test 0.727 and 0.724 bits per byte at 15.7B"
NOTES = (
    "Loss-free is `bias_alone`: the sign update at 0.001 and no loss. `bias` is V3's own recipe: the same and the "
    "sequence-wise loss at 1e-4. `sequence_loss` has that loss at 1e-3, as the papers' baselines, and no bias; "
    "`nothing` has neither.",
    "The papers' steps are tens of thousands: a bias that moves by 0.001 a step is still on its way after hundreds.",
    "MaxVio is of the loads of all held-out text, averaged over layers; the paper's MaxVio_global.",
)
FREE, BOTH, LOSS, NOTHING = "bias_alone", "bias", "sequence_loss", "nothing"
NATS, VIO, BATCH, BPB = "validation loss", "MaxVio", "MaxVio of a batch", "bits per byte"
STUDY = Study(
    "balance", (FREE, BOTH, LOSS, NOTHING), (NATS, BPB, VIO, BATCH),
    (Claim(NATS, FREE, LOSS, -0.006, "2.258 to 2.251 at 1B"),
     Claim(NATS, BOTH, LOSS, None, "no figure in the paper"),
     Claim(NATS, FREE, NOTHING, None, "no figure in the paper"),
     Claim(NATS, LOSS, NOTHING, None, "no figure in the paper"),
     Claim(VIO, FREE, LOSS, -0.68, "0.72 to 0.04 at 1B"),
     Claim(VIO, LOSS, NOTHING, None, "no figure in the paper")),
    {(NATS, FREE): 2.2513, (NATS, LOSS): 2.2576, (BPB, FREE): 0.724, (BPB, LOSS): 0.727, (VIO, FREE): 0.04,
     (VIO, LOSS): 0.72})
