"""On-policy distillation (2306.13649, lambda = 1): a student's own samples, at every position of which it is told what
its teacher would say.

In order: `Teacher` scores what the student drew (rollouts.py); `on_policy_loss` is what the loop minimises. Gradients
go through the student's distributions, not through its draws, as in that paper. (Thinking Machines' form, not here, has
log(teacher / student) of the tokens drawn as their rewards: an estimate of the same reverse divergence.)
"""

import hashlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.accounting import flops
from research.data.packing import Batch
from research.distillation import rollouts
from research.distillation.logits import divergence
from research.model.transformer import balance_of
from research.training.step import apply_model, loads_of
from research.tree import paths


class Teacher:
    """A model in memory, whose logits at all positions of a batch's rows go with it."""

    def __init__(self, model: Any, settings: Any, variables: dict, parts: int):
        """model, settings, variables: as checked_weights gives them; parts: see rollouts.in_parts."""
        digest = hashlib.blake2b(digest_size=16)
        for name, leaf in sorted(paths(variables).items()):
            digest.update(name.encode() + np.asarray(leaf).tobytes())
        self.settings, self.parts, self.source = settings, parts, {"teacher": digest.hexdigest()}
        self._variables = jax.device_put(variables)
        self._logits = jax.jit(partial(_logits, model=model, settings=settings))

    def begin(self, model: Any, settings: Any, variables: dict) -> None:
        """As rollouts.Scoring: a teacher does not change."""

    def scored(self, number: int, policy: dict, batch: Batch) -> Batch:
        """`teacher_BTV`, float32."""
        return {"teacher_BTV": rollouts.in_parts(self._logits, self._variables, batch, self.parts)}

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of scoring one."""
        return flops.inference(self.settings)["prefill_causal"]


def _logits(variables, batch, *, model, settings):
    logits_BTV, _ = apply_model(model, settings, variables["params"], variables["routing"], batch)
    return logits_BTV.astype(jnp.float32)


def on_policy_loss(trained, routing, batch, total, pieces: int, weight, model, settings, *, on_policy, reinforcement,
                   teacher_flops: float):
    """As `training.step.loss_of`: the mean divergence of the tokens drawn, exact over the vocabulary, with the router's
    balance loss; no gradient reaches multi-token modules.

    on_policy, reinforcement: the config's groups; both models' logits are divided by the temperature of the draws.
    teacher_flops: of a token. Metrics besides: `divergence`; rollouts.told's; `forward_tokens`, the student's; and
    `teacher_flops`, of this update's share of scoring.
    """
    logits_BTV, out = apply_model(model, settings, trained["params"], routing, batch, trained["amax"])
    share = jnp.sum(batch["mask_BT"]) / total
    apart = share * divergence(logits_BTV, batch["teacher_BTV"], batch["mask_BT"], direction=on_policy.direction,
                               beta=on_policy.beta, temperature=reinforcement.temperature)
    balance = balance_of(out["routing"]["layers"]) / pieces
    loss = apart + balance
    return loss, jax.tree.map(lambda x: x / pieces, rollouts.told(batch)) | {
        "loss": loss, "divergence": apart, "balance_loss": balance,
        "forward_tokens": rollouts.forward_tokens(batch) / reinforcement.epochs,
        "teacher_flops": jnp.float32(batch["tokens_BT"].size * teacher_flops / reinforcement.epochs),
        "loads": loads_of(out["routing"])}
