"""From the config of research.distill to checked, frozen settings: `get_distillation_config` in experiments/base.py."""

import contextlib
import dataclasses
import json
import math
import re
from dataclasses import dataclass

from ml_collections import ConfigDict, FrozenConfigDict

from experiments import base
from research import config
from research.distillation.rejection import Limits
from research.distillation.tasks import Task
from research.distillation.template import TEMPLATES, Template
from research.errors import RequestError, nearest
from research.experiment import flatten

METHODS = ("reference", "reinforced", "distilled", "unverified", "logits", "on_policy")
DRAWING = ("reinforced", "on_policy")  # methods whose student learns from what it says itself
DIRECTIONS = ("forward", "reverse", "jensen_shannon")  # distillation.logits', which knows JAX, as this file does not
CHOICES = {"method": METHODS, "template": tuple(TEMPLATES), "reinforcement.form": ("token", "sequence"),
           "logits.direction": DIRECTIONS, "on_policy.direction": DIRECTIONS}
AT_LEAST = {
    0: ("seed", "sampling.seed", "evaluation.seed", "cold_start.problems", "cold_start.student_steps",
        "reinforcement.teacher_steps", "reinforcement.student_steps", "reinforcement.kl_weight", "reinforcement.clip",
        "reinforcement.reference_every", "reinforcement.draft_tokens", "sampling.problems", "sampling.draft_tokens",
        "sampling.temperature", "rejection.foreign_share", "evaluation.problems", "evaluation.temperature",
        "task.count"),
    1: ("reinforcement.questions", "reinforcement.minibatches", "reinforcement.epochs", "reinforcement.max_tokens",
        "sampling.samples", "sampling.batch_size", "sampling.max_tokens", "logits.top_k", "on_policy.steps",
        "rejection.max_tokens", "rejection.repeated_words", "rejection.repeated_times", "rejection.per_problem",
        "evaluation.samples", "evaluation.batch_size", "evaluation.max_tokens"),
    2: ("reinforcement.group_size",),
}
POSITIVE = ("checker_timeout", "reinforcement.learning_rate", "reinforcement.temperature", "logits.temperature",
            "on_policy.learning_rate")


@dataclass(frozen=True)
class Settings:
    """The groups and fields of the config, checked and frozen."""

    seed: int
    method: str
    template: Template
    checker_timeout: float
    task: Task
    cold_start: FrozenConfigDict
    reinforcement: FrozenConfigDict
    sampling: FrozenConfigDict
    rejection: Limits
    tuning: FrozenConfigDict
    logits: FrozenConfigDict
    on_policy: FrozenConfigDict
    evaluation: FrozenConfigDict
    teacher: config.Settings
    student: config.Settings
    fields: dict  # all of them, flattened, as they were given

    def to_json(self) -> str:
        """The whole resolved config, as DIR/config.json holds it."""
        nested: dict = {}
        for name, value in self.fields.items():
            *path, leaf = name.split(".")
            node = nested
            for part in path:
                node = node.setdefault(part, {})
            node[leaf] = value
        return json.dumps(nested, indent=2) + "\n"


