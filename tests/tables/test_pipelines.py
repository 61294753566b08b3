"""Tables of distilled students: which pipelines are run, what a part of the samples begins with, what is made again."""

import json

import pytest

from research import plots
from research.distillation import stages
from research.distillation.evaluate import NAMES
from research.errors import RequestError, RunError
from research.studies import distillation
from research.tables import pipelines, r1_distill, runner, study
from tests.tables.test_tables import PNG
from tests.tables.test_tables import run as answer

FIELDS = ["task.count=50", "sampling.samples=2"]
ABOUT = {"commit": "abc", "packages": {"jax": "0"}, "device": "cpu cpu", "processor": "some EPYC"}


def planned(folder, *fields, seeds=(0, 1)):
    return pipelines.plan(r1_distill.STUDY, ["small"], seeds, [*FIELDS, *fields], folder)


@pytest.fixture
def pretended(monkeypatch):
    """Stands in for the stages: leaves their files; the calls (folder, method, stages)."""
    calls = []

    def run(settings, workdir, names):
        calls.append((workdir.name, settings.method, names))
        workdir.mkdir(parents=True, exist_ok=True)
        stages._write_config(settings, workdir / "config.json")
        if "sample" in names:
            (workdir / "samples.jsonl").write_text("".join(f"{n}\n" for n in range(10_000)))
        (workdir / "verification.json").write_text('{"counts": {"kept": 7}}')
        path = workdir / "results.json"
        models = json.loads(path.read_text())["models"] if path.exists() else {}
        for number, name in enumerate(["cold_start", "teacher", "base", settings.method]):
            (workdir / name).mkdir(exist_ok=True)
            (workdir / name / "environment.json").write_text(json.dumps(ABOUT))
            step = pipelines.Run("small", name, 0, settings, workdir / name).steps
            value = (number + settings.seed) / 10
            models[name] = {"step": step, "flops": 2e12, "pass_at_k": 0.5, "k": 4, "cons_at_k": 0.4, "tokens": 21.5,
                            "pass_at_1": {"value": value, "low": value, "high": value + 0.01}}
        path.write_text(json.dumps({"models": models}))

    monkeypatch.setattr(stages, "run", run)
    return calls


def test_every_method_stands_in_its_seeds_pipeline_and_every_part_in_its_own(tmp_path):
    runs = planned(tmp_path)
    assert [run.seed for run in runs] == [0] * 8 + [1] * 8 + [0] * 2 + [1] * 2
    for run in runs:
        own = run.arm not in NAMES
        assert run.workdir == tmp_path / "distill/small" / (f"{run.seed}-{run.arm}/distilled" if own else
                                                            f"{run.seed}/{run.arm}")
        assert run.settings.seed == run.settings.student.training.seed == run.settings.task.seed == run.seed
        assert (run.settings.sampling.problems < 3200) == own and run.settings.task.count == 50
        assert run.settings.method == (run.arm if run.arm in pipelines.METHODS else "distilled")
    assert {run.settings.student.training.steps for run in runs} == {runs[0].settings.student.training.steps}
    with pytest.raises(RequestError, match=r"config\.seeds=1 is not a field"):
        planned(tmp_path, "seeds=1")


def test_a_part_begins_with_the_base_and_the_first_samples(tmp_path, pretended):
    runs = planned(tmp_path, seeds=(0,))
    pipelines.train(runs)
    assert [(folder, method) for folder, method, _ in pretended[:6]] == [
        ("0", name) for name in ("distilled", "reference", "reinforced", "unverified", "logits", "on_policy")]
    assert {names for _, _, names in pretended[:6]} == {("teacher", "sample", "verify", "student", "evaluate")}
    assert pretended[6:] == [(f"0-{part}", "distilled", ("verify", "student", "evaluate"))
                             for part in r1_distill.PARTS]
    for run in runs[-2:]:
        lines = (run.workdir.parent / "samples.jsonl").read_text().splitlines()
        assert lines == [str(n) for n in range(2 * run.settings.sampling.problems)]
        assert (run.workdir.parent / "base" / "environment.json").exists()


