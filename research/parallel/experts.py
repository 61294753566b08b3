"""Routed experts over a mesh: each device of the axis `expert` holds E/n of them, and tokens go to them and back.

A token is sent once to each device that holds any of its experts, with its choices and gate values; what comes back is
its experts' weighted sum there. Exact and dropless whatever the router does: the exchange is padded to the most that
can come, all tokens of the n devices. Shared experts are outside. Letters beside the house's: `X` tokens of a device,
`n` devices of the axis.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from research.parallel.rules import BATCH


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
    # check_vma off: loops inside start from zeros, which would have to be marked as varying over every axis
    return jax.shard_map(local, mesh=mesh, in_specs=(tokens, wide, wide, P("expert", "tensor", None), tokens, tokens),
                         out_specs=tokens, check_vma=False)(x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK)


def exchanged(compute, n: int, x_XD, gate_EDF, up_EDF, down_EFD, indices_XK, weights_XK):
    """The experts of this device's tokens, wherever they are, from within `shard_map`; E counts this device's own."""
    (X, D), (E, *_), K = x_XD.shape, gate_EDF.shape, indices_XK.shape[1]
    exchange = partial(lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0, tiled=True)
    there_nXK = indices_XK[None] // E == jnp.arange(n)[:, None, None]
    own_nXK = jnp.where(there_nXK, indices_XK[None] % E, E)  # E names no expert
    first_nXK = jnp.argsort(own_nXK, axis=-1)[..., : min(K, E)]  # a device has no more of a token's choices
    own_nXK, gates_nXK = (jnp.take_along_axis(z, first_nXK, axis=-1)
                          for z in (own_nXK, jnp.where(there_nXK, weights_XK[None], 0)))
    sent_nXD = jnp.where(jnp.any(there_nXK, axis=-1)[..., None], x_XD[None], 0)
    came_XD, came_XK, came_gates_XK = (exchange(z).reshape(n * X, -1) for z in (sent_nXD, own_nXK, gates_nXK))
    y_XD = compute(came_XD, gate_EDF, up_EDF, down_EFD, came_XK, came_gates_XK, expected_pairs=X * K)
    return jnp.sum(exchange(y_XD.reshape(n, X, D)), axis=0)
