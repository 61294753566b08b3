"""A package that stands in for reasoning-gym: what of its interface is used, with scorers that misbehave on demand."""

import sys

SOURCE = '''
import os
import time


def create_dataset(name, size, seed, **options):
    if name != "sums":
        raise ValueError(f"Dataset {name!r} not registered")
    return [{"question": f"What is {seed} + {n}?", "answer": str(seed + n),
             "metadata": {"source_dataset": name, "numbers": (seed, n), **options}} for n in range(size)]


def get_score_answer_fn(name):
    assert name == "sums"

    def score(answer, entry):
        if answer == "sleep":
            time.sleep(60)
        if answer == "raise":
            raise ArithmeticError("no such number")
        if answer == "die":
            os._exit(3)
        return 1.0 if answer == str(sum(entry["metadata"]["numbers"])) else 0.01
    return score
'''


def install(folder, monkeypatch) -> None:
    """Makes the stand-in what `import reasoning_gym` finds, in this process and in those that it starts."""
    (folder / "reasoning_gym.py").write_text(SOURCE)
    monkeypatch.delitem(sys.modules, "reasoning_gym", raising=False)
    monkeypatch.syspath_prepend(str(folder))
