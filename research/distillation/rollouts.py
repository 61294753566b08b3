"""What a policy says of its questions, as the batches of the one training loop.

A batch of Q questions with G samples each becomes `epochs` times `minibatches` updates. What an update learns of its
samples besides their tokens is given: from rewards (reinforce.py), or from a teacher (on_policy.py). Of several
processes the first draws and judges for all; each scores all rows, and trains on those of its devices.
"""

import hashlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from research import config
from research.data.packing import Batch
from research.data.pipeline import Share
from research.data.tokenizer import Tokenizer
from research.decoding.generate import Decoder, check_request
from research.decoding.sampling import Sampling
from research.distillation.finetune import Batches, in_turn, parted
from research.distillation.tasks import Problem
from research.distillation.template import Template, final_answer, well_formed
from research.distillation.verify import Checker
from research.errors import RequestError
from research.interop.weights import initial_variables
from research.model.build import make_model
from research.parallel import hosts

_MULTIPLE = 8  # of a row's length


class Scoring(Protocol):
    """What is known of a batch's samples besides; `source`: hashes or names of what it is made of."""

    source: dict[str, str]

    def begin(self, model: Any, settings: Any, variables: dict) -> None:
        """Before the first batch of a run; variables: of the policy at its start."""

    def scored(self, number: int, policy: dict, batch: Batch) -> Batch:
        """What the loss reads of batch `number` besides: arrays with a row for each sample."""


class Rollouts:
    """Stands in for a corpus in `training.loop.train`, and evaluates by greedy answers to held-out problems."""

    validation_documents = ()
    gzip_bits_per_byte, validation_bytes = None, 0
    share: Share | None = None  # None: all of every batch
    validation = SimpleNamespace(targets=0)

    def __init__(self, problems: Sequence[Problem], tokenizer: Tokenizer, template: Template, checker: Checker,
                 reinforcement: Any, settings: Any, scoring: Scoring):
        """settings: of the model, see `settings_of`; reinforcement: the config's group. Raises RequestError."""
        self.tokenizer, self.checker, self.config, self.settings = tokenizer, checker, reinforcement, settings
        self.scoring, self.template = scoring, template
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

    def check(self, model: Any, draft_tokens: int, whose: str = "") -> None:
        """RequestError where a model cannot read all of the prompts with their responses, or cannot draft."""
        try:
            check_request(model, list(self.prompts.values()), self.config.max_tokens, draft_tokens)
        except ValueError as error:
            raise RequestError(f"config.reinforcement: {whose}{error}") from None

    def shared(self, share: Share) -> "Rollouts":
        """The rollouts, from now on as one of several processes reads them."""
        self.share = share
        return self

    def train_batches(self, settings: Any) -> Batches:
        """What the updates read, from the first on; settings: the run's own, whose vocabulary is known."""
        model = make_model(settings)
        self.check(model, self.config.draft_tokens)
        variables = initial_variables(model, settings)
        self.decoder = Decoder(model, variables)
        self.scoring.begin(model, settings, variables)
        self._drawn = None
        return Batches(self.batch, {"corpus": self.corpus_hash, "tokenizer": self.tokenizer.hash} | self.scoring.source)

    def batch(self, step: int, state: Any) -> Batch:
        """Rows of update `step`, from 1: a part of the batch that is drawn now, or was drawn some updates ago.

        Resumed between two updates of a batch, the rest of them learn from samples of the policy as it is then.
        """
        pieces = self.config.minibatches
        number, update = divmod(step - 1, pieces * self.config.epochs)
        if update == 0 or self._drawn is None:
            self._drawn = self._draw(number, _on_one(state["params"], state["routing"]))
        rows = len(self._drawn["tokens_BT"]) // pieces
        start = update % pieces * rows
        if self.share:
            own = self.share.rows(np.arange(start, start + rows))
            return self.share.whole({name: array[own] for name, array in self._drawn.items()})
        return {name: array[start:start + rows] for name, array in self._drawn.items()}

    def _draw(self, number: int, policy: dict) -> Batch:
        """Batch `number`: samples of the policy, whether they are right and well formed, and what is known besides."""
        questions, size, seed = self.config.questions, self.config.group_size, self.settings.training.seed
        chosen = [problem for problem in _in_turn(self.problems, number * questions, questions, seed)
                  for _ in range(size)]

        def draw() -> list:
            self.decoder.take(policy)
            said = self.decoder.generate(
                [self.prompts[problem.digest] for problem in chosen], self.config.max_tokens,
                Sampling(self.config.temperature), self.config.draft_tokens, seed=_seed(seed, number),
                ends=self.tokenizer.end_ids)
            in_vain = said.steps + said.drafted - sum(len(row) - 1 for row in said.tokens)
            return [said.tokens, [*map(self._judged, chosen, said.tokens)],
                    {"acceptance_B": sum(said.accepted) / max(said.drafted, 1), "in_vain_B": in_vain / len(chosen)}]

        rows, judged, drafts = hosts.from_all(draw() if hosts.is_first() else None)[0]  # which forgets earlier ones
        right_B, formed_B = (np.array(found) for found in zip(*judged, strict=True))
        batch = self._rows(chosen, rows) | {"right_B": right_B, "formed_B": formed_B}
        if self.config.draft_tokens:  # known of all rows together
            batch |= {name: np.full(len(chosen), value, np.float32) for name, value in drafts.items()}
        return batch | self.scoring.scored(number, policy, batch)

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
        policy = _on_one(state["params"] if state["ema"] is None else state["ema"], state["routing"])
        return hosts.from_first(lambda: self._answered(policy, settings.evaluation.batch_size, batches))

    def _answered(self, policy: dict, size: int, batches: int | None) -> dict:
        self.decoder.take(policy)
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


