"""Estimates of two problems by hand, what a run's training took, and the report."""

import json
from types import SimpleNamespace

import pytest

from research.accounting import flops
from research.distillation import evaluate
from research.distillation.sample import Sample
from research.distillation.tasks import Problem
from research.distillation.verify import Checker
from tests import tiny

PROBLEMS = [Problem("1+1?", "2", "", "numeric", "a"), Problem("2+2?", "4", "", "numeric", "b")]


def said(problem: Problem, number: int, answer: str, tokens: int, ended: bool = True) -> Sample:
    return Sample(problem.digest.hex(), number, f"so\n</think>\n\\boxed{{{answer}}}", tokens, ended)


@pytest.fixture(scope="module")
def found():
    """Problem a: 2, 2.0 and 3; problem b: 5, 5 and 4, one without an end."""
    sampled = [said(PROBLEMS[0], n, answer, 10) for n, answer in enumerate(("2", "2.0", "3"))]
    sampled += [said(PROBLEMS[1], n, answer, 40, n != 1) for n, answer in enumerate(("5", "5", "4"))]
    greedy = [said(PROBLEMS[1], 0, "4", 9), said(PROBLEMS[0], 0, "0", 9)]  # in any order
    return evaluate.estimates({"sampled": sampled, "greedy": greedy}, PROBLEMS, Checker(1.0))


def test_estimates_by_hand(found):
    assert found["k"] == 3 and found["pass_at_1"]["value"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert found["pass_at_k"] == 1 and found["cons_at_k"] == 0.5  # 2 and 2.0 are one answer
    assert found["greedy"]["value"] == 0.5 and found["tokens"] == 25
    assert found["ended"] == pytest.approx(5 / 6) and found["well_formed"] == 1
    assert found["tokens_by_decile"][0] == 10 and found["tokens_by_decile"][-1] == 40


@pytest.mark.parametrize(("check", "reference", "answers", "cons"), [
    ("latex", "\\frac{1}{2}", ["0.5", "3", "\\frac{2}{4}", "3 "], 0.5),  # two votes each
    ("latex", "7", ["\\frac{1}{2}", "0.5", "7"], 0.0), ("latex", "7", ["0.5", "0.6", "7", "7.0"], 1.0),
    ("numeric", "7", ["1,000", "1000.0", "7"], 0.0), ("numeric", "7", ["one", "one", "7"], 0.0),
])
def test_equal_answers_vote_together(check, reference, answers, cons):
    problem = Problem("?", reference, "", check, "a")
    with Checker(20.0) as checker:
        lines = [said(problem, number, answer, 1) for number, answer in enumerate(answers)]
        assert evaluate.estimates({"sampled": lines}, [problem], checker)["cons_at_k"] == cons


def test_answers_that_the_checker_failed_on_are_counted_and_told():
    class Failing(Checker):
        def judged(self, *_):
            self._failed("timeout", "no verdict", "", "")
            return False

    problem, checker = Problem("?", "7", "", "latex", "a"), Failing(1.0)
    checker.failures["crash"] = 3  # of earlier answers
    counts = evaluate.estimates({"sampled": [said(problem, n, "x", 1) for n in range(2)]}, [problem], checker)
    assert counts["checker_failures"] == {"timeout": 2} and counts["pass_at_1"]["value"] == 0
    told, = evaluate._failures(counts["checker_failures"], "answers of base")
    assert told == "The checker failed on answers of base, which count as wrong: 2 timeout.\n"
    assert evaluate._failures({}, "samples") == []


def test_a_rollouts_operations_are_counted_with_the_updates(tmp_path):
    s = tiny.settings(tiny.DENSE)
    lines = [{"step": 1, "split": "train", "tokens": 100, "forward_tokens": 60, "teacher_flops": 3e9},
             {"step": 2, "split": "train", "tokens": 200, "forward_tokens": 90, "teacher_flops": 4e9},
             {"step": 2, "split": "validation"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = evaluate.facts(tmp_path, s, 2)
    assert found["flops"] == (200 + 150 / 3) * flops.training_per_token(s) and found["teacher_flops"] == 7e9
    found = evaluate.facts(tmp_path / "nowhere", s, None)
    assert found["flops"] == found["teacher_flops"] == 0


def test_the_paper_has_its_row(found):
    evaluation = SimpleNamespace(published="Theirs", published_pass_at_1=28.9, published_cons_at_k=0.0)
    row = found | {"parameters": 5, "step": 1, "flops": 2e12, "teacher_flops": 0.0}
    table = evaluate.table({"ours": row, "on_policy": row | {"teacher_flops": 3e12}}, evaluation).splitlines()
    assert len({line.count("|") for line in table}) == 1 and len(table) == 5
    assert table[2].startswith("| ours | 0.00M | 50.0% (") and table[2].endswith("| 83.3% | 2.0 | |")
    assert table[3].endswith("| 83.3% | 2.0 | 3.0 |")
    assert table[-1] == "| Theirs, published | | 28.9% | |  | | | | | |"
