"""One step: its loss and gradient against numpy, accumulation, the bias, the average, pinned metrics."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.training.step import init_state, loss_of, make_eval_step, make_train_step, stage_of
from research.tree import map_paths, paths
from tests import tiny
from tests.model import reference

FIELDS = {"model.bias_update_until": 1.0, "mtp.loss_weight_switch": 1.0, "model.aux_loss_alpha": 0.5}  # one that shows
IN_PIECES = {"accumulation_steps": 4, "ema_decay": 0.75}  # one compilation for both
GOLDEN = {"loss": 7.308523, "next_token_loss": 4.302711, "mtp_loss": [3.293650, 2.139839], "balance_loss": 2.190789,
          "grad_norm": 5.615602, "load_violation": 1.088889, "mtp_load_violation": [0.6, 1.133333]}


@functools.cache
def trained(accumulation_steps=1, ema_decay=0.0):
    """(settings, model, variables, compiled train step)."""
    s = tiny.settings(FIELDS | {"training.accumulation_steps": accumulation_steps, "training.ema_decay": ema_decay})
    model, variables = tiny.model(s, experts="auto")
    return s, model, variables, make_train_step(model, s)


def one_step(batch, **changes):
    """(state before, state after, metrics) of a step; the train step donates its own copy."""
    s, model, variables, train_step = trained(**changes)
    state = init_state(model, s, variables)
    after, metrics = train_step(jax.tree.map(jnp.copy, state), batch)
    return state, after, metrics


def in_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@functools.cache
def gradients():
    """(metrics, gradients) of the whole batch's loss with lambda 0.3."""
    s, model, variables, _ = trained()
    batch = tiny.batch()
    loss = functools.partial(loss_of, model=model, settings=s)
    total = float(batch["mask_BT"].sum())
    (_, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(4,))(
        {"params": variables["params"], "amax": {}}, variables["routing"], batch, total, 1, 0.3)
    return metrics, gradient["params"]


def test_the_loss_and_its_parts_equal_counting_in_numpy():
    """lambda / M * sum of depths, each over the main loss's number of targets; the balance loss once."""
    s, _, variables, _ = trained()
    exact = in_float64(variables)
    expected = reference.losses(exact["params"], exact["routing"], tiny.batch(), s, weight=0.3)
    for name, value in expected.items():
        np.testing.assert_allclose(gradients()[0][name], value, rtol=1e-5, err_msg=name)
    assert expected["balance_loss"] > 2  # two layers and two modules of about alpha or more


@pytest.mark.parametrize("part", ["layers/mlp/gate/kernel", "mtp_1/block/mlp/gate/kernel", "layers/mlp/gate_proj",
                                  "mtp_2/eh_proj/kernel", "embed_tokens", "lm_head", "norm/scale",
                                  "layers/attention/kv_a_proj_with_mqa/kernel"])
def test_the_gradient_equals_finite_differences_of_the_numpy_loss(part):
    """The balance loss's part flows, once and at its scale: alpha is so large that a factor on it shows."""
    s, _, variables, _ = trained()
    exact, batch, epsilon = in_float64(variables), tiny.batch(), 1e-5
    gradient = np.asarray(paths(gradients()[1])[part], np.float64)
    noise = np.random.default_rng(0).normal(size=gradient.shape)
    direction = gradient / np.linalg.norm(gradient) + noise / noise.size ** 0.5

    def moved(sign):
        def move(path, x):
            return x + sign * epsilon * direction if path == part else x
        return reference.losses(map_paths(move, exact["params"]), exact["routing"], batch, s, weight=0.3)["loss"]

    expected = (moved(1) - moved(-1)) / (2 * epsilon)
    assert np.sum(gradient * direction) == pytest.approx(expected, rel=2e-3)


def test_accumulation_changes_nothing():
    """Rows with 6 to 12 targets: every piece weighs by its targets, the balance loss by its rows."""
    batch = tiny.batch()
    assert len(set(batch["mask_BT"].sum(axis=1).tolist())) > 2
    before, whole, metrics = one_step(batch)
    _, parts, parts_metrics = one_step(batch, **IN_PIECES)
    tiny.assert_close(parts_metrics, metrics, rtol=1e-4, atol=1e-5)
    tiny.assert_close(parts["routing"], whole["routing"], rtol=1e-6)
    moments, expected = (paths(x["optimizer"][1].mu) for x in (parts, whole))
    tiny.assert_close(moments, expected, rtol=1e-3, atol=1e-5)  # the clipped gradient, before Adam's division
    for path, x in paths(parts["params"]).items():
        one, other = (np.asarray(y - paths(before["params"])[path]) for y in (x, paths(whole["params"])[path]))
        assert np.linalg.norm(one - other) < 0.01 * np.linalg.norm(other), path


