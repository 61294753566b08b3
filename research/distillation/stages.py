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
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

from absl import logging

from research import config, environment
from research.command import Stopped
from research.data.sources import Document
from research.data.tokenizer import Tokenizer, build
from research.decoding.generate import Decoder
from research.decoding.sampling import Sampling
from research.distillation import evaluate, imitate, made, on_policy, reinforce, rejection, rollouts, tasks
from research.distillation.finetune import Examples
from research.distillation.sample import Plan, drafting, read, sample
from research.distillation.settings import DRAWING, Settings, named
from research.distillation.tasks import Problem
from research.distillation.verify import Checker
from research.errors import RequestError
from research.experiment import flatten
from research.files import write_whole
from research.interop.weights import checked_weights, read_settings
from research.training import loop
from research.training.checkpoint import Checkpoints
from research.training.metrics import read_lines
from research.training.step import loss_of
from research.training.workdir import owned


def run(settings: Settings, workdir: Path, stages: Sequence[str]) -> str:
    """Runs stages one after another; returns what to print. Raises RequestError, RunError, Stopped."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(owned(workdir))
        pipeline = Pipeline(settings, workdir, stack.enter_context(Checker(settings.checker_timeout)))
        pipeline.check(stages)
        environment.pin_threads()
        path = workdir / "config.json"
        before = path.read_text("utf-8") if path.exists() else ""
        _write_config(settings, path)
        said = []
        for stage in stages:
            try:
                said.append(getattr(pipeline, stage)())
            except RequestError:
                if not said:  # nothing was done with these fields
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
        self._decoders: dict = {}  # by model: what is compiled for one serves all of its shape

    @cached_property
    def problems(self) -> tuple[list[Problem], list[Problem]]:
        """Of training and of the test."""
        return tasks.train_and_test(self.settings.task)

    @property
    def training(self) -> list[Problem]:
        """The problems of training, of which there is one at least."""
        if not self.problems[0]:
            raise RequestError.field("task.files", self.settings.task.files, "holds no problem that is not a test's" if
                                     self.settings.task.files else "names no problems to learn from: with those of a "
                                     "test alone, only --stage=evaluate is meant")
        return self.problems[0]

    def check(self, stages: Sequence[str]) -> None:
        """RequestError for what the first stage lacks, and what the config cannot mean."""
        s = self.settings
        if "teacher" in stages:
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
            student.append((self._sampled, "teacher"))
        needs = {"sample": [] if s.sampling.checkpoint else [(self.teacher_folder / "checkpoints", "teacher")],
                 "verify": [(samples, "sample")], "student": student}
        for path, stage in needs.get(stages[0], []):
            if not path.exists():
                raise RequestError(f"--stage={stages[0]} needs {path}, which --stage={stage} writes")
        for name, is_read in (("sampling", "sample" in stages or ("student" in stages and scores)),
                              ("evaluation", "evaluate" in stages)):
            checkpoint = getattr(s, name).checkpoint
            if is_read and checkpoint and not Path(checkpoint).expanduser().is_dir():
                raise RequestError.field(f"{name}.checkpoint", checkpoint, "is not a directory")
        self._check_drafts(stages)
        if stages[0] == "evaluate" and not self._evaluated_folders:
            raise RequestError(f"--stage=evaluate needs a model: {self.workdir} has none, and "
                               "config.evaluation.checkpoint names none")

    def teacher(self) -> str:
        """Fine-tunes the teacher on worked solutions, and reinforces it."""
        s = self.settings
        start = self._cold_start("teacher", "cold_start", s.teacher.training.steps)
        if s.reinforcement.teacher_steps:
            self._reinforce("teacher", "teacher", s.reinforcement.teacher_steps, start)
        return f"teacher: {self.teacher_folder}"

    def sample(self) -> str:
        """Several responses of the teacher to each training problem, in DIR/samples.jsonl."""
        s, path = self.settings.sampling, self.workdir / "samples.jsonl"
        _, decoder, tokenizer, whose = self._model_in(self._sampled)
        plan = Plan(s.samples, s.batch_size, s.max_tokens, Sampling(s.temperature, top_p=s.top_p), s.seed,
                    s.draft_tokens)
        found = sample(path, self._asked, decoder, tokenizer, tokenizer.start_ids, self.settings.template, plan,
                       self._record("samples") | whose)
        said = "all were there" if not found["samples"] else (
            f"{found['samples']:,} now, {found['tokens']:,} tokens, {found['tokens_per_second']:,.0f} tokens/s"
            + drafting(found))
        if found["samples"]:
            _add(self.workdir / "sampling.json", found | {"from": str(self._sampled)})
        return f"samples: {path}: {len(self._asked) * s.samples:,}, of which {said}"

    def verify(self) -> str:
        """What of the samples is right, and fit to be taught, in DIR/verified.jsonl."""
        samples = read(self.workdir / "samples.jsonl")
        problems, failed = self.problems[0], dict(self.checker.failures)
        found = rejection.verify(samples, problems, self.checker, self.settings.rejection)
        rejection.write(self.workdir / "verified.jsonl", found, problems)
        made.write(self.workdir / "verified.jsonl", self._record("verified"))
        failures = {name: count - failed.get(name, 0) for name, count in self.checker.failures.items()}
        write_whole(self.workdir / "verification.json", json.dumps(
            {"counts": found.counts, "checker_failures": failures, "pass_rate": found.pass_rate}, indent=1) + "\n")
        counts = ", ".join(f"{count:,} {name}" for name, count in found.counts.items() if count)
        return f"verified: {self.workdir / 'verified.jsonl'}: {counts}"

    def student(self) -> str:
        """The student, by what `method` says."""
        s = self.settings
        start = self._cold_start("student", "base", s.cold_start.student_steps)
        if s.method == "reinforced":
            self._reinforce("student", s.method, s.reinforcement.student_steps, start)
        elif s.method == "on_policy":
            self._distil_on_policy(start)
        else:
            self._tune("student", s.method, s.student.training.steps, start, self._pairs())
        return f"student: {self.workdir / s.method}"

    def evaluate(self) -> str:
        """Every model of DIR on the test's problems, and DIR/report.md."""
        s = self.settings
        problems = self.problems[1][:s.evaluation.problems or None]
        found = {name: self._evaluated(folder, name, problems) for name, folder in self._evaluated_folders.items()}
        evaluate.write(self.workdir, s, found, len(problems))
        return f"{evaluate.table(found, s.evaluation)}\n\nreport: {self.workdir / 'report.md'}"

    @property
    def teacher_folder(self) -> Path:
        """Where the finished teacher is."""
        s = self.settings
        if s.reinforcement.teacher_steps:
            return self.workdir / "teacher"
        return self.workdir / "cold_start" if s.cold_start.problems else (
            Path(s.teacher.checkpoint.initialize_from).expanduser())

    @property
    def _sampled(self) -> Path:
        checkpoint = self.settings.sampling.checkpoint
        return Path(checkpoint).expanduser() if checkpoint else self.teacher_folder

    @property
    def _evaluated_folders(self) -> dict[str, Path]:
        """Models by the name of their row."""
        if self.settings.evaluation.checkpoint:
            folder = Path(self.settings.evaluation.checkpoint).expanduser().resolve()
            return {folder.name: folder}
        return {name: self.workdir / name for name in evaluate.NAMES if (self.workdir / name / "checkpoints").is_dir()}

    @property
    def _asked(self) -> list[Problem]:
        return self.training[:self.settings.sampling.problems or None]

    def _check_drafts(self, stages: Sequence[str]) -> None:
        """RequestError where a model is to draft that has no module to do so."""
        s, asked = self.settings, []
        if "teacher" in stages and s.reinforcement.teacher_steps:
            asked.append(("reinforcement", "teacher", s.teacher))
        if "student" in stages and s.method in DRAWING:
            asked.append(("reinforcement", "student", s.student))
        if "sample" in stages and s.sampling.draft_tokens:
            asked.append(("sampling", "teacher", read_settings(self._sampled) if s.sampling.checkpoint else s.teacher))
        for group, name, model in asked:
            drafts = getattr(s, group).draft_tokens
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

    def _cold_start(self, name: str, folder: str, steps: int) -> str:
        """The model after the worked solutions, in DIR/folder; where there is none, what it is to start from."""
        s = self.settings
        if not (s.cold_start.problems and steps):
            return getattr(s, name).checkpoint.initialize_from
        solved = [problem for problem in self.training if problem.solution][:s.cold_start.problems]
        if not solved:
            raise RequestError.field("cold_start.problems", s.cold_start.problems, "shows worked solutions, which "
                                     f"config.task.source={s.task.source!r} has none of: set it to 0")
        self._tune(name, folder, steps, getattr(s, name).checkpoint.initialize_from, self._worked(solved))
        return str(self.workdir / folder)

    def _worked(self, problems: Sequence[Problem]) -> list[tuple[str, str]]:
        template = self.settings.template
        return [(template.prompt(p.question), template.response(p.solution, p.answer)) for p in problems]

    def _pairs(self) -> list[tuple[str, str]]:
        """(prompt, response) that the student's method is to learn from."""
        s, template = self.settings, self.settings.template
        if s.tuning.files:
            keys = {"tuning.question_field": s.tuning.question_field,
                    "tuning.response_field": s.tuning.response_field}
            rows = tasks.read_rows("tuning.files", s.tuning.files, keys)
            if not rows:
                raise RequestError.field("tuning.files", s.tuning.files, "holds nothing to learn from")
            return [(template.prompt(row["question_field"]), row["response_field"]) for _, row in rows]
        if s.method == "reference":
            return [(template.prompt(p.question), template.response("", p.answer)) for p in self._asked]
        if s.method == "unverified":
            questions = {p.digest.hex(): p.question for p in self.problems[0]}
            samples = read(self.workdir / "samples.jsonl")
            return [(template.prompt(questions[x.problem]), x.text) for x in samples if x.problem in questions]
        kept = rejection.read(self.workdir / "verified.jsonl")
        return [(template.prompt(question), response) for question, response in kept]

    def _tune(self, name: str, folder: str, steps: int, start: str, pairs: Sequence[tuple[str, str]]) -> None:
        """Fine-tunes a model on pairs, from the weights in `start` or from none, in DIR/folder."""
        if self._done(folder, steps):
            return
        changed = getattr(self.settings, name).to_config()
        changed.training.steps, changed.checkpoint.initialize_from = steps, start
        with named(name):
            settings, loss = config.check(changed), loss_of
            examples = Examples(pairs, self._tokenizer(settings, start), settings)
            if folder == "logits":
                loss = partial(imitate.imitation_loss, logits=self.settings.logits)
                examples.kept = self._teacher_logits(examples, settings)
            self._train(settings, folder, corpus=examples, loss=loss)

    def _reinforce(self, name: str, folder: str, steps: int, start: str) -> None:
        """Reinforces a model from the weights in `start`, in DIR/folder."""
        if self._done(folder, steps):
            return
        r = self.settings.reinforcement
        with named(name):
            settings = reinforce.settings_of(getattr(self.settings, name), r, steps, start)
            rewards = reinforce.Rewards(r, settings, self.workdir / folder / "references")
            self._learn(folder, self._rollouts(settings, start, rewards),
                        partial(reinforce.policy_loss, reinforcement=r))

    def _distil_on_policy(self, start: str) -> None:
        """Trains the student on what it says itself, and on fixed samples where the config wants these, from the
        weights in `start`, in DIR/on_policy."""
        s, make = self.settings, rollouts.Rollouts
        if self._done("on_policy", s.on_policy.steps):
            return
        if s.on_policy.student_data_fraction < 1:
            make = partial(on_policy.Mixture, fraction=s.on_policy.student_data_fraction, pairs=self._pairs(),
                           rows=s.student.training.batch_size)
        with named("student"):
            settings = rollouts.settings_of(s.student, s.reinforcement, s.on_policy.steps, start,
                                            learning_rate=s.on_policy.learning_rate)
            theirs, model, variables = self._teacher_of(self._tokenizer(settings, start), settings)
            teacher = on_policy.Teacher(model, theirs, variables, s.reinforcement.minibatches)
            drawn = self._rollouts(settings, start, teacher, make)
            drawn.check(model, 0, "for the teacher, ")
            self._learn("on_policy", drawn, partial(
                on_policy.on_policy_loss, on_policy=s.on_policy, reinforcement=s.reinforcement,
                teacher_flops=teacher.flops_per_token))

    def _rollouts(self, settings, start: str, scoring: rollouts.Scoring, make=rollouts.Rollouts) -> rollouts.Rollouts:
        return make(self.training, self._tokenizer(settings, start), self.settings.template, self.checker,
                    self.settings.reinforcement, settings, scoring)

    def _learn(self, folder: str, drawn: rollouts.Rollouts, loss) -> None:
        self._train(drawn.settings, folder, corpus=drawn, evaluate=drawn.evaluate, loss=loss)

    def _train(self, settings, folder: str, **how) -> None:
        try:
            loop.train(settings, self.workdir / folder, **how)
        except Stopped:  # at its last step it may be: then nothing is left to train
            made.write(self.workdir / folder, self._record(folder))
            raise
        made.write(self.workdir / folder, self._record(folder))

    def _record(self, name: str) -> dict:
        return made.fields_of(self.settings.fields, name)

    def _teacher_of(self, tokenizer: Tokenizer, settings):
        """(settings, model, variables) of the teacher of a student with this tokenizer and these settings; RequestError
        where its distributions are not over the student's tokens."""
        method = self.settings.method
        theirs, model, variables = checked_weights(self._sampled)
        if Tokenizer.load(self._sampled).hash != tokenizer.hash:
            raise RequestError.field("method", method, "needs one tokenizer for both models: a distribution over the "
                                     f"tokens of {self._sampled} says nothing of the student's; the method 'distilled' "
                                     "learns from texts")
        if theirs.model.vocab_size != settings.with_vocabulary(tokenizer.vocab_size).model.vocab_size:
            raise RequestError.field("method", method, "needs config.student.model.vocab_size="
                                     f"{theirs.model.vocab_size}, the teacher's")
        return dataclasses.replace(theirs, data=settings.data), model, variables  # rows are as long as the student's

    def _teacher_logits(self, examples: Examples, settings) -> dict:
        theirs, model, variables = self._teacher_of(examples.tokenizer, settings)
        step = Checkpoints(self._sampled / "checkpoints", 1, 0).newest_intact()
        return imitate.store(self.workdir / "logits_of_teacher", examples, model, theirs, variables,
                             self.settings.logits, settings.training.batch_size, f"{self._sampled} {step}")

    def _tokenizer(self, settings, start: str) -> Tokenizer:
        """That of the weights to start from, else the config's; a BPE learns from the examples of the cold start."""
        if start:
            return Tokenizer.load(Path(start).expanduser())
        if settings.data.tokenizer != "bpe":
            return build(settings.data, ())
        problems = self.training[:max(self.settings.cold_start.problems, 500)]
        return build(settings.data, [Document(p.name, prompt + response)
                                     for p, (prompt, response) in zip(problems, self._worked(problems), strict=True)])

    def _done(self, folder: str, steps: int) -> bool:
        """Whether a run stands at its last step, evaluated."""
        path = self.workdir / folder
        evaluated = [line["step"] for line in read_lines(path / "metrics.jsonl") if line["split"] == "validation"]
        if steps not in evaluated or Checkpoints(path / "checkpoints", 1, 0).newest_intact() != steps:
            return False
        logging.info("%s: all %d steps are done", path, steps)
        made.kept(path, self.settings.fields)
        return True

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
        found = {}
        for kind, one in plans.items():
            path, chosen = Path(f"{stem}.{kind}.jsonl"), one.sampling
            record = self._record("evaluation") | whose | {
                "evaluation.samples": one.samples, "evaluation.temperature": chosen.temperature,
                "evaluation.top_p": chosen.top_p}
            try:
                sample(path, problems, decoder, tokenizer, tokenizer.start_ids, self.settings.template, one, record)
            except RequestError as error:
                raise RequestError(str(error).replace("config.sampling", "config.evaluation")) from None
            found[kind] = read(path)
        return evaluate.estimates(found, problems, self.checker) | evaluate.facts(folder, settings, step)


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
