"""All stages of a pipeline of seconds; stages that are killed, repeated, or asked for what they cannot do."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import base
from research import distill, experiment, plots
from research.command import Stopped
from research.data.tokenizer import Tokenizer, _bytes
from research.distillation import made, rollouts, sample, stages, tasks, trainer
from research.distillation.settings import check
from research.distillation.template import final_answer
from research.errors import RequestError
from research.interop.exporter import export_workdir
from research.interop.weights import initial_variables
from research.model.build import make_model
from research.studies.distillation import Distilled
from research.training.checkpoint import seal
from research.training.metrics import Progress
from research.training.step import init_state, make_train_step
from tests.commands import exit_code
from tests.training import runs

TINY = {f"{name}.{field}": value for name in ("teacher", "student") for field, value in {
    "model.attention": "gqa", "model.attention_bias": True, "model.n_routed_experts": 0, "model.num_hidden_layers": 1,
    "model.hidden_size": 32, "model.intermediate_size": 64, "model.head_dim": 8, "model.num_key_value_heads": 2,
    "model.max_position_embeddings": 64, "mtp.num_nextn_predict_layers": 0, "data.sequence_length": 64,
    "training.batch_size": 8, "optimizer.learning_rate": 5e-3, "checkpoint.every_steps": 0,
}.items()} | {
    "task.count": 130, "task.operations": 1, "teacher.training.steps": 150, "teacher.checkpoint.every_steps": 75,
    "student.training.steps": 3,
    "cold_start.student_steps": 2, "reinforcement.teacher_steps": 30, "reinforcement.learning_rate": 3e-3,
    "reinforcement.kl_weight": 0.0, "reinforcement.questions": 8, "reinforcement.group_size": 4,
    "reinforcement.max_tokens": 24, "sampling.max_tokens": 24, "sampling.samples": 2, "sampling.problems": 40,
    "evaluation.samples": 2, "evaluation.max_tokens": 24, "evaluation.greedy": False,
}

ON_POLICY = {"method": "on_policy", "on_policy.steps": 3, "on_policy.learning_rate": 2e-3}
# the second update is of fixed samples, as many tokens in other rows than the 32 of 40 that are drawn
MIXED = ON_POLICY | {"on_policy.student_data_fraction": 0.7, "student.training.batch_size": 20}


def settings(**changes):
    chosen = experiment.load(str(runs.ROOT / "experiments/distill.py:smoke"))
    chosen.update_from_flattened_dict(TINY)
    chosen.teacher.model.update(chosen.student.model.to_dict())  # one shape: what is compiled to decode serves both
    return check(experiment.change(chosen, [f"{name}={value}" for name, value in changes.items()],
                                   base.get_distillation_config()))


def run(workdir, *names, **changes):
    return stages.run(settings(**changes), workdir, names)


def files(workdir) -> dict:
    """Every file's bytes, but for what says when and in which process."""
    return {path.relative_to(workdir).as_posix(): path.read_bytes() for path in workdir.rglob("*") if path.is_file()
            and "tensorboard" not in path.parts and path.suffix != ".png" and path.name != "environment.json"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Of compiled programs: what one run has compiled, the others find."""
    names = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
             "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """(workdir, what was said) of all stages."""
    workdir = tmp_path_factory.mktemp("pipeline") / "run"
    return workdir, run(workdir, *distill.STAGES)


@pytest.fixture
def copy(whole, tmp_path):
    """A copy to damage."""
    return shutil.copytree(whole[0], tmp_path / "copy")


def test_all_stages_leave_what_is_promised(whole):
    workdir, said = whole
    s = settings()
    problems = {p.digest.hex(): p for p in tasks.train_and_test(s.task)[0][:40]}
    samples = sample.read(workdir / "samples.jsonl")
    assert [(x.problem, x.number) for x in samples] == [(name, n) for name in problems for n in range(2)]
    verified = [json.loads(line) for line in (workdir / "verified.jsonl").read_text().splitlines()]
    assert 0 < len(verified) < 80
    for row in verified:
        problem = problems[row["problem"]]
        assert row["question"] == problem.question and final_answer(row["response"]) == problem.answer
    for name in ("cold_start", "teacher", "base", "distilled"):
        assert list((workdir / name / "checkpoints").glob("*/manifest.json")), name
        found = json.loads((workdir / "results.json").read_text())["models"][name]
        assert 0 <= found["pass_at_1"]["low"] <= found["pass_at_1"]["high"] <= 1 and found["flops"] > 0
    report = (workdir / "report.md").read_text()
    assert f"| {len(verified)} |" in report and "![Reward](reward.png)" in report and (workdir / "reward.png").exists()
    assert "| teacher |" in said and str(workdir / "report.md") in said
    assert json.loads((workdir / "config.json").read_text())["task"]["operations"] == 1


def test_the_reward_rises(whole, tmp_path, corpus):
    """Means of 5 updates: 0.49, 0.43, 0.41 at first, 0.80, 0.71, 0.69 at last; with the advantages' signs changed,
    0.23 and 0."""
    start = shutil.copytree(whole[0] / "cold_start", tmp_path / "halfway", ignore=shutil.ignore_patterns("150"))
    with pytest.raises(Given) as caught:
        run(tmp_path / "run", "teacher", **{"cold_start.problems": 0, "teacher.checkpoint.initialize_from": start})
    drawn, s, loss = caught.value.args
    s = s.with_vocabulary(drawn.tokenizer.vocab_size)
    drawn.train_batches(s)
    model = make_model(s)
    step, variables = make_train_step(model, s, loss), initial_variables(model, s)
    for seed in range(3):
        drawn.settings = SimpleNamespace(training=SimpleNamespace(seed=seed))
        state, rewards = init_state(model, s, variables), []
        for number in range(1, 21):
            state, metrics = step(state, drawn.batch(number, state))
            rewards.append(float(metrics["reward"]))
        assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15, (seed, rewards)


def test_a_notebook_shows_the_way_of_a_sample(whole):
    run = Distilled(str(whole[0]))
    told, answers = run.told(), run.answers("base", "distilled", "teacher")
    assert told.startswith("Question: Compute ") and "--- sample 0, " in told and "--- sample 1, " in told
    assert "right, taught" in told and "wrong, not taught" in told and "wrong, taught" not in told
    solved = any(run.right(line) for line in sample.read(whole[0] / "evaluation/teacher-30.sampled.jsonl")
                 if line.number == 0)
    places = [answers.index(f"--- {name}, ") for name in ("base", "distilled", "teacher")]
    assert places == sorted(places) and f"--- teacher, {'right' if solved else 'wrong'}\n" in answers
    counts = json.loads((whole[0] / "verification.json").read_text())["counts"]
    assert len(run.kept) == counts["kept"] and sum(map(run.right, run.samples)) == 80 - counts["wrong"]
    for draw in (run.draw_verdicts, lambda axes: run.draw_rewards(axes, "teacher")):
        assert plots.png(lambda axes, draw=draw: draw(axes[0])).startswith(b"\x89PNG")


def test_a_student_starts_from_the_base_and_a_teacher_from_its_cold_start(whole):
    for name, start in (("distilled", "base"), ("teacher", "cold_start"), ("base", ""), ("cold_start", "")):
        told = json.loads((whole[0] / name / "config.json").read_text())["checkpoint"]["initialize_from"]
        assert told == (str(whole[0] / start) if start else "")


def test_what_is_done_is_not_done_again(whole, copy, monkeypatch):
    before = files(copy)
    for name in ("trainer.loop.train", "stages.Decoder.generate"):
        monkeypatch.setattr(f"research.distillation.{name}", None)
    run(copy, *distill.STAGES)
    after = files(copy)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] in ([], ["report.md"])


def test_a_report_tells_what_was_used_and_not_what_was_asked_for_later(copy, caplog):
    config = (copy / "config.json").read_bytes()
    for stage, name, value, was in (("evaluate", "evaluation.temperature", 1.5, 0.6), ("sample", "sampling.seed", 5, 0),
                                    ("evaluate", "evaluation.max_tokens", 20, 24)):
        with pytest.raises(RequestError, match=rf"config\.{name}={value} is not the {was} that .*jsonl was drawn with"):
            run(copy, stage, **{name: value})
        assert (copy / "config.json").read_bytes() == config  # what is refused leaves no trace
    run(copy, "teacher", "student", "evaluate", **{
        "student.optimizer.learning_rate": 1e-4, "rejection.per_problem": 1, "reinforcement.kl_weight": 0.5,
        "reinforcement.student_steps": 9, "evaluation.batch_size": 8})
    report = (copy / "report.md").read_text()
    assert "- `student.optimizer.learning_rate`: 0.005\n" in report and "- `reinforcement.kl_weight`: 0.0\n" in report
    assert "`evaluation.batch_size`: 8" in report and "per_problem" not in report and "student_steps`: 9" not in report
    assert f"{copy / 'distilled'} is finished, with config.student.optimizer.learning_rate=0.005 and not 0.0001" in (
        caplog.text) and f"{copy / 'teacher'} is finished, with config.reinforcement.student_steps" not in caplog.text
    step, = (copy / "distilled/checkpoints").glob("[0-9]*")
    told = json.loads((step / "record/metadata").read_text())
    (step / "record/metadata").write_text(json.dumps({name: told[name] for name in told if name != "made"}))
    seal(step)  # as of an older version
    run(copy, "evaluate", **{"student.optimizer.learning_rate": 1e-4})
    report = (copy / "report.md").read_text()
    assert "- `student.optimizer.learning_rate`: 0.005 (base); 0.0001 (distilled)\n" in report
    assert "Of distilled there is no record: taken to be as this command says" in report


def test_a_model_has_its_record_however_its_process_ends(copy, monkeypatch, caplog):
    shutil.rmtree(copy / "distilled")
    with monkeypatch.context() as patch, pytest.raises(AttributeError, match="write"):
        patch.delattr(trainer.loop.samples, "write")  # which comes when the last checkpoint is saved
        run(copy, "student")
    run(copy, "student", **{"student.optimizer.learning_rate": 1e-4})
    assert f"{copy / 'distilled'} is finished, with config.student.optimizer.learning_rate=0.005 and not" in caplog.text


def test_on_another_mesh_it_is_the_same_model(whole, caplog):
    teacher = whole[0] / "teacher"
    record = made.read(teacher)
    made.kept(teacher, record | {"teacher.mesh.data": 8})
    assert record and not caplog.text
    made.kept(teacher, record | {"seed": 9})
    assert "is finished, with config.seed=0 and not 9" in caplog.text


def test_other_weights_are_another_model(copy):
    path = copy / "evaluation/base-2.sampled.jsonl"
    told = made.read(path)
    _, model, variables = stages.checked_weights(copy / "base")
    assert told["weights"] == made.digest(variables)
    changed = jax.tree.map(np.array, variables)
    changed["params"]["embed_tokens"][-1, -1] += 1e-3
    assert made.digest(changed) != told["weights"]


def test_a_killed_sampling_goes_on_without_loss_or_repetition(copy):
    path = copy / "samples.jsonl"
    whole, told = path.read_bytes(), json.loads((copy / "sampling.json").read_text())
    path.write_bytes(whole[:len(whole) // 2])
    run(copy, "sample")
    assert path.read_bytes() == whole
    again = json.loads((copy / "sampling.json").read_text())
    assert told["samples"] < again["samples"] <= 80 + 80 // 2 + 16  # what was done twice counts twice


def stop_at(number, monkeypatch, workdir, stage, **changes):
    """A stage that gets SIGTERM when the batch of this update is asked for, and saves."""
    batch = rollouts.Rollouts.batch

    def stopped(self, step, state):
        if step == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step, state)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(rollouts.Rollouts, "batch", stopped)
        run(workdir, stage, **changes)


def test_a_stopped_reinforcement_goes_on_as_if_it_had_not_been(whole, copy, monkeypatch, caplog):
    """And says what is trained, its reward and its accuracy."""
    shutil.rmtree(copy / "teacher")
    stop_at(4, monkeypatch, copy, "teacher")
    assert [line["step"] for line in runs.lines(copy / "teacher")] == [1, 2, 3, 4]
    told = []
    monkeypatch.setattr(Progress, "update", lambda _, step, text: told.append(text))
    with caplog.at_level("INFO", "absl"):
        run(copy, "teacher")
    assert f"{copy / 'teacher'} is trained" in caplog.text and ": validation accuracy " in caplog.text
    assert told and all(text.startswith("reward ") for text in told)
    assert runs.lines(copy / "teacher") == runs.lines(whole[0] / "teacher")
    assert runs.state_of(copy / "teacher")[1] == runs.state_of(whole[0] / "teacher")[1]


@pytest.mark.parametrize(("stage", "changes", "message"), [
    ("sample", {}, r"--stage=sample needs .*teacher/checkpoints, which --stage=teacher writes"),
    ("sample", {"sampling.checkpoint": "nowhere"}, r"config\.sampling\.checkpoint='nowhere' is not a directory"),
    ("verify", {}, r"--stage=verify needs .*samples.jsonl, which --stage=sample writes"),
    ("student", {}, r"--stage=student needs .*verified.jsonl, which --stage=verify writes"),
    ("student", {"method": "unverified"}, r"needs .*samples.jsonl, which --stage=sample writes"),
    ("student", {"method": "reinforced", "cold_start.student_steps": 0},
     r"config\.cold_start\.problems=120 leaves the student nothing to start from"),
    ("teacher", {"cold_start.problems": 0}, r"config\.cold_start\.problems=0 leaves the teacher nothing to start from"),
    ("student", {"method": "on_policy"}, r"--stage=student needs .*teacher, which --stage=teacher writes"),
    ("student", {"method": "on_policy", "tuning.files": "there"}, r"--stage=student needs .*teacher, which --stage=t"),
    ("student", {"method": "on_policy", "on_policy.student_data_fraction": 0.5},
     r"--stage=student needs .*verified.jsonl, which --stage=verify writes"),
    ("student", {"method": "on_policy", "on_policy.student_data_fraction": 0.5, "tuning.files": "there"},
     r"--stage=student needs .*teacher, which --stage=teacher writes"),
    ("student", {"method": "on_policy", "sampling.checkpoint": "/nowhere"},
     r"config\.sampling\.checkpoint='/nowhere' is not a directory"),
    ("sample", {"sampling.checkpoint": "/nowhere", "sampling.draft_tokens": 1},
     r"config\.sampling\.checkpoint='/nowhere' is not a directory"),
    ("student", {"method": "on_policy", "cold_start.problems": 0},
     r"config\.cold_start\.problems=0 leaves the student nothing to start from"),
    ("teacher", {"reinforcement.draft_tokens": 1},
     r"config\.reinforcement\.draft_tokens=1 must be 0: the teacher has no"),
    ("student", {"method": "reinforced", "reinforcement.draft_tokens": 2, "teacher.mtp.num_nextn_predict_layers": 1},
     r"config\.reinforcement\.draft_tokens=2 must be 0: the student has no multi-token module to draft with"),
    ("teacher", {"reinforcement.max_tokens": 64},
     r"config\.reinforcement\.max_tokens=64 leaves no room for a prompt: the teacher has max_position_embeddings=64"),
    ("evaluate", {}, r"--stage=evaluate needs a model: .* has none"),
])
def test_what_a_stage_lacks_is_said_and_nothing_is_left(tmp_path, stage, changes, message):
    with pytest.raises(RequestError, match=message):
        run(tmp_path / "run", stage, **changes)
    assert not (tmp_path / "run").exists()


def test_what_a_later_stage_cannot_do_is_said_before_the_first(whole, tmp_path):
    (empty := tmp_path / "empty.jsonl").touch()
    for name, value, message in (
            ("sampling.max_tokens", 64, "leaves no room for a prompt: the teacher has max_position_embeddings=64"),
            ("evaluation.max_tokens", 99, "leaves no room for a prompt: the teacher has max_position_embeddings=64"),
            ("student.mesh.data", 8, "config.student.mesh.data=8 needs 8 devices: 1 cpu device is present"),
            ("evaluation.checkpoint", tmp_path, r"evaluation\.checkpoint='.*' cannot be used: .* holds neither check"),
            ("student.checkpoint.initialize_from", tmp_path, r"student\.checkpoint\.initialize_from='.*' cannot be"),
            ("student.checkpoint.initialize_from", "nowhere", r"initialize_from='nowhere' is not a directory"),
            ("tuning.files", empty, "tuning.files='.*' holds nothing to learn from")):
        with pytest.raises(RequestError, match=message):
            run(tmp_path / "run", *distill.STAGES, **{name: value})
    with pytest.raises(RequestError, match=r"config\.student\.evaluation\.batch_size=3 must be a multiple of 2"):
        run(tmp_path / "run", *distill.STAGES, **{"student.mesh.data": 2, "student.evaluation.batch_size": 3})
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_cannot_draft_is_not_asked_to(whole, tmp_path):
    for checkpoint, stages_before in ((str(whole[0] / "teacher"), ()), ("", ("teacher",))):
        with pytest.raises(RequestError, match=r"config\.sampling\.draft_tokens=1 must be 0: the teacher has no"):
            run(tmp_path / "run", *stages_before, "sample",
                **{"sampling.draft_tokens": 1, "sampling.checkpoint": checkpoint})
    assert not (tmp_path / "run").exists()


def test_an_empty_file_of_samples_is_refused(tmp_path):
    (tmp_path / "samples.jsonl").write_text("")
    with pytest.raises(RequestError, match=r"samples.jsonl holds no sample"):
        run(tmp_path, "verify")
    (tmp_path / "verified.jsonl").write_text("")
    with pytest.raises(RequestError, match=r"verified.jsonl holds no sample: nothing of what was said is right"):
        run(tmp_path, "student", **{"cold_start.student_steps": 0})
    for line in ('{"question": "1?"}', '{"question": "1?", "response": 1}'):
        (tmp_path / "verified.jsonl").write_text(line + "\n")
        with pytest.raises(RequestError, match=r"verified.jsonl has a line that is no kept sample"):
            run(tmp_path, "student", **{"cold_start.student_steps": 0})
    for files, said in (("no*", r"='no\*' matches no file"), ("no*,no", r"='no\*,no' 'no\*' matches no file")):
        with pytest.raises(RequestError, match=rf"config\.tuning\.files{said}"):
            run(tmp_path, "student", **{"cold_start.student_steps": 0, "tuning.files": files})


def test_users_problems_need_their_fields_and_solutions(tmp_path):
    path = tmp_path / "problems.jsonl"
    mine = {"task.source": "files", "task.files": path, "task.test_fraction": 0.5}
    path.write_text("".join(json.dumps({"question": f"{n}?", "answer": str(n)}) + "\n" for n in range(9)))
    with pytest.raises(RequestError, match=r"config\.cold_start\.problems=120 shows worked solutions, which .*'files'"):
        run(tmp_path / "run", "teacher", **mine)
    long = " ".join(map(str, range(99)))
    rows = [{"question": f"{n}?", "answer": f"{long} #### {n}"} for n in range(9)]  # as GSM8K's
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(RequestError, match=r"config\.teacher\.data\.sequence_length=64 holds none of"):
        run(tmp_path / "run", "teacher", **mine)
    path.write_text('{"question": "1?"}\n')
    with pytest.raises(RequestError, match=r"problems.jsonl:1 has no field 'answer' \(config\.task\.answer_field\)"):
        run(tmp_path / "run", "teacher", **mine)
    path.write_text('{"question": "1?", "answer": "one"}\n')
    with pytest.raises(RequestError, match=r"problems.jsonl:1 has the answer 'one', which is no number"):
        run(tmp_path / "run", "teacher", **mine)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("words", "message"), [
    ([], "error: --config is required: --config=FILE --stage=teacher|sample|verify|student|evaluate|all --workdir=DIR"),
    (["--config=experiments/distill.py", "--workdir=d"], "error: --stage is required"),
    (["--config=experiments/distill.py", "--workdir=d", "--stage=al"], "value should be one of <teacher|sample|"),
    (["--config=experiments/distill.py:distill", "--workdir=d", "--stage=all"], "has no arm 'distill' (did you mean"),
    (["--config=experiments/distill.py", "--workdir=d", "--stage=all", "--config.method=x"], "config.method='x' must"),
    (["--config=experiments/r1_evaluate.py:aime", "--workdir=d", "--stage=all", "--config.task.test_files={test}"],
     "config.task.files='' names no problems to learn from: with those of a test alone, only --stage=eval"),
    (["--config=experiments/r1_evaluate.py:aime", "--workdir=d", "--stage=all"], "task.files='' names no file: "),
    (["--config=experiments/distill.py", "--workdir=d", "--stage=all", "--config.sampling.draft_tokens=1"],
     "config.sampling.draft_tokens=1 must be 0: the teacher has no multi-token module"),
])
def test_a_wrong_command_is_answered_with_one_line(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(runs.ROOT)
    (tmp_path / "test.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    assert exit_code(distill, *(word.format(test=tmp_path / "test.jsonl") for word in words)) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and message in err and not (runs.ROOT / "d").exists()


def test_a_benchmark_of_a_checkpoint_stands_beside_the_papers_row(whole, tmp_path):
    path = tmp_path / "aime.jsonl"
    rows = [{"problem": f"Compute {n} + 1.", "answer": str(n + 1)} for n in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    chosen = experiment.load(str(runs.ROOT / "experiments/r1_evaluate.py:aime:smoke"))
    there = tmp_path / "run/Qwen"  # within the working directory, and none of its models
    export_workdir(whole[0] / "teacher", there, None, None)
    shutil.copytree(whole[0] / "teacher", tmp_path / "own/Qwen")
    for folder, name in ((tmp_path / "own/Qwen", "Qwen-30"), (there, "Qwen")):
        fields = {"task.test_files": path, "evaluation.checkpoint": folder, "template": "plain"}
        chosen = experiment.change(chosen, [f"{name}={value}" for name, value in fields.items()],
                                   base.get_distillation_config())
        said = stages.run(check(chosen), folder.parent, ["evaluate"])
        assert "| Qwen | 0.0" in said and "| R1-Distill-Qwen-1.5B, published | | 28.9% | | 52.7% |" in said
        assert len(sample.read(folder.parent / f"evaluation/{name}.sampled.jsonl")) == 6
    chosen.template = "deepseek"
    with pytest.raises(RequestError, match=r"config\.evaluation: prompt 1 .* more than max_position_embeddings=64"):
        stages.run(check(chosen), tmp_path / "other", ["evaluate"])


class Given(Exception):
    """What a run was given to learn from."""


def given(settings, workdir, corpus, loss, **_):
    raise Given(corpus, settings, loss)


@pytest.fixture
def corpus(monkeypatch):
    """Stands in for training."""
    monkeypatch.setattr(trainer.loop, "train", given)


def test_another_tokenizer_learns_from_texts_but_not_from_logits(copy, corpus):
    other = {"student.data.tokenizer": "bytes", "student.data.sequence_length": 96,
             "student.model.max_position_embeddings": 128, "cold_start.student_steps": 0}
    with pytest.raises(RequestError, match=r"config\.method='logits' needs one tokenizer for both models"):
        run(copy, "student", **other, method="logits")
    shutil.rmtree(copy / "distilled")
    with pytest.raises(Given) as caught:
        run(copy, "student", **other)
    examples = caught.value.args[0]
    assert examples.tokenizer.vocab_size == 262
    text = examples.tokenizer.decode(examples.rows.of(range(examples.rows.rows))["tokens_BT"].reshape(-1))
    verified = [json.loads(line)["response"] for line in (copy / "verified.jsonl").read_text().splitlines()]
    assert sum(response in text for response in verified) >= examples.rows.examples > 0


def test_a_student_of_other_tokens_does_not_learn_on_policy(copy, corpus):
    Tokenizer(_bytes()).save(copy / "base/tokenizer.json")
    with pytest.raises(RequestError, match=r"config\.method='on_policy' needs one tokenizer for both models"):
        run(copy, "student", method="on_policy")


@pytest.fixture(scope="module")
def on_policy(whole, tmp_path_factory):
    """A workdir with a student that has learned on policy, and from fixed samples in between."""
    workdir = shutil.copytree(whole[0], tmp_path_factory.mktemp("on_policy") / "run")
    run(workdir, "student", "evaluate", **MIXED)
    return workdir


def test_a_student_learns_on_policy_and_its_teachers_work_is_told(on_policy):
    lines = runs.lines(on_policy / "on_policy", "train")
    assert [line["step"] for line in lines] == [1, 2, 3] and all(line["divergence"] > 0.05 for line in lines)
    assert max(line["learning_rate"] for line in lines) == pytest.approx(2e-3)  # not the student's 5e-3
    assert ["reward" in line for line in lines] == [True, False, True]
    assert [line["tokens"] for line in lines] == [32 * 40, 32 * 40 + 20 * 64, 2 * 32 * 40 + 20 * 64]
    models = json.loads((on_policy / "results.json").read_text())["models"]
    assert models["on_policy"]["teacher_flops"] == pytest.approx(sum(line["teacher_flops"] for line in lines))
    assert models["on_policy"]["flops"] > 0 and models["distilled"]["teacher_flops"] == 0
    assert "\n- on_policy: student, the teacher's distributions" in (on_policy / "report.md").read_text()


def test_a_stopped_one_goes_on_as_if_it_had_not_been(on_policy, copy, monkeypatch):
    stop_at(1, monkeypatch, copy, "student", **MIXED)
    assert len(runs.lines(copy / "on_policy")) == 1
    run(copy, "student", **MIXED)
    assert runs.lines(copy / "on_policy") == runs.lines(on_policy / "on_policy")
    assert runs.state_of(copy / "on_policy")[1] == runs.state_of(on_policy / "on_policy")[1]


def test_who_is_its_own_teacher_has_nothing_to_learn(copy):
    run(copy, "student", **ON_POLICY, **{"sampling.checkpoint": copy / "base"})
    first = runs.lines(copy / "on_policy", "train")[0]
    assert abs(first["divergence"]) < 1e-6 and first["grad_norm"] < 1e-5 and first["tokens_a_sample"] > 1


def test_logits_of_the_teacher_come_with_the_rows(copy, corpus, monkeypatch):
    """All of a row's positions, the tokens of it among the likeliest; killed in between, the rest alone is scored."""
    changes = {"method": "logits", "student.training.batch_size": 2}
    with pytest.raises(Given) as caught:
        run(copy, "student", **changes)
    examples = caught.value.args[0]
    batch = examples.train_batches(settings(**changes).student).take(None)
    assert batch["ids_BTk"].shape == (2, 64, 16) and batch["rest_BT"].shape == (2, 64)
    np.testing.assert_allclose(np.exp(batch["logp_BTk"]).sum(axis=-1) + np.exp(batch["rest_BT"]), 1, rtol=1e-5)
    among = (batch["ids_BTk"] == batch["targets_BT"][..., None]).any(axis=-1)
    assert among[batch["mask_BT"]].mean() > 0.9
    kept = {name: np.array(array) for name, array in examples.kept.items()}
    progress = copy / "logits_of_teacher/progress.json"
    told = json.loads(progress.read_text())
    progress.write_text(json.dumps(told | {"rows": 2}))
    monkeypatch.setattr(trainer.imitate, "_kept", lambda *_, **__: {
        name: jnp.zeros((2, *array.shape[1:]), array.dtype) for name, array in kept.items()})
    with pytest.raises(Given):
        run(copy, "student", **changes)
    again = {name: np.load(copy / f"logits_of_teacher/{name}.npy") for name in kept}
    assert told["rows"] == len(kept["rest_BT"]) > 2
    assert all(np.array_equal(again[name][:2], array[:2]) and not again[name][2:].any() for name, array in kept.items())
