"""What a recipe says, in NumPy: every operand quantised and dequantised, then one product; experts one at a time.

Only the quantiser itself is the project's: `kernels.quantize.reference`, which has tests of its own.
"""

from dataclasses import replace

import jax
import numpy as np

from kernels.quantize import reference as quantiser
from research.precision.recipe import Format, Recipe

_quantize = jax.jit(quantiser.quantize, static_argnums=(1, 2, 3))
_dequantize = jax.jit(quantiser.dequantize, static_argnums=2)


def round_trip(x_RC, form: Format) -> np.ndarray:
    """x quantised in this format and dequantised, float32."""
    x_RC = np.asarray(x_RC, np.float32)
    (R, C), tile = x_RC.shape, form.tile
    if tile is not None:  # zeros behind the edges change no tile's scale, and leave few shapes to compile
        x_RC = np.pad(x_RC, ((0, -R % 128), (0, -C % 128)))
    tile = tile or x_RC.shape
    values, scales = _quantize(x_RC, tile, form.kind, form.power_of_two)
    return np.asarray(_dequantize(values, scales, tile))[:R, :C]


def product(a_RC, b_SC, accumulation: str) -> np.ndarray:
    """a b^T in float64, or as Hopper adds it: 32 float32 products and the sum cut to 14 bits of the largest."""
    if accumulation == "float32":
        return a_RC.astype(np.float64) @ b_SC.astype(np.float64).T

    def cut(x, largest):
        unit = np.ldexp(1.0, np.frexp(np.maximum(largest, 2.0**-100))[1] - 14)
        return np.trunc(x / unit) * unit

    total_RS = np.zeros((len(a_RC), len(b_SC)))
    for start in range(0, a_RC.shape[1], 32):
        group = slice(start, start + 32)
        parts = (a_RC[:, None, group] * b_SC[None, :, group]).astype(np.float64)
        parts = np.concatenate([total_RS[:, :, None], parts], axis=2)
        total_RS = np.sum(cut(parts, np.max(np.abs(parts), axis=2, keepdims=True)), axis=2)
        total_RS = cut(total_RS, np.abs(total_RS))
    return total_RS


def linear_operands(x_XD, w_DF, dy_XF, recipe: Recipe, after_attention: bool = False) -> dict:
    """{product: (left, right, accumulation)}, as `product` takes them."""
    forward, input_gradient, weight_gradient = recipe.forward, recipe.input_gradient, recipe.weight_gradient
    kept = x_XD
    if after_attention and recipe.attention_output:
        kept = round_trip(x_XD, recipe.attention_output)
    elif recipe.requantize:
        kept = round_trip(x_XD, forward.left)
    return {
        "y": (round_trip(x_XD, forward.left), round_trip(w_DF.T, forward.right), forward.accumulation),
        "dx": (round_trip(dy_XF, input_gradient.left), round_trip(w_DF, input_gradient.right),
               input_gradient.accumulation),
        "dw": (round_trip(kept.T, weight_gradient.left), round_trip(dy_XF.T, weight_gradient.right),
               weight_gradient.accumulation),
    }


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))  # 1 / (1 + exp(-x)) without overflow


