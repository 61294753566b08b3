"""SwiGLU with quantised products: rows sorted by expert, every gradient against one expert at a time, what is kept."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.experts import experts
from research.precision.experts import BLOCK, HISTORIES, sort_rows, swiglu
from research.precision.recipe import RECIPES
from tests.precision import reference

QUANTISED = [name for name, recipe in RECIPES.items() if recipe.quantized]
PROMOTED = [name for name in QUANTISED if name != "fp8_unpromoted"]  # which costs ten times as much here
NAMES = ("y", "dx", "dgate", "dup", "ddown", "dweights")
X, D, F, E, K = 200, 144, 160, 5, 2  # widths of two tiles, the second ragged
FLIPPED = 2e-3  # see test_routed_experts_equal_one_after_the_other


def choices(kind: str):
    """int32 indices_XK, distinct within a token, and how many experts there are."""
    rng = np.random.default_rng(0)
    tokens, chosen, n_experts = {"empty expert": (X, K, E), "one expert": (X, 1, E), "one choice": (X, 1, E),
                                 "all experts": (60, 3, 3), "more experts than pairs": (4, 2, 24),
                                 "one token": (1, 1, 4), "full blocks": (256, 1, 3), "one over": (258, 1, 2),
                                 "repeated tokens": (X, K, E)}[kind]
    if kind == "one expert":
        indices_XK = np.full((tokens, 1), 3)
    elif kind == "full blocks":
        indices_XK = np.repeat([2, 0], 128)[:, None]
    elif kind == "one over":
        indices_XK = np.repeat([0, 1], 129)[:, None]
    else:
        used = n_experts - (kind == "empty expert")  # the last one is empty
        indices_XK = np.stack([rng.permutation(used)[:chosen] for _ in range(tokens)])
        if kind == "repeated tokens":
            indices_XK[tokens // 2:] = indices_XK[:tokens // 2]
    return jnp.asarray(indices_XK, jnp.int32), n_experts


KINDS = ("empty expert", "one expert", "one choice", "all experts", "more experts than pairs", "one token",
         "full blocks", "one over", "repeated tokens")


@pytest.mark.parametrize("block", [BLOCK, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_sorted_by_expert_in_blocks_of_one(kind, block):
    """Each pair has one row, in a block of its expert's; an expert's rows are contiguous, in the order of tokens, and
    padded to whole blocks; blocks behind the last have no expert and no row."""
    indices_XK, n_experts = choices(kind)
    rows = jax.jit(sort_rows, static_argnums=(1, 2))(indices_XK, n_experts, block)
    pair_M, row_XK, expert_N = (np.asarray(a) for a in (rows.pair_M, rows.row_XK, rows.expert_N))
    expert_P = np.asarray(indices_XK).reshape(-1)
    P, M = expert_P.size, pair_M.size
    assert M % block == 0 and expert_N.size == M // block
    assert sorted(pair_M[pair_M < P]) == list(range(P)) and np.all(pair_M[pair_M >= P] == P)
    np.testing.assert_array_equal(pair_M[row_XK.reshape(-1)], np.arange(P))
    np.testing.assert_array_equal(expert_N[row_XK.reshape(-1) // block], expert_P)
    expected = [-(-np.sum(expert_P == e) // block) for e in range(n_experts)]
    used = sum(expected)
    np.testing.assert_array_equal(expert_N[:used], np.repeat(np.arange(n_experts), expected))
    assert np.all(expert_N[used:] == -1) and np.all(pair_M[used * block:] == P)
    for e in range(n_experts):
        mine = pair_M[np.repeat(expert_N, block) == e]
        count = np.sum(expert_P == e)
        np.testing.assert_array_equal(mine[:count], np.flatnonzero(expert_P == e))
        assert np.all(mine[count:] == P)


@pytest.mark.parametrize("tokens, chosen, n_experts, block", [
    (130, 1, 2, 128), (387, 1, 3, 128), (7, 3, 5, 128), (3, 1, 200, 128), (100, 2, 7, 32)])
def test_there_are_rows_for_every_routing(tokens, chosen, n_experts, block):
    """Even for the one that needs most blocks: one pair more than whole blocks for as many experts as can be."""
    P, expert_P = tokens * chosen, []
    while len(expert_P) < P:  # one pair each, then whole blocks for the first
        expert_P.append(len(expert_P) if len(expert_P) < n_experts else 0)
    indices_XK = jnp.asarray(expert_P, jnp.int32).reshape(tokens, chosen)
    rows = sort_rows(indices_XK, n_experts, block)
    assert np.sum(np.asarray(rows.pair_M) < P) == P
    needed = np.sum(-(-np.bincount(expert_P) // block))
    assert np.sum(np.asarray(rows.expert_N) >= 0) == needed <= rows.pair_M.size // block
    assert rows.pair_M.size <= P + block * min(n_experts, P)  # and no more than that


def test_a_pair_that_names_no_expert_has_no_row():
    indices_XK = jnp.array([[0, 2], [3, 3], [1, 0], [3, 2]], jnp.int32)
    rows = sort_rows(indices_XK, 3, 32)
    assert sorted(rows.pair_M[rows.pair_M < 8].tolist()) == [0, 1, 4, 5, 7]
    named = np.asarray(indices_XK) < 3
    np.testing.assert_array_equal(rows.pair_M[rows.row_XK][named], np.arange(8).reshape(4, 2)[named])
    np.testing.assert_array_equal(rows.expert_N[rows.row_XK // 32][named], indices_XK[named])
    assert rows.expert_N[:3].tolist() == [0, 1, 2] and np.all(rows.expert_N[3:] == -1)
    assert np.all(rows.row_XK < rows.pair_M.size)


def compiled(recipe: str, routed: bool = True, implementation: str = "auto"):
    """(x, gate, up, down, weights, dy, indices) -> {y, gradients}."""
    return _compiled(recipe, routed, implementation)


@functools.cache
def _compiled(recipe: str, routed: bool, implementation: str):
    def run(x, gate, up, down, weights, dy, indices):
        def forward(x, gate, up, down, weights):
            return swiglu(x, gate, up, down, indices if routed else None, weights if routed else None, {},
                          RECIPES[recipe], implementation)

        y, pull = jax.vjp(forward, x, gate, up, down, weights)
        return dict(zip(NAMES if routed else NAMES[:5], (y, *pull(dy)), strict=False))

    return jax.jit(run)


def operands(tokens: int, chosen: int, n_experts: int, even: bool = False):
    """x, gate, up, down, weights, dy. Of different magnitudes, unless even; the last token's are the largest: padding
    that looked like it would show."""
    rng = np.random.default_rng(2)
    x, dy = (rng.normal(size=(tokens, D)) for _ in range(2))
    shapes = ((n_experts, D, F), (n_experts, D, F), (n_experts, F, D))
    gate, up, down = (rng.normal(size=shape) / shape[1] ** 0.5 for shape in shapes)
    weights = rng.uniform(0.05, 1, (tokens, chosen))
    if not even:
        x *= np.exp2(rng.uniform(-2, 1, (tokens, 1)))
        dy *= np.exp2(rng.uniform(-4, 4, (tokens, 1)))
        gate, up, down = (w * np.exp2(rng.uniform(-1, 1, (len(w), 1, 1))) for w in (gate, up, down))
        x[-1] *= 8
        dy[-1] *= 64
    return [m.astype(np.float32) for m in (x, gate, up, down, weights, dy)]


def routed(recipe: str, kind: str = "empty expert", even: bool = False, implementation: str = "auto"):
    """(found, expected, operands, indices)."""
    indices, n_experts = choices(kind)
    made = operands(*indices.shape, n_experts, even)
    if kind == "repeated tokens":
        for m in (made[0], made[4], made[5]):
            m[len(m) // 2:] = m[:len(m) // 2]
    *_, weights, dy = made
    expected = reference.swiglu(*made[:4], np.asarray(indices), weights, dy, RECIPES[recipe])
    return compiled(recipe, implementation=implementation)(*made, indices), expected, made, indices


def assert_matches(found, expected, limit=FLIPPED):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape and np.all(np.isfinite(found[name])), name
        error = reference.relative_error(found[name], value)
        assert error < limit, f"{name}: {error:.2g}"


@pytest.mark.parametrize("recipe", QUANTISED)
def test_routed_experts_equal_one_after_the_other(recipe):
    """Value and all gradients, norm by norm. Within 3e-6 of the loop in NumPy as long as float32 and float64 agree to
    which of two 8-bit values each g, u, a, dg and du is rounded; one of 30,000 rounded to its neighbour was found to be
    8e-4 of a gradient. A wrong operand, scale or row is 1e-2 or more."""
    found, expected, _, _ = routed(recipe)
    assert_matches(found, expected)
    for name in ("dgate", "dup", "ddown"):
        assert found[name].dtype == jnp.float32 and not np.any(found[name][-1])  # nobody chose the last expert
        assert np.all(np.any(found[name][:-1], axis=(1, 2)))


def test_blocks_of_128_rows_give_the_same():
    """Where nobody takes smaller ones; there SwiGLU and its quantisation are one operation."""
    found, expected, _, _ = routed("fp8_deepseek", "one choice", implementation="reference")
    assert_matches(found, expected)


@pytest.mark.parametrize("recipe", ["fp8_deepseek", "fp8_blockwise_gradients", "fp8_requantized", "fp8_tensor",
                                    "mxfp8"])
def test_a_dense_network_equals_the_reference(recipe):
    x, gate, up, down, weights, dy = operands(X, K, 1)
    found = compiled(recipe, routed=False)(x, gate[0], up[0], down[0], weights, dy, None)
    assert_matches(found, reference.dense_swiglu(x, gate[0], up[0], down[0], dy, RECIPES[recipe]))


@pytest.mark.parametrize("recipe, kind", [
    ("fp8_deepseek", "one expert"), ("fp8_deepseek", "all experts"), ("fp8_deepseek", "more experts than pairs"),
    ("fp8_deepseek", "repeated tokens"), ("fp8_blockwise_gradients", "one over"), ("mxfp8", "one over")])
def test_routings_of_every_kind(recipe, kind):
    found, expected, _, _ = routed(recipe, kind)
    assert_matches(found, expected)
    if kind == "repeated tokens":
        for name in ("y", "dx", "dweights"):
            half = np.asarray(found[name])
            np.testing.assert_array_equal(half[:X // 2], half[X // 2:])


def test_tokens_of_no_expert_change_nothing():
    """As they come where devices share the experts: the others' values are the same bits, theirs are zero; and there
    are no rows but for the others."""
    indices, n_experts = choices("empty expert")
    *weighted, weights, dy = operands(*indices.shape, n_experts)
    far = np.arange(X) % 3 == 1
    indices, weights = jnp.where(far[:, None], n_experts, indices), np.where(far[:, None], np.float32(0), weights)

    def run(most, indices, x, *rest):
        *others, dy = rest
        y, pull = jax.vjp(lambda x, *others: swiglu(x, *others[:3], indices, others[3], {}, RECIPES["fp8_deepseek"],
                                                    "auto", most), x, *others)
        return dict(zip(NAMES, (y, *pull(dy)), strict=True))

    found = jax.jit(partial(run, int(np.sum(~far)) * indices.shape[1]))(indices, *weighted, weights, dy)
    near = [m[~far] for m in (weighted[0], weights, dy)]
    expected = jax.jit(partial(run, None))(indices[~far], near[0], *weighted[1:], *near[1:])
    for name, value in expected.items():
        if name in ("y", "dx", "dweights"):
            assert not np.any(found[name][far]), name
        np.testing.assert_array_equal(found[name][~far] if len(found[name]) == X else found[name], value, err_msg=name)


@pytest.mark.parametrize("recipe", QUANTISED)
def test_the_error_against_float_experts_is_that_of_the_formats(recipe):
    """Normal data: two or three products, whose errors of 3.7% (5.9% with an E5M2 operand) add up in squares, and the
    kept g and u are rounded, too."""
    found, _, (*weights, combine, dy), indices = routed(recipe, even=True)

    def exact(*operands):
        return experts(*operands[:4], indices, operands[4], implementation="reference")

    y, pull = jax.jit(lambda *o: jax.vjp(exact, *o))(*weights, combine)
    errors = {name: reference.relative_error(found[name], value)
              for name, value in zip(NAMES, (y, *pull(dy)), strict=True)}
    limit = 0.12 if RECIPES[recipe].input_gradient.left.kind == "e5m2" else 0.10
    assert all(0.03 < error < limit for error in errors.values()), errors


@pytest.mark.parametrize("recipe", ["fp8_deepseek", "fp8_tensor"])
def test_activations_of_16_bits(recipe):
    """y and dx in bfloat16, as g, u and da on their way to them; weights' gradients in float32."""
    indices, n_experts = choices("empty expert")
    x, gate, up, down, weights, dy = operands(*indices.shape, n_experts)
    x, dy = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
    found = compiled(recipe)(x, gate, up, down, weights, dy, indices)
    assert found["y"].dtype == found["dx"].dtype == jnp.bfloat16
    assert all(found[name].dtype == jnp.float32 for name in NAMES[2:])
    assert_matches(found, reference.swiglu(np.asarray(x), gate, up, down, np.asarray(indices), weights,
                                           np.asarray(dy), RECIPES[recipe]))


