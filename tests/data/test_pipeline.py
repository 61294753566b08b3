"""Batches: of seed and step alone, wherever reading began; evaluation reads every held-out target once."""

import dataclasses
import json
import math
import sys
import threading
import time
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from experiments.base import get_config
from research.data import packing, pipeline, sources
from research.data.pipeline import Corpus, TrainBatches, batch_size_at, load_corpus, rows_before, validation_batches
from research.errors import RequestError


def settings_of(cache: Path, **fields) -> ml_collections.FrozenConfigDict:
    config = get_config()
    defaults = {
        "data.source": "files",
        "data.files": f"{cache}/*.jsonl",
        "data.cache": str(cache / "cache"),
        "data.tokenizer": "bytes",
        "data.sequence_length": 32,
        "data.validation_fraction": 0.1,
        "data.fim_rate": 0.1,
        "training.batch_size": 4,
    }
    config.update_from_flattened_dict(defaults | fields)
    return ml_collections.FrozenConfigDict(config)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": f"document {n}: é" + " ".join(map(str, range(n, n + n % 20)))}) for n in range(300)]
    (folder / "a.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


@pytest.fixture(scope="module")
def corpus(cache: Path) -> Corpus:
    return load_corpus(settings_of(cache))


def take(batches, count: int) -> list[packing.Batch]:
    return [next(batches) for _ in range(count)]


def assert_same(one: list[packing.Batch], other: list[packing.Batch]) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert list(left) == list(right)
        for name in left:
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_corpus_keeps_training_and_held_out_text_apart(corpus: Corpus, cache: Path):
    documents = sources.documents(settings_of(cache).data)
    train, validation = sources.split(documents, 0.1)
    assert corpus.validation_documents == validation
    assert (corpus.train.documents, corpus.validation.documents) == (len(train), len(validation))
    assert len(train) + len(validation) == 300
    for tokens, texts in ((corpus.train, train), (corpus.validation, validation)):
        for number, document in enumerate(texts):
            ids = tokens.flat[tokens.offsets[number] : tokens.offsets[number + 1]]
            assert corpus.tokenizer.decode(ids) == document.text
    assert corpus.validation_bytes == sum(len(document.text.encode()) for document in validation)
    assert corpus.validation.targets == corpus.validation_bytes + len(validation)
    assert corpus.gzip_bits_per_byte == sources.gzip_bits_per_byte(validation)
    assert corpus.corpus_hash == sources.corpus_hash(documents)
    assert corpus.train.flat.dtype == np.uint16


def test_no_batch_of_training_holds_held_out_text(cache: Path, corpus: Corpus):
    settings = settings_of(cache, **{"data.sequence_length": 2000, "data.fim_rate": 0.0})
    batches = TrainBatches(corpus, settings)
    held_out = {document.text for document in corpus.validation_documents}
    read = set()
    for batch in take(batches, 10):
        for tokens, segments in zip(batch["tokens_BT"], batch["segments_BT"], strict=True):
            inner = range(2, segments.max())  # whole ones: neither the first of the row nor the last
            read |= {corpus.tokenizer.decode(tokens[segments == segment]) for segment in inner}
    batches.close()
    assert len(read) > 200
    assert not read & held_out


def test_tokens_are_encoded_once_and_again_after_damage(cache: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch):
    encode = pipeline.Tokenizer.encode_batch
    calls = []
    monkeypatch.setattr(
        pipeline.Tokenizer, "encode_batch", lambda self, texts: calls.append(len(texts)) or encode(self, texts)
    )
    again = load_corpus(settings_of(cache))
    assert not calls
    largest = max((cache / "cache").glob("tokens-*.bin"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-70] ^= 1
    largest.unlink()  # the old file stays mapped
    largest.write_bytes(content)
    mended = load_corpus(settings_of(cache))
    assert calls == [corpus.train.documents]
    for other in (again, mended):
        np.testing.assert_array_equal(other.train.flat, corpus.train.flat)
        np.testing.assert_array_equal(other.train.offsets, corpus.train.offsets)


def test_a_given_tokenizer_is_used(cache: Path, corpus: Corpus):
    other = load_corpus(settings_of(cache, **{"data.tokenizer": "nowhere"}), corpus.tokenizer)
    assert other.tokenizer is corpus.tokenizer
    np.testing.assert_array_equal(other.train.flat, corpus.train.flat)


def test_a_vocabulary_above_65536_is_stored_in_32_bits(cache: Path, corpus: Corpus):
    class Large(pipeline.Tokenizer):
        vocab_size, hash = 2**16 + 1, "large"

        def __init__(self):
            pass

        def encode_batch(self, texts):
            return iter([np.array([2**16], np.int32)] * len(texts))

    tokens = pipeline._tokenize(corpus.validation_documents, Large(), str(cache / "cache"))
    assert tokens.flat.dtype == np.uint32
    assert set(tokens.flat.tolist()) == {2**16}


@pytest.mark.parametrize("prefetch", [0, 1, 8])
def test_the_batch_of_a_step_does_not_depend_on_where_reading_began(cache: Path, corpus: Corpus, prefetch: int):
    settings = settings_of(cache, **{"data.prefetch": prefetch, "training.seed": 5})
    straight = TrainBatches(corpus, settings)
    steps = take(straight, 400)  # several epochs
    assert sum(len(batch["tokens_BT"]) for batch in steps) > 3 * (corpus.train.targets // 32)
    later = TrainBatches(corpus, settings, start=390)
    assert_same(take(later, 10), steps[390:])
    later.set_state({**later.get_state(), "step": 17})
    assert_same(take(later, 3), steps[17:20])
    state = json.loads(json.dumps(later.get_state()))
    assert state["step"] == 20
    resumed = TrainBatches(load_corpus(settings), settings)
    take(resumed, 2)
    resumed.set_state(state)
    assert_same(take(resumed, 3), steps[20:23])
    for batches in (straight, later, resumed):
        batches.close()


def test_seeds_and_epochs_differ(cache: Path, corpus: Corpus):
    first, second = (TrainBatches(corpus, settings_of(cache, **{"training.seed": seed})) for seed in (0, 1))
    one, other = take(first, 1), take(second, 1)
    assert (one[0]["tokens_BT"] != other[0]["tokens_BT"]).any()


def test_a_batch_may_span_epochs(cache: Path, corpus: Corpus):
    fields = {"data.sequence_length": 5000}
    rows = (corpus.train.targets + corpus.train.documents - 1) // 5000
    assert 1 < rows < 8
    (batch,) = take(TrainBatches(corpus, settings_of(cache, **fields, **{"training.batch_size": 16})), 1)
    single = take(TrainBatches(corpus, settings_of(cache, **fields, **{"training.batch_size": 1})), 16)
    assert_same([batch], [{name: np.concatenate([row[name] for row in single]) for name in batch}])
    assert (batch["tokens_BT"][0] != batch["tokens_BT"][rows]).any()


def test_a_position_in_other_data_is_refused(cache: Path, corpus: Corpus):
    batches = TrainBatches(corpus, settings_of(cache))
    for name in ("corpus", "tokenizer"):
        with pytest.raises(RequestError, match=rf"trained on another {name} \(elsewhere\) than config.data gives"):
            batches.set_state({**batches.get_state(), name: "elsewhere"})


def test_batches_are_read_ahead_of_the_consumer(cache: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch):
    cut, threads = packing.Stream.batch, set()

    def slow(self, numbers):
        threads.add(threading.current_thread())
        time.sleep(0.05)
        return cut(self, numbers)

    monkeypatch.setattr(packing.Stream, "batch", slow)
    batches = TrainBatches(corpus, settings_of(cache, **{"data.prefetch": 4}))
    time.sleep(0.5)  # what a compilation would take
    start = time.perf_counter()
    take(batches, 4)
    assert time.perf_counter() - start < 0.1
    assert threading.main_thread() not in threads
    batches.close()


def test_loading_is_far_faster_than_a_step(cache: Path, corpus: Corpus):
    settings = settings_of(cache, **{"data.sequence_length": 256, "training.batch_size": 8, "data.prefetch": 0})
    batches = TrainBatches(corpus, settings)
    take(batches, 5)
    start = time.perf_counter()
    take(batches, 50)
    assert 50 * 8 * 256 / (time.perf_counter() - start) > 200_000  # tokens/s; training takes some thousand


@pytest.mark.parametrize(("length", "size"), [(32, 4), (7, 64), (100_000, 2)])
def test_validation_reads_every_held_out_target_once(cache: Path, corpus: Corpus, length: int, size: int):
    settings = settings_of(cache, **{"data.sequence_length": length, "evaluation.batch_size": size})
    batches = list(validation_batches(corpus, settings))
    assert {batch["tokens_BT"].shape for batch in batches} == {(size, length)}
    flat = {name: np.concatenate([batch[name].ravel() for batch in batches]) for name in batches[0]}
    targets = flat["targets_BT"][flat["mask_BT"]]
    assert len(targets) == corpus.validation.targets
    expected = [[*document.text.encode(), corpus.tokenizer.eos_id] for document in corpus.validation_documents]
    assert targets.tolist() == sum(expected, [])
    assert not (flat["mask_BT"] & (flat["segments_BT"] == 0)).any()
    assert_same(batches, list(validation_batches(corpus, settings)))


def test_validation_in_part_is_spread_over_the_held_out_text(cache: Path, corpus: Corpus):
    settings = settings_of(cache, **{"evaluation.batch_size": 4})
    whole = np.concatenate([batch["tokens_BT"] for batch in validation_batches(corpus, settings)])
    part = np.concatenate([batch["tokens_BT"] for batch in validation_batches(corpus, settings, 3)])
    assert part.shape == (12, 32)
    places = [int(np.flatnonzero((whole == row).all(axis=1))[0]) for row in part]
    assert places == sorted(set(places))
    assert places[0] == 0
    assert places[-1] > 0.8 * len(whole)
    assert_same(list(validation_batches(corpus, settings, 10**6)), list(validation_batches(corpus, settings)))


def test_nothing_held_out_gives_no_batches(cache: Path):
    settings = settings_of(cache, **{"data.validation_fraction": 0.0})
    whole = load_corpus(settings)
    assert list(validation_batches(whole, settings)) == []
    assert (whole.validation.targets, whole.validation_bytes, whole.gzip_bits_per_byte) == (0, 0, None)


def test_wrong_requests(cache: Path, corpus: Corpus, tmp_path: Path):
    def refused(match: str, **fields):
        with pytest.raises(RequestError, match=match):
            TrainBatches(corpus, settings_of(cache, **fields))

    refused(r"config.data.sequence_length=1000000 is too long: the training text has \d+ tokens", **{
        "data.sequence_length": 10**6})  # fmt: skip
    refused(r"batch_ramp_start=3 is no multiple of config.training.accumulation_steps=2", **{
        "training.batch_ramp_start": 3, "training.accumulation_steps": 2})  # fmt: skip
    refused(r"batch_ramp_start=8 is above config.training.batch_size=4", **{"training.batch_ramp_start": 8})
    with pytest.raises(RequestError, match=r"config.model.vocab_size=100 is smaller than the tokenizer's 262"):
        load_corpus(settings_of(cache, **{"model.vocab_size": 100}))
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"config.data.cache=.* cannot be written"):
        load_corpus(settings_of(cache, **{"data.cache": str(tmp_path / "file")}))


def training_of(**fields) -> ml_collections.FrozenConfigDict:
    config = get_config().training
    config.update(fields)
    return ml_collections.FrozenConfigDict(config)


def test_batch_ramp_by_hand():
    training = training_of(steps=140, batch_size=64, batch_ramp_start=8, batch_ramp_until=0.1)
    sizes = [batch_size_at(training, step) for step in range(16)]
    assert sizes == [8, 8, 16, 16, 24, 24, 32, 32, 40, 40, 48, 48, 56, 56, 64, 64]
    assert batch_size_at(training, 10**6) == 64
    assert batch_size_at(training_of(batch_size=8), 0) == 8


@pytest.mark.parametrize("steps", [1, 10, 99, 1000])
@pytest.mark.parametrize("until", [0.0, 0.032, 0.5, 1.0])
@pytest.mark.parametrize(("first", "last", "accumulation"), [(0, 8, 2), (4, 64, 4), (3072, 15360, 8), (8, 8, 1), (5, 7, 1)])  # fmt: skip # noqa: E501
def test_batch_ramp(steps: int, until: float, first: int, last: int, accumulation: int):
    training = training_of(
        steps=steps,
        batch_size=last,
        batch_ramp_start=first,
        batch_ramp_until=until,
        accumulation_steps=accumulation,
    )
    sizes = [batch_size_at(training, step) for step in range(steps + 20)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 8
    assert all(size % accumulation == 0 for size in sizes)
    ramp = round(until * steps)
    assert sizes[0] == (first if first and ramp else last)
    assert set(sizes[ramp:]) == {last}
    if first and ramp:
        linear = [first + (last - first) * step / ramp for step in range(ramp)]
        slack = (last - first) / 7 + math.gcd(first, last)
        assert max(abs(size - line) for size, line in zip(sizes[:ramp], linear, strict=True)) <= slack
    totals = [rows_before(training, step) for step in range(steps + 21)]
    assert totals == [sum(sizes[:step]) for step in range(steps + 21)]


def test_ramped_batches_read_the_rows_one_after_another(cache: Path, corpus: Corpus):
    ramp = {"training.batch_ramp_start": 2, "training.batch_ramp_until": 0.01, "training.batch_size": 6}
    ramped = take(TrainBatches(corpus, settings_of(cache, **ramp)), 12)
    assert [len(batch["tokens_BT"]) for batch in ramped][::5] == [2, 4, 6]
    rows = np.concatenate([batch["tokens_BT"] for batch in ramped])
    single = take(TrainBatches(corpus, settings_of(cache, **{"training.batch_size": 1})), len(rows))
    np.testing.assert_array_equal(rows, np.concatenate([batch["tokens_BT"] for batch in single]))


class Half:
    """A share of rows as parallel/hosts.py has them, without a second process."""

    def __init__(self, number: int):
        self.number = number

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        return np.split(numbers, 2)[self.number]

    def whole(self, batch: packing.Batch) -> packing.Batch:
        return batch


def test_shares_are_the_batch_of_one_process(cache: Path, corpus: Corpus):
    """Whatever the batch's size; and so are those of held-out text, its filling too."""
    settings = settings_of(cache, **{"training.steps": 6, "training.batch_size": 8, "training.batch_ramp_start": 4,
                                     "training.batch_ramp_until": 0.5, "evaluation.batch_size": 6})
    halves = [dataclasses.replace(corpus, share=Half(number)) for number in range(2)]
    for read in (lambda text: take(text.train_batches(settings), 6),
                 lambda text: list(text.validation_batches(settings))):
        joined = [{name: np.concatenate([x[name] for x in parts]) for name in parts[0]}
                  for parts in zip(*map(read, halves), strict=True)]
        assert_same(joined, read(corpus))


def test_the_default_corpus_needs_no_optional_package(cache: Path):
    fields = {"data.source": "stdlib", "data.files": "", "data.max_documents": 60, "data.tokenizer": "bpe",
              "data.bpe_vocab_size": 400}
    corpus = load_corpus(settings_of(cache, **fields))
    assert corpus.tokenizer.vocab_size == 400
    batch = next(TrainBatches(corpus, settings_of(cache, **fields)))
    assert batch["tokens_BT"].max() < 400
    assert "datasets" not in sys.modules
