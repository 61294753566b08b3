"""Bits per byte and multi-token accuracy on held-out text."""

import math
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from research import environment
from research.data.pipeline import load_corpus
from research.data.tokenizer import Tokenizer
from research.errors import RequestError
from research.interop.weights import read_weights, variables_of
from research.model.balance import load_violation, relative_load
from research.model.build import make_model
from research.parallel import hosts
from research.parallel.mesh import make_mesh
from research.training.step import make_eval_step


def evaluate(eval_step, state, corpus, settings, batches: int | None = None, bar: bool = False) -> dict:
    """Loss over `batches` evaluation batches of held-out text; None: all of it, every next-token target once.

    The average of the weights is evaluated where there is one. `loss`: nats a target; `bits_per_byte`: over all
    targets, end of text included, for the UTF-8 bytes of the documents (scaled from the part that was read);
    `mtp_accuracy`: share of targets that each depth's likeliest token hits, the text before them given: an upper
    guide to, not a measure of, what drafting accepts. Where there are experts, `expert_load` (L, E) and
    `mtp_expert_load` (M, E): each one's load over all of this text, relative to its layer's mean, and `load_violation`:
    MaxVio of the former, averaged over layers (MaxVio_global of 2408.15664). Where the gate knows groups,
    `groups_a_token` (L,): in how many of them a token's experts lie. bar: show on a terminal how far it is.
    """
    params = state["params"] if state["ema"] is None else state["ema"]
    sums = None
    shown = None if bar and hosts.is_first() else True
    with tqdm(total=corpus.validation.targets, unit=" tokens", disable=shown) as progress:
        for batch in corpus.validation_batches(settings, batches):
            part = jax.tree.map(lambda x: np.asarray(x, np.float64), eval_step(params, state["routing"], batch))
            sums = part if sums is None else jax.tree.map(np.add, sums, part)
            progress.update(int(part["targets"]))
    loss = float(sums["nats"] / max(sums["targets"], 1))
    return {
        "loss": loss,
        "bits_per_byte": loss / math.log(2) * corpus.validation.targets / corpus.validation_bytes,
        "mtp_accuracy": (sums["mtp_hits"] / np.maximum(sums["mtp_targets"], 1)).tolist(),
        "targets": int(sums["targets"]),
        **expert_loads(sums["loads"]),
        **groups_a_token(sums, settings.model),
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


@environment.runnable()
def evaluate_weights(settings, folder: Path) -> dict:
    """Evaluates a Hugging Face folder, or what research.convert wrote, on the text that `settings.data` holds out.

    Writes nothing. Tokens are those of the folder's own tokenizer.json. Raises RequestError.
    """
    if hosts.several():
        raise RequestError(f"--workdir={folder} holds weights alone, which one process evaluates")
    corpus = load_corpus(settings, Tokenizer.load(folder))
    model = make_model(settings, make_mesh(settings))
    variables, wrong = variables_of(read_weights(folder)[1], model, settings)
    if wrong:
        raise RequestError(f"--workdir={folder} holds another model: {wrong}")
    environment.pin_threads()
    return on_held_out(model, jax.device_put(variables) | {"ema": None}, corpus, settings, True)


def on_held_out(model, state, corpus, settings, bar: bool = False) -> dict:
    """What `summary.of_evaluation` prints: a state's evaluation on all held-out text, and gzip's figure beside it."""
    return {"gzip_bits_per_byte": corpus.gzip_bits_per_byte, "held_out_bytes": corpus.validation_bytes,
            "validation": evaluate(make_eval_step(model, settings), state, corpus, settings, None, bar)}
