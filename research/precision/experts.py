"""SwiGLU feed-forward networks, dense or routed, with quantised products (V3 §3.3).

Rows of routed experts are sorted by expert, each expert's padded to whole blocks; no tile holds rows of two experts.
Blocks have 128 rows, a tile's, where the Pallas kernels run, and fewer in plain XLA, whose tiles may be cut short: the
values are the same. Letters beside the house's: `M` such rows, `N` blocks, `P` pairs (X*K). Kept for the backward
pass: x quantised for the weight gradient and SwiGLU's input, 8 bits each; its output is computed again.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

import kernels.grouped as grouped
import kernels.swiglu as fused
from kernels.grouped import BLOCK
from kernels.product import accumulator
from kernels.quantize import quantize_blocks
from research.precision.matmul import kept_input, product, updated
from research.precision.quantize import (
    Quantized,
    both,
    kept_weight,
    quantize,
    quantize_transposed,
    weight,
    weight_again,
)
from research.precision.recipe import TILE, Format, Recipe

HISTORIES = ("x", "gate", "up", "down", "a", "dg", "du", "dy")  # operands that delayed scaling follows


class Rows(NamedTuple):
    """Where each (token, choice) pair stands among the padded rows; None of all for a dense network."""

    pair_M: jax.Array  # pair of each row, P where the row is padding
    row_XK: jax.Array  # row of each pair
    expert_N: jax.Array  # expert of each block, -1 behind the last
    first_N: jax.Array  # first block of each block's tile of 128 rows

    @property
    def whole(self) -> bool:
        """Whether blocks are whole tiles."""
        return self.pair_M.size == BLOCK * self.expert_N.size


def sort_rows(indices_XK, n_experts: int, block: int = BLOCK, most: int | None = None) -> Rows:
    """Sorts pairs by expert, stably, padded to blocks of `block` rows. Shapes are static: M is the most that any
    routing of `most` pairs (None: all) needs. A pair whose index is `n_experts` names none: it has no row, and reads
    one that it must not use."""
    P = indices_XK.size
    most = P if most is None else most
    M = (most + (block - 1) * min(n_experts, most)) // block * block
    expert_P = indices_XK.reshape(-1)
    order_P = jnp.argsort(expert_P, stable=True)
    count_E = jnp.zeros(n_experts, jnp.int32).at[expert_P].add(1)
    blocks_E = -(-count_E // block)
    end_E = jnp.cumsum(blocks_E)
    start_E = end_E - blocks_E
    sorted_P = expert_P[order_P]
    rank_P = jnp.arange(P, dtype=jnp.int32) - (jnp.cumsum(count_E) - count_E)[sorted_P]
    row_P = start_E[sorted_P] * block + rank_P
    row_P = jnp.where(sorted_P < n_experts, row_P, M + jnp.arange(P, dtype=jnp.int32))  # behind the end: dropped
    pair_M = jnp.full(M, P, jnp.int32).at[row_P].set(order_P.astype(jnp.int32), unique_indices=True, mode="drop")
    row_XK = jnp.zeros(P, jnp.int32).at[order_P].set(row_P, unique_indices=True).reshape(indices_XK.shape)
    row_XK = jnp.where(indices_XK < n_experts, row_XK, 0)
    block_N = jnp.arange(M // block, dtype=jnp.int32)
    expert_N = jnp.sum(end_E[None] <= block_N[:, None], axis=1, dtype=jnp.int32)
    start_N = jnp.append(start_E, 0)[expert_N].astype(jnp.int32)
    first_N = block_N - (block_N - start_N) % (BLOCK // block)
    return Rows(pair_M, row_XK, jnp.where(expert_N < n_experts, expert_N, -1), first_N)


def _quantize(x_MC, form: Format, rows: Rows | None, implementation: str, history=None, transposed=False) -> Quantized:
    """x of padded rows, or its transpose, in tiles that end where an expert's rows do."""
    block = x_MC.shape[0] // rows.expert_N.size if rows is not None else BLOCK
    tile = form.tile and (form.tile[::-1] if transposed else form.tile)
    if tile is None or tile[0] <= block:
        return (quantize_transposed if transposed else quantize)(x_MC, form, implementation, history)
    values, scales = quantize_blocks(x_MC, tile, rows.first_N, form.kind, form.power_of_two, transposed)
    return Quantized(values, scales, replace(form, tile=(tile[1], block) if transposed else (block, tile[1])))


