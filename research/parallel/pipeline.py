"""Stages of layers on the mesh axis `pipeline`: micro-batches pass through them in the ticks of schedules.py.

The stages share one stack of layers, a slice each: the layers with experts, or all layers of a model without.
Embedding and dense layers are the first stage's, head and multi-token modules (which read the embedding too) the last
one's. But one program has the same arrays on all devices, and stages that branch apart wait for ever where XLA
exchanges something among all: so every stage holds what is the first's and the last's, and computes it, in vain if it
is neither. No stage waits longer for that than for one that has it all to do. Micro-batches are the pieces of
`training.accumulation_steps`. Letters beside the house's: `S` stages.

The schedule `zero_bubble` (2401.10241) has the same stages do less in vain. A chunk's gradients of weights depend on
nobody's but its own: they wait until all stages have those of the micro-batch to do, and are no part of the ticks in
which the pipeline fills and drains. All stages do the same in a tick as before, so it holds on every mesh. Two passes
for the halves of a chunk would go twice through its chain (6 forward chunks of work for 4); so the first keeps what the
products of the second multiply (precision/later.py), and nothing is multiplied twice. What it costs is the memory of
those operands, of S + 1 micro-batches, and the time to write and read them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import FrozenConfigDict

from research.errors import RequestError
from research.model.transformer import depths
from research.parallel import schedules
from research.parallel.rules import is_in, placed, shared_stack
from research.precision.later import is_later
from research.precision.products import Products
from research.tree import map_paths, paths


class Stage(NamedTuple):
    """What one stage computes of a micro-batch; `first` and `last` are true on the stage that is."""

    passed: jax.ShapeDtypeStruct  # what goes from stage to stage, (B, T, D) of a micro-batch
    forward: Callable  # (params, routing, received_BTD, batch, first) -> passed_BTD
    whole: Callable  # the same and `last` -> (passed_BTD, its part of the loss), (metrics stacked like layers, summed)
    waiting: Products | None  # whose gradients of weights wait, under `zero_bubble`; None: under `1f1b`


def shared_layers(config) -> int:
    """How many layers the stages share; config: the settings' `model`."""
    dense, rest = depths(config)
    return rest or dense


def check(settings) -> None:
    """RequestError for stages that the layers or the micro-batches do not fill."""
    stages, pieces, layers = settings.mesh.pipeline, settings.training.accumulation_steps, shared_layers(settings.model)
    if layers % stages:
        raise RequestError.field("mesh.pipeline", stages, f"does not divide the {layers} layers" + (
            " with experts; the first stage has the dense ones besides" if depths(settings.model)[1] else ""))
    if stages > 1 and settings.mesh.tensor > 1:
        raise RequestError.field("mesh.tensor", settings.mesh.tensor, f"must be 1 with config.mesh.pipeline={stages}: "
                                 "XLA cannot split what is looked up in the vocabulary both ways within a pipeline")
    if pieces < stages:
        raise RequestError.field("training.accumulation_steps", pieces, f"must be at least config.mesh.pipeline="
                                 f"{stages}: the pieces of a batch are the pipeline's micro-batches")


def of_stage(settings):
    """The settings of one stage alone: its layers, and all that it holds a copy of."""
    shared, all_layers = shared_layers(settings.model), settings.model.num_hidden_layers
    layers = all_layers - shared + shared // settings.mesh.pipeline
    return replace(settings, model=FrozenConfigDict({**settings.model, "num_hidden_layers": layers}),
                   mesh=FrozenConfigDict({**settings.mesh, "pipeline": 1}))


def held(stages: int, pieces: int) -> int:
    """Of how many micro-batches a stage keeps what it has received, at most: those between its forward and its
    backward chunk (schedules.in_step)."""
    return min(pieces, 2 * stages - 1)


