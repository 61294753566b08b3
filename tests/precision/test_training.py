"""Training with each recipe: the loss falls, delayed scaling's histories advance, accumulation and evaluation work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.model.build import make_model
from research.precision.recipe import RECIPES
from research.training.step import abstract_state, apply_model, init_state, make_eval_step, make_train_step
from research.tree import paths
from tests import tiny

QUANTISED = [name for name, recipe in RECIPES.items() if recipe.quantized]
FIELDS = {"model.num_hidden_layers": 1, "model.first_k_dense_replace": 0, "model.n_routed_experts": 4,
          "model.n_group": 1, "model.topk_group": 1, "model.attention": "gqa", "mtp.num_nextn_predict_layers": 0,
          "training.steps": 12, "optimizer.warmup_fraction": 0.1}
VARIANTS = {"fp8_deepseek_pow2", "fp8_blockwise_gradients", "fp8_requantized", "fp8_unpromoted", "mxfp8"}


@functools.cache
def trained(recipe: str, steps: int, pieces: int = 1, experts: int = 4):
    """(settings, model, states, metrics) of steps on one batch; states are copies: a step donates its own."""
    fields = FIELDS | {"model.n_routed_experts": experts}
    s = tiny.settings(fields | {"precision.recipe": recipe, "training.accumulation_steps": pieces})
    model = make_model(s)
    batch, state = tiny.batch(), init_state(model, s, tiny.model(tiny.settings(fields))[1])  # the same for all
    step = make_train_step(model, s)
    states, metrics = [jax.tree.map(np.asarray, jax.device_get(state))], []
    for _ in range(steps):
        state, found = step(state, batch)
        states.append(jax.tree.map(np.array, jax.device_get(state)))
        metrics.append(jax.device_get(found))
    return s, model, states, metrics


def of(recipe: str):
    """Of all recipes; some without experts, which test_experts has for each: they compile in half the time."""
    return trained(recipe, 8, experts=0) if recipe in VARIANTS else trained(recipe, 8)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_loss_falls(recipe):
    """As far as in float32, to a tenth, from the same first loss to 2%; all in the state is finite; weights, their
    gradients and histories are in float32."""
    _, _, states, metrics = of(recipe)
    losses = np.array([m["loss"] for m in metrics])
    of_float32 = trained("float32", 8, experts=0) if recipe in VARIANTS else trained("float32", 8)
    floats = np.array([m["loss"] for m in of_float32[3]])
    assert losses[0] == pytest.approx(floats[0], rel=0.02)
    assert losses[-1] < 0.8 * losses[0] and losses[-1] == pytest.approx(floats[-1], rel=0.1)
    for leaf in jax.tree.leaves(states[-1]):
        assert np.all(np.isfinite(leaf)) and leaf.dtype in (np.float32, np.int32)
    for path, before in paths(states[0]["params"]).items():
        assert np.any(paths(states[-1]["params"])[path] != before), path


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_state_has_the_declared_shape(recipe):
    """What a checkpoint restores into: before the first step and, for what training returns, after it."""
    s, model, states, _ = of(recipe)

    def described(tree):
        return jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), tree)

    declared = described(abstract_state(model, s))
    assert described(states[0]) == declared and described(states[-1]) == declared
    assert bool(states[0]["amax"]) == (recipe == "fp8_delayed")


def test_without_delayed_scaling_the_state_of_it_changes_nothing():
    s, model, states, _ = trained("float32", 8)
    state, batch = states[0], tiny.batch()
    for amax in (None, {}):
        text = str(jax.make_jaxpr(lambda p, amax=amax: apply_model(model, s, p, state["routing"], batch, amax)[0])(
            state["params"]))
        assert "f8" not in text and "u8[" not in text and "bf16" not in text


class TestHistories:
    def test_each_step_puts_its_maxima_first_and_shifts_the_others(self):
        _, _, states, _ = trained("fp8_delayed", 8)
        histories = [paths(state["amax"]) for state in states]
        assert all(not np.any(h) for h in histories[0].values())
        for before, after in zip(histories, histories[1:], strict=False):
            for name, history in after.items():
                np.testing.assert_array_equal(history[..., 1:], before[name][..., :-1], err_msg=name)
                assert np.all(history[..., 0] > 0), name

    def test_every_quantised_operand_has_one(self):
        """Three of each projection, eight of each feed-forward network; of 16 steps, a row for each scanned layer."""
        found = {name: history.shape for name, history in paths(trained("fp8_delayed", 8)[2][0]["amax"]).items()}
        attention = [f"attention/{name}/history/{operand}"
                     for name in ("q_proj", "k_proj", "v_proj", "o_proj") for operand in ("x", "w", "dy")]
        network = ("x", "gate", "up", "down", "a", "dg", "du", "dy")
        dense = [f"mlp/history/{operand}" for operand in network]
        routed = dense + [f"mlp/shared_experts/history/{operand}" for operand in network]
        assert found == {f"layers/{name}": (1, 16) for name in attention + routed}

    def test_those_of_weights_are_the_weights_maxima(self):
        _, _, states, _ = trained("fp8_delayed", 8)
        for i in (0, 7):  # the weights before step i + 1
            params, after = paths(states[i]["params"]), paths(states[i + 1]["amax"])
            for layer, of in (("attention/o_proj/history/w", "attention/o_proj/kernel"),
                              ("mlp/history/gate", "mlp/gate_proj"), ("mlp/history/down", "mlp/down_proj")):
                found = after[f"layers/{layer}"][0, 0]
                assert found == np.max(np.abs(params[f"layers/{of}"]))

    def test_the_first_step_scales_itself_as_current_scaling_does(self):
        """One scale a tensor in both, but for the experts: delayed scaling has one for all of them together."""
        delayed, current = trained("fp8_delayed", 8)[3][0], trained("fp8_tensor", 8)[3][0]
        assert delayed["loss"] == pytest.approx(current["loss"], rel=5e-3)
        assert delayed["grad_norm"] == pytest.approx(current["grad_norm"], rel=0.05)

    def test_the_next_step_reads_them(self):
        """Histories a thousand times too small saturate everything, and larger ones by a power of two do little."""
        s, model, states, _ = trained("fp8_delayed", 8)
        state, batch = states[-1], tiny.batch()
        apply = jax.jit(lambda amax: apply_model(model, s, state["params"], state["routing"], batch, amax)[0])
        own = apply(state["amax"])

        def moved(factor):
            other = apply(jax.tree.map(lambda h: h * factor, state["amax"]))
            return float(jnp.linalg.norm(other - own) / jnp.linalg.norm(own))

        assert moved(2.0) < 0.2 < 0.5 < moved(1e-3)

    def test_evaluation_needs_none(self):
        s, model, states, _ = trained("fp8_delayed", 8)
        sums = make_eval_step(model, s)(states[-1]["params"], states[-1]["routing"], tiny.batch())
        nats = float(jnp.sum(sums["nats"])) / float(sums["targets"])
        assert nats == pytest.approx(trained("fp8_delayed", 8)[3][-1]["next_token_loss"], rel=0.2)


def test_pieces_of_a_batch_add_up_to_it():
    """Tiles of one token are the same in both; tiles of 128 tokens are cut by the pieces, so gradients differ by what
    E4M3 rounds, 3.7% of a product's norm, which is mostly across the gradient."""
    (*_, states, whole), (*_, apart, pieces) = trained("fp8_deepseek", 8), trained("fp8_deepseek", 1, pieces=2)
    assert pieces[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-3)
    assert pieces[0]["next_token_loss"] == pytest.approx(whole[0]["next_token_loss"], rel=1e-3)
    assert pieces[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=0.02)
    np.testing.assert_allclose(pieces[0]["load_violation"], whole[0]["load_violation"], rtol=1e-6)
    first = {name: (paths(apart[1]["params"])[name], paths(states[1]["params"])[name], before)
             for name, before in paths(apart[0]["params"]).items()}
    for name, (ours, theirs, before) in first.items():
        assert np.sum((ours - before) * (theirs - before)) > 0.8 * np.sum((theirs - before) ** 2), name
