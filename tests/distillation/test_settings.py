"""The config of research.distill: every arm, what is refused and in which words, and derived fields."""

import json
import sys

import pytest
from ml_collections import ConfigDict

from experiments import base
from research import experiment
from research.distillation import reinforce
from research.distillation.settings import METHODS, check, complete
from research.errors import RequestError
from research.experiment import flatten
from tests.training import runs

DEFAULT = base.get_distillation_config()
ARMS = [(file, arm) for file, arms in {
    "distill.py": METHODS, "drafting.py": ("drafts_1", "drafts_2", "drafts_3"),
    "r1_evaluate.py": ("aime", "math500", "gsm8k", "aime:llama_8b"),
}.items() for arm in ("", *arms)]


def settings_of(*changes: str):
    return check(experiment.change(base.get_distillation_config(), changes, DEFAULT))


@pytest.mark.parametrize(("file", "arm"), ARMS)
def test_every_arm_builds_and_shrinks(file, arm):
    path = runs.ROOT / "experiments" / file
    text = path.read_text()
    assert text.startswith('"""') and f"--config=experiments/{file}" in text
    whole = check(experiment.load(f"{path}:{arm}"))
    small = check(experiment.load(f"{path}:{arm}:smoke" if arm else f"{path}:smoke"))
    assert set(whole.fields) == set(flatten(DEFAULT.to_dict())) == set(flatten(json.loads(whole.to_json())))
    assert file != "distill.py" or arm in ("", whole.method)
    assert small.method == whole.method and small.evaluation.published == whole.evaluation.published
    assert small.task.source == whole.task.source and small.student.model.attention == whole.student.model.attention
    with pytest.raises(RequestError, match="has no arm '\\?'"):
        experiment.load(f"{path}:?")


def test_one_seed_is_everybodys_until_they_have_their_own():
    s = settings_of("seed=3", "task.seed=9")
    assert s.task.seed == 9
    assert {3} == {s.sampling.seed, s.evaluation.seed, s.teacher.training.seed, s.student.training.seed}


def test_a_field_without_its_group_is_looked_for_among_this_commands(tmp_path):
    told = runs.finish(runs.start([sys.executable, "-m", "research.distill", "--samples=3"], tmp_path))
    assert told == (2, "", "error: --samples is not a flag (did you mean --config.evaluation.samples or "
                    "--config.sampling.samples?)\n")


@pytest.mark.parametrize(("change", "message"), [
    ("method=distil", r"config\.method='distil' must be one of .* \(did you mean distilled\?\)"),
    ("template=none", r"config\.template='none' must be one of deepseek, plain"),
    ("reinforcement.group_size=1", r"config\.reinforcement\.group_size=1 must be at least 2"),
    ("reinforcement.minibatches=3", r"config\.reinforcement\.minibatches=3 does not divide the 128 samples"),
    ("logits.beta=1", r"config\.logits\.beta=1\.0 must be above 0 and below 1"),
    ("on_policy.beta=0", r"config\.on_policy\.beta=0\.0 must be above 0 and below 1"),
    ("on_policy.direction=revers", r"config\.on_policy\.direction='revers' must be one of .*did you mean reverse\?"),
    ("on_policy.student_data_fraction=1.1", r"_policy\.student_data_fraction=1\.1 must be between 0 and 1"),
    ("on_policy.student_data_fraction=-1", r"_policy\.student_data_fraction=-1\.0 must be between 0 and 1"),
    ("on_policy.student_data_fraction=half", r"student_data_fraction='half' must be a number"),
    ("on_policy.steps=0", r"config\.on_policy\.steps=0 must be at least 1"),
    ("seed=-1", r"config\.seed=-1 must be at least 0"),
    ("sampling.seed=-1", r"config\.sampling\.seed=-1 must be at least 0"),
    ("evaluation.seed=-1", r"config\.evaluation\.seed=-1 must be at least 0"),
    ("sampling.samples=0", r"config\.sampling\.samples=0 must be at least 1"),
    ("sampling.top_p=2", r"config\.sampling\.top_p=2\.0 must be above 0 and at most 1"),
    ("evaluation.top_p=0", r"config\.evaluation\.top_p=0\.0 must be above 0 and at most 1"),
    ("evaluation.temperature=-1", r"config\.evaluation\.temperature=-1\.0 must be at least 0"),
    ("rejection.per_problem=0", r"config\.rejection\.per_problem=0 must be at least 1"),
    ("rejection.foreign_share=-0.1", r"config\.rejection\.foreign_share=-0\.1 must be at least 0"),
    ("reinforcement.draft_tokens=-1", r"config\.reinforcement\.draft_tokens=-1 must be at least 0"),
    ("reinforcement.temperature=0", r"config\.reinforcement\.temperature=0\.0 must be above 0"),
    ("teacher.model.n_group=3", r"config\.teacher\.model\.n_group=3 does not divide config\.teacher\.model\.n_routed"),
    ("student.training.accumulation_steps=3", r"config\.student\.training\.accumulation_steps=3 does not divide"),
    ("student.training.batch_ramp_start=4", r"config\.student\.training\.batch_ramp_start=4 must be 0"),
    ("teacher.mesh.pipeline=2", r"config\.teacher\.mesh\.pipeline=2 must be 1: no loss of distillation's"),
    ("teacher.mesh.data=8 reinforcement.questions=1 reinforcement.group_size=4 teacher.training.batch_size=8",
     r"config\.teacher\.training\.accumulation_steps=1 with 8 = mesh\.data .* does not divide the 4 samples"),
    ("on_policy.learning_rate=0", r"config\.on_policy\.learning_rate=0\.0 must be "),
    ("task.options=[1]", r"config\.task\.options='\[1\]' must be a JSON object"),
    ("task.test_fraction=2", r"config\.task\.test_fraction=2\.0 must be between 0 and 1"),
    ("sampling.sample=2", r"config\.sampling\.sample=2 is not a field .*did you mean config\.sampling\.samples"),
])
def test_a_wrong_field_is_named(change, message):
    with pytest.raises(RequestError, match=message):
        settings_of(*change.split(" "))


