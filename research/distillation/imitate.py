"""A student that imitates a teacher's distributions: what is stored of them by row, and the loss that reads it."""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.distillation.finetune import Examples
from research.distillation.logits import divergence_from_top, keep_top
from research.files import write_whole
from research.model.transformer import balance_of
from research.training.losses import token_losses
from research.training.step import apply_model, loads_of

_NAMES = ("ids_BTk", "logp_BTk", "rest_BT")  # of logits.keep_top


def store(folder: Path, examples: Examples, model, settings, variables, config: Any, rows: int, whose: str) -> dict:
    """The teacher's likeliest tokens at every position of the examples' rows, in `folder`: arrays mapped from disk.

    model, settings, variables: the teacher's; config: `top_k` and `temperature`; rows: of a pass; whose: what tells
    this teacher from others. A killed run is continued behind the rows that are done.
    """
    length = settings.data.sequence_length
    total, k = examples.rows.rows, min(config.top_k, settings.model.vocab_size)
    identity = hashlib.blake2b(json.dumps([examples.corpus_hash, examples.tokenizer.hash, whose, k, config.temperature,
                                           length, total]).encode(), digest_size=16).hexdigest()
    shapes = {"ids_BTk": (np.int32, (total, length, k)), "logp_BTk": (np.float32, (total, length, k)),
              "rest_BT": (np.float32, (total, length))}
    folder.mkdir(parents=True, exist_ok=True)
    done, progress = 0, folder / "progress.json"
    if progress.exists():
        told = json.loads(progress.read_bytes())
        done = told["rows"] if told["identity"] == identity else 0
    arrays = {name: np.lib.format.open_memmap(folder / f"{name}.npy", "r+" if done else "w+", dtype, shape)
              for name, (dtype, shape) in shapes.items()}
    score = jax.jit(partial(_kept, model=model, settings=settings, k=k, temperature=config.temperature))
    while done < total:
        found = score(variables, examples.rows.of(range(done, done + rows)))
        end = min(done + rows, total)
        for name, array in arrays.items():
            array[done:end] = np.asarray(found[name])[:end - done]
            array.flush()
        done = end
        write_whole(progress, json.dumps({"identity": identity, "rows": done}))
    return arrays


def _kept(variables, batch, *, model, settings, k: int, temperature: float):
    logits_BTV, _ = apply_model(model, settings, variables["params"], variables["routing"], batch)
    return keep_top(logits_BTV, k, temperature)


def imitation_loss(trained, routing, batch, total, pieces: int, weight, model, settings, *, logits):
    """As `training.step.loss_of`: the divergence from what `store` kept; `next_token_loss` is a metric alone."""
    logits_BTV, out = apply_model(model, settings, trained["params"], routing, batch, trained["amax"])
    share = jnp.sum(batch["mask_BT"]) / total
    divergence = share * divergence_from_top(logits_BTV, {name: batch[name] for name in _NAMES}, batch["mask_BT"],
                                             direction=logits.direction, beta=logits.beta,
                                             temperature=logits.temperature)
    balance = balance_of(out["routing"]["layers"]) / pieces  # nothing here is for the multi-token modules to learn
    main, _ = token_losses((logits_BTV,), batch)
    loss = divergence + balance
    return loss, {"loss": loss, "divergence": divergence, "next_token_loss": main / total, "balance_loss": balance,
                  "loads": loads_of(out["routing"])}
