"""The bench of the kernels: what it refuses, what it keeps, what it compares; the numbers themselves need a GPU."""

import dataclasses
import json
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import bench, bench_peer, comparison, operations, results, timing, tuned
from kernels.command import RunError
from tests.commands import exit_code


class Shape(NamedTuple):
    R: int
    C: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    rows: int = 1


def slow(x):
    return x + 1


def fast(x):
    return x + 1


def wrong(x):
    return x.at[0, 0].add(jnp.nan)


def refused(x):
    raise ValueError("rows=4 exceeds the\nshared memory")


class Timed:
    """Stands in for `timing.Timed` where what is tested is what becomes of the seconds."""

    def __init__(self, function, argument_sets, expected, effort):
        self.seconds = {slow: 4e-3, fast: 1e-3, wrong: 1e-4}.get(function, 2e-3)
        self.results = lambda: function(*argument_sets[0])

    def measure(self):
        self.results()
        return timing.Seconds(self.seconds, 0.9 * self.seconds, 1.2 * self.seconds, 5, 10)


ADD = operations.Operation(
    name="add",
    shapes=(Shape(8, 16), Shape(8, 32)),
    small=Shape(4, 8),
    arguments=lambda shape, key: (jax.random.uniform(key, shape),),
    mosaic=lambda shape, tiles: {1: slow, 2: fast, 3: wrong, 4: refused}[tiles.rows],
    xla=lambda shape: lambda x: x + 1,
    chosen=lambda shape: Tiles(**{"rows": 1} | tuned.tuned("add", shape)),
    candidates=lambda shape: [Tiles(3), Tiles(1), Tiles(2), Tiles(4)],
    flops=lambda shape: 2.0 * shape.R * shape.C,
    tolerance=1e-6,
    bfloat16=lambda shape: lambda x: x + 1,
    bfloat16_arguments=lambda shape, key: (jax.random.uniform(key, shape, jnp.bfloat16),),
)


@pytest.fixture
def only_add(monkeypatch, tmp_path):
    """The table of operations holds `add` alone, and tuned tiles go to a folder of this test."""
    monkeypatch.setattr(operations, "OPERATIONS", {"add": ADD})
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.read.cache_clear()
    yield
    tuned.read.cache_clear()


@pytest.fixture
def machine(only_add, monkeypatch):
    """This CPU as if it could run the kernels."""
    monkeypatch.setattr(comparison.choice, "gpu_refusal", lambda: None)
    monkeypatch.setattr(timing, "Timed", Timed)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda size, effort: 1e10)
    monkeypatch.setattr(timing, "copies_of", lambda bytes_of_call, seconds_of_call: 2)
    monkeypatch.setattr(tuned, "device_kind", lambda: "cpu")
    return comparison.Machine()


def run(*arguments):
    """The command's exit code."""
    return exit_code(bench, *arguments)


def compared(machine, path=None, search=False, shape=ADD.shapes[0], operation=ADD):
    shown, kept = [], results.Results(path)
    kept.identify(machine.name)
    made = comparison.compare(operation, shape, machine, kept, search, lambda made, name: shown.append(name))
    assert shown == list(made["implementations"])
    return made, kept


