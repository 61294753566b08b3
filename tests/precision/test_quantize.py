"""Quantised operands: their bytes, their life as a pytree, transposition, a second quantisation, delayed scales."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.precision.quantize import Packing, Quantized, both, quantize, weight
from research.precision.recipe import RECIPES, Format

TILE, BLOCK, E5M6 = Format("e4m3", (1, 128)), Format("e4m3", (128, 128)), Format("e5m6", (1, 128), power_of_two=True)
MX, TENSOR = Format("e4m3", (1, 32), power_of_two=True), Format("e4m3", None)


def formats() -> list[Format]:
    """Every format that any recipe uses."""
    found = {}
    for recipe in RECIPES.values():
        if recipe.quantized:
            for step in (recipe.forward, recipe.input_gradient, recipe.weight_gradient):
                found |= {step.left: None, step.right: None}
            found |= {recipe.dispatch: None, recipe.dispatch_gradient: None, recipe.attention_output: None,
                      recipe.swiglu: None}
    return [form for form in found if form is not None]


def weight_formats() -> list[Format]:
    return list(dict.fromkeys(recipe.forward.right for recipe in RECIPES.values() if recipe.quantized))


def name_of(form: Format) -> str:
    tile = "tensor" if form.tile is None else "x".join(map(str, form.tile))
    return "-".join(filter(None, (form.kind, tile, form.power_of_two and "pow2", form.delayed and "delayed")))


every_format = pytest.mark.parametrize("form", formats(), ids=name_of)


def values(*shape, seed=0):
    """Rows and columns of different magnitudes, so that no tile's scale is its neighbour's."""
    rng = np.random.default_rng(seed)
    rows, columns = rng.uniform(-6, 6, (*shape[:-1], 1)), rng.uniform(-6, 6, (*shape[:-2], 1, shape[-1]))
    return jnp.asarray(rng.normal(size=shape) * np.exp2(rows + columns), jnp.float32)


def quantised(x, form, history=None) -> Quantized:
    return jax.jit(quantize, static_argnums=(1, 2))(x, form, "auto", history)


def assert_same_bits(actual: Quantized, expected: Quantized):
    assert actual.format == expected.format
    for a, b in ((actual.values, expected.values), (actual.scales, expected.scales)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_the_formats_of_all_recipes_are_tested():
    assert {TILE, BLOCK, E5M6, MX, TENSOR, Format("e5m2", None), replace(TENSOR, delayed=True)} <= set(formats())


@every_format
@pytest.mark.parametrize("shape", [(200, 176), (3, 40, 144)])
def test_packing_changes_the_type_and_no_bit(form, shape):
    x = quantised(values(*shape), form)
    packed = x.packed()
    assert packed.values.dtype == (jnp.float16 if form.kind == "e5m6" else jnp.uint8)
    assert x.values.dtype == {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2, "e5m6": jnp.float16}[form.kind]
    assert np.asarray(packed.values).tobytes() == np.asarray(x.values).tobytes()
    assert packed.stored_bytes == x.stored_bytes and packed.counted_bytes == x.counted_bytes
    assert_same_bits(packed.unpacked(), x)


@pytest.mark.parametrize("form, stored, counted", [
    (TILE, 200 * 176 + 4 * 2 * 200, 200 * 176 + 4 * 2 * 200),
    (BLOCK, 200 * 176 + 4 * 2 * 2, 200 * 176 + 4 * 2 * 2),
    (TENSOR, 200 * 176 + 4, 200 * 176 + 4),
    (MX, 200 * 176 + 4 * 6 * 200, 200 * 176 + 6 * 200),  # E8M0 scales: a byte
    (E5M6, 2 * 200 * 176 + 4 * 2 * 200, 1.5 * 200 * 176 + 2 * 200),  # 12 bits, in float16
], ids=lambda x: name_of(x) if isinstance(x, Format) else None)
def test_bytes_are_those_of_the_arrays_and_of_the_format(form, stored, counted):
    x = quantised(values(200, 176), form)
    assert (x.stored_bytes, x.counted_bytes) == (stored, counted)
    assert x.stored_bytes == x.values.nbytes + x.scales.nbytes


def test_e5m6_keeps_six_bits_after_the_point():
    """12 bits: the four lowest of each float16 are zeros; the error is half a unit of the last bit."""
    x = values(200, 176)
    kept = quantised(x, E5M6)
    bits = np.asarray(kept.values).view(np.uint16)
    assert np.all(bits & 0xF == 0) and np.any(bits & 0x10)
    normal = np.abs(np.asarray(kept.values, np.float32)) >= 2.0**-14
    error = np.abs(np.asarray(kept.dequantized()) - x)[normal] / np.abs(x)[normal]
    assert 2.0**-8 < error.max() <= 2.0**-7


@every_format
def test_a_pytree_under_jit_scan_and_vmap(form):
    """Its arrays are leaves and its format is not: two formats are two structures."""
    x_LRC = values(3, 40, 144)
    each = [quantised(x, form) for x in x_LRC]
    leaves, structure = jax.tree.flatten(each[0])
    assert [leaf.shape for leaf in leaves] == [each[0].values.shape, each[0].scales.shape]
    assert structure != jax.tree.structure(quantised(x_LRC[0], replace(form, power_of_two=not form.power_of_two)))

    stacked = jax.jit(jax.vmap(lambda x: quantize(x, form, "auto").packed()))(x_LRC)
    _, floats = jax.jit(lambda q: jax.lax.scan(lambda _, one: (None, one.unpacked().dequantized()), None, q))(stacked)
    for i, one in enumerate(each):
        assert_same_bits(jax.tree.map(lambda a, i=i: a[i], stacked).unpacked(), one)
        np.testing.assert_array_equal(floats[i], one.dequantized())


def test_experts_are_quantised_one_by_one():
    """(E, R, C): tiles, blocks and whole tensors are those of one expert's matrix."""
    x_ERC = values(3, 200, 144)
    for form in (TILE, BLOCK, MX, TENSOR):
        together = quantised(x_ERC, form)
        for e in range(3):
            assert_same_bits(Quantized(together.values[e], together.scales[e], form), quantised(x_ERC[e], form))


