"""One table from the paths of parameters to mesh axes, and what follows from it for the rest of a run's arrays.

    data     a copy of the weights each; moments and averages are split over it all the same (ZeRO-1)
    fsdp     splits every matrix, gathered where it is used
    expert   splits the routed experts, which never move: tokens come to them (experts.py)
    tensor   splits heads, feed-forward widths and the vocabulary

The batch is split over data x fsdp x expert. Activations are placed where `Products.placed` is called, nowhere else.
"""

import re
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research.errors import RequestError

AXES = ("data", "fsdp", "expert", "tensor")
BATCH = ("data", "fsdp", "expert")
RULES = (  # the first that matches a path gives the axes of its last dimensions; none is an error
    (r"/mlp/(gate|up)_proj$", ("expert", "fsdp", "tensor")),  # E D F
    (r"/mlp/down_proj$", ("expert", "tensor", "fsdp")),  # E F D
    (r"(^|/)embed_tokens$", ("tensor", "fsdp")),  # V D
    (r"(^|/)lm_head$", ("fsdp", "tensor")),  # D V
    (r"/(q_a_proj|kv_a_proj_with_mqa|eh_proj|mlp/gate)/kernel$", ("fsdp", None)),  # latents and affinities stay whole
    (r"/(o_proj|down_proj)/kernel$", ("tensor", "fsdp")),
    (r"/kernel$", ("fsdp", "tensor")),
    (r"/(scale|bias)$", (None,)),
    (r"/e_score_correction_bias$", (None,)),
)
SPREAD = ("optimizer", "ema")  # parts of the state that one step reads and writes once


class Shardings(NamedTuple):
    """Of what goes into a step and comes out of it."""

    state: Any  # a tree like the state
    batch: NamedSharding
    whole: NamedSharding  # on every device


def axes_of(path: str, rank: int) -> tuple:
    """The mesh axis (or None) of each dimension of the array at this path; a stack of layers leads with None."""
    for pattern, axes in RULES:
        if re.search(pattern, path):
            return (None,) * (rank - len(axes)) + axes
    raise ValueError(f"no rule of RULES covers {path}")


def check_shapes(shapes, sizes: dict[str, int]) -> None:
    """RequestError for the first parameter that the mesh does not divide. shapes: {`path`: shape and dtype}."""
    for path, leaf in shapes.items():
        for axis, length in zip(axes_of(path, len(leaf.shape)), leaf.shape, strict=True):
            if axis and length % sizes[axis]:
                raise RequestError.field(f"mesh.{axis}", sizes[axis],
                                         f"does not divide the {length} of {path} {tuple(leaf.shape)}")


def spread(axes: tuple, shape: tuple, mesh: Mesh) -> tuple:
    """The axes with `data` beside `fsdp`, where the dimension divides."""
    n = mesh.shape["data"] * mesh.shape["fsdp"]
    return tuple(("fsdp", "data") if axis == "fsdp" and not length % n else axis
                 for axis, length in zip(axes, shape, strict=True))


def shardings(mesh: Mesh, state) -> Shardings:
    """Of a train step over this mesh; state: its shapes."""
    def place(path, leaf):
        names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        if not leaf.shape:  # counts
            return NamedSharding(mesh, P())
        axes = axes_of("/".join(names), len(leaf.shape))
        return NamedSharding(mesh, P(*(spread(axes, leaf.shape, mesh) if names[0] in SPREAD else axes)))

    return Shardings(jax.tree_util.tree_map_with_path(place, state), NamedSharding(mesh, P(BATCH)),
                     NamedSharding(mesh, P()))


def on_own_rows(mesh: Mesh | None, function, *arrays):
    """function(*arrays) of arrays whose first dimension is the batch, each device for its own rows, without gradient.

    For what XLA does not split by itself: it gathers the whole batch for `top_k`.
    """
    if mesh is None:
        return function(*arrays)
    return jax.shard_map(function, mesh=mesh, in_specs=P(BATCH), out_specs=P(BATCH),
                         check_vma=False)(*map(jax.lax.stop_gradient, arrays))


def placed(mesh: Mesh | None, x):
    """An activation whose first dimension is the batch, split over the devices that share it; whole in all others."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(BATCH)))
