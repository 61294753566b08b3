"""The stages of research.distill, each from what the one before has left in DIR, or from what the config names.

    DIR/cold_start/      the teacher after fine-tuning on worked solutions      DIR/teacher/   after reinforcement
    DIR/samples.jsonl    what the teacher says           DIR/verified.jsonl     what of it is taught
    DIR/base/            the student after the same worked solutions, from which every method starts
    DIR/<method>/        the student
    DIR/evaluation/      responses to the test's problems     DIR/results.json, DIR/report.md

Each model's folder is a workdir like research.main's. A stage that is done is not done again; what was made with which
fields stands beside it (`made.py`).
"""

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import logging

from research import environment
from research.data.tokenizer import Tokenizer
from research.decoding.generate import Decoder
from research.decoding.sampling import Sampling
from research.distillation import evaluate, made, rejection
from research.distillation.sample import Plan, drafting, read, sample
from research.distillation.settings import DRAWING, Settings, named
from research.distillation.tasks import Problem
from research.distillation.trainer import Trainer
from research.distillation.verify import Checker
from research.errors import RequestError
from research.experiment import flatten
from research.files import write_whole
from research.interop.weights import checked_weights, read_settings
from research.parallel import hosts, mesh
from research.training.checkpoint import Checkpoints
from research.training.workdir import owned


