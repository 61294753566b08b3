"""Reinforcement of a policy by the rewards of its rollouts (DeepSeekMath Algorithm 1 without a reward model).

In order: `Rewards` scores what was drawn (rollouts.py); `policy_loss` is what the loop minimises.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.data.packing import Batch
from research.distillation import grpo, rollouts
from research.errors import RequestError
from research.model.transformer import balance_of
from research.parallel import hosts
from research.training.losses import cross_entropy
from research.training.step import apply_model, loads_of
from research.tree import map_paths, paths


class Rewards:
    """The advantages of a batch's samples, and the log-probabilities that do not change over its updates."""

    def __init__(self, reinforcement: Any, settings: Any, folder: Path):
        """reinforcement: the config's group; settings: of the model, see `settings_of`; folder: where references are
        kept that have taken the first one's place."""
        self.config, self.settings, self.folder, self.source = reinforcement, settings, folder, {}

    def begin(self, model: Any, settings: Any, variables: dict) -> None:
        """As rollouts.Scoring; the first reference is the policy at its start."""
        self._reference = jax.device_put(variables) if self.config.kl_weight else None
        self._renewed = 0
        self._scores = jax.jit(partial(token_logp, model=model, settings=settings, temperature=self.config.temperature))

    def scored(self, number: int, policy: dict, batch: Batch) -> Batch:
        """`advantage_B`; `old_logp_BT` where a batch has several updates, `reference_logp_BT` where it has weight."""
        reward_QG = grpo.rewards(batch["right_B"], batch["formed_B"]).reshape(-1, self.config.group_size)
        found = {"advantage_B": np.asarray(grpo.group_advantages(reward_QG)).reshape(-1)}
        if self.config.minibatches * self.config.epochs > 1:  # else the policy is still the one that drew
            found["old_logp_BT"] = self._score(policy, batch)
        if self._reference:
            self._renew(number, policy)
            found["reference_logp_BT"] = self._score(self._reference, batch)
        return found

    def _renew(self, number: int, policy: dict) -> None:
        """The reference of batch `number`: the policy as it was at the last multiple of `reference_every` batches.

        Each is kept on the disk for a run that goes on between two of them; not those that lie behind the checkpoints.
        """
        every = self.config.reference_every
        due = number // every * every if every else 0
        if due == self._renewed:
            return
        path = self.folder / f"{due}.npz"
        if due == number:
            hosts.from_first(lambda: self._keep(policy, path))
        elif not path.exists():
            raise RequestError.field("reinforcement.reference_every", every, f"needs {path}, the policy before batch "
                                     f"{due + 1}: restore it, or remove the run's checkpoints to start anew")
        with np.load(path) as found:
            self._reference = map_paths(lambda name, _: jnp.asarray(found[name]), self._reference)
        self._renewed = due

    def _keep(self, policy: dict, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, **{name: np.asarray(leaf) for name, leaf in paths(policy).items()})
        part.replace(path)
        saved = self.settings.checkpoint.every_steps // (self.config.minibatches * self.config.epochs)
        for old in self.folder.glob("*.npz"):
            if saved and int(old.stem) < int(path.stem) - self.config.reference_every - 2 * saved:
                old.unlink()

    def _score(self, variables: dict, batch: Batch) -> np.ndarray:
        return np.asarray(rollouts.in_parts(self._scores, variables, batch, self.config.minibatches))


def settings_of(model: Any, reinforcement: Any, steps: int, start: str):
    """As rollouts.settings_of, with the learning rate of the config's group, constant after its warm-up."""
    return rollouts.settings_of(
        model, reinforcement, steps, start, learning_rate=reinforcement.learning_rate,
        warmup_fraction=reinforcement.warmup_fraction, plateau_until=1.0, cosine_until=1.0, tail_from=1.0)


def token_logp(variables, batch, *, model, settings, temperature: float):
    """Log-probability (B, T) of each target, of logits divided by the temperature that they are drawn at."""
    logits_BTV, _ = apply_model(model, settings, variables["params"], variables["routing"], batch)
    return -cross_entropy(logits_BTV.astype(jnp.float32) / temperature, batch["targets_BT"])


def policy_loss(trained, routing, batch, total, pieces: int, weight, model, settings, *, reinforcement):
    """As `training.step.loss_of`: GRPO's objective with the router's balance loss; no gradient reaches multi-token
    modules. Metrics besides: grpo.loss's, and rollouts.told's, with the passes that score among `forward_tokens`."""
    logits_BTV, out = apply_model(model, settings, trained["params"], routing, batch, trained["amax"])
    logits_BTV = logits_BTV.astype(jnp.float32) / reinforcement.temperature
    logp_BT = -cross_entropy(logits_BTV, batch["targets_BT"])
    now_BT = jax.lax.stop_gradient(logp_BT)
    objective, found = grpo.loss(
        logp_BT, batch.get("old_logp_BT", now_BT), batch.get("reference_logp_BT", now_BT), batch["advantage_B"],
        batch["mask_BT"], form=reinforcement.form, clip=reinforcement.clip, kl_weight=reinforcement.kl_weight)
    found |= rollouts.told(batch)
    scored = batch["tokens_BT"].size * sum(name in batch for name in ("old_logp_BT", "reference_logp_BT"))
    forward = (rollouts.forward_tokens(batch) + scored) / reinforcement.epochs
    balance = balance_of(out["routing"]["layers"])
    loss = (objective + balance) / pieces
    return loss, jax.tree.map(lambda x: x / pieces, found) | {
        "loss": loss, "balance_loss": balance / pieces, "forward_tokens": forward,
        "loads": loads_of(out["routing"])}
