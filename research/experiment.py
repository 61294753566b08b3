"""An experiment file and what the command line changes of it: `--config=FILE.py:arm --config.group.field=value`."""

import inspect
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from experiments import base
from research.errors import RequestError, nearest


def flatten(tree, prefix: str = "") -> dict:
    """{`group.field`: value} of nested dicts."""
    flat = {}
    for name, value in tree.items():
        if hasattr(value, "items"):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def load(argument: str) -> ConfigDict:
    """The config of `FILE.py`, `FILE.py:arm` or `FILE.py:arm:smoke`: what `get_config` of the file returns.

    Raises RequestError for a file that is missing, does not run, or has no such arm. Nothing is written, no .pyc.
    """
    name, _, arms = argument.partition(":")
    path = Path(name).expanduser()
    if not path.is_file():
        reason = "is a directory: name one of its files" if path.is_dir() else "does not exist"
        others = [other.as_posix() for other in sorted(path.parent.glob("[!_]*.py"))]
        own = Path("experiments") / f"{path.stem}.py"
        meant = f" (did you mean {own}?)" if own.is_file() else nearest(path.as_posix(), others)
        raise RequestError(f"--config={name} {reason}{meant}")
    scope = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(path.read_bytes(), path, "exec"), scope)
        build = scope.get("get_config")
        if not callable(build):
            raise RequestError("has no function get_config")
        if arms and not inspect.signature(build).parameters:
            raise RequestError(f"has no arms, so no {arms!r}: its get_config takes no argument")
        config = build(arms) if arms else build()
        if not isinstance(config, ConfigDict):
            raise RequestError(f"get_config returns a {type(config).__name__}, not a ConfigDict")
    except RequestError as error:
        raise RequestError(f"--config={argument} {error}") from None
    except OSError as error:
        raise RequestError(f"--config={argument} cannot be used: {error}") from None
    except Exception as error:  # a file may raise anything
        raise RequestError(f"--config={argument} fails{_line_of(error, path)}: {type(error).__name__}: "
                           f"{error.msg if isinstance(error, SyntaxError) else error}") from None
    return config


def change(config: ConfigDict, assignments: Iterable[str], default: ConfigDict | None = None) -> ConfigDict:
    """The config with `group.field=value` set for each assignment in order; what is derived from a field follows it.

    default: which fields there are; None: those of a run. Raises RequestError for an unknown field, with the nearest,
    and for text that is no value of the field's type.
    """
    defaults = flatten((default or base.get_config()).to_dict())
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        check_name(name, _literal(text), defaults)
        try:
            config.update_from_flattened_dict({name: _parse(name, text, defaults[name])})
        except (AttributeError, KeyError, TypeError):
            raise RequestError(f"config.{name} is missing in the experiment's config, or of another type") from None
    return config


def check_name(name: str, value, defaults: dict) -> None:
    """Refuses a name that is no field of `defaults`, flattened: says the nearest, or that it is a group."""
    if name in defaults:
        return
    fields = [known.rsplit(".", 1)[-1] for known in defaults if known.startswith(f"{name}.")]
    if fields:
        raise RequestError.field(name, value, f"must be a group of fields: {_some(fields)}")
    raise RequestError.field(name, value, f"is not a field of the configuration{nearest(name, defaults, 'config.')}")


def _parse(name: str, text: str, default):
    """The value that a text stands for in a field with this default; `None` in an optional one, a whole number."""
    kind = int if default is None else type(default)
    what = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    if default is None:
        what += ", or None"
        if text == "None":
            return None
    try:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise RequestError.field(name, _literal(text), f"must be {what}") from None


def _literal(text: str):
    """A number for a text that is one: messages show it without quotes."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _line_of(error: Exception, path: Path) -> str:
    """` in line N`, the innermost line of the file that an exception comes from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    return f" in line {lines[-1]}" if lines else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