def test_what_is_finished_is_taken_and_what_has_changed_is_made_again(tmp_path, pretended):
    pipelines.train(planned(tmp_path, seeds=(0,)))
    pretended.clear()
    pipelines.train(planned(tmp_path, seeds=(0,)))
    assert not pretended
    config = json.loads((tmp_path / "distill/small/0/config.json").read_text())
    del config["reinforcement"]["reference_every"]  # as an older version left it
    (tmp_path / "distill/small/0/config.json").write_text(json.dumps(config))
    pipelines.train(planned(tmp_path, seeds=(0,)))
    assert not pretended
    (tmp_path / "distill/small/0/results.json").write_text('{"models": {}}')  # killed before its evaluation
    (tmp_path / "distill/small/0/mine").touch()
    pipelines.train(planned(tmp_path, seeds=(0,)))
    assert len(pretended) == 6 and (tmp_path / "distill/small/0/mine").exists()
    pretended.clear()
    pipelines.train(planned(tmp_path, "teacher.training.steps=9", seeds=(0,)))
    assert len(pretended) == 8 and not (tmp_path / "distill/small/0/mine").exists()


def test_what_has_changed_for_one_method_alone_leaves_the_others(tmp_path, pretended):
    """Also where another method's student is made first, by whose config the folder is then known."""
    pipelines.train(planned(tmp_path, seeds=(0,)))
    place = tmp_path / "distill/small/0"
    (place / "evaluation").mkdir()
    old = [place / "on_policy/mine", place / "evaluation/on_policy-150.sampled.jsonl"]
    kept = [place / "mine", place / "reinforced/mine", place / "evaluation/reinforced-120.sampled.jsonl"]
    for path in (*old, *kept):
        path.touch()
    runs = planned(tmp_path, "on_policy.beta=0.25", seeds=(0,))
    assert [run.arm for run in runs if pipelines.lines_of(run) is None] == ["on_policy"]
    path = place / "results.json"
    path.write_text(path.read_text().replace('"reinforced"', '"unknown"'))
    pretended.clear()
    pipelines.train([run for run in runs if run.arm == "reinforced"])
    assert not any(path.exists() for path in old) and all(path.exists() for path in kept)
    assert [run.arm for run in runs if pipelines.lines_of(run) is None] == ["on_policy"]
    pipelines.train(runs)
    assert [method for _, method, _ in pretended] == ["reinforced", "on_policy"]


def test_a_student_that_is_not_at_its_last_step_is_not_finished(tmp_path, pretended):
    runs = planned(tmp_path, seeds=(0,))
    pipelines.train(runs)
    path = tmp_path / "distill/small/0/results.json"
    path.write_text(path.read_text().replace(f'"step": {runs[0].settings.student.training.steps}', '"step": 1'))
    assert [run.arm for run in runs if pipelines.lines_of(run) is None] == [
        "reference", "distilled", "unverified", "logits"]
    assert study.measure(r1_distill.STUDY, runs, pipelines.lines_of) == {}


def test_a_failed_one_is_named(tmp_path, monkeypatch):
    def fail(*_):
        raise RunError("step 3: loss is nan")

    monkeypatch.setattr(stages, "run", fail)
    with pytest.raises(RunError, match=r"teacher-0 \(small\): step 3: loss is nan"):
        pipelines.train(planned(tmp_path, seeds=(0,)))


def test_the_table(tmp_path, pretended, capsys):
    folder, words = tmp_path / "results", [f"--config.{field}" for field in FIELDS]
    assert answer("--table=r1_distill", "--scale=cpu", f"--runs={tmp_path}", f"--folder={folder}", *words) == 0
    assert "7 within noise, 1 not reproduced, 2 higher" in capsys.readouterr().out
    page = (folder / "r1_distill.md").read_text()
    assert "| small: distilled | pass@1, % | 72.6 | 40.0 (30.0 to 50.0) |" in page and "## gpu" not in page
    assert "| small: distilled less reinforced | pass@1, % | 25.6 | 0.0 | within noise |" in page
    assert "| small: teacher | k |  | 4 |" in page and page.count(" | k | ") == 1
    assert "| small: distilled | cons@k, % |  | 40.0 |" in page and "| tokens of a response |  | 21.5 |" in page
    assert page.count("samples taught") == 3 and "some EPYC" in page and "seeds 0, 1, 2" in page
    assert (folder / "r1_distill.png").read_bytes().startswith(PNG)
    found = distillation.of_table(str(folder / "r1_distill.json"))
    assert found["pass@1, %"]["distilled"]["ours"] == pytest.approx(40) and len(found["samples taught"]) == 3
    for draw in (lambda axes: distillation.draw_samples(axes[0], found),
                 lambda axes: distillation.draw_students(axes[0], found, "base", "distilled")):
        assert plots.png(draw).startswith(PNG)
    assert runner.scales(r1_distill) == ("cpu",)
    assert answer("--table=r1_distill", "--scale=cpu", "--sizes=micro") == 2
    assert "--sizes=micro: cpu has small" in capsys.readouterr().err
