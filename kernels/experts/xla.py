"""Dropless experts at a cost that does not grow with their number, in plain XLA.

Every expert has C slots, filled with its first C tokens and computed as one batched product. What does not fit is
computed exactly by a loop over tiles of rows of one expert, each expert's largest tiles first: the loop's length
follows the router, so that a balanced one pays for few tiles. Where the slots would hold less than seven eighths of
the pairs (a router at initialisation, a collapsed one) they are left out, and tiles compute everything.

All results stand in one buffer of rows, those of the slots first, where slots are used, then the tiles' in the order
of the experts, and each token gathers its own: XLA's scatter, its transpose of a gather too, is serial on a CPU.
Letters beside the house's: `X` tokens (B*T), `C` slots an expert, `R` rows of the buffer, `Z` rows of a tile.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Plan(NamedTuple):
    """Where each (token, choice) pair is computed."""

    slots_used: jax.Array  # bool
    pair_R: jax.Array  # the pair of each row, flat index into X*K; X*K where a row is empty
    row_XK: jax.Array  # the row of each pair
    first_row_E: jax.Array  # of each expert's tiles
    tiles_NE: jax.Array  # how many of each size an expert has; only the last, of the smallest, may be partly filled
    valid_XK: jax.Array | None  # pairs that name an expert; None: all do


def make_plan(indices_XK, n_experts: int, capacity: int, tiles: tuple[int, ...], padded: bool = False) -> Plan:
    """Sorts the pairs by expert, stably: the first tokens of the batch get the slots.

    padded: the index `n_experts` names none; such a pair has no row, and reads some row that it must not use.
    """
    P, S = indices_XK.size, n_experts * capacity
    key_P = jnp.sort(indices_XK.reshape(-1) * P + jnp.arange(P, dtype=jnp.int32))
    order_P, expert_P = key_P % P, key_P // P
    count_E = jnp.zeros(n_experts, jnp.int32).at[indices_XK.reshape(-1)].add(1)
    rank_P = jnp.arange(P, dtype=jnp.int32) - (jnp.cumsum(count_E) - count_E)[expert_P]
    fit_E = jnp.minimum(count_E, capacity)
    slots_used = 8 * jnp.sum(fit_E) >= 7 * (jnp.sum(count_E) if padded else P)
    fit_E = jnp.where(slots_used, fit_E, 0)
    left_E = count_E - fit_E
    first_row_E = jnp.where(slots_used, S, 0) + jnp.cumsum(left_E) - left_E
    row_P = jnp.where(rank_P < fit_E[expert_P], expert_P * capacity + rank_P,
                      (first_row_E - fit_E)[expert_P] + rank_P)
    n_rows = max(P, S + P // 8) + tiles[-1]  # a tile reads and writes up to so many rows after the last pair's
    if padded:  # rows behind the end are dropped where they are written, and are the first where they are read
        row_P = jnp.where(expert_P < n_experts, row_P, n_rows + jnp.arange(P, dtype=jnp.int32))
    row_XK = jnp.zeros(P, jnp.int32).at[order_P].set(row_P, unique_indices=True).reshape(indices_XK.shape)
    pair_R = jnp.full(n_rows, P, jnp.int32).at[row_P].set(order_P, unique_indices=True)
    tiles_NE = []
    for size in tiles:
        tiles_NE.append(left_E // size if size != tiles[-1] else -(-left_E // size))
        left_E = left_E % size
    valid_XK = indices_XK < n_experts if padded else None
    row_XK = jnp.where(valid_XK, row_XK, 0) if padded else row_XK
    return Plan(slots_used, pair_R, row_XK, first_row_E, jnp.stack(tiles_NE), valid_XK)


def _over_tiles(plan: Plan, tiles: tuple[int, ...], add, carry):
    """Folds add(carry, expert, row, size) over all tiles in the order of their rows.

    A tile that is not full goes on into rows of the next expert, whose own tiles then write over it.
    """
    end_E = jnp.cumsum(jnp.sum(plan.tiles_NE, axis=0))
    ends_NE = jnp.cumsum(plan.tiles_NE, axis=0)  # within an expert
    sizes_N = jnp.array(tiles, jnp.int32)

    def body(i, carry):
        e = jnp.sum(end_E <= i, dtype=jnp.int32)
        tile = i - (end_E[e] - ends_NE[-1, e])
        n = jnp.sum(ends_NE[:, e] <= tile, dtype=jnp.int32)
        before_N = jnp.clip(tile - (ends_NE[:, e] - plan.tiles_NE[:, e]), 0, plan.tiles_NE[:, e])
        row = plan.first_row_E[e] + jnp.sum(before_N * sizes_N)
        return lax.switch(n, [lambda carry, size=size: add(carry, e, row, size) for size in tiles], carry)

    return lax.fori_loop(0, end_E[-1], body, carry)


def capacity_and_tiles(n_pairs: int, n_experts: int) -> tuple[int, tuple[int, ...]]:
    """Slots an expert, 1.25 times the mean load, and the numbers of rows of tiles, largest first.

    Fewer slots send more rows through the slower loop, more compute empty ones. Large tiles multiply faster, small
    ones waste less of the last one of each expert.
    """
    capacity = max(8, 8 * round(1.25 * n_pairs / n_experts / 8))
    return capacity, tuple(size for size in (512, 128, 32, 8) if size <= max(n_pairs, 8))


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def experts(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK, capacity, tiles, formats, padded=False):
    """Equal to the reference in any split; see `capacity_and_tiles` for the numbers. Returns float32 y_XD.

    padded: the index E names no expert.
    """
    return _forward(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK, capacity, tiles, formats, padded)[0]


def _if_slots(plan: Plan, compute):
    """compute(), or zeros where the slots are not used."""
    zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(compute))
    return lax.cond(plan.slots_used, compute, lambda: zeros)


def _as_rows(x_EC, n_rows: int):
    """(E, C, ...) as the first rows of the buffer, zeros after them."""
    rows = x_EC.reshape(-1, *x_EC.shape[2:])
    return jnp.pad(rows, ((0, n_rows - rows.shape[0]),) + ((0, 0),) * (rows.ndim - 1))


def _write(buffer, value, row):
    return lax.dynamic_update_slice_in_dim(buffer, value.astype(buffer.dtype), row, axis=0)


def _product(spec, a, b, dtype):
    """einsum of operands in `dtype`, accumulated and returned in float32."""
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _forward(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK, capacity, tiles, formats, padded):
    X = x_XD.shape[0]
    E, K = gate_EDF.shape[0], indices_XK.shape[1]
    product = partial(_product, dtype=formats[0])
    plan = make_plan(indices_XK, E, capacity, tiles, padded)
    if padded:
        weights_XK = jnp.where(plan.valid_XK, weights_XK, 0)
    token_R = jnp.minimum(plan.pair_R // K, X - 1)  # an empty row computes the last token, nobody reads it

    def in_slots():
        x_ECD = x_XD[token_R[:E * capacity].reshape(E, capacity)]
        g_ECF = product("ECD,EDF->ECF", x_ECD, gate_EDF)
        u_ECF = product("ECD,EDF->ECF", x_ECD, up_EDF)
        y_ECD = product("ECF,EFD->ECD", jax.nn.silu(g_ECF) * u_ECF, down_EFD)
        y_RD, g_RF, u_RF = (_as_rows(rows, token_R.size) for rows in (y_ECD, g_ECF, u_ECF))
        return y_RD, g_RF.astype(x_XD.dtype), u_RF.astype(x_XD.dtype)

    def add_tile(carry, e, row, size):
        x_ZD = x_XD[lax.dynamic_slice_in_dim(token_R, row, size)]
        g_ZF, u_ZF = product("ZD,DF->ZF", x_ZD, gate_EDF[e]), product("ZD,DF->ZF", x_ZD, up_EDF[e])
        y_ZD = product("ZF,FD->ZD", jax.nn.silu(g_ZF) * u_ZF, down_EFD[e])
        return tuple(_write(rows, value, row) for rows, value in zip(carry, (y_ZD, g_ZF, u_ZF), strict=True))

    y_RD, g_RF, u_RF = _over_tiles(plan, tiles, add_tile, _if_slots(plan, in_slots))
    y_XD = sum(weights_XK[:, k, None] * y_RD[plan.row_XK[:, k]] for k in range(K))
    return y_XD, (x_XD, gate_EDF, up_EDF, down_EFD, weights_XK, plan, g_RF, u_RF)


def _swiglu_backward(g, u, da, weight):
    """Of weight * silu(g) * u with an output gradient da: (weight * silu(g) * u, d weight, dg, du).

    weight: one a row, with a last axis of 1.
    """
    g, u = g.astype(jnp.float32), u.astype(jnp.float32)
    s = jax.nn.sigmoid(g)
    a, d = g * s * u, da * weight
    return a * weight, jnp.sum(a * da, axis=-1), d * u * s * (1 + g * (1 - s)), d * g * s


def _backward(capacity, tiles, formats, padded, residuals, dy_XD):
    x_XD, gate_EDF, up_EDF, down_EFD, weights_XK, plan, g_RF, u_RF = residuals
    X = x_XD.shape[0]
    E, K = gate_EDF.shape[0], weights_XK.shape[1]
    _, input_gradient, weight_gradient = (partial(_product, dtype=dtype) for dtype in formats)
    token_R = jnp.minimum(plan.pair_R // K, X - 1)
    weight_R = jnp.where(plan.pair_R < X * K, weights_XK.reshape(-1)[jnp.minimum(plan.pair_R, X * K - 1)], 0)

    def in_slots():
        def slots(x_R):
            return x_R[:E * capacity].reshape(E, capacity, *x_R.shape[1:])

        token_EC = slots(token_R)
        x_ECD, dy_ECD = x_XD[token_EC], dy_XD[token_EC]
        da_ECF = input_gradient("ECD,EFD->ECF", dy_ECD, down_EFD)  # of an output not yet weighted
        a_ECF, dweight_EC, dg_ECF, du_ECF = _swiglu_backward(slots(g_RF), slots(u_RF), da_ECF,
                                                             slots(weight_R)[..., None])
        dx_ECD = (input_gradient("ECF,EDF->ECD", dg_ECF, gate_EDF)
                  + input_gradient("ECF,EDF->ECD", du_ECF, up_EDF))
        return (_as_rows(dx_ECD, token_R.size), _as_rows(dweight_EC, token_R.size),
                weight_gradient("ECD,ECF->EDF", x_ECD, dg_ECF), weight_gradient("ECD,ECF->EDF", x_ECD, du_ECF),
                weight_gradient("ECF,ECD->EFD", a_ECF, dy_ECD))

    def add_tile(carry, e, row, size):
        dx_RD, dweight_R, dgate_EDF, dup_EDF, ddown_EFD = carry
        g_ZF, u_ZF, token_Z, pair_weight_Z = (lax.dynamic_slice_in_dim(rows, row, size)
                                              for rows in (g_RF, u_RF, token_R, weight_R))
        if size == tiles[-1]:  # other experts' rows after the last pair's
            of_expert_Z = jnp.arange(size) < ends_E[e] - row
            pair_weight_Z = jnp.where(of_expert_Z, pair_weight_Z, 0)
        x_ZD, dy_ZD = x_XD[token_Z], dy_XD[token_Z]
        da_ZF = input_gradient("ZD,FD->ZF", dy_ZD, down_EFD[e])
        a_ZF, dweight_Z, dg_ZF, du_ZF = _swiglu_backward(g_ZF, u_ZF, da_ZF, pair_weight_Z[:, None])
        dx_ZD = input_gradient("ZF,DF->ZD", dg_ZF, gate_EDF[e]) + input_gradient("ZF,DF->ZD", du_ZF, up_EDF[e])
        return (
            _write(dx_RD, dx_ZD, row),
            _write(dweight_R, dweight_Z, row),
            dgate_EDF.at[e].add(weight_gradient("ZD,ZF->DF", x_ZD, dg_ZF)),
            dup_EDF.at[e].add(weight_gradient("ZD,ZF->DF", x_ZD, du_ZF)),
            ddown_EFD.at[e].add(weight_gradient("ZF,ZD->FD", a_ZF, dy_ZD)),
        )

    ends_E = jnp.append(plan.first_row_E[1:], jnp.int32(token_R.size))  # the rows after the last pair's weigh nothing
    dx_RD, dweight_R, dgate_EDF, dup_EDF, ddown_EFD = _over_tiles(plan, tiles, add_tile, _if_slots(plan, in_slots))
    dx_KXD = (dx_RD[plan.row_XK[:, k]] for k in range(K))
    if padded:
        dx_KXD = (jnp.where(plan.valid_XK[:, k, None], dx_XD, 0) for k, dx_XD in enumerate(dx_KXD))
    dx_XD, dweights_XK = sum(dx_KXD).astype(x_XD.dtype), dweight_R[plan.row_XK]
    if padded:
        dweights_XK = jnp.where(plan.valid_XK, dweights_XK, 0)
    return dx_XD, dgate_EDF, dup_EDF, ddown_EFD, None, dweights_XK


experts.defvjp(_forward, _backward)
