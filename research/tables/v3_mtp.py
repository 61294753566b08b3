"""DeepSeek-V3's Table 4: what a multi-token module does for the main model, and a second one beside it."""

from research.tables.judgement import draw
from research.tables.study import Claim, Study

__all__ = ["draw"]

TITLE = "Multi-token prediction, dropped at inference"
SOURCE = "DeepSeek-V3 (2412.19437) Table 4: Pile-test in bits per byte, 15.7B (1.33T tokens) and 228.7B (540B tokens)"
NOTES = (
    "The paper's gain is in benchmarks (HumanEval 20.7 to 26.8, GSM8K 25.4 to 31.4 at 15.7B), which models of this "
    "size cannot answer; in bits per byte it prints 0.729 both ways, and 0.658 to 0.657 at 228.7B.",
    "The paper has no figure for a second depth: V3 trained with one.",
)
WITH, WITHOUT, TWO, BPB = "depth_1", "depth_0", "depth_2", "bits per byte"
STUDY = Study(
    "mtp", (WITHOUT, WITH, TWO), (BPB,),
    (Claim(BPB, WITH, WITHOUT, -0.001, "0.658 to 0.657 at 228.7B"),
     Claim(BPB, TWO, WITH, None, "no figure in the paper")),
    {(BPB, WITHOUT): 0.729, (BPB, WITH): 0.729})
