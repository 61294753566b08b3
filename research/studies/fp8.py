"""Where FP8's error comes from: tiles, outliers, sums in 14 bits, layers, products; losses, and the bytes it saves."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from kernels.choice import platform
from kernels.product import accumulator
from kernels.quantize import reference
from research import plots
from research.accounting import memory
from research.data.pipeline import load_corpus, validation_batches
from research.data.tokenizer import Tokenizer
from research.interop.weights import checked_weights
from research.model.transformer import block_inputs, depths
from research.precision.recipe import RECIPES
from research.reporting.run import column
from research.studies.routing import smooth
from research.tables.runner import published
from research.training.losses import token_losses

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


class Chain:
    """A model's layers with experts, one by one under a recipe, on one batch: one program serves all of them."""

    def __init__(self, model, settings, variables: dict, batch: dict, recipe: str):
        dense, self.length = depths(settings.model)
        one = model.clone(products=replace(model.products, recipe=RECIPES[recipe]),
                          config=FrozenConfigDict({**model.config, "num_hidden_layers": dense + 1}))
        self.inputs = block_inputs(batch["segments_BT"], batch["positions_BT"], not settings.data.mask_documents)
        self.model, self.variables, self.batch, self.dtype = one, variables, batch, one.products.dtype
        # as optimised it would compile three times as long as it runs here
        options = {"xla_backend_optimization_level": 0} if platform() == "cpu" else None
        self._both_ways = jax.jit(self._passed, compiler_options=options)

    def _passed(self, layer: dict, x_BTD, dy_BTD):
        def forward(layer, x_BTD):
            whole = {name: self.variables[name] | {"layers": layer[name]} for name in layer}
            return self.model.apply(whole, x_BTD, self.inputs, method="main")[0]

        y_BTD, backward = jax.vjp(forward, layer, x_BTD)
        d_layer, dx_BTD = backward(dy_BTD)
        return y_BTD, d_layer["params"], dx_BTD

    def pass_through(self, number: int, x_BTD, dy_BTD) -> tuple:
        """(y, gradients of the layer's parameters, gradient of x) of a layer, from its input and the gradient of y."""
        layer = {name: jax.tree.map(lambda leaf: leaf[number:number + 1], self.variables[name]["layers"])
                 for name in ("params", "routing")}
        return self._both_ways(layer, x_BTD.astype(self.dtype), dy_BTD.astype(self.dtype))

    def states(self) -> list:
        """x_BTD below the first layer and behind each, every one from the one before under this recipe."""
        states = [self.model.apply(self.variables, self.batch["tokens_BT"], self.inputs, method="begin")]
        for number in range(self.length):
            states.append(self.pass_through(number, states[-1], jnp.zeros_like(states[-1]))[0])
        return states

    def top(self, x_BTD):
        """Gradient of x behind the last layer, of the mean next-token loss."""
        def loss(x_BTD):
            logits_BTV, _ = self.model.apply(self.variables, x_BTD, self.batch["tokens_BT"], self.inputs, method="end")
            return token_losses((logits_BTV,), self.batch)[0] / self.batch["mask_BT"].sum()

        return jax.grad(loss)(x_BTD)


def layer_errors(workdir: str, recipes: tuple[str, ...]) -> dict[str, dict]:
    """`errors_of` a run's model on a batch of its held-out text."""
    settings, model, variables = checked_weights(Path(workdir))
    corpus = load_corpus(settings, Tokenizer.load(Path(workdir)))
    return errors_of(model, settings, variables, next(iter(validation_batches(corpus, settings, 1))), recipes)


def errors_of(model, settings, variables: dict, batch: dict, recipes: tuple[str, ...]) -> dict[str, dict]:
    """What each recipe does to the model, layer by layer, against float32: {recipe: {`own`: (L, 3), `carried`: (1+L)}}.

    own: of the layer's output, input gradient and weight gradients, from float32's own input and gradient of the
    output; norm of the error over the norm of what the layer adds to its input, or to the gradient. carried: of x below
    the first layer and behind each, where nothing below is put right.
    """
    exact = Chain(model, settings, variables, batch, "float32")
    x = exact.states()
    dy, above = exact.top(x[-1]), []  # from the last layer down: gradients of y, of the parameters, of x
    for number in reversed(range(exact.length)):
        _, d_params, dx = exact.pass_through(number, x[number], dy)
        above.append((dy, d_params, dx))
        dy = dx
    found = {}
    for name in recipes:
        chain, own = Chain(model, settings, variables, batch, name), []
        for number, (dy, d_params, dx) in enumerate(reversed(above)):
            y, d_found, d_input = chain.pass_through(number, x[number], dy)
            own.append([distance(y, x[number + 1], x[number]), distance(d_input, dx, dy), distance(d_found, d_params)])
        found[name] = {"own": own, "carried": [distance(*pair) for pair in zip(chain.states(), x, strict=True)]}
    return found


def distance(tree, exact, base=None) -> float:
    """Norm of tree - exact over the norm of exact - base (None: 0), in float64, over all leaves together."""
    leaves = [[np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(each)] for each in (tree, exact)]
    bases = [0] * len(leaves[0]) if base is None else [np.asarray(base, np.float64)]
    wrong, norm = (np.sqrt(sum(np.sum(np.square(z)) for z in each)) for each in (
        [a - b for a, b in zip(*leaves, strict=True)], [b - c for b, c in zip(leaves[1], bases, strict=True)]))
    return float(wrong / max(norm, 1e-30))


PRODUCTS = ("output", "input gradient", "weight gradients")


def draw_own_errors(axes, found: dict[str, dict]) -> None:
    """A table of percents for each recipe, layers by products, in one scale of shades."""
    largest = 100 * max(value for one in found.values() for row in one["own"] for value in row)
    for panel, (name, one) in zip(axes, found.items(), strict=True):
        plots.ink(panel, [[100 * value for value in row] for row in one["own"]],
                  [str(1 + layer) for layer in range(len(one["own"]))], list(PRODUCTS), "layer", "",
                  "error / norm (%)", largest=largest, digits=2)
        panel.set_title(name, loc="left")


def draw_carried_errors(axes, found: dict[str, dict]) -> None:
    """The error of the hidden state from the embedding upwards."""
    plots.lines(axes, {name: (list(range(len(one["carried"]))), [100 * value for value in one["carried"]])
                       for name, one in found.items()}, "layers with experts passed", "error / norm of x (%)")
    axes.set_ylim(0)


def draw_losses(axes, runs: dict[str, list[dict]], baseline: str) -> None:
    """Each run's loss by step, means of ten steps, and how far it is from the baseline's at the same step."""
    curves = {}
    for name, lines in runs.items():
        steps, values = column([line for line in lines if line["split"] == "train"], "next_token_loss")
        curves[name] = steps, smooth(values)
    plots.lines(axes[0], curves, "step", "nats a token")
    plots.lines(axes[1], {name: (steps, [100 * (a / b - 1) for a, b in zip(values, curves[baseline][1], strict=True)])
                          for name, (steps, values) in curves.items() if name != baseline},
                "step", f"loss relative to {baseline}'s (%)")
    axes[1].axhline(0, color="black", linewidth=0.8)


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
