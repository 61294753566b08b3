"""One linear layer in every quantised recipe: its three products, and what it keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.precision.matmul import linear, matmul
from research.precision.quantize import quantize
from research.precision.recipe import RECIPES, Format
from tests.precision import reference

QUANTISED = [name for name, recipe in RECIPES.items() if recipe.quantized]
NAMES = ("y", "dx", "dw")
X, D, F = 300, 200, 272  # none a multiple of 128, each of two or three tiles


@functools.cache
def compiled(recipe: str, after_attention: bool = False):
    """(x_XD, w_DF, dy_XF) -> {y, dx, dw}."""
    def run(x_XD, w_DF, dy_XF):
        y_XF, pull = jax.vjp(lambda x, w: linear(x, w, {}, RECIPES[recipe], after_attention, "auto"), x_XD, w_DF)
        return dict(zip(NAMES, (y_XF, *pull(dy_XF)), strict=True))

    return jax.jit(run)


def normal(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def operands(rows=X, width=D, columns=F):
    """x, w, dy whose rows and columns have magnitudes of their own: a scale in the wrong place shows."""
    rng = np.random.default_rng(1)
    made = normal((rows, width), (width, columns), (rows, columns))
    return [(m * np.exp2(rng.uniform(-4, 4, (len(m), 1)) + rng.uniform(-4, 4, m.shape[1]))).astype(np.float32)
            for m in made]


def floats(x, w, dy):
    """The three products without quantisation, in float64."""
    x, w, dy = (np.asarray(m, np.float64) for m in (x, w, dy))
    return dict(zip(NAMES, (x @ w, dy @ w.T, x.T @ dy), strict=True))


def assert_matches(found, expected_operands, rounding=0.0):
    """Entry by entry: within 2e-6 of the sum of magnitudes, and within the output's own rounding.

    float32 sums of 300 products were found within 3.1e-7; a wrong operand is off by 1e-2.
    """
    for name, (left, right, accumulation) in expected_operands.items():
        expected = reference.product(left, right, accumulation)
        allowed = 2e-6 * (np.abs(left) @ np.abs(right).T) + rounding * (name != "dw") * np.abs(expected)
        error = np.abs(np.asarray(found[name], np.float64) - expected)
        assert np.all(error <= allowed), f"{name}: {np.max(error / (allowed + 1e-300)):.3g} times what is allowed"


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", QUANTISED)
def test_the_three_products_are_those_of_the_quantised_operands(recipe, dtype):
    """y and dx in the dtype of x (bfloat16 rounds by 2^-8 of the value at most), dw in float32 always."""
    x, w, dy = operands()
    x, dy = jnp.asarray(x, dtype), jnp.asarray(dy, dtype)
    found = compiled(recipe)(x, w, dy)
    assert {name: value.dtype for name, value in found.items()} == {"y": x.dtype, "dx": x.dtype, "dw": jnp.float32}
    expected = reference.linear_operands(np.float32(x), w, np.float32(dy), RECIPES[recipe])
    assert_matches(found, expected, rounding=2.0**-8 if dtype == "bfloat16" else 0)


@pytest.mark.parametrize("rows, width, columns", [(1, 1, 1), (5, 7, 3), (129, 1, 257), (256, 128, 384)])
@pytest.mark.parametrize("recipe", ["fp8_deepseek", "fp8_blockwise_gradients", "mxfp8"])
def test_sizes_of_every_kind(recipe, rows, width, columns):
    x, w, dy = operands(rows, width, columns)
    found = compiled(recipe)(x, w, dy)
    assert_matches(found, reference.linear_operands(x, w, dy, RECIPES[recipe]))


@pytest.mark.parametrize("recipe", QUANTISED)
def test_the_error_against_floats_is_that_of_the_formats(recipe):
    """Norm by norm, for normal data. A value rounded to m bits after the point is off by at most half a unit u of the
    last, evenly: in the mean square over a binade, u / sqrt(3 * 2.16), which is 0.0246 for E4M3 and 0.0491 for E5M2.
    Operands' errors add up in squares: 0.0347 and 0.0549 for the products; 0.0425 where one is rounded twice. Found:
    0.0364 to 0.0378, 0.0591 and 0.0592, 0.0445, more because the smallest values have fewer bits.
    """
    x, w, dy = normal((X, D), (D, F), (X, F))
    found, exact, r = compiled(recipe)(x, w, dy), floats(x, w, dy), RECIPES[recipe]
    for name, step in zip(NAMES, (r.forward, r.input_gradient, r.weight_gradient), strict=True):
        least, limit = 0.034, 0.040
        if "e5m2" in (step.left.kind, step.right.kind):
            least, limit = 0.054, 0.062
        elif r.requantize and name == "dw":
            least, limit = 0.042, 0.047
        assert least < reference.relative_error(found[name], exact[name]) < limit, name


@pytest.mark.parametrize("recipe", QUANTISED)
def test_zeros_give_zeros(recipe):
    """Rows, columns, tiles, and whole tensors of them, of both signs."""
    x, w, dy = operands()
    x[:, :128], x[140:, :], w[:, 128:] = 0, -0.0, 0
    found = compiled(recipe)(x, w, dy)
    assert all(np.all(np.isfinite(value)) for value in found.values())
    assert not found["y"][140:].any() and not found["y"][:, 128:].any() and not found["dw"][:128].any()
    nothing = compiled(recipe)(x, w, 0 * dy)
    assert not nothing["dx"].any() and not nothing["dw"].any() and np.array_equal(nothing["y"], found["y"])
    assert not any(value.any() for value in compiled(recipe)(0 * x, 0 * w, 0 * dy).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", QUANTISED)
def test_huge_and_tiny_values_stay_finite(recipe, dtype):
    x, w, dy = operands()
    x[3], x[4], x[5, 7] = 1e30, 1e-30, -1e30
    dy[6], dy[7], dy[8, 1] = 1e-30, 1e30, 1e-38
    found = compiled(recipe)(jnp.asarray(x, dtype), w, jnp.asarray(dy, dtype))
    assert all(np.all(np.isfinite(np.float32(value))) for value in found.values())
    found = compiled(recipe)(jnp.full((X, D), 1e30, dtype), w, jnp.full((X, F), 1e-30, dtype))
    assert all(np.all(np.isfinite(np.float32(value))) for value in found.values())
    np.testing.assert_allclose(found["dw"], X, rtol=0.1)  # 1e30 * 1e-30, summed


@pytest.mark.parametrize("recipe", [name for name in QUANTISED if RECIPES[name].dispatch])
def test_a_row_of_1e30_costs_no_other_row_its_accuracy(recipe):
    """Tiles of 1x128 in y and dx; in dw the same 128 tokens share a scale, as the paper accepts."""
    x, w, dy = normal((X, D), (D, F), (X, F))
    x[3], dy[3] = x[3] * 1e30, dy[3] * 1e30 * (RECIPES[recipe].input_gradient.left.tile == (1, 128))
    found, exact = compiled(recipe)(x, w, dy), floats(x, w, dy)
    for name in ("y", "dx"):
        assert reference.relative_error(np.delete(found[name], 3, axis=0), np.delete(exact[name], 3, axis=0)) < 0.04


@pytest.mark.parametrize("factor", [2.0**-33, 2.0**-60, 2.0**40])  # 1e-10, 1e-18, 1e12
@pytest.mark.parametrize("recipe", QUANTISED)
def test_small_gradients_are_as_exact_as_large_ones(recipe, factor):
    """Bit by bit, by powers of two: no floor such as the 1e-4 of inference kernels stands under the scales."""
    x, w, dy = operands()
    found, scaled = compiled(recipe)(x, w, dy), compiled(recipe)(x, w, dy * np.float32(factor))
    assert np.any(found["dx"]) and np.any(found["dw"])
    assert bits(scaled) == bits({"y": found["y"], "dx": found["dx"] * factor, "dw": found["dw"] * factor})
    scaled = compiled(recipe)(x * np.float32(factor), w, dy)
    assert bits(scaled) == bits({"y": found["y"] * factor, "dx": found["dx"], "dw": found["dw"] * factor})


def test_requantising_is_another_weight_gradient():
    """From the forward product's x: dequantised and quantised along tokens. The other two products are the same."""
    x, w, dy = operands()
    direct, again = compiled("fp8_deepseek")(x, w, dy), compiled("fp8_requantized")(x, w, dy)
    assert bits((direct["y"], direct["dx"])) == bits((again["y"], again["dx"]))
    assert reference.relative_error(again["dw"], direct["dw"]) > 0.01
    twice = compiled("fp8_deepseek")(reference.round_trip(x, Format("e4m3", (1, 128))), w, dy)
    np.testing.assert_array_equal(again["dw"], twice["dw"])


