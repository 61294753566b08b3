"""The bench of decoding: what it refuses, what it counts, each part once at a small size, with a stub of the peer."""

import json
import sys

import jax
import numpy as np
import pytest

from research import bench, bench_acceptance, bench_cache, bench_context, bench_decoding, bench_drafting
from research.data.tokenizer import Tokenizer, _bytes
from research.decoding.generate import Decoder
from research.training.checkpoint import Checkpoints
from tests import tiny
from tests.commands import exit_code

PEER = """
import importlib.util, json, sys, time
spec = importlib.util.spec_from_file_location("bench_peer", sys.argv[1])
peer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peer)
told = json.loads(sys.argv[2])
assert told["model"]["n_routed_experts"] == 16 and told["model"]["vocab_size"] == 4096

def step(tokens_BT):
    time.sleep(0.5 if told["cache"] == "dynamic" else 0.25)
    return float(len(tokens_BT))

peer.serve(step, {"name": "stub", "parameters": 1}, told["tokens"])
"""


def run(*arguments):
    """The command's exit code."""
    return exit_code(bench_decoding, *arguments)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run's workdir: random weights of a tiny dense model, whose tokens are bytes, and a corpus of its own."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} " * 40}) + "\n" for n in range(100, 200)))
    settings = tiny.settings({
        "model.vocab_size": 320, "model.num_hidden_layers": 1, "model.n_routed_experts": 0,
        "mtp.num_nextn_predict_layers": 1, "data.source": "files", "data.files": str(text),
        "data.tokenizer": "bytes", "data.cache": str(folder / "cache"), "data.validation_fraction": 0.2})
    (folder / "config.json").write_text(settings.to_json())
    Tokenizer(_bytes()).save(folder / "tokenizer.json")
    _, variables = tiny.model(settings)
    variables = jax.tree.map(np.asarray, variables)
    checkpoints = Checkpoints(folder / "checkpoints", 1, 0)
    checkpoints.save(3, variables | {"optimizer": {}, "ema": None, "step": np.int32(3)}, {})
    checkpoints.wait()
    return folder


@pytest.mark.parametrize("arguments, answer", [
    ([], "--part is required: one of peer, acceptance, drafting, cache, context, gpu"),
    (["--part=speed"], "flag --part=speed: value should be one of <peer|acceptance|drafting|cache|context|gpu>"),
    (["--part=acceptance"], "--part=acceptance needs --checkpoint: the workdir of a trained model"),
    (["--part=cache"], "--part=cache needs --checkpoint: the workdir of a trained model"),
    (["--part=acceptance", "--checkpoint={new}"], "--checkpoint='{new}' holds no checkpoints"),
    (["--part=acceptance", "--checkpoint={new}", "--temperatures=0,warm"],
     "--temperatures='0,warm' is no list of numbers of at least 0"),
    (["--part=drafting", "--drafts=17"], "--drafts=17 must be at most 16"),
    (["--part=peer", "--new_tokens=5000"], "--new_tokens=5000 after 64 is more than config.model.max_position_embeddi"),
    (["--part=context", "--cached=0"], "--cached='0' is no list of whole numbers of at least 1"),
    (["--part=gpu", "--batches=1.5"], "--batches='1.5' is no list of whole numbers of at least 1"),
    (["--part=gpu", "--plot={new}/a.png"], "--plot='{new}/a.png' is for --part=context alone"),
    (["--part=context", "--plot={new}/deep/a.png"], "--plot='{new}/deep/a.png' is not a file that can be written"),
    (["--part=gpu", "--json={new}/deep/a.json"], "--json='{new}/deep/a.json' is not a file that can be written"),
    (["--part=peer", "--peer_python={new}/python"], "--peer_python='{new}/python' does not run"),
    (["--part=peer", "--config=experiments/nanoo.py"], "--config=experiments/nanoo.py does not exist"),
    (["--part=peer", "--rounds=0"], "flag --rounds=0: "),
])
def test_a_wrong_request_is_one_line_and_code_2(tmp_path, capsys, arguments, answer):
    assert run(*(argument.format(new=tmp_path) for argument in arguments)) == 2
    said, = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {answer.format(new=tmp_path)}")
    assert not list(tmp_path.iterdir())