def _both(x_MC, form: Format, transposed: Format, rows: Rows | None, implementation: str, history):
    """x of padded rows and its transpose."""
    if rows is None or rows.whole:
        return both(x_MC, form, transposed, implementation, 2 * [history])
    return (_quantize(x_MC, form, rows, implementation, history),
            _quantize(x_MC, transposed, rows, implementation, history, transposed=True))


def _products(rows: Rows | None, n_experts: int, implementation: str):
    """(multiply, weight_gradient) of Quantized operands: rows by experts where there are any, plain otherwise."""
    if rows is None:
        def multiply(a, w, accumulation, dtype):
            return product(a, w, accumulation, dtype, implementation)

        def weight_gradient(a_t, d_t, accumulation):
            return product(a_t, d_t, accumulation, jnp.float32, implementation)

        return multiply, weight_gradient

    def multiply(a, w, accumulation, dtype):
        operands = a.values, a.scales, a.tile, w.values, w.scales, w.tile, rows.expert_N
        if accumulation == "hopper":
            return _unpromoted(*operands).astype(dtype)
        return grouped.product(*operands, out_dtype=dtype, implementation=implementation)

    def weight_gradient(a_t, d_t, accumulation):
        operands = a_t.values, a_t.scales, a_t.tile, d_t.values, d_t.scales, d_t.tile, rows.expert_N, n_experts
        if accumulation == "hopper":
            return _unpromoted_gradient(*operands)
        return grouped.weight_gradient(*operands, implementation=implementation)

    return multiply, weight_gradient


