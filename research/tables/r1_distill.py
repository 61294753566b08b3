"""R1's Table 6 in small: a student that learns from what a teacher says, and one that is reinforced itself."""

from research import plots
from research.tables import pipelines
from research.tables.study import Claim, Study

TITLE = "Distillation against reinforcement of the small model"
SOURCE = "DeepSeek-R1 v1 (2501.12948v1) Table 6, AIME 2024 pass@1 at 32B; R1's own row: Table 4"
NOTES = (
    "The paper's students are Qwen2.5-32B, its test AIME 2024; ours have 0.2M parameters and do sums modulo 10: "
    "experiments/distill.py says which. Arms without a figure are not in the paper's table.",
    "Students of one seed start from the same weights and train for about the same operations, rollouts included. What "
    "the teacher of on_policy spends on reading them is not counted.",
    "k, in the teacher's row, is how many responses every model gives to a problem.",
    "A claim is judged by a paired t-interval over seeds, each at 95%, uncorrected. One seed's interval is over its "
    "problems and samples.",
)
KIND = pipelines
PASS = "pass@1, %"
PARTS = ("problems_320", "problems_1280")
STUDY = Study(
    "distill", ("teacher", "base", "reference", "reinforced", "distilled", "unverified", "logits", "on_policy",
                *PARTS),
    (PASS, "± of one seed's pass@1 (95%), %", "pass@k, %", "cons@k, %", "k", "tokens of a response",
     "training, TFLOP", "samples taught"),
    (Claim(PASS, "distilled", "reinforced", 25.6, "72.6 less 47.0"),
     Claim(PASS, "teacher", "distilled", 7.2, "79.8 less 72.6"),
     Claim(PASS, "distilled", "base", None, "no figure in the paper"),
     Claim(PASS, "reinforced", "base", None, "no figure in the paper"),
     Claim(PASS, "distilled", "reference", None, "no figure in the paper"),
     Claim(PASS, "distilled", "unverified", None, "no figure in the paper"),
     Claim(PASS, "logits", "distilled", None, "no figure in the paper"),
     Claim(PASS, "on_policy", "distilled", None, "no figure in the paper"),
     *(Claim(PASS, more, less, None, "no figure in the paper")
       for less, more in zip(PARTS, (*PARTS[1:], "distilled"), strict=True))),
    {(PASS, "teacher"): 79.8, (PASS, "reinforced"): 47.0, (PASS, "distilled"): 72.6})


def draw(axes, rows: list) -> None:
    """pass@1 of every model: mean and range over seeds."""
    chosen = [row for row in rows if row.unit == PASS and not row.verdict]
    plots.ranges(axes, [row.what.split(": ", 1)[1] for row in chosen],
                 {"ours": [(row.ours, row.least, row.greatest) for row in chosen]},
                 "pass@1, %: mean and range over seeds")
    axes.set_xlim(left=0)
