"""DeepSeek-V3's redundant experts in inference: what a GPU hosts, what that takes, and how busy the fullest one is."""

import numpy as np

from research import plots
from research.accounting import parameters
from research.parallel.placement import fullest, place
from research.precision.recipe import BLOCK
from research.tables.fp8_storage import bytes_of
from research.tables.runner import Row, of_unit, published

TITLE = "Redundant experts of DeepSeek-V3 in inference"
SOURCE = "DeepSeek-V3 (2412.19437) §3.4; DeepSeek's open-infra-index, day 6, for decoding on 144 GPUs"
NOTES = (
    "DeepSeek prints no loads. Zipf-like here: the expert of rank r has 1/sqrt(r) of the first one's, the busiest 8.4 "
    "times the mean (at 1/r it would be 42, where a token's 8 different experts allow 32), in an order drawn anew for "
    "each of 58 layers; shares are exact, and copies share evenly.",
    "Placed as DeepSeek's EPLB does (research/parallel/placement.py). Within 4 nodes, of 8 GPUs each: every node has "
    "two of the gate's 8 groups, whole, so that a token reaches no more nodes than its groups lie on.",
    "Bytes: FP8 with its scales, the main model's 58 layers.",
)

GPUS, REDUNDANT, NODES = 32, 32, 4  # of a unit of prefill; the redundant experts of day 6's decoding too
DECODING, DAY_6 = 320, 144  # GPUs of a unit of decoding, in the paper and on day 6
EXPONENT = 0.5


def zipf_like(layers: int, E: int, seed: int = 0) -> np.ndarray:
    """Loads of the experts of each layer, (L, E)."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(np.arange(1, E + 1) ** -EXPONENT) for _ in range(layers)])


def of_fullest(loads_LE, redundant: int, nodes: int, groups: int) -> float:
    """The fullest GPU's load over their mean, averaged over layers, where experts are placed by these loads."""
    of_slots = []
    for loads_E in loads_LE:
        experts_S = place(loads_E, redundant, GPUS, nodes, groups)
        of_slots.append((loads_E / np.bincount(experts_S))[experts_S])
    return float(np.mean(fullest(of_slots, GPUS)))


def analytic() -> list[Row]:
    s = published("deepseek_v3")
    E, groups, layers = s.model.n_routed_experts, s.model.n_group, parameters.shapes(s)["layers/mlp/gate_proj"].shape[0]
    routed = parameters.count(s)["by_part"]["routed experts"] * bytes_of(BLOCK) / E / 1e9  # GB of one of all layers
    loads_LE, load = zipf_like(layers, E), "x the mean"
    rows = [Row("prefill, 32 GPUs: experts a GPU", "experts", 8 + 1, (E + REDUNDANT) / GPUS, 0, "256 and 32 redundant"),
            Row("decoding, 144 GPUs: experts a GPU", "experts", 2, (E + REDUNDANT) / DAY_6, 0, "256 and 32 redundant"),
            Row("decoding, 320 GPUs: beyond one a routed expert", "GPUs", 64, DECODING - E, 0, "320 - 256"),
            Row("prefill: experts of a GPU", "GB", None, E / GPUS * routed, 1, "8 of each layer"),
            Row("prefill: with a redundant one", "GB", None, (E + REDUNDANT) / GPUS * routed, 1, "9 of each layer"),
            Row("as they lie", load, None, float(np.mean(fullest(loads_LE, GPUS))), 2, "fullest of 32 GPUs")]
    return rows + [
        Row(f"{redundant} redundant" + (f", within {nodes} nodes" if nodes > 1 else ""), load, None,
            of_fullest(loads_LE, redundant, nodes, groups), 2, "placed by these loads")
        for redundant in (0, REDUNDANT) for nodes in (1, NODES)]


SCALES = {"analytic": analytic}


def draw(axes, rows: list[Row]) -> None:
    shown = of_unit(rows, "x the mean")
    plots.bars(axes, [row.what for row in shown], {"Zipf-like loads": [row.ours for row in shown]},
               "load of the fullest of 32 GPUs, mean = 1", 2)