@pytest.mark.parametrize("arguments, answer", [
    (["--op=ad"], "--op='ad' must be one of add (did you mean add?)"),
    (["--op=nothing_like_it"], "--op='nothing_like_it' must be one of add"),
    (["--opp=add"], "--opp is not a flag (did you mean --op?)"),
    (["add"], "'add' is not a flag: flags are written --name=value"),
    (["--minutes=soon"], "flag --minutes=soon: could not convert string to float: 'soon'"),
    (["--json={new}/deep/bench.json"], "--json='{new}/deep/bench.json' is not a file that can be written"),
    (["--json={new}"], "--json='{new}' is not a file that can be written"),
    (["--json={new}/other.json"], "--json='{new}/other.json' exists and is not a result of kernels.bench"),
    (["--peer", "--peer_python={new}/python"], "--peer_python='{new}/python' does not run"),
    (["--search"], "--search times tiles on a Hopper GPU, but the default device is a cpu, not a GPU"),
])
def test_a_wrong_request_is_one_line_and_code_2(only_add, tmp_path, capsys, arguments, answer):
    (tmp_path / "other.json").write_text('{"loss": 3}')
    before = sorted(tmp_path.rglob("*"))
    assert run(*(argument.format(new=tmp_path) for argument in arguments)) == 2
    said = capsys.readouterr()
    assert said.err == f"error: {answer.format(new=tmp_path)}\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_on_a_cpu_the_small_shape_runs_and_the_table_says_what_it_is_worth(only_add, tmp_path, capsys):
    assert run(f"--json={tmp_path}/bench.json", "--peer") == 0
    said = capsys.readouterr().out
    assert "These numbers say nothing about the kernels." in said and "cublaslt: not run" in said
    made, = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert made["operation"] == "add" and made["shape"] == "4x8" and made["device"] == "cpu"
    assert set(made["implementations"]) == {"bfloat16", "xla"}
    row = made["implementations"]["xla"]
    assert row["us_range"][0] <= row["us"] <= row["us_range"][1]
    np.testing.assert_allclose(row["gbytes"] * row["us"] * 1e3, ADD.traffic(ADD.small))
    np.testing.assert_allclose(row["tflops"] * row["us"] * 1e6, ADD.flops(ADD.small))


def test_what_the_file_holds_is_not_measured_again(only_add, monkeypatch, tmp_path, capsys):
    path = f"--json={tmp_path}/bench.json"
    shapes = []

    def compare(operation, shape, machine, kept, search, show, real=comparison.compare):
        shapes.append(shape)
        return real(operation, shape, machine, kept, search, show)

    monkeypatch.setattr(timing, "Timed", Timed)

    monkeypatch.setattr(comparison, "compare", compare)
    assert run(path) == 0
    table = capsys.readouterr().out.splitlines()[2:]
    assert run(path) == 0
    assert shapes == [ADD.small]
    assert capsys.readouterr().out.splitlines()[2:] == table  # the rows stand in the table all the same
    assert run(path, "--again") == 0
    assert len(shapes) == 2
    monkeypatch.setattr(results.record, "code", lambda: "other sources")
    assert run(path) == 0
    assert len(shapes) == 3
    assert len(json.loads((tmp_path / "bench.json").read_text())["results"]) == 1


