"""Routed experts over a mesh: each device of the axis `expert` holds E/n of them, and tokens go to them and back.

A token is sent once to each device that holds any of its experts, with its choices and gate values; what comes back is
its experts' weighted sum there. Exact and dropless whatever the router does: there is room for the most that can come,
all tokens of the n devices. On a GPU or TPU only the tokens themselves travel (`ragged_all_to_all`); XLA:CPU has no
such exchange, and sends the room. Shared experts are outside. Letters beside the house's: `X` tokens of a device, `n`
devices of the axis, `R` rows that a device can have to send, `Y` rows that can come to it (n X).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels.choice import platform
from research.parallel.rules import BATCH, around


def over_mesh(compute, mesh: Mesh, x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK):
    """`compute` of the same arguments, on the devices of the mesh; X is split over data, fsdp and expert.

    compute(..., expected_pairs=None): see `kernels.experts.experts`. The gradients of weights add up over the devices
    that share them, as the transpose of their being given to each.
    """
    n = mesh.shape["expert"]
    run = partial(exchanged, compute, n) if n > 1 else compute

    def local(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK):
        y_XD = run(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK)
        return lax.psum(y_XD, "tensor") if mesh.shape["tensor"] > 1 else y_XD  # each has a part of F

    tokens, wide = P(BATCH, None), P("expert", None, "tensor")
    in_specs = tokens, wide, wide, P("expert", "tensor", None), tokens, tokens
    # check_vma off: loops inside start from zeros, which would have to be marked as varying over every axis
    return jax.shard_map(local, **around(mesh), in_specs=in_specs, out_specs=tokens, check_vma=False)(
        x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK)


def exchanged(compute, n: int, x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK):
    """The experts of this device's tokens, wherever they are, from within `shard_map`; E counts this device's own."""
    X, E, K = x_XD.shape[0], gate_EDF.shape[0], indices_XK.shape[1]
    there_nXK = indices_XK[None] // E == jnp.arange(n)[:, None, None]
    own_nXK = jnp.where(there_nXK, indices_XK[None] % E, E)  # E names no expert
    first_nXK = jnp.argsort(own_nXK, axis=-1)[..., : min(K, E)]  # a device has no more of a token's choices
    own_nXK, gates_nXK = (jnp.take_along_axis(z, first_nXK, axis=-1)
                          for z in (own_nXK, jnp.where(there_nXK, weights_XK[None], 0)))
    goes_nX = jnp.any(there_nXK, axis=-1)
    exchange = padded if platform() == "cpu" else ragged
    come, back = exchange(n, min(n, K), goes_nX)
    y_YD = compute(come(x_XD, 0), gate_EDF, up_EDF, down_EFD, come(own_nXK, E), come(gates_nXK, 0),
                   expected_pairs=X * K)
    return back(y_YD)


def padded(n: int, most: int, goes_nX):
    """As `ragged`, by `all_to_all` of all tokens to all devices."""
    X = goes_nX.shape[1]
    exchange = partial(lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0, tiled=True)

    def come(z, fill):
        z_nXD = jnp.where(goes_nX[..., None], z if z.ndim == 3 else z[None], fill)
        return exchange(z_nXD).reshape(n * X, -1)

    def back(y_YD):
        return jnp.sum(exchange(y_YD.reshape(n, X, -1)), axis=0)

    return come, back


def ragged(n: int, most: int, goes_nX):
    """The way of this device's tokens to others and back, where goes_nX says which token goes to which device.

    most: to how many devices one token can go. Returns come(z, fill): of z (X, D), or (n, X, D) with a row for each
    device, the rows that come here, (Y, D), and `fill` after them; and back(y_YD): for each token of this device the
    sum of what the devices that it went to made of it, (X, D).
    """
    X = goes_nX.shape[1]
    R, size_n = X * most, jnp.sum(goes_nX, axis=1, dtype=jnp.int32)
    sizes_nn = lax.all_gather(size_n, "expert")  # from, to
    me = lax.axis_index("expert")

    def starts(sizes, axis):
        return jnp.cumsum(sizes, axis=axis) - sizes

    start_n, came_n = starts(size_n, 0), sizes_nn[:, me]
    rank_nX = jnp.cumsum(goes_nX, axis=1, dtype=jnp.int32) - 1
    row_nX = jnp.where(goes_nX, start_n[:, None] + rank_nX, R)
    pair_R = jnp.zeros(R, jnp.int32).at[row_nX.reshape(-1)].set(jnp.arange(n * X, dtype=jnp.int32), mode="drop")
    row_WX = jnp.sort(row_nX, axis=0)[:most]  # of a token's ways, R for those that it does not take

    def come(z, fill):
        z_RD = z[pair_R % X] if z.ndim == 2 else z.reshape(n * X, -1)[pair_R]
        return lax.ragged_all_to_all(z_RD, jnp.full((n * X, z.shape[-1]), fill, z.dtype), start_n, size_n,
                                     starts(sizes_nn, 0)[me], came_n, axis_name="expert")

    def back(y_YD):
        y_RD = lax.ragged_all_to_all(y_YD, jnp.zeros((R, y_YD.shape[1]), y_YD.dtype), starts(came_n, 0), came_n,
                                     starts(sizes_nn, 1)[:, me], size_n, axis_name="expert")
        return sum(jnp.where((row_X < R)[:, None], y_RD[jnp.minimum(row_X, R - 1)], 0) for row_X in row_WX)

    return come, back