def complete(chosen: ConfigDict) -> ConfigDict:
    """The config as it is, or, where it is that of a model alone, a pipeline with this model as student, as R1 has it.

    R1's: its template, no cold start, a user's problems, responses as long as a row; pass@1 at temperature 0.6 and
    top-p 0.95 (v1 §3), which sampling has too; reinforcement as of Qwen2.5-32B-Zero (v2 B.4). Its 600k and 200k samples
    are what `task.files` and `tuning.files` hold. It gives neither how many samples of a problem were drawn or kept,
    nor at which temperature, nor this model's clip: those are experiments/base.py's. Ours: at least half of a model's
    positions are left for the prompt. Raises RequestError for what is no config of a model.
    """
    if "student" in chosen:
        return chosen
    given = flatten(config.checked_fields(chosen, base.get_config()))
    length = min(given["data.sequence_length"], given["model.max_position_embeddings"] // 2)  # R1: 32,768
    whole = base.get_distillation_config()
    whole.template, whole.cold_start.problems = "deepseek", 0
    whole.task.update(dict(source="files", count=0))
    for group in (whole.sampling, whole.rejection, whole.evaluation, whole.reinforcement):
        group.max_tokens = length
    whole.reinforcement.update(dict(  # 8,192 samples of 512 questions, in updates of 512; 400 updates: 25 batches
        student_steps=10000, learning_rate=2e-6, questions=512, group_size=16, minibatches=16, reference_every=25))
    whole.student.update_from_flattened_dict({
        name: value for name, value in given.items() if name != "training.seed"})
    return whole


def check(chosen: ConfigDict) -> Settings:
    """Checks every field and how they fit together. Raises RequestError with one line for the first that is wrong."""
    groups = config.checked_fields(chosen, base.get_distillation_config())
    given = flatten(groups)
    for name, choices in CHOICES.items():
        if given[name] not in choices:
            expected = f"must be one of {', '.join(choices)}{nearest(given[name], choices)}"
            raise RequestError.field(name, given[name], expected)
    for bound, names in AT_LEAST.items():
        for name in names:
            if given[name] < bound:
                raise RequestError.field(name, given[name], f"must be at least {bound}")
    for name in POSITIVE:
        if given[name] <= 0:
            raise RequestError.field(name, given[name], "must be above 0")
    for name in ("reinforcement.warmup_fraction", "task.test_fraction", "on_policy.student_data_fraction"):
        if not 0 <= given[name] <= 1:
            raise RequestError.field(name, given[name], "must be between 0 and 1")
    for name in ("sampling.top_p", "evaluation.top_p"):
        if not 0 < given[name] <= 1:
            raise RequestError.field(name, given[name], "must be above 0 and at most 1")
    for name in ("logits.beta", "on_policy.beta"):
        if not 0 < given[name] < 1:
            raise RequestError.field(name, given[name], "must be above 0 and below 1")
    models = {name: _model(groups, name) for name in ("teacher", "student")}
    _check_rows(given)
    plain = {f.name: groups[f.name] for f in dataclasses.fields(Settings) if f.name in groups} | models
    frozen = {name: FrozenConfigDict(value) if isinstance(value, dict) else value for name, value in plain.items()}
    return Settings(**frozen | {
        "template": TEMPLATES[given["template"]], "fields": given, "rejection": Limits(**groups["rejection"]),
        "task": Task(**groups["task"] | {"options": _options(given["task.options"])})})


def _model(groups: dict, name: str) -> config.Settings:
    """The settings of a group that is a whole config of research.main."""
    with named(name):
        found = config.check(groups[name])
        if found.training.batch_ramp_start:
            raise RequestError.field("training.batch_ramp_start", found.training.batch_ramp_start,
                                     "must be 0: batches of examples do not grow")
        if found.mesh.pipeline > 1:
            raise RequestError.field("mesh.pipeline", found.mesh.pipeline, "must be 1: no loss of distillation's is "
                                     "computed in stages")
    return found


@contextlib.contextmanager
def named(name: str):
    """Errors about a model's own fields say whose they are: config.data.source becomes config.student.data.source."""
    try:
        yield
    except RequestError as error:
        groups = "|".join(field.name for field in dataclasses.fields(config.Settings))
        raise RequestError(re.sub(rf"\bconfig\.(?=(?:{groups})\.)", f"config.{name}.", str(error))) from None


def _check_rows(given: dict) -> None:
    rows = given["reinforcement.questions"] * given["reinforcement.group_size"]
    pieces = given["reinforcement.minibatches"]
    if rows % pieces:
        raise RequestError.field("reinforcement.minibatches", pieces, f"does not divide the {rows} samples of a batch, "
                                 "config.reinforcement.questions times group_size")
    drawn = {"teacher": given["reinforcement.teacher_steps"] > 0, "student": given["method"] in DRAWING}
    for name in (name for name, draws in drawn.items() if draws):
        parts = given[f"{name}.training.accumulation_steps"]
        shards = math.prod(given[f"{name}.mesh.{axis}"] for axis in ("data", "fsdp", "expert"))
        if rows // pieces % (parts * shards):
            over = "" if shards == 1 else f"with {shards} = mesh.data * mesh.fsdp * mesh.expert "
            raise RequestError.field(f"{name}.training.accumulation_steps", parts,
                                     f"{over}does not divide the {rows // pieces} samples of an update of "
                                     "config.reinforcement")


def _options(text: str) -> dict:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RequestError.field("task.options", text, 'must be a JSON object, such as {"max_value": 20}')
    return found
