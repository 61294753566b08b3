import json
from types import SimpleNamespace

import pytest

from research.data.tokenizer import Tokenizer, _bytes
from research.decoding.generate import Decoder, Generation
from research.decoding.sampling import Sampling
from research.distillation import made
from research.distillation.sample import Plan, Sample, _seed, drafting, read, sample
from research.distillation.tasks import Problem
from research.distillation.template import TEMPLATES
from research.errors import RequestError
from tests import tiny

TOKENIZER = Tokenizer(_bytes())
FIRST = [TOKENIZER.bos_id]
PROBLEMS = [Problem(f"What is {n} + {n}?", str(2 * n), "", "numeric", f"sum:{n}") for n in range(5)]
PLAN = Plan(samples=3, batch_size=4, max_tokens=12, sampling=Sampling(0.8), seed=3, draft_tokens=0)


class Echo:
    """A decoder whose responses say which prompt, row and seed they come from; `fails_at` a call it is interrupted."""

    model = SimpleNamespace(mtp=SimpleNamespace(num_nextn_predict_layers=0),
                            config=SimpleNamespace(max_position_embeddings=60))

    def __init__(self, fails_at: int = 0):
        self.calls, self.fails_at = [], fails_at

    def generate(self, prompts, max_tokens, sampling, draft_tokens, seed, ends):
        self.calls.append(len(prompts))
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        rows = [[*TOKENIZER.encode(f"{sum(prompt)}\u2028{row}:{seed}").tolist()[:max_tokens - row % 2], *ends[:row % 2]]
                for row, prompt in enumerate(prompts)]
        return Generation(rows, 10, [7, 3][:draft_tokens], 0.0, 1.0)


RECORD = {"template": "plain", "sampling.temperature": 0.8, "sampling.top_p": 1.0, "sampling.max_tokens": 12,
          "sampling.seed": 3, "sampling.batch_size": 4, "weights": "ab", "model": "/a/model"}


def run(path, decoder, problems=PROBLEMS, plan=PLAN, record=RECORD):
    return sample(path, problems, decoder, TOKENIZER, FIRST, TEMPLATES["plain"], plan, record)


@pytest.fixture
def whole(tmp_path):
    """What an undisturbed run leaves."""
    run(tmp_path / "whole.jsonl", Echo())
    return (tmp_path / "whole.jsonl").read_bytes()


def test_each_problem_is_sampled_so_often(tmp_path):
    decoder = Echo()
    done = run(tmp_path / "samples.jsonl", decoder)
    found = read(tmp_path / "samples.jsonl")
    assert [(s.problem, s.number) for s in found] == [(p.digest.hex(), n) for p in PROBLEMS for n in range(3)]
    assert decoder.calls == [4] * 4  # one shape, so one compilation
    assert done["samples"] == 15 and done["tokens"] == sum(s.tokens for s in found) and done["tokens_per_second"] > 0
    assert [s.ended for s in found[:4]] == [False, True, False, True] and all(s.tokens == 12 for s in found)
    assert len({s.text for s in found}) == 15  # every prompt and row draws its own, and every batch:
    run(tmp_path / "one.jsonl", Echo(), PROBLEMS[:1], Plan(**PLAN.__dict__ | {"samples": 8}))
    assert len({s.text for s in read(tmp_path / "one.jsonl")}) == 8
    prompt = [*FIRST, *TOKENIZER.encode("Question: What is 0 + 0?\n<think>\n").tolist()]
    assert found[1].text.startswith(str(sum(prompt)))


def test_what_comes_of_drafts_is_told(tmp_path):
    decoder = Echo()
    decoder.model = SimpleNamespace(**decoder.model.__dict__ | {"mtp": SimpleNamespace(num_nextn_predict_layers=1)})
    done = run(tmp_path / "drafted.jsonl", decoder, plan=Plan(**PLAN.__dict__ | {"draft_tokens": 2}))
    assert (done["drafted"], done["accepted"]) == (4 * 20, 4 * 10) and drafting(done) == ", 50.0% of drafts accepted"
    done = run(tmp_path / "plain.jsonl", decoder)
    assert done["drafted"] == done["accepted"] == 0 and drafting(done) == drafting({"samples": 3}) == ""


@pytest.mark.parametrize("left", [0, 1, 70, 500, 900, -1])
def test_a_killed_run_is_continued_without_loss_or_repetition(tmp_path, whole, left):
    """Cut anywhere: before a line, within one, behind the last."""
    path = tmp_path / "samples.jsonl"
    path.write_bytes(whole[:left])
    run(path, Echo())
    assert path.read_bytes() == whole
    decoder = Echo()
    assert run(path, decoder)["samples"] == 0 and decoder.calls == []


def test_an_interrupted_run_has_its_whole_batches_on_disk(tmp_path, whole):
    path = tmp_path / "samples.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(path, Echo(fails_at=3))
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:8])
    decoder = Echo()
    run(path, decoder)
    assert path.read_bytes() == whole and decoder.calls == [4, 4]


