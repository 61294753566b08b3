"""The bias update, the balance losses and MaxVio by hand and by counting."""

import functools

import jax
import numpy as np
import pytest

from research.model.balance import balance_loss, initial_bias, load_violation, relative_load, update_bias
from tests import tiny
from tests.model import reference

E, K, B, T = 8, 2, 3, 10


@functools.cache
def config(**changes):
    return tiny.settings({f"model.{name}": value for name, value in changes.items()}).model


LOADS = np.array([8, 2, 4, 4, 0, 4, 5, 5], np.float32)  # mean 4


def step(bias, speed=0.01, loads=LOADS, **changes):
    return np.asarray(update_bias(bias, loads, config(**changes), speed))


def test_the_default_is_the_plain_sign_update():
    """An expert at the mean exactly is left alone."""
    bias = np.linspace(-1, 1, 8).astype(np.float32)
    expected = bias + np.array([-1, 1, 0, 0, 1, 0, -1, -1], np.float32) * np.float32(0.01)
    np.testing.assert_allclose(step(bias), expected, atol=1e-7)
    np.testing.assert_array_equal(step(bias, loads=np.full(8, 3, np.float32)), bias)


def test_centred_takes_the_mean_sign_off():
    signs = np.array([-1, 1, 0, 0, 1, 0, -1, -1])  # they sum to -1
    np.testing.assert_allclose(step(np.zeros(8), bias_update="centred"), 0.01 * (signs + 1 / 8), atol=1e-7)
    assert abs(step(np.zeros(8), bias_update="centred").sum()) < 1e-6 < abs(step(np.zeros(8)).sum())


def test_proportional_is_the_relative_error():
    np.testing.assert_allclose(step(np.zeros(8), bias_update="proportional"), 0.01 * (4 - LOADS) / 4, atol=1e-7)


def test_none_and_a_speed_of_zero_freeze_the_bias():
    bias = np.linspace(-1, 1, 8).astype(np.float32)
    np.testing.assert_array_equal(step(bias, bias_update="none"), bias)
    for kind in ("sign", "centred", "proportional"):
        np.testing.assert_array_equal(step(bias, speed=0.0, bias_update=kind), bias)


def test_the_multiplicative_form_starts_at_one():
    assert initial_bias(config(bias_form="multiplicative")) == 1
    assert initial_bias(config()) == 0
    expected = 1 + 0.01 * np.array([-1, 1, 0, 0, 1, 0, -1, -1])
    np.testing.assert_allclose(step(np.ones(8, np.float32), bias_form="multiplicative"), expected, atol=1e-7)


def test_stacked_layers_are_updated_each_by_its_own_loads():
    loads = np.stack([LOADS, LOADS[::-1]])
    both = step(np.zeros((2, 8), np.float32), loads=loads)
    np.testing.assert_array_equal(both, np.stack([step(np.zeros(8)), step(np.zeros(8), loads=LOADS[::-1])]))


def test_max_violation_by_hand():
    np.testing.assert_allclose(load_violation(np.array([[8, 2, 4, 2], [3, 3, 3, 3], [0, 0, 12, 0]], np.float32)),
                               [1.0, 0.0, 3.0])
    assert load_violation(np.zeros(4, np.float32)) == 0
    np.testing.assert_allclose(relative_load(np.array([[8, 2, 4, 2], [0, 0, 12, 0], [0, 0, 0, 0]], np.float32)),
                               [[2, 0.5, 1, 0.5], [0, 0, 4, 0], [0, 0, 0, 0]])


def routed(seed=0, sharp=1.0):
    """Random affinities and rows of which one has padding and one is padding alone."""
    rng = np.random.default_rng(seed)
    affinity_BTE = (1 / (1 + np.exp(-sharp * rng.normal(size=(B, T, E))))).astype(np.float32)
    valid_BT = np.ones((B, T), bool)
    valid_BT[1, 6:] = False
    indices_BTK = np.stack([[rng.permutation(E)[:K] for _ in range(T)] for _ in range(B)]).astype(np.int32)
    return affinity_BTE, indices_BTK, valid_BT


@pytest.mark.parametrize("kind", ["sequence", "batch"])
def test_a_uniform_router_gives_exactly_alpha(kind):
    """Equal affinities, and each expert among the K best equally often: here by numbering the ties away."""
    affinity_BTE = np.full((2, 4, E), 0.5, np.float32)
    for t in range(4):
        affinity_BTE[:, t, 2 * t:2 * t + 2] += np.float32(1e-7)
    loss = balance_loss(affinity_BTE, np.zeros((2, 4, K), np.int32), np.ones((2, 4), bool), config(balance_loss=kind))
    assert float(loss) == pytest.approx(0.02, rel=1e-6)


def test_a_uniform_router_gives_exactly_alpha_for_the_expert_loss():
    indices_BTK = np.arange(8).reshape(1, 4, K).astype(np.int32)
    affinity_BTE = np.full((1, 4, E), 1 / E, np.float32)
    loss = balance_loss(affinity_BTE, indices_BTK, np.ones((1, 4), bool), config(balance_loss="expert"))
    assert float(loss) == pytest.approx(0.02, rel=1e-6)


