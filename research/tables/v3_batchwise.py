"""DeepSeek-V3 §4.5.3: balance over a sequence, over a batch, or without a loss."""

from research.tables.judgement import draw
from research.tables.study import Claim, Study

__all__ = ["draw"]

TITLE = "Balance within a sequence or within a batch"
SOURCE = "DeepSeek-V3 (2412.19437) §4.5.3, 1B: validation losses 2.258 (sequence), 2.253 (loss-free), 2.253 (batch)"
NOTES = (
    "The runs are those of v3_balance, with one arm more: both losses at 1e-3.",
    "A batch has 4 sequences here and thousands there: the two losses differ less.",
)
NATS, VIO = "validation loss", "MaxVio"
SEQUENCE, BATCH, FREE = "sequence_loss", "batch_loss", "bias_alone"
STUDY = Study(
    "balance", (SEQUENCE, FREE, BATCH), (NATS, VIO),
    (Claim(NATS, BATCH, SEQUENCE, -0.005, "2.258 to 2.253"), Claim(NATS, FREE, SEQUENCE, -0.005, "2.258 to 2.253"),
     Claim(NATS, BATCH, FREE, 0.0, "2.253 both")),
    {(NATS, SEQUENCE): 2.258, (NATS, FREE): 2.253, (NATS, BATCH): 2.253})