def settings_of(model: Any, reinforcement: Any, steps: int, start: str, **optimizer: Any):
    """The settings (research.config) of `steps` updates of a model from the weights in `start`; optimizer: fields."""
    c, r = model.to_config(), reinforcement
    updates = r.minibatches * r.epochs
    c.training.update(steps=steps, batch_size=r.questions * r.group_size // r.minibatches)
    c.optimizer.update(optimizer)
    c.checkpoint.initialize_from = start
    for group in ("checkpoint", "evaluation"):  # never between two updates of a batch
        c[group].every_steps = -(-c[group].every_steps // updates) * updates
    return config.check(c)


def _on_one(params, routing) -> dict:
    """A policy on the first device, of each process, which draws and scores alone, whatever mesh trains it."""
    policy = {"params": params, "routing": routing}
    if hosts.several():
        policy = hosts.whole(policy, jax.tree.leaves(params)[0].sharding.mesh)
    return jax.device_put(policy, jax.local_devices()[0])


def told(batch: Batch) -> dict:
    """Metrics of samples: `accuracy`, `format`, their sum `reward`, and `tokens_a_sample`, means over the rows; and
    `acceptance`, the share of drafts that stood, where there were any."""
    found = {"accuracy": jnp.mean(batch["right_B"], dtype=jnp.float32),
             "format": jnp.mean(batch["formed_B"], dtype=jnp.float32),
             "tokens_a_sample": jnp.mean(jnp.sum(batch["mask_BT"], axis=1), dtype=jnp.float32)}
    drafted = {"acceptance": jnp.mean(batch["acceptance_B"])} if "acceptance_B" in batch else {}
    return found | drafted | {"reward": found["accuracy"] + found["format"]}


def forward_tokens(batch: Batch):
    """How many tokens were read and drawn, without a gradient, to make these rows, drafts in vain too."""
    return jnp.sum(batch["segments_BT"] > 0) + jnp.sum(batch.get("in_vain_B", 0))


def in_parts(score, variables: dict, batch: Batch, parts: int):
    """score(variables, tokens of rows) of a batch in so many parts, its updates: no pass is wider than theirs."""
    size = len(batch["tokens_BT"]) // parts
    tokens = {name: batch[name] for name in ("tokens_BT", "targets_BT", "segments_BT", "positions_BT")}
    return jnp.concatenate([score(variables, {name: array[start:start + size] for name, array in tokens.items()})
                            for start in range(0, len(batch["tokens_BT"]), size)])


def _in_turn(problems: Sequence[Problem], start: int, count: int, seed: int) -> list[Problem]:
    """Problems `start` and following of an endless order of epochs, each a new permutation."""
    def order(epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[seed % 2**64, epoch])).permutation(len(problems))

    return [problems[number] for number in in_turn(order, len(problems), range(start, start + count))]


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number, 1]).generate_state(1)[0]) & 0x7FFFFFFF
