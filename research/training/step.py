"""One optimiser step as a pure function of the state and a batch."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from research.errors import RequestError
from research.model.balance import load_violation, update_bias
from research.model.build import init_variables, variable_shapes
from research.model.moe import groups_reached
from research.model.transformer import Transformer, balance_of, block_inputs
from research.parallel import hosts, pipeline
from research.parallel.mesh import compiler_options
from research.parallel.rules import Shardings, placed, shardings
from research.training import schedules
from research.training.losses import mtp_targets, token_losses
from research.training.optimizer import make_optimizer


def init_state(model: Transformer, settings, variables=None):
    """The state of step 0: params, routing (biases), amax (of delayed scaling), optimizer, ema (None when off), step.

    variables: weights to start from, NumPy's or as they lie over the mesh; None: drawn from `training.seed`. On a mesh
    it is split as the rules say.
    """
    if variables is None:
        variables = init_variables(model, settings, settings.training.seed)
    over, placing = shardings_of(model, settings), {}
    if over:
        placing = {"out_shardings": over.state}
    return jax.jit(partial(_first_state, model, settings), **placing)(variables)


def abstract_state(model: Transformer, settings):
    """The state's shapes, dtypes and, on a mesh, shardings; nothing is allocated."""
    state, over = _shapes(model, settings), shardings_of(model, settings)
    if over is None:
        return state
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, over.state)


