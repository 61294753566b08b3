"""DeepSeek-V2's Table 1: cached numbers a token, by kind of attention."""

from research import plots
from research.decoding.cache import bytes_per_token
from research.model.build import make_model
from research.tables.runner import Row, compared, published

TITLE = "Cached numbers a token, by kind of attention"
SOURCE = "DeepSeek-V2 (2405.04434) Table 1, its formulae at V2's own 128 heads of 128 and 60 layers; Table 9; §3.2.3"
NOTES = (
    "The 93.3% of §3.2.3 compare V2 as it is deployed, about 6 bits a number, with DeepSeek 67B in 16: 95 layers with "
    "8 key heads of 128 (its shape: DeepSeek LLM, 2401.02954). At equal precision V2's cache is 82.2% smaller.",
    "Table 1 calls latent attention 2.25 groups' worth of grouped queries: (512 + 64) / (2 x 128).",
)

BITS, DEPLOYED_BITS = 16, 6


def numbers(experiment: str, *fields: str) -> float:
    """Numbers a token that our decoder keeps."""
    return bytes_per_token(make_model(published(experiment, *fields)), "bfloat16") * 8 / BITS


def grouped(experiment: str, heads: int, *fields: str) -> float:
    """The same with keys and values of `heads` heads of 128."""
    shape = "model.attention=gqa", "model.head_dim=128", f"model.num_key_value_heads={heads}"
    return numbers(experiment, *shape, *fields)


def analytic() -> list[Row]:
    n, d, layers, groups = 128, 128, 60, 8
    latent = numbers("deepseek_v2")
    unit, how = "thousand numbers", "our decoder's cache, by shapes"
    rows = [Row("MHA: 2 n d l", unit, 2 * n * d * layers / 1e3, grouped("deepseek_v2", n) / 1e3, 1, how),
            Row("GQA, 8 groups: 2 g d l", unit, 2 * groups * d * layers / 1e3, grouped("deepseek_v2", groups) / 1e3, 1,
                how),
            Row("MQA: 2 d l", unit, 2 * d * layers / 1e3, grouped("deepseek_v2", 1) / 1e3, 1, how),
            Row("MLA: (d_c + d_r) l = 4.5 d l", unit, 4.5 * d * layers / 1e3, latent / 1e3, 1, how)]
    rows += [Row("small MHA", unit, 110.6, grouped("deepseek_v2_lite", 16) / 1e3, 1, "V2-Lite with 16 key heads"),
             Row("small MLA", unit, 15.6, numbers("deepseek_v2_lite") / 1e3, 1, "V2-Lite"),
             Row("large MHA", unit, 860.2, grouped("deepseek_v2", 56, "model.num_attention_heads=56") / 1e3, 1,
                 "V2 with 56 heads: the number that gives it"),
             Row("large MLA", unit, 34.6, latent / 1e3, 1, "V2")]
    large = grouped("llama_3_1", 8, "model.num_hidden_layers=95")
    return rows + [
        Row("MLA as groups of GQA", "groups", 2.25, latent / grouped("deepseek_v2", 1), 2, "over MQA's"),
        Row("V2 against DeepSeek 67B", "%", -93.3, 100 * (latent * DEPLOYED_BITS / (large * BITS) - 1), 1,
            "6 bits against 16, see the notes"),
        Row("the same at equal precision", "%", None, 100 * (latent / large - 1), 1)]


SCALES = {"analytic": analytic}


def draw(axes, rows: list[Row]) -> None:
    plots.bars(axes, **compared(rows[:8]), quantity="cached numbers a token (thousands, logarithmic)",
               log=True)
