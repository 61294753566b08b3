"""One table from the paths of parameters to mesh axes, and what follows from it for the rest of a run's arrays.

    data     a copy of the weights each; moments and averages are split over it all the same (ZeRO-1)
    fsdp     splits every matrix, gathered where it is used, but for the embedding (`looked_up`)
    expert   splits the routed experts, which never move: tokens come to them (experts.py); of the others' moments and
             averages as `data`
    tensor   splits heads, feed-forward widths and the vocabulary
    pipeline splits the stack of layers that a pipeline's stages share (pipeline.py)

The batch is split over data x fsdp x expert. Activations are placed where the embedding is `looked_up` and where
`Products.placed` is called, nowhere else. Decoding has the same weights, and a cache that lies as CACHE says.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research.errors import RequestError

AXES = ("pipeline", "data", "fsdp", "expert", "tensor")  # the first is the one that is spoken over least
BATCH = ("data", "fsdp", "expert")
RULES = (  # the first that matches a path gives the axes of its last dimensions; none is an error
    (r"/mlp/(gate|up)_proj$", ("expert", "fsdp", "tensor")),  # E D F
    (r"/mlp/down_proj$", ("expert", "tensor", "fsdp")),  # E F D
    (r"(^|/)embed_tokens$", ("tensor", "fsdp")),  # V D
    (r"(^|/)lm_head$", ("fsdp", "tensor")),  # D V
    (r"/(q_a_proj|kv_a_proj_with_mqa|eh_proj|mlp/gate)/kernel$", ("fsdp", None)),  # latents and affinities stay whole
    (r"/(o_proj|down_proj)/kernel$", ("tensor", "fsdp")),
    (r"/[kv]_b_proj/kernel$", ("tensor", "fsdp", None)),  # N H R and N R J, the factors that decoding absorbs
    (r"/kernel$", ("fsdp", "tensor")),
    (r"(/scale|/bias|^norm)$", (None,)),
    (r"/e_score_correction_bias$", (None,)),
    (r"/slots$", (None, None)),  # E C, of experts with copies
)
SPREAD = ("optimizer", "ema")  # parts of the state that one step reads and writes once
CACHE = {  # of decoding: the axes of what is kept of each token (B, S, ...); rows are split like the batch
    "latent": (None,), "rope_key": (None,), "key": ("tensor", None), "value": ("tensor", None), "tokens": ()}


class Shardings(NamedTuple):
    """Of what goes into a step and comes out of it."""

    state: Any  # a tree like the state
    batch: NamedSharding
    whole: NamedSharding  # on every device


def shared_stack(names) -> str:
    """Which of the stacks among a model's parameters the stages of a pipeline share: the one with experts, if any."""
    return "layers" if "layers" in names else "dense_layers"


def is_in(stack: str, path: str) -> bool:
    """Whether the array at this path is of this stack of layers."""
    return re.search(rf"(^|/){stack}/", path) is not None


def axes_of(path: str, rank: int, shared: str) -> tuple:
    """The mesh axis (or None) of each dimension of the array at this path; `shared`: the stack that stages share."""
    for pattern, axes in RULES:
        if re.search(pattern, path):
            return ("pipeline" if is_in(shared, path) else None,) * (rank - len(axes)) + axes
    raise ValueError(f"no rule of RULES covers {path}")


def check_shapes(shapes, sizes: dict[str, int]) -> None:
    """RequestError for the first parameter that the mesh does not divide. shapes: {`path`: shape and dtype}."""
    shared = shared_stack({path.split("/")[0] for path in shapes})
    for path, leaf in shapes.items():
        for axis, length in zip(axes_of(path, len(leaf.shape), shared), leaf.shape, strict=True):
            if axis and length % sizes[axis]:
                raise RequestError.field(f"mesh.{axis}", sizes[axis],
                                         f"does not divide the {length} of {path} {tuple(leaf.shape)}")


def spread(axes: tuple, shape: tuple, mesh: Mesh) -> tuple:
    """The axes with others that hold copies beside `fsdp`, `data` and for what is no routed expert's `expert`: those
    that divide the dimension into the most parts."""
    beside = [("fsdp", "data")]
    if "expert" not in axes:
        beside += [("fsdp", "expert"), ("fsdp", "data", "expert")]

    def parts(names):
        return math.prod(mesh.shape[name] for name in names)

    return tuple(max((names for names in beside if not length % parts(names)), key=parts, default=axis)
                 if axis == "fsdp" else axis for axis, length in zip(axes, shape, strict=True))


def shardings(mesh: Mesh, state) -> Shardings:
    """Of a train step over this mesh; state: its shapes."""
    shared = shared_stack(state["params"])

    def place(path, leaf):
        names = _names(path)
        if not leaf.shape:  # counts
            return NamedSharding(mesh, P())
        axes = axes_of("/".join(names), len(leaf.shape), shared)
        return NamedSharding(mesh, P(*(spread(axes, leaf.shape, mesh) if names[0] in SPREAD else axes)))

    return Shardings(jax.tree_util.tree_map_with_path(place, state), NamedSharding(mesh, P(BATCH)),
                     NamedSharding(mesh, P()))


def _names(path) -> list[str]:
    return [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]


