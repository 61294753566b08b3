"""Bits per byte and multi-token accuracy on held-out text."""

import math
from dataclasses import replace
from functools import partial

import jax
import numpy as np
from absl import logging

from research.accounting.parameters import is_routed_expert
from research.model.balance import load_violation, relative_load
from research.model.build import variable_shapes
from research.parallel import hosts
from research.parallel.placement import fullest, place, slots_of
from research.training.metrics import Progress
from research.training.step import make_eval_step, shardings_of
from research.tree import map_paths, paths


def evaluate(eval_step, state, corpus, settings, batches: int | None = None, bar: bool = False) -> dict:
    """Loss over `batches` evaluation batches of held-out text; None: all of it, every next-token target once.

    The average of the weights is evaluated where there is one. `loss`: nats a target; `bits_per_byte`: over all
    targets, end of text included, for the UTF-8 bytes of the documents (scaled from the part that was read);
    `mtp_accuracy`: share of targets that each depth's likeliest token hits, the text before them given: an upper
    guide to, not a measure of, what drafting accepts. Where there are experts, `expert_load` (L, E) and
    `mtp_expert_load` (M, E): each one's load over all of this text, relative to its layer's mean, and `load_violation`:
    MaxVio of the former, averaged over layers (MaxVio_global of 2408.15664). Where the gate knows groups,
    `groups_a_token` (L,): in how many of them a token's experts lie. With redundant experts, `device_load` (2,): of
    the fullest device of mesh.expert, over the mean, averaged over layers, as experts lie in training and as they lie
    now. bar: say how far it is, as training does.
    """
    params = state["params"] if state["ema"] is None else state["ema"]
    sums = None
    progress = Progress(corpus.validation.targets, 0, bar and hosts.is_first(), "token")
    for batch in corpus.validation_batches(settings, batches):
        part = jax.tree.map(lambda x: np.asarray(x, np.float64), eval_step(params, state["routing"], batch))
        if sums is None and bar and hosts.is_first():  # nothing is said of a request that compiling refuses
            logging.info("evaluates %s bytes held out of config.data.source=%r", f"{corpus.validation_bytes:,}",
                         settings.data.source)
        sums = part if sums is None else jax.tree.map(np.add, sums, part)
        progress.update(int(sums["targets"]), f"loss {sums['nats'] / max(sums['targets'], 1):.3f}")
    progress.close()
    loss = float(sums["nats"] / max(sums["targets"], 1))
    return {
        "loss": loss,
        "bits_per_byte": loss / math.log(2) * corpus.validation.targets / corpus.validation_bytes,
        "mtp_accuracy": (sums["mtp_hits"] / np.maximum(sums["mtp_targets"], 1)).tolist(),
        "targets": int(sums["targets"]),
        **expert_loads(sums["loads"]),
        **groups_a_token(sums, settings.model),
        **device_load(sums, settings.mesh.expert),
    }


def expert_loads(loads) -> dict:
    """The fields of an evaluation's line, the loads in four digits: 16 experts take some 120 bytes a layer."""
    if loads["layers"] is None:
        return {}
    rows = {"expert_load": loads["layers"], "mtp_expert_load": loads["mtp"]}
    return {"load_violation": float(np.mean(load_violation(loads["layers"])))} | {
        name: [np.asarray(relative_load(row), np.float64).round(4).tolist() for row in layers]
        for name, layers in rows.items()}


def groups_a_token(sums, config) -> dict:
    """The field of an evaluation's line. A token is K in the loads of a layer."""
    if "groups" not in sums:
        return {}
    tokens_L = np.sum(sums["loads"]["layers"], axis=-1) / config.num_experts_per_tok
    return {"groups_a_token": (sums["groups"] / tokens_L).round(4).tolist()}


def device_load(sums, n: int) -> dict:
    """The field of an evaluation's line."""
    if "slot_loads" not in sums:
        return {}
    loads = sums["loads"]["layers"], sums["slot_loads"]
    return {"device_load": [round(float(np.mean(fullest(loads_LS, n))), 4) for loads_LS in loads]}


def with_redundant_experts(model, state, corpus, settings):
    """The model with slots of routed experts, and what `evaluate` reads of the state, the slots' weights placed by the
    loads of the first `evaluation.batches` batches. While they are placed, a device has all experts of a layer."""
    wanted = settings.evaluation
    found = evaluate(make_eval_step(model, settings), state, corpus, settings, wanted.batches)
    loads = {"layers": found["expert_load"]} | {
        f"mtp_{k}": load_E for k, load_E in enumerate(found["mtp_expert_load"], start=1)}
    experts = {name: np.apply_along_axis(place, -1, load, wanted.redundant_experts, settings.mesh.expert,
                                         wanted.expert_nodes, settings.model.n_group) for name, load in loads.items()}
    model = model.clone(products=replace(model.products, redundant_experts=wanted.redundant_experts))
    over, before = shardings_of(model, settings), paths(state["routing"])

    def in_slots(path, w):
        if not is_routed_expert(path):
            return w
        experts_S = experts[path.split("/")[0]]
        return w[experts_S] if w.ndim == 3 else jax.lax.map(lambda layer: layer[0][layer[1]], (w, experts_S))

    def of_routing(path, leaf):
        if not path.endswith("/slots"):
            return before[path]
        return np.apply_along_axis(slots_of, -1, experts[path.split("/")[0]], *leaf.shape[-2:])

    params = jax.jit(partial(map_paths, in_slots), out_shardings=over.state["params"])(
        state["params"] if state["ema"] is None else state["ema"])
    routing = map_paths(of_routing, variable_shapes(model, settings)["routing"])
    return model, {"params": params, "routing": jax.device_put(routing, over.state["routing"]), "ema": None}


def on_held_out(model, state, corpus, settings) -> dict:
    """What `summary.of_evaluation` prints: a state's evaluation on all held-out text, and gzip's figure beside it."""
    if settings.evaluation.redundant_experts:
        model, state = with_redundant_experts(model, state, corpus, settings)
    return {"gzip_bits_per_byte": corpus.gzip_bits_per_byte, "held_out_bytes": corpus.validation_bytes,
            "validation": evaluate(make_eval_step(model, settings), state, corpus, settings, None, True)}
