import dataclasses
import json

import pytest

from research.distillation.rejection import REASONS, Limits, foreign_share, most_repeated, verify, write
from research.distillation.sample import Sample
from research.distillation.tasks import Problem
from research.distillation.verify import Checker
from research.errors import RequestError

SUM = Problem("What is 2 + 2?", "4", "", "numeric", "sum:2")
OTHER = Problem("Сколько будет 3 + 3?", "6", "", "numeric", "sum:3")
LIMITS = Limits(max_tokens=50, foreign_share=0.05, repeated_words=3, repeated_times=3, per_problem=2)


def said(text: str, problem: Problem = SUM, tokens: int = 20, ended: bool = True, number: int = 0) -> Sample:
    return Sample(problem.digest.hex(), number, text, tokens, ended)


def verified(*samples, limits=LIMITS):
    with Checker(timeout=5) as checker:
        return verify(samples, [SUM, OTHER], checker, limits)


GOOD = "two and two</think>\\boxed{4}"


@pytest.mark.parametrize(("sample", "reason"), [
    (said("two and two</think>\\boxed{5}"), "wrong"),
    (said("two and two \\boxed{4}"), "wrong"),  # the thought has no end, so there is no answer
    (said(GOOD, ended=False), "unfinished"),
    (said("</think>\\boxed{4}"), "malformed"),
    (said(GOOD, tokens=51), "long"),
    (said("two and 二加二等于四 makes four</think>\\boxed{4}"), "mixed"),
    (said("we add them " * 3 + "</think>\\boxed{4}"), "repeating"),
    (said(GOOD), ""),
    (said("we add them " * 2 + "</think>\\boxed{4}"), ""),
    (said("α plus β, две и две</think>\\boxed{6}", OTHER), ""),  # the question's own script
])
def test_what_is_rejected_and_why(sample, reason):
    found = verified(sample)
    assert found.counts == {"given": 1, "kept": int(not reason)} | {name: int(name == reason) for name in REASONS}
    assert found.kept == ([] if reason else [sample])
    assert found.pass_rate == {sample.problem: float(reason != "wrong")}


def test_duplicates_go_and_a_problem_has_its_cap():
    samples = [said(GOOD), said("two  and\ntwo</think>\\boxed{4}", number=1), said("a" + GOOD, number=2),
               said("b" + GOOD, number=3), said("</think>\\boxed{0}", number=4),
               said("т три</think>\\boxed{6}", OTHER)]
    found = verified(*samples)
    assert found.kept == [samples[0], samples[2], samples[5]]
    counted = {"given": 6, "kept": 3, "duplicate": 1, "surplus": 1, "wrong": 1}
    assert {name: count for name, count in found.counts.items() if count} == counted
    assert found.counts["given"] == found.counts["kept"] + sum(found.counts[name] for name in REASONS)
    assert found.pass_rate == {SUM.digest.hex(): 0.8, OTHER.digest.hex(): 1.0}


def test_what_is_written_can_be_taught(tmp_path):
    found = verified(said(GOOD, number=7), said("x</think>\\boxed{1}"))
    write(tmp_path / "verified.jsonl", found, [SUM, OTHER])
    (row,) = map(json.loads, (tmp_path / "verified.jsonl").read_text().splitlines())
    assert row == {"question": SUM.question, "response": GOOD, "answer": "4", "problem": SUM.digest.hex(), "number": 7,
                   "tokens": 20}


def test_measures_of_a_text():
    assert most_repeated("a b a b a b", 2) == 3 and most_repeated("a b", 3) == 0
    assert foreign_share("abc да", "What?") == pytest.approx(0.4)
    assert foreign_share("x² ≥ 𝑥 α 3", "What?") == 0 and foreign_share("12 + 3", "What?") == 0


def test_what_does_not_belong_is_refused():
    with pytest.raises(RequestError, match="a sample is of the problem 00, which the task does not have"):
        verified(dataclasses.replace(said(GOOD), problem="00"))
