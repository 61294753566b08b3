"""Several processes are one run: they agree, share, stop together, do not outlive each other, go on in any number."""

import functools
import json
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from research import main
from research.errors import RequestError
from research.interop.names import SCALE
from research.interop.tensors import list_tensors
from research.interop.weights import read_weights
from research.parallel import hosts
from research.training import loop
from research.training.step import init_state, make_train_step
from tests import tiny
from tests.commands import exit_code
from tests.interop.test_huggingface import GOLDEN
from tests.parallel import processes
from tests.parallel.meshes import ROWS
from tests.training import runs

FP8_FOLDER = GOLDEN / "deepseek_v3_tiny_fp8"

RUN = {
    "model.hidden_size": 16, "model.intermediate_size": 16, "model.num_attention_heads": 2, "model.head_dim": 8,
    "model.num_key_value_heads": 1, "model.attention": "gqa", "model.n_routed_experts": 0, "model.num_hidden_layers": 1,
    "model.attention_implementation": "reference", "mtp.num_nextn_predict_layers": 0, "mesh.data": 2,
    "data.source": "files", "data.tokenizer": "bytes", "data.sequence_length": 16, "data.validation_fraction": 0.5,
    "data.fim_rate": 0.2, "training.steps": 20, "training.batch_size": 4, "checkpoint.every_steps": 4,
    "checkpoint.keep_last": 9, "evaluation.every_steps": 8, "evaluation.batches": 1, "evaluation.batch_size": 8,
    "evaluation.samples": 0, "evaluation.decode_prompts": 0,
}
STOPPED, KILLED = 9, 14  # the steps at which process 1 gets SIGTERM, and SIGKILL after that


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two texts, and what the runs leave."""
    folder = tmp_path_factory.mktemp("hosts")
    for name in ("one", "two"):
        (folder / f"{name}.txt").write_text(f"{name} of the texts that are read here. " * 60)
    return folder


def flags(folder, workdir):
    """Of research.main for a run in this workdir."""
    values = RUN | {"data.files": folder / "*.txt", "data.cache": folder / "data"}
    return [f"--config={runs.EXPERIMENT}", f"--workdir={workdir}", f"--heartbeat_timeout_seconds={processes.HEARTBEAT}",
            *(f"--config.{name}={value}" for name, value in values.items())]


def finish(process, seconds=300):
    """Exit code, stdout and stderr."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def alone(folder, workdir):
    """A run in one process with two devices."""
    return finish(processes.start("-m", "research.main", *flags(folder, workdir), cache=folder / "xla", devices=2))


def together(folder, workdir, name, step, slurm=False):
    """A run in two processes with a device each, the second of which gets a signal at a step: what both end with.

    They know of each other by flags, or by what Slurm says.
    """
    address, started = processes.free_address(), []
    for number, words in enumerate((("-m", "research.main"), ("signal", name, step))):
        meeting = [f"--coordinator_address={address}", "--num_processes=2", f"--process_id={number}"]
        words, variables = (words, processes.of_slurm(number, address)) if slurm else ([*words, *meeting], {})
        started.append(processes.start(*words, *flags(folder, workdir), cache=folder / "xla", **variables))
    try:
        return [finish(process) for process in started]
    finally:
        for process in started:
            process.kill()


