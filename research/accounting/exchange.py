"""What V3's expert parallelism sends from node to node, and what node-limited routing saves of it (V3 §2.1.2, §3.2.2).

A group of its gate is a node: the group's experts lie on that node's devices, and a token crosses the network once for
each other node that holds any of its experts (from there on NVLink carries it), in FP8. Its own node costs nothing; the
multi-token module's layer is not counted. Training here (parallel/experts.py) sends it once for each device, in the
bits of its recipe: `of_mesh`.
"""

import math

import jax
import jax.numpy as jnp

from research.accounting.parameters import shapes
from research.model import moe
from research.model.build import make_model
from research.parallel.mesh import abstract_mesh
from research.parallel.rules import BATCH, axes_of, shared_stack, spread

THERE, BACK = 1 + 4 / 128, 2  # bytes of an entry: FP8 with a float32 scale for 128, and bfloat16 (V3 §3.3)
DRAWS = 4096  # of tokens: the mean is right to a thousandth


def other_nodes(model) -> dict[str, dict[str, float]]:
    """To how many of the `n_group` nodes besides its own a token goes: `limited` as the gate chooses, to `topk_group`
    of them, and `free`, with its K experts anywhere. The `most` that any router can send it to, and the `mean` of a
    random one: affinities are independent, limited drawn, and its own node is any."""
    E, K, G = model.n_routed_experts, model.num_experts_per_tok, model.n_group
    affinity_XE = jax.nn.sigmoid(jax.random.normal(jax.random.key(0), (DRAWS, E)))
    chosen = moe.groups_reached(moe.choose_experts(affinity_XE, None, model), model)
    missed = math.comb(E - E // G, K) / math.comb(E, K)  # the chance that a node has none of any K experts
    return {limit: {"most": min(nodes, K, G - 1), "mean": reached * (1 - 1 / G)} for limit, nodes, reached in (
        ("limited", model.topk_group, float(jnp.mean(chosen))), ("free", G, G * (1 - missed)))}


def bytes_a_token(model, nodes: float) -> float:
    """That a training step sends for each token of one layer to so many nodes: forward, there and back, and as much
    for the gradients."""
    return 2 * nodes * model.hidden_size * (THERE + BACK)


def account(model) -> dict:
    """`nodes`: `other_nodes`; `bytes`, alike: that the main model's layers make a token send in training; {} for
    another gate than V3's (V2's groups are devices), or where it knows no groups."""
    if not model.n_routed_experts or model.topk_method != "noaux_tc" or model.n_group == 1:
        return {}
    nodes, layers = other_nodes(model), model.num_hidden_layers - model.first_k_dense_replace
    return {"nodes": nodes, "bytes": {
        limit: {name: layers * bytes_a_token(model, number) for name, number in of.items()}
        for limit, of in nodes.items()}}


def of_mesh(settings) -> dict:
    """The same of `mesh.expert` as it trains where only the tokens themselves travel (on a GPU): to how many `devices`
    at most, its own among them, and `bytes`, without choices and gate values and what is sent again where a layer is
    computed again. {} without that axis."""
    if settings.mesh.expert == 1:
        return {}
    m, products = settings.model, make_model(settings).products
    row, back = jax.ShapeDtypeStruct((1, m.hidden_size), products.dtype), m.hidden_size * products.dtype.itemsize
    there = sum(jax.eval_shape(packing.packed, row).size if packing else back for packing in products.packings)
    devices, layers = min(settings.mesh.expert, m.num_experts_per_tok), m.num_hidden_layers - m.first_k_dense_replace
    return {"devices": devices, "bytes": layers * devices * (there + 2 * back)}


def of_step(settings) -> float:
    """Bytes that a device of the settings' mesh has in the end of all that it must exchange in a training step, as
    `parallel.overlap` counts them in a compiled program; for a batch in one piece, or in those of a pipeline.

    Of weights, in float32: the sums of gradients, whole; what `fsdp` splits, gathered forward and backward; the new
    ones, where moments are split further. Of activations: what `of_mesh` says; by `tensor` two sums a block forward and
    two backward (1909.08053), one for each reading of embedding and head; by `pipeline` one to each neighbour a tick.
    """
    mesh = abstract_mesh(settings)
    if mesh is None:
        return 0.0
    sizes, m, pieces = mesh.shape, settings.model, settings.training.accumulation_steps
    weights, found = shapes(settings), 0.0
    shared = shared_stack({path.split("/")[0] for path in weights})

    def parts(axes):
        return math.prod(sizes[axis] for axes_of_one in axes if axes_of_one
                         for axis in ([axes_of_one] if isinstance(axes_of_one, str) else axes_of_one))

    for path, leaf in weights.items():
        axes = axes_of(path, len(leaf.shape), shared)
        size = 4 * leaf.size / parts(axis for axis in axes if axis != "fsdp")
        copies = parts([BATCH]) / parts(axis for axis in axes if axis in BATCH and axis != "fsdp")
        summed = copies > 1 or (sizes["pipeline"] > 1 and "pipeline" not in axes)
        gathered = sizes["fsdp"] > 1 and "fsdp" in axes and path != "embed_tokens"
        renewed = parts(spread(axes, leaf.shape, mesh)) > parts(axes)
        found += size * (summed + 2 * gathered + renewed)
    tokens = settings.training.batch_size * settings.data.sequence_length / parts([BATCH])
    x, M = tokens * m.hidden_size * make_model(settings).products.dtype.itemsize, settings.mtp.num_nextn_predict_layers
    if sizes["expert"] > 1:
        layers = m.num_hidden_layers - m.first_k_dense_replace
        found += tokens * of_mesh(settings)["bytes"] * (layers + M) / layers
    if sizes["tensor"] > 1:
        found += x * (4 * (m.num_hidden_layers + M) + 2 * (1 + M))
    if (S := sizes["pipeline"]) > 1:
        found += 2 * (pieces + 2 * (S - 1)) * x / pieces
    return found
