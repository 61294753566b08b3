"""What a table of distilled students is made of: a pipeline of research.distill for each seed, judged as study.py does.

All models of a seed stand in `runs/tables/EXPERIMENT/SIZE/SEED`, a folder of research.distill: the teacher, and a
student of each method. An arm that is no method, such as one that learns from a part of the samples, has its student in
`SEED-ARM`, which begins with the samples and the base of SEED. A killed pipeline goes on where it was; a finished model
is taken as it is, unless the config has changed: then the whole seed is made again, or, where only fields of a method's
own group have changed, the student of this method.
"""

import functools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from absl import logging

from experiments import base
from research import experiment
from research.distillation import made
from research.distillation.evaluate import NAMES
from research.distillation.settings import METHODS, check
from research.errors import RunError
from research.files import write_whole
from research.tables.runner import ROOT
from research.tables.study import Run as Trained
from research.tables.study import Study

SIZES = {"cpu": ("small",)}


class Run(Trained):
    """A model of a pipeline: `settings` are research.distill's, `workdir` is a folder in one of its own."""

    @property
    def steps(self) -> int:
        """At which it is finished."""
        s = self.settings
        return {"cold_start": s.teacher.training.steps, "teacher": s.reinforcement.teacher_steps,
                "base": s.cold_start.student_steps, "reinforced": s.reinforcement.student_steps,
                "on_policy": s.on_policy.steps}.get(self.workdir.name, s.student.training.steps)


def plan(study: Study, sizes: Iterable[str], seeds: Iterable[int], fields: Iterable[str], folder: Path) -> list[Run]:
    """Every model, all of a seed before the next seed, parts of samples last; `fields` are `group.field=value`.

    Raises RequestError for a wrong one before anything is trained.
    """
    seeds, runs = tuple(seeds), []
    for size in sizes:
        for seed in seeds:
            for arm in study.arms:
                own = arm not in NAMES
                of_file = arm if own or arm in METHODS else ""  # the teacher and the base are of any
                chosen = experiment.load(f"{ROOT}/experiments/{study.experiment}.py:{of_file}")
                chosen = experiment.change(chosen, [*fields, f"seed={seed}"], base.get_distillation_config())
                place = folder / study.experiment / size
                workdir = place / f"{seed}-{arm}" / chosen.method if own else place / str(seed) / arm
                runs.append(Run(size, arm, seed, check(chosen), workdir))
    return sorted(runs, key=lambda run: run.arm not in NAMES)  # parts: of samples that are there


def changed(run: Run) -> dict[str, str]:
    """What differs from the config of the run's pipeline, by whose it is: a method, or "" where it is everybody's."""
    path = run.workdir.parent / "config.json"
    if not path.exists():
        return {}
    before = _defaults() | experiment.flatten(json.loads(path.read_bytes()))  # a field that came later: as it was
    found: dict[str, str] = {}
    for name, value in run.settings.fields.items():
        if name != "method" and before[name] != value:
            group = name.split(".")[0]
            found.setdefault(group if group in METHODS else "", f"config.{name} was {before[name]} and is {value}")
    return found


@functools.cache
def _defaults() -> dict:
    return experiment.flatten(base.get_distillation_config().to_dict())


def lines_of(run: Run) -> dict | None:
    """What research.distill found of a model that is finished under this config; None for any other."""
    path = run.workdir.parent / "results.json"
    if not path.exists() or changed(run).keys() & {"", run.workdir.name}:
        return None
    found = json.loads(path.read_bytes())["models"].get(run.workdir.name)
    return found if found and found["step"] == run.steps else None


def train(runs: list[Run]) -> None:
    """Makes those that are not finished, one after another.

    Raises RunError with the run's name where one fails; Stopped passes through, after its run is saved.
    """
    missing = [run for run in runs if lines_of(run) is None]
    for number, run in enumerate(missing):
        if lines_of(run) is None:  # another of its pipeline may have made it
            logging.info("%s: %d of %d models are done", run, len(runs) - len(missing) + number, len(runs))
            _train(run)


def _train(run: Run) -> None:
    import jax

    from research import distill
    from research.distillation import stages

    pipeline, whole = run.workdir.parent, run.workdir.parent.with_name(str(run.seed))
    for whose, other in changed(run).items():
        logging.info("%s: %s: %s made again", run, other, whose or "all")
        _remove(pipeline, whose)
    names = distill.STAGES
    if pipeline != whole:
        names = names[names.index("verify"):]
        _begin(run, whole)
    try:
        stages.run(run.settings, pipeline, names)
    except RunError as error:
        raise RunError(f"{run}: {error}") from error
    finally:
        jax.clear_caches()  # a process holds many runs, each with programs of its own


def _remove(pipeline: Path, whose: str) -> None:
    """All of a pipeline, or what there is of one method's student."""
    if (pipeline / whose).exists():
        shutil.rmtree(pipeline / whose)
    for path in pipeline.glob(f"evaluation/{whose}-*"):
        path.unlink()
    path = pipeline / "results.json"
    if path.exists():
        found = json.loads(path.read_bytes())
        found["models"].pop(whose, None)
        write_whole(path, json.dumps(found, indent=1) + "\n")


def _begin(run: Run, whole: Path) -> None:
    """What a part begins with: the base of the whole pipeline, what it says, and the first of the samples."""
    pipeline, s = run.workdir.parent, run.settings.sampling
    (pipeline / "evaluation").mkdir(parents=True, exist_ok=True)
    shutil.copytree(whole / "base", pipeline / "base", dirs_exist_ok=True)
    for path in whole.glob("evaluation/base-*"):
        shutil.copy(path, pipeline / "evaluation")
    lines = (whole / "samples.jsonl").read_text("utf-8").split("\n")[:s.problems * s.samples]
    write_whole(pipeline / "samples.jsonl", "".join(f"{line}\n" for line in lines))
    if record := made.read(whole / "samples.jsonl"):
        made.write(pipeline / "samples.jsonl", record | {"sampling.problems": s.problems})
