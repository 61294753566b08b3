"""DeepSeek-V3's Table 1: GPU hours and dollars of its training, by stage."""

from research import plots
from research.accounting import cost, flops
from research.tables.runner import Row, compared, of_unit, published

TITLE = "GPU hours of training DeepSeek-V3"
SOURCE = "DeepSeek-V3 (2412.19437) Table 1; R1's row: DeepSeek-R1 v2, supplement Table 7"
NOTES = (
    "Hours of context extension and post-training, and R1's, are the papers' own: only their sums and prices are ours.",
    "The account's figure for context extension takes the two stages of 62.9B tokens at 32K and 128K (V3 §4.3) at the "
    "TFLOP/s of pre-training: the paper's 119K hours say that long sequences ran at about two thirds of them.",
)

TOKENS, PRICE, GPUS = 14.8e12, 2.0, 2048  # tokens of pre-training, dollars of an H800 hour, H800s
HOURS_PER_TRILLION, EXTENSION, POST = 180e3, 119e3, 5e3  # V3, beside Table 1
TOKENS_PER_DAY = 272.80e9  # of all 2048, 2505.09343 Table 4
EXTENSION_STAGES = {32768: 1000 * 1920 * 32768, 131072: 1000 * 480 * 131072}  # length: tokens
R1_HOURS, R1_DOLLARS = (101, 5, 41), (202, 10, 82)  # thousands: R1-Zero, data for fine-tuning, R1


def analytic() -> list[Row]:
    pre = TOKENS / 1e12 * HOURS_PER_TRILLION
    total = pre + EXTENSION + POST
    speed = TOKENS_PER_DAY / cost.SECONDS_PER_DAY / GPUS
    of_length = {length: flops.by_isca_rule(
        published("deepseek_v3:yarn", f"data.sequence_length={length}"))["training_causal"]
        for length in (4096, *EXTENSION_STAGES)}
    extension = sum(tokens * of_length[length] for length, tokens in EXTENSION_STAGES.items())
    hours = "thousand H800 hours"
    rows = [Row("pre-training", hours, 2664, pre / 1e3, 0, "14.8T tokens at 180K hours a trillion"),
            Row("context extension", hours, 119, EXTENSION / 1e3, 0, "as printed"),
            Row("post-training", hours, 5, POST / 1e3, 0, "as printed"),
            Row("total", hours, 2788, total / 1e3, 0, "the sum"),
            Row("pre-training, by throughput", hours, 2664, cost.gpu_hours(TOKENS, speed) / 1e3, 0,
                "14.8T tokens at 272.80B a day of 2,048 (2505.09343 Table 4)"),
            Row("context extension, by FLOPs", hours, 119,
                extension / (speed * of_length[4096]) / cost.SECONDS_PER_HOUR / 1e3, 0,
                "62.9B tokens at 32K and at 128K, at pre-training's TFLOP/s")]
    rows += [Row(f"price of {name}", "million dollars", printed, PRICE * spent / 1e6, 3, "2 dollars an hour")
             for name, printed, spent in (("pre-training", 5.328, pre), ("context extension", 0.238, EXTENSION),
                                          ("post-training", 0.010, POST), ("all", 5.576, total))]
    return rows + [
        Row("a trillion tokens on 2,048 GPUs", "days", 3.7, HOURS_PER_TRILLION / GPUS / 24, 1, "180K hours"),
        Row("R1, all stages", "thousand hours of R1", 147, sum(R1_HOURS), 0, "101 + 5 + 41"),
        Row("price of R1", "thousand dollars", 294, sum(R1_DOLLARS), 0, "202 + 10 + 82")]


SCALES = {"analytic": analytic}


def draw(axes, rows: list[Row]) -> None:
    plots.bars(axes, **compared(of_unit(rows, "thousand H800 hours")), quantity="thousand H800 hours")