def of_decoding(mesh: Mesh, weights):
    """Shardings of weights as decoding reads them; RequestError where the mesh does not divide them."""
    leaves, tree = jax.tree.flatten_with_path(weights)
    leaves = {"/".join(_names(path)): leaf for path, leaf in leaves}
    check_shapes(leaves, mesh.shape)
    return jax.tree.unflatten(tree, [NamedSharding(mesh, P(*axes_of(path, leaf.ndim, "layers")))
                                     for path, leaf in leaves.items()])


def of_generation(mesh: Mesh, state):
    """Of decoding's state: the cache by name, by row what has a row's letter, whole what has not."""
    def place(path, _):
        name = _names(path)[-1]
        if name in CACHE:
            return of_cache(mesh, name)
        return NamedSharding(mesh, P(BATCH) if name.rpartition("_")[2].startswith("B") else P())

    return jax.tree_util.tree_map_with_path(place, state)


def of_cache(mesh: Mesh, name: str) -> NamedSharding:
    """Of what is kept of each token under this name."""
    return NamedSharding(mesh, P(BATCH, None, *CACHE[name]))


def around(mesh: Mesh) -> dict:
    """The mesh and the axes of it that are left, as `jax.shard_map` takes them: within a pipeline one is taken."""
    context = jax.sharding.get_abstract_mesh()
    return {"mesh": context if context.manual_axes else mesh,
            "axis_names": set(mesh.axis_names) - set(context.manual_axes)}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Part:
    """Of an array that all devices of `fsdp` have alike what one of them keeps until all read it again."""

    part: jax.Array  # flat
    shape: tuple[int, ...] = field(metadata={"static": True})


def kept_in_parts(x):
    """x, made of a gathered weight for the backward pass: within `shard_map` this device's `Part`, elsewhere itself."""
    context = jax.sharding.get_abstract_mesh()
    n = context.shape["fsdp"] if "fsdp" in context.manual_axes else 1
    return x if n == 1 else Part(x.reshape(n, -1)[lax.axis_index("fsdp")], x.shape)


def whole_again(x):
    """What `kept_in_parts` was given."""
    return lax.all_gather(x.part, "fsdp", tiled=True).reshape(x.shape) if isinstance(x, Part) else x


def over_rows(mesh: Mesh | None, function, x, *whole):
    """function(x, *whole), each device for its own rows of x, whose first dimension is the batch.

    The gradient of what is whole adds up over the devices, as the transpose of its being given to each.
    """
    if mesh is None:
        return function(x, *whole)
    return jax.shard_map(function, **around(mesh), in_specs=(P(BATCH), *(P() for _ in whole)), out_specs=P(BATCH),
                         check_vma=False)(x, *whole)


def over_cache(mesh: Mesh | None, name: str, function, *arrays):
    """function(*arrays), each device for what it has of the cache under this name; of (B,) for its rows."""
    if mesh is None:
        return function(*arrays)
    held = of_cache(mesh, name).spec
    return jax.shard_map(function, **around(mesh), in_specs=tuple(held if x.ndim > 1 else P(BATCH) for x in arrays),
                         out_specs=held, check_vma=False)(*arrays)


def over_heads(mesh: Mesh | None, function, *arrays):
    """function(*arrays), an attention, each device for its rows and heads: of what has four dimensions the third is
    heads. Returns (B, T, N, ...)."""
    if mesh is None:
        return function(*arrays)
    heads = P(BATCH, None, "tensor")
    return jax.shard_map(function, **around(mesh), in_specs=tuple(heads if x.ndim == 4 else P(BATCH) for x in arrays),
                         out_specs=heads, check_vma=False)(*arrays)


def on_own_rows(mesh: Mesh | None, function, x, *whole):
    """`over_rows` without gradient, for what XLA does not split by itself: it gathers the whole batch for `top_k`."""
    return function(x, *whole) if mesh is None else over_rows(mesh, function, *jax.lax.stop_gradient((x, *whole)))


def placed(mesh: Mesh | None, x, *before):
    """An activation whose first dimension, but for those `before`, is the batch, split over the devices that share it;
    whole in all others."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(around(mesh)["mesh"], P(*before, BATCH)))


def looked_up(mesh: Mesh | None, embed_VD, tokens_BT, dtype):
    """embed_VD[tokens_BT] in this dtype, x_BTD, each device for its own rows.

    Where `fsdp` splits both tokens and columns, devices look up their columns for one another: left to itself XLA gives
    every device the whole batch, or ends in a failed check. Of a vocabulary that `tensor` splits each adds its part.
    """
    if mesh is None:
        return embed_VD[tokens_BT].astype(dtype)

    def local(tokens_BT, embed_VD):
        V = embed_VD.shape[0]
        own_BT = lax.all_gather(tokens_BT, "fsdp", tiled=True) - V * lax.axis_index("tensor")
        x_BTD = jnp.where(((own_BT >= 0) & (own_BT < V))[..., None], embed_VD[jnp.clip(own_BT, 0, V - 1)], 0)
        x_BTD = lax.all_to_all(x_BTD.astype(dtype), "fsdp", split_axis=0, concat_axis=2, tiled=True)
        return lax.psum(x_BTD, "tensor")

    return jax.shard_map(local, **around(mesh), in_specs=(P(BATCH), P("tensor", "fsdp")), out_specs=P(BATCH),
                         check_vma=False)(tokens_BT, embed_VD)