def test_ours_beside_a_stub_of_the_peer(tmp_path, capsys):
    stub, python, path = tmp_path / "stub.py", tmp_path / "python", tmp_path / "result.json"
    stub.write_text(PEER)
    python.write_text(f'#!/bin/sh\n[ "$2" = -c ] && exit 0\nexec {sys.executable} {stub} "$2" "$3"\n')
    python.chmod(0o755)
    assert run("--part=peer", f"--peer_python={python}", "--config=experiments/nano.py:smoke", "--new_tokens=4",
               "--batches=2", "--rounds=2", f"--json={path}") == 0
    row, = json.loads(path.read_text())["peer"]["rows"]
    assert {side: len(rates) for side, rates in row["tokens_per_second"].items()} == {
        "ours": 2, "dynamic": 2, "static": 2}
    assert max(row["tokens_per_second"]["dynamic"]) <= 2 * 4 / 0.5
    assert row["ratio"] == pytest.approx(np.median(row["ratios"]["static"]))
    assert np.median(row["ratios"]["dynamic"]) == pytest.approx(2 * row["ratio"], rel=0.5)
    said = capsys.readouterr().out
    assert "times the faster peer's, static" in said and "ours: parsimony, plain" in said


def test_acceptance_of_a_workdir(workdir, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert run("--part=acceptance", f"--checkpoint={workdir}", "--prompts=3", "--new_tokens=6", "--rounds=1",
               "--drafts=1", "--temperatures=0", f"--json={path}") == 0
    result = json.loads(path.read_text())["acceptance"]
    assert [(row["temperature"], row["k"]) for row in result["rows"]] == [(0, 0), (0, 1)]
    for row in result["rows"]:
        assert [len(one) for one in row["acceptance"]] == [row["k"]]
        assert row["same_as_plain"] == 3
        if not row["k"]:
            assert row["speedup"] == [1] and row["tokens_per_step"] == [1]
    forced = result["teacher_forced_agreement"]
    assert forced["held_out_text"]["positions"] == 3 * 5  # six tokens each, of which the first is never drafted
    said = capsys.readouterr().out
    assert said.count("teacher-forced agreement") == 2 and "own greedy text" in said


def test_a_smaller_cache_beside_float32(workdir, tmp_path):
    """The loss in float32 is the training forward's; what is stored in 8 bits moves it, and a text away from a tie."""
    path = tmp_path / "result.json"
    assert run("--part=cache", f"--checkpoint={workdir}", "--prompts=3", "--new_tokens=6", f"--json={path}") == 0
    result = json.loads(path.read_text())["cache"]
    exact, half, fp8 = result["rows"]
    model, variables, corpus, _ = bench_acceptance.load(workdir)
    tokens_BT = np.array(bench_acceptance.held_out(corpus, 3, 64, 6), np.int32)
    logits_BTV = jax.jit(model.apply)(variables, tokens_BT, np.ones_like(tokens_BT), np.tile(np.arange(70), (3, 1)))[0]
    loss_BT = -jax.nn.log_softmax(logits_BTV[:, 63:-1])[np.arange(3)[:, None], np.arange(6), tokens_BT[:, 64:]]
    assert result["tokens"] == loss_BT.size and exact["loss"] == pytest.approx(float(loss_BT.mean()), rel=1e-5)
    assert exact["difference"] == exact["standard_error"] == 0 and exact["same_likeliest"] == 1
    assert exact["same_texts"] == 3 and exact["tokens_together"] == [6, 6, 6]
    assert 0 < abs(half["difference"]) < abs(fp8["difference"]) < 0.1
    assert [row["bytes_per_token"] for row in result["rows"]] == [4 * 12, 2 * 12, 8 + 4 + 2 * 4]
    assert bench_cache.parted([1, 2, 3], [1, 2, 4, 5]) == 2 and bench_cache.parted([1, 2], [1, 2]) == 2


def test_more_prompts_than_documents_are_refused(workdir, capsys):
    assert run("--part=acceptance", f"--checkpoint={workdir}", "--prompts=1000") == 2
    assert "--prompts=1000 is more than the " in capsys.readouterr().err


def test_agreement_on_greedy_text_is_what_one_draft_a_step_would_have_been(workdir):
    """By hand: the module's draft of each token, after the true tokens, against the token that greedy decoding took."""
    model, variables, corpus, _ = bench_acceptance.load(workdir)
    decoder, texts, hits = Decoder(model, variables), [], 0
    for prompt in (text[:65] for text in bench_acceptance.held_out(corpus, 3, 65, 8)):
        text = prompt + decoder.generate([prompt], 8, draft_tokens=1).tokens[0]
        for place in range(66, len(text)):  # a draft of the token there, after a pass over all but one before it
            hits += decoder.generate([text[:place - 1]], 2, draft_tokens=1).accepted[0]
        texts.append(text)
    forced = bench_acceptance.agreement(model, variables, texts, 65)
    assert forced["positions"] == sum(len(text) - 66 for text in texts)
    assert forced["share"] * forced["positions"] == pytest.approx(hits)


def test_drafting_pays_where_its_tokens_outweigh_its_cost():
    assert bench_drafting.pays_from(1.6, 1) == pytest.approx(0.6)
    assert bench_drafting.pays_from(1.75, 2) == pytest.approx(0.5)  # 1 + 1/2 + 1/4
    assert bench_drafting.pays_from(2.01, 1) is None
    assert bench_drafting.tokens_of_step(0.5, 2) == 1.75


def test_the_cost_of_drafts(tmp_path, capsys, monkeypatch):
    path = tmp_path / "result.json"
    small = ("model.vocab_size=256", "model.num_hidden_layers=1", "model.n_routed_experts=0")
    monkeypatch.setattr(bench_drafting, "SHAPES", {"small": ("experiments/nano.py:smoke", small)})
    assert run("--part=drafting", "--new_tokens=4", "--drafts=1", "--rounds=1", f"--json={path}") == 0
    plain, drafted = json.loads(path.read_text())["drafting"]["rows"]
    assert plain["cost"] == [1] and plain["pays_from"] is None and plain["at_paper"] == 1
    assert drafted["cost"] == [drafted["ms"][0] / plain["ms"][0]]
    assert drafted["at_paper"] == pytest.approx(1.875 / drafted["cost"][0])
    assert drafted["megabytes"] == plain["megabytes"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_both_paths_over_a_long_cache_are_the_same_attention(tmp_path):
    path = tmp_path / "result.json"
    assert run("--part=context", "--cached=64,128", "--rounds=1", f"--json={path}") == 0
    rows = json.loads(path.read_text())["context"]["rows"]
    assert [(row["cached"], row["path"]) for row in rows] == [
        (64, "absorbed"), (64, "expanded"), (128, "absorbed"), (128, "expanded")]
    assert all(row["difference"] < 1e-5 for row in rows)


def test_the_plot_is_a_png(tmp_path):
    rows = [{"path": path, "cached": n, "ms": [n / 2e3, n / 1e3]} for n in (64, 128) for path in bench_context.PATHS]
    bench_context.draw(rows, str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_gpus_part_on_a_small_shape(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert run("--part=gpu", "--batches=2", "--new_tokens=4", "--rounds=1", f"--json={path}") == 0
    result = json.loads(path.read_text())["gpu"]
    row, = result["rows"]
    assert row["bandwidth_share"] == pytest.approx(row["step_bytes"] / row["step_seconds"] / result["bandwidth"])
    assert "a small shape, which says nothing about a GPU" in capsys.readouterr().out


def test_v2_lite_has_its_size_and_reads_its_active_weights_for_one_token():
    from research import config, experiment
    from research.accounting import parameters
    from research.decoding.cache import bytes_per_token
    from research.decoding.forward import decoding_model, prepare
    from research.model.build import make_model, variable_shapes

    file, fields = bench_context.SHAPES["V2-Lite"]
    settings = config.check(experiment.change(experiment.load(file), fields))
    count = parameters.count(settings)
    assert count["total"] == 15_706_484_224  # its released safetensors
    model = decoding_model(make_model(settings))

    class Shapes:
        cache_dtype = "bfloat16"

    Shapes.model = model
    Shapes.weights = jax.eval_shape(lambda v: prepare(v, model), variable_shapes(model, settings))
    read = bench_context.bytes_of_step(Shapes, 1, 100)
    cache = 100 * bytes_per_token(model, "bfloat16")
    assert cache == 100 * 27 * 576 * 2
    assert read - cache == pytest.approx(2 * count["active_without_embedding"], rel=3e-3)  # gates are in float32
    assert bench_context.bytes_of_step(Shapes, 10_000, 0) > 2 * (count["total"] - 102400 * 2048)


def test_the_peer_is_found_as_training_finds_it(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "PARITY_PYTHON", tmp_path / "python")
    assert bench.find_peer(None) is None
