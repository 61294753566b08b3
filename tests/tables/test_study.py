"""Tables of trained models: what is trained, what is taken as it is, and how differences are judged."""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest

from research import command
from research.errors import Diverged, RequestError, RunError
from research.tables import __main__ as main
from research.tables import judgement, runner, study
from research.tables.judgement import NOISE, NOT, ONE, REPRODUCED
from research.tables.study import EQUAL, HIGHER, LOWER, Claim, Study
from research.training import loop
from tests.tables.test_tables import PNG
from tests.tables.test_tables import run as answer
from tests.training import runs

TRAINED = [name for name in runner.names() if hasattr(runner.load(name), "STUDY")
           and runner.kind(runner.load(name)) is study]
PAIR = Study("mtp", ("depth_0", "depth_1"), ("bits per byte", "MaxVio", "MaxVio of a batch"),
             (Claim("bits per byte", "depth_1", "depth_0", -0.001, "here"),))
FIELDS = [f"{name}={value}" for name, value in (runs.MICRO | {  # one dense layer: compiled in seconds
    "model.num_hidden_layers": 1, "model.n_routed_experts": 0, "mtp.num_nextn_predict_layers": 0, "training.steps": 2,
    "training.ema_decay": 0.0, "data.tokenizer": "bytes", "checkpoint.every_steps": 0, "evaluation.every_steps": 0,
    "evaluation.samples": 0, "optimizer.moment_dtype": "float32"}).items()]


def recorded(run: study.Run, bits: float, violation: float = 0.5) -> None:
    """Leaves what a finished run leaves, as far as a table reads it."""
    steps = run.settings.training.steps
    (run.workdir / "checkpoints" / str(steps)).mkdir(parents=True)
    (run.workdir / "config.json").write_text(study.vocabulary(run.settings).to_json())
    lines = [{"step": step, "split": "train", "load_violation": 9.0 if step < 3 else violation} for step in range(1, 5)]
    lines.append({"step": steps, "split": "validation", "loss": 2 * bits, "bits_per_byte": bits,
                  "load_violation": violation})
    (run.workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.workdir / "environment.json").write_text(json.dumps(
        {"commit": "abc", "packages": {"jax": "0"}, "device": "cpu cpu", "processor": "some EPYC"}))


def test_a_run_is_trained_once_and_again_when_its_config_changes(tmp_path, monkeypatch):
    fields = [*FIELDS, f"data.cache={tmp_path / 'cache'}"]
    one = Study("mtp", ("depth_0",), ("bits per byte",), ())
    planned = study.plan(one, ["micro"], [3], fields, tmp_path)
    assert [run.workdir for run in planned] == [tmp_path / "mtp" / "micro" / "depth_0-3"]
    assert study.measure(one, planned) == {}
    study.train(planned)
    found = study.measure(one, planned)
    last = runs.lines(planned[0].workdir, "validation")[-1]
    assert found["micro", "bits per byte", "depth_0"][3] == last["bits_per_byte"]

    calls = []
    monkeypatch.setattr(loop, "train", lambda settings, workdir: calls.append(settings.training.steps))
    study.train(planned)
    study.train(study.plan(one, ["micro"], [3], [*fields, "data.cache=elsewhere"], tmp_path))
    assert calls == []
    other = study.plan(one, ["micro"], [3], [*fields, "optimizer.learning_rate=0.5"], tmp_path)
    assert study.measure(one, other) == {}
    study.train(other)
    assert calls == [2] and [path.name for path in planned[0].workdir.iterdir()] == [".lock"]


def test_a_stopped_run_is_gone_on_with_and_a_failed_one_is_named(tmp_path, monkeypatch):
    planned = study.plan(PAIR, ["micro"], [0], (), tmp_path)
    recorded(planned[0], 2.0)
    recorded(planned[1], 2.0)
    shutil.rmtree(planned[1].workdir / "checkpoints")  # killed before its last save
    kept, calls = (planned[1].workdir / "config.json").read_text(), []

    def stop(settings, workdir):
        calls.append(workdir)
        raise command.Stopped(143)

    monkeypatch.setattr(loop, "train", stop)
    with pytest.raises(command.Stopped):
        study.train(planned)
    assert calls == [planned[1].workdir] and (planned[1].workdir / "config.json").read_text() == kept

    def fail(settings, workdir):
        raise RunError("step 3: loss is nan")

    monkeypatch.setattr(loop, "train", fail)
    with pytest.raises(RunError, match=r"depth_1-0 \(micro\): step 3: loss is nan"):
        study.train(planned)


