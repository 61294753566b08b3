"""Table 4 of "Insights into DeepSeek-V3": throughput of training V3, as FLOP/s and utilisation."""

from research import plots
from research.accounting import cost, flops
from research.tables.runner import Row, compared, of_unit, published

TITLE = "Training DeepSeek-V3 on 2,048 H800: utilisation"
SOURCE = "Insights into DeepSeek-V3 (2505.09343) Table 4; a peak of 989 TFLOP/s, which the paper does not print"
NOTES = (
    "Given: tokens a day and seconds a step, which were measured. Ours: what follows from them and from the shape.",
    "The rule of counting and the peak are fitted, each by one number: fewer independent checks than rows.",
)

GPUS = 2048
NETWORKS = {  # printed: billion tokens a day, seconds a step, MFU non-causal and causal in percent, parts of a step
    "MPFT": (272.80, 19.926, 43.73, 38.94, (1.13, 2.06, 1.99, 0.48, 13.95, 0.29)),
    "MRFT": (272.52, 19.946, 43.68, 38.90, (1.13, 2.03, 1.99, 0.48, 14.00, 0.31)),
}


def analytic() -> list[Row]:
    counted, peak = flops.by_isca_rule(published("deepseek_v3")), cost.GPUS["H800"].peak
    rows = []
    for name, (tokens, seconds, full, causal, parts) in NETWORKS.items():
        speed = tokens * 1e9 / cost.SECONDS_PER_DAY / GPUS
        of = {kind: cost.utilization(counted[f"training_{kind}"], peak, speed) for kind in ("full", "causal")}
        for kind, printed in (("full", 432), ("causal", 385)):
            rows.append(Row(f"{name}, {kind}", "TFLOP/s", printed, of[kind] * peak / 1e12, 0,
                            f"{speed:,.1f} tokens/s a GPU x {counted[f'training_{kind}'] / 1e9:,.2f} GFLOP"))
        for kind, printed in (("full", full), ("causal", causal)):
            rows.append(Row(f"{name}, {kind}", "% of the peak", printed, 100 * of[kind], 2, "over 989 TFLOP/s"))
        rows += [Row(f"{name}, tokens of a step", "million tokens", 15360 * 4096 / 1e6,
                     tokens * 1e9 / cost.SECONDS_PER_DAY * seconds / 1e6, 1, "tokens a second x seconds a step; the "
                     "paper's: 15,360 rows of 4,096"),
                 Row(f"{name}, parts of a step", "s", seconds, sum(parts), 1, "the sum of its printed parts")]
    return rows


SCALES = {"analytic": analytic}


def draw(axes, rows: list[Row]) -> None:
    plots.bars(axes, **compared(of_unit(rows, "% of the peak")), quantity="utilisation (% of 989 TFLOP/s)")
