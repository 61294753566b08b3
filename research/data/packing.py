"""Rows: documents one after another, in an order of each epoch, some as fill-in-the-middle, cut every T tokens.

A document is `bos tokens eos`; as fill-in-the-middle (prefix, suffix, middle; V3 §4.1) it is
`bos fim_begin prefix fim_hole suffix fim_end middle eos`, cut between tokens. Row r covers positions r·T to r·T+T of
this stream, one more than T: the last is the first of the next row, so that each next token is a target once.
No stream is ever written: a row is computed from the offsets of its documents, for any row, at once.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from research.data.tokenizer import Tokenizer
from research.errors import RequestError

Batch = dict[str, np.ndarray]

_ORDER, _MIDDLES, _ROWS = range(3)  # what random numbers are for


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of a list of documents without document tokens: number i is `flat[offsets[i]:offsets[i + 1]]`."""

    flat: np.ndarray
    offsets: np.ndarray

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.offsets) - 1

    @property
    def targets(self) -> int:
        """Next-token targets inside the documents: every token, and the end of each document."""
        return int(self.offsets[-1]) + self.documents


@dataclasses.dataclass(frozen=True)
class _Epoch:
    """Documents of one epoch in their order: first position in the stream, first token, length, ends of the cuts."""

    starts: np.ndarray  # one more than documents: the last is the length of the stream
    offsets: np.ndarray
    lengths: np.ndarray
    cuts: np.ndarray  # (documents, 2): ends of prefix and middle, in tokens; -1 where the order is the text's


