"""Latent and grouped-query attention, with their projections, against a loop over tokens."""

import jax
import numpy as np
import pytest

from research.model.attention import ATTENTION
from research.precision.products import Products
from research.precision.recipe import RECIPES
from tests import tiny
from tests.model import reference

B, T, D = 2, 9, 16
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8]], np.int32)
CASES = {
    "latent": ({"model.attention": "mla"}, reference.latent_attention),
    "latent, compressed queries": ({"model.attention": "mla", "model.q_lora_rank": 10}, reference.latent_attention),
    "grouped": ({"model.attention": "gqa"}, reference.grouped_attention),
    "grouped, with biases": ({"model.attention": "gqa", "model.attention_bias": True}, reference.grouped_attention),
    "a head width that is not width/heads": ({"model.attention": "gqa", "model.head_dim": 6,
                                              "model.num_attention_heads": 6, "model.num_key_value_heads": 2},
                                             reference.grouped_attention),
}


def layer_of(changes):
    s = tiny.settings(changes)
    layer = ATTENTION[s.model.attention](s.model, Products(RECIPES["float32"]))
    x_BTD = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x_BTD, SEGMENTS, POSITIONS)["params"]
    return s.model, layer, tiny.filled(shapes, 2), x_BTD


@pytest.mark.parametrize("name", CASES)
def test_equals_a_loop_over_tokens(name):
    changes, expected_of = CASES[name]
    config, layer, params, x_BTD = layer_of(changes)
    actual = jax.jit(layer.apply)({"params": params}, x_BTD, SEGMENTS, POSITIONS)
    exact = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    expected = [expected_of(x_BTD[b].astype(np.float64), exact, config, SEGMENTS[b], POSITIONS[b]) for b in range(B)]
    tiny.assert_close(actual, np.stack(expected), rtol=1e-4, atol=1e-5)


def test_the_rotary_key_is_one_for_all_heads_and_is_not_normalised():
    config, _, params, _ = layer_of({"model.attention": "mla"})
    shapes = jax.tree.map(lambda p: p.shape, params)
    R, P, N = config.kv_lora_rank, config.qk_rope_head_dim, config.num_attention_heads
    assert shapes["kv_a_proj_with_mqa"]["kernel"] == (D, R + P)
    assert shapes["kv_a_layernorm"]["scale"] == (R,)
    assert shapes["kv_b_proj"]["kernel"] == (R, N * (config.qk_nope_head_dim + config.v_head_dim))


def test_positions_matter_through_their_distance_alone():
    _, layer, params, x_BTD = layer_of({"model.attention": "mla"})
    apply = jax.jit(layer.apply)
    plain = apply({"params": params}, x_BTD, SEGMENTS, POSITIONS)
    tiny.assert_close(apply({"params": params}, x_BTD, SEGMENTS, POSITIONS + 40), plain, rtol=1e-4, atol=1e-4)
    assert np.max(np.abs(apply({"params": params}, x_BTD, SEGMENTS, 2 * POSITIONS) - plain)) > 1e-3
