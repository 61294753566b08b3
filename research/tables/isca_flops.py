"""Table 2 of "Insights into DeepSeek-V3": training FLOPs a token."""

from research import plots
from research.accounting import flops
from research.tables.runner import Row, compared, published

TITLE = "Training FLOPs a token at 4,096 tokens"
SOURCE = "Insights into DeepSeek-V3 (2505.09343) Table 2"
NOTES = (
    "The paper does not print what it counts. One rule gives both DeepSeek rows: linear layers and head, causal "
    "attention; without router, input embedding and multi-token module (V3 with its router: 250.45).",
    "LLaMA-405B's 2448 needs attention at a quarter of the pairs, Qwen-72B's 394 fits no counting of its shape: "
    "the two rows are quoted, not reproduced.",
)

MODELS = {  # experiment: name and GFLOP as printed
    "deepseek_v2": ("DeepSeek-V2, 236B", 155),
    "deepseek_v3": ("DeepSeek-V3, 671B", 250),
    "qwen2_5:72b": ("Qwen-72B, dense", 394),
    "llama_3_1:405b": ("LLaMA-405B, dense", 2448),
}


def analytic() -> list[Row]:
    counted = {name: flops.by_isca_rule(published(name, "data.sequence_length=4096")) for name in MODELS}
    llama = published("llama_3_1:405b")
    quarter = counted["llama_3_1:405b"]["training_causal"] - flops.attention_per_layer(llama, 0.25) * 126
    return [Row(what, "GFLOP", printed, counted[name]["training_causal"] / 1e9, 0, "the rule, causal")
            for name, (what, printed) in MODELS.items()] + [
        Row("LLaMA-405B at a quarter of the pairs", "GFLOP", 2448, quarter / 1e9, 0, "not the rule"),
        Row("DeepSeek-V3, causal, two decimals", "GFLOP", None,
            counted["deepseek_v3"]["training_causal"] / 1e9, 2, "the rule"),
        Row("DeepSeek-V3, full attention", "GFLOP", None, counted["deepseek_v3"]["training_full"] / 1e9, 2,
            "all pairs of positions")]


SCALES = {"analytic": analytic}


def draw(axes, rows: list[Row]) -> None:
    plots.bars(axes, **compared(rows[:len(MODELS)]), quantity="training FLOPs a token (GFLOP, logarithmic)", log=True)
