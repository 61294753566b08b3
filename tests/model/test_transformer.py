"""The whole model against the numpy one, and what must not change its results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.model.build import variable_shapes
from tests import tiny
from tests.model import reference

FAMILIES = {
    "v3": {},
    "v2": {"model.topk_method": "group_limited_greedy", "model.scoring_func": "softmax", "model.norm_topk_prob": False,
           "model.routed_scaling_factor": 16.0, "model.q_lora_rank": 10, "model.balance_loss": "expert",
           "mtp.num_nextn_predict_layers": 0},
    "qwen2": tiny.DENSE | {"model.attention_bias": True, "model.tie_word_embeddings": True},
    "experts in every layer": {"model.first_k_dense_replace": 0, "mtp.hidden": "before_norm",
                               "data.mask_documents": False},
    "dense with a multi-token module": tiny.DENSE | {"mtp.num_nextn_predict_layers": 1},
}


@functools.cache
def prepared(name):
    """(settings, model, variables, compiled apply) of a family."""
    s = tiny.settings(FAMILIES[name])
    model, variables = tiny.model(s, experts="auto" if name == "v3" else "reference")
    apply = jax.jit(functools.partial(model.apply, attend_across=not s.data.mask_documents))
    return s, model, variables, apply


def run(apply, variables, batch):
    return apply(variables, batch["tokens_BT"], batch["segments_BT"], batch["positions_BT"])


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_the_numpy_model(name):
    s, _, variables, apply = prepared(name)
    batch = tiny.batch()
    logits_BTV, out = run(apply, variables, batch)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    rows = reference.rows(exact["params"], exact["routing"], batch, s)
    tiny.assert_close(logits_BTV, np.stack([row.logits for row in rows]), rtol=1e-3, atol=2e-5)
    assert len(out["mtp_logits"]) == s.mtp.num_nextn_predict_layers
    for k, logits in enumerate(out["mtp_logits"]):
        tiny.assert_close(logits, np.stack([row.mtp_logits[k] for row in rows]), rtol=1e-3, atol=2e-5)
    assert float(out["balance_loss"]) == pytest.approx(np.mean([row.balance for row in rows]), rel=1e-5)
    for (part, number), _ in rows[0].loads.items():
        routing = out["routing"]["layers"] if part == "layers" else out["routing"]["mtp"][int(part[4:]) - 1]
        loads = routing["loads"][number] if part == "layers" else routing["loads"]
        np.testing.assert_array_equal(loads, sum(row.loads[part, number] for row in rows), err_msg=part)


@pytest.mark.parametrize("name", ["v3", "qwen2"])
def test_packed_documents_equal_each_alone(name):
    s, _, variables, apply = prepared(name)
    batch = tiny.batch()
    logits_BTV, out = run(apply, variables, batch)
    for row, documents in enumerate(tiny.ROWS):
        start = 0
        for size in documents:
            alone = np.zeros((4, tiny.LENGTH), np.int32)  # the shape that is compiled
            alone[0, :size] = batch["tokens_BT"][row, start:start + size]
            segments_BT = np.zeros_like(alone)
            segments_BT[0, :size] = 1
            positions_BT = np.tile(np.arange(tiny.LENGTH, dtype=np.int32), (4, 1))
            expected, expected_out = apply(variables, alone, segments_BT, positions_BT)
            tiny.assert_close(logits_BTV[row, start:start + size], expected[0, :size], rtol=1e-5, atol=1e-5)
            for k, logits in enumerate(out["mtp_logits"], start=1):
                if size > k:
                    tiny.assert_close(logits[row, start:start + size - k],
                                      expected_out["mtp_logits"][k - 1][0, :size - k], rtol=1e-5, atol=1e-5)
            start += size


def test_attention_across_documents_is_a_choice():
    """Then a document's logits read the ones before it, and never the ones after it."""
    s, model, variables, apply = prepared("v3")
    across = jax.jit(functools.partial(model.apply, attend_across=True))
    batch = tiny.batch()
    masked, open_ = run(apply, variables, batch)[0], run(across, variables, batch)[0]
    first = tiny.ROWS[0][0]
    tiny.assert_close(open_[0, :first], masked[0, :first], rtol=1e-5, atol=1e-5)
    assert np.max(np.abs(open_[0, first:] - masked[0, first:])) > 1e-2


def loss_and_gradients(changes):
    """A loss that reads main logits, multi-token logits and the balance loss, with its gradient."""
    s = tiny.settings(changes)
    model = tiny.model(s)[0]
    variables = prepared("v3")[2]
    batch = tiny.batch()

    def loss(params):
        logits_BTV, out = run(model.apply, {"params": params, "routing": variables["routing"]}, batch)
        return sum(jnp.mean(jnp.sin(x)) for x in (logits_BTV, *out["mtp_logits"])) + out["balance_loss"]

    return jax.jit(jax.value_and_grad(loss))(variables["params"])


@functools.cache
def plain_loss_and_gradients():
    return loss_and_gradients({})


@pytest.mark.parametrize("changes", [{"model.remat": "up_projections", "model.scan_unroll": 0},
                                     {"model.remat": "layer", "model.scan_unroll": 3}], ids=["up_projections", "layer"])
def test_rematerialisation_and_unrolling_change_neither_value_nor_gradient(changes):
    tiny.assert_close(loss_and_gradients(changes), plain_loss_and_gradients(), rtol=1e-4, atol=1e-5)


def residuals(remat):
    """Bytes that the backward pass of one block keeps."""
    s = tiny.settings({"model.remat": remat})
    variables, batch = prepared("v3")[2], tiny.batch()
    model = tiny.model(s)[0]

    def loss(params):
        return jnp.sum(run(model.apply, {"params": params, "routing": variables["routing"]}, batch)[0])

    kept = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], variables["params"])
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))


def test_rematerialisation_keeps_less():
    assert residuals("layer") < residuals("up_projections") < residuals("none")


def test_tied_embeddings_are_one_parameter():
    s, _, variables, apply = prepared("qwen2")
    assert "lm_head" not in variables["params"]
    assert "lm_head" in prepared("v3")[2]["params"]
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(run(apply, {**variables, "params": p}, tiny.batch())[0]))))
    unused = np.setdiff1d(np.arange(tiny.VOCABULARY), tiny.batch()["tokens_BT"])
    rows = np.asarray(gradient(variables["params"])["embed_tokens"])
    assert len(unused) and np.all(np.max(np.abs(rows[unused]), axis=1) > 0)  # through the head alone


def test_the_bfloat16_recipe_is_close_and_keeps_float32_logits_and_parameters():
    s, _, variables, apply = prepared("v3")
    half = tiny.model(tiny.settings({"precision.recipe": "bfloat16"}))[0]
    batch = tiny.batch()
    logits_BTV, out = run(jax.jit(half.apply), variables, batch)
    exact = run(apply, variables, batch)[0]
    assert logits_BTV.dtype == jnp.float32 and out["hidden"].dtype == jnp.bfloat16
    first = variable_shapes(half, s)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(first))
    error = np.abs(np.asarray(logits_BTV) - exact)  # single tokens may be routed otherwise
    assert 0 < np.median(error) < 0.03 * np.std(exact)
