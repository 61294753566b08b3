"""Ctrl-C and SIGTERM during training: saved first, obeyed then, by all processes at the same step."""

import signal
from collections.abc import Callable

from absl import logging

from research.command import Stopped
from research.parallel.hosts import Stops


class Interrupted(Exception):
    """A stop request ended an evaluation."""


class StopRequests:
    """Ctrl-C and SIGTERM, noted until the step is done. `code` is the exit code to leave with, 0 while none came.

    Where there are several processes `code` is this one's request until `agreed` has made it that of all.
    """

    def __init__(self, stops: Stops | None = None):
        """stops: None in a process alone."""
        self.code, self._stops = 0, stops
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

    def asked(self):
        """What all processes want, under way: for `agreed`, which waits for it. All ask equally often."""
        return self._stops.cast(self.code) if self._stops else None

    def agreed(self, asked) -> int:
        """The exit code that all processes leave with, or 0: the same on each."""
        if asked is None:
            return self.code
        code = int(asked)
        self.code = max(self.code, code)
        return code

    def checked(self, function: Callable) -> Callable:
        """The function, raising Interrupted in place of its next call once a request came."""
        def call(*arguments):
            if self.agreed(self.asked()):
                raise Interrupted
            return function(*arguments)

        return call

    def _note(self, code: int) -> None:
        if self.code:
            raise Stopped(code)  # asked twice: leave now, the last checkpoint stands
        self.code = code
        logging.warning("stopping after this step; once more to leave without saving")
