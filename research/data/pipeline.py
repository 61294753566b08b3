"""From settings to batches: the corpus, tokenized once, and what each step and each evaluation reads of it.

The batch of a step depends on the settings and the step alone, so the reading position is one number.
"""

import dataclasses
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from research.data import cache, sources
from research.data.needles import Needles
from research.data.packing import Batch, Stream, Tokens
from research.data.tokenizer import Tokenizer, build
from research.errors import RequestError

_RAMP_SIZES = 8  # distinct batch sizes at most: each is compiled once


class Share(Protocol):
    """What one of several processes reads of each batch (parallel/hosts.py)."""

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Those of a batch's row numbers that are this process's."""

    def whole(self, batch: Batch) -> Any:
        """The batch of all processes, of which this one has read its rows."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenized training and held-out documents, and what evaluation needs to know of them.

    Bits per byte is `loss / ln 2 * validation.targets / validation_bytes`, the loss a mean over the held-out targets.
    """

    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens
    validation_documents: list[sources.Document]
    validation_bytes: int
    gzip_bits_per_byte: float | None  # None where nothing is held out
    corpus_hash: str  # of all documents, training and held out
    share: Share | None = None  # None: all of every batch

    @property
    def description(self) -> str:
        """What there is to read, in a phrase."""
        return f"corpus {len(self.train.flat):,} tokens, {self.validation_bytes:,} bytes held out"

    def shared(self, share: Share) -> "Corpus":
        """The corpus as one of several processes reads it."""
        return dataclasses.replace(self, share=share)

    def train_batches(self, settings: Any) -> "TrainBatches":
        """What the steps of a run read, from the first on."""
        return TrainBatches(self, settings)

    def validation_batches(self, settings: Any, batches: int | None = None) -> Iterator[Batch]:
        """See the function of this name."""
        return validation_batches(self, settings, batches)


def load_corpus(settings: Any, tokenizer: Tokenizer | None = None) -> Corpus:
    """The corpus of `settings.data`, through `tokenizer` where one is given (a checkpoint's), else `data.tokenizer`.

    Tokens and a trained tokenizer are kept in `data.cache`. With `data.validation_fraction=1` all text is held out,
    which the evaluation of a checkpoint alone can do with. Raises RequestError for every wrong field of the data.
    """
    data = settings.data
    if data.validation_fraction == 1 and tokenizer is None:
        raise RequestError.field("data.validation_fraction", data.validation_fraction, "leaves nothing to train on")
    documents = sources.documents(data)
    train, validation = sources.split(documents, data.validation_fraction)
    tokenizer = tokenizer or build(data, train)
    size = settings.model.vocab_size
    if size is not None and size < tokenizer.vocab_size:
        expected = f"is smaller than the tokenizer's {tokenizer.vocab_size}"
        raise RequestError.field("model.vocab_size", size, expected)
    return Corpus(
        tokenizer=tokenizer,
        train=_tokenize(train, tokenizer, data.cache),
        validation=_tokenize(validation, tokenizer, data.cache),
        validation_documents=validation,
        validation_bytes=sources.utf8_bytes(validation),
        gzip_bits_per_byte=sources.gzip_bits_per_byte(validation),
        corpus_hash=sources.corpus_hash(documents),
    )


def batch_size_at(training: Any, step: int) -> int:
    """Sequences of step `step`, counted from 0: from `batch_ramp_start` up to `batch_size`, linear in the step.

    At most 8 sizes, all multiples of what divides both ends, so of the accumulation and the devices if those do
    (V3 §4.2 names the ends of the ramp, not its shape).
    """
    return _sizes(training)[_level(training, step)]


def rows_before(training: Any, step: int) -> int:
    """Sequences read by all steps before `step`."""
    sizes, ramp = _sizes(training), _ramp_steps(training)
    begins = [-(-level * ramp // (_RAMP_SIZES - 1)) for level in range(_RAMP_SIZES)]  # first step of each size
    ends = [*begins[1:], step]
    return sum(size * max(0, min(step, end) - begin) for size, begin, end in zip(sizes, begins, ends, strict=True))


class TrainBatches:
    """Iterator without end over the batches of the steps from `start` on, read ahead by a thread.

    A batch is `packing.Stream.batch` of as many rows as the step has. `get_state` and `set_state` (JSON) are the
    reading position and whose it is. `close` ends the thread.
    """

    def __init__(self, corpus: Corpus, settings: Any, start: int = 0):
        """Raises RequestError where the settings ask for what the corpus or the tokenizer cannot give."""
        training, data = settings.training, settings.data
        if training.batch_ramp_start % training.accumulation_steps:
            expected = f"is no multiple of config.training.accumulation_steps={training.accumulation_steps}"
            raise RequestError.field("training.batch_ramp_start", training.batch_ramp_start, expected)
        if training.batch_ramp_start > training.batch_size:
            expected = f"is above config.training.batch_size={training.batch_size}"
            raise RequestError.field("training.batch_ramp_start", training.batch_ramp_start, expected)
        stream = Stream(
            corpus.train,
            corpus.tokenizer,
            sequence_length=data.sequence_length,
            mask_documents=data.mask_documents,
            shuffle=True,
            fim_rate=data.fim_rate,
            seed=training.seed,
        )

        needles = Needles(corpus.tokenizer, data, training.seed) if data.needle_rate else None

        def batch(step: int) -> Batch:
            rows = rows_before(training, step) + np.arange(batch_size_at(training, step))
            rows = corpus.share.rows(rows) if corpus.share else rows
            read = stream.batch(rows)
            return needles.hide(read, rows, data.needle_rate) if needles else read

        self._share = corpus.share
        self._source = {"corpus": corpus.corpus_hash, "tokenizer": corpus.tokenizer.hash}
        self._iterator = _read_ahead(batch, sys.maxsize, data.prefetch, start)

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        return self._share.whole(batch) if self._share else batch

    def take(self, state: Any) -> Batch:
        """The next batch. What text is read does not depend on the state of training; what a policy says does."""
        return next(self)

    def get_state(self) -> dict[str, Any]:
        """The next step, and the hashes of the corpus and the tokenizer."""
        return {"step": self._iterator.get_state()["next_index"]} | self._source

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a position of `get_state`. Raises RequestError where it belongs to other data."""
        for name, value in self._source.items():
            if state[name] != value:
                raise RequestError(
                    f"the checkpoint was trained on another {name} ({state[name]}) than config.data gives ({value}): "
                    "restore the data, or start anew from its weights with config.checkpoint.initialize_from"
                )
        self._iterator.set_state({"next_index": state["step"]})

    def close(self) -> None:
        """Ends the reading thread."""
        self._iterator.close()


def validation_batches(corpus: Corpus, settings: Any, batches: int | None = None) -> Iterator[Batch]:
    """Batches of `evaluation.batch_size` rows of held-out text: each of its next-token targets exactly once.

    Documents stand in the order of their paths, without fill-in-the-middle; the last batch is filled up with rows of
    segment 0. With `batches`, only so many, their rows spread evenly over all held-out text.
    """
    data, size = settings.data, settings.evaluation.batch_size
    stream = Stream(
        corpus.validation,
        corpus.tokenizer,
        sequence_length=data.sequence_length,
        mask_documents=data.mask_documents,
        shuffle=False,
    )
    count = stream.rows if batches is None else min(stream.rows, batches * size)

    def batch(number: int) -> Batch:
        places = number * size + np.arange(size)
        rows = np.where(places < count, places * stream.rows // max(count, 1), stream.rows)
        return stream.batch(corpus.share.rows(rows) if corpus.share else rows)

    found = _read_ahead(batch, math.ceil(count / size), data.prefetch, 0)
    return map(corpus.share.whole, found) if corpus.share else found


@dataclasses.dataclass(frozen=True)
class _Batches:
    """A grain source: random access to batches, computed when they are read."""

    batch: Callable[[int], Batch]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Batch:
        return self.batch(int(number))


def _read_ahead(batch: Callable[[int], Batch], length: int, prefetch: int, start: int) -> grain.DatasetIterator:
    dataset = grain.MapDataset.source(_Batches(batch, length))
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    iterator = iter(dataset.to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    iterator.start_prefetch()
    return iterator


def _tokenize(documents: Sequence[sources.Document], tokenizer: Tokenizer, folder: str) -> Tokens:
    """Tokens of the documents, from `folder` where they have been made before."""

    def encoded() -> cache.Arrays:
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        pieces = [ids.astype(dtype) for ids in tokenizer.encode_batch([document.text for document in documents])]
        offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
        return {"flat": np.concatenate([np.zeros(0, dtype), *pieces]), "offsets": offsets}

    key = hashlib.blake2b(f"{sources.corpus_hash(documents)} {tokenizer.hash}".encode(), digest_size=16).hexdigest()
    return Tokens(**cache.remember(folder, f"tokens-{key}.bin", encoded))


def _ramp_steps(training: Any) -> int:
    return round(training.batch_ramp_until * training.steps) if training.batch_ramp_start else 0


def _sizes(training: Any) -> list[int]:
    """The batch sizes of the ramp's eight stretches; the last is `batch_size`."""
    first, last = training.batch_ramp_start or training.batch_size, training.batch_size
    unit = math.gcd(first, last)
    levels = range(_RAMP_SIZES)
    return [first + unit * round((last - first) * level / (_RAMP_SIZES - 1) / unit) for level in levels]


def _level(training: Any, step: int) -> int:
    ramp = _ramp_steps(training)
    return step * (_RAMP_SIZES - 1) // ramp if step < ramp else _RAMP_SIZES - 1
