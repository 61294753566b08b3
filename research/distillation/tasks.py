"""Problems with answers that a rule can check: made up, from reasoning-gym, or from files of JSON lines."""

import dataclasses
import functools
import glob
import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from research.data.sources import place_of
from research.distillation.verify import number
from research.errors import RequestError, nearest

CHECKS = ("numeric", "latex")  # that a file's answers may have; reasoning-gym's bring their own
_MARKER = "####"  # what stands before the final answer in GSM8K's solutions
_ANNOTATION = re.compile(r"<<[^<>]*>>")  # and its calculator's notes inside them


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question, its reference answer, and how an answer is checked (`verify.Checker`).

    solution: worked, without the final answer; empty where there is none. name: where it comes from. entry: what
    reasoning-gym made, for its own scorer, which may need no reference answer (then empty); None elsewhere.
    """

    question: str
    answer: str
    solution: str
    check: str
    name: str
    entry: dict[str, Any] | None = None

    @functools.cached_property
    def digest(self) -> bytes:
        """16 bytes of the question alone, however its letters are cased, spaced or encoded."""
        text = " ".join(unicodedata.normalize("NFKC", self.question).casefold().split())
        return hashlib.blake2b(text.encode(), digest_size=16).digest()


@dataclasses.dataclass(frozen=True)
class Task:
    """Where problems come from; the config's group `task`.

    source: arithmetic (of `operations` on numbers of up to `digits` digits, results modulo `modulus` unless that is 0),
    reasoning_gym (`generator`, whose own settings are `options`) or files. count: problems that are made, train and
    test together; of files 0 is all. files, test_files: globs separated by commas; without test files, `test_fraction`
    of the problems is held out. question_field, answer_field, solution_field: of a JSON line; no solution field: what
    stands before #### in the answer, as in GSM8K. check: of files' answers, one of CHECKS.
    """

    source: str
    count: int
    seed: int
    operations: int
    digits: int
    modulus: int
    generator: str
    options: dict[str, Any]
    files: str
    test_files: str
    test_fraction: float
    question_field: str
    answer_field: str
    solution_field: str
    check: str


def train_and_test(task: Task) -> tuple[list[Problem], list[Problem]]:
    """(training, test) problems, each question once and on one side only.

    Which side is decided by the question's text alone, as `data.sources.split` does; with `test_files` by the file,
    and a question that is in both is a test's; then `files` may be empty, for an evaluation. Raises RequestError for a
    task that cannot be had or is empty.
    """
    readers = {"arithmetic": _arithmetic, "reasoning_gym": _reasoning_gym, "files": _files}
    if task.source not in readers:
        raise RequestError.field("task.source", task.source, f"is none of {', '.join(readers)}")
    if task.source == "files" and task.test_files:
        test = _distinct(_read(task, "test_files"))
        return without(_distinct(_read(task, "files")) if task.files else [], test), test
    train, test = split(_distinct(readers[task.source](task)), task.test_fraction)
    if not (train and test):
        raise RequestError.field("task.test_fraction", task.test_fraction,
                                 f"leaves {len(train)} problems for training and {len(test)} for the test")
    return train, test


def split(problems: Sequence[Problem], fraction: float) -> tuple[list[Problem], list[Problem]]:
    """(training, test): the test's are those whose digest, as a number in [0, 1), is below `fraction`."""
    train, test = [], []
    for problem in problems:
        (test if place_of(problem.digest) < fraction else train).append(problem)
    return train, test


def without(problems: Sequence[Problem], others: Sequence[Problem]) -> list[Problem]:
    """The problems whose question is none of the others'."""
    found = {problem.digest for problem in others}
    return [problem for problem in problems if problem.digest not in found]


def _distinct(problems: Sequence[Problem]) -> list[Problem]:
    return list({problem.digest: problem for problem in reversed(problems)}.values())[::-1]


def _arithmetic(task: Task) -> list[Problem]:
    """`count` different expressions; the solution rewrites the expression, one operation a line, until it is a number.

    Problem i of a seed is the same on every machine.
    """
    for name, value in (("count", task.count), ("operations", task.operations), ("digits", task.digits)):
        if value < 1:
            raise RequestError.field(f"task.{name}", value, "must be at least 1")
    if task.modulus == 1 or task.modulus < 0:
        raise RequestError.field("task.modulus", task.modulus, "must be at least 2, or 0 for results as they are")
    n = task.operations
    there_are = math.comb(2 * n, n) // (n + 1) * 3**n * 10 ** (task.digits * (n + 1))  # forms, operators, numbers
    if task.count > there_are:
        raise RequestError.field("task.count", task.count, f"is more than there are: {there_are} different problems of "
                                 f"{n} operations on {task.digits} digits")
    ending = f" modulo {task.modulus}" if task.modulus else ""
    stream = np.random.Philox(key=[task.seed % 2**64, 0])
    found: dict[str, Problem] = {}
    while len(found) < task.count:
        tree = _expression(lambda bound: int(stream.random_raw() % bound), n, 10**task.digits)
        lines = [_written(tree)]
        while not isinstance(tree, int):
            tree = _reduced(tree, task.modulus)
            lines.append(_written(tree))
        question = f"Compute {lines[0]}{ending}."
        if question not in found:
            found[question] = Problem(question, lines[-1], "\n= ".join(lines), "numeric", f"arithmetic:{len(found)}")
    return list(found.values())