def saved(workdir):
    """The steps whose checkpoints are whole."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def lives(folder):
    """A run left in peace; and one that two processes take over at step 4, and one at last, after two ends."""
    found = {"peace": alone(folder, folder / "peace")}
    assert found["peace"][0] == 0, found["peace"][2]
    shutil.copytree(folder / "peace", folder / "moved")
    for path in (folder / "moved" / "checkpoints").iterdir():
        if path.name != "4":
            shutil.rmtree(path)
    found["stopped"] = together(folder, folder / "moved", "SIGTERM", STOPPED)
    found["saved"] = saved(folder / "moved")
    found["killed"] = together(folder, folder / "moved", "SIGKILL", KILLED, slurm=True)
    found["left"] = saved(folder / "moved")
    found["last"] = alone(folder, folder / "moved")
    return found


def test_sigterm_to_one_stops_both_at_the_same_step(lives):
    (code, _, said), (other, _, _) = lives["stopped"]
    assert (code, other) == (143, 143), said
    (step,) = set(lives["saved"]) - {4, 8}  # not later than the second step after the one that was written
    assert STOPPED < step <= STOPPED + 2
    assert f"stopped at step {step}: the last good checkpoint is" in said


def test_a_killed_process_ends_the_other_which_names_the_last_checkpoint(lives, folder):
    (code, _, said), (other, _, _) = lives["killed"]
    assert (code, other) == (1, -9), said
    assert said.splitlines()[-1].startswith("error: ")
    assert said.splitlines()[-1].endswith(f"; the last checkpoint is {folder}/moved/checkpoints/{lives['left'][-1]}")


def test_the_run_goes_on_as_if_it_had_been_left_in_peace(lives, folder):
    """Saved by one process, two and two; read by two, two and one: the same bits, metrics and data position."""
    assert lives["last"][0] == 0, lives["last"][2]
    (step, state, record), (other_step, other, other_record) = (runs.state_of(folder / name) for name in
                                                                ("peace", "moved"))
    assert step == other_step == RUN["training.steps"]
    assert state.keys() == other.keys()
    assert [path for path in state if state[path] != other[path]] == []
    assert record["data"] == other_record["data"] and record["tokens"] == other_record["tokens"]
    assert runs.lines(folder / "peace") == runs.lines(folder / "moved")
    speeds = [line["tokens_per_second"] for line in runs.lines(folder / "moved", "train", times=True)]
    assert max(speeds) < 100 * np.median(speeds)  # no step's time is counted as another's
    assert [line["step"] for line in runs.lines(folder / "moved", "validation")] == [8, 16, 20]


def test_the_first_process_alone_speaks(lives, folder):
    """One event file a start; of the second process there is nothing but its own warning."""
    assert len(list((folder / "moved" / "tensorboard").iterdir())) == 4
    assert "\na device of data 2: " in lives["stopped"][0][2]  # what the account expects of its memory
    lines = [line for line in lives["stopped"][1][2].splitlines() if line]
    assert lines == ["warning: stopping after this step; once more to leave without saving"]
    assert [out for _, out, _ in lives["stopped"] + lives["killed"]] == 4 * [""]  # Gloo is not heard


def test_stdout_is_left_to_python():
    program = ("import os; from research.parallel.hosts import _leave_stdout_to_python as leave; print('a'); leave(); "
               "os.write(1, b'of C'); print('é')")
    done = subprocess.run([sys.executable, "-X", "utf8", "-c", program], capture_output=True, cwd=processes.ROOT)
    assert done.stdout.decode() == "a\né\n", done.stderr


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes find, how the first ends when the second has fallen silent, and the folder of both."""
    address, folder = processes.free_address(), tmp_path_factory.mktemp("pair")
    for name in ("whole", "torn"):
        shutil.copytree(FP8_FOLDER, folder / name)
    tensor = list_tensors(folder / "torn")["model.layers.2.mlp.experts.6.up_proj.weight"]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.begin)
        file.write(b"\x7f")
    files = [folder / f"{number}.json" for number in range(2)]
    first, second = (processes.start("pair", address, number, file, cache=folder / "xla")
                     for number, file in enumerate(files))
    try:
        code, _, said = finish(first)
    finally:
        second.kill()
    assert code == 1, said
    return [json.loads(file.read_text()) for file in files], said, folder


def test_a_silent_process_ends_the_other_within_the_heartbeat(pair):
    """Nothing is closed, so that no collective fails: JAX's abort() is what ends it."""
    assert pair[1].splitlines()[-1] == (
        f"error: ended by JAX: another process of the run has ended, or has not answered for {processes.HEARTBEAT} s; "
        "the last checkpoint is here")


