"""The experts' dispatch against its definition, and the definition against a loop over tokens."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import weight_only
from kernels.experts import experts, xla
from kernels.experts import few as kernels_few
from tests.tiny import assert_close

D, F = 8, 4


def weights_of(E, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in ((E, D, F), (E, D, F), (E, F, D))]


def inputs_of(X, E, K, choose, seed=0):
    """x, the three weights and the gate weights, and the indices that `choose(X, E, K, rng)` gives."""
    rng = np.random.default_rng(seed)
    x_XD = rng.normal(size=(X, D)).astype(np.float32)
    indices_XK = np.asarray(choose(X, E, K, rng), np.int32)
    assert indices_XK.shape == (X, K) and all(len(set(row)) == K for row in indices_XK)
    return (x_XD, *weights_of(E, seed), rng.uniform(0.1, 1, (X, K)).astype(np.float32)), indices_XK


def at_random(X, E, K, rng):
    return np.stack([rng.permutation(E)[:K] for _ in range(X)])


def same_for_all(X, E, K, rng):  # what ties give: the lowest indices
    return np.tile(np.arange(K), (X, 1))


def the_last_for_all(X, E, K, rng):
    return np.tile(np.arange(E)[::-1][:K], (X, 1))


def few(X, E, K, rng):  # the others stay empty
    return 1 + at_random(X, K + 1, K, rng)


def skewed(X, E, K, rng):
    wish_E = np.arange(1, E + 1) ** 3 / np.sum(np.arange(1, E + 1) ** 3)
    return [rng.choice(E, K, replace=False, p=wish_E) for _ in range(X)]


def uneven(X, E, K, rng):  # most pairs have slots, one expert's load is nearly twice the mean
    wish_E = np.where(np.arange(E) == E // 2, 2, 1) / (E + 1)
    return [rng.choice(E, K, replace=False, p=wish_E) for _ in range(X)]


def full(X, E, K, rng):  # the buffer of rows: every last tile is nearly empty, but the last expert's
    return np.minimum(np.arange(X), E - 1)[:, None]


CASES = {  # name: tokens, experts, chosen, who chooses what; equal shapes share a compilation
    "random": (48, 8, 2, at_random),
    "ties": (48, 8, 2, same_for_all),
    "two experts take all": (48, 8, 2, the_last_for_all),
    "empty experts": (48, 8, 2, few),
    "skewed": (48, 8, 2, skewed),
    "one of all takes everything": (48, 8, 1, the_last_for_all),
    "all chosen": (12, 4, 4, at_random),
    "one expert": (10, 1, 1, at_random),
    "one token": (1, 8, 2, at_random),
    "more experts than tokens": (5, 64, 3, at_random),
    "odd numbers": (37, 7, 3, at_random),
    "odd numbers, skewed": (37, 7, 3, skewed),
    "a full buffer": (76, 8, 1, full),
    "tiles of all sizes": (1021, 8, 2, skewed),
    "tiles of all sizes beside slots": (1021, 8, 2, uneven),
}


@partial(jax.jit, static_argnames=("implementation", "formats", "pairs"))
def value_and_gradients(inputs, indices_XK, dy_XD, implementation, formats=("float32",) * 3, pairs=None):
    def value(x, gate, up, down, weights):
        return experts(x, gate, up, down, indices_XK, weights, formats=formats, implementation=implementation,
                       pairs=pairs)

    y_XD, backward = jax.vjp(value, *inputs)
    return y_XD, dict(zip(("x", "gate", "up", "down", "weights"), backward(dy_XD.astype(y_XD.dtype)), strict=True))


def output_gradient(X, seed=1):
    return np.random.default_rng(seed).normal(size=(X, D)).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_dispatch_equals_the_definition_in_value_and_gradient(name):
    inputs, indices_XK = inputs_of(*CASES[name])
    dy_XD = output_gradient(len(indices_XK))
    actual = value_and_gradients(inputs, indices_XK, dy_XD, "xla")
    assert_close(actual, value_and_gradients(inputs, indices_XK, dy_XD, "reference"))


@pytest.mark.parametrize("name", CASES)
def test_few_tokens_equal_the_definition(name):
    """Pair by pair, whatever their number is: ties, empty experts, one expert. In C++, where there is a compiler, and
    in XLA."""
    (x_XD, gate, up, down, weights_XK), indices_XK = inputs_of(*CASES[name])
    arguments = x_XD, gate, up, down, indices_XK, weights_XK
    expected = experts(*arguments, implementation="reference")
    for few_experts in (kernels_few.experts, kernels_few.in_xla):
        actual = jax.jit(few_experts)(*arguments)
        assert actual.dtype == jnp.float32
        assert_close(actual, expected)


@pytest.mark.parametrize("X, K, D, F", [(1, 4, 192, 96), (3, 2, 211, 117), (2, 1, 600, 300), (0, 2, 8, 4),
                                        (1, 1, 1, 1)])
def test_few_tokens_of_any_width(X, K, D, F):
    """Vectors and what fills none, alone and with other threads; the same bits however many call at once, within a
    loop, and whatever other tokens there are."""
    rng = np.random.default_rng(0)
    x_XD, gate, up, down, weights_XK = (rng.normal(size=size).astype(np.float32) for size in (
        (X, D), (8, D, F), (8, D, F), (8, F, D), (X, K)))
    indices_XK = np.asarray(at_random(X, 8, K, rng), np.int32).reshape(X, K) if X else np.zeros((0, K), np.int32)

    @jax.jit
    def thrice(*arguments):
        return jax.lax.scan(lambda _, x: (None, kernels_few.experts(*arguments)), None, jnp.arange(3))[1]

    arguments = x_XD, gate, up, down, indices_XK, weights_XK
    hidden_XKF = [[x @ gate[e] / (1 + np.exp(-x @ gate[e])) * (x @ up[e]) for e in own]
                  for x, own in zip(x_XD.astype(np.float64), indices_XK, strict=True)]
    expected = [sum(weight * (a_F @ down[e]) for weight, a_F, e in zip(*of, strict=True))
                for of in zip(weights_XK, hidden_XKF, indices_XK, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        y_3XD, *others = pool.map(lambda _: np.asarray(thrice(*arguments)), range(8))
    assert y_3XD.shape == (3, X, D)
    for y in [*y_3XD, *(y for other in others for y in other)]:
        np.testing.assert_array_equal(y, y_3XD[0])
    if X:
        np.testing.assert_allclose(y_3XD[0], expected, atol=3e-5 * np.abs(expected).max())
        one = kernels_few.experts(x_XD[-1:], gate, up, down, indices_XK[-1:], weights_XK[-1:])
        np.testing.assert_array_equal(one[0], y_3XD[0, -1])


def test_inference_takes_pairs_one_by_one_up_to_the_number_of_experts():
    """More of them go the way of training, with the same result; both read bfloat16 as it is kept."""
    for X, pairs in ((4, True), (5, False)):
        (x_XD, gate, up, down, weights_XK), indices_XK = inputs_of(X, 8, 2, at_random)
        half = [jnp.asarray(w, jnp.bfloat16) for w in (x_XD, gate, up, down)]
        run = partial(experts, formats=("bfloat16",) * 3, implementation="inference")
        y_XD = run(*half, jnp.asarray(indices_XK), jnp.asarray(weights_XK))
        exact = [np.asarray(w, np.float32) for w in half]
        expected = experts(*exact, indices_XK, weights_XK, implementation="reference")
        assert relative_error(y_XD, np.asarray(expected)) < 1e-2
        assert (" sort[" not in str(jax.make_jaxpr(run)(*half, jnp.asarray(indices_XK), weights_XK))) == pairs


def test_the_definition_equals_a_loop_over_tokens():
    (x_XD, gate, up, down, weights_XK), indices_XK = inputs_of(48, 8, 2, at_random)
    expected = np.zeros_like(x_XD)
    for token, x in enumerate(x_XD):
        for e, weight in zip(indices_XK[token], weights_XK[token], strict=True):
            g = x @ gate[e]
            expected[token] += weight * ((g / (1 + np.exp(-g)) * (x @ up[e])) @ down[e])
    actual = value_and_gradients((x_XD, gate, up, down, weights_XK), indices_XK, expected, "reference")[0]
    assert_close(actual, expected)


def test_the_default_implementation_is_dropless():
    """`auto` on this backend, with a load far above any mean."""
    inputs, indices_XK = inputs_of(*CASES["two experts take all"])
    dy_XD = output_gradient(len(indices_XK))
    assert_close(value_and_gradients(inputs, indices_XK, dy_XD, "auto"),
                 value_and_gradients(inputs, indices_XK, dy_XD, "reference"))


@pytest.mark.parametrize("remat", [False, True])
def test_inside_a_scan_over_stacked_layers(remat):
    """Three layers, each with its own routing, compiled as one scan, kept or computed again for the backward pass."""
    L, X, E, K = 3, 24, 4, 2
    layers = [inputs_of(X, E, K, at_random if seed else the_last_for_all, seed=seed) for seed in range(L)]
    x_XD = layers[0][0][0]
    stacked = [np.stack([inputs[part] for inputs, _ in layers]) for part in range(1, 5)]
    indices_LXK = np.stack([indices for _, indices in layers])

    def loss(x_XD, stacked, implementation):
        def layer(x_XD, inputs):
            *weights, gates_XK, indices_XK = inputs
            y_XD = experts(x_XD, *weights, indices_XK, gates_XK, implementation=implementation)
            return x_XD + jnp.tanh(y_XD), None

        layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer
        return jnp.sum(jax.lax.scan(layer, x_XD, (*stacked, indices_LXK))[0] ** 2)

    actual, expected = (jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)(x_XD, stacked, implementation)
                        for implementation in ("xla", "reference"))
    assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def relative_error(actual, expected):
    return float(np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected))


def test_bfloat16_is_close_and_keeps_the_dtypes():
    inputs, indices_XK = inputs_of(*CASES["skewed"])
    dy_XD = output_gradient(len(indices_XK))
    half = (jnp.asarray(inputs[0], jnp.bfloat16), *inputs[1:])
    value, gradients = value_and_gradients(half, indices_XK, dy_XD, "xla", ("bfloat16",) * 3)
    exact_value, exact = value_and_gradients(inputs, indices_XK, dy_XD, "reference")
    assert 1e-4 < relative_error(value, exact_value) < 1e-2
    for name, gradient in gradients.items():
        assert 1e-4 < relative_error(gradient, exact[name]) < 2e-2, name
        assert gradient.dtype == (jnp.bfloat16 if name == "x" else jnp.float32), name


@pytest.mark.parametrize("case", ["random", "two experts take all"])
def test_each_format_is_that_of_its_product(case):
    """A coarse weight-gradient product leaves value and input gradients as they are, and so on."""
    inputs, indices_XK = inputs_of(*CASES[case])
    dy_XD = output_gradient(len(indices_XK))
    exact_value, exact = value_and_gradients(inputs, indices_XK, dy_XD, "xla")
    value, gradients = value_and_gradients(inputs, indices_XK, dy_XD, "xla", ("float32", "float32", "bfloat16"))
    assert_close((value, gradients["x"], gradients["weights"]), (exact_value, exact["x"], exact["weights"]))
    assert all(relative_error(gradients[name], exact[name]) > 1e-4 for name in ("gate", "up", "down"))
    value, gradients = value_and_gradients(inputs, indices_XK, dy_XD, "xla", ("float32", "bfloat16", "float32"))
    assert_close(value, exact_value)
    assert all(relative_error(gradients[name], exact[name]) > 1e-4 for name in ("x", "gate", "up"))


def flops(E, implementation, X=2048, K=2):
    """Of the lowered value and gradients at random routing. A loop's body counts once."""
    inputs, indices_XK = inputs_of(X, E, K, at_random)
    lowered = value_and_gradients.lower(inputs, indices_XK, output_gradient(X), implementation=implementation)
    return lowered.cost_analysis()["flops"]


