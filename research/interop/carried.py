"""The files that go along with weights in either direction, unchanged: the tokenizer's, and how to sample."""

from pathlib import Path

from absl import logging

from research.errors import RequestError

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
         "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json")


def carried(source: Path) -> dict[str, bytes]:
    """{name: content} of those that `source` has; without a tokenizer.json it says so. RequestError for one that cannot
    be read."""
    found = {}
    for name in FILES:
        try:
            if (source / name).is_file():
                found[name] = (source / name).read_bytes()
        except OSError as error:
            raise RequestError(f"{source / name} cannot be read: {error.strerror}") from None
    if "tokenizer.json" not in found:
        logging.warning("%s has no tokenizer.json: the result is scored from token ids, but continues no text", source)
    return found