def test_processes_agree_or_are_refused_alike(pair):
    one, other = pair[0]
    assert one["first"] and not other["first"]
    for found in (one, other):
        assert found["told"] == [0, "a"] and found["all"] == [0, 1]
        assert found["equal"] == "" and found["wrong"] == "the first's own"
        assert found["alike"] == "the first's own"  # which the second alone has said
        assert found["other"] == "config.b=1 on process 1 is 0 on process 0: all processes need the same command"
        assert found["missing"].startswith("config.a=1 on process 1 is None on process 0")


def test_votes_are_the_largest_of_all(pair):
    """Each takes over what all have agreed on."""
    assert pair[0][0]["votes"] == [[0, 0], [143, 143], [130, 130]]
    assert pair[0][1]["votes"] == [[0, 0], [143, 143], [130, 130]]


def test_each_process_reads_its_own_experts_of_a_release(pair):
    """What is no expert is on both; what the second finds wrong both refuse, in the same words."""
    _, variables = read_weights(FP8_FOLDER)
    up = variables["params"]["layers"]["mlp"]["up_proj"]
    tensors = [name for name in list_tensors(FP8_FOLDER) if not name.endswith(SCALE)]
    expected = sum(".experts." not in name for name in tensors) - 2 + sum(".experts." in name for name in tensors) // 2
    for number, found in enumerate(pair[0]):
        assert found["read"]["experts"] == list(range(4 * number, 4 * number + 4))
        assert found["read"]["names"] == expected  # but for the copies of embedding and head
        np.testing.assert_array_equal(found["read"]["held"], up[:, 4 * number:4 * number + 4])
        assert found["torn"].endswith("1 not finite (NaN or infinite values): "
                                      "model.layers.2.mlp.experts.6.up_proj.weight")


def test_a_pipeline_of_two_processes_is_that_of_one(pair, tmp_path):
    """Of research.distill: all samples and answers, and what every model learned, from examples and from rollouts."""
    said, two = processes.distilled(tmp_path, 1), pair[2] / "distilled"
    assert [found["distilled"] for found in pair[0]] == [said, said]
    for model in ("cold_start", "base", "reinforced"):
        for line, other in zip(runs.lines(tmp_path / model), runs.lines(two / model), strict=True):
            assert line.keys() == other.keys()
            for name in line.keys() - {"split"}:
                np.testing.assert_allclose(other[name], line[name], rtol=2e-4, atol=1e-6, err_msg=f"{model} {name}")
    assert 0 < runs.lines(two / "reinforced", "train")[0]["accuracy"] < 1
    names = [path.relative_to(two) for path in two.rglob("*.jsonl") if path.name != "metrics.jsonl"]
    assert len(names) == 2 + 3  # samples, those that were verified, and the answers of every model
    assert all((two / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


@functools.cache
def on_one_device(mesh):
    """Metrics of steps of the shape that this mesh shares, and weights and biases after them."""
    s = tiny.settings(processes.MESHES[mesh][1])
    model, variables = tiny.model(s)
    state, metrics = init_state(model, s, variables), []
    step = make_train_step(model, s).lower(state, tiny.batch(ROWS)).compile({"xla_backend_optimization_level": 0})
    for number in range(processes.STEPS):
        state, told = step(state, tiny.batch(ROWS, seed=number))
        metrics.append(told)
    return metrics, tiny.leaves({"params": state["params"], "routing": state["routing"]})


def assert_equal(found, metrics, expected):
    """What a process finds, and what one device does."""
    for one, other in zip(metrics, found["metrics"], strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_allclose(other[name], value, rtol=2e-4, err_msg=name)
    for path, value in expected.items():
        difference = np.linalg.norm(found["state"][path] - value)
        assert difference <= (1e-6 if "routing" in path else 2e-3 * np.linalg.norm(value)), path


@pytest.mark.parametrize("mesh, rows, matrix, held", [
    ("experts", ([0, 1, 2, 3], [4, 5, 6, 7]), "layers/mlp/gate_proj", [1, 4, 16, 40]),
    ("stages", 2 * ([0, 1, 2, 3, 4, 5, 6, 7],), "dense_layers/mlp/gate_proj/kernel", [1, 16, 24]),
], ids=["experts", "stages"])
def test_steps_over_two_processes_are_those_of_one_device(pair, mesh, rows, matrix, held):
    """Experts of either process for tokens of both, or a stage in each: loss, biases and weights after the last step,
    on both."""
    assert tuple(found["steps"][mesh]["rows"] for found in pair[0]) == rows
    for found in (found["steps"][mesh] for found in pair[0]):
        assert found["held"][matrix] == held
        assert_equal(found, *on_one_device(mesh))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """What each of four processes finds."""
    address, folder = processes.free_address(), tmp_path_factory.mktemp("four")
    files = [folder / f"{number}.json" for number in range(4)]
    started = [processes.start("four", address, number, file, cache=folder / "xla")
               for number, file in enumerate(files)]
    try:
        for code, _, said in map(finish, started):
            assert code == 0, said[-3000:]
    finally:
        for process in started:
            process.kill()
    return [json.loads(file.read_text()) for file in files]


def test_steps_over_four_processes_are_those_of_one_device(four):
    """Each reads two rows, and has half of the experts, for the tokens of two."""
    assert [found["rows"] for found in four] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    for found in four:
        assert found["held"]["layers/mlp/gate_proj"] == [1, 4, 16, 40]
        assert_equal(found, *on_one_device("experts"))


@pytest.mark.parametrize("variables, name", [
    ({}, ""),
    ({"SLURM_NTASKS": "8"}, ""),  # a shell of an allocation, not a step
    ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a1"}, ""),
    ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "a[1-8]"}, "Slurm"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, ""),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ""),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
])
def test_launchers_are_known_by_what_they_leave_in_the_environment(monkeypatch, variables, name):
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda _: object())
    assert hosts.launcher(variables) == name


