"""Divergences between teacher and student: in float64 by hand, zero between equals, and from k kept tokens."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.distillation import settings
from research.distillation.logits import DIRECTIONS, divergence, divergence_from_top, keep_top

B, T, V = 2, 3, 7
BETA = 0.3
MASK = np.array([[0, 1, 1], [1, 1, 0]], bool)


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    return (2 * rng.normal(size=(2, B, T, V))).astype(np.float32)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_against_the_definition(pair, direction, temperature):
    student, teacher = (np.exp(x.astype(np.float64) / temperature) for x in pair)
    q, p = (x / x.sum(axis=-1, keepdims=True) for x in (student, teacher))
    m = BETA * p + (1 - BETA) * q
    nats_BTV = {"forward": p * np.log(p / q), "reverse": q * np.log(q / p),
                "jensen_shannon": BETA * p * np.log(p / m) + (1 - BETA) * q * np.log(q / m)}[direction]
    nats_BT = np.sum(nats_BTV, axis=-1)
    value = divergence(*pair, MASK, direction=direction, beta=BETA, temperature=temperature)
    np.testing.assert_allclose(value, temperature**2 * nats_BT[MASK].mean(), rtol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("k", [None, 3, V])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(pair, direction, k):
    logits = pair[0]
    how = {"direction": direction, "beta": BETA, "temperature": 1.5}
    target = logits if k is None else keep_top(logits, k, 1.5)
    run = partial(divergence if k is None else divergence_from_top, **how)
    value, gradient = jax.value_and_grad(run)(logits, target, MASK)
    np.testing.assert_allclose(value, 0, atol=3e-7)
    np.testing.assert_allclose(gradient, 0, atol=3e-7)
    value, gradient = jax.value_and_grad(run)(logits + np.arange(V, dtype=np.float32), target, MASK)
    assert value > 0.1 and np.abs(gradient).max() > 0.01 and np.all(np.asarray(gradient)[~MASK] == 0)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kept_tokens_bound_the_whole_from_below(pair, direction):
    student, teacher = pair
    values, gradients, how = [], [], {"direction": direction, "beta": BETA, "temperature": 2.0}
    for k in (1, 3, V - 1, V):
        kept = keep_top(teacher, k, 2.0)
        value, gradient = jax.value_and_grad(partial(divergence_from_top, **how))(student, kept, MASK)
        values.append(value)
        gradients.append(gradient)
        np.testing.assert_allclose(np.sum(np.exp(kept["logp_BTk"]), axis=-1) + np.exp(kept["rest_BT"]), 1, rtol=1e-6)
    whole, gradient = jax.value_and_grad(partial(divergence, **how))(student, teacher, MASK)
    assert np.all(np.diff(values) > -1e-6) and values[0] < 0.9 * whole
    np.testing.assert_allclose(values[-1], whole, rtol=1e-5)
    np.testing.assert_allclose(gradients[-1], gradient, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradients[-2], gradient, rtol=1e-4, atol=1e-6)  # all but one token: the rest is that one


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_gradient_agrees_with_finite_differences(pair, direction):
    student, teacher = pair
    kept, step = keep_top(teacher, 2, 1.0), 1e-2
    run = jax.jit(lambda x: divergence_from_top(x, kept, MASK, direction=direction, beta=BETA, temperature=1.0))
    along = np.random.default_rng(1).normal(size=student.shape).astype(np.float32)
    slope = (run(student + step * along) - run(student - step * along)) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(jax.grad(run)(student), along), slope, rtol=2e-3)


@pytest.mark.parametrize(("beta", "direction"), [(1e-3, "forward"), (1 - 1e-3, "reverse")])
def test_jensen_shannon_tends_to_either_direction(pair, beta, direction):
    how = {"beta": beta, "temperature": 1.0}
    wanted = divergence(*pair, MASK, direction=direction, **how)
    np.testing.assert_allclose(divergence(*pair, MASK, direction="jensen_shannon", **how) / min(beta, 1 - beta), wanted,
                               rtol=2e-2)
    assert abs(divergence(*pair[::-1], MASK, direction=direction, **how) / wanted - 1) > 0.1  # or it would say nothing


def test_a_token_that_the_teacher_never_says_costs_nothing_forward(pair):
    student, teacher = pair[0], pair[1].copy()
    teacher[..., 2] = -np.inf
    for direction in ("forward", "jensen_shannon"):
        value, gradient = jax.value_and_grad(partial(divergence, direction=direction, beta=BETA, temperature=1.0))(
            student, teacher, MASK)
        assert np.isfinite(value) and np.isfinite(gradient).all()
    assert divergence(student, teacher, MASK, direction="reverse", beta=BETA, temperature=1.0) == np.inf


def test_the_teacher_gets_no_gradient_and_an_unknown_direction_is_refused(pair):
    for direction in DIRECTIONS:
        run = partial(divergence, direction=direction, beta=BETA, temperature=1.0)
        gradient = jax.grad(run, argnums=1)(*pair, MASK)
        assert np.all(np.asarray(gradient) == 0)
    with pytest.raises(ValueError, match="direction='sideways' is none of forward, reverse, jensen_shannon"):
        divergence(*pair, MASK, direction="sideways", beta=BETA, temperature=1.0)


def test_the_config_offers_every_direction():
    assert {settings.CHOICES[f"{group}.direction"] for group in ("logits", "on_policy")} == {DIRECTIONS}