@pytest.mark.parametrize("recipe", PROMOTED)
def test_small_gradients_are_as_exact_as_large_ones(recipe):
    """1e-10 of them is 1e-10 of the result, bit by bit: no floor under any scale on the way."""
    indices, n_experts = choices("empty expert")
    *rest, dy = operands(*indices.shape, n_experts)
    found, scaled = (compiled(recipe)(*rest, dy * factor, indices) for factor in (np.float32(1), np.float32(2**-33)))
    for name in NAMES[1:]:
        np.testing.assert_array_equal(scaled[name], found[name] * np.float32(2**-33), err_msg=name)


@pytest.mark.parametrize("recipe", PROMOTED)
def test_zeros_and_huge_values_stay_finite(recipe):
    indices, n_experts = choices("empty expert")
    x, gate, up, down, weights, dy = operands(*indices.shape, n_experts)
    found = compiled(recipe)(0 * x, gate, up, down, weights, 0 * dy, indices)
    assert not any(np.any(value) for value in found.values())
    x[3], x[4], dy[5], dy[6] = 1e12, 1e-30, 1e12, 1e-30
    found = compiled(recipe)(x, gate, up, down, weights, dy, indices)
    assert all(np.all(np.isfinite(value)) for value in found.values())


def kept(recipe: str, dense: bool):
    """Shapes of the leaves of the pullback, bfloat16 activations in 1,024 rows."""
    shapes = [((1024, D), "bfloat16"), ((E, D, F), "float32"), ((E, D, F), "float32"), ((E, F, D), "float32"),
              ((1024, K), "int32"), ((1024, K), "float32")]
    if dense:
        shapes = [(shape[-2:], dtype) for shape, dtype in shapes[:4]]

    def forward(x, gate, up, down, indices=None, weights=None):
        return jax.vjp(lambda x, gate, up, down, weights: swiglu(
            x, gate, up, down, indices, weights, {}, RECIPES[recipe], "auto"), x, gate, up, down, weights)[1]

    return jax.tree.leaves(jax.eval_shape(forward, *(jax.ShapeDtypeStruct(*s) for s in shapes)))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("recipe", QUANTISED)
