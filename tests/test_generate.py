"""The command that continues text: what it streams, what it reports, and what it refuses in one line."""

import functools
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from research import generate
from research.data.tokenizer import Tokenizer, _bytes
from research.decoding.generate import Decoder
from research.interop.weights import checked_weights
from tests.commands import exit_code

GOLDEN = Path(__file__).parent / "golden"


def with_tokenizer(name: str, tmp_path_factory) -> Path:
    """A copy of a golden checkpoint, with a tokenizer of bytes."""
    made = tmp_path_factory.mktemp("checkpoint") / name
    shutil.copytree(GOLDEN / name, made)
    Tokenizer(_bytes()).save(made / "tokenizer.json")
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a multi-token module."""
    return with_tokenizer("deepseek_v3_tiny_mtp", tmp_path_factory)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A model without one."""
    return with_tokenizer("qwen2_tiny", tmp_path_factory)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    """What one checkpoint's decoder has compiled serves all calls."""
    monkeypatch.setattr(generate, "load", LOADED)


LOADED = functools.cache(generate.load)


def call(capsys, *words: str, code: int = 0):
    """(stdout, stderr) of the command with these flags, which are as before afterwards."""
    assert exit_code(generate, *words) == code
    said = capsys.readouterr()
    return said.out, said.err


@pytest.mark.parametrize("name", ["deepseek_v3_tiny", "deepseek_v2_tiny", "qwen2_tiny", "llama3_tiny"])
def test_greedy_continuations_are_those_of_transformers(name):
    golden = np.load(GOLDEN / name / "golden.npz")["greedy"][0].tolist()
    _, model, variables = checked_weights(GOLDEN / name)
    found = Decoder(model, variables).generate([golden[:16]], len(golden) - 16)
    assert found.tokens == [golden[16:]]


def test_drafts_change_nothing_but_the_steps(folder, capsys):
    request = f"--checkpoint={folder}", "--prompt=def f(x):", "--max_tokens=30", "--temperature=0"
    plain, report = call(capsys, *request)
    assert re.search(r"tokens/s after the first\ntime to first token .* ms", report) and "acceptance" not in report
    drafted, report = call(capsys, *request, "--speculative", "--draft_tokens=2")
    assert drafted == plain
    assert re.search(r"acceptance rate by draft position \d+\.\d%, \d+\.\d%; \d\.\d\d tokens a step", report)


def test_the_seed_and_the_stop(folder, capsys):
    request = f"--checkpoint={folder}", "--prompt=x", "--max_tokens=30", "--temperature=2"
    text = call(capsys, *request)[0]
    assert call(capsys, *request)[0] == text != call(capsys, *request, "--seed=1")[0]
    stop = text[5:7]
    assert call(capsys, *request, f"--stop={stop}")[0] == text[:text.index(stop)] + "\n"


