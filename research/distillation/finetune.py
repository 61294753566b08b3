"""What fine-tuning reads: prompts and responses, packed and isolated (V3 §5.1), the loss on responses only.

A batch has the shape that `data.packing` gives and `training.step` reads; attention stays within an example.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from absl import logging

from research.data.packing import Batch
from research.data.pipeline import Share
from research.data.sources import place_of
from research.data.tokenizer import Tokenizer
from research.errors import RequestError
from research.parallel import hosts


class Examples:
    """Stands in for a corpus in `training.loop.train`: pairs of texts, some of them held out.

    kept: arrays with a row for each of `rows`' rows, which go into the batches beside the tokens.
    """

    validation_documents = ()  # no text is continued at the end
    gzip_bits_per_byte = None
    share: Share | None = None  # None: all of every batch

    def __init__(self, pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, settings: Any):
        """pairs: (prompt, response); which are held out is decided by the prompt alone. Raises RequestError."""
        fraction, length = settings.data.validation_fraction, settings.data.sequence_length
        train, held_out = parted(pairs, lambda pair: pair[0], fraction, "examples")
        self.tokenizer, self.kept = tokenizer, {}
        self.rows, self._held_out = (Rows(part, tokenizer, sequence_length=length, seed=settings.training.seed)
                                     for part in (train, held_out))
        self.validation = SimpleNamespace(targets=self._held_out.targets)
        self.validation_bytes = sum(len(response.encode()) for _, response in held_out)
        self.corpus_hash = hashlib.blake2b(json.dumps(list(pairs)).encode(), digest_size=16).hexdigest()

    @property
    def description(self) -> str:
        """What there is to learn from, in a phrase."""
        return (f"{self.rows.examples:,} examples in {self.rows.rows:,} rows, {self.rows.targets:,} targets; "
                f"{self._held_out.examples:,} held out")

    def shared(self, share: Share) -> "Examples":
        """The examples, from now on as one of several processes reads them."""
        self.share = share
        return self

    def train_batches(self, settings: Any) -> "Batches":
        """What the steps read, from the first on."""
        def read(numbers: Sequence[int]) -> Batch:
            return self.rows.of(numbers) | {name: array[numbers] for name, array in self.kept.items()}

        def batch(step: int, _: Any) -> Batch:
            return batch_of(self.rows.numbers(step, settings.training.batch_size), read, self.share)

        return Batches(batch, {"corpus": self.corpus_hash, "tokenizer": self.tokenizer.hash})

    def validation_batches(self, settings: Any, batches: int | None = None) -> Iterator[Batch]:
        """Batches of `evaluation.batch_size` rows: every held-out example once, or the first `batches` of them."""
        size = settings.evaluation.batch_size
        for start in range(0, self._held_out.rows, size)[:batches]:
            yield batch_of(range(start, start + size), self._held_out.of, self.share)


def batch_of(numbers: Sequence[int], read: Callable[[Sequence[int]], Batch], share: Share | None) -> Batch:
    """The batch of the rows with these numbers, of which each of several processes reads its own."""
    return share.whole(read(share.rows(np.asarray(numbers)))) if share else read(numbers)


def held_out_of(prompts: Sequence[str], fraction: float) -> set[str]:
    """The prompts that are held out: about a `fraction` of them, and at least one.

    By a hash of its own: by the one that has parted training and test, all would be or none.
    """
    places = {prompt: place_of(hashlib.blake2b(prompt.encode(), digest_size=16, person=b"held out").digest())
              for prompt in prompts}
    least = min(places.values(), default=0)
    return {prompt for prompt, place in places.items() if place < fraction or place == least}


def parted(items: Sequence, text_of: Callable[[Any], str], fraction: float, what: str) -> tuple[list, list]:
    """(items to learn from, items held out), see `held_out_of`; RequestError where either has none."""
    aside = held_out_of([text_of(item) for item in items], fraction)
    train, held_out = ([item for item in items if (text_of(item) in aside) is side] for side in (False, True))
    if not (train and held_out):
        raise RequestError.field("data.validation_fraction", fraction, f"leaves {len(train)} of {len(items)} {what} to "
                                 f"learn from and {len(held_out)} held out: both need one")
    return train, held_out


def in_turn(order: Callable[[int], np.ndarray], count: int, places: range) -> list[int]:
    """Which of `count` things stand at these places of an endless row of epochs; order: of an epoch's places."""
    epochs = {epoch: order(epoch) for epoch in sorted({place // count for place in places})}
    return [int(epochs[place // count][place % count]) for place in places]


class Batches:
    """Batches by their step, as `data.pipeline.TrainBatches` gives them: each is made when it is asked for."""

    def __init__(self, batch, source: dict[str, str]):
        """batch: (step from 1, state) -> Batch. source: hashes of what they are made of."""
        self._batch, self._source, self._step = batch, source, 0

    def take(self, state: Any) -> Batch:
        """The next batch, from the state that is about to be trained with it."""
        self._step += 1
        return self._batch(self._step, state)

    def get_state(self) -> dict[str, Any]:
        """The last step, and the hashes."""
        return {"step": self._step} | self._source

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues behind a step. Raises RequestError where the checkpoint has learned from something else."""
        for name, value in self._source.items():
            if state[name] != value:
                raise RequestError(f"the checkpoint has learned from another {name} ({state[name]}) than there is now "
                                   f"({value}): restore it, or remove the checkpoint's folder to start anew")
        self._step = state["step"]

    def close(self) -> None:
        """Nothing runs in the background."""


class Rows:
    """Random access to the batches of an endless order of epochs, each a new permutation of the same rows.

    `examples`, `rows`, `targets`: how many there are; `too_long`: examples left out because no row holds them.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, *, sequence_length: int, seed: int):
        """pairs: (prompt, response) texts. An example is `bos prompt response eos`, bos where the tokenizer's texts
        begin with it. Raises RequestError where no example fits."""
        self._length, self._pad, self._seed = sequence_length, tokenizer.pad_id, seed
        self._examples = []  # (tokens, how many of them are the prompt's)
        self.too_long = 0
        for prompt, response in pairs:
            before = [*tokenizer.start_ids, *tokenizer.encode(prompt).tolist()]
            tokens = [*before, *tokenizer.encode(response).tolist(), tokenizer.eos_id]
            if len(tokens) > sequence_length + 1:  # the last token is a target alone
                self.too_long += 1
            else:
                self._examples.append((np.array(tokens, np.int32), len(before)))
        self.examples = len(self._examples)
        if not self.examples:
            raise RequestError.field("data.sequence_length", sequence_length,
                                     f"holds none of {len(pairs)} examples" if pairs else "has no example to hold")
        if self.too_long and hosts.is_first():
            logging.warning("%d of %d examples are longer than config.data.sequence_length=%d and left out",
                            self.too_long, len(pairs), sequence_length)
        self._order = functools.lru_cache(maxsize=4)(self._make_order)
        self._rows = self._packed()
        self.rows = len(self._rows)
        self.targets = sum(len(tokens) - prompt for tokens, prompt in self._examples)

    def batch(self, step: int, size: int) -> Batch:
        """The batch of step `step`, from 1, of `size` rows: it depends on the examples, the seed and the step alone."""
        return self.of(self.numbers(step, size))

    def numbers(self, step: int, size: int) -> list[int]:
        """Which rows step `step` reads."""
        return in_turn(self._order, self.rows, range((step - 1) * size, step * size))

    def of(self, numbers: Sequence[int]) -> Batch:
        """A batch of these rows; beyond the last they are empty.

        (size, T) `tokens_BT`, `targets_BT`, `segments_BT` (examples of a row from 1; 0 is padding), `positions_BT`
        (from 0 in each) and `mask_BT`: the target is of a response, its end included.
        """
        chosen = [self._rows[number] if number < self.rows else [] for number in numbers]
        shape = (len(chosen), self._length)
        batch = {name: np.zeros(shape, np.int32) for name in ("segments_BT", "positions_BT")}
        batch |= {name: np.full(shape, self._pad, np.int32) for name in ("tokens_BT", "targets_BT")}
        batch["mask_BT"] = np.zeros(shape, bool)
        for row, members in enumerate(chosen):
            start = 0
            for segment, member in enumerate(members, start=1):
                tokens, prompt = self._examples[member]
                end = start + len(tokens) - 1
                batch["tokens_BT"][row, start:end] = tokens[:-1]
                batch["targets_BT"][row, start:end] = tokens[1:]
                batch["segments_BT"][row, start:end] = segment
                batch["positions_BT"][row, start:end] = np.arange(end - start)
                batch["mask_BT"][row, start + prompt - 1:end] = True
                start = end
        return batch

    def _packed(self) -> list[list[int]]:
        """Examples of each row: the longest first, each into the fullest row that still holds it."""
        rows: list[list[int]] = []
        with_room: dict[int, list[int]] = {}  # rows by how many positions are free
        for member in sorted(range(self.examples), key=lambda member: -len(self._examples[member][0])):
            size = len(self._examples[member][0]) - 1
            room = min((free for free, found in with_room.items() if free >= size and found), default=None)
            if room is None:
                rows.append([])
                room = self._length
                with_room.setdefault(room, []).append(len(rows) - 1)
            row = with_room[room].pop()
            rows[row].append(member)
            with_room.setdefault(room - size, []).append(row)
        return rows

    def _make_order(self, epoch: int) -> np.ndarray:
        random = np.random.Philox(key=np.array([self._seed % 2**64, epoch], np.uint64)).random_raw(self.rows)
        return np.argsort(random, kind="stable")
