"""Dropless experts at a cost that does not grow with their number, in plain XLA.

Every expert has C slots, filled with its first C tokens and computed as one batched product. What does not fit is
computed exactly in tiles of rows of one expert, by a loop for each size of tile: its length follows the router, so
that a balanced one pays for few. Small tiles go together as a batched product, for a CPU computes one on one processor.
Where the slots would hold less than seven eighths of the pairs (a router at initialisation, a collapsed one) they are
left out, and tiles compute everything.

All results stand in one buffer of rows, those of the slots first, where slots are used, then the tiles' in the order
of the experts, and each token gathers its own: XLA's scatter, its transpose of a gather too, is serial on a CPU.
Letters beside the house's: `X` tokens (B*T), `C` slots an expert, `R` rows of the buffer, `Z` rows of a tile, `J` tiles
computed together, `U` sizes of tiles.
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
    first_row_UE: jax.Array  # of each expert's tiles of a size
    tiles_UE: jax.Array  # how many of a size an expert has; only the last of the smallest has empty rows
    valid_XK: jax.Array | None  # pairs that name an expert; None: all do


def make_plan(indices_XK, n_experts: int, capacity: int, tiles: tuple[tuple[int, int], ...],
              most: int | None = None) -> Plan:
    """Sorts the pairs by expert, stably: the first tokens of the batch get the slots.

    most: of pairs, where the index `n_experts` names none; such a pair has no row, and reads some row that it must not
    use. None: all pairs name one.
    """
    P, S, least = indices_XK.size, n_experts * capacity, tiles[-1][0]
    padded, most = most is not None, P if most is None else most
    key_P = jnp.sort(indices_XK.reshape(-1) * P + jnp.arange(P, dtype=jnp.int32))
    order_P, expert_P = key_P % P, key_P // P
    count_E = jnp.zeros(n_experts, jnp.int32).at[indices_XK.reshape(-1)].add(1)
    rank_P = jnp.arange(P, dtype=jnp.int32) - (jnp.cumsum(count_E) - count_E)[expert_P]
    fit_E = jnp.minimum(count_E, capacity)
    pairs = jnp.sum(count_E) if padded else P
    slots_used = jnp.sum(fit_E) >= pairs - pairs // 8
    fit_E = jnp.where(slots_used, fit_E, 0)
    left_E = -(-(count_E - fit_E) // least) * least
    first_row_E = jnp.where(slots_used, S, 0) + jnp.cumsum(left_E) - left_E
    row_P = jnp.where(rank_P < fit_E[expert_P], expert_P * capacity + rank_P,
                      (first_row_E - fit_E)[expert_P] + rank_P)
    n_rows = (max(most, S + most // 8)
              + (least - 1) * min(n_experts, most)  # as many as may be in the last tiles of experts
              + tiles[0][0])  # and a tile of nobody: see `_over_tiles`
    if padded:  # rows behind the end are dropped where they are written, and are the first where they are read
        row_P = jnp.where(expert_P < n_experts, row_P, n_rows + jnp.arange(P, dtype=jnp.int32))
    row_XK = jnp.zeros(P, jnp.int32).at[order_P].set(row_P, unique_indices=True).reshape(indices_XK.shape)
    pair_R = jnp.full(n_rows, P, jnp.int32).at[row_P].set(order_P, unique_indices=True)
    tiles_UE, first_row_UE = [], []
    for size, _ in tiles:
        tiles_UE.append(left_E // size)
        first_row_UE.append(first_row_E)
        first_row_E, left_E = first_row_E + left_E // size * size, left_E % size
    valid_XK = indices_XK < n_experts if padded else None
    row_XK = jnp.where(valid_XK, row_XK, 0) if padded else row_XK
    return Plan(slots_used, pair_R, row_XK, jnp.stack(first_row_UE), jnp.stack(tiles_UE), valid_XK)


def _over_tiles(plan: Plan, tiles: tuple[tuple[int, int], ...], add, carry):
    """Folds add(carry, expert_J, row_JZ) over all tiles, the largest first, J at a time.

    Where fewer are left, the others are the buffer's last rows: empty, they weigh nothing, whatever expert has them.
    """
    n_rows, n_experts = plan.pair_R.size, plan.tiles_UE.shape[1]

    def add_all(size, J, tiles_E, first_row_E, carry):
        end_E = jnp.cumsum(tiles_E)

        def body(i, carry):
            tile_J = i * J + jnp.arange(J, dtype=jnp.int32)
            e_J = jnp.minimum(jnp.sum(end_E[None] <= tile_J[:, None], axis=1, dtype=jnp.int32), n_experts - 1)
            row_J = first_row_E[e_J] + (tile_J - (end_E - tiles_E)[e_J]) * size
            row_J = jnp.where(tile_J < end_E[-1], row_J, n_rows - size)
            return add(carry, e_J, row_J[:, None] + jnp.arange(size, dtype=jnp.int32)[None])

        return lax.fori_loop(0, -(-end_E[-1] // J), body, carry)

    for (size, J), tiles_E, first_row_E in zip(tiles, plan.tiles_UE, plan.first_row_UE, strict=True):
        carry = add_all(size, J, tiles_E, first_row_E, carry)
    return carry


def capacity_and_tiles(n_pairs: int, n_experts: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Slots an expert, 1.25 times the mean load, and the tiles: (rows, how many together), largest first.

    Fewer slots send more rows through the slower loops, more compute empty ones. Large tiles multiply faster, small
    ones waste less of the last one of each expert; each size is compiled by itself.
    """
    capacity = max(8, 8 * round(1.25 * n_pairs / n_experts / 8))
    return capacity, ((128, 4), (16, 8)) if n_pairs >= 128 else ((16, 8),)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def experts(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK, capacity, tiles, formats,
            most: int | None = None):
    """Equal to the reference in any split; see `capacity_and_tiles` for the numbers. Returns float32 y_XD.

    most: of pairs that name an expert, where the index E names none.
    """
    return _forward(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK, capacity, tiles, formats, most)[0]