def test_the_minutes_are_kept_and_the_rest_is_named(only_add, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(comparison, "compare", lambda *_: pytest.fail("measured"))
    assert run("--minutes=0") == 1
    assert capsys.readouterr().err == "error: --minutes=0 are over with 1 shapes left: run it again to go on\n"


def test_a_kernel_is_compared_with_plain_xla(machine):
    made, _ = compared(machine)
    assert list(made["implementations"]) == ["bfloat16", "xla", "mosaic"]
    assert made["implementations"]["mosaic"]["tiles"] == {"rows": 1}
    assert made["implementations"]["mosaic"]["error"] == 0
    wrong = dataclasses.replace(ADD, chosen=lambda shape: Tiles(3))
    row = compared(machine, operation=wrong)[0]["implementations"]["mosaic"]
    assert row["failed"] == "its results differ from plain XLA's by inf" and "us" not in row


def test_a_wrong_kernel_fails_the_command(machine, monkeypatch, capsys):
    monkeypatch.setitem(operations.OPERATIONS, "add", dataclasses.replace(ADD, chosen=lambda shape: Tiles(3)))
    assert run() == 1
    assert capsys.readouterr().err.startswith("error: 2 failed: add 8x16 mosaic: its results differ")


def test_a_search_keeps_the_fastest_right_tiles(machine, tmp_path):
    made, _ = compared(machine, search=True)
    tried = {row["tiles"]["rows"]: row for row in made["tried"]}
    assert list(tried) == [1, 3, 2, 4]  # what is chosen now comes first and once
    assert "us" in tried[1] and "us" in tried[2]
    assert tried[3]["failed"].startswith("its results differ")
    assert tried[4]["failed"] == "ValueError: rows=4 exceeds the shared memory"
    assert made["implementations"]["mosaic"]["tiles"] == {"rows": 2}
    written = json.loads((tmp_path / "cpu.json").read_text())
    assert written["choices"] == {"add": {"8x16": {"rows": 2}}} and written["device"] == "cpu"
    assert ADD.chosen(ADD.shapes[0]) == Tiles(2) and ADD.chosen(ADD.shapes[1]) == Tiles(1)
    compared(machine, search=True, shape=ADD.shapes[1])
    assert json.loads((tmp_path / "cpu.json").read_text())["choices"]["add"].keys() == {"8x16", "8x32"}


def test_a_search_is_made_up_for(machine, tmp_path):
    """A record without one does not stand for one with it; the other way it does."""
    path = f"--json={tmp_path}/bench.json"
    searched = lambda: [one["searched"] for one in json.loads((tmp_path / "bench.json").read_text())["results"]]  # noqa: E731
    assert run(path) == 0 and searched() == [False, False]
    assert run(path, "--search") == 0 and searched() == [True, True]
    assert run(path) == 0 and searched() == [True, True]


def test_what_there_is_comes_before_a_search(machine, monkeypatch, capsys):
    order = []

    def compare(operation, shape, machine, kept, search, show, real=comparison.compare):
        order.append((shape, search))
        return real(operation, shape, machine, kept, search, show)

    monkeypatch.setattr(comparison, "compare", compare)
    assert run("--search") == 0
    assert order == [(shape, search) for search in (False, True) for shape in ADD.shapes]
    assert capsys.readouterr().out.count("mosaic") == 4


def test_what_hung_is_not_tried_again_and_what_raised_is(machine, tmp_path):
    path = str(tmp_path / "bench.json")
    hung = results.Results(path)
    hung.identify(machine.name)
    unfinished = hung.attempt('add 8x16 {"tiles": {"rows": 2}}')
    unfinished.__enter__()  # and the process ends
    made, _ = compared(machine, path, search=True)
    failed = [row["failed"] for row in made["tried"] if row["tiles"]["rows"] == 2]
    assert failed == ["did not come back the last time"]
    assert made["implementations"]["mosaic"]["tiles"] == {"rows": 1}
    assert [attempt["what"] for attempt in json.loads((tmp_path / "bench.json").read_text())["attempts"]] == [
        'add 8x16 {"tiles": {"rows": 2}}']


def test_a_gpu_that_goes_down_ends_the_run_and_stays_noted(machine, monkeypatch, tmp_path):
    path = str(tmp_path / "bench.json")

    def down():
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    def break_gpu(shape, tiles):
        def function(x):
            monkeypatch.setattr(comparison.jax, "block_until_ready", lambda x: down())
            down()

        return function

    with pytest.raises(RunError, match="took the GPU down .*ILLEGAL_ADDRESS"), monkeypatch.context():
        compared(machine, path, operation=dataclasses.replace(ADD, mosaic=break_gpu))
    attempt, = json.loads((tmp_path / "bench.json").read_text())["attempts"]
    assert attempt["what"] == 'add 8x16 {"tiles": {"rows": 1}}' and attempt["code"]


def test_every_call_of_a_timed_loop_is_made_in_rotation():
    """What does not change from turn to turn, XLA would compute once."""
    seen = []

    def function(x):
        return jax.pure_callback(lambda x: seen.append(float(x[0])) or np.float32(x[0]),
                                 jax.ShapeDtypeStruct((), jnp.float32), x)

    argument_sets = [(jnp.full(3, float(i)),) for i in range(3)]
    jax.block_until_ready(jax.jit(timing.loop(function, argument_sets, 4))(argument_sets))
    assert sorted(seen) == sorted(4 * [0.0, 1.0, 2.0])


def test_a_call_takes_as_long_as_it_does():
    def function(x):
        return jax.pure_callback(lambda x: time.sleep(0.01) or x, jax.ShapeDtypeStruct((), jnp.float32), x)

    argument_sets = [(jnp.float32(i),) for i in range(2)]
    seconds = timing.Timed(function, argument_sets, 0.01, timing.Effort(0.0, 3, 0.04, 1.0)).measure()
    assert seconds.calls == 4 and seconds.samples == 3
    assert 0.01 <= seconds.least <= seconds.median <= seconds.greatest and seconds.least < 0.015


@pytest.mark.parametrize("traffic, seconds", [(4.7e6, 3e-6), (30e6, 8e-6), (90e6, 21e-6), (250e6, 500e-6), (9e9, 2e-3)])
def test_the_inputs_do_not_fit_the_cache(traffic, seconds):
    n = timing.copies_of(traffic, seconds)
    assert (n - 1) * traffic > 2 * timing.L2_BYTES  # what passes before a set comes again
    assert n >= 16 or n * seconds >= 4e-4


def test_the_error_is_the_worst_arrays_and_sees_nans():
    one = {"values": jnp.arange(1, 9.0), "scales": jnp.ones(4)}
    assert comparison.relative_error(one, one) == 0
    assert comparison.relative_error(one | {"scales": jnp.full(4, 1.5)}, one) == pytest.approx(0.5)
    assert comparison.relative_error(one | {"scales": jnp.ones(4).at[2].set(jnp.nan)}, one) == float("inf")


def test_no_error_is_the_same_bits():
    scales = jnp.full(4, 1e-30)
    values = jnp.array([0.0, 2.0**-9, 448.0], jnp.float8_e4m3fn)
    expected = values, scales
    assert comparison.relative_error((values, scales), expected) == 0
    assert comparison.relative_error((values, scales.at[0].multiply(1 + 2.0**-23)), expected) > 0
    assert comparison.relative_error((values.at[0].set(-0.0), scales), expected) > 0
    moved = comparison.relative_error((values.at[2].set(416), scales), expected)
    assert moved == pytest.approx(32 / 448)


REAL = operations.OPERATIONS  # before a test puts others in their place


@pytest.mark.parametrize("name, bytes_a_shape", {
    "quantize": lambda R, C: 2 * R * C + R * C + 4 * R * C // 128,
    "quantize_transposed": lambda R, C: 2 * R * C + R * C + 4 * R * C // 128,
    "quantize_both": lambda R, C: 2 * R * C + 2 * (R * C + 4 * R * C // 128),
    "quantize_weight": lambda E, R, C: E * (4 * R * C + 2 * (R * C + 4 * -(-R // 128) * -(-C // 128))),
    "product": lambda R, S, C: R * C + S * C + 4 * C // 128 * (R + -(-S // 128)) + 2 * R * S,
    "weight_gradient": lambda R, S, C: R * C + S * C + 4 * C // 128 * (R + S) + 4 * R * S,
    "grouped_product": lambda E, M, S, C:
        M * C + E * S * C + 4 * C // 128 * (M + E * S // 128) + 4 * M // 128 + 2 * M * S,
    "grouped_weight_gradient": lambda E, R, S, M: (R + S) * (M + 4 * M // 128) + 4 * M // 128 + 4 * E * R * S,
    "swiglu_forward": lambda R, F: 2 * 2 * R * F + 3 * (R * F + 4 * R * F // 128),
    "swiglu_backward": lambda R, F: (1 + 1 + 2 + 5) * R * F + (2 + 5) * 4 * R * F // 128 + 4 * R + 4 * R,
    "mla_decode": lambda B, T, N, S: 2 * B * T * N * (512 + 64 + 512) + 2 * B * S * (512 + 64) + 4 * B,
}.items())
def test_operations_are_what_they_are_counted_as(name, bytes_a_shape):
    """Bytes by hand; the kernel's results are those of plain XLA in shape and dtype."""
    operation = REAL[name]
    for shape in (operation.small, operation.shapes[0]):
        assert operation.traffic(shape) == bytes_a_shape(*shape)
        arguments = jax.eval_shape(lambda key, shape=shape: operation.arguments(shape, key), jax.random.key(0))
        kernel = operation.mosaic(shape, operation.chosen(shape))
        assert jax.eval_shape(kernel, *arguments) == jax.eval_shape(operation.xla(shape), *arguments)
        if operation.bfloat16 is not None:
            assert operation.traffic(shape, "bfloat16") > 0
    assert REAL.keys() == {name for test in test_operations_are_what_they_are_counted_as.pytestmark
                           for name, _ in test.args[1]}


@pytest.mark.parametrize("name", REAL)
def test_an_operation_reads_the_tiles_that_a_search_writes(monkeypatch, tmp_path, name):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    operation, (shape, other, *_) = REAL[name], REAL[name].shapes
    before = operation.chosen(shape), operation.chosen(other)
    found = next(tiles for tiles in operation.candidates(shape) if tiles not in before)
    tuned.write(tuned.TARGET, operation.name, shape, results.record.fields(found))
    assert (operation.chosen(shape), operation.chosen(other)) == (found, before[1])
    monkeypatch.undo()
    tuned.read.cache_clear()


PEER = """#!/bin/sh
echo '{"name": "a torch"}'
echo '{"median": 2e-6, "least": 1e-6, "greatest": 3e-6, "samples": 5, "calls": 10}'
echo '{"failed": "no kernel"}'
"""


def test_the_peers_rows_join_the_record(machine, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(operations.OPERATIONS, "add", dataclasses.replace(ADD, peer=lambda s: (s.R, s.C, 128, True)))
    python = tmp_path / "python"
    python.write_text(PEER)
    python.chmod(0o755)
    path = tmp_path / "bench.json"
    assert run(f"--json={path}", "--peer", f"--peer_python={python}") == 1  # one of its shapes failed
    assert "cublaslt: a torch" in capsys.readouterr().out
    first, second = (one["implementations"]["cublaslt"] for one in json.loads(path.read_text())["results"])
    assert first["us"] == pytest.approx(2) and first["us_range"] == pytest.approx([1, 3])
    assert first["gbytes"] == pytest.approx(ADD.traffic(ADD.shapes[0]) / 2e-6 / 1e9)
    assert second == {"failed": "no kernel"}
    python.write_text(PEER.replace("echo '{\"name\": \"a torch\"}'", "exit 1"))
    assert run(f"--json={path}", "--peer", f"--peer_python={python}") == 1  # neither is asked for again
    assert "not run" not in capsys.readouterr().out


def test_a_peer_that_cannot_run_says_so_in_a_line(capsys):
    bench_peer.main({})
    said = json.loads(capsys.readouterr().out)
    assert said.keys() == {"missing"}


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    bench.record.write_json(path, {"results": [1]})
    with pytest.raises(TypeError):
        bench.record.write_json(path, {"results": [object()]})
    assert json.loads(path.read_text()) == {"results": [1]}


def test_tuned_tiles_belong_to_a_device(only_add, tmp_path):
    assert tuned.file_of("NVIDIA H200").name == "h200.json"
    assert tuned.file_of("NVIDIA H100 80GB HBM3").name == "h100_80gb_hbm3.json"
    assert tuned.tuned("add", (8, 16)) == {}
    tuned.write(tuned.TARGET, "add", (8, 16), {"rows": 2})
    assert tuned.tuned("add", (8, 16)) == {"rows": 2}  # without a GPU: those of the one that the kernels are for
    assert tuned.tuned("add", (8, 17)) == tuned.tuned("subtract", (8, 16)) == {}
    assert tuned.read("NVIDIA H100 80GB HBM3") == {}