def test_samples_of_an_update_need_not_fit_a_model_that_draws_none():
    rows = "reinforcement.questions=1", "reinforcement.group_size=4"
    mesh = "student.mesh.data=8", "student.training.batch_size=8"
    assert settings_of("method=distilled", *rows, *mesh).student.mesh.data == 8
    with pytest.raises(RequestError, match="does not divide the 4 samples"):
        settings_of("method=reinforced", *rows, *mesh)


def test_the_config_of_a_model_alone_is_a_students():
    chosen = complete(experiment.load(str(runs.ROOT / "experiments/r1_distill_qwen_1_5b.py")))
    s = check(experiment.change(chosen, ["seed=5", "student.checkpoint.initialize_from=there"], DEFAULT))
    assert s.student.model.num_hidden_layers == 28 and s.student.optimizer.learning_rate == 1e-4
    assert s.student.training.seed == 5 and s.student.checkpoint.initialize_from == "there"
    assert (s.task.source, s.task.count) == ("files", 0)
    assert {32768} == {each.max_tokens for each in (s.sampling, s.rejection, s.evaluation, s.reinforcement)}
    r = s.reinforcement
    assert (r.questions * r.group_size, r.minibatches * r.reference_every, r.learning_rate) == (8192, 400, 2e-6)
    assert complete(chosen) is chosen and s.cold_start.problems == 0 and "boxed" in s.template.directive
    short = complete(experiment.load(str(runs.ROOT / "experiments/deepseek_v3.py")))  # rows as long as its positions
    assert (short.student.model.max_position_embeddings, short.sampling.max_tokens) == (4096, 2048)
    del (lacking := ConfigDict(base.get_config().to_dict()))["data"]
    with pytest.raises(RequestError, match=r"config\.data\.\w+ is missing"):
        complete(lacking)


def test_a_reinforcement_is_never_saved_between_two_updates_of_a_batch():
    s = settings_of("reinforcement.minibatches=4", "reinforcement.epochs=2", "teacher.checkpoint.every_steps=13",
                    "teacher.evaluation.every_steps=0", "reinforcement.warmup_fraction=0.25")
    found = reinforce.settings_of(s.teacher, s.reinforcement, 48, "start")
    assert found.checkpoint.every_steps == 16 and found.evaluation.every_steps == 0
    assert found.training.batch_size == 32 and found.training.steps == 48
    assert found.checkpoint.initialize_from == "start" and found.optimizer.plateau_until == 1
