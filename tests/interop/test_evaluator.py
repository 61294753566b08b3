"""Answers to evaluation harnesses: those of lm-evaluation-harness's own Hugging Face backend; wrong requests."""

import json
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research import harness
from research.data.tokenizer import Tokenizer, _bytes
from research.decoding.generate import Decoder
from research.decoding.sampling import Sampling
from research.errors import RequestError
from research.interop import evaluator as module
from research.interop.evaluator import Evaluator, read_arguments, windows
from research.interop.weights import checked_weights
from tests.commands import exit_code
from tests.interop.test_huggingface import GOLDEN

CASES = json.loads((GOLDEN / "lm_eval.json").read_text())
IDS = [case["checkpoint"] for case in CASES]


@pytest.fixture(scope="module", params=CASES, ids=IDS)
def asked(request):
    """(evaluator of a golden checkpoint, what was asked of the harness's own backend and what it answered)."""
    case = request.param
    _, model, variables = checked_weights(GOLDEN / case["checkpoint"])
    tokenizer = Tokenizer(_bytes())
    return Evaluator(Decoder(model, variables), tokenizer, [tokenizer.bos_id] if case["beginning"] else [], 4), case


def test_likelihoods_are_the_harness_own(asked):
    evaluator, case = asked
    rows, told = case["loglikelihood"], {}
    found = evaluator.loglikelihood([row[:2] for row in rows], told.__setitem__)
    assert [sum_ for sum_, _ in found] == pytest.approx([row[2] for row in rows], rel=0, abs=2e-4)
    assert [greedy for _, greedy in found] == [row[3] for row in rows]
    assert [told[number] for number in range(len(rows))] == found


def test_whole_texts_are_the_harness_own(asked):
    evaluator, case = asked
    rows, told = case["loglikelihood_rolling"], {}
    found = evaluator.loglikelihood_rolling([text for text, _ in rows], told.__setitem__)
    assert found == pytest.approx([answer for _, answer in rows], rel=0, abs=2e-3)
    assert [told[number] for number in range(len(rows))] == found


@pytest.mark.parametrize("asked", CASES[:1], ids=IDS[:1], indirect=True)  # tests/test_generate.py has the other models
def test_texts_are_the_harness_own(asked):
    evaluator, case = asked
    rows, told = case["generate_until"], {}
    found = evaluator.generate_until([row[:2] for row in rows], told.__setitem__)
    assert found == [row[2] for row in rows]
    assert [told[number] for number in range(len(rows))] == found


def test_nothing_is_compiled_for_another_length_or_number(asked):
    evaluator, _ = asked
    evaluator.loglikelihood([("context", " and more")] * 5)
    compiled = module.token_scores._cache_size(), len(evaluator.decoder._compiled)
    evaluator.loglikelihood([("a longer context", " and still more")] * 4 + [("c", "d")] * 7)
    assert (module.token_scores._cache_size(), len(evaluator.decoder._compiled)) == compiled


def test_nothing_asked_and_nothing_to_say():
    evaluator = Evaluator(DECODER, Tokenizer(_bytes()), [], 4)
    assert evaluator.loglikelihood([]) == evaluator.loglikelihood_rolling([]) == evaluator.generate_until([]) == []
    assert evaluator.loglikelihood_rolling([""]) == [0.0]


@pytest.mark.parametrize("asked", CASES[:1], ids=IDS[:1], indirect=True)
def test_draws_of_one_context_differ_between_batches_and_come_again(asked):
    request = ("again", {"do_sample": True, "max_gen_toks": 20})
    texts = asked[0].generate_until([request] * 5)
    assert len(set(texts)) == 5 and asked[0].generate_until([request] * 5) == texts


DECODER = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=10)))


@pytest.mark.parametrize("arguments, pattern", [
    ({"batch_size": 0}, "--batch_size=0 must be at least 1"),
    ({"batch_size": 1, "max_length": 11}, "--max_length=11 must be from 1 to max_position_embeddings=10"),
    ({"batch_size": 1, "max_length": 0}, "--max_length=0 must be from 1"),
])
def test_wrong_sizes(arguments, pattern):
    with pytest.raises(RequestError, match=pattern):
        Evaluator(DECODER, None, [], **arguments)


def test_what_is_longer_than_the_model_reads():
    evaluator = Evaluator(DECODER, Tokenizer(_bytes()), [], 4)
    with pytest.raises(RequestError, match="a continuation of 11 tokens is longer than max_length=10"):
        evaluator.loglikelihood([("a", "x" * 11)])
    with pytest.raises(RequestError, match="max_gen_toks=10 must be below max_length=10"):
        evaluator.generate_until([("a", {"max_gen_toks": 10})])


@given(st.integers(0, 40), st.integers(1, 12))
def test_windows_predict_every_token_once_after_all_that_fits(count, length):
    ids = list(range(count))
    found = list(windows(ids, -1, length))
    assert [i for _, predicted in found for i in predicted] == ids
    text = [-1, *ids]
    for before, predicted in found:
        read = [*before, *predicted][:-1]
        assert len(read) == min(length, predicted[-1] + 1)
        assert text[predicted[-1] + 1 - len(read):predicted[-1] + 1] == read


