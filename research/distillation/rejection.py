"""Which samples a student is taught: the right ones, finished, in one language, without loops, once (R1 §2.3.3)."""

import dataclasses
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from research.distillation.sample import Sample
from research.distillation.tasks import Problem
from research.distillation.template import final_answer, well_formed
from research.distillation.verify import Checker
from research.errors import RequestError
from research.files import write_whole

REASONS = ("wrong", "unfinished", "malformed", "long", "mixed", "repeating", "duplicate", "surplus")  # first that holds
_EVERYWHERE = {"LATIN", "GREEK"}  # scripts that formulae use in any language


@dataclasses.dataclass(frozen=True)
class Limits:
    """max_tokens of a response; foreign_share: of its letters, the most in scripts that the question does not use;
    repeated_words: a run of so many words must not come `repeated_times` times; per_problem: samples kept of each."""

    max_tokens: int
    foreign_share: float
    repeated_words: int
    repeated_times: int
    per_problem: int


@dataclasses.dataclass(frozen=True)
class Verified:
    """The kept samples, how many were given and rejected for each reason, and of each problem, by its digest in
    hexadecimal, the share of its samples whose answer is right, whatever else is wrong with them."""

    kept: list[Sample]
    counts: dict[str, int]
    pass_rate: dict[str, float]


def verify(samples: Sequence[Sample], problems: Sequence[Problem], checker: Checker, limits: Limits) -> Verified:
    """Checks every sample. The first samples of a problem are those that are kept when there are too many.

    Raises RequestError for a sample of an unknown problem.
    """
    known = {problem.digest.hex(): problem for problem in problems}
    kept, counts = [], {"given": len(samples)} | dict.fromkeys(REASONS, 0)
    verdicts: dict[str, list[bool]] = {}
    taken: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    for sample in samples:
        if sample.problem not in known:
            raise RequestError(f"a sample is of the problem {sample.problem}, which the task does not have")
        problem = known[sample.problem]
        right = checker.right(problem, final_answer(sample.text))
        verdicts.setdefault(sample.problem, []).append(right)
        same = sample.problem, " ".join(sample.text.split())
        reason = "wrong" if not right else _flaw(sample, problem, limits)
        reason = reason or ("duplicate" if same in seen else "surplus" if taken[sample.problem] >= limits.per_problem
                            else "")
        if reason:
            counts[reason] += 1
            continue
        seen.add(same)
        taken[sample.problem] += 1
        kept.append(sample)
    return Verified(kept, counts | {"kept": len(kept)}, {name: sum(v) / len(v) for name, v in verdicts.items()})


def write(path: Path, verified: Verified, problems: Sequence[Problem]) -> None:
    """Puts the kept samples at `path`, a JSON line each, whole or not at all: with question, response and answer."""
    questions = {problem.digest.hex(): problem.question for problem in problems}
    rows = [{"question": questions[sample.problem], "response": sample.text, "answer": final_answer(sample.text)}
            | {name: getattr(sample, name) for name in ("problem", "number", "tokens")} for sample in verified.kept]
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read(path: Path) -> list[tuple[str, str]]:
    """(question, response) of every kept sample. Raises RequestError where there is none, or a line is not one."""
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
        found = [(row["question"], row["response"]) for row in rows]
        if not all(isinstance(text, str) for pair in found for text in pair):
            raise TypeError
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise RequestError(f"{path} has a line that is no kept sample: an object with texts under question and "
                           "response") from None
    if not found:
        raise RequestError(f"{path} holds no sample: nothing of what was said is right, and fit to be taught")
    return found


def foreign_share(text: str, question: str) -> float:
    """Share of a text's letters whose script is neither the question's nor one that formulae use."""
    used = _EVERYWHERE | {_script(letter) for letter in question if letter.isalpha()}
    scripts = [_script(letter) for letter in text if letter.isalpha()]
    return sum(script not in used for script in scripts) / max(len(scripts), 1)


def most_repeated(text: str, words: int) -> int:
    """How often the most frequent run of so many words comes; 0 where the text is shorter."""
    found = text.split()
    runs = Counter(tuple(found[start:start + words]) for start in range(len(found) - words + 1))
    return max(runs.values(), default=0)


def _flaw(sample: Sample, problem: Problem, limits: Limits) -> str:
    """The reason, of those that one sample alone can give, to drop a right one; empty for none."""
    if not sample.ended:
        return "unfinished"
    if not well_formed(sample.text):
        return "malformed"
    if sample.tokens > limits.max_tokens:
        return "long"
    if foreign_share(sample.text, problem.question) > limits.foreign_share:
        return "mixed"
    if most_repeated(sample.text, limits.repeated_words) >= limits.repeated_times:
        return "repeating"
    return ""


def _script(letter: str) -> str:
    """The first word of the letter's name, which is its script's: LATIN, CYRILLIC, CJK; MATHEMATICAL ones are Latin."""
    name = unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]
    return "LATIN" if name in ("MATHEMATICAL", "FULLWIDTH", "DOUBLE", "SCRIPT") else name