def test_no_float_of_an_activation_is_kept(recipe, dense):
    """x, g and u in 8 bits, the three weights in 8 bits; floats of more bits are scales and gate weights only; SwiGLU's
    output is not kept. A row more of scales than 1/32 of the values is one of 1x32 tiles."""
    leaves = kept(recipe, dense)
    wide = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    narrow = [leaf for leaf in leaves if leaf.dtype == jnp.uint8]
    others = [leaf for leaf in leaves if leaf.dtype == jnp.int32]
    assert len(wide) + len(narrow) + len(others) == len(leaves)
    rows = next(leaf.shape for leaf in narrow if leaf.ndim == 2 and F in leaf.shape and D not in leaf.shape)
    M = rows[0] if rows[1] == F else rows[1]
    assert M == 1024 if dense else M >= 1024 * K
    of_weights = (E if not dense else 1) * D * F
    assert sorted(leaf.size for leaf in narrow) == sorted([M * D, M * F, M * F, *3 * [of_weights]])
    assert all(leaf.size <= max(M * F // 16, M * K) for leaf in wide)
    assert all(leaf.size <= M * K for leaf in others)
    tile = RECIPES[recipe].swiglu.tile
    scale_bytes = 4 * sum(leaf.size for leaf in wide) - (0 if dense else 4 * 1024 * K)
    share = 0 if tile is None else 4 / tile[1]
    ragged = 1 + 2 * 128 / min(D, F)
    assert scale_bytes <= share * ragged * sum(leaf.size for leaf in narrow) + 64 * E


def test_histories_are_followed_operand_by_operand():
    """The largest magnitude of each of the eight; that of `dy` is the unweighted one's, that of `dg` the weighted."""
    indices, n_experts = choices("empty expert")
    x, gate, up, down, weights, dy = map(jnp.asarray, operands(*indices.shape, n_experts))
    past = {name: 1e3 + i + jnp.arange(16.0) for i, name in enumerate(HISTORIES)}

    def forward(x, past):
        return swiglu(x, gate, up, down, indices, weights, past, RECIPES["fp8_delayed"], "auto")

    after = jax.jit(lambda: jax.vjp(forward, x, past)[1](dy)[1])()
    assert after.keys() == past.keys()
    for name, operand in (("x", x), ("gate", gate), ("up", up), ("down", down), ("dy", dy)):
        np.testing.assert_array_equal(after[name][0], np.max(np.abs(operand)))
    for name in past:
        np.testing.assert_array_equal(after[name][1:], past[name][:-1])
    for name in ("a", "dg", "du"):
        assert 0 < after[name][0] < 1e6
