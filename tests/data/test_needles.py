"""Needles: what is hidden where, what the end asks for; rows depend on their numbers and the seed alone."""

from types import SimpleNamespace

import numpy as np
import pytest

from research.data.needles import KEYS, VALUES, Needles
from research.data.packing import Stream, Tokens
from research.data.tokenizer import Tokenizer, _bytes
from research.errors import RequestError

LENGTH = 140


def needles_of(length: int = LENGTH, seed: int = 3) -> Needles:
    return Needles(Tokenizer(_bytes()), SimpleNamespace(sequence_length=length), seed)


@pytest.fixture(scope="module")
def batch():
    """Rows of two documents each, of a letter that no needle has."""
    lengths = [90] * 80
    tokens = Tokens(np.full(sum(lengths), ord("z"), np.uint16), np.cumsum([0, *lengths]))
    stream = Stream(tokens, Tokenizer(_bytes()), sequence_length=LENGTH, mask_documents=True, shuffle=True)
    return stream.batch(range(40))


def text_of(batch, row: int) -> str:
    """The row and its last target, special tokens as dots."""
    tokens = [*batch["tokens_BT"][row], batch["targets_BT"][row, -1]]
    return "".join(chr(token) if token < 256 else "." for token in tokens)


def parts_of(text: str) -> tuple[list[str], list[str]]:
    """Pairs `a B` that are hidden, and those that the end lists, in their order."""
    hidden, asked = text.split("\n# keys ")
    pairs = [asked[at:at + 3] for at in range(0, len(asked), 4)]
    return [hidden[at + 7:at + 10] for at in range(len(hidden)) if hidden.startswith("\n# key ", at)], pairs


def answers_of(batch, row: int) -> str:
    """The row's targets."""
    return "".join(chr(token) for token in batch["targets_BT"][row][batch["mask_BT"][row]])


def test_what_is_hidden_is_asked_for_at_the_end_in_another_order(batch):
    made = needles_of().hide(batch, range(40), 1.0)
    counts, moved = [], 0
    for row in range(40):
        text = text_of(made, row)
        assert len(text) == LENGTH + 1
        hidden, asked = parts_of(text)
        assert sorted(hidden) == sorted(asked) and len({pair[0] for pair in hidden}) == len(hidden)
        assert {pair[0] for pair in hidden} <= set(KEYS) and {pair[2] for pair in hidden} <= set(VALUES)
        assert answers_of(made, row) == "".join(pair[1:] for pair in asked)  # bytes: the space and the letter
        assert set(text.translate(str.maketrans("", "", "\n# keys" + KEYS + VALUES))) <= set("z.")
        counts.append(len(hidden))
        moved += hidden != asked
    assert set(counts) == set(range(1, 10)) and moved > 10  # of sentences of 14 bytes, asked for with 4 more
    assert (made["targets_BT"][:, :-1] == made["tokens_BT"][:, 1:]).all()
    assert (made["segments_BT"] == 1).all() and (made["positions_BT"] == np.arange(LENGTH)).all()
    before = [text_of(made, row).index("\n# key ") for row in range(40)]
    assert len(set(before)) > 15 and min(before) < 5 and max(before) > 40  # anywhere


def test_rows_without_needles_stay_as_they_are(batch):
    before = {name: array.copy() for name, array in batch.items()}
    made = needles_of().hide(batch, range(40), 0.5)
    written = [row for row in range(40) if "# key" in text_of(made, row)]
    assert 10 < len(written) < 30
    others = [row for row in range(40) if row not in written]
    for name, array in batch.items():
        assert (array == before[name]).all() and (made[name][others] == array[others]).all()
    none = needles_of().hide(batch, range(40), 0.0)
    assert all((none[name] == batch[name]).all() for name in batch)


def test_a_row_depends_on_its_number_and_the_seed_alone(batch):
    made = needles_of().hide(batch, range(40), 0.7)
    part = {name: array[[30, 4]] for name, array in batch.items()}
    again = needles_of().hide(part, [30, 4], 0.7)
    assert all((again[name] == made[name][[30, 4]]).all() for name in batch)
    other = needles_of(seed=4).hide(batch, range(40), 0.7)
    assert any(text_of(other, row) != text_of(made, row) for row in range(40))


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_one_is_hidden_at_its_depth(batch, depth):
    made = needles_of().ask(batch, range(40), depth)
    for row in range(40):
        text = text_of(made, row)
        hidden, asked = parts_of(text)
        assert hidden == asked and len(hidden) == 1 and answers_of(made, row) == asked[0][1:]
        assert text.index("\n# key ") == round(depth * (LENGTH + 1 - len("\n# key a B\n# keys a B")))
    assert len({parts_of(text_of(made, row))[1][0] for row in range(40)}) > 30


def test_short_rows_hold_fewer_and_too_short_ones_are_refused():
    tokens = Tokens(np.full(900, ord("z"), np.uint16), np.array([0, 900]))
    batch = Stream(tokens, Tokenizer(_bytes()), sequence_length=46, mask_documents=True, shuffle=True).batch(range(15))
    made = needles_of(46).hide(batch, range(15), 1.0)
    assert {len(parts_of(text_of(made, row))[0]) for row in range(15)} == {1, 2}
    with pytest.raises(RequestError, match=r"config.data.sequence_length=19 must be at least 20 with config.data.need"):
        needles_of(19)
    needles_of(20)