def _expression(below, operations: int, bound: int):
    """A number below `bound`, or (left, operator, right) with so many operators in all."""
    if not operations:
        return below(bound)
    left = below(operations)
    return (_expression(below, left, bound), "+-*"[below(3)], _expression(below, operations - 1 - left, bound))


def _written(tree) -> str:
    """Every operand that is no plain number is in parentheses, and so are negative numbers."""
    def operand(part) -> str:
        return f"({_written(part)})" if isinstance(part, tuple) or part < 0 else str(part)

    return str(tree) if isinstance(tree, int) else f"{operand(tree[0])} {tree[1]} {operand(tree[2])}"


def _reduced(tree, modulus: int):
    """The tree with one operation done, the first of those on two numbers: its least remainder, unless modulus is 0."""
    left, operator, right = tree
    if not isinstance(left, int):
        return _reduced(left, modulus), operator, right
    if not isinstance(right, int):
        return left, operator, _reduced(right, modulus)
    result = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return result % modulus if modulus else result


def _reasoning_gym(task: Task) -> list[Problem]:
    try:
        import reasoning_gym  # optional: this source alone needs it
    except ImportError:
        raise RequestError.field("task.source", task.source, "needs a package that is not installed: pip install "
                                 "-r requirements-distill.txt") from None
    if task.count < 1:
        raise RequestError.field("task.count", task.count, "must be at least 1")
    try:
        entries = reasoning_gym.create_dataset(task.generator, size=task.count, seed=task.seed, **task.options)
    except Exception as error:  # an unknown name, or whatever a generator says of its options
        raise RequestError.field("task.generator", task.generator,
                                 f"with task.options={task.options} is refused: {error}") from None
    return [Problem(entry["question"], str(entry["answer"] or ""), "", "reasoning_gym",
                    f"{task.generator}:{count}", entry) for count, entry in enumerate(entries)]


def _files(task: Task) -> list[Problem]:
    return _read(task, "files")


def _read(task: Task, field: str) -> list[Problem]:
    """The problems of `task.files` or `task.test_files`, in the order of the files' names and of their lines."""
    if task.check not in CHECKS:
        expected = f"is none of {', '.join(CHECKS)}{nearest(task.check, CHECKS)}"
        raise RequestError.field("task.check", task.check, expected)
    keys = {f"task.{name}": getattr(task, name) for name in ("question_field", "answer_field")}
    if task.solution_field:
        keys["task.solution_field"] = task.solution_field
    problems = [_problem(where, texts, task, field)
                for where, texts in read_rows(f"task.{field}", getattr(task, field), keys)]
    if not problems:
        raise RequestError.field(f"task.{field}", getattr(task, field), "holds no problem" if getattr(task, field) else
                                 "names no file: config.task.files are problems to learn from, config.task.test_files "
                                 "those of a test, which --stage=evaluate needs alone")
    return problems[:task.count or None]


def read_rows(name: str, patterns: str, keys: dict[str, str]) -> list[tuple[str, dict[str, str]]]:
    """(`path:line`, texts) of every JSON line of the files that match, in the order of names and lines.

    name: of the config's field that holds `patterns`, globs separated by commas. keys: {config field: key of the
    lines}; a text stands under the last part of its config field. Raises RequestError.
    """
    paths = []
    for pattern in filter(None, map(str.strip, patterns.split(","))):
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not matches:
            which = "" if pattern == patterns else f"{pattern!r} "
            raise RequestError.field(name, patterns, f"{which}matches no file")
        paths += [path for path in matches if path not in paths]
    return [row for path in paths for row in _rows_of(path, name, patterns, keys)]


def _rows_of(path: str, field: str, patterns: str, keys: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    def refuse(expectation: str) -> RequestError:
        return RequestError.field(field, patterns, expectation)

    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().split("\n")
    except OSError as error:
        raise refuse(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise refuse(f"{path} is not UTF-8 text") from None
    for count, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{count}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise refuse(f"{where} is not JSON ({getattr(error, 'msg', 'nested too deeply')})") from None
        texts = {}
        for name, key in keys.items():
            if not isinstance(row, dict) or key not in row:
                raise refuse(f"{where} has no field {key!r} (config.{name})")
            value = row[key]
            if isinstance(value, int | float) and not isinstance(value, bool):
                value = str(value)
            if not isinstance(value, str):
                raise refuse(f"{where} has a field {key!r} that is not text (config.{name})")
            texts[name.rpartition(".")[2]] = value
        yield where, texts


def _problem(where: str, texts: dict[str, str], task: Task, field: str) -> Problem:
    def refuse(expectation: str) -> RequestError:
        return RequestError.field(f"task.{field}", getattr(task, field), expectation)

    before, _, answer = texts["answer_field"].rpartition(_MARKER)
    answer, solution = answer.strip(), texts.get("solution_field", _ANNOTATION.sub("", before).strip())
    if not texts["question_field"].strip() or not answer:
        raise refuse(f"{where} has an empty {'answer' if not answer else 'question'}")
    if task.check == "numeric" and number(answer) is None:
        raise refuse(f"{where} has the answer {answer!r}, which is no number: config.task.check='latex' reads formulae")
    return Problem(texts["question_field"].strip(), answer, solution, task.check, where)
