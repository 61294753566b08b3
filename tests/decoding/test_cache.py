"""Decoding over a cache is the training forward pass, position by position; what a cache holds and costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import deepseek_v3
from research.config import check
from research.decoding.cache import STORAGE, UNROLLED_ROWS, bytes_per_token, empty_cache, empty_rows, write_rows
from research.decoding.forward import decoding_model, forward, head
from research.model.attention import ABSORBED_UP_TO
from research.model.build import make_model
from tests import tiny
from tests.decoding.models import built, full_forward, prepare_of

YARN = {"model.rope_scaling.type": "yarn", "model.rope_scaling.factor": 4.0,
        "model.rope_scaling.original_max_position_embeddings": 16, "model.rope_scaling.mscale_all_dim": 0.7}
MODELS = {
    "mla": {},
    "mla, compressed queries, yarn": YARN | {"model.q_lora_rank": 6},
    "gqa with biases, tied embeddings": tiny.DENSE | {"model.attention_bias": True, "model.tie_word_embeddings": True},
    "gqa, llama3": tiny.DENSE | {"model.rope_scaling.type": "llama3", "model.rope_scaling.factor": 8.0,
                                 "model.rope_scaling.original_max_position_embeddings": 16,
                                 "model.num_attention_heads": 4, "model.num_key_value_heads": 2},
}
CHUNKS = (ABSORBED_UP_TO + 4, 1, 3, 1, 1, 3, ABSORBED_UP_TO + 4)  # both sides of the absorbed path's limit
AHEAD = 3  # positions by which the second row is further than the first


def changes_of(name, more=None):
    changes = MODELS[name] | {"mtp.num_nextn_predict_layers": 0, "model.num_hidden_layers": 2} | (more or {})
    return tuple(sorted(changes.items()))


def stepper(model):
    def step(weights, rows, tokens_BT, positions_BT):
        after, _, rows = forward(model, weights, rows, tokens_BT, positions_BT)
        return head(model, weights, after), rows

    return jax.jit(step)


def step_by_step(model, weights, texts, chunks=CHUNKS, storage="float32"):
    """Logits {(row, position)}: chunk by chunk, each first with other tokens in it, which are taken back."""
    model, rng, found = decoding_model(model), np.random.default_rng(1), {}
    step, rows = stepper(model), empty_cache(model, 2, 64, storage)["layers"]
    rows = jax.tree.map(lambda x: jnp.full_like(x, 7), rows)  # what nobody has written is not zero either
    texts, at = np.asarray(texts), np.zeros(2, np.int32)
    for size in (AHEAD, *chunks):
        at_BT = at[:, None] + np.arange(size)
        wrong = rng.integers(0, tiny.VOCABULARY, (2, size))
        rows = step(weights, rows, wrong.astype(np.int32), at_BT)[1]
        logits, rows = step(weights, rows, np.take_along_axis(texts, at_BT, axis=1), at_BT)
        found |= {(b, int(at_BT[b, t])): np.asarray(logits[b, t]) for b in range(2) for t in range(size)}
        at = at + size if at[1] else np.array([0, AHEAD], np.int32)  # the first row starts again
    return found


@pytest.mark.parametrize("name", MODELS)
def test_step_by_step_equals_the_full_forward_at_every_position(name):
    _, model, weights_of = built(changes_of(name))
    variables = weights_of(3)
    texts = np.random.default_rng(0).integers(0, tiny.VOCABULARY, (2, AHEAD + sum(CHUNKS))).astype(np.int32)
    found = step_by_step(model, prepare_of(model)(variables), texts)
    expected = full_forward(model, variables, texts.tolist())[0]
    assert set(found) >= {(0, t) for t in range(sum(CHUNKS))} | {(1, t) for t in range(AHEAD + sum(CHUNKS))}
    for (b, t), logits_V in found.items():
        np.testing.assert_allclose(logits_V, expected[b, t], rtol=2e-4, atol=2e-4, err_msg=f"row {b}, position {t}")
    spread = [np.max(np.abs(expected[0, t] - expected[1, t])) for t in range(10)]
    assert min(spread) > 0.1  # positions differ by far more than the tolerance


@pytest.mark.parametrize(("storage", "most"), [("bfloat16", 0.02), ("fp8", 0.1)])
@pytest.mark.parametrize("name", ["mla", "gqa, llama3"])
def test_a_smaller_cache_costs_little(name, storage, most):
    _, model, weights_of = built(changes_of(name, {"model.n_routed_experts": 0}))
    variables = weights_of(3)
    texts = np.random.default_rng(0).integers(0, tiny.VOCABULARY, (2, AHEAD + sum(CHUNKS))).astype(np.int32)
    found = step_by_step(model, prepare_of(model)(variables), texts, (3,) * 8, storage)
    expected = full_forward(model, variables, texts.tolist())[0]
    error = np.array([found[key] - expected[key] for key in found])
    relative = np.linalg.norm(error) / np.linalg.norm([expected[key] for key in found])
    assert most / 100 < relative < most


def test_bytes_of_a_token():
    """V3: (512 + 64) * 2 bytes in 61 layers; in 8 bits 512 + 4 tiles * 4 of scales + 64 * 2."""
    v3 = make_model(check(deepseek_v3.get_config()))
    assert {storage: bytes_per_token(v3, storage) for storage in STORAGE} == {
        "float32": 140_544, "bfloat16": 70_272, "fp8": 61 * (512 + 16 + 128)}
    _, grouped, _ = built(changes_of("gqa, llama3"))
    assert bytes_per_token(grouped, "bfloat16") == 2 * 2 * (2 * 8) * 2  # layers, keys and values, heads, bytes


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("name", ["mla", "gqa, llama3"])
def test_rows_are_read_as_they_were_written_and_nothing_else_moves(name, storage):
    config, rng = built(changes_of(name))[1].config, np.random.default_rng(0)
    rows = empty_rows(config, 3, 8, storage)
    of = {key: rng.normal(size=(3, 2, *x.shape[2:])).astype(np.float32) for key, x in rows.arrays.items()}
    first_B = np.array([0, 3, 6], np.int32)
    written = jax.jit(lambda rows, new: rows.append(first_B[:, None] + np.arange(2), **new))(rows, of)
    for key, values in of.items():
        assert written.read(key).dtype == ("bfloat16" if storage == "fp8" else storage)
        expected = np.zeros((3, 8, *values.shape[2:]), np.float32)
        for b, first in enumerate(first_B):
            expected[b, first:first + 2] = values[b]
        bits = 24 if storage == "float32" else 8 if storage == "bfloat16" or key == "rope_key" else 4
        np.testing.assert_allclose(np.asarray(written.read(key), np.float32), expected,
                                   rtol=2.0**-bits + 2.0**-8 * (bits == 4), atol=2.0**-9 * (bits == 4))


def test_a_wide_batch_is_written_as_a_narrow_one():
    """More rows than are unrolled: each at its own slot, the others as they were."""
    B, S, T = UNROLLED_ROWS + 3, 9, 2
    rng = np.random.default_rng(0)
    slots, new = rng.normal(size=(B, S, 4)).astype(np.float32), rng.normal(size=(B, T, 4)).astype(np.float32)
    start_B = rng.integers(0, S - T + 1, B)
    expected = slots.copy()
    for row, start in enumerate(start_B):
        expected[row, start:start + T] = new[row]
    assert np.array_equal(jax.jit(write_rows)(slots, new, start_B), expected)
