"""How every command of this package starts and ends: process settings, flags, one-line errors, exit codes."""

import contextlib
import itertools
import logging
import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Callable

from absl import flags
from absl import logging as absl_logging

from research.errors import RequestError, RunError, nearest

# Of glibc's allocator, which reads them at the start of a process alone: huge pages; and what the main thread frees is
# kept for the next step to use, which `environment.compute_in_this_thread` needs beside it. Blocks of 2 GiB and more go
# back: a step that takes so much is no slower by fresh pages, and the heap grew to three times what the program needs.
HUGE_PAGES = "glibc.malloc.hugetlb=1"
KEPT_PAGES = f"{HUGE_PAGES}:glibc.malloc.mmap_threshold={2**31}:glibc.malloc.trim_threshold={2**34}"
STOPS = (signal.SIGINT, signal.SIGTERM)
_HELP = {"-h", "-?", "-help", "--help", "-helpshort", "--helpshort", "-helpfull", "--helpfull"}


class Stopped(BaseException):
    """Ctrl-C or SIGTERM, after what was to be saved is saved. `code` is the exit code, 130 or 143."""

    def __init__(self, code: int):
        self.code = code


def run(main: Callable[[], None], values: flags.FlagValues = flags.FLAGS, allocator: str = HUGE_PAGES,
        leave: Callable[[int], None] = sys.exit, fields: Callable | None = None) -> None:
    """Runs the command of this process, whose flags are `values`, and exits, by `leave`, with the code of `execute`."""
    tune_process(allocator)
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is in the background of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    sys.unraisablehook = raise_again
    log_lines()
    code = execute(main, sys.argv, values, fields)
    for number in STOPS:  # what comes while the interpreter shuts down just ends it
        signal.signal(number, signal.SIG_DFL)
    leave(code)


@contextlib.contextmanager
def stops_held():
    """Ctrl-C and SIGTERM wait for the end: in the middle of importing JAX's libraries they may abort the process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def tune_process(allocator: str) -> None:
    """Starts the process anew with these settings of glibc's allocator, and sets JAX's compilation cache.

    Fresh pages are what a training step on a CPU waits for most (15-35% of its time). GLIBC_TUNABLES and
    JAX_COMPILATION_CACHE_DIR that are already set stay as they are.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/parsimony/xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = allocator
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until the package is imported again
        os.execv(sys.executable, sys.orig_argv)


def log_lines() -> None:
    """Our own INFO and everybody's warnings, a plain line each on stderr, above a progress bar if there is one."""
    logging.root.handlers = [_Lines()]
    logging.root.setLevel(logging.WARNING)
    absl_logging.set_verbosity(absl_logging.INFO)


def raise_again(unraisable) -> None:
    """A hook for sys: a stop that came where Python cannot raise, as in a destructor, comes once more.

    JAX and the import system run such callbacks; without this the request would be printed and forgotten. Nothing is
    said of TensorStore's writers that outlive a save that failed, on a full disk say: its error is the one to read.
    """
    stop = unraisable.exc_value
    if isinstance(stop, RuntimeError) and str(stop) == "Event loop is closed":
        return
    if not isinstance(stop, KeyboardInterrupt | Stopped):
        sys.__unraisablehook__(unraisable)
        return
    number = signal.SIGTERM if isinstance(stop, Stopped) and stop.code == 143 else signal.SIGINT
    timer = threading.Timer(0.1, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def execute(main: Callable[[], None], argv: list[str], values: flags.FlagValues, fields: Callable | None = None) -> int:
    """Parses `argv` into `values` and runs a command. Returns its exit code.

    0 done; 1 failed, 2 wrong request: one line on stderr, no traceback; 130 and 143 stopped. Any other exception is
    a defect of ours and passes through.
    """
    try:
        if _HELP & set(argv[1:]):
            print(usage(values))
        else:
            parse_flags(argv, values, fields)
            main()
        sys.stdout.flush()
        return 0
    except RequestError as error:
        return _refuse(error, 2)
    except RunError as error:
        return _refuse(error, 1)
    except BrokenPipeError:  # whoever read the output has left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _refuse(f"{error.filename}: {error.strerror}" if error.filename else error, 1)
    except KeyboardInterrupt:
        return 130
    except Stopped as stopped:
        return stopped.code


def parse_flags(argv: list[str], values: flags.FlagValues, fields: Callable | None = None) -> None:
    """absl's parser, with every complaint as a RequestError of one line.

    `--config.model.hidden_size=64`, in any order with --config, becomes `--config.=model.hidden_size=64` for the
    commands that have a flag of this name (see research/experiment.py). fields: makes the config that has those which a
    flag may be meant for; None: a run's, of experiments/base.py.
    """
    try:
        argv = values.read_flags_from_files(argv, force_gnu=False)
        _check_pairs(argv, values)
        if "config." in values:
            argv = [re.sub(r"^--?config\.", "--config.=", word) for word in argv]
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        meant = _field(error.flagname, values, fields) or nearest(error.flagname, values, "--")
        raise RequestError(f"--{error.flagname} is not a flag{meant}") from None
    except flags.Error as error:
        said = str(error).removeprefix("ERROR:: ")
        said = re.sub(r"\('(Non-boolean .*?)', .*\)$", r"\1", said)
        said = re.sub(r"invalid literal for int\(\) with base 10: .*", "must be a whole number", said)
        raise RequestError(re.sub("could not convert string to float: .*", "must be a number", said)) from None
    if len(rest) > 1:
        raise RequestError(f"{rest[1]!r} is not a flag: flags are written --name=value")


def _field(name: str, values: flags.FlagValues, fields: Callable | None) -> str:
    """` (did you mean --config.X?)` for a field of the configuration, or its last part, written as a flag: those of the
    outermost groups that have one."""
    from experiments import base
    from research.experiment import flatten

    known = flatten((fields or base.get_config)().to_dict()) if "config." in values else ()
    found = [field for field in known if name in (field, field.rsplit(".", 1)[-1])]
    depth = min((field.count(".") for field in found), default=0)
    meant = " or ".join(f"--config.{field}" for field in found if field.count(".") == depth)
    return f" (did you mean {meant}?)" if found else ""


def usage(values: flags.FlagValues) -> str:
    """The docstring of the module that runs, and its flags."""
    return f"{sys.modules['__main__'].__doc__}\n{values.main_module_help()}"


def _check_pairs(argv: list[str], values: flags.FlagValues) -> None:
    """Refuses `--workdir --mode=eval`, where absl takes the second word for the directory's name, and `--config.x`."""
    for word, following in itertools.pairwise([*argv[1:], "--"]):
        name = word.lstrip("-")
        if not word.startswith("-") or "=" in word:
            continue
        if name.startswith("config.") and "config." in values:
            raise RequestError(f"{word} has no value: fields are written --config.group.field=value")
        if name in values and not values[name].boolean and following.startswith("--"):
            raise RequestError(f"--{name} has no value")


def _refuse(error: object, code: int) -> int:
    print("error:", " ".join(str(error).splitlines()), file=sys.stderr, flush=True)
    return code


def _terminate(*_) -> None:
    raise Stopped(143)


class _Lines(logging.Handler):
    """A log record as one line of text; a traceback, if it carries one, below."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        lead = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        tqdm.write(lead + self.format(record), file=sys.stderr)
