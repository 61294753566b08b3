"""Routed experts over a mesh: each device of the axis `expert` holds E/n of them, and tokens go to them and back.

A token is sent once to each device that holds any of its experts, with its choices and gate values; what comes back is
its experts' weighted sum there. Dropless whatever the router does, in the memory of a device that is given: what a
device has no room for comes in further rounds, as many as the fullest device needs. Exact, but that of a token whose
devices take it in different rounds 16-bit sums round in another order, and tiles of 128 rows are of one round. On a GPU
or TPU only the tokens themselves travel (`ragged_all_to_all`); XLA:CPU has no such exchange, and sends all tokens to
all devices. Shared experts are outside. Letters beside the house's: `X` tokens of a device, `n` devices of the axis,
`k` of a token's choices that one device can have, `W` ways of a token, to a device each, `R` rows that a device can
have to send, `Y` rows that it has room for.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels.choice import platform
from research.parallel.rules import BATCH, around


def over_mesh(compute, mesh: Mesh, room: float, packings, x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK):
    """`compute` of the same arguments, on the devices of the mesh; X is split over data, fsdp and expert.

    compute(..., pairs=None): see `kernels.experts.experts`. room: of a device for pairs of a token and an expert, times
    what a balanced router sends there. packings: how tokens, and gradients, travel to their experts, each a
    `precision.quantize.Packing`, or None: as they are; what comes back is not packed (V3 §3.3.3). The gradients of
    weights add up over the devices that share them, as the transpose of their being given to each.
    """
    n = mesh.shape["expert"]
    run = partial(exchanged, compute, n, room, packings) if n > 1 else compute

    def local(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK):
        y_XD = run(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK)
        return lax.psum(y_XD, "tensor") if mesh.shape["tensor"] > 1 else y_XD  # each has a part of F

    tokens, wide = P(BATCH, None), P("expert", None, "tensor")
    in_specs = tokens, wide, wide, P("expert", "tensor", None), tokens, tokens
    # check_vma off: loops inside start from zeros, which would have to be marked as varying over every axis
    return jax.shard_map(local, **around(mesh), in_specs=in_specs, out_specs=tokens, check_vma=False)(
        x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK)


def window_and_pairs(n: int, room: float, X: int, K: int, E: int) -> tuple[int, int]:
    """Of a device with E experts: a round takes the tokens whose pairs begin in a window of so many; and for how many
    pairs there is room, since the last of those tokens may end behind it, up to all that can come."""
    window, k = math.ceil(room * X * K), min(K, E)
    return window, min(window + k - 1, n * X * k)


def round_of(size_nX, earlier_n, window: int):
    """In which round each token goes to each device, -1: in none. size_nX: its pairs there; earlier_n: of each device
    the pairs that other devices before this one send there."""
    return jnp.where(size_nX > 0, (earlier_n[:, None] + _starts(size_nX, 1)) // window, -1)


def exchanged(compute, n: int, room: float, packings, x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK):
    """The experts of this device's tokens, wherever they are, from within `shard_map`; E counts this device's own."""
    X, E, K = x_XD.shape[0], gate_EDF.shape[0], indices_XK.shape[1]
    there_nXK = indices_XK[None] // E == jnp.arange(n)[:, None, None]
    own_nXK, k = jnp.where(there_nXK, indices_XK[None] % E, E), min(K, E)  # E names no expert
    first_nXK = jnp.argsort(own_nXK, axis=-1)[..., :k]
    own_nXk, gates_nXk = (jnp.take_along_axis(z, first_nXK, axis=-1)
                          for z in (own_nXK, jnp.where(there_nXK, weights_XK[None], 0)))
    size_nX = jnp.sum(there_nXK, axis=-1, dtype=jnp.int32)
    window, pairs = window_and_pairs(n, room, X, K, E)
    one_round = partial(_one_round, partial(compute, pairs=(X * K, pairs)), min(n, K), min(pairs, n * X),
                        packings)
    operands = x_XD, gates_nXk, gate_EDF, up_EDF, down_EFD
    if pairs == n * X * k:
        return one_round(own_nXk, size_nX > 0, *operands)
    sizes_nn = lax.all_gather(jnp.sum(size_nX, axis=1), "expert")  # pairs from, to
    round_nX = round_of(size_nX, _starts(sizes_nn, 0)[lax.axis_index("expert")], window)
    rounds = lax.pmax(-(-jnp.max(jnp.sum(sizes_nn, axis=0)) // window), "fsdp")  # whose devices exchange in each round
    return _in_rounds(one_round, rounds, own_nXk, round_nX, operands)


def _starts(sizes, axis: int):
    """Where each of these begins, one after another."""
    return jnp.cumsum(sizes, axis=axis) - sizes


def _one_round(compute, W: int, Y: int, packings, own_nXk, goes_nX, x_XD, gates_nXk, gate_EDF, up_EDF, down_EFD):
    """What the tokens that go in this round get."""
    exchange = Padded if platform() == "cpu" else Ragged
    way = exchange.of(W, goes_nX)
    y_YD = compute(_come(exchange, Y, packings[0], way, x_XD), gate_EDF, up_EDF, down_EFD,
                   exchange.come(way, Y, own_nXk, gate_EDF.shape[0]), exchange.come(way, Y, gates_nXk, 0))
    return _back(exchange, Y, packings[1], way, y_YD)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _come(exchange, Y: int, packing, way, x_XD):
    """`exchange.come` of tokens. Its transpose is `_back`: of rows to which none has come the gradient is zero."""
    if packing is None:
        return exchange.come(way, Y, x_XD, 0)
    return packing.unpacked(exchange.come(way, Y, packing.packed(x_XD), 0), x_XD)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _back(exchange, Y: int, packing, way, y_YD):
    """`exchange.back` of rows, of which those to which no token has come are zero. Its transpose is `_come`, with this
    packing."""
    return exchange.back(way, y_YD)


_come.defvjp(lambda exchange, Y, packing, way, x_XD: (_come(exchange, Y, packing, way, x_XD), way),
             lambda exchange, Y, packing, way, dx_YD: (None, _back(exchange, Y, packing, way, dx_YD)))
_back.defvjp(lambda exchange, Y, packing, way, y_YD: (_back(exchange, Y, packing, way, y_YD), way),
             lambda exchange, Y, packing, way, dy_XD: (None, _come(exchange, Y, packing, way, dy_XD)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_rounds(one_round, rounds, own_nXk, round_nX, operands):
    """The sum of one_round(own_nXk, goes_nX, *operands) over the rounds; round_nX: in which each token goes, -1: none.

    The first, the only one of a router that is balanced well enough, keeps what its backward pass needs. The others,
    whose number is known when they run, are computed again there.
    """
    return _rounds_forward(one_round, rounds, own_nXk, round_nX, operands)[0]


def _rounds_forward(one_round, rounds, own_nXk, round_nX, operands):
    y_XD, back = jax.vjp(partial(one_round, own_nXk, round_nX == 0), *operands)
    y_XD = lax.fori_loop(1, rounds, lambda r, y_XD: y_XD + one_round(own_nXk, round_nX == r, *operands), y_XD)
    return y_XD, (back, rounds, own_nXk, round_nX, operands)


def _rounds_backward(one_round, kept, dy_XD):
    back, rounds, own_nXk, round_nX, operands = kept

    def add(r, gradients):
        again = jax.vjp(partial(one_round, own_nXk, round_nX == r), *operands)[1](dy_XD)
        return jax.tree.map(jnp.add, gradients, again)

    return None, None, None, lax.fori_loop(1, rounds, add, back(dy_XD))


_in_rounds.defvjp(_rounds_forward, _rounds_backward)


class Padded(NamedTuple):
    """As `Ragged`, by `all_to_all` of all tokens to all devices."""

    goes_nX: jax.Array
    came_X: jax.Array  # of all tokens of the n devices

    @classmethod
    def of(cls, W: int, goes_nX):
        return cls(goes_nX, _to_all(goes_nX).reshape(-1))

    def rows(self, Y: int):
        return jnp.argsort(~self.came_X, stable=True)[:Y]

    def come(self, Y: int, z, fill):
        z_nXD = jnp.where(self.goes_nX[..., None], z if z.ndim == 3 else z[None], fill)
        return _to_all(z_nXD).reshape(self.came_X.size, -1)[self.rows(Y)]

    def back(self, y_YD):
        y_XD = jnp.zeros((self.came_X.size, y_YD.shape[1]), y_YD.dtype)
        y_XD = y_XD.at[self.rows(len(y_YD))].set(y_YD, unique_indices=True)
        return jnp.sum(_to_all(y_XD.reshape(*self.goes_nX.shape, -1)), axis=0)


def _to_all(z_nXD):
    return lax.all_to_all(z_nXD, "expert", split_axis=0, concat_axis=0, tiled=True)


class Ragged(NamedTuple):
    """The way of this device's tokens to others and back."""

    pair_R: jax.Array  # what is sent, device by device: flat index into n*X
    row_WX: jax.Array  # of R, for each of a token's ways; R for those that it does not take
    sizes_nn: jax.Array  # rows from, to

    @classmethod
    def of(cls, W: int, goes_nX):
        """goes_nX: which token goes to which device."""
        n, X = goes_nX.shape
        R, size_n = X * W, jnp.sum(goes_nX, axis=1, dtype=jnp.int32)
        rank_nX = jnp.cumsum(goes_nX, axis=1, dtype=jnp.int32) - 1
        row_nX = jnp.where(goes_nX, _starts(size_n, 0)[:, None] + rank_nX, R)
        pair_R = jnp.zeros(R, jnp.int32).at[row_nX.reshape(-1)].set(jnp.arange(n * X, dtype=jnp.int32), mode="drop")
        return cls(pair_R, jnp.sort(row_nX, axis=0)[:W], lax.all_gather(size_n, "expert"))

    def come(self, Y: int, z, fill):
        """Of z (X, D), or (n, X, D) with a row for each device: the rows that come here and `fill` after them, (Y, D).
        """
        me, X = lax.axis_index("expert"), self.row_WX.shape[1]
        z_RD = z[self.pair_R % X] if z.ndim == 2 else z.reshape(-1, z.shape[-1])[self.pair_R]
        return lax.ragged_all_to_all(z_RD, jnp.full((Y, z.shape[-1]), fill, z.dtype), _starts(self.sizes_nn[me], 0),
                                     self.sizes_nn[me], _starts(self.sizes_nn, 0)[me], self.sizes_nn[:, me],
                                     axis_name="expert")

    def back(self, y_YD):
        """For each token of this device the sum of what the devices that it went to made of it, (X, D)."""
        me, R = lax.axis_index("expert"), self.pair_R.size
        came_n = self.sizes_nn[:, me]
        y_RD = lax.ragged_all_to_all(y_YD, jnp.zeros((R, y_YD.shape[1]), y_YD.dtype), _starts(came_n, 0), came_n,
                                     _starts(self.sizes_nn, 1)[:, me], self.sizes_nn[me], axis_name="expert")
        return sum(jnp.where((row_X < R)[:, None], y_RD[jnp.minimum(row_X, R - 1)], 0) for row_X in self.row_WX)
