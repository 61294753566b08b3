"""DeepSeekMoE's Table 1 and §4.4-4.5: dense, few large experts, many small ones, with and without shared ones."""

from research.tables.judgement import draw
from research.tables.study import LOWER, Claim, Study

__all__ = ["draw"]

TITLE = "Experts: how many, how fine, how many shared"
SOURCE = "DeepSeekMoE (2401.06066) Table 1 (Pile loss at 2.0B), §4.4 and Figures 3, 6"
NOTES = (
    "Where the paper only plots an order, only its side is judged. Figure 3 orders benchmarks' normalised scores.",
    "`fine_4_disabled` is fine_4 without its shared expert and with one more routed one, not trained further.",
    "Not here: a trained model without its best routed experts (Figure 4), or with fewer active ones (Figure 5, where "
    "4 reach GShard's loss).",
)
NATS = "validation loss"
FINE, HALF, DISABLED = "fine_4", "half", "fine_4_disabled"
STUDY = Study(
    "experts",
    ("dense", "top_1", "top_2", "shared", "fine_2", FINE, "fine_4_unshared", "shared_2", "shared_4", HALF, DISABLED),
    (NATS,),
    (Claim(NATS, "top_1", "dense", -0.179, "2.060 to 1.881"), Claim(NATS, "top_2", "top_1", -0.014, "1.881 to 1.867"),
     Claim(NATS, FINE, "top_2", -0.059, "1.867 to 1.808"),
     Claim(NATS, "shared", "top_2", LOWER, "Figure 3, an order"), Claim(NATS, "fine_2", "shared", LOWER, "Figure 3"),
     Claim(NATS, FINE, "fine_2", LOWER, "Figure 3"),
     Claim(NATS, "fine_4_unshared", FINE, None, "no figure in the paper"),
     Claim(NATS, "shared_2", FINE, -0.002, "1.808 to 1.806"), Claim(NATS, "shared_4", FINE, 0.003, "1.808 to 1.811"),
     Claim(NATS, HALF, "top_2", LOWER, "Figure 6, an order"),
     Claim(NATS, DISABLED, FINE, 0.606, "§4.5: 1.808 to 2.414")),
    {(NATS, "dense"): 2.060, (NATS, "top_1"): 1.881, (NATS, "top_2"): 1.867, (NATS, FINE): 1.808,
     (NATS, "shared_2"): 1.806, (NATS, "shared_4"): 1.811, (NATS, DISABLED): 2.414},
    starts={DISABLED: FINE}, untrained=(DISABLED,))
