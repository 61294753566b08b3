"""Text to token ids and back: raw bytes, a byte-level BPE of the corpus, or anyone's tokenizer.json."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from research.data import cache
from research.data.sources import Document, corpus_hash
from research.errors import RequestError
from research.files import write_whole

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
SPECIALS = (BOS, EOS, PAD, *FIM)

# What published tokenizers call these tokens, where no tokenizer_config.json says it.
_KNOWN_ENDS = (
    (BOS, EOS),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<s>", "</s>"),
    ("<bos>", "<eos>"),
    ("<|startoftext|>", "<|endoftext|>"),
    ("<|im_start|>", "<|im_end|>"),
    ("[CLS]", "[SEP]"),
)
_KNOWN_FIM = (
    FIM,
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)

# DeepSeek-V3's pre-tokenizer (punctuation takes its line break along, V3 §4.1) for Latin text, with one change:
# a line break takes the indentation that follows it along too: 6% fewer tokens on the standard library.
_NUMBERS = r"\p{N}{1,3}"
_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+(?:[\r\n]+[ \t]*)?|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"""
)
# Of the text that a BPE is trained on: 2-3 s. The whole standard library takes three times that for 1.5% fewer tokens.
_SAMPLE_CHARACTERS = 8_000_000
_CHUNK_CHARACTERS = 4_000_000  # encoded at a time: bounds the memory of the library's own records


class Tokenizer:
    """A `tokenizers` model and its document tokens.

    `vocab_size` is the largest id plus one. `bos_id` and `eos_id` begin and end a document (the same id where the
    vocabulary has no token for the beginning); `pad_id` fills rows; `fim_begin_id`, `fim_hole_id` and `fim_end_id`
    are all three ids, or all None. `begins_with_bos`: whether a text that a model is to continue begins with
    `bos_id` (false where a release says so). `end_ids`: where a continuation ends, `eos_id` first. `chat_template`:
    Jinja, None where there is none. `hash` tells tokenizers apart by what they make of a text.
    """

    def __init__(self, definition: str, config: dict[str, Any] | None = None, ends: Sequence[int] = (),
                 chat_template: str | None = None):
        """From the text of a tokenizer.json, the contents of a tokenizer_config.json, and what else ends an answer.

        Raises RequestError.
        """
        self._definition = definition
        try:
            parsed = json.loads(definition)
            self._model = tokenizers.Tokenizer.from_str(definition)
            vocabulary = self._model.get_vocab(with_added_tokens=True)
            bos, eos, pad, fim = _special_names(vocabulary, config or {})
            # Releases mark some of these as ordinary added tokens, which text could then spell.
            for token in parsed.get("added_tokens") or []:
                token["special"] = token["special"] or token["content"] in (bos, eos, pad, *fim)
            if "dropout" in parsed["model"]:
                parsed["model"]["dropout"] = None  # it would make encoding random
            self._model = tokenizers.Tokenizer.from_str(json.dumps(parsed))
        except RequestError:
            raise
        except Exception as error:  # the library raises nothing narrower
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RequestError(f"not a tokenizer.json: {reason}") from None
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # a special token's spelling in a text is ordinary text
        self.begins_with_bos = (config or {}).get("add_bos_token") is not False
        self.special_tokens = {"bos_token": bos, "eos_token": eos, "pad_token": pad}  # by their names in a template
        self.chat_template = chat_template
        self.vocab_size = max(vocabulary.values()) + 1
        self.bos_id, self.eos_id, self.pad_id = (vocabulary[name] for name in (bos, eos, pad))
        self.fim_begin_id, self.fim_hole_id, self.fim_end_id = (vocabulary[name] for name in fim) if fim else [None] * 3
        self.end_ids = [self.eos_id, *(end for end in ends if end != self.eos_id)]
        identity = json.dumps([definition, self.special_tokens])
        self.hash = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    @property
    def start_ids(self) -> list[int]:
        """The ids that a text begins with which a model is to continue."""
        return [self.bos_id] if self.begins_with_bos else []

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """From a tokenizer.json or a folder with one, and the tokenizer_config.json beside it if there is one.

        Raises RequestError where the file is missing, unreadable or malformed.
        """
        path = Path(path).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            definition = path.read_bytes().decode()
        except OSError as error:
            raise RequestError(f"{path} cannot be read: {error.strerror or error}") from None
        except ValueError:
            raise RequestError(f"{path} is not JSON") from None
        config = _beside(path, "tokenizer_config.json")
        try:
            return cls(definition, config, _ends(path), _chat_template(path, config))
        except RequestError as error:
            raise RequestError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Writes `path` (a tokenizer.json, as it was read), and what `load` reads beside it."""
        path = Path(path)
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.special_tokens
        if not self.begins_with_bos:
            config["add_bos_token"] = False
        if self.chat_template:
            config["chat_template"] = self.chat_template
        files = {"tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False)}
        if len(self.end_ids) > 1:
            files["generation_config.json"] = json.dumps({"eos_token_id": self.end_ids})
        for name, content in files.items():
            write_whole(path.with_name(name), content)
        write_whole(path, self._definition)

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Ids (int32) of a text, without document tokens.

        special: what spells a special token is that token; else it is ordinary text.
        """
        self._model.encode_special_tokens = not special
        try:
            return np.array(self._model.encode(text, add_special_tokens=False).ids, np.int32)
        finally:
            self._model.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """`encode` of each text, in parallel, a bounded stretch of them at a time."""
        start, size = 0, 0
        for end, text in enumerate(texts, start=1):
            size += len(text)
            if size >= _CHUNK_CHARACTERS or end == len(texts):
                for encoding in self._model.encode_batch_fast(texts[start:end], add_special_tokens=False):
                    yield np.array(encoding.ids, np.int32)
                start, size = end, 0

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; special tokens, and ids beyond the vocabulary, give none."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)


