"""What DeepSeek-V3 takes to store: its released FP8 weights with their scales, and a number in each format."""

import math

from kernels.quantize.reference import BITS
from research import config, plots
from research.accounting import parameters
from research.precision.recipe import BLOCK, DEEPSEEK, E5M6, TILE, TILE_POW2, Format
from research.tables.runner import Row, compared, of_unit, published

TITLE = "DeepSeek-V3's weights, stored"
SOURCE = "DeepSeek-V3's README_WEIGHTS and the tensors of the released R1 checkpoint; DeepSeek-V3 (2412.19437) §3.3"
NOTES = (
    "The release counts the multi-token layer with its own copies of embedding and head: 13.46B, printed as 14B. "
    "Without them it has 11.61B, printed as 11.5B, which is what it has without eh_proj.",
    "Scales of the release are float32, one for a block of 128x128, of which ragged edges count whole.",
)

SIXTEEN = 2  # bytes of what the release leaves in bfloat16


def stored(settings) -> dict[str, int]:
    """Weights in FP8, their scales, and the rest, of the main model and the multi-token modules, copies included."""
    found = {"fp8": 0, "scales": 0, "rest": 0}
    for path, leaf in parameters.shapes(settings).items():
        name = path.removesuffix("/kernel").rsplit("/", 1)[-1]
        if name in config.PROJECTIONS and name not in DEEPSEEK.high_precision:
            rows, columns = leaf.shape[-2:]
            found["fp8"] += leaf.size
            found["scales"] += math.prod(leaf.shape[:-2]) * -(-rows // 128) * -(-columns // 128)
        else:
            found["rest"] += leaf.size
    m, depth = settings.model, settings.mtp.num_nextn_predict_layers
    biases = (m.num_hidden_layers - m.first_k_dense_replace + depth) * m.n_routed_experts
    found["rest"] += biases + depth * 2 * m.vocab_size * m.hidden_size
    return found


def bytes_of(form: Format) -> float:
    """Of a number, its share of a scale included."""
    return (BITS[form.kind] + (8 if form.power_of_two else 32) / math.prod(form.tile)) / 8


def analytic() -> list[Row]:
    settings = published("deepseek_v3")
    of, counted = stored(settings), parameters.count(settings)
    weights, joint = of["fp8"] + of["rest"], settings.model.hidden_size**2 * 2
    layer = counted["mtp"] + 2 * counted["by_part"]["embedding"]
    rows = [Row("weights of the repository", "billion", 684.489845504, weights / 1e9, 9, "by shapes, copies included"),
            Row("scales", "million", 41.5, of["scales"] / 1e6, 1, "one a block of 128x128"),
            Row("repository, scales included", "billion", 685, (weights + of["scales"]) / 1e9, 0),
            Row("main model", "billion", 671, counted["total"] / 1e9, 0),
            Row("multi-token layer with its copies", "billion", 14, layer / 1e9, 0, "13,463,426,304"),
            Row("multi-token layer alone", "billion", 11.5, counted["mtp"] / 1e9, 1),
            Row("the same without eh_proj", "billion", 11.5, (counted["mtp"] - joint) / 1e9, 1)]
    sizes = {"as released: FP8, scales, bfloat16": of["fp8"] + 4 * of["scales"] + SIXTEEN * of["rest"],
             "all in bfloat16": SIXTEEN * weights, "all in float32": 4 * weights}
    rows += [Row(name, "GB", None, size / 1e9, 1, "by shapes") for name, size in sizes.items()]
    formats = {"weight, E4M3 in 128x128": BLOCK, "activation, E4M3 in 1x128": TILE,
               "dispatched activation, scales powers of two": TILE_POW2, "input after attention, E5M6": E5M6}
    rows += [Row(name, "bytes a number", None, bytes_of(form), 4, "bfloat16: 2") for name, form in formats.items()]
    return rows + [
        Row("optimiser, V3: float32 master, bfloat16 moments", "bytes a weight", None, 4 + 2 + 2, 0, "float32: 12")]


SCALES = {"analytic": analytic}


def draw(axes, rows: list[Row]) -> None:
    chosen = compared(of_unit(rows, "GB"))
    plots.bars(axes, chosen["labels"], {"ours, by shapes": chosen["series"]["ours"]},
               "weights with the multi-token layer (GB)", digits=1)
