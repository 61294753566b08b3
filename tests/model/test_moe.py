"""The gate's choices and weights, and the layer, against sorting and counting."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from research.model.moe import MixtureOfExperts, choose_experts, gate_weights, groups_reached, in_turn
from research.precision.products import Products
from research.precision.recipe import RECIPES
from research.tree import paths
from tests import tiny
from tests.model import reference

X, E = 7, 12
ROUTERS = {  # name: what differs from the tiny model
    "groups": {},  # noaux_tc: four groups of three, two kept
    "one group": {"model.n_group": 1, "model.topk_group": 1},
    "groups of one": {"model.n_group": 12, "model.topk_group": 5, "model.num_experts_per_tok": 3},
    "all of the kept groups": {"model.n_group": 6, "model.topk_group": 2, "model.num_experts_per_tok": 4},
    "maximum of a group": {"model.topk_method": "group_limited_greedy", "model.scoring_func": "softmax",
                           "model.norm_topk_prob": False, "model.routed_scaling_factor": 16.0},
    "greedy": {"model.topk_method": "greedy", "model.num_experts_per_tok": 5},
    "all experts": {"model.n_group": 1, "model.topk_group": 1, "model.num_experts_per_tok": 12},
    "multiplicative": {"model.bias_form": "multiplicative"},
}


@functools.cache
def router(name):
    return tiny.settings({"model.n_routed_experts": E} | ROUTERS[name]).model


@functools.cache
def chooser(name):
    config = router(name)
    return jax.jit(lambda affinity_XE, bias_E: choose_experts(affinity_XE, bias_E, config))


def affinities(seed=0, tokens=X):
    return np.random.default_rng(seed).uniform(0.05, 0.95, (tokens, E)).astype(np.float32)


coarse = st.integers(1, 15).map(lambda n: np.float32(n / 16))  # exact sums, and many ties
signed = st.integers(-32, 32).map(lambda n: np.float32(n / 16))


@pytest.mark.parametrize("name", ROUTERS)
@hypothesis.settings(max_examples=40)
@hypothesis.given(data=st.data())
def test_choice_equals_sorting(name, data):
    """Groups, then experts, best first, ties to the lower index; distinct and inside the kept groups."""
    affinity_XE = data.draw(arrays(np.float32, (X, E), elements=coarse))
    bias_E = data.draw(arrays(np.float32, E, elements=signed))
    chosen_XK = np.asarray(chooser(name)(affinity_XE, bias_E))
    expected = [reference.choose(affinity_E, bias_E, router(name)) for affinity_E in affinity_XE]
    np.testing.assert_array_equal(chosen_XK, expected)
    assert all(len(set(row)) == len(row) for row in chosen_XK.tolist())


@pytest.mark.parametrize("name", ["groups", "maximum of a group", "multiplicative"])
def test_experts_outside_the_kept_groups_are_never_chosen_whatever_the_sign(name):
    """With every biased affinity negative, a mask of 0 would choose exactly the experts that are masked."""
    affinity_XE = affinities()
    bias_E = np.full(E, -2, np.float32)
    chosen_XK = np.asarray(chooser(name)(affinity_XE, bias_E))
    biased = affinity_XE * bias_E if name == "multiplicative" else affinity_XE + bias_E
    best = np.sort(biased.reshape(X, 4, 3), axis=-1)[..., ::-1]
    score_XG = best[..., 0] if name == "maximum of a group" else best[..., 0] + best[..., 1]
    kept_XG = np.argsort(-score_XG, axis=-1, kind="stable")[:, :2]
    for chosen, kept in zip(chosen_XK, kept_XG, strict=True):
        assert set(chosen // 3) <= set(kept)


@pytest.mark.parametrize("name", ["groups", "groups of one", "all of the kept groups", "greedy"])
def test_a_token_reaches_the_nodes_of_its_experts_once_each(name):
    config = router(name)
    chosen_XK = np.asarray(chooser(name)(affinities(), np.zeros(E, np.float32)))
    expected = [len({expert // (E // config.n_group) for expert in row}) for row in chosen_XK.tolist()]
    np.testing.assert_array_equal(groups_reached(chosen_XK, config), expected)
    assert name == "greedy" or max(expected) <= config.topk_group


def test_copies_take_an_experts_tokens_in_turn():
    """By hand: expert 0 has one copy, 1 three, 2 two; the token's index says which."""
    slots_EC = jnp.array([[4, -1, -1], [0, 3, 5], [2, 1, -1]])
    slots_XK = in_turn(jnp.array([[0, 1], [1, 2], [2, 1], [1, 0], [0, 2]]), slots_EC)
    np.testing.assert_array_equal(slots_XK, [[4, 0], [3, 1], [2, 5], [0, 4], [4, 2]])


def test_v3_counts_a_groups_two_best_and_v2_its_best():
    affinity_1E = np.array([[0.9, 0.1, 0.1, 0.6, 0.6, 0.1, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1]], np.float32)
    zeros_E = np.zeros(E, np.float32)
    for name, first_choice, changes in (("two best", 3, {}),
                                        ("best", 0, {"model.topk_method": "group_limited_greedy"})):
        config = tiny.settings({"model.n_routed_experts": E, "model.topk_group": 1} | changes).model
        assert np.asarray(choose_experts(affinity_1E, zeros_E, config))[0, 0] == first_choice, name


def test_ties_go_to_the_lower_index():
    chosen_XK = np.asarray(chooser("groups")(np.full((X, E), 0.5, np.float32), np.zeros(E, np.float32)))
    np.testing.assert_array_equal(chosen_XK, [[0, 1]] * X)


