"""Tokenizers: nothing is lost, no text becomes a special token, and wrong files are named."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from experiments.base import get_config
from research.data import tokenizer as module
from research.data.sources import Document
from research.data.tokenizer import BOS, EOS, FIM, PAD, SPECIALS, Tokenizer, build
from research.errors import RequestError

TEXTS = [
    'def add(a, b):\n    """Adds."""\n    return a + b\n\n\nclass Sum:\r\n\tdef __init__(self):\n\t\tself.total = 0\n',
    "Call me Ishmael. Some years ago, never mind how long precisely, 1851 or so…",
    "for i in range(100):\n    if i % 15 == 0:\n        print('FizzBuzz')\n    elif i % 3 == 0:\n        pass\n",
]
DOCUMENTS = [Document(f"{n}.py", text * 3) for n, text in enumerate(TEXTS)]


def data_of(cache: Path, **fields):
    data = get_config().data
    with data.unlocked():
        data.update({"cache": str(cache), "bpe_vocab_size": 300, **fields})
    return data


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def bpe(cache: Path) -> Tokenizer:
    return build(data_of(cache), DOCUMENTS)


@pytest.fixture(scope="module")
def raw(cache: Path) -> Tokenizer:
    return build(data_of(cache, tokenizer="bytes"), [])


def foreign(folder: Path, specials=(), ordinary=(), config=None, **changes) -> Path:
    """A tokenizer.json as others publish them: letters, and added tokens that are special or not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(list(specials))
    model.add_tokens(list(ordinary))
    definition = json.loads(model.to_str()) | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(definition), "utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder / "tokenizer.json"


any_text = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(
        ["\r\n", "\0", "\u0301", "👩‍👩‍👧", "🇩🇪", "\ufeff", "    ", "\t", "\u2028", "é", "def", "123", *SPECIALS]
    )
).map("".join)


@given(any_text)
def test_bytes_round_trip(raw: Tokenizer, text: str):
    ids = raw.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert raw.decode(ids) == text


@given(any_text)
def test_bpe_round_trip(bpe: Tokenizer, text: str):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert not set(ids.tolist()) & {bpe._model.token_to_id(name) for name in SPECIALS}


def test_bytes_layout(raw: Tokenizer):
    assert raw.vocab_size == 262
    ids = [raw.bos_id, raw.eos_id, raw.pad_id, raw.fim_begin_id, raw.fim_hole_id, raw.fim_end_id]
    assert ids == list(range(256, 262))


def test_bpe_merges_words_and_indentation(bpe: Tokenizer):
    assert bpe.vocab_size == 300
    assert len(bpe.encode(DOCUMENTS[0].text)) < 0.6 * len(DOCUMENTS[0].text)
    assert "ĊĠĠĠĠ" in bpe._model.get_vocab()  # a line break and four spaces


def test_what_spells_a_special_token_stays_text(bpe: Tokenizer, raw: Tokenizer):
    for tokenizer in (bpe, raw):
        special = {tokenizer._model.token_to_id(name) for name in SPECIALS}
        assert len(special) == 6
        for name in SPECIALS:
            text = f"a {name}{name} b"
            (batched,) = tokenizer.encode_batch([text])
            assert not special & {*tokenizer.encode(text).tolist(), *batched.tolist()}
            assert tokenizer.decode(batched) == text


def test_special_tokens_that_a_release_calls_ordinary_stay_text_too(tmp_path: Path):
    tokenizer = Tokenizer.load(foreign(tmp_path, specials=[BOS, EOS], ordinary=[*FIM, "<think>"]))
    assert None not in (tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id)
    for name in (BOS, EOS, *FIM):
        assert tokenizer._model.token_to_id(name) not in tokenizer.encode(f"x{name}")
        assert tokenizer.decode(tokenizer.encode(f"x{name}")) == f"x{name}"
    assert len(tokenizer.encode("<think>")) == 1  # not a document token: the tokenizer's own way is kept


