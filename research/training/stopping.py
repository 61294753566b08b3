"""Ctrl-C and SIGTERM during training: saved first, obeyed then."""

import signal
from collections.abc import Callable

from absl import logging

from research.command import Stopped


class Interrupted(Exception):
    """A stop request ended an evaluation."""


class StopRequests:
    """Ctrl-C and SIGTERM, noted until the step is done. `code` is the exit code to leave with, 0 while none came."""

    def __init__(self):
        self.code = 0
        self._before = {}

    def __enter__(self):
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            self._before[number] = signal.signal(number, lambda *_, code=code: self._note(code))
        return self

    def __exit__(self, *_):
        self.release()

    def release(self) -> None:
        """From now on a request ends the process at once."""
        while self._before:
            signal.signal(*self._before.popitem())

    def checked(self, function: Callable) -> Callable:
        """The function, raising Interrupted in place of its next call once a request came."""
        def call(*arguments):
            if self.code:
                raise Interrupted
            return function(*arguments)

        return call

    def _note(self, code: int) -> None:
        if self.code:
            raise Stopped(code)  # asked twice: leave now, the last checkpoint stands
        self.code = code
        logging.warning("stopping after this step; once more to leave without saving")
