import dataclasses
import json
import sys

import pytest

from research.distillation import tasks
from research.distillation.tasks import Task, split, train_and_test, without
from research.errors import RequestError
from tests.distillation import gym

MADE = Task("arithmetic", 300, 0, 3, 2, 0, "", {}, "", "", 0.2, "question", "answer", "", "numeric")


def changed(**fields) -> Task:
    return dataclasses.replace(MADE, **fields)


def from_lines(path, *rows, **fields):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return changed(source="files", files=str(path), count=0, test_fraction=0.5, **fields)


def test_each_line_of_a_worked_solution_equals_the_answer():
    train, test = train_and_test(MADE)
    assert len(train) + len(test) == 300
    for problem in train + test:
        lines = problem.solution.split("\n= ")
        assert problem.question == f"Compute {lines[0]}."
        assert len(lines) == 4 and lines[-1] == problem.answer
        assert {eval(line) for line in lines} == {int(problem.answer)}, problem
        assert [sum(line.count(sign) for sign in "+*") + line.count(" - ") for line in lines] == [3, 2, 1, 0]


def test_results_are_least_remainders_of_a_modulus():
    problems = tasks._arithmetic(changed(digits=1, modulus=7))
    for problem in problems:
        lines = problem.solution.split("\n= ")
        assert problem.question == f"Compute {lines[0]} modulo 7."
        assert {eval(line) % 7 for line in lines} == {int(problem.answer)}, problem
    assert {problem.answer for problem in problems} == set("0123456")
    assert any(eval(problem.solution.split("\n= ")[0]) < 0 for problem in problems)  # so remainders are not C's
    with pytest.raises(RequestError, match=r"config.task.modulus=1 must be at least 2, or 0"):
        train_and_test(changed(modulus=1))


def test_problems_depend_on_the_seed_alone():
    problems = tasks._arithmetic(MADE)
    assert problems[0].solution == "(49 + (25 * 96)) + 70\n= (49 + 2400) + 70\n= 2449 + 70\n= 2519"
    assert tasks._arithmetic(changed(count=20)) == problems[:20]
    assert not {p.digest for p in tasks._arithmetic(changed(seed=1))} & {p.digest for p in problems}


def test_an_expression_is_written_so_that_its_text_decides():
    assert tasks._written(((1, "-", 2), "*", (-3, "-", (4, "+", 5)))) == "(1 - 2) * ((-3) - (4 + 5))"


def test_more_problems_than_there_are_is_refused():
    with pytest.raises(RequestError, match=r"config.task.count=1000 is more than there are: 300 different"):
        train_and_test(changed(count=1000, operations=1, digits=1))


def test_a_question_is_on_one_side_however_it_is_written():
    train, test = split(tasks._arithmetic(MADE), 0.2)
    assert 40 < len(test) < 80
    assert not {p.digest for p in train} & {p.digest for p in test}
    respelt = [dataclasses.replace(p, question=f"  {p.question.upper()}\n") for p in reversed(train + test)]
    again = split(respelt, 0.2)
    assert [{p.digest for p in side} for side in again] == [{p.digest for p in side} for side in (train, test)]
    assert without(respelt, test)[::-1] == respelt[::-1][:len(train)]
    assert train[0].digest != dataclasses.replace(train[0], question=train[0].question.replace("+", "-")).digest


def test_the_format_of_gsm8k_as_it_is(tmp_path):
    rows = [{"question": f"Tom has {n} pens and buys 3. How many?",
             "answer": f"He has {n}+3=<<{n}+3={n + 3}>>{n + 3} pens.\n#### {n + 3},000"} for n in range(30)]
    train, test = train_and_test(from_lines(tmp_path / "train.jsonl", *rows, rows[4] | {"answer": "twice\n#### 1"}))
    assert len(train + test) == 30 and len({p.digest for p in train + test}) == 30
    first = min(train + test, key=lambda p: int(p.name.rsplit(":", 1)[1]))
    assert (first.question, first.answer) == ("Tom has 0 pens and buys 3. How many?", "3,000")
    assert first.solution == "He has 0+3=3 pens."
    assert first.name == f"{tmp_path / 'train.jsonl'}:1"


def test_a_question_of_a_test_file_is_not_trained_on(tmp_path):
    rows = [{"problem": f"What is {n}?", "answer": str(n), "solution": f"It is {n}."} for n in range(6)]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps(rows[2] | {"problem": "what  IS 2?"}) + "\n\n" + json.dumps(rows[5]))
    task = from_lines(tmp_path / "a.jsonl", *rows, question_field="problem", solution_field="solution",
                      test_files=str(held_out), check="latex")
    train, test = train_and_test(task)
    assert [p.answer for p in train] == ["0", "1", "3", "4"]
    assert [(p.answer, p.solution, p.check) for p in test] == [("2", "It is 2.", "latex"), ("5", "It is 5.", "latex")]


@pytest.mark.parametrize(("rows", "fields", "message"), [
    (['{"question": "a"'], {}, r"a.jsonl:1 is not JSON"),
    ([{"question": "a", "answer": "1"}, {"question": "b"}], {},
     r"a.jsonl:2 has no field 'answer' \(config.task.answer_field\)"),
    ([{"question": "a", "answer": "1"}], {"question_field": ""}, r"a.jsonl:1 has no field '' \(config.task.quest"),
    ([["question", "answer"]], {}, r"a.jsonl:1 has no field 'question'"),
    ([{"question": ["a"], "answer": "1"}], {}, r"a.jsonl:1 has a field 'question' that is not text"),
    ([{"question": "a", "answer": "so\n####  "}], {}, r"a.jsonl:1 has an empty answer"),
    ([{"question": "a", "answer": "four"}], {}, r"a.jsonl:1 has the answer 'four', which is no number"),
    ([], {}, r"config.task.files='.*a.jsonl' holds no problem"),
    ([{"question": "a", "answer": 1}], {}, r"config.task.test_fraction=0.5 leaves [01] problems for training"),
    ([], {"check": "numerical"}, r"config.task.check='numerical' is none of numeric, latex \(did you mean numeric"),
    ([], {"test_files": "nowhere/*.jsonl"}, r"config.task.test_files='nowhere/\*.jsonl' matches no"),
])
def test_a_file_that_cannot_be_used_is_refused_in_words(tmp_path, rows, fields, message):
    with pytest.raises(RequestError, match=message):
        train_and_test(from_lines(tmp_path / "a.jsonl", *rows, **fields))


def test_generators_come_with_what_their_scorer_reads(tmp_path, monkeypatch):
    gym.install(tmp_path, monkeypatch)
    made = changed(source="reasoning_gym", generator="sums", options={"terms": 2}, count=40, seed=7)
    train, test = train_and_test(made)
    problem = next(p for p in train + test if p.answer == "10")
    assert (problem.question, problem.check, problem.name) == ("What is 7 + 3?", "reasoning_gym", "sums:3")
    assert problem.entry["metadata"] == {"source_dataset": "sums", "numbers": (7, 3), "terms": 2}
    with pytest.raises(RequestError, match="config.task.generator='product' .* is refused: .*not registered"):
        train_and_test(dataclasses.replace(made, generator="product"))


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(RequestError, match="pip install -r requirements-distill.txt"):
        train_and_test(changed(source="reasoning_gym", generator="sums"))
    with pytest.raises(RequestError, match="config.task.source='gym' is none of arithmetic, reasoning_gym, files"):
        train_and_test(changed(source="gym"))
