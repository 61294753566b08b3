"""Recipes are data: each named one is exactly what its paper says, and the ablations differ in what they are named for.
"""

from dataclasses import FrozenInstanceError, fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.precision.quantize import quantize
from research.precision.recipe import RECIPES, Format, Product, Recipe

TILE, BLOCK = Format("e4m3", (1, 128)), Format("e4m3", (128, 128))
TILE_POW2, BLOCK_POW2 = Format("e4m3", (1, 128), power_of_two=True), Format("e4m3", (128, 128), power_of_two=True)
E5M6 = Format("e5m6", (1, 128), power_of_two=True)
MX = Format("e4m3", (1, 32), power_of_two=True)
QUANTISED = [name for name, recipe in RECIPES.items() if recipe.quantized]


def differences(name: str) -> dict:
    """{field: value} of what a recipe has otherwise than `fp8_deepseek`."""
    recipe, deepseek = RECIPES[name], RECIPES["fp8_deepseek"]
    return {f.name: getattr(recipe, f.name) for f in fields(Recipe)
            if f.name != "name" and getattr(recipe, f.name) != getattr(deepseek, f.name)}


def test_the_names_are_the_documented_ones():
    assert set(RECIPES) == {"float32", "bfloat16", "fp8_deepseek", "fp8_tensor", "fp8_delayed", "mxfp8",
                            "fp8_blockwise_gradients", "fp8_deepseek_pow2", "fp8_unpromoted", "fp8_dispatched",
                            "fp8_requantized"}
    assert all(name == recipe.name for name, recipe in RECIPES.items())


def test_fp8_deepseek_is_v3():
    """§3.3.2: tiles, blocks, E4M3 everywhere, online float32 scales, promotion; §3.3.3: what is kept and sent."""
    assert RECIPES["fp8_deepseek"] == Recipe(
        name="fp8_deepseek", activations="bfloat16",
        forward=Product(TILE, BLOCK, "float32"),
        input_gradient=Product(TILE, BLOCK, "float32"),
        weight_gradient=Product(TILE, TILE, "float32"),
        dispatch=TILE_POW2, dispatch_gradient=TILE_POW2, attention_output=E5M6, swiglu=TILE,
        dispatched=False, requantize=False, high_precision=("eh_proj",))


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_float_recipes_quantise_nothing(name):
    product = Product(name, name, "float32")
    assert RECIPES[name] == Recipe(name, name, product, product, product)
    assert not RECIPES[name].quantized and not RECIPES[name].delayed


def test_the_ablations_differ_in_what_they_are_named_for():
    assert differences("fp8_deepseek_pow2") == {
        "forward": Product(TILE_POW2, BLOCK_POW2), "input_gradient": Product(TILE_POW2, BLOCK_POW2),
        "weight_gradient": Product(TILE_POW2, TILE_POW2), "swiglu": TILE_POW2}
    assert differences("fp8_blockwise_gradients") == {  # Appendix B.2: of the input's gradient ("Dgrad") alone
        "input_gradient": Product(BLOCK, BLOCK), "dispatch_gradient": BLOCK}
    assert differences("fp8_dispatched") == {"dispatched": True}
    assert differences("fp8_requantized") == {"requantize": True}
    assert differences("fp8_unpromoted") == {
        "forward": Product(TILE, BLOCK, "hopper"), "input_gradient": Product(TILE, BLOCK, "hopper"),
        "weight_gradient": Product(TILE, TILE, "hopper")}


@pytest.mark.parametrize("field", ["dispatch", "dispatch_gradient"])
@pytest.mark.parametrize("form", [None, TILE, BLOCK_POW2, E5M6, replace(TILE_POW2, tile=None)])
def test_what_travels_has_scales_that_are_powers_of_two_and_of_one_row(field, form):
    assert replace(RECIPES["fp8_dispatched"], **{field: MX})
    with pytest.raises(ValueError, match="recipe fp8_dispatched: what is dispatched must have 8 bits"):
        replace(RECIPES["fp8_dispatched"], **{field: form})


@pytest.mark.parametrize("name, delayed", [("fp8_tensor", False), ("fp8_delayed", True)])
def test_one_scale_a_tensor_with_e5m2_gradients(name, delayed):
    tensor, gradient = Format("e4m3", None, delayed=delayed), Format("e5m2", None, delayed=delayed)
    assert RECIPES[name] == Recipe(
        name, "bfloat16", Product(tensor, tensor), Product(gradient, tensor), Product(tensor, gradient),
        swiglu=Format("e4m3", None))
    assert RECIPES[name].delayed == delayed and Format.HISTORY == 16


def test_mxfp8_has_tiles_of_32_along_every_contraction():
    assert RECIPES["mxfp8"] == Recipe("mxfp8", "bfloat16", *3 * [Product(MX, MX)], swiglu=MX)


def test_mxfp8_rounds_scales_up():
    """The smallest power of two under which the tile's largest magnitude fits: none saturates."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(64, 96)) * np.exp2(rng.uniform(-20, 20, (64, 1)))).astype(np.float32)
    x[0, :2] = 448, 1  # whose scale is 1 itself
    found = jax.jit(lambda x: quantize(x, MX, "auto"))(x)
    scales, amax = np.asarray(found.scales), np.max(np.abs(x.reshape(64, 3, 32)), axis=2).T
    assert np.all(np.frexp(scales)[0] == 0.5) and scales[0, 0] == 1
    assert np.all(amax <= 448 * scales) and np.all(amax > 224 * scales)
    assert float(jnp.max(jnp.abs(found.values.astype(jnp.float32)))) <= 448


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_frozen_and_hashable(name):
    """They are static arguments of compiled functions."""
    recipe = RECIPES[name]
    assert hash(recipe) == hash(Recipe(**{f.name: getattr(recipe, f.name) for f in fields(Recipe)}))
    with pytest.raises(FrozenInstanceError):
        recipe.requantize = True


@pytest.mark.parametrize("name", QUANTISED)
def test_every_quantised_recipe_is_complete(name):
    """Activations between layers have 16 bits; SwiGLU's input has a format; the weights' formats are one another's."""
    recipe = RECIPES[name]
    assert recipe.activations == "bfloat16" and recipe.swiglu is not None and recipe.high_precision == ("eh_proj",)
    assert recipe.forward.right == recipe.input_gradient.right  # one FP8 copy of a weight serves both products
    for product in (recipe.forward, recipe.input_gradient, recipe.weight_gradient):
        assert isinstance(product.left, Format) and isinstance(product.right, Format)