@pytest.mark.parametrize("recipe", [name for name in QUANTISED if RECIPES[name].attention_output])
def test_the_projection_after_attention_keeps_e5m6(recipe):
    """Its weight gradient reads that; its other products are those of any projection (V3 §3.3.3)."""
    x, w, dy = operands()
    plain, found = compiled(recipe)(x, w, dy), compiled(recipe, True)(x, w, dy)
    assert bits((found["y"], found["dx"])) == bits((plain["y"], plain["dx"]))
    assert_matches(found, reference.linear_operands(x, w, dy, RECIPES[recipe], after_attention=True))
    assert reference.relative_error(found["dw"], plain["dw"]) > 1e-3


@pytest.mark.parametrize("recipe", [name for name in QUANTISED if not RECIPES[name].attention_output])
def test_other_recipes_know_no_projection_after_attention(recipe):
    x, w, dy = operands()
    assert bits(compiled(recipe, True)(x, w, dy)) == bits(compiled(recipe)(x, w, dy))


def kept(recipe: str, dtype="bfloat16", after_attention=False, rows=X):
    """Shapes of what linear keeps for the backward pass: the leaves of its pullback."""
    def forward(x, w):
        if RECIPES[recipe].quantized:
            return jax.vjp(lambda x, w: linear(x, w, {}, RECIPES[recipe], after_attention, "auto"), x, w)[1]
        return jax.vjp(lambda x, w: matmul(x, w, 3 * (recipe,)), x, w)[1]

    return jax.tree.leaves(jax.eval_shape(forward, jax.ShapeDtypeStruct((rows, D), dtype),
                                          jax.ShapeDtypeStruct((D, F), "float32")))


