"""Group advantages and the objective: by hand, against the papers' gradient, and against finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.distillation.grpo import FORMS, group_advantages, loss, rewards

B, T = 4, 5
MASK = np.array([[0, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], bool)  # the last drew nothing


@pytest.fixture(scope="module")
def inputs():
    """(logp, old, reference, advantages): ratios on both sides of both clips; nonsense where nothing was drawn."""
    rng = np.random.default_rng(0)
    logp, old, reference = (-1.5 + 0.4 * rng.normal(size=(3, B, T))).astype(np.float32)
    old[~MASK], reference[~MASK] = -np.inf, np.nan
    return logp, old, reference, np.array([1.2, -0.7, -1.1, 0.6], np.float32)


def test_a_group_by_hand():
    assert np.asarray(rewards([True, True, False], [True, False, False])).tolist() == [2, 1, 0]
    advantage = np.asarray(group_advantages([[2.0, 0, 0, 2], [1, 0, 0, 0]]))
    np.testing.assert_allclose(advantage[0], [1, -1, -1, 1], rtol=1e-6)
    np.testing.assert_allclose(advantage[1], np.array([3, -1, -1, -1]) / np.sqrt(3), rtol=1e-6)


def test_a_group_of_equal_rewards_is_zero_whatever_rounds():
    reward_QG = jnp.stack([jnp.full(7, value) for value in (0.0, 0.1, 1.7, 1e6 + 0.3)])
    assert np.asarray(group_advantages(reward_QG)).tolist() == np.zeros((4, 7)).tolist()


def test_token_level_by_hand():
    """One sample of two tokens: ratio 1.5 with its gain clipped at 1.2, ratio 0.5; rho 2 and 1."""
    old = np.log([[0.2, 0.4]])
    logp = np.log([[0.3, 0.2]])
    reference = np.log([[0.6, 0.2]])
    value, metrics = loss(logp, old, reference, np.array([2.0]), [[True, True]], form="token", clip=0.2, kl_weight=0.1)
    kl = np.array([2 - np.log(2) - 1, 0])
    np.testing.assert_allclose(-value, np.mean(np.array([1.2, 0.5]) * 2 - 0.1 * kl), rtol=1e-6)
    expected = {"kl": np.mean(kl), "ratio": 1.0, "clipped": 0.5}
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(expected, rel=1e-6)
    value, _ = loss(logp, old, reference, np.array([-2.0]), [[True, True]], form="token", clip=0.2, kl_weight=0.0)
    np.testing.assert_allclose(-value, -2 * np.mean([1.5, 0.8]), rtol=1e-6)  # a loss is clipped from below alone


def test_sequence_level_by_hand():
    """The same two tokens as one: ratio 0.75, rho 2, and no division by the length."""
    value, metrics = loss(np.log([[0.3, 0.2]]), np.log([[0.2, 0.4]]), np.log([[0.6, 0.2]]), np.array([2.0]),
                          [[True, True]], form="sequence", clip=0.2, kl_weight=0.1)
    np.testing.assert_allclose(-value, 0.75 * 2 - 0.1 * (1 - np.log(2)), rtol=1e-6)
    expected = {"kl": 1 - np.log(2), "ratio": 0.75, "clipped": 0}
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_the_first_update_is_the_policy_gradient(form, inputs):
    """Where the policy drew the samples itself, every ratio is 1, and a token's coefficient is A + beta (rho - 1)."""
    logp, _, reference, advantage_B = inputs
    run = partial(loss, form=form, clip=0.2, kl_weight=0.3)
    (_, metrics), gradient = jax.value_and_grad(run, has_aux=True)(logp, logp, reference, advantage_B, MASK)
    assert metrics["ratio"] == 1 and metrics["clipped"] == 0
    back = np.where(MASK, reference - logp, 0)
    rho = np.exp(back if form == "token" else back.sum(axis=1, keepdims=True))
    share = MASK / np.maximum(MASK.sum(axis=1, keepdims=True), 1) if form == "token" else MASK
    np.testing.assert_allclose(-gradient, share * (advantage_B[:, None] + 0.3 * (rho - 1)) / B, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_agrees_with_finite_differences(form, inputs):
    logp, old, reference, advantage_B = inputs
    run = jax.jit(partial(loss, form=form, clip=0.2, kl_weight=0.3))
    (value, metrics), gradient = jax.value_and_grad(run, has_aux=True)(logp, old, reference, advantage_B, MASK)
    assert np.isfinite(value) and 0 < metrics["clipped"] < 1 and metrics["kl"] > 0
    step = 1e-2
    moved = logp + step * np.eye(B * T, dtype=np.float32).reshape(-1, B, T) * np.array([1, -1])[:, None, None, None]
    values = jax.vmap(jax.vmap(lambda x: run(x, old, reference, advantage_B, MASK)[0]))(moved.astype(np.float32))
    np.testing.assert_allclose(gradient, ((values[0] - values[1]) / (2 * step)).reshape(B, T), rtol=2e-3, atol=2e-4)
    assert np.all(np.asarray(gradient)[~MASK] == 0)


@pytest.mark.parametrize("form", FORMS)
def test_a_sample_far_away_stays_finite(form):
    logp = np.full((1, 3), -200, np.float32)
    for old, reference in ((-0.1, -0.1), (-400.0, -400.0)):
        run = partial(loss, form=form, clip=0.2, kl_weight=0.1)
        (value, _), gradient = jax.value_and_grad(run, has_aux=True)(
            logp, np.full_like(logp, old), np.full_like(logp, reference), np.array([-1.0]), np.ones((1, 3), bool))
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_an_unknown_form_is_refused(inputs):
    with pytest.raises(ValueError, match="form='word' is none of token, sequence"):
        loss(*inputs, MASK, form="word", clip=0.2, kl_weight=0.0)
