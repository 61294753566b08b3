"""Packing: each target once, documents apart, fill-in-the-middle undone, any row from seed and number alone."""

import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.data.packing import Stream, Tokens
from research.errors import RequestError

BOS, EOS, PAD, BEGIN, HOLE, END = range(10**6, 10**6 + 6)
TOKENIZER = types.SimpleNamespace(
    bos_id=BOS, eos_id=EOS, pad_id=PAD, fim_begin_id=BEGIN, fim_hole_id=HOLE, fim_end_id=END
)


def tokens_of(lengths: list[int]) -> Tokens:
    """Documents in which no token stands twice, so that a token tells its document and place."""
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    return Tokens(np.arange(offsets[-1], dtype=np.uint32), offsets)


def stream_of(lengths: list[int], length: int = 8, **options) -> Stream:
    options = {"mask_documents": True, "shuffle": True, "sequence_length": length} | options
    return Stream(tokens_of(lengths), TOKENIZER, **options)


def documents_of(stream: Stream) -> list[list[int]]:
    """Documents of an unshuffled stream, read off its rows."""
    batch = stream.batch(range(stream.rows))
    real_BT = batch["segments_BT"] > 0
    ids = batch["tokens_BT"][real_BT].tolist()
    if real_BT.all() and batch["targets_BT"][-1, -1] != PAD:
        ids.append(int(batch["targets_BT"][-1, -1]))
    starts = [place for place, token in enumerate(ids) if token == BOS]
    return [ids[start:end] for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]


def undo_fim(ids: list[int]) -> list[int]:
    """`bos text eos` of a document in either form."""
    if BEGIN not in ids:
        return ids
    hole, end = ids.index(HOLE), ids.index(END)
    assert ids[:2] == [BOS, BEGIN]
    assert ids[-1] == EOS
    prefix, suffix, middle = ids[2:hole], ids[hole + 1 : end], ids[end + 1 : -1]
    return [BOS, *prefix, *middle, *suffix, EOS]


lengths_of_documents = st.lists(st.integers(0, 30), min_size=1, max_size=12)
seeds = st.integers(-(2**40), 2**64 - 1)


def plain(lengths: list[int]) -> list[list[int]]:
    tokens = tokens_of(lengths)
    pairs = zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    return [[BOS, *tokens.flat[start:end].tolist(), EOS] for start, end in pairs]


@given(lengths_of_documents, st.integers(1, 40))
def test_unshuffled_rows_are_the_documents_in_order(lengths: list[int], length: int):
    assert documents_of(stream_of(lengths, length, shuffle=False)) == plain(lengths)


@given(lengths_of_documents, st.integers(1, 40))
def test_every_target_inside_a_document_stands_in_exactly_one_row(lengths: list[int], length: int):
    stream = stream_of(lengths, length, shuffle=False)
    batch = stream.batch(range(stream.rows + 2))
    mask_BT = batch["mask_BT"]
    found = list(zip(batch["tokens_BT"][mask_BT].tolist(), batch["targets_BT"][mask_BT].tolist(), strict=True))
    expected = [pair for ids in plain(lengths) for pair in zip(ids, ids[1:], strict=False)]
    assert found == expected
    assert len(found) == tokens_of(lengths).targets
    assert not mask_BT[stream.rows :].any()
    assert not batch["segments_BT"][stream.rows :].any()


@given(st.lists(st.integers(0, 30), min_size=2, max_size=12), st.integers(1, 12), seeds, st.integers(0, 5))
def test_shuffled_rows_hold_every_target_but_the_tails(lengths: list[int], length: int, seed: int, epoch: int):
    if sum(lengths) + 2 * len(lengths) <= length:
        return
    stream = stream_of(lengths, length, seed=seed)
    batch = stream.batch(epoch * stream.rows + np.arange(stream.rows))
    mask_BT = batch["mask_BT"]
    found = list(zip(batch["tokens_BT"][mask_BT].tolist(), batch["targets_BT"][mask_BT].tolist(), strict=True))
    text = [pair for pair in found if max(pair) < BOS]
    assert len(set(text)) == len(text)
    assert all(following == token + 1 for token, following in text)
    assert tokens_of(lengths).targets - len(found) < length
    assert stream.rows == (sum(lengths) + 2 * len(lengths) - 1) // length
    assert (batch["segments_BT"] > 0).all()