def test_metrics_of_a_step_are_pinned():
    _, _, metrics = one_step(tiny.batch())
    for name, value in GOLDEN.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_the_bias_moves_by_the_sign_of_the_batchs_loads():
    """Of every router, by the loads that numpy counts, padding left out, and no gradient or decay besides."""
    s, _, variables, _ = trained()
    before, after, metrics = one_step(tiny.batch())
    exact = in_float64(variables)
    rows = reference.rows(exact["params"], exact["routing"], tiny.batch(), s)
    violations = {}
    for part, number in rows[0].loads:
        load = sum(row.loads[part, number] for row in rows)
        assert load.sum() == 2 * (tiny.batch()["segments_BT"] > 0).sum()
        one, other = (x["routing"][part] if part == "layers" else x["routing"][part]["block"] for x in (before, after))
        one, other = (np.asarray(x["mlp"]["gate"]["e_score_correction_bias"]) for x in (one, other))
        if part == "layers":
            one, other = one[number], other[number]
        np.testing.assert_allclose(other - one, 0.01 * np.sign(load.mean() - load), atol=1e-6)
        violations[part, number] = load.max() / load.mean() - 1
    by_layer = [violations["layers", 0], violations["layers", 1]]
    np.testing.assert_allclose(metrics["load_violation_by_layer"], by_layer, rtol=1e-5)
    np.testing.assert_allclose(metrics["load_violation"], np.mean(by_layer), rtol=1e-5)
    by_module = [violations["mtp_1", 0], violations["mtp_2", 0]]
    np.testing.assert_allclose(metrics["mtp_load_violation"], by_module, rtol=1e-5)


def test_every_parameter_moves_and_the_step_counts():
    before, after, metrics = one_step(tiny.batch())
    assert int(after["step"]) == 1 and after["ema"] is None
    for path, x in paths(after["params"]).items():
        assert np.max(np.abs(np.asarray(x) - paths(before["params"])[path])) > 0, path
    assert float(metrics["learning_rate"]) == pytest.approx(0.01)  # a warm-up of one step


def test_the_average_of_the_weights():
    before, after, _ = one_step(tiny.batch(), **IN_PIECES)
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, before["ema"], after["params"])
    tiny.assert_close(after["ema"], expected)
    tiny.assert_close(before["ema"], before["params"])


def test_the_state_is_donated():
    s, model, variables, train_step = trained()
    state = jax.tree.map(jnp.copy, init_state(model, s, variables))
    kernel = state["params"]["lm_head"]
    train_step(state, tiny.batch())
    assert kernel.is_deleted()


def test_a_batch_of_padding_alone_is_finite_and_moves_no_bias():
    batch = tiny.batch(((),) * 4)
    assert not batch["mask_BT"].any()
    before, after, metrics = one_step(batch)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((after["params"], metrics)))
    assert float(metrics["loss"]) == 0 and float(metrics["grad_norm"]) == 0
    tiny.assert_close(after["routing"], before["routing"])


def test_evaluation_sums_by_counting():
    """Nats, targets, loads, hits and targets of each depth; whole rows of padding add nothing."""
    s, model, variables, _ = trained()
    eval_step = make_eval_step(model, s)
    exact, batch = in_float64(variables), tiny.batch(((7, 5), (4, 3, 3), (12,), ()))
    sums = jax.tree.map(np.asarray, eval_step(variables["params"], variables["routing"], batch))
    rows = reference.rows(exact["params"], exact["routing"], batch, s)
    nats, hits, counts = 0.0, np.zeros(2), np.zeros(2)
    for b, row in enumerate(rows):
        segment_T = batch["segments_BT"][b]
        for i in np.flatnonzero(batch["mask_BT"][b]):
            nats -= np.log(reference.softmax(row.logits[i])[batch["targets_BT"][b, i]])
            for k in (1, 2):
                j = i + k
                if j < tiny.LENGTH and batch["mask_BT"][b, j] and segment_T[j] == segment_T[i]:
                    counts[k - 1] += 1
                    hits[k - 1] += np.argmax(row.mtp_logits[k - 1][i]) == batch["targets_BT"][b, j]
    assert sums["nats"] == pytest.approx(nats, rel=1e-5)
    assert int(sums["targets"]) == batch["mask_BT"].sum()
    np.testing.assert_array_equal(sums["mtp_hits"], hits)
    np.testing.assert_array_equal(sums["mtp_targets"], counts)
    for part, number in rows[0].loads:
        load = sums["loads"]["layers"][number] if part == "layers" else sums["loads"]["mtp"][int(part[4:]) - 1]
        np.testing.assert_array_equal(load, sum(row.loads[part, number] for row in rows))


def test_without_experts_and_without_multi_token_modules():
    s = tiny.settings(tiny.DENSE)
    model, variables = tiny.model(s)
    after, metrics = make_train_step(model, s)(init_state(model, s, variables), tiny.batch())
    assert after["routing"] == {} and metrics["mtp_loss"].shape == (0,)
    assert float(metrics["loss"]) == float(metrics["next_token_loss"]) and float(metrics["balance_loss"]) == 0
    assert "load_violation" not in metrics


def test_a_stages_head_has_one_gradient_for_which_its_layers_wait():
    """Of the main head and two depths; each product of its own would hold its logits and a whole gradient."""
    s, model, variables, _ = trained()
    batch, params = tiny.batch(), variables["params"]
    stage = stage_of(model, s, 4, 1.0, 1.0)

    def backward(params, received_BTD, dy_BTD):
        _, transpose, _ = jax.vjp(lambda *x: stage.whole(x[0], variables["routing"], x[1], batch, True, True), params,
                                  received_BTD, has_aux=True)
        return transpose((dy_BTD, jnp.ones(())))

    x_BTD = jnp.zeros(stage.passed.shape, stage.passed.dtype)
    program = jax.make_jaxpr(backward)(params, x_BTD, x_BTD)
    assert len(re.findall(r"f32\[16,32\] = dot_general", str(program))) == 1
    _, back = (eqn for eqn in program.eqns if eqn.primitive.name == "optimization_barrier")
    assert {(4, 12, 16), (16, 32)} <= {x.aval.shape for x in back.outvars}
