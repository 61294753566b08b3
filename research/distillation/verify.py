"""Whether an answer is right: exact numbers, LaTeX by math-verify, and reasoning-gym's own scorers.

What others' code decides runs in a process of its own, with a limit of time and of memory for each answer: an endless
simplification, a power with a billion digits and a crash in C are wrong answers, not the end of a run.
"""

import contextlib
import importlib
import importlib.util
import logging
import multiprocessing
import re
import signal
from collections import Counter
from fractions import Fraction

from absl import logging as absl_logging

from research.errors import RequestError, RunError

_LONGEST_NUMBER = 400  # characters
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"([-+]?)\s*(?:({_DIGITS})(?:\s*/\s*({_DIGITS}))?|\\[dt]?frac\{{({_DIGITS})\}}\{{({_DIGITS})\}})", re.ASCII)
# A numeral's base, and the power of a unit, at the end of an answer: math-verify reads over both.
_BASE = re.compile(r"-?[0-9A-Z]+_\{?(\d+)\}?")
_UNIT_POWER = re.compile(r".*\\(?:text|mbox|mathrm)\{[^{}]*\}\^\{?(\d+)\}?", re.DOTALL)
_PACKAGES = {"latex": "math_verify", "reasoning_gym": "reasoning_gym"}
_START_SECONDS = 120  # of the process, on a busy machine: it imports SymPy
_MEMORY = 4 << 30  # bytes of address space of the process


def number(text: str) -> Fraction | None:
    """The exact value of a number as answers spell it, None for anything else.

    `1,234.50`, `-3/4` and `\\frac{3}{4}` are numbers; currency and percent signs around one are ignored, as GSM8K's
    references leave them out; words and exponents are not read.
    """
    text = text.strip().removesuffix(".")
    if len(text) > _LONGEST_NUMBER:
        return None
    text = re.sub(r"\\?\$|\\?%|\\!", "", text).replace("{,}", ",").replace("\u2212", "-").strip()
    found = _NUMBER.fullmatch(text)
    if not found:
        return None
    sign, *parts = (part.replace(",", "") if part else part for part in found.groups())
    above, below = parts[0] or parts[2], parts[1] or parts[3] or "1"
    if not Fraction(below):
        return None
    return (-1 if sign == "-" else 1) * Fraction(above) / Fraction(below)


class Checker:
    """Says of answers whether they are right. A context manager: leaving it ends the process that it may have started.

    failures: how many answers counted as wrong because the check did not end in time (`timeout`), raised (`error`) or
    died (`crash`); each is logged.
    """

    def __init__(self, timeout: float):
        """timeout: seconds an answer, at the most."""
        self.timeout = timeout
        self.failures: Counter[str] = Counter()
        self._process = self._connection = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end()

    def right(self, problem, answer: str | None) -> bool:
        """Whether `answer` is the reference's, None (there was none) is not. Raises RequestError for a missing package.

        numeric: equal as exact numbers. latex: the same text up to blanks, or equal to math-verify, which ignores
        units and the left side of `x = 5`; bases and powers of units that differ are wrong.
        reasoning_gym: the generator's own score is 1.
        """
        if answer is None:
            return False
        if problem.check == "numeric":
            value = number(answer)
            return value is not None and value == number(problem.answer)
        if problem.check == "latex" and "".join(answer.split()) == "".join(problem.answer.split()):
            return True
        return self.judged(problem.check, problem.answer, answer, problem.entry)

    def judged(self, check: str, reference: str, answer: str, entry: dict | None = None) -> bool:
        """The verdict of the check's own package, in the other process."""
        if not self._process or not self._process.is_alive():
            self._start(check)
        try:
            self._connection.send((check, reference, answer, entry))
            if self._connection.poll(self.timeout):
                right, error = self._connection.recv()
                if error:
                    self._failed("error", error, reference, answer)
                return right
            self._failed("timeout", f"no verdict in {self.timeout:g} s", reference, answer)
        except (EOFError, OSError):
            self._process.join()
            self._failed("crash", f"the checker died with code {self._process.exitcode}", reference, answer)
        self._end()
        return False

    def _failed(self, kind: str, reason: str, reference: str, answer: str) -> None:
        self.failures[kind] += 1
        absl_logging.warning("checker: %s; counted as wrong: %.200r, where the reference is %.200r",
                             reason, answer, reference)

    def _start(self, check: str) -> None:
        self._end()
        if not importlib.util.find_spec(_PACKAGES[check]):
            raise RequestError(f"checking {check} answers needs a package that is not installed: pip install "
                               "-r requirements-distill.txt")
        context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        with contextlib.suppress(EOFError, OSError):
            if self._connection.poll(_START_SECONDS) and self._connection.recv() == "ready":
                return
        self._end()
        raise RunError("the process that checks answers does not start")

    def _end(self) -> None:
        if self._process:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._process.close()
        self._process = self._connection = None


def _serve(connection) -> None:
    """Answers requests until the other end closes: (right, what was raised or nothing)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends this process
    logging.disable()
    with contextlib.suppress(ImportError, ValueError, OSError):  # where the system has no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    for package in _PACKAGES.values():
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
    connection.send("ready")
    judges = {"latex": _same_formula, "reasoning_gym": _scored}
    with contextlib.suppress(EOFError):
        while True:
            check, reference, answer, entry = connection.recv()
            try:
                verdict = judges[check](reference, answer, entry), ""
            except Exception as error:  # whatever a library raises for an odd answer
                verdict = False, f"{type(error).__name__}: {error}"
            connection.send(verdict)


def _same_formula(reference: str, answer: str, _: None) -> bool:
    from math_verify import parse, verify

    for mark in (_BASE, _UNIT_POWER):
        ends = [mark.fullmatch(text.strip().strip("$")) for text in (reference, answer)]
        if all(ends) and ends[0].group(1) != ends[1].group(1):
            return False
    expected, given = (parse(f"\\boxed{{{text}}}", parsing_timeout=None, raise_on_error=True)
                       for text in (reference, answer))
    failed = None
    for one in expected:
        for other in given:
            try:
                if verify(one, other, timeout_seconds=None, raise_on_error=True):
                    return True
            except Exception as error:  # another reading of the same text may still be equal
                failed = error
    if failed:
        raise failed
    return False


def _scored(_: str, answer: str, entry: dict) -> bool:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(entry["metadata"]["source_dataset"])(answer, entry) == 1