@given(lengths_of_documents, st.integers(1, 40), st.booleans(), st.sampled_from([0.0, 0.5]))
def test_segments_positions_and_mask_by_a_plain_loop(lengths: list[int], length: int, masked: bool, rate: float):
    stream = stream_of(lengths, length, shuffle=False, mask_documents=masked, fim_rate=rate)
    batch = stream.batch(range(stream.rows))
    for tokens, targets, segments, positions, mask in zip(*(batch[name].tolist() for name in batch), strict=True):
        segment = position = 0
        for place, token in enumerate(tokens):
            if place == 0 or token == BOS:
                segment, position = segment + 1, 0
            real = token != PAD
            assert segments[place] == (segment if real else 0)
            if real:
                assert positions[place] == (position if masked else place)
                assert mask[place] == (token != EOS)
            else:
                assert not mask[place]
            if mask[place] and place + 1 < length:
                assert targets[place] == tokens[place + 1]
            position += 1


def test_two_packed_documents_by_hand():
    batch = stream_of([3, 2], 6, shuffle=False).batch([0, 1])
    assert batch["tokens_BT"].tolist() == [[BOS, 0, 1, 2, EOS, BOS], [3, 4, EOS, PAD, PAD, PAD]]
    assert batch["targets_BT"].tolist() == [[0, 1, 2, EOS, BOS, 3], [4, EOS, PAD, PAD, PAD, PAD]]
    assert batch["segments_BT"].tolist() == [[1, 1, 1, 1, 1, 2], [1, 1, 1, 0, 0, 0]]
    assert batch["positions_BT"][0].tolist() == [0, 1, 2, 3, 4, 0]
    assert batch["positions_BT"][1, :3].tolist() == [0, 1, 2]
    assert batch["mask_BT"].tolist() == [[True] * 4 + [False, True], [True] * 2 + [False] * 4]
    assert {name: array.dtype for name, array in batch.items()} == {
        "tokens_BT": np.int32,
        "targets_BT": np.int32,
        "segments_BT": np.int32,
        "positions_BT": np.int32,
        "mask_BT": np.bool_,
    }


def test_positions_run_on_where_documents_are_not_masked():
    batch = stream_of([3, 2], 6, shuffle=False, mask_documents=False).batch([0, 1])
    assert batch["positions_BT"].tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert batch["segments_BT"].tolist() == [[1, 1, 1, 1, 1, 2], [1, 1, 1, 0, 0, 0]]
    assert batch["mask_BT"].tolist() == [[True] * 4 + [False, True], [True] * 2 + [False] * 4]


@given(lengths_of_documents, st.integers(1, 40), st.floats(0.01, 1.0), seeds)
def test_fill_in_the_middle_undone_is_the_document(lengths: list[int], length: int, rate: float, seed: int):
    stream = stream_of(lengths, length, shuffle=False, fim_rate=rate, seed=seed)
    found = documents_of(stream)
    assert [undo_fim(ids) for ids in found] == plain(lengths)
    if rate == 1.0:
        assert all(BEGIN in ids for ids in found)


def test_fill_in_the_middle_by_hand():
    stream = stream_of([3], 16, shuffle=False, fim_rate=1.0)
    stream._epoch(0).cuts[:] = [[1, 2]]
    assert documents_of(stream) == [[BOS, BEGIN, 0, HOLE, 2, END, 1, EOS]]