def _beside(path: Path, name: str) -> dict[str, Any]:
    """A JSON object beside a tokenizer.json; {} where there is none. RequestError for a file that is not JSON."""
    file = path.with_name(name)
    try:
        found = json.loads(file.read_bytes()) if file.exists() else {}
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise RequestError(f"{path}: {name} beside it is not JSON") from None
    return found if isinstance(found, dict) else {}


def _ends(path: Path) -> list[int]:
    """`eos_token_id`, a number or a list, of the generation_config.json, else of the config.json of a release."""
    for name in ("generation_config.json", "config.json"):
        found = _beside(path, name).get("eos_token_id")
        if found is None:
            continue
        ends = found if isinstance(found, list) else [found]
        if not all(isinstance(end, int) and not isinstance(end, bool) and end >= 0 for end in ends):
            raise RequestError(f"{path.with_name(name)}: eos_token_id={found!r} must be a token id or a list of them")
        return ends
    return []


def _chat_template(path: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else what tokenizer_config.json or chat_template.json has: a text, or one by the name
    `default`."""
    file = path.with_name("chat_template.jinja")
    if file.is_file():
        try:
            return file.read_bytes().decode()
        except OSError as error:
            raise RequestError(f"{file} cannot be read: {error.strerror or error}") from None
        except ValueError:
            raise RequestError(f"{file} is not UTF-8 text") from None
    found = config.get("chat_template") or _beside(path, "chat_template.json").get("chat_template")
    if isinstance(found, list):  # of {name, template}
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def build(data: Any, train: Sequence[Document]) -> Tokenizer:
    """The tokenizer of `data.tokenizer`: `bytes`, `bpe` (trained on `train`, kept in `data.cache`) or a path.

    Raises RequestError for a path that holds no tokenizer, and for a BPE smaller than its bytes and specials.
    """
    if data.tokenizer == "bytes":
        return Tokenizer(_bytes())
    if data.tokenizer == "bpe":
        smallest = 256 + len(SPECIALS)
        if data.bpe_vocab_size < smallest:
            expected = f"is too small: the bytes and special tokens alone are {smallest}"
            raise RequestError.field("data.bpe_vocab_size", data.bpe_vocab_size, expected)
        parts = [corpus_hash(train), data.bpe_vocab_size, tokenizers.__version__, _NUMBERS, _WORDS, _SAMPLE_CHARACTERS]
        key = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

        def trained() -> cache.Arrays:
            definition = _train_bpe(train, data.bpe_vocab_size)
            return {"definition": np.frombuffer(definition.encode(), np.uint8)}

        return Tokenizer(cache.remember(data.cache, f"tokenizer-{key}.bin", trained)["definition"].tobytes().decode())
    if not Path(data.tokenizer).expanduser().exists():
        raise RequestError.field("data.tokenizer", data.tokenizer, "is neither bytes nor bpe, nor a path that exists")
    try:
        return Tokenizer.load(data.tokenizer)
    except RequestError as error:
        raise RequestError.field("data.tokenizer", data.tokenizer, f"cannot be used: {error}") from None


def _special_names(vocabulary: dict[str, int], config: dict[str, Any]) -> tuple[str, str, str, tuple[str, ...]]:
    """Names of the beginning, the end, the padding and fill-in-the-middle, all of them in the vocabulary."""

    def named(key: str) -> str | None:
        value = config.get(key)
        name = value.get("content") if isinstance(value, dict) else value
        return name if isinstance(name, str) and name in vocabulary else None

    bos, eos = named("bos_token"), named("eos_token")
    if eos is None:
        known = next((pair for pair in _KNOWN_ENDS if pair[1] in vocabulary), None)
        if known is None:
            raise RequestError("it has no token that ends a document: name one as eos_token in tokenizer_config.json")
        eos = known[1]
        bos = bos or (known[0] if known[0] in vocabulary else None)
    pad = named("pad_token") or (PAD if PAD in vocabulary else eos)
    fim = next((names for names in _KNOWN_FIM if all(name in vocabulary for name in names)), ())
    return bos or eos, eos, pad, fim


def _bytes() -> str:
    """Definition of a tokenizer whose id is the byte; special tokens follow from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))  # GPT-2's byte alphabet: what does not print is moved above 255
    vocabulary = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    model = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(list(SPECIALS))
    return model.to_str()


def _train_bpe(train: Sequence[Document], vocab_size: int) -> str:
    """Definition of a byte-level BPE trained on a sample of `train` that depends on the texts alone."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in (_NUMBERS, _WORDS)]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(_sample(train), trainer)
    return model.to_str()


def _sample(train: Sequence[Document]) -> Iterator[str]:
    left = _SAMPLE_CHARACTERS
    for document in sorted(train, key=lambda document: document.digest):
        if left <= 0:
            return
        yield document.text[:left]
        left -= len(document.text)
