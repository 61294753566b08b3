"""Where FP8's error comes from: tiles, outliers, sums in 14 bits; and the bytes it saves."""

import numpy as np

from kernels.product import accumulator
from kernels.quantize import reference
from research import plots
from research.accounting import memory
from research.precision.recipe import RECIPES
from research.tables.runner import published

OUTLIERS = slice(50, None, 100)  # channels
TILES = {"one scale a tensor": None, "128 x 128": (128, 128), "1 x 128": (1, 128), "1 x 32": (1, 32)}


def activations(outlier: float, rows: int = 256, width: int = 512, seed: int = 0) -> np.ndarray:
    """Normal numbers whose every 100th channel is `outlier` times as large, and that get smaller from row to row.

    Made up, after what is seen in trained Transformers: few channels are much larger, and tokens differ in size.
    """
    rng = np.random.default_rng(seed)
    x_RC = rng.normal(size=(rows, width)) * np.logspace(0, -3, rows)[:, None]
    x_RC[:, OUTLIERS] *= outlier
    return x_RC.astype(np.float32)


def round_trip(x_RC, tile: tuple[int, int] | None, kind: str = "e4m3") -> np.ndarray:
    """x quantised under the tile's scales and back, in float32."""
    tile = tile or x_RC.shape
    return np.asarray(reference.dequantize(*reference.quantize(x_RC, tile, kind), tile))


def error_by_tile(x_RC, tile: tuple[int, int] | None, kind: str = "e4m3", shown=(1, 128)) -> np.ndarray:
    """Norm of the error over the norm, in each `shown` tile of x, its outliers left out: they hide what is lost."""
    (R, C), (r, c) = x_RC.shape, shown
    parts = [np.array(z, np.float64) for z in (round_trip(x_RC, tile, kind) - x_RC, x_RC)]
    for part in parts:
        part[:, OUTLIERS] = 0
    cut = [part.reshape(R // r, r, C // c, c) for part in parts]
    wrong, norm = (np.sqrt(np.sum(z**2, axis=(1, 3))) for z in cut)
    return wrong / np.maximum(norm, 1e-30)


def flushed(x_RC, tile: tuple[int, int] | None) -> float:
    """Share of the entries that become zero."""
    return float(np.mean(round_trip(x_RC, tile) == 0))


def draw_values(axes) -> None:
    """The relative spacing of E4M3 under one scale, from the largest value down to where it ends."""
    x = np.logspace(-7.5, 0, 4000, dtype=np.float32)
    got = np.array([round_trip(np.array([[1, value]], np.float32), (1, 2))[0, 1] for value in x[::16]])
    axes.semilogx(x[::16], np.abs(got - x[::16]) / x[::16], color="black", linewidth=1)
    axes.set_xlabel("value / largest value of the tile")
    axes.set_ylabel("relative error")
    axes.set_ylim(0, 1.05)


def draw_error_by_row(axes, x_RC) -> None:
    """Mean error of a row's tiles, row by row, for each way of scaling."""
    rows = list(range(x_RC.shape[0]))
    plots.lines(axes, {name: (rows, error_by_tile(x_RC, tile).mean(axis=1).tolist()) for name, tile in TILES.items()},
                "row (token), each smaller than the one before", "error / norm, outliers left out")
    axes.set_yscale("log")
    axes.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1], ["0.02", "0.05", "0.1", "0.2", "0.5", "1"])
    axes.minorticks_off()


def draw_tiles(axes, x_RC, groups: int = 8) -> None:
    """Error tile by tile as shades, one axes for each way of scaling; rows are means of neighbouring tokens."""
    for panel, (name, tile) in zip(axes, TILES.items(), strict=False):
        error = error_by_tile(x_RC, tile).reshape(groups, -1, x_RC.shape[1] // 128).mean(axis=1)
        size = x_RC.shape[0] // groups
        plots.ink(panel, error.tolist(), [str(size * group) for group in range(groups)],
                  [str(128 * column) for column in range(error.shape[1])], "first token", "first channel",
                  "error / norm", largest=1.0, digits=2)
        panel.set_title(name, loc="left")


def accumulation(widths: list[int], data: str = "uniform 0..1", seeds: int = 3) -> dict[str, dict[int, list[float]]]:
    """{when promoted: {K: percent of error of each draw}}: the 14-bit sum alone, against float64."""
    return {name: {width: [100 * accumulator.errors(data, width, promote, seed)["norm of error / norm"]
                           for seed in range(seeds)] for width in widths}
            for name, promote in (("never promoted", None), ("promoted every 128", 128))}


def draw_accumulation(axes, found: dict[str, dict[int, list[float]]]) -> None:
    """Error by the length of the sum: mean and range."""
    plots.lines(axes, {name: (list(by), [float(np.mean(draws)) for draws in by.values()],
                              [min(draws) for draws in by.values()], [max(draws) for draws in by.values()])
                       for name, by in found.items()}, "K, products of a sum", "error / norm (%), logarithmic")
    axes.set_yscale("log")


def kept_bytes(recipes=("float32", "bfloat16", "fp8_deepseek")) -> dict[str, dict[str, float]]:
    """{recipe: {part: bytes a token kept for the backward pass}} of the 124M model of experiments/fp8.py."""
    settings = published("fp8:gpu_fp8_deepseek")
    return {name: memory.count(memory.with_recipe(settings, name))["kept_per_token"] for name in recipes}


def draw_memory(axes, found: dict[str, dict[str, float]]) -> None:
    """Bars of each part, a recipe beside another."""
    parts = list(next(iter(found.values())))
    plots.bars(axes, parts, {name: [by[part] for part in parts] for name, by in found.items()},
               "bytes a token kept for the backward pass (logarithmic)", 0, log=True)


def formats() -> str:
    """The recipe of DeepSeek as data, product by product."""
    recipe = RECIPES["fp8_deepseek"]
    rows = ("forward", "input_gradient", "weight_gradient")
    return "\n".join(f"{name:<16}{_name(getattr(recipe, name).left):>14} x {_name(getattr(recipe, name).right)}"
                     for name in rows)


def _name(form) -> str:
    return f"{form.kind} {form.tile[0]}x{form.tile[1]}"
