"""How every command of this package starts and ends: process settings, flags, one-line errors, exit codes."""

import os
import platform
import signal
import sys
from collections.abc import Callable

from absl import app, flags, logging

from research.errors import RequestError, RunError


class Stopped(BaseException):
    """Ctrl-C or SIGTERM, after what was to be saved is saved. `code` is the exit code, 130 or 143."""

    def __init__(self, code: int):
        self.code = code


def tune_process() -> None:
    """Starts the process anew with huge pages for glibc's allocator, and sets JAX's compilation cache.

    Fresh pages are what a training step on a CPU waits for most (15-35% of its time); the allocator reads the
    variable only at start. GLIBC_TUNABLES and JAX_COMPILATION_CACHE_DIR that are already set stay as they are.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/parsimony/xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)


def run(main: Callable[[], None]) -> None:
    """Runs a command: 0 done, 1 failed, 2 wrong request (one line, no traceback), 130 and 143 stopped."""
    tune_process()

    def terminate(*_):
        raise Stopped(143)

    signal.signal(signal.SIGTERM, terminate)
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    logging.set_stderrthreshold(logging.INFO)
    code = 0
    try:
        app.run(lambda _: main(), flags_parser=parse_flags)
    except SystemExit as end:  # app.run's own, after main returned
        code = end.code or 0
    except (RequestError, RunError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2 if isinstance(error, RequestError) else 1
    except KeyboardInterrupt:
        code = 130
    except Stopped as stopped:
        code = stopped.code
    sys.exit(code)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with every complaint as a RequestError of one line."""
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise RequestError(" ".join(str(error).split())) from None
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise RequestError(" ".join(str(error).strip("'\"").split())) from None
    if len(rest) > 1:
        raise RequestError(f"{rest[1]!r} is not a flag: flags are written --name=value")
    return rest
