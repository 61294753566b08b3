"""Tries the checker on the answers of a file: each against itself, as it is respelt, and against near misses.

`python -m research.distillation.references --file=math500.jsonl`: what the check of formulae says, though the checker
passes equal texts without asking it. Prints counts, every verdict that is not as expected, and exits
with 1 where a reference is not equal to itself.
"""

import json
import re
import time
from pathlib import Path

from absl import flags

from research import command
from research.distillation.verify import Checker, number
from research.errors import RequestError, RunError

FLAGS = flags.FlagValues()
_FILE = flags.DEFINE_string("file", None, "JSON lines with reference answers.", FLAGS)
_FIELD = flags.DEFINE_string("answer_field", "answer", "The field of the reference answer.", FLAGS)
_TIMEOUT = flags.DEFINE_float("timeout", 10.0, "Seconds an answer.", flag_values=FLAGS)


def respelt(answer: str) -> dict[str, str]:
    """Spellings of the same answer, by name; a name is absent where it would change nothing."""
    found = {
        "display fractions": re.sub(r"\\[dt]?frac", r"\\dfrac", answer),
        "no sizes": re.sub(r"\\(left|right)(?=[\\()\[\]|])", "", answer),
        "dollars": f"${answer}$" if "$" not in answer else answer,
    }
    return {name: text for name, text in found.items() if "".join(text.split()) != "".join(answer.split())}


def near_misses(answer: str) -> dict[str, str]:
    """Answers that look like this one and are others, by what was done to it."""
    found = {}
    numbers = [match for match in re.finditer(r"\d+", answer)]
    for name, match in (("first number one more", numbers[:1]), ("last number one more", numbers[-1:])):
        for one in match:
            found[name] = answer[:one.start()] + str(int(one.group()) + 1) + answer[one.end():]
    if number(answer):
        found["sign"] = answer.removeprefix("-") if answer.startswith("-") else f"-{answer}"
        found["a tenth"] = f"\\frac{{{answer}}}{{10}}"
    if "," in answer and number(answer) is None:
        found["last part dropped"] = answer[:answer.rindex(",")] + "".join(re.findall(r"(?:\\right)?[)\]}]+$", answer))
    if not numbers:
        found["one more"] = f"{answer} + 1"
    return {name: text for name, text in found.items() if text != answer}


def main() -> None:
    if not _FILE.value:
        raise RequestError("--file is required: JSON lines with reference answers")
    try:
        answers = [json.loads(line)[_FIELD.value] for line in Path(_FILE.value).expanduser().read_text().splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = error.strerror if isinstance(error, OSError) else repr(error)
        raise RequestError(f"--file={_FILE.value!r} with --answer_field={_FIELD.value!r} cannot be read: {why}"
                           ) from None
    start, unequal, right, wrong = time.perf_counter(), [], {}, {}
    with Checker(_TIMEOUT.value) as checker:
        for answer in answers:
            if not checker.judged("latex", answer, answer):
                unequal.append(answer)
            for made, counts, expected in ((respelt(answer), right, True), (near_misses(answer), wrong, False)):
                for name, text in made.items():
                    counts.setdefault(name, []).append(verdict := checker.judged("latex", answer, text) == expected)
                    if not verdict:
                        print(f"{'not ' if expected else ''}accepted ({name}): {text!r} for {answer!r}")
        following = [(one, other) for one, other in zip(answers, answers[1:] + answers[:1], strict=True)
                     if "".join(one.split()) != "".join(other.split())]
        for one, other in following:
            wrong.setdefault("the next one's answer", []).append(verdict := not checker.judged("latex", one, other))
            if not verdict:
                print(f"accepted (the next one's answer): {other!r} for {one!r}")
    print(f"{len(answers) - len(unequal)} of {len(answers)} references equal themselves; "
          f"{checker.failures.total()} checks failed; {time.perf_counter() - start:.1f} s")
    for title, counts in (("accepted", right), ("refused", wrong)):
        for name, verdicts in counts.items():
            print(f"{title}: {name}: {sum(verdicts)} of {len(verdicts)}")
    if unequal:
        raise RunError(f"not equal to themselves: {unequal}")


if __name__ == "__main__":
    command.run(main, FLAGS)