def _if_slots(plan: Plan, compute):
    """compute(), or zeros where the slots are not used."""
    zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(compute))
    return lax.cond(plan.slots_used, compute, lambda: zeros)


def _as_rows(x_EC, n_rows: int):
    """(E, C, ...) as the first rows of the buffer, zeros after them."""
    rows = x_EC.reshape(-1, *x_EC.shape[2:])
    return jnp.pad(rows, ((0, n_rows - rows.shape[0]),) + ((0, 0),) * (rows.ndim - 1))


def _take(rows, index):
    """rows[index], where no index is out of bounds."""
    return rows.at[index].get(mode="promise_in_bounds")


def _write_each(carry, tile_J, write):
    """Folds write(carry, what is of one tile) over tiles computed together: a loop, so that it is compiled once."""
    J = jax.tree.leaves(tile_J)[0].shape[0]
    return lax.fori_loop(0, J, lambda j, carry: write(carry, jax.tree.map(lambda z: z[j], tile_J)), carry)


def _write(buffer, value, row_Z):
    """The rows of a tile are neighbours."""
    return lax.dynamic_update_slice_in_dim(buffer, value.astype(buffer.dtype), row_Z[0], axis=0)


def _product(spec, a, b, dtype):
    """einsum of operands in `dtype`, accumulated and returned in float32."""
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _forward(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK, capacity, tiles, formats, most):
    X = x_XD.shape[0]
    E, K = gate_EDF.shape[0], indices_XK.shape[1]
    product = partial(_product, dtype=formats[0])
    plan = make_plan(indices_XK, E, capacity, tiles, most)
    if most is not None:
        weights_XK = jnp.where(plan.valid_XK, weights_XK, 0)
    token_R = jnp.minimum(plan.pair_R // K, X - 1)  # an empty row computes the last token, nobody reads it

    def in_slots():
        x_ECD = _take(x_XD, token_R[:E * capacity].reshape(E, capacity))
        g_ECF = product("ECD,EDF->ECF", x_ECD, gate_EDF)
        u_ECF = product("ECD,EDF->ECF", x_ECD, up_EDF)
        y_ECD = product("ECF,EFD->ECD", jax.nn.silu(g_ECF) * u_ECF, down_EFD)
        y_RD, g_RF, u_RF = (_as_rows(rows, token_R.size) for rows in (y_ECD, g_ECF, u_ECF))
        return y_RD, g_RF.astype(x_XD.dtype), u_RF.astype(x_XD.dtype)

    def add_tiles(carry, e_J, row_JZ):
        x_JZD = _take(x_XD, _take(token_R, row_JZ))
        g_JZF = product("JZD,JDF->JZF", x_JZD, _take(gate_EDF, e_J))
        u_JZF = product("JZD,JDF->JZF", x_JZD, _take(up_EDF, e_J))
        y_JZD = product("JZF,JFD->JZD", jax.nn.silu(g_JZF) * u_JZF, _take(down_EFD, e_J))

        def write(carry, tile):
            row_Z, *values = tile
            return tuple(_write(rows, value, row_Z) for rows, value in zip(carry, values, strict=True))

        return _write_each(carry, (row_JZ, y_JZD, g_JZF, u_JZF), write)

    y_RD, g_RF, u_RF = _over_tiles(plan, tiles, add_tiles, _if_slots(plan, in_slots))
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


def _backward(capacity, tiles, formats, most, residuals, dy_XD):
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
        x_ECD, dy_ECD = _take(x_XD, token_EC), _take(dy_XD, token_EC)
        da_ECF = input_gradient("ECD,EFD->ECF", dy_ECD, down_EFD)  # of an output not yet weighted
        a_ECF, dweight_EC, dg_ECF, du_ECF = _swiglu_backward(slots(g_RF), slots(u_RF), da_ECF,
                                                             slots(weight_R)[..., None])
        dx_ECD = (input_gradient("ECF,EDF->ECD", dg_ECF, gate_EDF)
                  + input_gradient("ECF,EDF->ECD", du_ECF, up_EDF))
        return (_as_rows(dx_ECD, token_R.size), _as_rows(dweight_EC, token_R.size),
                weight_gradient("ECD,ECF->EDF", x_ECD, dg_ECF), weight_gradient("ECD,ECF->EDF", x_ECD, du_ECF),
                weight_gradient("ECF,ECD->EFD", a_ECF, dy_ECD))

    def add_tiles(carry, e_J, row_JZ):
        g_JZF, u_JZF, token_JZ, pair_weight_JZ = (_take(rows, row_JZ) for rows in (g_RF, u_RF, token_R, weight_R))
        x_JZD, dy_JZD = _take(x_XD, token_JZ), _take(dy_XD, token_JZ)
        da_JZF = input_gradient("JZD,JFD->JZF", dy_JZD, _take(down_EFD, e_J))
        a_JZF, dweight_JZ, dg_JZF, du_JZF = _swiglu_backward(g_JZF, u_JZF, da_JZF, pair_weight_JZ[..., None])
        dx_JZD = (input_gradient("JZF,JDF->JZD", dg_JZF, _take(gate_EDF, e_J))
                  + input_gradient("JZF,JDF->JZD", du_JZF, _take(up_EDF, e_J)))
        dgate_JDF, dup_JDF = (weight_gradient("JZD,JZF->JDF", x_JZD, d_JZF) for d_JZF in (dg_JZF, du_JZF))
        ddown_JFD = weight_gradient("JZF,JZD->JFD", a_JZF, dy_JZD)

        def write(carry, tile):
            row_Z, e, dx_ZD, dweight_Z, *dw = tile
            dx_RD, dweight_R, *weights = carry
            return (_write(dx_RD, dx_ZD, row_Z), _write(dweight_R, dweight_Z, row_Z),
                    *(w.at[e].add(d, mode="promise_in_bounds") for w, d in zip(weights, dw, strict=True)))

        return _write_each(carry, (row_JZ, e_J, dx_JZD, dweight_JZ, dgate_JDF, dup_JDF, ddown_JFD), write)

    dx_RD, dweight_R, dgate_EDF, dup_EDF, ddown_EFD = _over_tiles(plan, tiles, add_tiles, _if_slots(plan, in_slots))
    dx_KXD = (dx_RD[plan.row_XK[:, k]] for k in range(K))
    if most is not None:
        dx_KXD = (jnp.where(plan.valid_XK[:, k, None], dx_XD, 0) for k, dx_XD in enumerate(dx_KXD))
    dx_XD, dweights_XK = sum(dx_KXD).astype(x_XD.dtype), dweight_R[plan.row_XK]
    if most is not None:
        dweights_XK = jnp.where(plan.valid_XK, dweights_XK, 0)
    return dx_XD, dgate_EDF, dup_EDF, ddown_EFD, None, dweights_XK


experts.defvjp(_forward, _backward)