def two_sequences():
    """E = 2, K = 1, one token a sequence: the first goes to expert 0 with 3/4 of the affinity, the second to 1."""
    affinity_BTE = np.array([[[0.6, 0.2]], [[0.1, 0.3]]], np.float32)
    small = config(n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, aux_loss_alpha=1.0)
    return affinity_BTE, np.array([[[0]], [[1]]], np.int32), np.ones((2, 1), bool), small


def test_two_sequences_by_hand():
    """Each sequence alone: f = (2, 0), P = (3/4, 1/4), so 3/2; over the batch f = (1, 1), P = (1/2, 1/2), so 1."""
    affinity_BTE, indices_BTK, valid_BT, small = two_sequences()
    assert float(balance_loss(affinity_BTE, indices_BTK, valid_BT, small)) == pytest.approx(1.5)
    changes = dict(n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, aux_loss_alpha=1.0)
    assert float(balance_loss(affinity_BTE, indices_BTK, valid_BT, config(**changes, balance_loss="batch"))) == \
        pytest.approx(1.0)
    # V2: affinities as they are: 2 * 0.6 and 2 * 0.3
    assert float(balance_loss(affinity_BTE, indices_BTK, valid_BT, config(**changes, balance_loss="expert"))) == \
        pytest.approx(0.9)


def test_the_sequence_loss_counts_the_best_unbiased_affinities_whoever_was_chosen():
    """V3 Eq. 18 reads s, not s + b; V2's counts who was chosen."""
    affinity_BTE, indices_BTK, valid_BT = routed()
    others = (indices_BTK + 1) % E
    for kind, same in (("sequence", True), ("batch", True), ("expert", False)):
        one, other = (float(balance_loss(affinity_BTE, chosen, valid_BT, config(balance_loss=kind)))
                      for chosen in (indices_BTK, others))
        assert (one == other) is same, kind


def counted(affinity_BTE, indices_BTK, valid_BT, kind):
    """The loss in float64 by the counting of tests/model/reference.py."""
    affinity_BTE = affinity_BTE.astype(np.float64)
    if kind == "batch":  # one long sequence
        affinity_BTE, indices_BTK, valid_BT = (x.reshape(1, B * T, *x.shape[2:])
                                               for x in (affinity_BTE, indices_BTK, valid_BT))
    rows = [reference.balance(indices_BTK[b], affinity_BTE[b], valid_BT[b],
                              config(balance_loss="expert" if kind == "expert" else "sequence"))
            for b in range(len(valid_BT)) if valid_BT[b].any()]
    return sum(rows) / len(rows)


@pytest.mark.parametrize("kind", ["sequence", "batch", "expert"])
def test_losses_equal_counting_and_leave_padding_out(kind):
    affinity_BTE, indices_BTK, valid_BT = routed()
    loss = functools.partial(balance_loss, config=config(balance_loss=kind))
    expected = counted(affinity_BTE, indices_BTK, valid_BT, kind)
    assert float(loss(affinity_BTE, indices_BTK, valid_BT)) == pytest.approx(expected, rel=1e-5)
    elsewhere = affinity_BTE.copy()
    elsewhere[~valid_BT] = 0.99 * np.random.default_rng(9).uniform(size=(4, E))
    assert float(loss(elsewhere, indices_BTK, valid_BT)) == pytest.approx(expected, rel=1e-5)


def test_rows_of_padding_alone_count_neither_way():
    affinity_BTE, indices_BTK, valid_BT = routed()
    padding = np.concatenate([valid_BT, np.zeros((1, T), bool)])
    longer = [np.concatenate([x, x[:1]]) for x in (affinity_BTE, indices_BTK)]
    for kind in ("sequence", "batch", "expert"):
        assert float(balance_loss(*longer, padding, config(balance_loss=kind))) == \
            pytest.approx(float(balance_loss(affinity_BTE, indices_BTK, valid_BT, config(balance_loss=kind))), rel=1e-6)
        assert float(balance_loss(affinity_BTE, indices_BTK, np.zeros((B, T), bool), config(balance_loss=kind))) == 0


def test_off_is_zero():
    assert float(balance_loss(*routed(), config(balance_loss="none"))) == 0
    assert float(balance_loss(*routed(), config(aux_loss_alpha=0.0))) == 0


@pytest.mark.parametrize("kind", ["sequence", "batch", "expert"])
def test_the_gradient_equals_finite_differences_of_the_counted_loss(kind):
    """f has no gradient, P has: alpha times E / (K T) per count, through the normalisation."""
    affinity_BTE, indices_BTK, valid_BT = routed()
    actual = np.asarray(jax.grad(balance_loss)(affinity_BTE, indices_BTK, valid_BT, config(balance_loss=kind)))
    rng, epsilon = np.random.default_rng(5), 1e-6
    for _ in range(12):
        direction = rng.normal(size=affinity_BTE.shape)
        up, down = (counted(affinity_BTE + sign * epsilon * direction, indices_BTK, valid_BT, kind) for sign in (1, -1))
        expected = (up - down) / (2 * epsilon)
        size = float(np.linalg.norm(actual))
        assert size > 1e-4
        assert np.sum(actual * direction) == pytest.approx(expected, abs=1e-3 * size)
    np.testing.assert_array_equal(actual[~valid_BT], 0)
