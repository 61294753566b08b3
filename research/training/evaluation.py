"""Bits per byte and multi-token accuracy on held-out text."""

import math

import jax
import numpy as np

from research.data.pipeline import validation_batches


def evaluate(eval_step, state, corpus, settings, batches: int | None = None) -> dict:
    """Loss over `batches` evaluation batches of held-out text; None: all of it, every next-token target once.

    The average of the weights is evaluated where there is one. `loss`: nats a target; `bits_per_byte`: over all
    targets, end of text included, for the UTF-8 bytes of the documents (scaled from the part that was read);
    `mtp_accuracy`: share of targets that each depth's likeliest token hits, the text before them given: an upper
    guide to, not a measure of, what drafting accepts.
    """
    params = state["params"] if state["ema"] is None else state["ema"]
    sums = None
    for batch in validation_batches(corpus, settings, batches):
        part = jax.tree.map(lambda x: np.asarray(x, np.float64), eval_step(params, state["routing"], batch))
        sums = part if sums is None else jax.tree.map(np.add, sums, part)
    loss = float(sums["nats"] / max(sums["targets"], 1))
    return {
        "loss": loss,
        "bits_per_byte": loss / math.log(2) * corpus.validation.targets / corpus.validation_bytes,
        "mtp_accuracy": (sums["mtp_hits"] / np.maximum(sums["mtp_targets"], 1)).tolist(),
        "targets": int(sums["targets"]),
    }