@every_format
def test_both_quantises_x_itself_both_ways(form):
    """Never the one from the other: a second rounding would show."""
    x = values(200, 144)
    other = Format("e5m2", form.tile, form.power_of_two)
    for transposed in (form, other):
        x_q, x_t = jax.jit(both, static_argnums=(1, 2, 3))(x, form, transposed, "auto")
        assert_same_bits(x_q, quantised(x, form))
        assert_same_bits(x_t, quantised(x.swapaxes(-1, -2), transposed))


@pytest.mark.parametrize("form", weight_formats(), ids=name_of)
@pytest.mark.parametrize("shape", [(200, 304), (2, 304, 40)])
def test_a_weight_for_both_products(form, shape):
    """For blocks and tensors one copy, transposed; 1x32 tiles are along each contraction, from w itself."""
    w = values(*shape)
    transposed, itself = jax.jit(weight, static_argnums=(1, 2))(w, form, "auto")
    assert_same_bits(itself, quantised(w, form))
    assert_same_bits(transposed, quantised(w.swapaxes(-1, -2), form))
    same = np.array_equal(transposed.dequantized().swapaxes(-1, -2), itself.dequantized())
    assert same == (form.tile in (None, (128, 128)))


@every_format
def test_a_second_quantisation_changes_nothing(form):
    """No bit of values and scales; a power of two may halve where its tile's largest was rounded to 224, say."""
    for octaves in (0, -60, 60):
        once = quantised(values(256, 304) * 2.0**octaves, form)
        twice = quantised(once.dequantized(), form)
        assert np.array_equal(twice.dequantized(), once.dequantized())
        if not form.power_of_two:
            assert_same_bits(twice, once)