def abstract_batch(rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch of so many rows."""
    ids_BT = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    names = "tokens_BT", "targets_BT", "segments_BT", "positions_BT"
    return dict.fromkeys(names, ids_BT) | {"mask_BT": jax.ShapeDtypeStruct(ids_BT.shape, bool)}


def shardings_of(model: Transformer, settings) -> Shardings | None:
    """Of a step's arguments and results, by the model's mesh; None on one device."""
    mesh = model.products.mesh
    return None if mesh is None else shardings(mesh, _shapes(model, settings))


def _shapes(model, settings):
    return jax.eval_shape(partial(_first_state, model, settings), variable_shapes(model, settings))


def _first_state(model, settings, variables):
    params = variables["params"]
    return {
        "params": params,
        "routing": variables["routing"],
        "amax": jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variable_shapes(model, settings)["amax"]),
        "optimizer": make_optimizer(settings).init(params),
        "ema": jax.tree.map(jnp.copy, params) if settings.training.ema_decay else None,
        "step": jnp.zeros((), jnp.int32),
    }


def apply_model(model, settings, params, routing, batch, amax=None):
    """Logits and intermediates of a batch, under the config's rule for attention across documents.

    amax: histories of delayed scaling; None or {}: every tensor scales itself.
    """
    variables = {"params": params, "routing": routing} | ({"amax": amax} if amax else {})
    return model.apply(variables, batch["tokens_BT"], *_read(batch, settings))


def _read(batch, settings):
    """What blocks are told of a batch: segments, positions, and whether they attend across documents."""
    return batch["segments_BT"], batch["positions_BT"], not settings.data.mask_documents


def loads_of(routing):
    """What the bias update and the metrics read of `out['routing']`: {`layers`: (L, E) or None, `mtp`: [(E,)]}."""
    return {"layers": None if routing["layers"] is None else routing["layers"]["loads"],
            "mtp": _loads(routing["mtp"])}


def _loads(routings) -> list:
    return [routing["loads"] for routing in routings if routing is not None]


def loss_of(trained, routing, batch, total, pieces: int, weight, model, settings):
    """The loss of one of `pieces` equal parts of a batch with `total` targets; the parts' losses sum to the batch's.

    V3 Eq. 25 with every depth divided by the main loss's number of targets. trained: {`params`, `amax`}; the "gradient"
    of `amax` is its value after the step. Returns (loss, metrics).
    """
    logits_BTV, out = apply_model(model, settings, trained["params"], routing, batch, trained["amax"])
    losses = token_losses((logits_BTV, *out["mtp_logits"]), batch)
    loss, metrics = _joined(*losses, out["balance_loss"], total, pieces, weight)
    return loss, metrics | {"loads": loads_of(out["routing"])}


def _joined(main, deeper, balance, total, pieces, weight):
    """(loss, metrics) of the sums of `token_losses` and the balance loss of a piece."""
    main, deeper, balance = main / total, deeper / total, balance / pieces
    loss = main + balance + (weight * jnp.mean(deeper) if deeper.size else 0)
    return loss, {"loss": loss, "next_token_loss": main, "mtp_loss": deeper, "balance_loss": balance}


def stage_of(model: Transformer, settings, rows: int, total, weight) -> pipeline.Stage:
    """A stage of the model's pipeline on pieces of `rows` rows: the stages' parts of the loss sum to `loss_of`.

    Its metrics: the loads of its own layers, (L, E); and those of `loss_of`, with the loads of multi-token modules.
    """
    part, pieces = model.clone(config=pipeline.of_stage(settings).model), settings.training.accumulation_steps

    def bound(params, routing, batch):
        """What applies a part of the model, and what its blocks read."""
        return partial(part.apply, {"params": params, "routing": routing}), block_inputs(*_read(batch, settings))

    def layers(params, routing, received_BTD, batch, first):
        apply, inputs = bound(params, routing, batch)
        begun_BTD = apply(batch["tokens_BT"], inputs, method="begin")
        return apply(jnp.where(first, begun_BTD, received_BTD), inputs, method="main")

    def forward(*arguments):
        return layers(*arguments)[0]

    def whole(params, routing, received_BTD, batch, first, last):
        passed_BTD, found = layers(params, routing, received_BTD, batch, first)
        # going backward, the layers wait for the gradients of what is behind them: XLA would hold logits' until the end
        end = {name: weights for name, weights in params.items() if not name.endswith("layers")}
        ended_BTD, end = jax.lax.optimization_barrier((passed_BTD, end))
        apply, inputs = bound(end, routing, batch)
        _, out = apply(ended_BTD, batch["tokens_BT"], inputs, method="end")
        losses = token_losses((apply(out, method="logits_together"),), batch)
        ended = *losses, balance_of(*out["routing"]), _loads(out["routing"])
        main, deeper, balance, mtp_loads = jax.tree.map(lambda x: jnp.where(last, x, 0), ended)
        loss, metrics = _joined(main, deeper, balance + balance_of(found), total, pieces, weight)
        return (passed_BTD, loss), (found and found["loads"], (metrics, mtp_loads))

    shape = rows, settings.data.sequence_length, settings.model.hidden_size
    waiting = model.products if settings.training.pipeline_schedule == "zero_bubble" else None
    return pipeline.Stage(jax.ShapeDtypeStruct(shape, model.products.dtype), forward, whole, waiting)


def update_routing(routing, loads, config, speed):
    """The routing collection after a step with these loads of the whole batch."""
    def updated(collection, load):
        return jax.tree.map(lambda bias: update_bias(bias, load, config, speed), collection)

    names = {"layers": loads["layers"]} | {f"mtp_{k}": load for k, load in enumerate(loads["mtp"], start=1)}
    return {name: updated(collection, names[name]) for name, collection in routing.items()}


def make_train_step(model: Transformer, settings, loss=loss_of):
    """(state, batch) -> (state, metrics), compiled; the state's buffers are donated.

    batch: `tokens_BT`, `targets_BT`, `segments_BT`, `positions_BT`, `mask_BT`, and what else `loss` reads, which is as
    `loss_of`; B is a multiple of `training.accumulation_steps`. Metrics: float32 scalars, `mtp_loss` (M,), and
    `load_violation` averaged over layers, with `load_violation_by_layer` and, for the multi-token routers,
    `mtp_load_violation`. RequestError for another loss in a pipeline, and for redundant experts.
    """
    if settings.evaluation.redundant_experts:
        raise RequestError.field("evaluation.redundant_experts", settings.evaluation.redundant_experts,
                                 "must be 0 in training: experts have copies in --mode=eval alone")
    if loss is not loss_of and settings.mesh.pipeline > 1:
        raise RequestError.field("mesh.pipeline", settings.mesh.pipeline,
                                 "must be 1: only pre-training's own loss is computed in stages")
    over = shardings_of(model, settings)
    placing = {"in_shardings": (over.state, over.batch), "out_shardings": (over.state, over.whole)} if over else {}
    optimizer, pieces, steps = make_optimizer(settings), settings.training.accumulation_steps, settings.training.steps
    gradient = jax.value_and_grad(partial(loss, model=model, settings=settings), has_aux=True)

    def accumulate(trained, routing, batch, total, weight):
        if pieces == 1:
            (_, metrics), gradients = gradient(trained, routing, batch, total, 1, weight)
            return gradients, metrics
        parts = jax.tree.map(lambda x: x.reshape(pieces, x.shape[0] // pieces, *x.shape[1:]), batch)
        if settings.mesh.pipeline > 1:
            return in_stages(trained, routing, parts, total, weight)

        def add(carry, part):
            (_, metrics), gradients = gradient(trained, routing, part, total, pieces, weight)
            return jax.tree.map(jnp.add, carry, (gradients, metrics)), None

        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(lambda p: gradient(trained, routing, p, total, pieces, weight), first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[1], shapes[0][1]))
        return jax.lax.scan(add, zeros, parts)[0]

    def in_stages(trained, routing, parts, total, weight):
        mesh, rows = model.products.mesh, parts["tokens_BT"].shape[1]
        parts = jax.tree.map(lambda x: placed(mesh, x, None), parts)
        gradients, (loads, (metrics, mtp_loads)) = pipeline.gradients(
            stage_of(model, settings, rows, total, weight), mesh, trained["params"], routing, parts)
        return {"params": gradients, "amax": {}}, metrics | {"loads": {"layers": loads, "mtp": mtp_loads}}

    @partial(jax.jit, donate_argnums=0, compiler_options=compiler_options(model.products.mesh), **placing)
    def train_step(state, batch):
        step = state["step"] + 1
        total = jnp.maximum(jnp.sum(batch["mask_BT"]), 1).astype(jnp.float32)
        weight = schedules.mtp_loss_weight(step, settings.mtp, steps)
        trained = {"params": state["params"], "amax": state["amax"]}
        gradients, metrics = accumulate(trained, state["routing"], batch, total, weight)
        gradients, amax = gradients["params"], gradients["amax"]
        if over:  # as the weights lie, so that how moments lie says nothing of how gradients come about
            gradients = jax.lax.with_sharding_constraint(gradients, over.state["params"])
        loads = metrics.pop("loads")
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        decay = settings.training.ema_decay
        speed = schedules.bias_update_speed(step, settings.model, steps)
        metrics |= {
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": schedules.learning_rate(step, settings.optimizer, steps),
        }
        if loads["layers"] is not None:
            metrics["load_violation_by_layer"] = load_violation(loads["layers"])
            metrics["load_violation"] = jnp.mean(metrics["load_violation_by_layer"])
            metrics["mtp_load_violation"] = jnp.array([load_violation(load) for load in loads["mtp"]], jnp.float32)
        return {
            "params": params,
            "routing": update_routing(state["routing"], loads, settings.model, speed),
            "amax": amax,
            "optimizer": optimizer_state,
            "ema": jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], params) if decay else None,
            "step": step,
        }, metrics

    return train_step


def make_eval_step(model: Transformer, settings):
    """(params, routing, batch) -> sums over the batch: nats, targets, hits and targets of each depth (M,), what
    `loads_of` gives, where the gate knows groups the `groups` that each layer's tokens reach, (L,), and with redundant
    experts the loads of their slots, (L, S)."""
    over = shardings_of(model, settings)
    # the weights come as they lie: trained ones, or their average, which is split further
    placing = {"in_shardings": (None, over.state["routing"], over.batch), "out_shardings": over.whole} if over else {}

    @partial(jax.jit, **placing)
    def eval_step(params, routing, batch):
        logits_BTV, out = apply_model(model, settings, params, routing, batch)
        nats, _ = token_losses((logits_BTV,), batch)
        hits, counts = [], []
        for k, logits in enumerate(out["mtp_logits"], start=1):
            targets_BT, mask_BT = mtp_targets(batch, k)
            hits.append(jnp.sum((jnp.argmax(logits, axis=-1) == targets_BT) & mask_BT))
            counts.append(jnp.sum(mask_BT))
        more = {}
        if (layers := out["routing"]["layers"]) is not None and settings.model.n_group > 1:
            reached_LBT = groups_reached(layers["indices"], settings.model)
            more["groups"] = jnp.sum(reached_LBT * (batch["segments_BT"] > 0)[None], axis=(1, 2))
        if model.products.redundant_experts:
            more["slot_loads"] = layers["slot_loads"]
        return more | {"nats": nats, "targets": jnp.sum(batch["mask_BT"]), "mtp_hits": jnp.array(hits, jnp.int32),
                "mtp_targets": jnp.array(counts, jnp.int32), "loads": loads_of(out["routing"])}

    return hosts.compiled_by_all(eval_step)