@pytest.mark.parametrize("name", ROUTERS)
def test_weights_are_unbiased_affinities(name):
    config, affinity_XE = router(name), affinities()
    indices_XK = np.stack([np.random.default_rng(t).permutation(E)[:3] for t in range(X)]).astype(np.int32)
    actual = gate_weights(affinity_XE, indices_XK, config)
    for t in range(X):
        expected = affinity_XE[t, indices_XK[t]].astype(np.float64)
        if config.norm_topk_prob:
            expected = expected / expected.sum()
        np.testing.assert_allclose(actual[t], expected * config.routed_scaling_factor, rtol=1e-6)


def test_a_factor_and_a_sum():
    """Renormalised weights sum to the scaling factor; the others are the affinities times it."""
    affinity_XE = affinities()
    indices_XK = np.asarray(chooser("groups")(affinity_XE, np.zeros(E, np.float32)))
    np.testing.assert_allclose(gate_weights(affinity_XE, indices_XK, router("groups")).sum(-1), 2.5, rtol=1e-6)
    v2 = gate_weights(affinity_XE, indices_XK, router("maximum of a group"))
    np.testing.assert_allclose(v2, 16 * np.take_along_axis(affinity_XE, indices_XK, -1), rtol=1e-6)


LAYERS = {"v3": {}, "v2": ROUTERS["maximum of a group"] | {"model.n_shared_experts": 2},
          "no shared expert": {"model.n_shared_experts": 0, "model.topk_method": "greedy"}}


@functools.cache
def mixture(name):
    """(settings, variables, compiled layer) of a layer of eight experts."""
    s = tiny.settings(LAYERS[name])
    layer = MixtureOfExperts(s.model, Products(RECIPES["float32"]))
    shapes = jax.eval_shape(layer.init, jax.random.key(0), np.ones((1, 4, 16), np.float32), np.ones((1, 4), bool))
    variables = tiny.filled(shapes, 0)
    if "routing" in variables:
        variables["routing"] = jax.tree.map(jnp.zeros_like, variables["routing"])
    return s, variables, jax.jit(layer.apply)


def rows(seed=0, B=3, T=10):
    valid_BT = np.ones((B, T), bool)
    valid_BT[1, 6:] = False
    return np.random.default_rng(seed).normal(size=(B, T, 16)).astype(np.float32), valid_BT


@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_a_loop_over_tokens(name):
    s, variables, apply = mixture(name)
    x_BTD, valid_BT = rows()
    y_BTD, routing = apply(variables, x_BTD, valid_BT)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    loads = np.zeros(8)
    for row in range(3):
        y, chosen, affinity = reference.mixture(x_BTD[row].astype(np.float64), params, np.zeros(8), s.model)
        tiny.assert_close(y_BTD[row], y, rtol=1e-4, atol=1e-5)
        tiny.assert_close(routing["affinity"][row], affinity)
        np.testing.assert_array_equal(routing["indices"][row], chosen)
        for t in np.flatnonzero(valid_BT[row]):
            loads[chosen[t]] += 1
    np.testing.assert_array_equal(routing["loads"], loads)


def test_a_constant_bias_changes_nothing():
    _, variables, apply = mixture("v3")
    x_BTD, valid_BT = rows()
    plain = apply(variables, x_BTD, valid_BT)
    shifted = jax.tree.map(lambda bias: bias - 2, variables["routing"])
    tiny.assert_close(apply({**variables, "routing": shifted}, x_BTD, valid_BT), plain)


def test_the_bias_moves_choices_and_loads():
    _, variables, apply = mixture("v3")
    x_BTD, valid_BT = rows()
    favoured = jax.tree.map(lambda bias: bias.at[np.array([2, 5])].add(4), variables["routing"])
    routing = apply({**variables, "routing": favoured}, x_BTD, valid_BT)[1]
    assert {tuple(sorted(row)) for row in np.asarray(routing["indices"]).reshape(-1, 2).tolist()} == {(2, 5)}
    np.testing.assert_array_equal(routing["loads"], np.where(np.isin(np.arange(8), [2, 5]), valid_BT.sum(), 0))


def test_under_random_routing_every_expert_receives_tokens_and_a_gradient():
    s, variables, _ = mixture("v3")
    layer = MixtureOfExperts(s.model, Products(RECIPES["float32"]))
    x_BTD, valid_BT = rows(B=8, T=32)[0], np.ones((8, 32), bool)

    @jax.jit
    def gradients(variables):
        def total(variables):
            y_BTD, routing = layer.apply(variables, jnp.asarray(x_BTD), valid_BT)
            return (y_BTD ** 2).sum() + routing["balance_loss"], routing["loads"]
        return jax.grad(total, has_aux=True)(variables)

    gradient, loads = gradients(variables)
    assert np.min(loads) > 0 and np.sum(loads) == 8 * 32 * 2
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert np.all(np.max(np.abs(gradient["params"][name]), axis=(1, 2)) > 0), name
    assert np.max(np.abs(gradient["params"]["gate"]["kernel"])) > 0
    np.testing.assert_array_equal(gradient["routing"]["gate"]["e_score_correction_bias"], np.zeros(8))


def test_the_bias_is_state_and_not_a_parameter():
    _, variables, _ = mixture("v3")
    assert not [path for path in paths(variables["params"]) if "bias" in path]
    assert [path for path in paths(variables["routing"])] == ["gate/e_score_correction_bias"]
    for name in ("v2", "no shared expert"):  # chosen without a bias
        assert "routing" not in mixture(name)[1]