def test_samples_of_another_task_are_neither_mixed_nor_lost(tmp_path, whole):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(whole)
    with pytest.raises(RequestError, match=r"samples.jsonl:1 is sample 0 of another problem than sum:1"):
        run(path, Echo(), PROBLEMS[1:])
    with pytest.raises(RequestError, match=r"holds 15 samples where 12 are asked for"):
        run(path, Echo(), PROBLEMS[:4])
    assert path.read_bytes() == whole


@pytest.mark.parametrize(("name", "value", "message"), [
    ("template", "deepseek", r"config\.template='deepseek' is not the 'plain' that .*samples\.jsonl was drawn with"),
    ("sampling.temperature", 1.5, r"config\.sampling\.temperature=1\.5 is not the 0\.8 that .*, or remove .*jsonl to"),
    ("sampling.top_p", 0.5, r"config\.sampling\.top_p=0\.5 is not the 1\.0 that"),
    ("sampling.max_tokens", 10, r"config\.sampling\.max_tokens=10 is not the 12 that"),
    ("sampling.seed", 4, r"config\.sampling\.seed=4 is not the 3 that"),
    ("weights", "cd", r"was drawn from /a/model, whose weights were not those of /a/model now"),
])
@pytest.mark.parametrize("left", [500, None])
def test_samples_of_other_settings_are_not_taken_for_these(tmp_path, left, name, value, message):
    """Neither continued nor, where all are there, told as drawn with what is asked for now."""
    path = tmp_path / "samples.jsonl"
    run(path, Echo())
    path.write_bytes(content := b"".join(path.read_bytes()[:left].rpartition(b"\n")[:2]))
    with pytest.raises(RequestError, match=message):
        run(path, Echo(), record=RECORD | {name: value})
    assert path.read_bytes() == content
    run(path, Echo(), record=RECORD | {"sampling.batch_size": 2, "model": "/b/model"})  # the same distribution
    path.unlink()
    run(path, Echo(), record=RECORD | {name: value})
    assert made.read(path) == RECORD | {name: value}


def test_older_samples_without_a_record_go_on_with_a_warning(tmp_path, whole, caplog):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(whole[:500])
    run(path, Echo())
    assert path.read_bytes() == whole and not made.read(path)
    assert f"{path} has no record of what it was drawn with" in caplog.text


@pytest.mark.parametrize(("changes", "problems", "message"), [
    ({"max_tokens": 50}, PROBLEMS, "config.sampling: prompt 1 .* more than max_position_embeddings=60"),
    ({"draft_tokens": 1}, PROBLEMS, "config.sampling: the checkpoint has no multi-token module to draft with"),
    ({}, [], "there is no problem"),
])
def test_what_cannot_be_sampled_is_refused_before_anything_is_written(tmp_path, changes, problems, message):
    path = tmp_path / "samples.jsonl"
    with pytest.raises(RequestError, match=message):
        run(path, Echo(), problems, Plan(**PLAN.__dict__ | changes))
    assert not path.exists()


@pytest.mark.parametrize(("content", "message"), [
    (None, "cannot be read: No such file"), ("", "holds no sample"), ('{"problem": "a"}\n', "a.jsonl:1 is no sample"),
    ("nonsense\n", "a.jsonl:1 is no sample: expected an object with problem, number, text, tokens, ended"),
    ('{"problem": "a", "number": 0, "text": 4, "tokens": 1, "ended": true}\n', "its text is 4, expected text"),
    ('{"problem": "a", "number": true, "text": "", "tokens": 1, "ended": true}\n', "number is true, expected a whole"),
])
def test_a_file_without_samples_is_refused_in_words(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RequestError, match=message):
        read(path)


def test_the_decoder_of_a_model(tmp_path):
    """Sampled rows are the decoder's own, end of text and all."""
    s = tiny.settings(tiny.DENSE | {"model.vocab_size": 320, "model.num_hidden_layers": 1})
    model, variables = tiny.model(s)
    decoder, path = Decoder(model, variables), tmp_path / "samples.jsonl"
    plan = Plan(samples=2, batch_size=2, max_tokens=8, sampling=Sampling(1.0), seed=0, draft_tokens=0)
    run(path, decoder, PROBLEMS[:1], plan)
    prompt = [*FIRST, *TOKENIZER.encode(TEMPLATES["plain"].prompt(PROBLEMS[0].question)).tolist()]
    rows = decoder.generate([prompt] * 2, 8, Sampling(1.0), seed=_seed(0, 0), ends=[TOKENIZER.eos_id]).tokens
    assert rows[0] != rows[1]
    assert read(path) == [Sample(PROBLEMS[0].digest.hex(), n, TOKENIZER.decode(row), len(row),
                                 row[-1] == TOKENIZER.eos_id) for n, row in enumerate(rows)]
    assert json.loads(path.read_text().split("\n")[0])["number"] == 0
