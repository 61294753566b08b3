"""`--mode=eval` on a Hugging Face folder: the figures by hand, from the text's own tokens, and wrong requests."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from research import main, summary
from research.data.tokenizer import BOS, EOS, Tokenizer, _bytes
from research.interop import scoring
from research.interop.weights import checked_weights
from tests.commands import exit_code
from tests.interop.test_huggingface import GOLDEN

LENGTH = 48
TEXTS = ("The first document is long enough to be cut between two rows.", "Größer – the second.", "3")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """{name: path} of a folder, of text, and of folders that are damaged."""
    root = tmp_path_factory.mktemp("folders")
    folder = root / "folder"
    shutil.copytree(GOLDEN / "qwen2_tiny", folder)
    (folder / "tokenizer.json").write_text(_bytes())
    for name in ("tokenless", "smaller", "wide"):
        shutil.copytree(folder, root / name)
    (root / "tokenless/tokenizer.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (root / "smaller/config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    wide = tokenizers.Tokenizer.from_str(_bytes())
    wide.add_tokens([f"<{n}>" for n in range(200)])
    wide.save(str(root / "wide/tokenizer.json"))
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return {path.stem: str(path) for path in root.iterdir()} | {"cache": str(root / "cache")}


@pytest.fixture
def ask(places, capsys):
    def call(*words):
        code = exit_code(main, "--mode=eval", f"--config.data.cache={places['cache']}",
                         *(word.format(**places) for word in words))
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


FILES = ("--config.data.source=files", "--config.data.files={text}")


def nats_by_hand(folder: Path) -> tuple[float, int]:
    """Sum of -log p, and how many, of every token and end of the texts, one row of tokens after another."""
    settings, _, variables = checked_weights(folder)
    tokenizer = Tokenizer.load(folder)
    vocabulary = tokenizer._model.get_vocab()
    stream, owner = [], []
    for number, text in enumerate(TEXTS):
        ids = [vocabulary[BOS], *text.encode(), vocabulary[EOS]]
        stream += ids
        owner += [number] * len(ids)
    pieces = []  # what a row holds of a document, and one token more to predict
    for start in range(0, len(stream) - 1, LENGTH):
        row = range(start, min(start + LENGTH + 1, len(stream)))
        pieces += [[stream[i] for i in row if owner[i] == number] for number in range(len(TEXTS))]
    pieces = [piece for piece in pieces if len(piece) > 1]
    inputs = np.zeros((len(pieces), LENGTH), np.int32)
    for place, piece in enumerate(pieces):
        inputs[place, :len(piece) - 1] = piece[:-1]
    logits_BTV = scoring.logits(settings, variables, inputs)["logits"].astype(np.float64)
    nats = [math.log(sum(math.exp(x) for x in logits_BTV[b, t])) - logits_BTV[b, t, target]
            for b, piece in enumerate(pieces) for t, target in enumerate(piece[1:])]
    return sum(nats), len(nats)


def test_loss_and_bits_per_byte_by_hand(places, ask, monkeypatch):
    found, shown = [], summary.of_evaluation
    monkeypatch.setattr(summary, "of_evaluation", lambda result: shown(found.append(result) or result))
    code, out, err = ask("--workdir={folder}", *FILES, f"--config.data.sequence_length={LENGTH}",
                         "--config.evaluation.batch_size=2")
    assert code == 0, err
    nats, count = nats_by_hand(Path(places["folder"]))
    size = sum(len(text.encode()) for text in TEXTS)
    assert count == size + len(TEXTS)  # in this tokenizer a token is a byte; and the end of each text
    validation = found[0]["validation"]
    assert set(validation) == {"loss", "bits_per_byte", "mtp_accuracy", "targets"}  # no experts, no loads
    assert validation["targets"] == count and found[0]["held_out_bytes"] == size
    assert validation["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert validation["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert f"{nats / math.log(2) / size:.3f} on {size} held-out bytes" in out and "step" not in out


@pytest.mark.parametrize("words, pattern", [
    (["--workdir={folder}", "--config=experiments/nano.py"], "--workdir={folder} is a Hugging Face folder: "),
    (["--workdir={folder}", "--mode=train"], "--workdir={folder} is a Hugging Face folder: "),
    (["--workdir={folder}", "--config.data.source=files"], "config.data.files='' must name files"),
    (["--workdir={folder}", *FILES, "--config.data.sequence_length=129"], "config.data.sequence_length=129 must be "),
    (["--workdir={folder}", *FILES, "--config.model.hidden_size=32"], "--workdir={folder} holds another model: "),
    (["--workdir={folder}", "--config.data.source=files", "--config.data.files=/nowhere"],
     "config.data.files='/nowhere' matches no file"),
    (["--workdir={tokenless}", *FILES], "{tokenless}/tokenizer.json cannot be read: No such file"),
    (["--workdir={smaller}", *FILES], "{smaller}: the tensors are not those of its config.json: "),
    (["--workdir={wide}", *FILES], "config.model.vocab_size=384 is smaller than the tokenizer's 462"),
])
def test_wrong_requests_are_one_line(words, pattern, places, ask):
    code, out, err = ask(*words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert re.match("error: " + re.escape(pattern.format(**places)), err)