@pytest.mark.parametrize("words, said", [
    (["--process_id=1"], "--coordinator_address is missing: without a launcher that JAX knows, "),
    (["--coordinator_address=a:1", "--process_id=1"], "--num_processes is missing: without a launcher"),
    (["--coordinator_address=a", "--num_processes=2", "--process_id=1"], "--coordinator_address=a must be HOST:PORT"),
    (["--coordinator_address=a:1", "--num_processes=2", "--process_id=2"], "--process_id=2 must be at least 0 and"),
    (["--coordinator_address=a:1", "--num_processes=0", "--process_id=0"], "--num_processes=0 must be at least 1"),
    (["--heartbeat_timeout_seconds=0"], "--heartbeat_timeout_seconds=0 must be from 1 to 600"),
])
def test_flags_that_do_not_fit_are_refused(capsys, tmp_path, words, said):
    assert exit_code(main, f"--config={runs.EXPERIMENT}", f"--workdir={tmp_path / 'run'}", *words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(RequestError, match=f"{address} cannot be listened at by process 0: Address already in use"):
            hosts.join(address, 2, 0, 30)
    with pytest.raises(RequestError, match="cannot be listened at"):
        hosts.join("localhost:70000", 2, 0, 30)


def test_devices_of_a_cpu_are_as_fast_together_as_one(monkeypatch):
    """Their machine's peak counts once, however many processes and devices it has."""
    s = tiny.settings({"mesh.data": 2, "mesh.expert": 2})
    assert loop.machines(s) == 1
    monkeypatch.setattr(hosts, "from_all", lambda _: ["a", "b", "a", "b"])
    assert loop.machines(s) == 2
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert loop.machines(s) == 4


def test_a_process_alone_agrees_with_itself():
    hosts.join("here:1", 1, 0, 30)
    assert hosts.is_first() and not hosts.several() and hosts.from_all(3) == [3]
    hosts.agree({"a": 1}, "command")
    with pytest.raises(RequestError, match="own"), hosts.first_alone():
        raise RequestError("own")
