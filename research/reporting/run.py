"""What a run has left in its workdir, as far as it got: everything the page of a run is made of."""

import json
from dataclasses import dataclass
from pathlib import Path

from experiments import base
from research.errors import RequestError
from research.experiment import flatten
from research.training.metrics import DIVERGED, PHASES, read_lines

LARGEST = 1e300  # of what counts as a number; JSON may hold wholes that are no float


@dataclass(frozen=True)
class Run:
    """One workdir; what is missing or cannot be read in it is empty here, and said in `notices`."""

    workdir: Path
    fields: dict  # every field of config.json, flattened; those of the version that ran, which may be an older one
    train: list[dict]  # lines of metrics.jsonl
    validation: list[dict]
    environment: dict  # flattened
    samples: list[tuple[str, str]]  # (heading, paragraph or block; text) in the order of samples.md
    seconds: dict[str, float]  # by phase, as the newest checkpoint tells
    checkpoints: list[int]  # steps
    notices: list[str]

    @property
    def step(self) -> int:
        """The last one that is logged."""
        return max(line["step"] for line in self.train + self.validation)

    def changed(self) -> dict[str, tuple]:
        """{field: (value, default)} of the fields that are not as experiments/base.py has them today."""
        defaults = flatten(base.get_config().to_dict())
        return {name: (value, defaults.get(name, "no such field")) for name, value in self.fields.items()
                if name not in defaults or value != defaults[name]}


def read(workdir: Path) -> Run:
    """Raises RequestError where `workdir` is not that of a run, or of one that has logged nothing."""
    if not workdir.is_dir():
        raise RequestError(f"--workdir={workdir} is not a directory")
    fields = _fields(workdir / "config.json")
    path = workdir / "metrics.jsonl"
    lines = read_lines(path)
    if not lines:
        raise RequestError(f"{path} holds no whole line: there is nothing to report before the first step")
    train, validation = ([line for line in lines if line["split"] == split] for split in ("train", "validation"))
    steps, notices = fields["training.steps"], []
    done, ending = lines[-1]["step"], lines[-1]["split"]
    if ending == DIVERGED:
        notices.append(f"Diverged: at step {done:,} of {steps:,} the loss or its gradient was no number any more.")
    elif done < steps:
        notices.append(f"Not finished: {done:,} of {steps:,} steps are logged. It may still run; "
                       "the same command makes this page anew.")
    elif not any(line["step"] >= steps for line in validation):
        notices.append("All steps are logged, the evaluation at the end is not.")
    if torn := sum(1 for text in path.read_bytes().splitlines() if text.strip()) - len(lines):
        notices.append(f"metrics.jsonl is read up to its first damaged line: {torn:,} of its {torn + len(lines):,} "
                       "lines are left out.")
    environment = _environment(workdir / "environment.json")
    if not environment:
        notices.append("environment.json is missing or cannot be read.")
    checkpoints, seconds = _checkpoints(workdir / "checkpoints")
    return Run(workdir, fields, train, validation, environment,
               _samples(workdir / "samples.md"), seconds, checkpoints, notices)


def column(lines: list[dict], name: str, place: int | None = None) -> tuple[list[int], list[float]]:
    """(steps, values) of the lines that hold a finite number under `name`; place: of the list that stands there."""
    steps, values = [], []
    for line in lines:
        value = line.get(name)
        if place is not None:
            value = value[place] if isinstance(value, list) and place < len(value) else None
        if _is_number(value):
            steps.append(line["step"])
            values.append(float(value))
    return steps, values


def depth(lines: list[dict], name: str) -> int:
    """The length of the longest list under `name`; 0 where there is none."""
    return max((len(line[name]) for line in lines if isinstance(line.get(name), list)), default=0)


def table(line: dict, name: str) -> list[list[float]]:
    """The rows of finite numbers, none of them empty and all of one length, under `name`; [] where that is not so."""
    rows = line.get(name)
    if not isinstance(rows, list) or not all(isinstance(row, list) and row for row in rows):
        return []
    if len({len(row) for row in rows}) > 1 or not all(_is_number(value) for row in rows for value in row):
        return []
    return [[float(value) for value in row] for row in rows]


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _fields(path: Path) -> dict:
    try:
        fields = flatten(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise RequestError(f"{path} does not exist: {path.parent} is not the workdir of a run") from None
    except (ValueError, AttributeError, RecursionError):
        raise RequestError(f"{path} is not a configuration in JSON") from None
    if "student.training.steps" in fields:
        models = sorted(folder.parent.name for folder in path.parent.glob("*/metrics.jsonl"))
        raise RequestError(f"--workdir={path.parent} is a folder of research.distill, whose stage `evaluate` writes "
                           f"report.md; the models in it have pages of their own: {', '.join(models) or 'none yet'}")
    if not isinstance(fields.get("training.steps"), int):
        raise RequestError(f"{path}: config.training.steps={fields.get('training.steps')!r} must be a whole number")
    return fields


def _environment(path: Path) -> dict:
    try:
        return flatten(json.loads(path.read_bytes()))
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _checkpoints(folder: Path) -> tuple[list[int], dict[str, float]]:
    """The steps of sealed checkpoints, and the seconds by phase that the newest readable record tells."""
    steps = sorted(int(path.parent.name) for path in folder.glob("*/manifest.json") if path.parent.name.isdecimal())
    for step in reversed(steps):
        try:
            told = json.loads((folder / str(step) / "record" / "metadata").read_bytes())["seconds"]
            return steps, {phase: float(told[phase]) for phase in PHASES}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return steps, {}


def _samples(path: Path) -> list[tuple[str, str]]:
    """The parts of samples.md; a block ends with the fence that opened it, or with the file."""
    try:
        lines = path.read_bytes().decode(errors="replace").split("\n")
    except OSError:
        return []
    parts, fence = [], ""
    for line in lines:
        if fence and line != fence:
            parts[-1][1].append(line)
        elif fence:
            fence = ""
        elif line.startswith("```") and not line.strip("`"):
            fence = line
            parts.append(("block", []))
        elif line.startswith("#"):
            parts.append(("heading", [line.lstrip("# ")]))
        elif line.strip():
            parts.append(("paragraph", [line]))
    return [(kind, "\n".join(text)) for kind, text in parts]
