"""Dropless experts at a cost that does not grow with their number, in plain XLA.

Every expert has C slots, filled with its first C tokens and computed as one batched product. What does not fit is
computed exactly by loops over blocks of rows of one expert, whole large blocks first, then the rest in small ones.
The loops' lengths follow the router, so that a balanced router pays for few blocks. Under a collapsed one, whose slots
would hold less than half of the pairs and be mostly empty, the slots are left out and the loops compute everything.

Letters beside the house's: `X` tokens (B*T), `P` pairs (X*K), `C` slots an expert, `S` slots of all (E*C), `Z` rows
of an overflow block. The backward pass is written by hand so that the movement of rows into and out of slots is a
gather: XLA's transpose of a gather is a scatter, which is serial on a CPU.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Plan(NamedTuple):
    """Where each (token, choice) pair is computed."""

    slots_used: jax.Array  # bool: False leaves all slots empty and their product out
    pair_EC: jax.Array  # pair in each slot, flat index into X*K; X*K where the slot is empty
    slot_XK: jax.Array  # slot of each pair, flat index into E*C; 0 where the pair overflowed
    fits_XK: jax.Array  # whether the pair has a slot
    order_P: jax.Array  # pairs sorted by expert
    start_E: jax.Array  # where each expert's pairs start in `order_P`
    count_E: jax.Array  # pairs of each expert
    skipped_E: tuple[jax.Array, ...]  # for each size of blocks: pairs of an expert that come before them
    block_end_E: tuple[jax.Array, ...]  # for each size of blocks: their cumulated number


def make_plan(indices_XK, n_experts: int, capacity: int, blocks: tuple[int, ...]) -> Plan:
    """Sorts the pairs by expert, stably: the first tokens of the batch get the slots."""
    n_pairs = indices_XK.size
    key_P = jnp.sort(indices_XK.reshape(-1) * n_pairs + jnp.arange(n_pairs, dtype=jnp.int32))
    order_P, expert_P = key_P % n_pairs, key_P // n_pairs
    count_E = jnp.zeros(n_experts, jnp.int32).at[indices_XK.reshape(-1)].add(1)
    start_E = jnp.cumsum(count_E) - count_E
    slots_used = 2 * jnp.sum(jnp.minimum(count_E, capacity)) >= n_pairs
    slot_count_E = jnp.where(slots_used, jnp.minimum(count_E, capacity), 0)
    rank_P = jnp.arange(n_pairs, dtype=jnp.int32) - start_E[expert_P]
    slot_P = jnp.zeros(n_pairs, jnp.int32).at[order_P].set(
        jnp.where(rank_P < slot_count_E[expert_P], expert_P * capacity + rank_P, -1), unique_indices=True)
    column_1C = jnp.arange(capacity, dtype=jnp.int32)[None]
    pair_EC = jnp.where(column_1C < slot_count_E[:, None],
                        order_P[jnp.minimum(start_E[:, None] + column_1C, n_pairs - 1)], n_pairs)
    slot_XK = slot_P.reshape(indices_XK.shape)
    skipped_E, ends_E, done_E = [], [], slot_count_E
    for block in blocks:
        whole = block != blocks[-1]  # only the smallest blocks may be partly filled
        number_E = (count_E - done_E + (0 if whole else block - 1)) // block
        skipped_E.append(done_E)
        ends_E.append(jnp.cumsum(number_E))
        done_E = done_E + number_E * block
    return Plan(slots_used, pair_EC, jnp.maximum(slot_XK, 0), slot_XK >= 0, order_P, start_E, count_E, tuple(skipped_E),
                tuple(ends_E))


def _overflow(plan: Plan, blocks: tuple[int, ...], add, carry):
    """Folds add(carry, expert, pairs_Z, valid_Z) over all overflow blocks; pairs beyond the expert's are invalid."""
    for block, skipped_E, end_E in zip(blocks, plan.skipped_E, plan.block_end_E, strict=True):
        def body(i, carry, block=block, skipped_E=skipped_E, end_E=end_E):
            e = jnp.sum(end_E <= i, dtype=jnp.int32)
            previous = jnp.where(e > 0, end_E[jnp.maximum(e - 1, 0)], 0)
            rank_Z = skipped_E[e] + (i - previous) * block + jnp.arange(block, dtype=jnp.int32)
            pair_Z = plan.order_P[jnp.minimum(plan.start_E[e] + rank_Z, plan.order_P.size - 1)]
            return add(carry, e, pair_Z, rank_Z < plan.count_E[e])

        carry = lax.fori_loop(0, end_E[-1], body, carry)
    return carry


