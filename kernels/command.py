"""How the two commands of this folder start and end: flags, one-line answers, exit codes."""

import difflib
import signal
import sys
from collections.abc import Callable, Iterable

from absl import flags


class RequestError(ValueError):
    """The request was wrong, or this machine cannot do what it asks: exit code 2 and one line."""


class RunError(RuntimeError):
    """Something that was asked for did not come out right: exit code 1 and one line."""


def run(main: Callable[[], None], values: flags.FlagValues) -> None:
    """Runs a command on this process's arguments and exits."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(execute(main, sys.argv, values))


def execute(main: Callable[[], None], argv: list[str], values: flags.FlagValues) -> int:
    """Parses `argv` and runs a command. 0 done, 1 failed, 2 wrong request (one line each), 130 stopped by Ctrl-C."""
    try:
        if {"--help", "-h", "-help"} & set(argv[1:]):
            print(f"{sys.modules['__main__'].__doc__}\n{values.main_module_help()}")
            return 0
        _parse(argv, values)
        main()
        return 0
    except RequestError as error:
        return _answer(error, 2)
    except RunError as error:
        return _answer(error, 1)
    except OSError as error:
        return _answer(f"{error.filename}: {error.strerror}" if error.filename else error, 1)
    except KeyboardInterrupt:
        return 130


def one_of(flag: str, name: str, known: Iterable[str]) -> str:
    """`name`, which must be among the known ones: RequestError names the nearest."""
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.4)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise RequestError(f"--{flag}={name!r} must be one of {', '.join(known)}{hint}")
    return name


def _parse(argv: list[str], values: flags.FlagValues) -> None:
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, list(values), 1, 0.5)
        hint = f" (did you mean --{near[0]}?)" if near else ""
        raise RequestError(f"--{error.flagname} is not a flag{hint}") from None
    except flags.Error as error:
        raise RequestError(str(error).removeprefix("ERROR:: ")) from None
    if len(rest) > 1:
        raise RequestError(f"{rest[1]!r} is not a flag: flags are written --name=value")


def _answer(error: object, code: int) -> int:
    print("error:", " ".join(str(error).splitlines()), file=sys.stderr, flush=True)
    return code
