"""What a table of trained models is made of: arms x sizes x seeds of an experiment, trained and measured.

A run is research.main's own training into `runs/tables/EXPERIMENT/SIZE/ARM-SEED`, which tables of one experiment share.
A killed one goes on at its newest checkpoint; a finished one is taken as it is, unless its resolved config has changed:
then it is trained again, and so is what started from it. One whose loss stops being a number is finished too: that it
diverged is a result.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from absl import logging
from tqdm import tqdm

from research import config, experiment
from research.environment import commit
from research.errors import Diverged, RequestError, RunError
from research.files import write_whole
from research.tables.quantities import QUANTITIES, vocabulary
from research.tables.runner import ROOT, machine
from research.training.metrics import DIVERGED, read_lines

SIZES = {"cpu": ("micro", "mini"), "gpu": ("gpu",)}  # of experiments/nano.py
LOSSES = ("validation loss", "bits per byte")  # of a diverged run they are beyond any other


HIGHER, LOWER, EQUAL = math.inf, -math.inf, math.nan


@dataclass(frozen=True)
class Claim:
    """A direction of the paper: the figure of `arm` less that of `than`; None where it has none, and HIGHER, LOWER or
    EQUAL where it tells the side and prints no figures."""

    quantity: str
    arm: str
    than: str
    paper: float | None
    where: str  # which of the paper's figures


@dataclass(frozen=True)
class Study:
    """Arms of `experiments/EXPERIMENT.py`, what is read off their runs, and what the paper says of it.

    paper: {(quantity, arm): the paper's figure, of a far larger model on another text}.
    """

    experiment: str
    arms: tuple[str, ...]
    quantities: tuple[str, ...]
    claims: tuple[Claim, ...]
    paper: Mapping[tuple[str, str], float] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    starts: Mapping[str, str] = field(default_factory=dict)  # {arm: an earlier one whose weights it starts from}
    untrained: tuple[str, ...] = ()  # of those, arms that keep these weights, as far as their model has them


@dataclass(frozen=True)
class Run:
    """One to train: its checked settings and where it lies."""

    size: str
    arm: str
    seed: int
    settings: config.Settings
    workdir: Path
    start: "Run | None" = None  # whose weights it starts from
    trained: bool = True  # further than those

    def __str__(self) -> str:
        return f"{self.arm}-{self.seed} ({self.size})"


def plan(study: Study, sizes: Iterable[str], seeds: Iterable[int], fields: Iterable[str], folder: Path) -> list[Run]:
    """Every run, all arms of a seed before the next seed; `fields` are `group.field=value` of every arm.

    Raises RequestError for a wrong one before anything is trained.
    """
    seeds, runs = tuple(seeds), []
    for size in sizes:
        for seed in seeds:
            of_arm: dict[str, Run] = {}
            for arm in study.arms:
                chosen = experiment.load(f"{ROOT}/experiments/{study.experiment}.py:{size}:{arm}")
                own, start, trained = [f"training.seed={seed}"], None, arm not in study.untrained
                if arm in study.starts:
                    start = of_arm[study.starts[arm]]
                    own += [f"checkpoint.initialize_from={start.workdir}"] if trained else []
                settings = config.check(experiment.change(chosen, [*fields, *own]))
                workdir = folder / study.experiment / size / f"{arm}-{seed}"
                of_arm[arm] = Run(size, arm, seed, settings, workdir, start, trained)
            runs += of_arm.values()
    return runs


def check_device(scale: str) -> None:
    """Raises RequestError where JAX would not train on what the scale names."""
    import jax

    if jax.default_backend() != scale:
        raise RequestError(f"--scale={scale}: JAX runs on {jax.default_backend()} here" +
                           (", JAX_PLATFORMS=cpu changes that" if scale == "cpu" else ""))


def changed(run: Run) -> str:
    """The first field in which the config that the workdir was trained by differs; nothing where none does."""
    before, now = (experiment.flatten(json.loads(each.to_json())) for each in (config.read(run.workdir), run.settings))
    places = {"data.cache"} | ({"checkpoint.initialize_from"} if run.start else set())
    for name, value in now.items():
        learned = name == "model.vocab_size" and value is None  # the tokenizer's own
        if before[name] != value and not learned and name not in places:
            return f"config.{name} was {before[name]} and is {value}"
    return ""


def lines_of(run: Run) -> list[dict] | None:
    """The metrics of a run that is finished under this config; None for any other."""
    steps, lines = run.settings.training.steps, read_lines(run.workdir / "metrics.jsonl")
    if run.trained and not (run.workdir / "checkpoints" / str(steps)).is_dir() and not diverged(lines):
        return None
    if run.start and lines_of(run.start) is None:
        return None
    try:
        if changed(run):
            return None
    except RequestError:  # of another version's fields
        return None
    ended = any(line["split"] == "validation" and line["step"] == steps for line in lines)
    return lines if ended or diverged(lines) else None


def diverged(lines) -> bool:
    """Whether a run of these metrics ended because its loss was no number any more."""
    return isinstance(lines, list) and bool(lines) and lines[-1]["split"] == DIVERGED


def train(runs: list[Run]) -> None:
    """Trains (evaluates, where untrained) those that are not finished, one after another, with one bar over all.

    Raises RunError with the run's name where one fails, or would start from the weights of one that diverged; Stopped
    passes through, after its run is saved.
    """
    missing = [run for run in runs if lines_of(run) is None]
    work, start = [_work(run) for run in missing], time.monotonic()
    with tqdm(total=sum(work), dynamic_ncols=True, disable=None, leave=False, file=sys.stderr,
              bar_format="{desc} {percentage:3.0f}% |{bar}| [{elapsed}<{remaining}]") as bar:
        for number, run in enumerate(missing):
            done = sum(work[:number])
            left = (time.monotonic() - start) / done * (sum(work) - done) if done else None
            said = f"{run}: {len(runs) - len(missing) + number} of {len(runs)} runs are done"
            bar.set_description_str(said)
            logging.info("%s", said + (f", about {tqdm.format_interval(left)} left" if left else ""))
            for other in runs:
                if run in starts_of(other):
                    _empty(other.workdir)
            if run.start and diverged(lines_of(run.start)):
                raise RunError(f"{run}: it starts from {run.start}, which diverged")
            _train(run) if run.trained else _evaluate(run)
            bar.update(work[number])


def starts_of(run: Run) -> list[Run]:
    """The run whose weights it starts from, the one whose weights that one started from, ..."""
    return [run.start, *starts_of(run.start)] if run.start else []


def _work(run: Run) -> float:
    """FLOPs of a run's training, what the time that is left is told by."""
    from research.accounting import flops

    if not run.trained:
        return 0.0
    settings = vocabulary(run.settings)
    t, tokens = settings.training, settings.data.sequence_length
    return t.steps * t.batch_size * tokens * flops.training_per_token(settings)


def _train(run: Run) -> None:
    import jax

    from research.training import loop
    from research.training.workdir import owned

    if (run.workdir / "config.json").exists():
        try:
            other = changed(run)
        except RequestError as error:
            other = str(error)
        if other:
            logging.info("%s: %s: trained again", run, other)
            _empty(run.workdir)
    try:
        loop.train(run.settings, run.workdir)
    except Diverged as error:
        logging.warning("%s: %s", run, error)
        with owned(run.workdir), (run.workdir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": error.step, "split": DIVERGED}) + "\n")
    except RunError as error:
        raise RunError(f"{run}: {error}") from error
    finally:
        jax.clear_caches()  # a process holds dozens of runs, each with programs of its own


def _empty(workdir: Path) -> None:
    from research.training.workdir import owned

    if workdir.is_dir():
        with owned(workdir):
            for path in workdir.iterdir():
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _evaluate(run: Run) -> None:
    """Leaves in its workdir what training would: the config, and one line of metrics, of all held-out text."""
    import jax

    from research.training.evaluation import evaluate
    from research.training.step import make_eval_step
    from research.training.workdir import owned, write_files

    settings, model, variables, corpus = weights_of(run)
    found = evaluate(make_eval_step(model, settings), variables | {"ema": None}, corpus, settings)
    with owned(run.workdir):
        write_files(settings, run.workdir, corpus, 0.0)
        line = {"step": settings.training.steps, "split": "validation"} | found
        write_whole(run.workdir / "metrics.jsonl", json.dumps(line) + "\n")
    jax.clear_caches()


def weights_of(run: Run):
    """(settings, model, its variables, corpus) of a run that is trained, or of an untrained arm's start.

    Raises RunError where the weights are not of the model; an untrained one may lack parts of its start.
    """
    import jax

    from research.data.pipeline import load_corpus
    from research.data.tokenizer import Tokenizer
    from research.interop.weights import read_weights, variables_of
    from research.model.build import make_model, variable_shapes

    folder = run.workdir if run.trained else run.start.workdir
    corpus = load_corpus(run.settings, Tokenizer.load(folder))
    settings = run.settings.with_vocabulary(corpus.tokenizer.vocab_size)
    model = make_model(settings)
    _, saved = read_weights(folder)
    if not run.trained:
        saved = _part(saved, variable_shapes(model, settings))
    variables, wrong = variables_of(saved, model, settings)
    if wrong:
        raise RunError(f"{run}: {folder} holds the weights of another model: {wrong}")
    return settings, model, jax.device_put(variables), corpus


def _part(saved: dict, wanted: dict) -> dict:
    return {name: _part(saved[name], inner) if isinstance(inner, dict) else saved[name]
            for name, inner in wanted.items() if name in saved}


def measure(study: Study, runs: list, lines_of=lines_of) -> dict[tuple[str, str, str], dict[int, float]]:
    """{(size, quantity, arm): {seed: figure}} of the sizes of which every run is finished; without figures of None.

    A diverged run's losses are infinite, and its other figures no numbers.
    lines_of: what is known of a finished run, None of any other.
    """
    lines = {(run.size, run.arm, run.seed): lines_of(run) for run in runs}
    torn = {size for (size, _, _), found in lines.items() if found is None}
    found: dict = {}
    for run in runs:
        if run.size not in torn:
            for quantity in study.quantities:
                its = lines[run.size, run.arm, run.seed]
                figure = ((math.inf if quantity in LOSSES else math.nan) if diverged(its) else
                          QUANTITIES[quantity][0](run, its))
                if figure is not None:
                    found.setdefault((run.size, quantity, run.arm), {})[run.seed] = figure
    return found


def provenance(command: str, runs: list[Run], found: dict) -> dict:
    """What the table and its runs were made by and on, as the runs say themselves; `not_run`: sizes without figures."""
    sizes = dict.fromkeys(size for size, _, _ in found)
    about = [json.loads((run.workdir / "environment.json").read_bytes()) for run in runs if run.size in sizes]

    def every(read) -> str:
        return " and ".join(sorted({str(read(each)) for each in about}))

    return {"command": command, "commit": commit(), "trained_at": every(lambda each: each["commit"]),
            "jax": every(lambda each: each["packages"]["jax"]), "machine": every(machine),
            "seeds": sorted({run.seed for run in runs}),
            "not_run": [size for size in dict.fromkeys(run.size for run in runs) if size not in sizes]}
