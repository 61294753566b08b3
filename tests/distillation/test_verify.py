import logging
import re
from fractions import Fraction
from pathlib import Path

import pytest

from research.distillation import references, verify
from research.distillation.tasks import Problem
from research.distillation.verify import Checker, number
from research.errors import RequestError
from tests.distillation import gym


@pytest.fixture(scope="module")
def checker():
    with Checker(timeout=30) as made:
        yield made


@pytest.mark.parametrize(("text", "value"), [
    ("18", 18), ("-18.", -18), (" +1,234,567.50 ", Fraction(2469135, 2)), ("$80,000", 80000), ("\\$5", 5),
    ("50\\%", 50),
    ("3/4", Fraction(3, 4)), ("-\\dfrac{3}{4}", Fraction(-3, 4)), ("1{,}000", 1000), (".5", Fraction(1, 2)),
    ("\u22123", -3), ("0.1", Fraction(1, 10)), ("007", 7),
    ("", None), ("12,34", None), ("1/0", None), ("1e9999999999", None), ("two", None), ("5 apples", None),
    ("1 2", None), ("--3", None), ("3.", 3), ("\u0663", None), ("9" * 500, None), ("9**9**9", None),
])
def test_numbers_are_exact(text, value):
    assert number(text) == value


@pytest.mark.parametrize(("reference", "answer", "right"), [
    ("0.3", "3/10", True), ("0.1", "0.1000000000000000055511151231257827", False), ("1,000", "1000.0", True),
    ("1/3", "0.333333", False), ("7", "-7", False), ("7", "seven", False), ("7", None, False),
])
def test_numeric_answers(checker, reference, answer, right):
    assert checker.right(Problem("", reference, "", "numeric", ""), answer) == right


@pytest.mark.parametrize(("reference", "answer", "right"), [
    ("\\frac{14}{3}", "\\dfrac{28}{6}", True), ("\\frac{14}{3}", "\\frac{14}{4}", False),
    ("p - q", "-q + p", True), ("p - q", "q - p", False),
    ("(3, \\frac{\\pi}{2})", "\\left(3,\\pi/2\\right)", True), ("(3, \\frac{\\pi}{2})", "(\\frac{\\pi}{2}, 3)", False),
    ("2\\sqrt{3}", "\\sqrt{12}", True), ("2\\sqrt{3}", "\\sqrt{6}", False),
    ("1,-2", "-2, 1", True), ("1,-2", "1", False), ("1,-2", "1, 2", False),
    ("(x+1)^2", "x^2 + 2x + 1", True), ("(x+1)^2", "x^2 + 1", False),
    ("[0, 1)", "[0,1)", True), ("[0, 1)", "[0, 1]", False),
    ("5", "x = 5", True), ("\\text{Evelyn}", "Evelyn", True), ("\\text{Evelyn}", "\\text{Carla}", False),
    ("52_8", "52_{8}", True), ("52_8", "52_9", False), ("52_8", "53_8", False),
    ("15\\mbox{ cm}^2", "15", True), ("15\\mbox{ cm}^2", "15\\text{ cm}^{2}", True),
    ("15\\mbox{ cm}^2", "15\\mbox{ cm}^3", False),
])
def test_formulae(checker, reference, answer, right):
    assert checker.judged("latex", reference, answer) == right


def test_the_same_text_needs_no_package_and_half_a_formula_is_wrong(checker, monkeypatch):
    problem = Problem("", "\\frac{1}{2}", "", "latex", "")
    assert not checker.right(problem, "\\frac{1}{")
    monkeypatch.setattr(verify, "_PACKAGES", {"latex": "no_such_package"})
    with Checker(timeout=1) as without:
        assert without.right(problem, "\\frac {1} {2}")
        with pytest.raises(RequestError, match="checking latex answers .* pip install -r requirements-distill.txt"):
            without.right(problem, "0.5")


def test_an_answer_that_brings_the_checker_down_is_wrong_and_logged(tmp_path, monkeypatch, caplog):
    gym.install(tmp_path, monkeypatch)
    problem = Problem("", "4", "", "reasoning_gym", "", {"metadata": {"source_dataset": "sums", "numbers": (1, 3)}})
    with Checker(timeout=3) as checker, caplog.at_level(logging.WARNING, "absl"):
        verdicts = [checker.right(problem, answer) for answer in ("4", "5", "sleep", "4", "raise", "die", "4")]
        process = checker._process
    assert verdicts == [True, False, False, True, False, False, True]
    assert checker.failures == {"timeout": 1, "error": 1, "crash": 1}
    lines = [record.getMessage() for record in caplog.records]
    assert [re.search("no verdict in 3 s|ArithmeticError: no such|died with code 3", line).group() for line in lines]
    assert all("counted as wrong" in line and "'4'" in line for line in lines) and "'sleep'" in lines[0]
    with pytest.raises(ValueError, match="closed"):
        process.is_alive()


def test_near_misses_are_other_answers_and_respelt_ones_are_not(checker):
    for answer in ("-\\frac{14}{3}", "\\left( 3, 5 \\right)", "p - q", "1,000"):
        assert all(checker.judged("latex", answer, text) for text in references.respelt(answer).values())
        misses = references.near_misses(answer)
        assert misses and not any(checker.judged("latex", answer, text) for text in misses.values()), misses


def test_a_package_has_one_version_in_all_lists_of_requirements():
    versions: dict[str, set[str]] = {}
    for path in Path().glob("requirements*.txt"):
        for name, version in re.findall(r"^([\w-]+)(?:\[.*\])?==([\w.]+)", path.read_text(), re.MULTILINE):
            versions.setdefault(name, set()).add(version)
    assert "math-verify" in versions and all(len(found) == 1 for found in versions.values()), versions
