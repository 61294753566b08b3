"""DeepSeek-V2's Tables 8 and 9: kinds of attention at equal size, quality against the bytes of the cache."""

from research.tables.judgement import draw
from research.tables.study import HIGHER, LOWER, Claim, Study

__all__ = ["draw"]

TITLE = "Kinds of attention at equal size"
SOURCE = "DeepSeek-V2 (2405.04434) Tables 8 (7B, dense: MQA, GQA with 8 groups, MHA) and 9 (MHA, MLA): benchmarks"
NOTES = (
    "The paper compares answers (BBH 33.2, 35.6 and 37.0 for MQA, GQA and MHA; 37.9 for MHA and 39.0 for MLA), which "
    "models of this size cannot give: only the directions of its differences are judged.",
)
BPB, BYTES = "bits per byte", "bytes of cache a token"
STUDY = Study(
    "attention", ("mha", "gqa", "mqa", "mla"), (BPB, BYTES),
    (Claim(BPB, "mqa", "gqa", HIGHER, "MQA below GQA on all 4 benchmarks"),
     Claim(BPB, "gqa", "mha", HIGHER, "GQA below MHA on all 4"),
     Claim(BPB, "mla", "mha", LOWER, "MLA above MHA on 3 of 4 (small), 4 of 4 (large)")))