def test_fill_in_the_middle_at_its_rate_with_cuts_everywhere_and_anew_in_each_epoch():
    cuts = [stream_of([9] * 4000, fim_rate=0.1)._make_epoch(epoch).cuts for epoch in (0, 1)]
    order = [stream_of([9] * 4000, fim_rate=0.1)._make_epoch(epoch).offsets // 9 for epoch in (0, 1)]
    in_place = [cut[np.argsort(documents)] for cut, documents in zip(cuts, order, strict=True)]
    turned = [cut[:, 0] >= 0 for cut in in_place]
    assert 300 < turned[0].sum() < 500
    assert 15 < (turned[0] & turned[1]).sum() < 80
    chosen = in_place[0][turned[0]]
    assert set(chosen.ravel().tolist()) == set(range(10))
    assert (chosen[:, 0] <= chosen[:, 1]).all()


def test_fill_in_the_middle_of_a_document_depends_on_seed_epoch_and_number_alone():
    long, short = stream_of([9] * 50, fim_rate=0.5, seed=3), stream_of([9] * 20, fim_rate=0.5, seed=3, shuffle=False)
    epoch = long._make_epoch(0)
    in_place = epoch.cuts[np.argsort(epoch.offsets)]
    np.testing.assert_array_equal(in_place[:20], short._make_epoch(0).cuts)
    other = stream_of([9] * 20, fim_rate=0.5, seed=4, shuffle=False)._make_epoch(0).cuts
    assert (in_place[:20] != other).any()


def test_fill_in_the_middle_does_not_change_the_number_of_rows_of_a_shuffled_epoch():
    lengths = [5] * 100
    assert stream_of(lengths, fim_rate=0.9).rows == stream_of(lengths).rows
    stream = stream_of(lengths, fim_rate=0.9)
    assert (stream.batch(range(5 * stream.rows))["segments_BT"] > 0).all()


def test_epochs_permute_documents_and_rows():
    stream = stream_of([6] * 64, seed=1)
    epochs = [stream.batch(epoch * stream.rows + np.arange(stream.rows))["tokens_BT"] for epoch in range(3)]
    assert all(len(set(rows.ravel().tolist()) & set(range(384))) > 370 for rows in epochs)
    assert (epochs[0] == epochs[1]).all(axis=1).sum() < 8
    assert (epochs[1] != epochs[2]).any()
    neighbours = stream._make_epoch(0).offsets // 6
    assert (np.abs(np.diff(neighbours)) == 1).sum() < 8
    assert (np.abs(np.diff(stream._make_row_order(0))) == 1).sum() < 8
    assert (stream_of([6] * 64, seed=2).batch(range(stream.rows))["tokens_BT"] != epochs[0]).any()


@given(st.lists(st.integers(0, 200), min_size=1, max_size=20))
def test_a_row_is_the_same_in_any_batch(numbers: list[int]):
    stream = stream_of([6, 3, 11, 1, 9], 5, seed=7, fim_rate=0.3)
    together = stream_of([6, 3, 11, 1, 9], 5, seed=7, fim_rate=0.3).batch(sorted(numbers))
    for row, number in enumerate(sorted(numbers)):
        alone = stream.batch([number])
        for name, array in alone.items():
            np.testing.assert_array_equal(array[0], together[name][row], err_msg=name)


def test_rows_are_the_same_on_every_machine_and_version():
    batch = stream_of([6, 3, 11, 1, 9], 6, seed=7, fim_rate=0.5).batch([0, 9])
    assert batch["tokens_BT"].tolist() == [[HOLE, END, 20, EOS, BOS, BEGIN], [BOS, BEGIN, HOLE, 7, 8, END]]


def test_requests_that_cannot_be_served():
    with pytest.raises(RequestError, match=r"config.data.sequence_length=9 is too long: .* has 9 tokens, .* takes 10"):
        stream_of([3, 2], 9)
    assert stream_of([3, 2], 8).rows == 1
    plain_tokenizer = types.SimpleNamespace(**vars(TOKENIZER) | {"fim_begin_id": None})
    options = {"sequence_length": 2, "mask_documents": True, "shuffle": True}
    with pytest.raises(RequestError, match=r"config.data.fim_rate=0.1 needs a tokenizer with fill-in-the-middle"):
        Stream(tokens_of([9]), plain_tokenizer, fim_rate=0.1, **options)
    Stream(tokens_of([9]), plain_tokenizer, fim_rate=0.0, **options)


def test_nothing_has_no_rows():
    stream = stream_of([], shuffle=False)
    assert stream.rows == 0