@every_format
def test_zeros_huge_and_tiny_values_stay_finite(form):
    x = np.array(values(200, 304))
    x[:, :128], x[130:, 160:] = 0, 1e30
    x[3, 200], x[4, 201], x[5, 202:] = 1e30, -3e38, 1e-30
    for part in (x, 0 * x, np.full_like(x, 1e-38), np.full_like(x, 3e38)):
        found = quantised(jnp.asarray(part), form)
        back = np.asarray(found.dequantized())
        assert np.all(np.isfinite(found.scales)) and np.all(found.scales > 0) and np.all(np.isfinite(back))
        assert np.all(back[part == 0] == 0)
        if form.tile is not None:
            assert np.all(np.asarray(found.scales)[np.all(part == 0)] == 1)


class TestDelayedScaling:
    form = Format("e4m3", None, delayed=True)

    def test_an_empty_history_lets_x_scale_itself(self):
        x = values(200, 144)
        expected = quantised(x, TENSOR)
        for history in (None, jnp.zeros(16)):
            found = quantised(x, self.form, history)
            assert_same_bits(replace(found, format=TENSOR), expected)

    @pytest.mark.parametrize("shape", [(40, 144), (3, 40, 144)])
    def test_the_largest_of_the_history_gives_the_scale(self, shape):
        """Wherever it stands, whatever x is now; one scale for all experts."""
        history = jnp.zeros(16).at[11].set(896.0).at[2].set(3.0)
        found = quantised(jnp.full(shape, 10.0), self.form, history)
        assert found.scales.shape == (*shape[:-2], 1, 1) and np.all(found.scales == 2)
        np.testing.assert_array_equal(found.dequantized(), np.full(shape, 10.0))

    def test_what_outgrows_the_history_saturates(self):
        x = jnp.array([[1e30, -1e4, 447.0, 1.0, -0.0, 0.0]])
        found = quantised(x, self.form, jnp.zeros(16).at[0].set(448.0))
        np.testing.assert_array_equal(found.dequantized(), [[448.0, -448.0, 448.0, 1.0, 0.0, 0.0]])

    def test_other_formats_do_not_look_at_a_history(self):
        x = values(200, 144)
        for form in (TILE, BLOCK, TENSOR, MX):
            assert_same_bits(quantised(x, form, jnp.full(16, 1e6)), quantised(x, form))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form, width", [(replace(TILE, power_of_two=True), 300 + 3), (MX, 96 + 3)])
def test_rows_that_travel_stand_for_their_quantised_values(form, width, dtype):
    """Exactly, in 16 bits too, whatever their magnitude; and quantised again where they arrive they change no more."""
    x_RC = values(6, 300 if form.tile[1] == 128 else 96).at[0].set(0).at[1].multiply(1e-30).at[2].multiply(1e30)
    x_RC = x_RC.at[3].set(0).at[3, :3].set(jnp.float32([225, 1, -1])).astype(dtype)  # rounds to 224: another scale
    packing = Packing(form, "auto")
    sent = packing.packed(x_RC)
    assert sent.dtype == jnp.uint8 and sent.shape == (6, width)
    arrived = packing.unpacked(sent, x_RC)
    assert arrived.dtype == x_RC.dtype
    expected = quantised(x_RC, form).dequantized()
    np.testing.assert_array_equal(arrived.astype(jnp.float32), expected)
    np.testing.assert_array_equal(quantised(arrived, form).dequantized(), expected)
    assert not np.any(packing.unpacked(jnp.zeros_like(sent), x_RC))  # rows that nobody sends
    lost = packing.unpacked(packing.packed(x_RC.at[4, 5].set(jnp.nan)), x_RC)
    assert np.any(np.isnan(lost[4])) and not np.any(np.isnan(lost[5]))
