"""Table 1 of "Insights into DeepSeek-V3": bytes of cache a token."""

from research import plots
from research.decoding.cache import bytes_per_token
from research.model.build import make_model
from research.tables.runner import Row, compared, of_unit, published

TITLE = "Cache of keys and values, or latents, a token"
SOURCE = "Insights into DeepSeek-V3 (2505.09343) Table 1, bfloat16, KB = 1000 bytes"
NOTES = ("The paper prints 7.28x for LLaMA-3.1 405B: its own figures give 516.096 / 70.272 = 7.34x.",)

MODELS = {  # experiment: KB and multiple as printed
    "deepseek_v3": ("DeepSeek-V3 (MLA)", 70.272, 1.0),
    "qwen2_5:72b": ("Qwen2.5-72B (GQA)", 327.680, 4.66),
    "llama_3_1:405b": ("LLaMA-3.1 405B (GQA)", 516.096, 7.28),
}


def analytic() -> list[Row]:
    size = {name: bytes_per_token(make_model(published(name)), "bfloat16") for name in MODELS}
    return [Row(what, "KB", printed, size[name] / 1e3, 3, "the cache of our decoder, by shapes")
            for name, (what, printed, _) in MODELS.items()] + [
        Row(f"{what}, multiple", "x", multiple, size[name] / size["deepseek_v3"], 2, "the ratio")
        for name, (what, _, multiple) in MODELS.items()]


SCALES = {"analytic": analytic}


def draw(axes, rows: list[Row]) -> None:
    plots.bars(axes, **compared(of_unit(rows, "KB")), quantity="cache a token in bfloat16 (KB)")
