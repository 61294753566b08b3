"""The two ways in which a command ends without its result (exit codes of design: 2 and 1)."""

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