def test_cost_does_not_grow_with_the_number_of_experts():
    few_experts, many_experts = flops(8, "xla"), flops(128, "xla")
    least = 3 * 3 * 2 * 2048 * 2 * D * F  # three products of three passes: less means that work hides in a loop
    assert few_experts > least
    assert many_experts < 1.3 * few_experts
    assert flops(128, "reference") > 10 * many_experts  # the count sees a dense implementation


@pytest.mark.parametrize("name, slots", [("random", True), ("ties", False), ("tiles of all sizes", False),
                                         ("tiles of all sizes beside slots", True)])
def test_slots_are_left_out_where_they_would_stay_empty(name, slots):
    X, E, K, choose = CASES[name]
    indices_XK = inputs_of(X, E, K, choose)[1]
    capacity, tiles = xla.capacity_and_tiles(X * K, E)
    plan = xla.make_plan(jnp.asarray(indices_XK), E, capacity, tiles)
    assert plan.slots_used == slots
    if len(tiles) > 1:
        assert np.all(np.sum(plan.tiles_UE, axis=1) > 0) or slots
    rows = np.asarray(plan.row_XK)
    assert len(np.unique(rows)) == X * K  # a row each
    np.testing.assert_array_equal(np.asarray(plan.pair_R)[rows.reshape(-1)], np.arange(X * K))


