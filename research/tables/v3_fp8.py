"""DeepSeek-V3's Appendix B: the loss in FP8 beside bfloat16, and gradients quantised in blocks."""

from research.tables.judgement import draw
from research.tables.study import EQUAL, HIGHER, Claim, Study

__all__ = ["draw"]

TITLE = "The loss of FP8 beside bfloat16"
SOURCE = "DeepSeek-V3 (2412.19437) §3.3, Appendix B.1 (below 0.25% at 16B and 230B) and B.2 (block-wise " \
         "gradients diverge)"
NOTES = (
    "B.1 prints no difference, but a bound, of its size and for curves that are smoothed: its direction here is that "
    "there is none.",
    "B.2's run diverged within 300B tokens of a 16B model: its direction here is a higher loss.",
    "`float32` is a control: what rounding alone does to a run.",
)
NATS, BASE = "validation loss", "bfloat16"
STUDY = Study(
    "fp8", (BASE, "float32", "fp8_deepseek", "fp8_blockwise_gradients", "fp8_tensor", "mxfp8"), (NATS,),
    (Claim(NATS, "fp8_deepseek", BASE, EQUAL, "less than 0.25%"),
     Claim(NATS, "fp8_blockwise_gradients", BASE, HIGHER, "diverged; no figure"),
     *(Claim(NATS, arm, BASE, None, "no figure in the paper") for arm in ("float32", "fp8_tensor", "mxfp8"))))
