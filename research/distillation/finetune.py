"""Rows of a student's fine-tuning: prompts and responses, packed and isolated (V3 §5.1), the loss on responses only.

A batch has the shape that `data.packing` gives and `training.step` reads; attention stays within an example.
"""

from collections.abc import Sequence

import numpy as np
from absl import logging

from research.data.packing import Batch
from research.data.tokenizer import Tokenizer
from research.errors import RequestError


class Rows:
    """Random access to the batches of an endless order of epochs, each a new permutation of the same rows.

    `examples`, `rows`: how many there are; `too_long`: examples left out because no row holds them.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, *, sequence_length: int, seed: int):
        """pairs: (prompt, response) texts. An example is `bos prompt response eos`, bos where the tokenizer's texts
        begin with it. Raises RequestError where no example fits."""
        first = [tokenizer.bos_id] if tokenizer.begins_with_bos else []
        self._length, self._pad, self._seed = sequence_length, tokenizer.pad_id, seed
        self._examples = []  # (tokens, how many of them are the prompt's)
        self.too_long = 0
        for prompt, response in pairs:
            before = [*first, *tokenizer.encode(prompt).tolist()]
            tokens = [*before, *tokenizer.encode(response).tolist(), tokenizer.eos_id]
            if len(tokens) > sequence_length + 1:  # the last token is a target alone
                self.too_long += 1
            else:
                self._examples.append((np.array(tokens, np.int32), len(before)))
        self.examples = len(self._examples)
        if not self.examples:
            raise RequestError.field("data.sequence_length", sequence_length,
                                     f"holds none of {len(pairs)} examples" if pairs else "has no example to hold")
        if self.too_long:
            logging.warning("%d of %d examples are longer than config.data.sequence_length=%d and left out",
                            self.too_long, len(pairs), sequence_length)
        self._rows = self._packed()
        self.rows = len(self._rows)

    def batch(self, step: int, size: int) -> Batch:
        """The batch of step `step`, from 1, of `size` rows: it depends on the examples, the seed and the step alone.

        (size, T) `tokens_BT`, `targets_BT`, `segments_BT` (examples of a row from 1; 0 is padding), `positions_BT`
        (from 0 in each) and `mask_BT`: the target is of a response, its end included.
        """
        numbers = np.arange((step - 1) * size, step * size)
        chosen = [self._rows[self._order(int(number) // self.rows)[number % self.rows]] for number in numbers]
        shape = (size, self._length)
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

    def _order(self, epoch: int) -> np.ndarray:
        random = np.random.Philox(key=np.array([self._seed % 2**64, epoch], np.uint64)).random_raw(self.rows)
        return np.argsort(random, kind="stable")