@pytest.mark.parametrize("name", ["random", "two experts take all"])
def test_pairs_without_an_expert_are_nowhere(name):
    """Half of the pairs name none, by the index E: output and gradients are those of gate weights of zero, in as many
    rows as the others take."""
    (*inputs, weights_XK), indices_XK = inputs_of(*CASES[name])
    dy_XD, named_XK = output_gradient(len(indices_XK)), np.random.default_rng(1).uniform(size=indices_XK.shape) < 0.5
    expected, gradients = value_and_gradients((*inputs, np.where(named_XK, weights_XK, 0)), indices_XK, dy_XD,
                                              "reference")
    gradients["weights"] = np.where(named_XK, gradients["weights"], 0)
    actual = value_and_gradients((*inputs, weights_XK), np.where(named_XK, indices_XK, 8), dy_XD, "xla",
                                 pairs=(indices_XK.size // 2, int(np.sum(named_XK))))
    assert_close(actual, (expected, gradients))


@pytest.mark.parametrize("X, choose", [(1, at_random), (5, few), (40, skewed), (40, same_for_all)])
@pytest.mark.parametrize("format", ["int8", "e4m3"])
def test_narrow_experts_are_those_of_their_dequantised_weights(X, choose, format):
    (x_XD, *w, weights_XK), indices_XK = inputs_of(X, 16, 3, choose)
    narrow = [jax.vmap(partial(weight_only.quantize, format=format))(jnp.asarray(each)) for each in w]
    y_XD = jax.jit(experts)(x_XD, *narrow, indices_XK, weights_XK)
    expected = experts(x_XD, *map(weight_only.dequantize, narrow), indices_XK, weights_XK, implementation="reference")
    assert_close(y_XD, expected)
