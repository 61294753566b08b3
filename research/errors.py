"""The two ways in which a command ends without its result (exit codes of design: 2 and 1)."""

import difflib
from collections.abc import Iterable
from typing import Any


class RequestError(ValueError):
    """The request was wrong: exit code 2 and one line, before anything is compiled or written."""

    @classmethod
    def field(cls, name: str, value: Any, expected: str) -> "RequestError":
        """An error about one field: `config.model.n_group=3 does not divide ...`."""
        shown = repr(value) if isinstance(value, str) else value
        return cls(f"config.{name}={shown} {expected}")


class RunError(RuntimeError):
    """A run failed on its way: exit code 1; the message says at which step and what is safe on disk."""


class Diverged(RunError):
    """The loss or its gradient is no finite number any more, at `step`."""

    def __init__(self, step: int, said: str):
        super().__init__(f"step {step}: {said}")
        self.step = step


def nearest(name: Any, known: Iterable[str], prefix: str = "") -> str:
    """` (did you mean PREFIX+X?)` for the closest of the known names, or nothing where none is close.

    A name whose last part is right, `steps` for `training.steps`, is the closest of all.
    """
    def closeness(other: str) -> float:
        if other.rsplit(".", 1)[-1] == str(name).rsplit(".", 1)[-1]:
            return 1 + difflib.SequenceMatcher(None, str(name), other).ratio()
        return difflib.SequenceMatcher(None, str(name), other).ratio()

    best = max(known, key=closeness, default="")
    return f" (did you mean {prefix}{best}?)" if best and closeness(best) >= 0.5 else ""
