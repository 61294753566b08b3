"""The bench of recipes: what it times, what it counts, what it says; the numbers themselves need a GPU."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import base
from research import bench_precision as bench
from research import config
from tests.commands import exit_code

SMOKE = "--config=experiments/nano.py:smoke"
LAYER = bench.Layer(256, 2, 128, 128)


def run(*arguments):
    """The command's exit code."""
    return exit_code(bench, *arguments)


@pytest.mark.parametrize("arguments, answer", [
    (["--part=layers"], "flag --part=layers: value should be one of <layer|step>"),
    (["--json={new}/deep/file.json"], "--json='{new}/deep/file.json' is not a file that can be written"),
    (["--config=experiments/nanoo.py"], "--config=experiments/nanoo.py does not exist (did you mean "),
    (["--steps=0"], "flag --steps=0: "),
    (["--step=3"], "--step is not a flag"),
])
def test_a_wrong_request_is_one_line_and_code_2(tmp_path, capsys, arguments, answer):
    assert run(*(argument.format(new=tmp_path) for argument in arguments)) == 2
    said, = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {answer.format(new=tmp_path)}")
    assert not list(tmp_path.iterdir())


def test_the_layer_is_the_same_one_under_every_recipe():
    """With equal loads, rows that lie together and weights of 1 it is the products alone."""
    x, *weights, _, _, dy = bench.layer_arguments(LAYER)
    ones, experts = jnp.ones((LAYER.rows, 1)), jnp.repeat(jnp.arange(LAYER.experts), LAYER.rows // LAYER.experts)
    arguments = x, *weights, ones, experts[:, None], dy
    y, (dx, *gradients) = jax.jit(bench.products_alone)(*arguments)
    expected = y.reshape(x.shape), dx.reshape(x.shape), *gradients
    for recipe, tolerance in ((bench.BASELINE, 0.015), (bench.RECIPE, 0.1)):
        y, (dx, *gradients) = jax.jit(bench.layer_of(recipe))(*arguments)
        for a, b in zip((y, dx, *gradients[:3]), expected, strict=True):
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b)


def test_flops_of_the_layer():
    lowered = jax.jit(bench.products_alone).lower(*jax.eval_shape(lambda: bench.layer_arguments(LAYER)))
    assert lowered.cost_analysis()["flops"] == pytest.approx(LAYER.flops, rel=0.05)  # SwiGLU's beside


def test_full_attention_counts_twice_as_much():
    c = base.get_config()
    c.model.vocab_size = 512
    m, flops = c.model, bench.flops_per_token(config.check(c))
    widths = m.qk_nope_head_dim + m.qk_rope_head_dim + m.v_head_dim
    layers = m.num_hidden_layers + c.mtp.num_nextn_predict_layers
    causal = 2 * 3 * c.data.sequence_length / 2 * widths * m.num_attention_heads * layers
    assert flops["full"] - flops["causal"] == causal and flops["causal"] > 2 * causal


def test_both_parts_on_a_cpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "SMALL", LAYER)
    path = tmp_path / "result.json"
    # one dense layer: what a recipe compiles for longest is tested elsewhere
    assert run(SMOKE, "--rounds=1", "--steps=1", f"--json={path}", f"--config.data.cache={tmp_path}/cache",
               "--config.model.num_hidden_layers=1", "--config.model.n_routed_experts=0",
               "--config.mtp.num_nextn_predict_layers=0") == 0
    said = capsys.readouterr().out
    assert "256 rows, 2 experts of 128 x 128; a small one, which says nothing about a GPU" in said
    assert "step of experiments/nano.py:smoke" in said and "512 tokens of stdlib" in said
    result = json.loads(path.read_text())
    layer, step = result["layer"]["rows"], result["step"]
    assert list(layer) == ["products", "bfloat16", "fp8_deepseek"]
    for row in layer.values():
        assert row["us_range"][0] <= row["us"] <= row["us_range"][1]
        assert row["tflops"] * row["us"] * 1e6 == pytest.approx(LAYER.flops)
    assert list(step["rows"]) == ["float32", "bfloat16", "fp8_deepseek"] and step["tokens"] == 8 * 64
    for row in step["rows"].values():
        assert row["tokens_per_second"] == pytest.approx(1e3 * 512 / row["ms"])
        for kind, mfu in row["mfu"].items():
            rate = row["tokens_per_second"] * step["flops_per_token"][kind]
            assert mfu == pytest.approx(rate / step["peak_flops"])
        for other, times in row["times_as_fast_as"].items():
            assert times == pytest.approx(step["rows"][other]["ms"] / row["ms"])
        assert row["load_violation"] == 0 and len(row["times_as_fast_as"]) == 3