@pytest.mark.parametrize("paired, paper, said", [
    ([-0.02, -0.021, -0.019], -0.001, REPRODUCED), ([0.02, 0.021, 0.019], -0.001, NOT),
    ([-0.02, 0.03, -0.02], -0.001, NOISE), ([-0.02, -0.001, -0.03], -0.001, NOISE),  # one sign
    ([0.02, 0.021, 0.019], 0.0, NOT), ([0.02, -0.03, 0.01], 0.0, NOISE),
    ([0.02, 0.021, 0.019], None, "higher"), ([-0.02, -0.021, -0.019], None, "lower"), ([0.02, -0.02], None, NOISE),
    ([0.02, 0.021, 0.019], HIGHER, REPRODUCED), (3 * [math.inf], HIGHER, REPRODUCED), (3 * [math.inf], LOWER, NOT),
    ([0.02, 0.021, 0.019], LOWER, NOT), ([0.02, -0.02], LOWER, NOISE), ([0.02, 0.021, 0.019], EQUAL, NOT),
    ([-0.02, -0.021, -0.019], EQUAL, NOT), ([0.02, -0.02], EQUAL, NOISE), (3 * [math.inf], EQUAL, NOT),
    ([0.02], 0.01, ONE), (3 * [math.inf], 1.0, REPRODUCED), (3 * [math.inf], -0.01, NOT),
    (3 * [-math.inf], None, "lower"),
    ([0.02, math.inf, 0.02], 1.0, judgement.DIVERGED), ([math.nan, math.inf, math.inf], 1.0, judgement.DIVERGED),
    ([-math.inf, math.inf, math.inf], 1.0, judgement.DIVERGED), ([math.inf], 1.0, ONE)])
def test_directions_are_judged_by_the_paired_interval(paired, paper, said):
    assert judgement.verdict(paired, paper) == said


def test_the_interval_is_students():
    """Three differences: t of 2 degrees of freedom, 4.303, as tables print it."""
    assert judgement.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3 ** 0.5, rel=1e-3)


def test_differences_are_of_equal_seeds_and_sizes_without_all_runs_are_left_out(tmp_path):
    planned = study.plan(PAIR, ["micro", "mini"], [0, 1, 2], (), tmp_path)
    for run in planned:
        if (run.size, run.arm, run.seed) != ("mini", "depth_1", 2):
            recorded(run, run.seed + (0.5 if run.arm == "depth_1" else 0.51), violation=0.25)
    rows = judgement.rows(PAIR, study.measure(PAIR, planned))
    assert len(rows) == 2 * 3 + 1 and all(row.what.startswith("micro: ") for row in rows)
    last = rows[-1]
    assert (last.what, last.paper, last.verdict) == ("micro: depth_1 less depth_0", -0.001, REPRODUCED)
    assert last.ours == pytest.approx(-0.01) and last.least == pytest.approx(-0.01)
    first = rows[0]
    assert (first.least, first.greatest, first.difference()) == (0.51, 2.51, "")
    assert first.ours == pytest.approx(1.51)
    assert [row.ours for row in rows if row.unit == "MaxVio of a batch"] == [0.25, 0.25]  # the last half
    assert study.measure(PAIR, study.plan(PAIR, ["micro"], [0], ["optimizer.learning_rate=0.5"], tmp_path)) == {}
    made = study.provenance("c", planned, study.measure(PAIR, planned))
    assert made.pop("commit") != "abc"  # of the table
    assert made == {"command": "c", "trained_at": "abc", "jax": "0", "machine": "some EPYC", "seeds": [0, 1, 2],
                    "not_run": ["mini"]}


def test_a_run_that_diverges_is_a_result(tmp_path, monkeypatch):
    """It is not trained again; its loss is beyond the others, its other figures are none."""
    planned = study.plan(PAIR, ["micro"], [0, 1, 2], (), tmp_path)
    lost = {("depth_1", 0), ("depth_1", 1), ("depth_1", 2)}

    def train(settings, workdir):
        run = next(run for run in planned if run.workdir == workdir)
        recorded(run, 2.0)
        if (run.arm, run.seed) in lost:
            shutil.rmtree(workdir / "checkpoints")
            (workdir / "metrics.jsonl").write_text('{"step": 1, "split": "train", "load_violation": 1.0}\n')
            raise Diverged(2, "loss is nan")

    monkeypatch.setattr(loop, "train", train)
    study.train(planned)
    assert runs.lines(planned[1].workdir)[-1] == {"step": 2, "split": "diverged"}
    monkeypatch.setattr(loop, "train", None)
    study.train(planned)
    both = replace(PAIR, claims=(Claim("MaxVio", "depth_1", "depth_0", HIGHER, "there"), *PAIR.claims))
    *arms, violation, claim = judgement.rows(both, study.measure(both, planned))
    assert (violation.ours, violation.verdict) == (None, judgement.DIVERGED)  # of no loss it says nothing
    assert violation.paper is None and claim.paper == -0.001  # a side is no figure
    shown = {(row.what, row.unit): (row.ours, row.how) for row in arms}
    nothing = None, "no seed; it diverged in seeds 0, 1, 2"
    assert shown["micro: depth_1", "bits per byte"] == nothing == shown["micro: depth_1", "MaxVio of a batch"]
    assert shown["micro: depth_0", "bits per byte"] == (2.0, "mean of 3 seeds")
    assert (claim.ours, claim.verdict) == (None, NOT)  # the paper has it lower
    assert claim.how == "here; no pair; depth_1 diverged in seeds 0, 1, 2"
    assert "Infinity" not in json.dumps([row.to_json() for row in [*arms, claim]]) and claim.cells()[1] == ""
    judgement.draw(None, [claim])  # nothing that could be drawn

    (planned[1].workdir / "metrics.jsonl").unlink()
    shutil.rmtree(planned[1].workdir)
    recorded(planned[1], 1.5)
    *arms, claim = judgement.rows(PAIR, study.measure(PAIR, planned))
    assert (claim.ours, claim.verdict) == (-0.5, judgement.DIVERGED)
    assert claim.how == "here; one pair; depth_1 diverged in seeds 1, 2"