def _unpromoted(a_MC, scales_a, tile_a, b_ESC, scales_b, tile_b, expert_N):
    """grouped.product with Hopper's own accumulation, expert by expert: for small models."""
    rows_E = jnp.repeat(expert_N, a_MC.shape[0] // expert_N.size)

    def add(y_MS, b):
        e, b_SC, scales = b
        y = accumulator.product(a_MC, scales_a, tile_a, b_SC, scales, tile_b, promote=None)
        return jnp.where((rows_E == e)[:, None], y, y_MS), None

    E = b_ESC.shape[0]
    start = jnp.zeros((a_MC.shape[0], b_ESC.shape[1]), jnp.float32)
    return jax.lax.scan(add, start, (jnp.arange(E), b_ESC, scales_b))[0]


def _unpromoted_gradient(a_RM, scales_a, tile_a, b_SM, scales_b, tile_b, expert_N, n_experts):
    """grouped.weight_gradient with Hopper's own accumulation: other experts' rows are zeros and add nothing."""
    of_M = jnp.repeat(expert_N, a_RM.shape[1] // expert_N.size)

    def one(e):
        a_own = jnp.where((of_M == e)[None], a_RM, jnp.zeros((), a_RM.dtype))
        return accumulator.product(a_own, scales_a, tile_a, b_SM, scales_b, tile_b, promote=None)

    return jax.lax.map(one, jnp.arange(n_experts))


def _dispatched(x_XD, form: Format, rows: Rows, token_M, valid_M, implementation: str, history) -> Quantized:
    """Tokens in the order of the padded rows, quantised: before they move where each has scales of its own.

    Padding is zeros. Blocks of several rows are those of the rows, not of the tokens.
    """
    if form.tile is not None and form.tile[0] > 1:
        return _quantize(_rows_of(x_XD, token_M, valid_M), form, rows, implementation, history)
    x = quantize(x_XD, form, implementation, history)
    values = jnp.where(valid_M[:, None], x.values[token_M], jnp.zeros((), x.values.dtype))
    return Quantized(values, x.scales if form.tile is None else x.scales[:, token_M], form)


def _rows_of(x_XD, token_M, valid_M):
    """Tokens in the order of the padded rows, zeros in padding."""
    return jnp.where(valid_M[:, None], x_XD[token_M], jnp.zeros((), x_XD.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def swiglu(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK, histories, recipe: Recipe, implementation: str,
           most: int | None = None):
    """Sum over a token's experts of weight * (silu(x gate) * (x up)) down; dtype of x.

    A dense network: indices_XK and weights_XK are None and its weights have no axis E. histories: {} or, for delayed
    scaling, those of HISTORIES, whose "gradients" are the histories after this step (see `matmul.linear`). most: of
    pairs that name an expert, where the index E names none; of such a pair the weight is 0.
    """
    return _forward(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK, histories, recipe, implementation,
                    most)[0]


def _forward(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK, histories, recipe, implementation, most):
    form, dtype, past = recipe.forward, x_XD.dtype, histories.get
    weights = [weight(w, form.right, implementation, past(name))
               for name, w in (("gate", gate_EDF), ("up", up_EDF), ("down", down_EFD))]
    (gate_t, gate), (up_t, up), (down_t, down) = weights
    if indices_XK is None:
        rows, n_experts = None, 1
        x, x_t = kept_input(x_XD, recipe, False, implementation, histories)
    else:
        n_experts = gate_EDF.shape[0]
        rows = sort_rows(indices_XK, n_experts, grouped.block_rows(implementation), most)
        token_M, valid_M = _tokens(rows, indices_XK)
        x = _dispatched(x_XD, recipe.dispatch or form.left, rows, token_M, valid_M, implementation, past("x"))
        x_t = x if recipe.requantize or recipe.dispatched else _quantize(
            _rows_of(x_XD, token_M, valid_M), recipe.weight_gradient.left, rows, implementation, past("x"), True)
    multiply, _ = _products(rows, n_experts, implementation)
    g_MF, u_MF = (multiply(x, w, form.accumulation, dtype) for w in (gate_t, up_t))
    a, kept_g, kept_u = _activation(g_MF, u_MF, rows, recipe, implementation, past("a"))
    y_MD = multiply(a, down_t, form.accumulation, dtype)
    if rows is None:
        y_XD = y_MD
    else:
        weighted = (weights_XK[:, k, None] * y_MD[rows.row_XK[:, k]] for k in range(indices_XK.shape[1]))
        y_XD = sum(weighted).astype(dtype)
    seen = updated({name: histories[name] for name in histories if name in ("x", "gate", "up", "down")},
                   x=x_XD, gate=gate_EDF, up=up_EDF, down=down_EFD)
    kept = tuple(q.packed() for q in (x_t, kept_g, kept_u)), tuple(map(kept_weight, (gate, up, down)))
    return y_XD, (kept, rows, indices_XK, weights_XK, seen, {n: histories[n] for n in histories if n not in seen})


def _tokens(rows: Rows, indices_XK):
    """Token of each padded row, and whether it has one."""
    P, K = indices_XK.size, indices_XK.shape[1]
    return jnp.minimum(rows.pair_M, P - 1) // K, rows.pair_M < P


def _is_fused(recipe: Recipe, rows: Rows | None) -> bool:
    """Whether `kernels.swiglu` computes this recipe's formats, on these rows."""
    forms = (recipe.forward.left, recipe.swiglu, recipe.input_gradient.left, recipe.weight_gradient.left,
             recipe.weight_gradient.right)
    return (rows is None or rows.whole) and all(form == TILE for form in forms)


def _activation(g_MF, u_MF, rows, recipe, implementation, history):
    """silu(g) * u for the next product, and g and u as they are kept."""
    if _is_fused(recipe, rows):
        a, a_s, g, g_s, u, u_s = fused.forward(g_MF, u_MF, implementation=implementation)
        return Quantized(a, a_s, TILE), Quantized(g, g_s, TILE), Quantized(u, u_s, TILE)
    a_MF = jax.nn.silu(g_MF.astype(jnp.float32)) * u_MF
    return (quantize(a_MF, recipe.forward.left, implementation, history),
            quantize(g_MF, recipe.swiglu, implementation), quantize(u_MF, recipe.swiglu, implementation))


def _activation_backward(g: Quantized, u: Quantized, da_MF, weight_M, rows, recipe, implementation, histories):
    """Quantised (dg, dg^T), (du, du^T), (weight a)^T, the gradient of weight_M, and what the histories follow."""
    if _is_fused(recipe, rows):
        dg, du, a_t, dweight_M = fused.backward(g.values, g.scales, u.values, u.scales, da_MF, weight_M,
                                                implementation=implementation)
        pair = [(Quantized(d[0], d[1], TILE), Quantized(d[2], d[3], TILE)) for d in (dg, du)]
        return *pair, Quantized(*a_t, TILE), dweight_M, {}
    g_MF, u_MF, da_MF = g.dequantized(), u.dequantized(), da_MF.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(g_MF)
    a_MF, d_MF = g_MF * sigmoid * u_MF, da_MF * weight_M[:, None]
    followed = {"a": a_MF, "dg": d_MF * u_MF * sigmoid * (1 + g_MF * (1 - sigmoid)), "du": d_MF * g_MF * sigmoid}
    forms = recipe.input_gradient.left, recipe.weight_gradient.right
    dg, du = (_both(followed[n], *forms, rows, implementation, histories.get(n)) for n in ("dg", "du"))
    a_t = _quantize(a_MF * weight_M[:, None], recipe.weight_gradient.left, rows, implementation, histories.get("a"),
                    True)
    return dg, du, a_t, jnp.sum(a_MF * da_MF, axis=-1), followed


def _backward(recipe, implementation, most, residuals, dy_XD):
    kept, rows, indices_XK, weights_XK, seen, histories = residuals
    kept_x, kept_g, kept_u = (q.unpacked() for q in kept[0])
    gate, up, down = map(weight_again, kept[1])
    x_t = kept_x
    if recipe.requantize or (recipe.dispatched and rows is not None):
        x_t = _quantize(kept_x.dequantized(), recipe.weight_gradient.left, rows, implementation, transposed=True)
    form, gradient_form = recipe.input_gradient, recipe.weight_gradient
    if rows is None:
        weight_M = jnp.ones(dy_XD.shape[0], jnp.float32)
        dy, dy_t = both(dy_XD, form.left, gradient_form.right, implementation, 2 * [histories.get("dy")])
        n_experts = 1
    else:
        n_experts = gate.values.shape[0]
        token_M, valid_M = _tokens(rows, indices_XK)
        weight_M = jnp.where(valid_M, weights_XK.reshape(-1)[jnp.minimum(rows.pair_M, indices_XK.size - 1)], 0)
        dy = _dispatched(dy_XD, recipe.dispatch_gradient or form.left, rows, token_M, valid_M, implementation,
                         histories.get("dy"))
        dy_MD = dy.dequantized() if recipe.dispatched else _rows_of(dy_XD, token_M, valid_M)
        dy_t = _quantize(dy_MD, gradient_form.right, rows, implementation, histories.get("dy"), True)
    multiply, weight_gradient = _products(rows, n_experts, implementation)
    dtype = dy_XD.dtype
    da_MF = multiply(dy, down, form.accumulation, dtype)
    (dg, dg_t), (du, du_t), a_t, dweight_M, followed = _activation_backward(
        kept_g, kept_u, da_MF, weight_M, rows, recipe, implementation, histories)
    dx_MD = multiply(dg, gate, form.accumulation, dtype) + multiply(du, up, form.accumulation, dtype)
    ddown = weight_gradient(a_t, dy_t, gradient_form.accumulation)
    dgate, dup = (weight_gradient(x_t, d_t, gradient_form.accumulation) for d_t in (dg_t, du_t))
    if rows is None:
        dx_XD, dweights_XK = dx_MD, None
    else:
        dx_KXD, dweights_XK = [dx_MD[row_X] for row_X in rows.row_XK.T], dweight_M[rows.row_XK]
        if most is not None:
            named_XK = indices_XK < n_experts
            dx_KXD = [jnp.where(named_X[:, None], dx_XD, 0) for named_X, dx_XD in zip(named_XK.T, dx_KXD, strict=True)]
            dweights_XK = jnp.where(named_XK, dweights_XK, 0)
        dx_XD = sum(dx_XD.astype(jnp.float32) for dx_XD in dx_KXD).astype(dtype)
        dweights_XK = dweights_XK.astype(weights_XK.dtype)
    return (dx_XD, dgate, dup, ddown, None, dweights_XK,
            seen | updated(histories, dy=dy_XD, **followed))


swiglu.defvjp(_forward, _backward)