def size_of(leaves):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("after_attention", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", QUANTISED)
def test_what_is_kept_is_what_the_format_counts(recipe, dtype, after_attention):
    """x in the format that the weight gradient reads, w in its own, and nothing else, of 16 bits or of 32."""
    r = RECIPES[recipe]
    leaves = kept(recipe, dtype, after_attention)
    x, w = jnp.ones((X, D)), jnp.ones((D, F))
    form = r.forward.left if r.requantize else r.weight_gradient.left
    if after_attention and r.attention_output:
        form = r.attention_output
    along_tokens = not r.requantize and form != r.attention_output
    pack = jax.jit(lambda x, form: quantize(x, form, "auto").packed(), static_argnums=1)
    expected = [pack(x.T if along_tokens else x, form), pack(w, r.forward.right)]
    assert size_of(leaves) == sum(q.stored_bytes for q in expected)
    large = [leaf for leaf in leaves if leaf.size >= min(X * D, D * F)]
    assert sorted(leaf.dtype.name for leaf in large) == sorted([expected[0].values.dtype.name, "uint8"])
    assert expected[0].values.dtype == (jnp.float16 if form.kind == "e5m6" else jnp.uint8)
    if recipe == "fp8_deepseek":
        assert expected[0].counted_bytes == (1.5 * X * D + 2 * X if after_attention else X * D + 4 * 3 * D)


def test_half_of_16_bits_and_a_quarter_of_32():
    """Leaf by leaf, of 512 rows: scales add 1/32 of a byte to each value's one. (Floats keep the parameter w itself.)
    """
    activations = {recipe: size_of(kept(recipe, dtype, rows=512)) - D * F * width - scales
                   for recipe, dtype, width, scales in (("float32", "float32", 4, 0), ("bfloat16", "bfloat16", 4, 0),
                                                        ("fp8_deepseek", "bfloat16", 1, 4 * 2 * 3))}
    assert activations == {"float32": 4 * 512 * D, "bfloat16": 2 * 512 * D, "fp8_deepseek": 512 * D * (1 + 1 / 32)}


class TestFloatProducts:
    def test_equal_numpy_in_float32(self):
        x, w, dy = operands()
        y, pull = jax.vjp(lambda x, w: matmul(x, w, 3 * ("float32",)), x, w)
        for found, (left, right) in zip((y, *pull(jnp.asarray(dy))), ((x, w), (dy, w.T), (x.T, dy)), strict=True):
            allowed = 2e-6 * (np.abs(left, dtype=np.float64) @ np.abs(right))
            assert np.all(np.abs(found - np.float64(left) @ right) <= allowed)

    @pytest.mark.parametrize("low", range(3))
    def test_each_product_has_a_dtype_of_its_own(self, low):
        """bfloat16 in one of the three changes that one alone."""
        x, w, dy = operands()
        formats = ["float32"] * 3
        formats[low] = "bfloat16"

        def run(formats):
            y, pull = jax.vjp(lambda x, w: matmul(x, w, tuple(formats)), x, w)
            return y, *pull(jnp.asarray(dy))

        for i, (found, exact) in enumerate(zip(run(formats), run(["float32"] * 3), strict=True)):
            error = reference.relative_error(found, exact)
            assert (1e-3 < error < 4e-3) if i == low else error == 0
            assert found.dtype == jnp.float32