def test_encode_batch_equals_encode_across_chunks(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_CHUNK_CHARACTERS", 100)
    texts = [*TEXTS, "", "x", *TEXTS, ""]
    batched = list(bpe.encode_batch(texts))
    assert len(batched) == len(texts)
    for text, ids in zip(texts, batched, strict=True):
        np.testing.assert_array_equal(ids, bpe.encode(text))
    assert list(bpe.encode_batch([])) == []


def test_decode_leaves_out_special_tokens_and_ids_beyond_the_vocabulary(bpe: Tokenizer):
    ids = [bpe.bos_id, *bpe.encode("abc"), bpe.eos_id, bpe.vocab_size + 20]
    assert bpe.decode(ids) == bpe.decode(np.array(ids)) == "abc"


def test_bpe_is_cached_by_corpus_and_size(bpe: Tokenizer, cache: Path, monkeypatch: pytest.MonkeyPatch):
    other = build(data_of(cache), DOCUMENTS[:2])
    larger = build(data_of(cache, bpe_vocab_size=301), DOCUMENTS)
    assert len({bpe.hash, other.hash, larger.hash}) == 3
    monkeypatch.setattr(module, "_train_bpe", lambda *_: pytest.fail("trained again"))
    assert build(data_of(cache), DOCUMENTS).hash == bpe.hash


def test_bpe_is_the_same_when_trained_again_elsewhere(bpe: Tokenizer):
    code = (
        "import sys, json; from research.data.sources import Document; from research.data import tokenizer;"
        "texts = json.loads(sys.argv[1]);"
        "documents = [Document(str(n), text) for n, text in enumerate(texts)];"
        "print(tokenizer.Tokenizer(tokenizer._train_bpe(documents[::-1], 300)).hash)"
    )
    arguments = [sys.executable, "-c", code, json.dumps([document.text for document in DOCUMENTS])]
    assert subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip() == bpe.hash


def test_bpe_is_trained_on_a_bounded_sample(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_SAMPLE_CHARACTERS", 500)
    sample = list(module._sample(DOCUMENTS))
    assert sum(map(len, sample)) == 500
    assert sample == list(module._sample(DOCUMENTS[::-1]))
    renamed = [Document(f"{9 - n}.py", document.text) for n, document in enumerate(DOCUMENTS)]
    assert sample == list(module._sample(renamed))


def test_save_and_load_keep_everything(bpe: Tokenizer, tmp_path: Path):
    config = {"bos_token": None, "eos_token": {"content": "<stop>"}}
    named = Tokenizer.load(foreign(tmp_path / "a", specials=["<stop>", "</s>"], config=config))
    assert named.bos_id == named.eos_id == named._model.token_to_id("<stop>")
    for tokenizer in (bpe, named):
        tokenizer.save(tmp_path / "tokenizer.json")
        for path in (tmp_path, tmp_path / "tokenizer.json"):
            loaded = Tokenizer.load(path)
            assert loaded.hash == tokenizer.hash
            assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (
                tokenizer.bos_id,
                tokenizer.eos_id,
                tokenizer.pad_id,
            )
            assert loaded.fim_hole_id == tokenizer.fim_hole_id
            assert loaded.encode(TEXTS[0]).tolist() == tokenizer.encode(TEXTS[0]).tolist()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("specials", "config", "bos", "eos"),
    [
        (["<|endoftext|>"], None, "<|endoftext|>", "<|endoftext|>"),
        (["</s>", "<s>"], None, "<s>", "</s>"),
        (["<|im_start|>", "<|endoftext|>", "<|im_end|>"], None, "<|endoftext|>", "<|endoftext|>"),
        (["<|im_start|>", "<|im_end|>"], None, "<|im_start|>", "<|im_end|>"),
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], None, "<|begin_of_text|>", "<|end_of_text|>"),
        (["<|begin_of_text|>", "<|eot_id|>"], {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
         "<|begin_of_text|>", "<|eot_id|>"),
        ([BOS, EOS], {"bos_token": {"content": BOS}, "eos_token": "absent"}, BOS, EOS),
        (["</s>"], [], "</s>", "</s>"),
    ],
)  # fmt: skip
def test_ends_of_a_document_are_found(tmp_path: Path, specials, config, bos, eos):
    tokenizer = Tokenizer.load(foreign(tmp_path, specials=specials, config=config))
    assert (tokenizer.bos_id, tokenizer.eos_id) == tuple(map(tokenizer._model.token_to_id, (bos, eos)))
    assert tokenizer.pad_id == tokenizer.eos_id
    assert (tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id) == (None, None, None)


def test_other_spellings_of_fill_in_the_middle_and_padding(tmp_path: Path):
    names = ["</s>", PAD, "<|fim_middle|>", "<|fim_prefix|>", "<|fim_suffix|>"]
    tokenizer = Tokenizer.load(foreign(tmp_path, specials=names))
    ids = [tokenizer.pad_id, tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id]
    expected = [PAD, "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    assert ids == list(map(tokenizer._model.token_to_id, expected))


def test_truncation_padding_and_dropout_of_a_file_are_not_applied(tmp_path: Path):
    path = foreign(
        tmp_path,
        specials=["</s>"],
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "</s>",
        },
    )
    definition = json.loads(path.read_text("utf-8"))
    definition["model"] |= {"dropout": 0.9, "merges": [["a", "b"]]}
    definition["model"]["vocab"]["ab"] = 300
    path.write_text(json.dumps(definition), "utf-8")
    tokenizer = Tokenizer.load(path)
    assert tokenizer.vocab_size == 301
    for _ in range(20):
        assert tokenizer.encode("ab" * 10).tolist() == [300] * 10


def test_wrong_tokenizers_are_named(cache: Path, tmp_path: Path):
    def refused(path: str | Path) -> str:
        with pytest.raises(RequestError) as caught:
            build(data_of(cache, tokenizer=str(path)), DOCUMENTS)
        message = str(caught.value)
        assert message.startswith(f"config.data.tokenizer='{path}' ")
        assert "\n" not in message
        return message

    assert "is neither bytes nor bpe, nor a path that exists" in refused("gpt5")
    assert "tokenizer.json cannot be read: No such file" in refused(tmp_path)
    path = tmp_path / "tokenizer.json"
    for content in (b"", b"{", b"[]", b"null", b"{}", b'{"model": {}}', b'{"added_tokens": [1]}', b"\x80\x04K\x01."):
        path.write_bytes(content)
        assert "is not JSON" in refused(path) or "not a tokenizer.json" in refused(path)
    foreign(tmp_path)
    assert "no token that ends a document" in refused(tmp_path)
    foreign(tmp_path, specials=["</s>"])
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json beside it is not JSON" in refused(tmp_path)
    path.write_text(path.read_text("utf-8")[:-200], "utf-8")
    assert "is not JSON" in refused(tmp_path) or "not a tokenizer.json" in refused(tmp_path)


def test_a_vocabulary_smaller_than_the_bytes_is_refused(cache: Path):
    with pytest.raises(RequestError, match=r"config.data.bpe_vocab_size=261 is too small: .* are 262"):
        build(data_of(cache, bpe_vocab_size=261), DOCUMENTS)
    assert build(data_of(cache, bpe_vocab_size=262), DOCUMENTS).vocab_size == 262