def capacity_and_blocks(n_pairs: int, n_experts: int) -> tuple[int, tuple[int, ...]]:
    """Slots an expert, 1.25 times the mean load, and the sizes of overflow blocks, largest first.

    Fewer slots send more rows through the slower loops, more compute empty ones. Large blocks multiply faster, small
    ones waste less of the last one of each expert.
    """
    mean = n_pairs / n_experts
    small = min(64, max(8, 2 ** round(math.log2(max(mean / 2, 1)))))
    return max(8, 8 * round(1.25 * mean / 8)), (256, small) if n_pairs >= 1024 else (small,)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def experts(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK, capacity, blocks, formats):
    """Equal to the reference in any split; see `capacity_and_blocks` for the two numbers. Returns float32 y_XD."""
    return _forward(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK, capacity, blocks, formats)[0]


def _if_slots(plan: Plan, compute):
    """compute(), or zeros where the slots are not used."""
    zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(compute))
    return lax.cond(plan.slots_used, compute, lambda: zeros)


def _product(spec, a, b, dtype):
    """einsum of operands in `dtype`, accumulated and returned in float32."""
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _forward(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK, capacity, blocks, formats):
    X, D = x_XD.shape
    K = indices_XK.shape[1]
    product = partial(_product, dtype=formats[0])
    plan = make_plan(indices_XK, gate_EDF.shape[0], capacity, blocks)

    def in_slots():
        x_ECD = x_XD[jnp.minimum(plan.pair_EC // K, X - 1)]  # an empty slot computes the last token, nobody reads it
        g_ECF = product("ECD,EDF->ECF", x_ECD, gate_EDF)
        u_ECF = product("ECD,EDF->ECF", x_ECD, up_EDF)
        y_SD = product("ECF,EFD->ECD", jax.nn.silu(g_ECF) * u_ECF, down_EFD).reshape(-1, D)
        weights_fit_XK = jnp.where(plan.fits_XK, weights_XK, 0)
        y_XD = sum(weights_fit_XK[:, k, None] * y_SD[plan.slot_XK[:, k]] for k in range(K))
        return y_XD, g_ECF.astype(x_XD.dtype), u_ECF.astype(x_XD.dtype)

    y_XD, *kept = _if_slots(plan, in_slots)

    def add_block(y_XD, e, pair_Z, valid_Z):
        token_Z = pair_Z // K
        x_ZD = x_XD[token_Z]
        a_ZF = jax.nn.silu(product("ZD,DF->ZF", x_ZD, gate_EDF[e])) * product("ZD,DF->ZF", x_ZD, up_EDF[e])
        weight_Z = jnp.where(valid_Z, weights_XK.reshape(-1)[pair_Z], 0)
        return y_XD.at[token_Z].add(weight_Z[:, None] * product("ZF,FD->ZD", a_ZF, down_EFD[e]))

    y_XD = _overflow(plan, blocks, add_block, y_XD)
    return y_XD, (x_XD, gate_EDF, up_EDF, down_EFD, weights_XK, plan, *kept)


def _swiglu_backward(g, u, da):
    """Gradients of silu(g) * u."""
    s = jax.nn.sigmoid(g)
    return da * u * s * (1 + g * (1 - s)), da * g * s


def _backward(capacity, blocks, formats, residuals, dy_XD):
    x_XD, gate_EDF, up_EDF, down_EFD, weights_XK, plan, kept_g_ECF, kept_u_ECF = residuals
    X, D = x_XD.shape
    K = weights_XK.shape[1]
    forward, input_gradient, weight_gradient = (partial(_product, dtype=dtype) for dtype in formats)
    weight_P = weights_XK.reshape(-1)

    def in_slots():
        g_ECF, u_ECF = kept_g_ECF.astype(jnp.float32), kept_u_ECF.astype(jnp.float32)
        token_EC = jnp.minimum(plan.pair_EC // K, X - 1)
        weight_EC1 = jnp.where(plan.pair_EC < X * K, weight_P[jnp.minimum(plan.pair_EC, X * K - 1)], 0)[..., None]
        x_ECD, dy_ECD = x_XD[token_EC], dy_XD[token_EC]
        a_ECF = jax.nn.silu(g_ECF) * u_ECF
        da_ECF = input_gradient("ECD,EFD->ECF", dy_ECD, down_EFD)  # of an output not yet weighted
        dweight_S = jnp.sum(a_ECF * da_ECF, axis=-1).reshape(-1)
        dg_ECF, du_ECF = _swiglu_backward(g_ECF, u_ECF, da_ECF * weight_EC1)
        ddown_EFD = weight_gradient("ECF,ECD->EFD", a_ECF * weight_EC1, dy_ECD)
        dgate_EDF = weight_gradient("ECD,ECF->EDF", x_ECD, dg_ECF)
        dup_EDF = weight_gradient("ECD,ECF->EDF", x_ECD, du_ECF)
        dx_SD = (input_gradient("ECF,EDF->ECD", dg_ECF, gate_EDF)
                 + input_gradient("ECF,EDF->ECD", du_ECF, up_EDF)).reshape(-1, D)
        dx_XD = sum(jnp.where(plan.fits_XK[:, k, None], dx_SD[plan.slot_XK[:, k]], 0) for k in range(K))
        dweight_XK = jnp.where(plan.fits_XK, dweight_S[plan.slot_XK], 0)
        return dx_XD, dgate_EDF, dup_EDF, ddown_EFD, dweight_XK.reshape(-1)

    def add_block(carry, e, pair_Z, valid_Z):
        dx_XD, dgate_EDF, dup_EDF, ddown_EFD, dweight_P = carry
        token_Z = pair_Z // K
        x_ZD, dy_ZD = x_XD[token_Z], dy_XD[token_Z]
        weight_Z1 = jnp.where(valid_Z, weight_P[pair_Z], 0)[:, None]
        g_ZF, u_ZF = forward("ZD,DF->ZF", x_ZD, gate_EDF[e]), forward("ZD,DF->ZF", x_ZD, up_EDF[e])
        a_ZF = jax.nn.silu(g_ZF) * u_ZF
        da_ZF = input_gradient("ZD,FD->ZF", dy_ZD, down_EFD[e])
        dg_ZF, du_ZF = _swiglu_backward(g_ZF, u_ZF, da_ZF * weight_Z1)
        dx_ZD = input_gradient("ZF,DF->ZD", dg_ZF, gate_EDF[e]) + input_gradient("ZF,DF->ZD", du_ZF, up_EDF[e])
        return (
            dx_XD.at[token_Z].add(dx_ZD),
            dgate_EDF.at[e].add(weight_gradient("ZD,ZF->DF", x_ZD, dg_ZF)),
            dup_EDF.at[e].add(weight_gradient("ZD,ZF->DF", x_ZD, du_ZF)),
            ddown_EFD.at[e].add(weight_gradient("ZF,ZD->FD", a_ZF * weight_Z1, dy_ZD)),
            dweight_P.at[pair_Z].add(jnp.where(valid_Z, jnp.sum(a_ZF * da_ZF, axis=-1), 0)),
        )

    dx_XD, dgate_EDF, dup_EDF, ddown_EFD, dweight_P = _overflow(plan, blocks, add_block, _if_slots(plan, in_slots))
    return dx_XD.astype(x_XD.dtype), dgate_EDF, dup_EDF, ddown_EFD, None, dweight_P.reshape(weights_XK.shape)


experts.defvjp(_forward, _backward)
