"""A run and what it leaves: files, resume after any kind of end, stops, failures."""

import errno
import functools
import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from research import config
from research.command import Stopped
from research.data.pipeline import load_corpus
from research.decoding.generate import Decoder
from research.errors import Diverged, RequestError, RunError
from research.training import loop
from research.training.checkpoint import MANIFEST, seal
from research.training.workdir import owned, write_files
from tests.training import resume_kills, runs

FIELDS = {"training.steps": 12, "checkpoint.every_steps": 3, "evaluation.every_steps": 6, "checkpoint.keep_best": 2}
TRAIN_FIELDS = {
    "step", "split", "loss", "next_token_loss", "mtp_loss", "balance_loss", "grad_norm", "learning_rate", "tokens",
    "tokens_per_second", "mfu", "load_violation", "load_violation_by_layer", "mtp_load_violation"}


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """What equal settings compile in this process serves all tests; the killed runs, of other processes, do without."""
    decoders = {}

    def decoder(model, variables):
        if model not in decoders:
            decoders[model] = Decoder(model, variables)
        decoders[model].take(variables)
        return decoders[model]

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((loop, "make_train_step"), (loop, "make_eval_step"), (loop.evaluation, "make_eval_step")):
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        patch.setattr(loop.samples, "Decoder", decoder)
        yield


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with a run in peace, after another that was killed twice came out equal; what the kills met."""
    folder = tmp_path_factory.mktemp("runs")
    said = []
    met = resume_kills.kill_and_compare(folder, kills=2, seed=3, fields=FIELDS, say=said.append)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache/xla"))  # what those processes have compiled
    yield folder, met, said
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def peace(killed, tmp_path):
    """A finished run of its own for each test, and the settings that continue it."""
    shutil.copytree(killed[0] / "peace", tmp_path / "run")
    return tmp_path / "run", lambda **fields: runs.settings_of(killed[0] / "cache", **FIELDS | fields)


def steps(workdir) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def test_kills_change_nothing(killed):
    _, met, said = killed
    assert met.total() == 2 and "all equal bit for bit" in said[-1]


def test_the_comparison_sees_a_difference(peace, killed):
    workdir, settings = peace
    assert runs.differences(workdir, killed[0] / "peace") == []
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(lines[:-1]))
    shutil.rmtree(workdir / "checkpoints/12")
    found = runs.differences(workdir, killed[0] / "peace")
    assert {"steps 9 and 12", "metrics.jsonl", "data of the record", "tokens of the record"} <= set(found)
    for part in ("params", "optimizer", "routing", "ema", "step"):
        assert any(name.startswith(f"['{part}']") for name in found), part


def test_what_a_run_leaves(peace):
    workdir, settings = peace
    assert {path.name for path in workdir.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoints", "tokenizer.json", "tokenizer_config.json", "tensorboard",
        "samples.md", "environment.json", ".lock"}
    assert config.read(workdir) == settings().with_vocabulary(262)
    assert steps(workdir) == [6, 9, 12]  # the last two, and the two that have a loss
    train = runs.lines(workdir, "train", times=True)
    assert [line["step"] for line in train] == list(range(1, 13))
    assert all(set(line) == TRAIN_FIELDS and line["tokens_per_second"] > 0 for line in train)
    assert [line["tokens"] for line in train] == [4 * 32 * step for step in range(1, 13)]
    validation = runs.lines(workdir, "validation")
    assert [line["step"] for line in validation] == [6, 12]
    assert all(set(line) == {"step", "split", "loss", "bits_per_byte", "mtp_accuracy", "targets", "load_violation",
                             "expert_load", "mtp_expert_load", "groups_a_token"} for line in validation)
    m = settings().model
    for line in validation:
        assert len(line["groups_a_token"]) == len(line["expert_load"])
        assert all(1 <= groups <= m.topk_group for groups in line["groups_a_token"])
        assert len(line["expert_load"]) == m.num_hidden_layers - m.first_k_dense_replace
        assert len(line["mtp_expert_load"]) == settings().mtp.num_nextn_predict_layers
        for load in (*line["expert_load"], *line["mtp_expert_load"]):
            assert len(load) == m.n_routed_experts and sum(load) / len(load) == pytest.approx(1, abs=1e-3)
    record = json.loads((workdir / "environment.json").read_text())
    assert {"python", "packages", "device", "commit", "corpus_hash", "matmul_peak_flops"} <= set(record)
    assert (workdir / "samples.md").read_text().startswith("# Samples after step 12")
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))


def test_a_finished_run_is_not_trained_again(peace, killed):
    workdir, settings = peace
    before = {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")}
    metrics = (workdir / "metrics.jsonl").read_bytes()
    result = loop.train(settings(), workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == metrics
    assert {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")} == before
    last = runs.lines(workdir, "validation")[-1]
    assert result["steps"] == 12 and result["validation"] == {name: last[name] for name in result["validation"]}
    assert runs.differences(workdir, killed[0] / "peace") == []


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_a_damaged_newest_checkpoint_is_skipped(damage, peace, killed, caplog):
    workdir, settings = peace
    largest = max((path for path in (workdir / "checkpoints/12").rglob("*") if path.name != MANIFEST),
                  key=lambda path: path.stat().st_size * path.is_file())
    content = largest.read_bytes()
    largest.unlink()
    if damage == "truncated":
        largest.write_bytes(content[:-1])
    elif damage == "flipped":
        largest.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    if damage != "flipped":  # one of them trains on; the others only look which one is meant
        step = loop.evaluate_newest(settings(), workdir)["step"]
        assert step == 9
        return
    loop.train(settings(), workdir)
    assert runs.differences(workdir, killed[0] / "peace") == []
    assert (workdir / "checkpoints/12.damaged").is_dir()


def test_more_steps_continue_a_finished_run(peace):
    workdir, settings = peace
    before, evaluated = runs.lines(workdir), workdir / "checkpoints/6"
    seconds = runs.state_of(workdir)[2]["seconds"]
    (evaluated / "metrics/metrics").write_text('{"loss": null}')  # as a stop during its evaluation saves it
    seal(evaluated)
    result = loop.train(settings(**{"training.steps": 14, "checkpoint.keep_best": 3}), workdir)
    assert all(result["seconds"][phase] >= before for phase, before in seconds.items())  # time survives a restart
    assert seconds["train"] > 0 and seconds["compile"] > 0
    assert [line["step"] for line in runs.lines(workdir, "train")] == list(range(1, 15))
    assert runs.lines(workdir)[: len(before)] == before
    assert steps(workdir) == [6, 12, 14] and config.read(workdir).training.steps == 14


@pytest.mark.parametrize("files", range(4))
def test_a_kill_while_the_files_are_written_leaves_each_whole(files, peace, monkeypatch):
    """Killed when so many of them have been replaced: the others are the old ones, and the run can go on."""
    workdir, settings = peace
    before = {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    corpus, replace, done = load_corpus(settings()), os.replace, []

    def killed(part, path):
        if len(done) == files:
            raise KeyboardInterrupt
        done.append(path.name)
        replace(part, path)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_files(settings(**{"training.steps": 14}).with_vocabulary(262), workdir, corpus, 1.0)
    after = {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    assert {name for name in before if after[name] != before[name]} <= set(done) and after.keys() == before.keys()
    assert config.read(workdir).training.steps == (14 if "config.json" in done else 12)
    assert json.loads(after["environment.json"])["matmul_peak_flops"] > 1


def test_fewer_steps_than_done_are_refused(peace):
    workdir, settings = peace
    with pytest.raises(RequestError, match=r"^config\.training\.steps=11 is less than what is done: .*/12$"):
        loop.train(settings(**{"training.steps": 11}), workdir)


def test_evaluation_alone(peace):
    workdir, settings = peace
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    result = loop.evaluate_newest(config.read(workdir), workdir)
    last = runs.lines(workdir, "validation")[-1]
    assert result["step"] == 12 and result["validation"] == {name: last[name] for name in result["validation"]}
    assert result["gzip_bits_per_byte"] > 0
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_the_average_is_evaluated_and_writes_the_samples(peace, monkeypatch):
    workdir, settings = peace
    corpus, seen = load_corpus(settings()), []
    state = {"params": "weights", "ema": "average", "routing": {}, "step": 12}

    def eval_step(params, routing, batch):
        seen.append(params)
        return {"nats": 1.0, "targets": 1,
                "loads": {"layers": np.array([[1.0, 3], [2, 2]]), "mtp": []}, "mtp_hits": [0], "mtp_targets": [1]}

    class Recorder:
        def __init__(self, model, variables):
            seen.append(variables["params"])

        def generate(self, prompts, *_, **__):
            return SimpleNamespace(tokens=prompts)

    monkeypatch.setattr(loop.samples, "Decoder", Recorder)
    for ema, expected in (("average", "average"), (None, "weights")):
        seen.clear()
        found = loop.evaluation.evaluate(eval_step, state | {"ema": ema}, corpus, settings(), 1)
        assert found["load_violation"] == 0.25  # of the layers 0.5 and 0
        loop.samples.write(None, state | {"ema": ema}, corpus, settings(), workdir / "samples.md")
        assert seen == [expected] * 2


def test_evaluation_on_other_text_keeps_the_tokenizer(peace, tmp_path):
    workdir, settings = peace
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"text {n}"}) for n in range(60)))
    other = settings(**{"data.source": "files", "data.files": tmp_path / "text.jsonl", "data.tokenizer": "bpe",
                        "data.validation_fraction": 0.5})
    result = loop.evaluate_newest(other, workdir)
    assert result["held_out_bytes"] < 60 * 7 and result["validation"]["targets"] > result["held_out_bytes"]


@pytest.mark.parametrize("at_step", [6, 12])
def test_a_stop_during_an_evaluation_saves_at_once(at_step, killed, tmp_path, monkeypatch):
    folder, _, _ = killed
    settings, workdir = runs.settings_of(folder / "cache", **FIELDS), tmp_path / "run"
    evaluate = loop.evaluation.evaluate

    def stopped(eval_step, state, *arguments):
        if int(state["step"]) == at_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(eval_step, state, *arguments)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(Stopped) as caught:
        patch.setattr(loop.evaluation, "evaluate", stopped)
        loop.train(settings, workdir)
    assert caught.value.code == 143 and signal.getsignal(signal.SIGTERM) is handler
    assert steps(workdir)[-1] == at_step
    assert runs.lines(workdir)[-1]["step"] == at_step and runs.lines(workdir)[-1]["split"] == "train"
    loop.train(settings, workdir)
    assert runs.differences(workdir, folder / "peace") == []
    assert steps(workdir) == steps(folder / "peace")  # the evaluation done later ranks the checkpoint


def test_signals_save_and_leave(killed, tmp_path):
    cache, workdir = killed[0] / "cache", tmp_path / "run"
    command = runs.arguments(workdir, cache, **FIELDS | {"checkpoint.every_steps": 0, "evaluation.every_steps": 1})
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        begun = resume_kills.count(workdir)
        process = runs.start(command, cache)
        while process.poll() is None and resume_kills.count(workdir) <= begun:
            time.sleep(0.01)
        process.send_signal(number)
        found, out, err = runs.finish(process)
        assert (found, out) == (code, ""), err
        last = runs.lines(workdir)[-1]["step"]
        assert steps(workdir)[-1] == last
        assert f"stopped at step {last}: the last good checkpoint is {workdir}/checkpoints/{last}" in err
        assert "Traceback" not in err
    assert [line["step"] for line in runs.lines(workdir, "train")] == list(range(1, last + 1))


def test_a_signal_before_the_first_step_leaves_at_once(killed, tmp_path):
    for delay in (0.5, 1.5):
        process = runs.start(runs.arguments(tmp_path / "run", killed[0] / "cache"), killed[0] / "cache")
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        code, _, err = runs.finish(process)
        assert code == 130 and "Traceback" not in err, err


@pytest.mark.parametrize("name, value", [("loss", "nan"), ("grad_norm", "inf")])
def test_a_loss_or_gradient_that_is_no_number_ends_the_run(name, value, killed, tmp_path, monkeypatch):
    plain, calls = loop.to_plain, []

    def broken(metrics):
        calls.append(1)
        return plain(metrics) | ({name: float(value)} if len(calls) == 8 else {})

    monkeypatch.setattr(loop, "to_plain", broken)
    said = rf"^step 8: .*\b{value}\b.*; the last good checkpoint is .*/checkpoints/6$"
    with pytest.raises(Diverged, match=said) as found:
        loop.train(runs.settings_of(killed[0] / "cache", **FIELDS), tmp_path / "run")
    assert found.value.step == 8
    assert runs.lines(tmp_path / "run")[-1]["step"] == 7 and steps(tmp_path / "run") == [3, 6]


def test_a_full_disk_ends_the_run(killed, tmp_path, monkeypatch):
    write = loop.MetricsLog.write

    def full(self, line):
        if line["step"] == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, line)

    monkeypatch.setattr(loop.MetricsLog, "write", full)
    with pytest.raises(RunError, match=r"^step \d+: No space left on device; the last good checkpoint is .*/6$"):
        loop.train(runs.settings_of(killed[0] / "cache", **FIELDS), tmp_path / "run")


def test_a_workdir_has_one_owner(tmp_path):
    workdir = tmp_path / "a" / "b"
    with owned(workdir), pytest.raises(RequestError, match="in use by another run"), owned(workdir):
        raise AssertionError
    with owned(workdir):
        pass


def test_a_wrong_request_leaves_no_workdir(tmp_path):
    with pytest.raises(RequestError), owned(tmp_path / "a" / "b"):
        raise RequestError("wrong")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    with pytest.raises(RequestError), owned(tmp_path / "a"):
        raise RequestError("wrong")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


@pytest.mark.parametrize("first, last, traced", [
    (1, 20, [4, 5, 6]), (18, 20, [18, 19, 20]), (1, 2, [1, 2]), (3, 2, [])])
def test_a_profile_is_of_three_steps_or_what_is_left(first, last, traced, tmp_path, monkeypatch, caplog):
    seen, at = [], {}
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: at.update(start=at["step"]))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.extend(range(at["start"], at["step"] + 1)))
    profiler = loop.Profiler(tmp_path, first, last)
    for at["step"] in range(first, last + 1):
        profiler.before(at["step"])
        profiler.after(at["step"], None)
    assert seen == traced and ("no step is left" in caplog.text) is not bool(traced)


def test_a_length_that_is_cut_is_said(caplog):
    assert loop.samples.cut("sample_tokens", 32, 32) == 32 and not caplog.text
    assert loop.samples.cut("sample_tokens", 5000, 32) == 32
    assert "config.evaluation.sample_tokens=5000 is cut to the 32 tokens" in caplog.text