@pytest.mark.parametrize("name", TRAINED)
def test_every_table_can_be_trained_judged_and_shown(name, tmp_path, monkeypatch, capsys):
    """From recorded runs: every arm of every size is of its experiment, and the command leaves its files."""
    table = runner.load(name)
    for scale, sizes in study.SIZES.items():
        planned = study.plan(table.STUDY, sizes, table.STUDY.seeds, (), tmp_path)
        assert len(planned) == len(sizes) * len(table.STUDY.arms) * len(table.STUDY.seeds)
        assert all(run.settings.mesh.data == 1 for run in planned)
        if scale == "cpu":
            for number, run in enumerate(planned):
                recorded(run, 2 + number % 5 / 10)
    assert len(table.STUDY.seeds) >= 3
    assert {claim.quantity for claim in table.STUDY.claims} <= set(table.STUDY.quantities)
    assert {arm for claim in table.STUDY.claims for arm in (claim.arm, claim.than)} <= set(table.STUDY.arms)
    assert {key for key in table.STUDY.paper} <= {(q, arm) for q in table.STUDY.quantities for arm in table.STUDY.arms}
    monkeypatch.setattr(study, "_train", lambda run: pytest.fail(f"{run} is finished"))
    folder = tmp_path / "results"
    assert answer(f"--table={name}", "--scale=cpu", f"--runs={tmp_path}", f"--folder={folder}") == 0
    assert re.match(rf"{name} +\d+ (reproduced|not|within|higher|lower)", capsys.readouterr().out)
    page = (folder / f"{name}.md").read_text()
    assert "## cpu" in page and f"Not yet run: `python -m research.tables --table={name} --scale=gpu`" in page
    assert "micro: " in page and "mini: " in page and " to " in page and "some EPYC" in page
    assert (folder / f"{name}.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("name", [name for name in runner.names() if hasattr(runner.load(name), "STUDY")])
def test_a_difference_in_the_papers_column_is_of_figures_that_it_prints(name):
    found = runner.load(name).STUDY
    for claim in found.claims:
        if claim.paper is not None and math.isfinite(claim.paper):
            assert {(claim.quantity, arm) for arm in (claim.arm, claim.than)} <= found.paper.keys(), claim


def test_the_loss_free_papers_speeds_are_all_there_and_judged(tmp_path):
    """Its Tables 3 and 4, and its figure on speeds; each arm updates as fast as its name says."""
    found, speeds = runner.load("alf_updates").STUDY, {"1e-2", "1e-3", "1e-4"}
    assert set(found.arms) == {"bias_alone", "sign_1e-2", "sign_1e-4"} | {
        f"{rule}_{speed}" for rule in ("proportional", "multiplicative") for speed in speeds}
    for run in study.plan(found, ["micro"], [0], (), tmp_path):
        speed = run.arm.rpartition("_")[2]
        assert run.settings.model.bias_update_speed == float("1e-3" if speed == "alone" else speed), run
    assert {(claim.quantity, claim.arm) for claim in found.claims} == {
        (quantity, arm) for quantity in found.quantities for arm in found.arms if arm != "bias_alone"}


def test_a_shorter_table_goes_elsewhere_unasked():
    main.FLAGS.unparse_flags()
    main.FLAGS["folder"].value = None
    main.FLAGS.mark_as_parsed()
    assert str(main.folder_of_request(False)) == "results" and str(main.folder_of_request(True)) == "results/tmp"


def test_an_unknown_arm_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(RequestError, match="has no arm 'depth_9'"):
        study.plan(Study("mtp", ("depth_9",), (), ()), ["micro"], [0], (), tmp_path)
    assert not list(tmp_path.iterdir())