def run(settings: Settings, workdir: Path, stages: Sequence[str]) -> str:
    """Runs stages one after another; returns what to print. Raises RequestError, RunError, Stopped.

    Of several processes each goes through all of this: they train together, sample a batch each, and the first alone
    checks, estimates and writes.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(owned(workdir))
        pipeline = Pipeline(settings, workdir, stack.enter_context(Checker(settings.checker_timeout)))
        with hosts.refused_alike():
            pipeline.check(stages)
        environment.pin_threads()
        path = workdir / "config.json"
        before = path.read_text("utf-8") if path.exists() else ""
        hosts.from_first(lambda: _write_config(settings, path))
        said = []
        for stage in stages:
            hosts.last_words(lambda: f"what is done is in {workdir}")  # training has its own
            try:
                said.append(getattr(pipeline, stage)())
            except RequestError:
                if not said and hosts.is_first():  # nothing was done with these fields
                    if before:
                        write_whole(path, before)
                    else:
                        path.unlink()
                raise
        return "\n".join(said)


class Pipeline:
    """A config at work in a folder. Each method named like a stage does it and returns what there is to say of it."""

    def __init__(self, settings: Settings, workdir: Path, checker: Checker):
        self.settings, self.workdir, self.checker = settings, workdir, checker
        self.trainer = Trainer(settings, workdir, checker)
        self._decoders: dict = {}  # by model: what is compiled for one serves all of its shape

    def check(self, stages: Sequence[str]) -> None:
        """RequestError for what the first stage lacks, and what the config cannot mean."""
        s = self.settings
        if "teacher" in stages and self.trainer.training:
            self._starts("teacher", s.reinforcement.teacher_steps)
        if "student" in stages and s.method in DRAWING:
            self._starts("student", s.reinforcement.student_steps)
        samples, verified = self.workdir / "samples.jsonl", self.workdir / "verified.jsonl"
        student = [] if s.tuning.files else {
            "distilled": [(verified, "verify")], "unverified": [(samples, "sample")],
            "logits": [(verified, "verify")],
            "on_policy": [(verified, "verify")] if s.on_policy.student_data_fraction < 1 else []}.get(s.method, [])
        scores = s.method in ("logits", "on_policy")  # the teacher is read, not only what it has said
        if scores and not s.sampling.checkpoint:
            student.append((self.trainer.sampled, "teacher"))
        needs = {"sample": [] if s.sampling.checkpoint else [(self.trainer.teacher_folder / "checkpoints", "teacher")],
                 "verify": [(samples, "sample")], "student": student}
        for path, stage in needs.get(stages[0], []):
            if not path.exists():
                raise RequestError(f"--stage={stages[0]} needs {path}, which --stage={stage} writes")
        for name, is_read in (("sampling.checkpoint", "sample" in stages or ("student" in stages and scores)),
                              ("evaluation.checkpoint", "evaluate" in stages),
                              ("teacher.checkpoint.initialize_from", "teacher" in stages),
                              ("student.checkpoint.initialize_from", "student" in stages)):
            if is_read and s.fields[name]:
                _check_folder(name, s.fields[name])
        taught = s.method not in DRAWING or (s.method == "on_policy" and s.on_policy.student_data_fraction < 1)
        if "student" in stages and taught and s.tuning.files and not self.trainer.pairs():
            raise RequestError.field("tuning.files", s.tuning.files, "holds nothing to learn from")
        for name in ("teacher", "student"):
            if name in stages:
                with named(name):
                    mesh.check(getattr(s, name))
                    mesh.check_devices(getattr(s, name), jax.devices())
        self._check_decoding(stages)
        if stages[0] == "evaluate" and not self._evaluated_folders:
            raise RequestError(f"--stage=evaluate needs a model: {self.workdir} has none, and "
                               "config.evaluation.checkpoint names none")

    def teacher(self) -> str:
        """Fine-tunes the teacher on worked solutions, and reinforces it."""
        self.trainer.teacher()
        return f"teacher: {self.trainer.teacher_folder}"

    def sample(self) -> str:
        """Several responses of the teacher to each training problem, in DIR/samples.jsonl."""
        s, path = self.settings.sampling, self.workdir / "samples.jsonl"
        _, decoder, tokenizer, whose = self._model_in(self.trainer.sampled)
        plan = Plan(s.samples, s.batch_size, s.max_tokens, Sampling(s.temperature, top_p=s.top_p), s.seed,
                    s.draft_tokens)
        found = sample(path, self.trainer.asked, decoder, tokenizer, tokenizer.start_ids, self.settings.template, plan,
                       self.trainer.record("samples") | whose)
        said = "all were there" if not found["samples"] else (
            f"{found['samples']:,} now, {found['tokens']:,} tokens, {found['tokens_per_second']:,.0f} tokens/s"
            + drafting(found))
        if found["samples"] and hosts.is_first():
            _add(self.workdir / "sampling.json", found | {"from": str(self.trainer.sampled)})
        return f"samples: {path}: {len(self.trainer.asked) * s.samples:,}, of which {said}"

    def verify(self) -> str:
        """What of the samples is right, and fit to be taught, in DIR/verified.jsonl."""
        return hosts.from_first(self._verify)

    def _verify(self) -> str:
        samples = read(self.workdir / "samples.jsonl")
        problems, before = self.trainer.problems[0], Counter(self.checker.failures)
        found = rejection.verify(samples, problems, self.checker, self.settings.rejection)
        rejection.write(self.workdir / "verified.jsonl", found, problems)
        made.write(self.workdir / "verified.jsonl", self.trainer.record("verified"))
        failures = dict(self.checker.failures - before)
        write_whole(self.workdir / "verification.json", json.dumps(
            {"counts": found.counts, "checker_failures": failures, "pass_rate": found.pass_rate}, indent=1) + "\n")
        counts = ", ".join(f"{count:,} {name}" for name, count in found.counts.items() if count)
        return f"verified: {self.workdir / 'verified.jsonl'}: {counts}"

    def student(self) -> str:
        """The student, by what `method` says."""
        self.trainer.student()
        return f"student: {self.workdir / self.settings.method}"

    def evaluate(self) -> str:
        """Every model of DIR on the test's problems, and DIR/report.md."""
        s = self.settings
        problems = self.trainer.problems[1][:s.evaluation.problems or None]
        names = hosts.from_first(lambda: [*self._evaluated_folders])  # a disk may show others their folders late
        given = s.evaluation.checkpoint and Path(s.evaluation.checkpoint).expanduser().resolve()
        found = {name: self._evaluated(given or self.workdir / name, name, problems) for name in names}

        def report() -> str:
            evaluate.write(self.workdir, s, found, len(problems))
            return f"{evaluate.table(found, s.evaluation)}\n\nreport: {self.workdir / 'report.md'}"

        return hosts.from_first(report)

    @property
    def _evaluated_folders(self) -> dict[str, Path]:
        """Models by the name of their row."""
        if self.settings.evaluation.checkpoint:
            folder = Path(self.settings.evaluation.checkpoint).expanduser().resolve()
            return {folder.name: folder}
        return {name: self.workdir / name for name in evaluate.NAMES if (self.workdir / name / "checkpoints").is_dir()}

    def _check_decoding(self, stages: Sequence[str]) -> None:
        """RequestError where a model is to say more than it has positions for, or to draft without a module for it."""
        s, asked = self.settings, []
        if "teacher" in stages and s.reinforcement.teacher_steps:
            asked.append(("reinforcement", "teacher", s.teacher))
        if "student" in stages and s.method in DRAWING:
            asked.append(("reinforcement", "student", s.student))
        if "sample" in stages:
            made_now = "teacher" in stages and not s.sampling.checkpoint
            asked.append(("sampling", "teacher", s.teacher if made_now else read_settings(self.trainer.sampled)))
        if "evaluate" in stages and s.evaluation.checkpoint:
            asked.append(("evaluation", "checkpoint", read_settings(Path(s.evaluation.checkpoint).expanduser())))
        elif "evaluate" in stages:
            asked += [("evaluation", name, getattr(s, name)) for name in ("teacher", "student") if name in stages]
        for group, name, model in asked:
            tokens, positions = getattr(s, group).max_tokens, model.model.max_position_embeddings
            if tokens >= positions:
                raise RequestError.field(f"{group}.max_tokens", tokens, "leaves no room for a prompt: the "
                                         f"{name} has max_position_embeddings={positions}")
            drafts = group != "evaluation" and getattr(s, group).draft_tokens
            if drafts and not model.mtp.num_nextn_predict_layers:
                raise RequestError.field(f"{group}.draft_tokens", drafts, f"must be 0: the {name} has no multi-token "
                                         "module to draft with (mtp.num_nextn_predict_layers=0)")

    def _starts(self, name: str, steps: int) -> None:
        """RequestError where a model has nothing to start its reinforcement from, or nothing is to be done."""
        s = self.settings
        given = getattr(s, name).checkpoint.initialize_from
        shown = s.cold_start.problems and (name == "teacher" or s.cold_start.student_steps)
        if not (given or shown):
            raise RequestError.field("cold_start.problems", s.cold_start.problems, "leaves the "
                                     f"{name} nothing to start from: show it worked solutions, or name weights in "
                                     f"config.{name}.checkpoint.initialize_from")
        if name == "teacher" and not (shown or steps):
            raise RequestError.field("reinforcement.teacher_steps", 0, "and no cold start leave nothing to do: "
                                     "config.sampling.checkpoint names a teacher that is finished")

    def _model_in(self, folder: Path):
        """(settings, Decoder, tokenizer, whose weights: for a record) of a workdir or a Hugging Face folder."""
        settings, model, variables = checked_weights(folder)
        whose = {"model": str(folder), "weights": made.digest(variables)}
        if model in self._decoders:
            self._decoders[model].take(variables)
        else:
            self._decoders[model] = Decoder(model, variables)
        return settings, self._decoders[model], Tokenizer.load(folder), whose

    def _evaluated(self, folder: Path, name: str, problems: Sequence[Problem]) -> dict:
        """What `evaluate.estimates` says of the responses, which are kept under the model's name and step."""
        e, (settings, decoder, tokenizer, whose) = self.settings.evaluation, self._model_in(folder)
        step = Checkpoints(folder / "checkpoints", 1, 0).newest_intact() if (folder / "checkpoints").is_dir() else None
        (self.workdir / "evaluation").mkdir(exist_ok=True)
        stem = self.workdir / "evaluation" / (name if step is None else f"{name}-{step}")
        plan = Plan(e.samples, e.batch_size, e.max_tokens, Sampling(e.temperature, top_p=e.top_p), e.seed, 0)
        plans = {"sampled": plan}
        if e.greedy:
            plans["greedy"] = dataclasses.replace(plan, samples=1, sampling=Sampling())
        paths = {kind: Path(f"{stem}.{kind}.jsonl") for kind in plans}
        for kind, one in plans.items():
            path, chosen = paths[kind], one.sampling
            record = self.trainer.record("evaluation") | whose | {
                "evaluation.samples": one.samples, "evaluation.temperature": chosen.temperature,
                "evaluation.top_p": chosen.top_p}
            try:
                sample(path, problems, decoder, tokenizer, tokenizer.start_ids, self.settings.template, one, record)
            except RequestError as error:
                raise RequestError(str(error).replace("config.sampling", "config.evaluation")) from None

        def estimates() -> dict:
            found = {kind: read(path) for kind, path in paths.items()}
            return evaluate.estimates(found, problems, self.checker) | evaluate.facts(folder, settings, step)

        return hosts.from_first(estimates)


