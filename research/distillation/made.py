"""What samples and models were made with, in a record beside them: no later command's fields are told as theirs.

    DIR/<model>/checkpoints/<step>/record       of a model, `made`: written with its weights or not at all
    DIR/samples.made.json, DIR/verified.made.json, DIR/evaluation/<model>.made.json       of the file of that name

A record is `{field of the config: value}` of the fields that the thing was made by; one of samples has `weights` and
`model`, whose they are. Folders of older versions have none.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from research.errors import RequestError
from research.files import write_whole
from research.parallel import hosts
from research.training.checkpoint import Checkpoints
from research.tree import paths

USED = {  # by what is made: fields, or groups of them, that decide it, besides those of EVERYWHERE
    "cold_start": ("teacher.", "cold_start.problems"), "teacher": ("teacher.", "reinforcement.", "checker_timeout"),
    "samples": ("sampling.",), "verified": ("rejection.", "checker_timeout"), "base": ("student.", "cold_start."),
    "reference": ("student.", "tuning.", "sampling.problems"), "distilled": ("student.", "tuning."),
    "unverified": ("student.", "tuning."), "logits": ("student.", "tuning.", "logits.", "sampling.checkpoint"),
    "reinforced": ("student.", "reinforcement.", "checker_timeout"),
    "on_policy": ("student.", "tuning.", "reinforcement.", "on_policy.", "sampling.checkpoint"),
    "evaluation": ("evaluation.", "checker_timeout"),
}
NOTE = "made"  # the name of a model's record in that of its checkpoints
EVERYWHERE = ("seed", "template", "task.")
UNUSED = {  # of those groups: the steps of other models
    "teacher": ("reinforcement.student_steps", "teacher.training.steps"), "base": ("student.training.steps",),
    "reinforced": ("reinforcement.teacher_steps", "student.training.steps"),
    "on_policy": ("reinforcement.teacher_steps", "reinforcement.student_steps", "student.training.steps"),
}
# of samples: what changes which responses come, and how often; the number of rows at a time and drafts do not
DECISIVE = ("template", *(f"{group}.{field}" for group in ("sampling", "evaluation")
                          for field in ("max_tokens", "temperature", "top_p", "seed")))


def fields_of(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Of the config's fields, flattened, those that decide `name`, one of USED."""
    return {field: value for field, value in fields.items()
            if field.startswith((*EVERYWHERE, *USED[name])) and field not in UNUSED.get(name, ())}


def path_of(file: Path) -> Path:
    """Where the record of a file is."""
    return file.with_suffix(".made.json")


def write(file: Path, record: Mapping[str, Any]) -> None:
    """Puts the record of a file beside it."""
    write_whole(path_of(file), json.dumps(record, indent=1) + "\n")


def read(made: Path) -> dict[str, Any]:
    """The record of a file, or of a model's folder by its newest checkpoint; empty where there is none."""
    try:
        if made.is_dir():
            checkpoints = Checkpoints(made / "checkpoints", 1, 0)
            return dict(checkpoints.record(max(checkpoints.list())).get(NOTE, {}))
        return dict(json.loads(path_of(made).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def continued(samples: Path, record: Mapping[str, Any]) -> None:
    """Writes the record of samples that are drawn, or continued, with it.

    RequestError where those that are there were drawn with something else; a warning where that is not known.
    """
    if samples.exists() and samples.stat().st_size:
        before, remedy = read(samples), f"name another --workdir, or remove {samples} to draw anew"
        if not before:
            logging.warning("%s has no record of what it was drawn with: it is taken to be what is asked for", samples)
            return
        for name in DECISIVE:
            if name in record and before.get(name) != record[name]:
                raise RequestError.field(name, record[name], f"is not the {before.get(name)!r} that {samples} was "
                                         f"drawn with: {remedy}")
        if before.get("weights") != record["weights"]:
            raise RequestError(f"{samples} was drawn from {before.get('model')}, whose weights were not those of "
                               f"{record['model']} now: {remedy}")
        record = {**record, "model": before.get("model")}  # as it was called then
    write(samples, record)


def kept(made: Path, fields: Mapping[str, Any]) -> None:
    """Warns, once of several processes, of each field by which a finished model was made otherwise than by these."""
    for name, value in read(made).items() if hosts.is_first() else ():
        if fields.get(name, value) != value and ".mesh." not in name:  # on any mesh it is the same model
            logging.warning("%s is finished, with config.%s=%s and not %s: remove the folder to make it anew",
                            made, name, value, fields[name])


def digest(variables: dict) -> str:
    """Of all of a model's weights, in hexadecimal."""
    found = hashlib.blake2b(digest_size=16)
    for name, leaf in paths(variables).items():
        found.update(f"{name} {leaf.shape} ".encode())
        found.update(np.ascontiguousarray(leaf))
    return found.hexdigest()
