"""What DeepSeek's serving cost in a day, what it could have earned, and how fast a token can be at best."""

from research import plots
from research.accounting import cost
from research.tables.runner import Row, compared, of_unit, published

TITLE = "Serving DeepSeek-V3 and R1: dollars a million tokens"
SOURCE = "DeepSeek's open-infra-index, day 6 (24 h from 2025-02-27 noon); Insights into DeepSeek-V3 (2505.09343) for " \
         "the bound of decoding; press: 10 cents against 4.40 dollars a million tokens"
NOTES = (
    "The day's rounded counts of tokens give 562.1 thousand dollars, the source prints 562,027, and 56.3% where they "
    "give 56.25%; all at R1's list prices: DeepSeek calls the revenue theoretical.",
    "The press's 10 cents are near the cost of a token of any kind, cached inputs included; its 4.40 dollars are a "
    "price, of an output token of another company. At DeepSeek's own list price of output the gap is 2.0, not 44.",
    "The bound of decoding takes a width of 7,000; with the real 7,168 it is 15.11 ms, 66 tokens/s. Its 67 tokens/s "
    "are 67.75, cut.",
)

NODES, GPUS, PRICE = 226.75, 8, 2.0  # mean over the day; of a node; dollars of an H800 hour
INPUT, HITS, OUTPUT = 608e9, 342e9, 168e9  # tokens of the day
PRICES = {"hit": 0.14, "miss": 0.55, "output": 2.19}  # dollars a million tokens
PRESS_CHEAP, PRESS_DEAR = 0.10, 4.40
PREFILL, DECODE = 73.7e3, 14.8e3  # tokens a second of a node
BYTES, TOKENS, EXPERTS = 1 + 2, 32, 8 + 1  # of a number: FP8 there, bfloat16 back; of a device; of a token
WIDTH = 7000  # as the paper rounds it
NETWORK = {"400G InfiniBand": (50e9, 14.76, 67), "GB200 NVL72": (900e9, 0.82, 1200)}  # bytes a second; ms, tokens/s


def exchange_seconds(width: int, layers: int, bandwidth: float) -> float:
    """Of a token's way through all layers: two micro-batches in turn, each exchanged there and back, and no compute."""
    return 2 * layers * BYTES * TOKENS * EXPERTS * width / bandwidth


def analytic() -> list[Row]:
    spent = NODES * GPUS * 24 * PRICE
    earned = (HITS * PRICES["hit"] + (INPUT - HITS) * PRICES["miss"] + OUTPUT * PRICES["output"]) / 1e6
    model, per_million = published("deepseek_v3").model, "dollars a million tokens"
    any_token = spent / (INPUT + OUTPUT) * 1e6
    rows = [Row("cost of the day", "dollars", 87_072, spent, 0, "226.75 nodes x 8 x 24 h x 2 dollars"),
            Row("revenue at list prices", "dollars", 562_027, earned, 0, "rounded counts of tokens x prices"),
            Row("margin over cost", "%", 545, 100 * (562_027 / spent - 1), 0, "the printed revenue over the cost"),
            Row("inputs from the disk cache", "%", 56.3, 100 * HITS / INPUT, 1, "342B of 608B"),
            Row("any token, cost (press: 10 cents)", per_million, PRESS_CHEAP, any_token, 2,
                "the day's cost over all its tokens"),
            Row("output token, all costs on it", per_million, None, spent / OUTPUT * 1e6, 2,
                "the day's cost over its outputs"),
            Row("output token, decoding nodes", per_million, None,
                cost.dollars_per_million_tokens(GPUS * PRICE, DECODE), 2, "16 dollars an hour, 14.8K tokens/s a node"),
            Row("input token, prefill nodes", per_million, None,
                cost.dollars_per_million_tokens(GPUS * PRICE, PREFILL), 2, "16 dollars an hour, 73.7K tokens/s a node"),
            Row("output token, DeepSeek's list price", per_million, PRICES["output"], None, 2),
            Row("output token, the press's dear one", per_million, PRESS_DEAR, None, 2),
            Row("press, dear over cheap", "x", PRESS_DEAR / PRESS_CHEAP, PRESS_DEAR / any_token, 0,
                "the dear price over any token's cost"),
            Row("dear over DeepSeek's list price", "x", None, PRESS_DEAR / PRICES["output"], 1,
                "output against output")]
    for name, (bandwidth, printed, rate) in NETWORK.items():
        seconds = exchange_seconds(WIDTH, model.num_hidden_layers, bandwidth)
        rows += [Row(f"bound of a token, {name}", "ms", printed, 1e3 * seconds, 2, "61 layers of exchange, no compute"),
                 Row(f"tokens a second, {name}", "tokens/s", rate, 1 / seconds, 0, "one over the bound")]
    real = exchange_seconds(model.hidden_size, model.num_hidden_layers, NETWORK["400G InfiniBand"][0])
    return rows + [Row("bound of a token at a width of 7,168", "ms", None, 1e3 * real, 2, "400G InfiniBand")]


SCALES = {"analytic": analytic}


def draw(axes, rows: list[Row]) -> None:
    plots.bars(axes, **compared(of_unit(rows, "dollars a million tokens")),
               quantity="dollars a million tokens (logarithmic)", log=True)