def _check_folder(name: str, folder: str) -> None:
    """RequestError where the field `name` names what is no checkpoint."""
    if not Path(folder).expanduser().is_dir():
        raise RequestError.field(name, folder, "is not a directory")
    try:
        read_settings(Path(folder).expanduser())
    except RequestError as error:
        raise RequestError.field(name, folder, f"cannot be used: {error}") from None


def _add(path: Path, found: dict) -> None:
    """Adds up what a stage has done over all its starts."""
    before = json.loads(path.read_bytes()) if path.exists() else {}
    summed = {name: before.get(name, 0) + found[name]
              for name in ("samples", "tokens", "seconds", "drafted", "accepted")}
    summed["tokens_per_second"] = summed["tokens"] / max(summed["seconds"], 1e-9)
    write_whole(path, json.dumps(summed | {"from": found["from"]}, indent=1) + "\n")


def _write_config(settings: Settings, path: Path) -> None:
    """Writes the config; says what differs from that of the last command in this folder."""
    if path.exists():
        with contextlib.suppress(ValueError, AttributeError):
            before = flatten(json.loads(path.read_bytes()))
            for name, value in settings.fields.items():
                if name != "method" and before.get(name, value) != value:
                    logging.warning("config.%s was %s and is %s now", name, before[name], value)
    write_whole(path, settings.to_json())
