"""Needles: sentences like `# key a B`, hidden in a row of text whose end lists their keys, each with its value.

Ours, not a paper's: what a model that trains within minutes can learn to find, and what long contexts are tried with.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from research.data.packing import Batch
from research.data.tokenizer import Tokenizer
from research.errors import RequestError

KEYS, VALUES = "abcdefghilmnoprstuvwxy", "ABCDEFGHILMNOPRSTUVW"  # a token each, with their space, in most tokenizers
MOST = 10  # of a row; fewer in a short one
_OWN = 1 << 32  # beyond what packing's streams of random numbers are named by


class Needles:
    """Writes over the tokens of rows of text; a row stays as long as it was, and becomes one document.

    Targets of such a row are the values at its end alone: all else of a needle is drawn at random.
    numbers: of a batch's rows; what is written depends on them and the seed alone.
    """

    def __init__(self, tokenizer: Tokenizer, data: Any, seed: int):
        """data: the settings' group. Raises RequestError where a row cannot hold one."""
        self._sentence, self._list = tokenizer.encode("\n# key"), tokenizer.encode("\n# keys")
        self._keys, self._values = ([tokenizer.encode(f" {one}") for one in letters] for letters in (KEYS, VALUES))
        self._seed = seed
        pair = max(map(len, self._keys)) + max(map(len, self._values))
        each = len(self._sentence) + 2 * pair
        self._most = min(MOST, (data.sequence_length + 1 - len(self._list)) // each)
        if self._most < 1:
            raise RequestError.field("data.sequence_length", data.sequence_length,
                                     f"must be at least {len(self._list) + each - 1} with config.data.needle_rate: "
                                     "a needle, and what asks for it")

    def hide(self, batch: Batch, numbers: Sequence[int] | np.ndarray, rate: float) -> Batch:
        """The batch with needles in a share `rate` of its rows, 1 to MOST, which its end asks for in another order."""
        def needles(number):
            rng = self._random(number)
            if rng.random() >= rate:
                return None
            n = rng.integers(1, self._most + 1)
            keys, values = rng.permutation(len(KEYS))[:n], rng.integers(0, len(VALUES), n)
            return list(zip(keys, values, strict=True)), rng.permutation(n), rng.random(n)

        return self._written(batch, [needles(int(number)) for number in numbers])

    def ask(self, batch: Batch, numbers: Sequence[int] | np.ndarray, depth: float) -> Batch:
        """One needle in every row, for which its end asks.

        depth: of the needle, from 0, the row's first tokens, to 1, right before the question.
        """
        chosen = [self._random(int(number)).integers(0, (len(KEYS), len(VALUES))) for number in numbers]
        return self._written(batch, [([pair], [0], [depth]) for pair in chosen])

    def _random(self, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=np.array([self._seed % 2**64, _OWN + number], np.uint64)))

    def _written(self, batch: Batch, needles: list) -> Batch:
        """needles: of each row (pairs of key and value, their order at the end, depths of all), or None for none."""
        made = {name: array.copy() for name, array in batch.items()}
        for row, of_row in enumerate(needles):
            if of_row is None:
                continue
            pairs, order, depths = of_row
            sentences = [np.concatenate([self._sentence, self._keys[key], self._values[value]]) for key, value in pairs]
            asked, answer = [self._list], [np.zeros(len(self._list), bool)]
            for key, value in (pairs[number] for number in order):
                asked += [self._keys[key], self._values[value]]
                answer += [np.zeros(len(self._keys[key]), bool), np.ones(len(self._values[value]), bool)]
            asked, answer = np.concatenate(asked), np.concatenate(answer)

            tokens_X = np.concatenate([made["tokens_BT"][row, :1], made["targets_BT"][row]])
            end = len(tokens_X) - len(asked)
            tokens_X[end:] = asked
            lengths = np.array([len(sentence) for sentence in sentences])
            text_before = np.sort(np.round(np.array(depths) * (end - lengths.sum()))).astype(int)
            for place, sentence in zip(text_before + np.cumsum(lengths) - lengths, sentences, strict=True):
                tokens_X[place:place + len(sentence)] = sentence
            made["tokens_BT"][row], made["targets_BT"][row] = tokens_X[:-1], tokens_X[1:]
            made["segments_BT"][row], made["positions_BT"][row] = 1, np.arange(len(tokens_X) - 1)
            made["mask_BT"][row] = False
            made["mask_BT"][row, end - 1:] = answer
        return made