class Stream:
    """Random access to the rows of `tokens`.

    With `shuffle` documents and rows are permuted anew in each epoch; without, rows follow the documents' order and the
    last is filled up with padding. `rows` is the number of rows of an epoch. When shuffled it is the same in each:
    the end of the stream is left out where it fills no row, or is as much as fill-in-the-middle added to the stream.
    """

    def __init__(
        self,
        tokens: Tokens,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        mask_documents: bool,
        shuffle: bool,
        fim_rate: float = 0.0,
        seed: int = 0,
    ):
        """Raises RequestError where the tokenizer lacks fill-in-the-middle tokens, or a shuffled stream has no row."""
        if fim_rate > 0 and tokenizer.fim_begin_id is None:
            expected = "needs a tokenizer with fill-in-the-middle tokens: config.data.tokenizer has none"
            raise RequestError.field("data.fim_rate", fim_rate, expected)
        self._tokens, self._tokenizer = tokens, tokenizer
        self._length, self._mask_documents, self._shuffle = sequence_length, mask_documents, shuffle
        self._fim_rate, self._seed = fim_rate, seed
        self._epoch = functools.lru_cache(maxsize=4)(self._make_epoch)
        self._row_order = functools.lru_cache(maxsize=4)(self._make_row_order)
        if not shuffle:
            self.rows = -(-max(0, int(self._epoch(0).starts[-1]) - 1) // sequence_length)
            return
        total = tokens.targets + tokens.documents  # without fill-in-the-middle: the same in every epoch
        self.rows = (total - 1) // sequence_length
        if not self.rows:
            expected = f"is too long: the training text has {total} tokens, where a row takes {sequence_length + 1}"
            raise RequestError.field("data.sequence_length", sequence_length, expected)

    def batch(self, numbers: Sequence[int] | np.ndarray) -> Batch:
        """The rows of these numbers: epoch `number // rows`, and in it the `number % rows`th of its order.

        (B, T) int32 `tokens_BT`, `targets_BT`, `segments_BT` (documents of a row from 1; 0 is padding) and
        `positions_BT` (from 0 in each document of a row; in the whole row where documents are not masked), and bool
        `mask_BT`: the target is in the same document as the token. Without `shuffle` there is one epoch, and rows
        from `rows` on are padding.
        """
        numbers = np.asarray(numbers, np.int64)
        if not self._shuffle:
            beyond = self.rows + 1  # row `rows` itself may begin with the end of the last document
            return self._cut(self._epoch(0), np.where(numbers < self.rows, numbers, beyond))
        epochs = numbers // self.rows
        parts = [
            self._cut(self._epoch(int(epoch)), self._row_order(int(epoch))[numbers[epochs == epoch] % self.rows])
            for epoch in np.unique(epochs)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _random(self, epoch: int, purpose: int, count: int) -> np.ndarray:
        """Number i of `count` depends on seed, epoch, purpose and i alone, on any machine and version."""
        return np.random.Philox(key=np.array([self._seed % 2**64, 4 * epoch + purpose], np.uint64)).random_raw(count)

    def _make_row_order(self, epoch: int) -> np.ndarray:
        return np.argsort(self._random(epoch, _ROWS, self.rows), kind="stable")

    def _make_epoch(self, epoch: int) -> _Epoch:
        documents = self._tokens.documents
        order = np.arange(documents)
        if self._shuffle:
            order = np.argsort(self._random(epoch, _ORDER, documents), kind="stable")
        lengths = np.diff(self._tokens.offsets)
        cuts = np.full((documents, 2), -1, np.int64)
        if self._fim_rate > 0:
            uniform = (self._random(epoch, _MIDDLES, 3 * documents).reshape(documents, 3) >> np.uint64(11)) * 2.0**-53
            ends = np.sort((uniform[:, 1:] * (lengths[:, None] + 1)).astype(np.int64), axis=1)
            cuts = np.where(uniform[:, :1] < self._fim_rate, ends, -1)
        lengths, cuts = lengths[order], cuts[order]
        starts = np.concatenate([[0], np.cumsum(lengths + 2 + 3 * (cuts[:, 0] >= 0))])
        return _Epoch(starts, self._tokens.offsets[:-1][order], lengths, cuts)

    def _cut(self, epoch: _Epoch, rows: np.ndarray) -> Batch:
        length = self._length
        stream_BT = rows[:, None] * length + np.arange(length + 1)
        inside_BT = stream_BT < epoch.starts[-1]
        document_BT = np.searchsorted(epoch.starts, np.where(inside_BT, stream_BT, 0), side="right") - 1
        ids_BT = np.where(inside_BT, self._ids(epoch, document_BT, stream_BT), self._tokenizer.pad_id).astype(np.int32)

        input_BT, target_BT = document_BT[:, :-1], document_BT[:, 1:]
        segments_BT = np.where(inside_BT[:, :-1], input_BT - input_BT[:, :1] + 1, 0).astype(np.int32)
        positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), segments_BT.shape)
        if self._mask_documents:
            begins_BT = np.diff(segments_BT, axis=1, prepend=segments_BT[:, :1]) != 0
            positions_BT = positions_BT - np.maximum.accumulate(np.where(begins_BT, positions_BT, 0), axis=1)
        return {
            "tokens_BT": ids_BT[:, :-1].copy(),
            "targets_BT": ids_BT[:, 1:].copy(),
            "segments_BT": segments_BT,
            "positions_BT": positions_BT.copy(),
            "mask_BT": inside_BT[:, 1:] & (input_BT == target_BT),
        }

    def _ids(self, epoch: _Epoch, document_BT: np.ndarray, stream_BT: np.ndarray) -> np.ndarray:
        """Token at each position of the stream, given the document it is in."""
        place_BT = stream_BT - epoch.starts[document_BT]  # 0 is bos
        length_BT = epoch.lengths[document_BT]
        source_BT = place_BT - 1  # which token of the document; outside of it a special one
        specials = [(place_BT == 0, self._tokenizer.bos_id)]
        end_BT = length_BT + 1
        if self._fim_rate > 0:
            prefix_BT, middle_BT = epoch.cuts[document_BT, 0], epoch.cuts[document_BT, 1]
            turned_BT = prefix_BT >= 0
            hole_BT = 2 + prefix_BT
            close_BT = hole_BT + 1 + length_BT - middle_BT
            source_BT = np.where(turned_BT, place_BT - 2, source_BT)
            source_BT = np.where(turned_BT & (place_BT > hole_BT), middle_BT + place_BT - hole_BT - 1, source_BT)
            source_BT = np.where(turned_BT & (place_BT > close_BT), prefix_BT + place_BT - close_BT - 1, source_BT)
            end_BT = np.where(turned_BT, length_BT + 4, end_BT)
            specials += [
                (turned_BT & (place_BT == 1), self._tokenizer.fim_begin_id),
                (turned_BT & (place_BT == hole_BT), self._tokenizer.fim_hole_id),
                (turned_BT & (place_BT == close_BT), self._tokenizer.fim_end_id),
            ]
        specials.append((place_BT == end_BT, self._tokenizer.eos_id))
        special_BT = np.logical_or.reduce([where for where, _ in specials])
        index_BT = np.where(special_BT, 0, epoch.offsets[document_BT] + source_BT)
        flat = self._tokens.flat
        ids_BT = flat[np.clip(index_BT, 0, len(flat) - 1)].astype(np.int64) if len(flat) else np.zeros_like(index_BT)
        for where_BT, special in specials:
            ids_BT[where_BT] = special
        return ids_BT
