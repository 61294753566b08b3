"""How the models of a folder of research.distill are trained, each in a workdir of its own: stages.py says where.

A teacher: fine-tuned on worked solutions, then reinforced. A student: fine-tuned on the same solutions, and from there
taught by what `method` says. A model that is done is not trained again.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

from absl import logging

from research import config
from research.data.sources import Document
from research.data.tokenizer import Tokenizer, build
from research.distillation import imitate, made, on_policy, reinforce, rejection, rollouts, tasks
from research.distillation.finetune import Examples
from research.distillation.sample import read
from research.distillation.settings import Settings, named
from research.distillation.tasks import Problem
from research.distillation.verify import Checker
from research.errors import RequestError
from research.interop.weights import checked_weights
from research.training import loop
from research.training.checkpoint import Checkpoints
from research.training.metrics import read_lines
from research.training.step import loss_of


class Trainer:
    """Trains what a config says, and knows the problems and the folders that the other stages ask for too."""

    def __init__(self, settings: Settings, workdir: Path, checker: Checker):
        self.settings, self.workdir, self.checker = settings, workdir, checker

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

    @property
    def teacher_folder(self) -> Path:
        """Where the finished teacher is."""
        s = self.settings
        if s.reinforcement.teacher_steps:
            return self.workdir / "teacher"
        return self.workdir / "cold_start" if s.cold_start.problems else (
            Path(s.teacher.checkpoint.initialize_from).expanduser())

    @property
    def sampled(self) -> Path:
        """Who is sampled, and scores where a student learns from distributions."""
        checkpoint = self.settings.sampling.checkpoint
        return Path(checkpoint).expanduser() if checkpoint else self.teacher_folder

    @property
    def asked(self) -> list[Problem]:
        """The problems that are sampled."""
        return self.training[:self.settings.sampling.problems or None]

    def record(self, name: str) -> dict:
        """What `name` is made with, see made.py."""
        return made.fields_of(self.settings.fields, name)

    def teacher(self) -> None:
        """Fine-tunes the teacher on worked solutions, and reinforces it."""
        s = self.settings
        start = self._cold_start("teacher", "cold_start", s.teacher.training.steps)
        if s.reinforcement.teacher_steps:
            self._reinforce("teacher", "teacher", s.reinforcement.teacher_steps, start)

    def student(self) -> None:
        """The student, by what `method` says."""
        s = self.settings
        start = self._cold_start("student", "base", s.cold_start.student_steps)
        if s.method == "reinforced":
            self._reinforce("student", s.method, s.reinforcement.student_steps, start)
        elif s.method == "on_policy":
            self._distil_on_policy(start)
        else:
            self._tune("student", s.method, s.student.training.steps, start, self.pairs())

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
            make = partial(on_policy.Mixture, fraction=s.on_policy.student_data_fraction, pairs=self.pairs(),
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

    def _rollouts(self, settings, start: str, scoring: rollouts.Scoring, make=rollouts.Rollouts) -> rollouts.Rollouts:
        return make(self.training, self._tokenizer(settings, start), self.settings.template, self.checker,
                    self.settings.reinforcement, settings, scoring)

    def _learn(self, folder: str, drawn: rollouts.Rollouts, loss) -> None:
        self._train(drawn.settings, folder, corpus=drawn, evaluate=drawn.evaluate, loss=loss)

    def _train(self, settings, folder: str, **how) -> None:
        logging.info("%s is trained", self.workdir / folder)
        loop.train(settings, self.workdir / folder, note={made.NOTE: self.record(folder)}, **how)

    def pairs(self) -> list[tuple[str, str]]:
        """(prompt, response) that the student's method is to learn from."""
        s, template = self.settings, self.settings.template
        if s.tuning.files:
            keys = {"tuning.question_field": s.tuning.question_field,
                    "tuning.response_field": s.tuning.response_field}
            rows = tasks.read_rows("tuning.files", s.tuning.files, keys)
            return [(template.prompt(row["question_field"]), row["response_field"]) for _, row in rows]
        if s.method == "reference":
            return [(template.prompt(p.question), template.response("", p.answer)) for p in self.asked]
        if s.method == "unverified":
            questions = {p.digest.hex(): p.question for p in self.problems[0]}
            samples = read(self.workdir / "samples.jsonl")
            return [(template.prompt(questions[x.problem]), x.text) for x in samples if x.problem in questions]
        kept = rejection.read(self.workdir / "verified.jsonl")
        return [(template.prompt(question), response) for question, response in kept]

    def _worked(self, problems: Sequence[Problem]) -> list[tuple[str, str]]:
        template = self.settings.template
        return [(template.prompt(p.question), template.response(p.solution, p.answer)) for p in problems]

    def _teacher_of(self, tokenizer: Tokenizer, settings):
        """(settings, model, variables) of the teacher of a student with this tokenizer and these settings; RequestError
        where its distributions are not over the student's tokens."""
        method = self.settings.method
        theirs, model, variables = checked_weights(self.sampled)
        if Tokenizer.load(self.sampled).hash != tokenizer.hash:
            raise RequestError.field("method", method, "needs one tokenizer for both models: a distribution over the "
                                     f"tokens of {self.sampled} says nothing of the student's; the method 'distilled' "
                                     "learns from texts")
        if theirs.model.vocab_size != settings.with_vocabulary(tokenizer.vocab_size).model.vocab_size:
            raise RequestError.field("method", method, "needs config.student.model.vocab_size="
                                     f"{theirs.model.vocab_size}, the teacher's")
        return dataclasses.replace(theirs, data=settings.data), model, variables  # rows are as long as the student's

    def _teacher_logits(self, examples: Examples, settings) -> dict:
        theirs, model, variables = self._teacher_of(examples.tokenizer, settings)
        step = Checkpoints(self.sampled / "checkpoints", 1, 0).newest_intact()
        return imitate.store(self.workdir / "logits_of_teacher", examples, model, theirs, variables,
                             self.settings.logits, settings.training.batch_size, f"{self.sampled} {step}")

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
