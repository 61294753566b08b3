"""On-policy distillation (GKD, 2306.13649): a student's own samples, at every position of which it is told what its
teacher would say; some of its batches may be of fixed samples.

In order: `Teacher` scores what the student drew (rollouts.py); `Mixture` has fixed samples in some batches' places;
`on_policy_loss` is what the loop minimises. Gradients go through the student's distributions, not through its draws, as
in that paper. (Thinking Machines' form, not here, has log(teacher / student) of the tokens drawn as their rewards: an
estimate of the same reverse divergence.)
"""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.accounting import flops
from research.data.packing import Batch
from research.distillation import rollouts
from research.distillation.finetune import Rows, batch_of
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
        return self.read(batch, self.parts)

    def read(self, batch: Batch, parts: int) -> Batch:
        """`teacher_BTV`, float32, of a batch in so many parts."""
        return {"teacher_BTV": rollouts.in_parts(self._logits, self._variables, batch, parts)}

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of scoring one."""
        return flops.inference(self.settings)["prefill_causal"]


class Mixture(rollouts.Rollouts):
    """Rollouts of which a fraction is drawn, at random; in the place of the others are fixed samples (Algorithm 1)."""

    def __init__(self, *drawing: Any, fraction: float, pairs: Sequence[tuple[str, str]], rows: int):
        """drawing: as Rollouts, scored by a Teacher; fraction: lambda; pairs: (prompt, response), of which those of
        held-out problems are left out; rows: of an update of them, as fine-tuning packs them. Raises RequestError."""
        super().__init__(*drawing)
        self.fraction, self.size = fraction, rows
        held_out = {self.template.prompt(problem.question) for problem in self.held_out}
        self.fixed = Rows([pair for pair in pairs if pair[0] not in held_out], self.tokenizer,
                          sequence_length=self.settings.data.sequence_length, seed=self.settings.training.seed)
        read = json.dumps([self.corpus_hash, *pairs])
        self.corpus_hash = hashlib.blake2b(read.encode(), digest_size=16).hexdigest()

    @property
    def description(self) -> str:
        """As Rollouts, and what else there is to learn from."""
        return f"{super().description}, {self.fraction:g} of the batches drawn; {self.fixed.examples:,} fixed samples"

    def drawn(self, number: int) -> bool:
        """Whether batch `number` is the student's own, by the seed and the number alone."""
        place = np.random.SeedSequence([self.settings.training.seed, number, 2]).generate_state(1)[0] / 2**32
        return bool(place < self.fraction)

    def batch(self, step: int, state: Any) -> Batch:
        """As Rollouts, or the rows that fine-tuning would read in this step, with the teacher's logits."""
        if self.drawn((step - 1) // (self.config.minibatches * self.config.epochs)):
            return super().batch(step, state)

        def read(numbers: Sequence[int]) -> Batch:
            batch = self.fixed.of(numbers)
            return batch | self.scoring.read(batch, 1)

        return batch_of(self.fixed.numbers(step, self.size), read, self.share)


def _logits(variables, batch, *, model, settings):
    logits_BTV, _ = apply_model(model, settings, variables["params"], variables["routing"], batch)
    return logits_BTV.astype(jnp.float32)


def on_policy_loss(trained, routing, batch, total, pieces: int, weight, model, settings, *, on_policy, reinforcement,
                   teacher_flops: float):
    """As `training.step.loss_of`: the mean divergence of the responses' tokens, exact over the vocabulary, with the
    router's balance loss; no gradient reaches multi-token modules.

    on_policy, reinforcement: the config's groups; both models' logits are divided by the temperature of the draws.
    teacher_flops: of a token. Metrics besides: `divergence`; `teacher_flops`, of this update's share of scoring; and of
    what was drawn, not of fixed samples, rollouts.told's, and `forward_tokens`, the student's.
    """
    drawn = "right_B" in batch
    updates = reinforcement.epochs if drawn else 1  # that a row has
    logits_BTV, out = apply_model(model, settings, trained["params"], routing, batch, trained["amax"])
    share = jnp.sum(batch["mask_BT"]) / total
    apart = share * divergence(logits_BTV, batch["teacher_BTV"], batch["mask_BT"], direction=on_policy.direction,
                               beta=on_policy.beta, temperature=reinforcement.temperature)
    balance = balance_of(out["routing"]["layers"]) / pieces
    loss = apart + balance
    told = jax.tree.map(lambda x: x / pieces, rollouts.told(batch)) | {
        "forward_tokens": rollouts.forward_tokens(batch) / updates} if drawn else {}
    return loss, told | {
        "loss": loss, "divergence": apart, "balance_loss": balance,
        "teacher_flops": jnp.float32(batch["tokens_BT"].size * teacher_flops / updates),
        "loads": loads_of(out["routing"])}