@pytest.mark.parametrize("arguments, until, most, sampling", [
    ({}, (), 256, Sampling()),
    ({"until": "end", "max_new_tokens": "7"}, ("end",), 7, Sampling()),
    ({"until": ["a", "", "b"], "max_tokens": 3, "max_gen_toks": 2}, ("a", "b"), 2, Sampling()),
    ({"temperature": 0.5}, (), 256, Sampling(0.5)),
    ({"temperature": 0.5, "do_sample": False, "top_p": 0.1}, (), 256, Sampling()),
    ({"do_sample": True, "top_k": 5, "top_p": 0.9, "min_p": 0.1}, (), 256, Sampling(1.0, 5, 0.9, 0.1)),
    ({"do_sample": True, "temperature": 0}, (), 256, Sampling()),
    ({"do_sample": None, "until": None}, (), 256, Sampling()),
])
def test_generation_arguments(arguments, until, most, sampling):
    assert read_arguments(arguments) == (until, most, sampling)


@pytest.mark.parametrize("arguments, pattern", [
    ({"num_beams": 4}, "num_beams=4 is not supported"),
    ({"temprature": 1}, r"temprature=1 is not supported \(did you mean temperature\?\)"),
    ({"until": 3}, "until=3 must be a text"),
    ({"until": ["a", 3]}, "must be a text or a list of texts"),
    ({"max_gen_toks": 0}, "max_gen_toks=0 must be at least 1"),
    ({"max_gen_toks": "many"}, "many"),
    ({"temperature": -1}, "temperature=-1.0 must be"),
    ({"do_sample": True, "top_p": 0}, "top_p=0.0 must be"),
])
def test_wrong_generation_arguments(arguments, pattern):
    with pytest.raises(RequestError, match=f"^generation_kwargs: .*{pattern}"):
        read_arguments(arguments)


def test_the_model_hands_each_request_on_and_each_answer_to_the_cache(monkeypatch):
    """With lm_eval's names replaced; `make eval-test` has the real ones."""
    class LM:
        def __init__(self):
            self.kept = []
            self.cache_hook = SimpleNamespace(add_partial=lambda *what: self.kept.append(what))

    registered = {}
    for name, content in {"lm_eval": {}, "lm_eval.api": {}, "lm_eval.api.model": {"LM": LM}, "lm_eval.api.registry": {
            "register_model": lambda name: lambda kind: registered.setdefault(name, kind)}}.items():
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(content)
    monkeypatch.delitem(sys.modules, "research.interop.lm_eval", raising=False)
    from research.interop import lm_eval

    monkeypatch.setattr(lm_eval, "load", lambda folder, recipe, cache: (DECODER, recipe, [folder.name]))
    model = registered["parsimony"]("some/where", "4", 9, "bfloat16", 5)
    made = model.evaluator
    assert (made.batch_size, made.max_length, made.seed, made.tokenizer, made.first) == (4, 9, 5, "bfloat16", ["where"])
    for name, arguments, given_, answer in (("loglikelihood", ("a", "b"), ("a", "b"), (-1.5, True)),
                                            ("loglikelihood_rolling", ("a",), "a", -2.5),
                                            ("generate_until", ("a", {}), ("a", {}), "text")):
        def answers(requests, done, given_=given_, answer=answer):
            assert requests == [given_]
            done(0, answer)
            return [answer]

        setattr(made, name, answers)
        assert getattr(model, name)([SimpleNamespace(args=arguments)]) == [answer]
        assert model.kept.pop() == (name, arguments, answer)
    with pytest.raises(RequestError, match="--batch_size='auto' must be a whole number"):
        lm_eval.ParsimonyLM("some/where", "auto")
    monkeypatch.delitem(sys.modules, "research.interop.lm_eval")


@pytest.mark.parametrize("words, pattern", [
    ([], "--checkpoint is required"),
    (["--checkpoint=x"], "--tasks is required"),
    (["--checkpoint=x", "--tasks=,"], "--tasks is required"),
    (["--checkpoint=x", "--tasks=a", "--include_path=/does/not/exist"], "--include_path='/does/not/exist' is not a"),
    (["--checkpoint=x", "--tasks=a", "--num_fewshot=-1"], "--num_fewshot=-1 must be at least 0"),
    (["--checkpoint=x", "--tasks=a", "--batch_size=0"], "--batch_size=0 must be at least 1"),
    (["--checkpoint=x", "--tasks=a", "--limit=0"], "--limit=0.0 must be above 0"),
    (["--checkpoint=x", "--tasks=a", "--recipe=fp8"], "--recipe='fp8' must be one of float32, bfloat16"),
    (["--checkpoint=x", "--tasks=a", "--samples"], "--samples needs --output"),
    (["--checkpoint=x", "--tasks=a", "--output=/does/not/exist.json"], "--output='/does/not/exist.json' is in"),
    (["--checkpoint=x", "--tasks=a"], "--checkpoint='x' does not exist"),
    (["--checkpoint=.", "--tasks=a"], r"lm-evaluation-harness cannot be imported .*pip install -r requirements-eval"),
])
def test_wrong_requests_are_one_line(words, pattern, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    assert exit_code(harness, *words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.match(f"error: {pattern}", said)
