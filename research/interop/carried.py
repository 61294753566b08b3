"""The files that go along with weights in either direction, unchanged: the tokenizer's, and how to sample."""

from pathlib import Path

from absl import logging

from research.interop.destination import put_file

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
         "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json")


def carry(source: Path, folder: Path) -> None:
    """Copies those that `source` has to `folder`; without a tokenizer.json it says so."""
    for name in FILES:
        if (source / name).is_file():
            put_file(folder / name, (source / name).read_bytes())
    if not (source / "tokenizer.json").is_file():
        logging.warning("%s has no tokenizer.json: the result is scored from token ids, but continues no text", source)