def gradients(stage: Stage, mesh: Mesh, params, routing, batches) -> tuple[Any, tuple[Any, Any]]:
    """Of the loss, added up over micro-batches and stages, and the metrics (stacked, summed).

    batches: arrays (micro-batches, B, ...). A stage keeps of a micro-batch on its way what it has received, and nothing
    else: it computes its forward pass again when it goes backward.
    """
    S, number = mesh.shape["pipeline"], jax.tree.leaves(batches)[0].shape[0]
    ticks = tuple(np.array([[-1 if batch is None else batch for batch in row] for row in table], np.int32)
                  for table in (schedules.in_step_apart if stage.waiting else schedules.in_step)(S, number))
    places, shared = held(S, number), shared_stack(params)

    def split(tree):
        return map_paths(lambda path, _: P("pipeline") if is_in(shared, path) else P(), tree)

    def operands_of(tree):
        """{path: (x, dy)} of the weights whose gradients wait."""
        return {path: (x.x, x.dy) for path, x in paths(tree, is_later).items() if is_later(x)}

    def of_batch(x):
        """What stands before the batch of these operands, for `placed`: micro-batches and, of a stack, layers."""
        return (None,) * (x.ndim - 3)

    def local(params, routing, batches):
        at = lax.axis_index("pipeline")
        first, last = at == 0, at == S - 1
        nothing = placed(mesh, jnp.zeros(stage.passed.shape, stage.passed.dtype))

        def part(batch):
            return jax.tree.map(lambda x: x[jnp.maximum(batch, 0)], batches)

        def whole(params, received_BTD, batch):
            return stage.whole(params, routing, received_BTD, part(batch), first, last)

        def sent(x_BTD, pairs):
            return lax.ppermute(placed(mesh, x_BTD), "pipeline", pairs)

        def forward(batch, carry):
            came_BTD, kept = carry["forward"], carry["kept"]
            place = jnp.maximum(batch, 0) % places
            kept = placed(mesh, kept.at[place].set(jnp.where(batch >= 0, came_BTD, kept[place])), None)
            passed_BTD = stage.forward(params, routing, came_BTD, part(batch), first)
            return carry | {"kept": kept, "forward": sent(passed_BTD, to_next)}

        def backward(batch, carry):
            received_BTD = carry["kept"][jnp.maximum(batch, 0) % places]
            (passed_BTD, loss), transpose, metrics = jax.vjp(
                lambda params, received_BTD: whole(params, received_BTD, batch), trained, received_BTD, has_aux=True)
            gradient, d_received_BTD = transpose((carry["backward"], jnp.ones_like(loss)))
            place = jnp.where(batch >= 0, batch % S, S)  # the one behind them is of no batch, and nobody reads it
            operands = jax.tree.map(lambda kept, x: placed(mesh, kept.at[place].set(x), *of_batch(kept)),
                                    carry["operands"], operands_of(gradient))
            more = jax.tree.map(lambda x, sum_: sum_ if is_later(x) else sum_ + jnp.where(batch >= 0, x, 0),
                                (gradient, metrics), carry["sums"], is_leaf=is_later)
            return carry | {"sums": more, "backward": sent(d_received_BTD, to_last), "operands": operands}

        def weights(batch, carry):
            operands, weight = carry["operands"], paths(params)
            gradient, metrics = carry["sums"]

            def added(path, sum_):
                if path not in operands:
                    return sum_
                return sum_ + stage.waiting.weight_gradient(path, weight[path], operands[path], batch % S)

            return carry | {"sums": (map_paths(added, gradient), metrics)}

        def tick(carry, batches_S):
            for direction, batch_S in zip((forward, backward, weights)[:len(ticks)], batches_S, strict=True):
                # the same on all devices: where no stage goes this way, the tick is shorter
                carry = lax.cond(jnp.any(batch_S >= 0), direction, lambda _, carry: carry, batch_S[at], carry)
            return carry, None

        trained = stage.waiting.with_later(params, *stage.passed.shape[:2]) if stage.waiting else params
        to_next = [(s, s + 1) for s in range(S - 1)]
        to_last = [(s + 1, s) for s in range(S - 1)]
        _, metrics = jax.eval_shape(whole, params, nothing, jnp.zeros((), jnp.int32))
        carry = {
            "forward": nothing,  # from the stage before
            "backward": nothing,  # from the stage behind; nothing comes to the last one
            "kept": placed(mesh, jnp.zeros((places, *nothing.shape), nothing.dtype), None),
            "sums": jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (params, metrics)),
            "operands": jax.tree.map(lambda x: jnp.zeros((S + 1, *x.shape), x.dtype), operands_of(trained)),
        }
        gradient, (stacked, summed) = lax.scan(tick, carry, ticks)[0]["sums"]

        def added(path, x):
            return x if is_in(shared, path) else lax.psum(x, "pipeline")

        return map_paths(added, gradient), (stacked, lax.psum(summed, "pipeline"))

    return jax.shard_map(local, mesh=mesh, axis_names={"pipeline"}, in_specs=(split(params), split(routing), P()),
                         out_specs=(split(params), (P("pipeline"), P())), check_vma=False)(params, routing, batches)
