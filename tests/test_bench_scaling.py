"""The bench of meshes: what it refuses, runs, and makes of times that are given; a program's own process."""

import io
import json

import pytest

from research import bench_scaling as bench
from research.accounting.request import settings_of
from tests.commands import exit_code


def run(*arguments):
    """The command's exit code."""
    return exit_code(bench, *arguments)


@pytest.mark.parametrize("arguments, answer", [
    (["--axes=data,rows"], "--axes='rows' must be one of data, fsdp, expert, tensor, pipeline"),
    (["--axes="], "--axes is empty: give some of data, fsdp"),
    (["--devices=0"], "--devices='0' is no list of whole numbers of at least 1"),
    (["--devices=3", "--axes=tensor"], "config.mesh.tensor=3 does not divide config.model.num_attention_heads=8"),
    (["--devices=5", "--axes=pipeline"], "config.mesh.pipeline=5 does not divide the 8 layers with experts; the first"),
    (["--config.mesh.data=2"], "config.mesh.data=2 must be 1: --axes and --devices say which meshes"),
    (["--config=experiments/nanoo.py"], "--config=experiments/nanoo.py does not exist (did you mean "),
    (["--rows=0"], "flag --rows=0: "),
    (["--device=2"], "--device is not a flag (did you mean --devices?)"),
    (["--plot={new}/deep/a.png"], "--plot='{new}/deep/a.png' is not a file that can be written"),
])
def test_a_wrong_request_is_one_line_and_code_2(tmp_path, capsys, arguments, answer):
    assert run(*(argument.format(new=tmp_path) for argument in arguments)) == 2
    said, = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {answer.format(new=tmp_path)}")
    assert not list(tmp_path.iterdir())


class Given:
    """A worker whose steps take as long as its devices say: 8 ms, and of an axis 4 ms more for each further one."""

    def __init__(self, program, device):
        self.program, self.steps = program, []
        self.about = {"environment": {"device": device, "devices": 4, "processor": "none", "commit": "abc"},
                      "exchanged": {"all-reduce": 3_000_000, "all-gather": 1_000_000 * program.devices},
                      "account": 5_000_000}

    def turn(self, steps):
        rows = 1 if self.program.axis and self.about["environment"]["device"].startswith("gpu") else \
            self.program.devices
        self.steps.append(steps)
        return {"seconds": 8e-3 * rows + 4e-3 * (self.program.devices - 1) * (self.program.axis is not None),
                "load_violation": 0.5}

    def seconds(self, steps):
        return self.turn(steps)["seconds"]

    def close(self):
        self.steps.append("closed")


@pytest.mark.parametrize("device, own, one, times", [
    ("cpu cpu", [8, 20, 44], [8, 16, 32], [1, 1.25, 1.375]),  # beside one device with two and four times the rows
    ("gpu NVIDIA H200", [8, 12, 20], [8, 8, 8], [1, 1.5, 2.5]),  # beside one with its own
])
def test_steps_stand_beside_those_of_one_device(tmp_path, capsys, monkeypatch, device, own, one, times):
    started = []

    def start(program, folder):
        started.append(Given(program, device))
        return started[-1]

    monkeypatch.setattr(bench, "start", start)
    assert run("--axes=data,expert", "--devices=4,1,2", "--rounds=3", f"--json={tmp_path}/a.json",
               f"--plot={tmp_path}/a.png") == 0
    result = json.loads((tmp_path / "a.json").read_text())
    assert [(row["axis"], row["devices"]) for row in result["rows"]] == [
        (axis, size) for axis in ("data", "expert") for size in (1, 2, 4)]
    for number, row in enumerate(result["rows"]):
        assert row["ms"] == pytest.approx([own[number % 3]] * 3)
        assert row["one_device_ms"] == pytest.approx([one[number % 3]] * 3)
        assert row["times"] == pytest.approx([times[number % 3]] * 3)
    assert result["simulated"] is device.startswith("cpu")
    probe, *others = started
    assert all(worker.steps == [bench.WARMUPS, 2, 2, 2, "closed"] for worker in others) and probe.steps == ["closed"]
    said = capsys.readouterr().out
    assert ("simulated devices share the cores" in said) is result["simulated"]
    shares = [ms / (size if result["simulated"] else 1) for ms, size in zip(own, (1, 2, 4), strict=True)]
    last = said.splitlines()[-1].split()
    assert last[:3] == ["expert", "4", f"{shares[-1]:.1f}"] and last[-3:] == ["7.00", "5.00", "0.50"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_more_devices_than_there_are_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(bench, "start", lambda program, folder: Given(program, "gpu NVIDIA H200"))
    assert run("--axes=data") == 2
    assert "--devices=8 is more than the 4 that are present: gpu NVIDIA H200" in capsys.readouterr().err


def test_each_device_has_the_same_rows_and_a_pipeline_as_many_pieces():
    bench.FLAGS.unparse_flags()
    bench.FLAGS(["", "--rows=3"])
    for axis in bench.AXES:
        s = settings_of(*bench.Program(axis, 4).request().values())
        assert dict(s.mesh) == dict.fromkeys(bench.AXES, 1) | {axis: 4} and s.training.batch_size == 12
        assert s.training.accumulation_steps == (12 if axis == "pipeline" else 1)
    s = settings_of(*bench.Program(None, 4).request().values())
    assert set(s.mesh.values()) == {1} and s.training.batch_size == 12


def test_a_process_says_what_it_is_and_takes_steps(tmp_path, capsys, monkeypatch):
    fields = ("model.num_hidden_layers=1", "model.n_routed_experts=0", "mtp.num_nextn_predict_layers=0",
              f"data.cache={tmp_path}")
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n2\n"))
    assert run("--worker=" + json.dumps({"config": "experiments/nano.py:smoke", "fields": fields})) == 0
    about, *turns = map(json.loads, capsys.readouterr().out.splitlines())
    assert about["exchanged"] == {} and about["account"] == 0 and about["environment"]["device"] == "cpu cpu"
    assert len(turns) == 2 and all(turn["seconds"] > 0 and turn["load_violation"] == 0 for turn in turns)
