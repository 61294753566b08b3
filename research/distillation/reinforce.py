"""Reinforcement: what a policy says of its questions, rewarded by rule, as the batches of the one training loop.

A batch of Q questions with G samples each becomes `epochs` times `minibatches` updates (DeepSeekMath Algorithm 1
without a reward model). In order: `Rollouts.batch` draws, rewards and scores; `policy_loss` is what the loop minimises.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import config
from research.data.packing import Batch
from research.data.tokenizer import Tokenizer
from research.decoding.generate import Decoder, check_request
from research.decoding.sampling import Sampling
from research.distillation import grpo
from research.distillation.finetune import Batches, in_turn, parted
from research.distillation.tasks import Problem
from research.distillation.template import Template, final_answer, well_formed
from research.distillation.verify import Checker
from research.errors import RequestError
from research.interop.weights import initial_variables
from research.model.build import make_model
from research.training.losses import cross_entropy
from research.training.step import apply_model, loads_of
from research.tree import map_paths, paths

_MULTIPLE = 8  # of a row's length


class Rollouts:
    """Stands in for a corpus in `training.loop.train`, and evaluates by greedy answers to held-out problems."""

    validation_documents = ()
    gzip_bits_per_byte, validation_bytes = None, 0
    validation = SimpleNamespace(targets=0)

    def __init__(self, problems: Sequence[Problem], tokenizer: Tokenizer, template: Template, checker: Checker,
                 reinforcement: Any, settings: Any, folder: Path):
        """settings: of the model, see `settings_of`; reinforcement: the config's group; folder: where references are
        kept that have taken the first one's place. Raises RequestError."""
        self.tokenizer, self.checker, self.config, self.settings = tokenizer, checker, reinforcement, settings
        self.folder = folder
        texts = {problem.digest: template.prompt(problem.question) for problem in problems}
        self.prompts = {digest: [*tokenizer.start_ids, *tokenizer.encode(text).tolist()]
                        for digest, text in texts.items()}
        self.problems, self.held_out = parted(problems, lambda problem: problem.question,
                                              settings.data.validation_fraction, "problems")
        # a row holds a prompt and a response; the last token is a target alone
        longest = max(map(len, self.prompts.values())) + reinforcement.max_tokens - 1
        self.length = -(-longest // _MULTIPLE) * _MULTIPLE
        digests = b"".join(problem.digest for problem in problems)
        self.corpus_hash = hashlib.blake2b(digests, digest_size=16).hexdigest()

    @property
    def description(self) -> str:
        """What there is to learn from, in a phrase."""
        return (f"{len(self.problems):,} problems, {len(self.held_out):,} held out; {self.config.questions} questions "
                f"of {self.config.group_size} samples a batch")

    def train_batches(self, settings: Any) -> Batches:
        """What the updates read, from the first on; settings: the run's own, whose vocabulary is known."""
        model = make_model(settings)
        try:
            check_request(model, list(self.prompts.values()), self.config.max_tokens, 0)
        except ValueError as error:
            raise RequestError(f"config.reinforcement: {error}") from None
        variables = initial_variables(model, settings)
        self.decoder = Decoder(model, variables)
        self._reference = jax.device_put(variables) if self.config.kl_weight else None
        self._renewed = 0
        self._scores = jax.jit(partial(token_logp, model=model, settings=settings, temperature=self.config.temperature))
        self._drawn = None
        return Batches(self.batch, {"corpus": self.corpus_hash, "tokenizer": self.tokenizer.hash})

    def batch(self, step: int, state: Any) -> Batch:
        """Rows of update `step`, from 1: a part of the batch that is drawn now, or was drawn some updates ago.

        Resumed between two updates of a batch, the rest of them learn from samples of the policy as it is then.
        """
        pieces = self.config.minibatches
        number, update = divmod(step - 1, pieces * self.config.epochs)
        if update == 0 or self._drawn is None:
            self._drawn = self._draw(number, {"params": state["params"], "routing": state["routing"]})
        rows = len(self._drawn["tokens_BT"]) // pieces
        start = update % pieces * rows
        return {name: array[start:start + rows] for name, array in self._drawn.items()}

    def _draw(self, number: int, policy: dict) -> Batch:
        """Batch `number`: samples of the policy, their advantages, and the log-probabilities that do not change."""
        questions, size, seed = self.config.questions, self.config.group_size, self.settings.training.seed
        chosen = [problem for problem in _in_turn(self.problems, number * questions, questions, seed)
                  for _ in range(size)]
        self.decoder.take(policy)
        rows = self.decoder.generate(
            [self.prompts[problem.digest] for problem in chosen], self.config.max_tokens,
            Sampling(self.config.temperature), seed=_seed(seed, number), ends=self.tokenizer.end_ids).tokens
        right_B, formed_B = (np.array(found) for found in zip(*map(self._judged, chosen, rows), strict=True))
        reward_QG = grpo.rewards(right_B, formed_B).reshape(questions, size)
        batch = self._rows(chosen, rows) | {
            "advantage_B": np.asarray(grpo.group_advantages(reward_QG)).reshape(-1),
            "right_B": right_B, "formed_B": formed_B}
        if self.config.minibatches * self.config.epochs > 1:  # else the policy is still the one that drew
            batch["old_logp_BT"] = self._score(policy, batch)
        if self._reference:
            self._renew(number, policy)
            batch["reference_logp_BT"] = self._score(self._reference, batch)
        return batch

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
            self.folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            with part.open("wb") as file:
                np.savez(file, **{name: np.asarray(leaf) for name, leaf in paths(policy).items()})
            part.replace(path)
            saved = self.settings.checkpoint.every_steps // (self.config.minibatches * self.config.epochs)
            for old in self.folder.glob("*.npz"):
                if saved and int(old.stem) < due - every - 2 * saved:
                    old.unlink()
        elif not path.exists():
            raise RequestError.field("reinforcement.reference_every", every, f"needs {path}, the policy before batch "
                                     f"{due + 1}: restore it, or remove the run's checkpoints to start anew")
        with np.load(path) as found:
            self._reference = map_paths(lambda name, _: jnp.asarray(found[name]), self._reference)
        self._renewed = due

    def _score(self, variables: dict, batch: Batch) -> np.ndarray:
        """As many rows at a time as an update has: no pass is wider than those of training."""
        size = len(batch["tokens_BT"]) // self.config.minibatches
        tokens = {name: batch[name] for name in ("tokens_BT", "targets_BT", "segments_BT", "positions_BT")}
        return np.concatenate([
            np.asarray(self._scores(variables, {name: array[start:start + size] for name, array in tokens.items()}))
            for start in range(0, len(batch["tokens_BT"]), size)])

    def _judged(self, problem: Problem, row: Sequence[int]) -> tuple[bool, bool]:
        """Whether the answer is right, and whether the form is: the text has ended, too."""
        text = self.tokenizer.decode(row)
        return self.checker.right(problem, final_answer(text)), well_formed(text) and row[-1] in self.tokenizer.end_ids

    def _rows(self, problems: Sequence[Problem], rows: Sequence[Sequence[int]]) -> Batch:
        """A row for each sample: its prompt and its response, the mask on the response's tokens as targets."""
        shape = (len(rows), self.length)
        batch = {name: np.zeros(shape, np.int32) for name in ("segments_BT", "positions_BT")}
        batch |= {name: np.full(shape, self.tokenizer.pad_id, np.int32) for name in ("tokens_BT", "targets_BT")}
        batch["mask_BT"] = np.zeros(shape, bool)
        for place, (problem, row) in enumerate(zip(problems, rows, strict=True)):
            prompt = self.prompts[problem.digest]
            tokens, size = [*prompt, *row], len(prompt) + len(row) - 1
            batch["tokens_BT"][place, :size] = tokens[:-1]
            batch["targets_BT"][place, :size] = tokens[1:]
            batch["segments_BT"][place, :size] = 1
            batch["positions_BT"][place, :size] = np.arange(size)
            batch["mask_BT"][place, len(prompt) - 1:size] = True
        return batch

    def evaluate(self, _, state: Any, __, settings: Any, batches: int | None) -> dict:
        """Greedy answers to held-out problems, as `training.evaluation.evaluate` is called: {`loss`: the share that is
        wrong, `accuracy`, `tokens`: of a response}. batches: of `evaluation.batch_size` problems, None: all."""
        size = settings.evaluation.batch_size
        self.decoder.take({"params": state["params"] if state["ema"] is None else state["ema"],
                           "routing": state["routing"]})
        right, tokens = [], []
        for start in range(0, len(self.held_out), size)[:batches]:
            problems = self.held_out[start:start + size]
            padded = problems + problems[-1:] * (size - len(problems))  # another number of rows is compiled anew
            rows = self.decoder.generate([self.prompts[problem.digest] for problem in padded], self.config.max_tokens,
                                         ends=self.tokenizer.end_ids).tokens[:len(problems)]
            right += [self._judged(problem, row)[0] for problem, row in zip(problems, rows, strict=True)]
            tokens += map(len, rows)
        accuracy = float(np.mean(right))
        return {"loss": 1 - accuracy, "accuracy": accuracy, "tokens": float(np.mean(tokens))}


def settings_of(model: Any, reinforcement: Any, steps: int, start: str):
    """The settings of a model's reinforcement (research.config): `steps` updates from the weights in `start`."""
    c, r = model.to_config(), reinforcement
    updates = r.minibatches * r.epochs
    c.training.update(steps=steps, batch_size=r.questions * r.group_size // r.minibatches)
    c.optimizer.update(learning_rate=r.learning_rate, warmup_fraction=r.warmup_fraction, plateau_until=1.0,
                       cosine_until=1.0, tail_from=1.0)
    c.checkpoint.initialize_from = start
    for group in ("checkpoint", "evaluation"):  # never between two updates of a batch
        c[group].every_steps = -(-c[group].every_steps // updates) * updates
    return config.check(c)


def token_logp(variables, batch, *, model, settings, temperature: float):
    """Log-probability (B, T) of each target, of logits divided by the temperature that they are drawn at."""
    logits_BTV, _ = apply_model(model, settings, variables["params"], variables["routing"], batch)
    return -cross_entropy(logits_BTV.astype(jnp.float32) / temperature, batch["targets_BT"])


def policy_loss(trained, routing, batch, total, pieces: int, weight, model, settings, *, reinforcement):
    """As `training.step.loss_of`: GRPO's objective with the router's balance loss; multi-token modules stay as they
    are. Metrics besides: grpo.loss's; `reward`, `accuracy`, `format`, `tokens_a_sample` over the batch's rows; and
    `forward_tokens`, read or drawn without a gradient: this update's share of rollouts, and of passes that score."""
    logits_BTV, out = apply_model(model, settings, trained["params"], routing, batch, trained["amax"])
    logits_BTV = logits_BTV.astype(jnp.float32) / reinforcement.temperature
    logp_BT = -cross_entropy(logits_BTV, batch["targets_BT"])
    now_BT = jax.lax.stop_gradient(logp_BT)
    objective, found = grpo.loss(
        logp_BT, batch.get("old_logp_BT", now_BT), batch.get("reference_logp_BT", now_BT), batch["advantage_B"],
        batch["mask_BT"], form=reinforcement.form, clip=reinforcement.clip, kl_weight=reinforcement.kl_weight)
    found |= {"accuracy": jnp.mean(batch["right_B"], dtype=jnp.float32),
              "format": jnp.mean(batch["formed_B"], dtype=jnp.float32),
              "tokens_a_sample": jnp.mean(jnp.sum(batch["mask_BT"], axis=1), dtype=jnp.float32)}
    found["reward"] = found["accuracy"] + found["format"]
    scored = batch["tokens_BT"].size * sum(name in batch for name in ("old_logp_BT", "reference_logp_BT"))
    forward = (jnp.sum(batch["segments_BT"] > 0) + scored) / reinforcement.epochs
    loss = (objective + out["balance_loss"]) / pieces
    return loss, jax.tree.map(lambda x: x / pieces, found) | {
        "loss": loss, "balance_loss": out["balance_loss"] / pieces, "forward_tokens": forward,
        "loads": loads_of(out["routing"])}


def _in_turn(problems: Sequence[Problem], start: int, count: int, seed: int) -> list[Problem]:
    """Problems `start` and following of an endless order of epochs, each a new permutation."""
    def order(epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[seed % 2**64, epoch])).permutation(len(problems))

    return [problems[number] for number in in_turn(order, len(problems), range(start, start + count))]


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number, 1]).generate_state(1)[0]) & 0x7FFFFFFF