def swiglu(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK, dy_XD, recipe: Recipe) -> dict:
    """{y, dx, dgate, dup, ddown, dweights} of routed experts, one at a time.

    Where a tensor has one scale, all experts' rows share it, and each expert's weights have their own. Results of
    products but the weights' gradients are rounded to the dtype of x.
    """
    def rounded(x):
        return x if x_XD.dtype == np.float32 else x.astype(x_XD.dtype).astype(np.float64)

    forward, backward, gradient = recipe.forward, recipe.input_gradient, recipe.weight_gradient
    pairs = [np.argwhere(indices_XK == e) for e in range(len(gate_EDF))]  # (token, choice), in the order of tokens
    tokens = [pair[:, 0] for pair in pairs]
    weights = [np.asarray(weights_XK, np.float64)[tuple(pair.T)][:, None] for pair in pairs]

    def rows_of(x):
        return [x[token] for token in tokens]

    def quantised(parts, form):
        """The rows of each expert, in tiles of its own."""
        if form.tile is not None:
            return [round_trip(part, form) for part in parts]
        together = round_trip(np.concatenate(parts), form)
        return np.split(together, np.cumsum([len(part) for part in parts])[:-1])

    def transposed(parts, form):
        """The same, transposed, with tiles that run along the rows."""
        if form.tile is not None:
            return [round_trip(part.T, form) for part in parts]
        return [part.T for part in quantised(parts, form)]

    def multiply(rows, matrices_ESC, step):
        return [rounded(product(r, round_trip(m, step.right), step.accumulation))
                for r, m in zip(rows, matrices_ESC, strict=True)]

    def weight_gradient(left, right):
        left, right = transposed(left, gradient.left), transposed(right, gradient.right)
        return np.stack([product(a, b, gradient.accumulation) for a, b in zip(left, right, strict=True)])

    def combined(parts, weights):
        total_XD = np.zeros((len(x_XD), parts[0].shape[1]))
        for token, part, weight in zip(tokens, parts, weights, strict=True):
            np.add.at(total_XD, token, part * weight)
        return total_XD

    gate_EFD, up_EFD, down_EDF = (np.swapaxes(w, 1, 2) for w in (gate_EDF, up_EDF, down_EFD))
    x = quantised(rows_of(x_XD), recipe.dispatch or forward.left)
    g, u = multiply(x, gate_EFD, forward), multiply(x, up_EFD, forward)
    a = [g * sigmoid(g) * u for g, u in zip(g, u, strict=True)]
    y_XD = combined(multiply(quantised(a, forward.left), down_EDF, forward), weights)

    dy = quantised(rows_of(dy_XD), recipe.dispatch_gradient or backward.left)
    da = multiply(dy, down_EFD, backward)
    g, u = quantised(g, recipe.swiglu), quantised(u, recipe.swiglu)
    a = [g * sigmoid(g) * u for g, u in zip(g, u, strict=True)]
    d = [da * weight for da, weight in zip(da, weights, strict=True)]
    dg = [d * u * sigmoid(g) * (1 + g * (1 - sigmoid(g))) for g, u, d in zip(g, u, d, strict=True)]
    du = [d * g * sigmoid(g) for g, d in zip(g, d, strict=True)]
    dx = [rounded(a + b) for a, b in zip(multiply(quantised(dg, backward.left), gate_EDF, backward),
                                multiply(quantised(du, backward.left), up_EDF, backward), strict=True)]
    kept_x = x if recipe.requantize or recipe.dispatched else rows_of(x_XD)
    kept_dy = dy if recipe.dispatched else rows_of(dy_XD)
    dweights_XK = np.zeros(weights_XK.shape)
    for pair, a_e, da_e in zip(pairs, a, da, strict=True):
        dweights_XK[tuple(pair.T)] = np.sum(a_e * da_e, axis=1)
    weighted = [a * weight for a, weight in zip(a, weights, strict=True)]
    return {"y": rounded(y_XD), "dx": rounded(combined(dx, [1] * len(dx))), "dgate": weight_gradient(kept_x, dg),
            "dup": weight_gradient(kept_x, du), "ddown": weight_gradient(weighted, kept_dy),
            "dweights": dweights_XK}


def dense_swiglu(x_XD, gate_DF, up_DF, down_FD, dy_XD, recipe: Recipe) -> dict:
    """{y, dx, dgate, dup, ddown}: one expert of all tokens, to which nothing is dispatched."""
    X = len(x_XD)
    found = swiglu(x_XD, gate_DF[None], up_DF[None], down_FD[None], np.zeros((X, 1), int), np.ones((X, 1)), dy_XD,
                   replace(recipe, dispatch=None, dispatch_gradient=None, dispatched=False))
    del found["dweights"]
    return {name: value[0] if name in ("dgate", "dup", "ddown") else value for name, value in found.items()}


def relative_error(actual, expected) -> float:
    """Norm of the difference by the norm."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