def test_a_file_of_prompts_gives_json_lines_in_its_order(folder, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("first\nthe second one\nthird\n")
    out, report = call(capsys, f"--checkpoint={folder}", f"--prompts_file={tmp_path}/prompts.txt", "--max_tokens=30",
                       "--batch_size=2", "--temperature=0")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == ["first", "the second one", "third"]
    assert f"{sum(line['tokens'] for line in lines)} tokens" in report
    alone = call(capsys, f"--checkpoint={folder}", "--prompt=the second one", "--max_tokens=30",
                 "--temperature=0")[0]
    assert lines[1]["text"] + "\n" == alone


def test_a_prompt_of_stdin_and_lines_with_other_separators(folder, capsys, tmp_path, monkeypatch):
    request = f"--checkpoint={folder}", "--max_tokens=30", "--temperature=0"
    monkeypatch.setattr("sys.stdin", io.StringIO("the second one"))
    assert call(capsys, *request, "--prompt=-")[0] == call(capsys, *request, "--prompt=the second one")[0]
    (tmp_path / "prompts.txt").write_text("\ufefffirst\u2028\x0cpage\r\nthe second one\n", newline="")
    lines = call(capsys, *request, f"--prompts_file={tmp_path}/prompts.txt", "--batch_size=2")[0].split("\n")
    assert [json.loads(line)["prompt"] for line in lines[:-1]] == ["first\u2028\x0cpage", "the second one"]


def test_a_message_goes_through_the_template(folder, capsys):
    """What spells a special token there is one; an answer ends at any of the ends."""
    decoder, tokenizer, _ = LOADED(folder, None, None, None)
    template = "{{ bos_token }}{% for m in messages %}{{ m.role[0] + ':' + m.content + ';' }}{% endfor %}a:"
    ids = [tokenizer.bos_id, *b"s:Be kind.;u:x;a:"]
    expected = decoder.generate([ids], 12).tokens[0]
    ends = [expected[7]]
    (folder / "chat_template.jinja").write_text(template)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    chat = decoder, Tokenizer.load(folder), [1, 2, 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "load", lambda *_: chat)
        out, report = call(capsys, f"--checkpoint={folder}", "--chat", "--system=Be kind.", "--prompt=x",
                           "--max_tokens=12", "--temperature=0")
    length = expected.index(ends[0]) + 1
    assert out == tokenizer.decode(expected[:length]) + "\n"
    assert f"{length} tokens; " in report
    for name in ("chat_template.jinja", "generation_config.json"):
        (folder / name).unlink()


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8_blocks"])
def test_weights_in_few_bits_by_the_flag(bare, weights, capsys):
    tokenizer = Tokenizer.load(bare)
    _, model, variables = checked_weights(bare)
    expected = Decoder(model, variables, weights=weights).generate([[tokenizer.bos_id, *b"def f"]], 12)
    out, _ = call(capsys, f"--checkpoint={bare}", "--prompt=def f", "--max_tokens=12", "--temperature=0",
                  f"--weights={weights}")
    assert out == tokenizer.decode(expected.tokens[0]) + "\n"


def test_text_is_written_as_far_as_it_is_certain():
    class Letters:
        def decode(self, tokens):
            return bytes(tokens).decode(errors="replace")

    generate.FLAGS.mark_as_parsed()
    written = []
    writer = generate.Writer(Letters(), written.append)
    euro = list("a€b".encode())
    for end in range(1, len(euro) + 1):
        assert writer(euro[:end]) is False
    assert written == ["a", "€", "b"] and writer.finish() == "a€b"


@pytest.mark.parametrize("words, pattern", [
    ([], "--checkpoint is required: "),
    (["--checkpoint={folder}"], "one of --prompt and --prompts_file is required"),
    (["--checkpoint={folder}", "--prompt=x", "--config.mesh.data=2"], "config.mesh.data=2 needs 2 devices: 1 cpu devi"),
    (["--checkpoint={folder}", "--prompt=x", "--config.mesh.dat=2"], "config.mesh.dat=2 is not a field of the configu"),
    (["--checkpoint={folder}", "--prompt=x", "--config.training.steps=2"], "--config.training.steps=2 is no field of "),
    (["--checkpoint={folder}", "--prompt=x", "--prompts_file=y"], "one of --prompt and --prompts_file is required"),
    (["--checkpoint={folder}", "--prompt="], "--prompt: prompt 1 is empty"),
    (["--checkpoint={folder}", "--prompts_file=/does/not/exist"], "--prompts_file='/does/not/exist' cannot be read"),
    (["--checkpoint=/does/not/exist", "--prompt=x"], "--checkpoint='/does/not/exist' does not exist"),
    (["--checkpoint={golden}", "--prompt=x"], "tokenizer.json cannot be read: No such file"),
    (["--checkpoint={folder}", "--prompt=x", "--max_tokens=0"], "--max_tokens=0 must be at least 1"),
    (["--checkpoint={folder}", "--prompt=x", "--max_tokens=127"],
     "--prompt: prompt 1 of 2 tokens and max_tokens=127 are more than max_position_embeddings=128"),
    (["--checkpoint={folder}", "--prompt=x", "--temperature=-1"], "--temperature=-1.0 must be a number of at least 0"),
    (["--checkpoint={folder}", "--prompt=x", "--temperature=nan"], "--temperature=nan must be a number of at least 0"),
    (["--checkpoint={folder}", "--prompt=x", "--top_p=0"], "--top_p=0.0 must be above 0 and at most 1"),
    (["--checkpoint={folder}", "--prompt=x", "--top_k=-1"], "--top_k=-1 must be at least 0"),
    (["--checkpoint={folder}", "--prompt=x", "--min_p=2"], "--min_p=2.0 must be from 0 to 1"),
    (["--checkpoint={folder}", "--prompt=x", "--stop="], "--stop='' would end every continuation"),
    (["--checkpoint={folder}", "--prompt=x", "--stop=\udcff"], "--stop is not UTF-8 text"),
    (["--checkpoint={folder}", "--prompt=x", "--chat", "--system=\udcff"], "--system is not UTF-8 text"),
    (["--checkpoint={folder}", "--prompt=x", "--draft_tokens=2"], "--draft_tokens=2 needs --speculative"),
    (["--checkpoint={folder}", "--prompt=x", "--speculative", "--draft_tokens=0"], "--draft_tokens=0 must be at least"),
    (["--checkpoint={folder}", "--prompt=x", "--speculative", "--draft_tokens=17"], "draft_tokens=17 must be at most"),
    (["--checkpoint={folder}", "--prompt=x", f"--seed={10**20}"], f"--seed={10**20} must be from 0 to 2147483647"),
    (["--checkpoint={folder}", "--prompt=\udcff\udcfe"], "--prompt is not UTF-8 text"),
    (["--checkpoint={bare}", "--prompt=x", "--speculative"], "has no multi-token module to draft with"),
    (["--checkpoint={folder}", "--prompt=x", "--recipe=float23"], r"--recipe='float23' .*did you mean float32"),
    (["--checkpoint={folder}", "--prompt=x", "--cache_dtype=fp9"], r"--cache_dtype='fp9' .*did you mean fp8"),
    (["--checkpoint={folder}", "--prompt=x", "--weights=int"], "--weights='int' must be one of .*did you mean int"),
    (["--checkpoint={folder}", "--prompt=x", "--chat"], "--chat: the checkpoint has no chat template: "),
    (["--checkpoint={folder}", "--prompt=x", "--system=y"], "--system needs --chat"),
    (["--checkpoint={folder}", "--prompt=x", "--seed=one"], "flag --seed=one: must be a whole number$"),
    (["--checkpoint={folder}", "--promt=x"], r"--promt is not a flag \(did you mean --prompt\?\)"),
])
def test_wrong_requests(words, pattern, folder, bare, capsys):
    places = {"folder": folder, "bare": bare, "golden": GOLDEN / "qwen2_tiny"}
    out, error = call(capsys, *(word.format(**places) for word in words), code=2)
    assert out == "" and error.count("\n") == 1 and re.search(pattern, error), error


def test_no_token_is_drawn_beyond_the_end(folder):
    """The end-of-text token stops a row, and is its last."""
    decoder, _, _ = LOADED(folder, None, None)
    found = decoder.generate([[5, 6, 7]], 30, ends=[383])
    end = found.tokens[0][4]
    stopped = decoder.generate([[5, 6, 7]], 30, ends=[end])
    assert stopped.tokens == [found.tokens[0][:found.tokens[0].index(end) + 1]]
