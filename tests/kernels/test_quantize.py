"""Quantisation: properties of the definition, and every implementation against it, bit for bit."""

from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels import choice
from kernels import quantize as kernel
from kernels.interpret import interpret_params, races_found
from kernels.quantize import division, mosaic, reference, xla
from kernels.quantize.shapes import ACTIVATIONS, WEIGHTS
from kernels.quantize.stream import Tiles

KINDS = ("e4m3", "e5m2", "e5m6")
TILES = ((1, 128), (128, 1), (128, 128), (1, 32))
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
FORMATS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def assert_same_bits(actual, expected):
    """Trees of arrays of the same dtypes, shapes and bits; one NaN is as good as another."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        word = WORDS[a.dtype.itemsize]
        differ = (a.view(word) != b.view(word)) & ~(np.isnan(a.astype(np.float32)) & np.isnan(b.astype(np.float32)))
        assert not differ.any(), f"{differ.sum()} of {differ.size} differ: {a[differ][:5]}, expected {b[differ][:5]}"


def magnitudes_of(kind):
    """All values of a format that are not negative, as float32."""
    if kind == "e5m6":
        return np.arange(0, 0x7BF1, 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    return np.arange(0x7F if kind == "e4m3" else 0x7C, dtype=np.uint8).view(FORMATS[kind]).astype(np.float32)


def around(x):
    """x, its neighbours in float32, and all their negatives."""
    x = np.asarray(x, np.float32)
    x = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(np.inf))])
    return np.concatenate([x, -x])


def boundaries(kind):
    """Where rounding to a format could go wrong."""
    values = magnitudes_of(kind)
    others = [448, 464, 465, 480, 57344, 61440, 65024, 65025, 65500, 1e4, 1e30, 3.4e38, 1e-30, 1e-38, 1e-40, 1e-45]
    return np.concatenate([around(np.concatenate([values, (values[1:] + values[:-1]) / 2, others])),
                           np.float32([np.inf, -np.inf, np.nan])])


def rounded(x, kind):
    """In NumPy: saturated, then to the nearest value, ties to even."""
    x = np.clip(np.float32(x), -reference.LARGEST[kind], reference.LARGEST[kind])
    if kind != "e5m6":
        return x.astype(FORMATS[kind])
    step = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(x, dtype=np.float64), 1e-30))), -14) - 6)
    return (np.rint(x / step) * step).astype(np.float16)


def wide(shape, dtype=jnp.float32, seed=0, octaves=8):
    """Random, of many magnitudes, with a row of zeros of both signs, and rows of huge and of tiny values."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp2(rng.normal(size=shape) * octaves)
    x[..., 0, :] = 0
    x[..., 1, ::2] = -0.0
    if dtype != jnp.float16:
        x[..., 2, :] *= 1e30
        x[..., 3, :] *= 1e-33
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cast_rounds_to_nearest_even_and_saturates(kind):
    x = boundaries(kind)
    for cast in (reference.cast, jax.jit(reference.cast, static_argnums=1)):
        assert_same_bits(cast(x, kind), rounded(x, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_plain_xla_rounds_as_the_definition_at_every_boundary(kind):
    x = boundaries(kind)[None]
    one = jnp.ones((1, 1))
    values = reference.quantize_with(x, one, x.shape, kind)
    assert_same_bits(values[0], rounded(x[0], kind))
    assert_same_bits(jax.jit(partial(xla.quantize_with, tile=x.shape, kind=kind))(x, one), values)
    back = jax.jit(partial(xla.dequantize, tile=x.shape))(values, one)
    assert_same_bits(back, values.astype(jnp.float32))
    assert_same_bits(jax.jit(partial(xla.round_trip_with, tile=x.shape, kind=kind))(x, one), back)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_code_survives_being_bytes(kind):
    codes = np.arange(256, dtype=np.uint8)
    values = kernel.decode(codes, kind)
    assert values.dtype == reference.STORED_AS[kind]
    np.testing.assert_array_equal(kernel.encode(values), codes)
    back = kernel.dequantize(values[None], jnp.ones((1, 1)), (1, 256))
    assert_same_bits(back, codes[None].view(FORMATS[kind]).astype(np.float32))


def test_scales_are_divided_exactly_for_every_significand():
    significands = np.arange(2**23, 2**24, dtype=np.float32)
    divide = jax.jit(division.by_constant, static_argnums=1)
    for divisor, factor in ((448.0, 2.0**-23), (65024.0, 1.0), (57344.0, 2.0**-100)):
        x = significands * np.float32(factor)
        np.testing.assert_array_equal(divide(x, divisor), x / np.float32(divisor))
    np.testing.assert_array_equal(divide(np.float32([0, np.inf, 3e38, 2.0**-126]), 448.0),
                                  np.float32([0, np.inf, np.float32(3e38) / np.float32(448), 0]))


MIDDLES = (magnitudes_of("e4m3")[1:] + magnitudes_of("e4m3")[:-1]) / 2


def near_ties(dtype, seed=0, n=20_000):
    """(x, scales): quotients a few units in the last place from the middle between two neighbours of E4M3."""
    rng = np.random.default_rng(seed)
    octaves = 4 if dtype == np.float16 else 100
    scales = np.exp2(rng.uniform(-octaves, octaves, n)).astype(np.float32)
    scales[::3] = (rng.integers(1, 256, n) * np.exp2(rng.integers(-12, -2, n)))[::3]  # ties of 16-bit x
    x = (rng.choice(MIDDLES, n) * scales.astype(np.float64)).astype(dtype).astype(np.float32)
    if dtype == np.float32:
        x = (x.view(np.int32) + rng.integers(-2, 3, n).astype(np.int32)).view(np.float32)
    return x * rng.choice(np.float32([-1, 1]), n), scales


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_quotients_without_division_round_as_exact_ones(dtype):
    x, scales = near_ties(dtype)

    @jax.jit
    def quotient(x, scales):
        power, *rest = division.parts(scales)
        return division.quotient(x * power, *rest)

    assert_same_bits(rounded(quotient(x, scales), "e4m3"), rounded(x / scales, "e4m3"))
    assert (rounded(x * (1 / scales), "e4m3") != rounded(x / scales, "e4m3")).any()  # the inverse would not do


def test_quotients_of_special_values():
    x, scales = np.float32([0, -0.0, 3, -3, np.inf, np.nan, 5]), np.float32([2, 2, np.inf, np.inf, np.inf, 1, np.nan])
    power, *rest = division.parts(scales)
    assert_same_bits(division.quotient(x * power, *rest), np.float32([0, -0.0, 0, -0.0, np.nan, np.nan, np.nan]))


def test_division_by_scales_is_exact_under_jit():
    """XLA turns x / broadcast into a product, which is wrong for a quarter of these."""
    rng = np.random.default_rng(1)
    x, scales = rng.normal(size=(64, 128)).astype(np.float32), np.exp2(rng.normal(size=(64, 1))).astype(np.float32)
    expected = x / scales
    np.testing.assert_array_equal(jax.jit(division.divide)(x, scales), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(division.divide))(x[None], scales[None])[0], expected)


@partial(jax.jit, static_argnums=(1, 2, 3))
def defined(x, tile, kind="e4m3", power_of_two=False):
    """(values, scales) as the definition has them, and what they stand for."""
    values, scales = reference.quantize(x, tile, kind, power_of_two)
    return (values, scales), reference.dequantize(values, scales, tile)


def test_the_definition_is_the_same_under_jit():
    x = wide((130, 200)).at[5, 7].set(jnp.inf)
    values, scales = reference.quantize(x, (1, 128))
    assert_same_bits(defined(x, (1, 128)), ((values, scales), reference.dequantize(values, scales, (1, 128))))


@pytest.mark.parametrize("tile", [(1, 128), (128, 128)])
@pytest.mark.parametrize("kind", KINDS)
def test_quantising_twice_changes_no_bit(tile, kind):
    once, back = defined(wide((130, 200)), tile, kind)
    assert_same_bits(defined(back, tile, kind), (once, back))
    _, back = defined(wide((130, 200)), tile, kind, True)
    assert_same_bits(defined(back, tile, kind, True)[1], back)  # a largest value that was rounded down halves the scale


def test_blocks_of_zeros_have_scale_one():
    for tile in TILES:
        (values, scales), _ = defined(jnp.zeros((130, 200)), tile)
        assert not np.asarray(values, np.float32).any() and (np.asarray(scales) == 1).all()


@jax.jit
def in_every_format(x):
    return [defined(x, (1, 128), kind, power_of_two) for kind in KINDS for power_of_two in (False, True)]


def test_huge_and_tiny_values_stay_finite():
    """A cast of 465 is NaN; one huge value leaves the others of its tile to zero, not to NaN."""
    for value in (1e4, 465.0, 1e30, 1e38, 1e-30, 1e-38):
        for (_, scales), back in in_every_format(jnp.ones((1, 256)).at[0, 3].set(value).at[0, 130].set(-value)):
            assert np.isfinite(back).all() and np.isfinite(scales).all()
            if value > 1:
                np.testing.assert_allclose(np.asarray(back)[0, [3, 130]], [value, -value], rtol=2.0**-3)
    cast = reference.quantize_with(jnp.float32([[1e4, -1e30, 465]]), jnp.ones((1, 1)), (1, 128))
    np.testing.assert_array_equal(cast.astype(jnp.float32), [[448, -448, 448]])


@pytest.mark.parametrize("magnitude", [1e-8, 1e-20, 1e-30])
def test_small_gradients_keep_their_precision(magnitude):
    """No floor of 1e-4 under the largest magnitude."""
    x = np.random.default_rng(0).uniform(0.5, 1, (4, 256)).astype(np.float32) * np.float32(magnitude)
    np.testing.assert_allclose(defined(x, (1, 128))[1], x, rtol=2.0**-4)


@pytest.mark.parametrize("kind", KINDS)
def test_power_of_two_scales(kind):
    amax = np.exp2(np.random.default_rng(0).uniform(-110, 110, 10_000)).astype(np.float32)
    amax[:3] = np.float32(reference.LARGEST[kind]) * np.float32([1, 2.0**-20, 2.0**40])  # powers of two as they are
    scale = np.asarray(reference.scale_of(amax, kind, True))
    exact = amax.astype(np.float64) / reference.LARGEST[kind]
    assert (np.frexp(scale)[0] == 0.5).all()
    assert (scale >= exact).all() and (scale < 2 * exact).all()
    np.testing.assert_array_equal(scale[:3], np.float32([1, 2.0**-20, 2.0**40]))


def test_power_of_two_scales_let_values_change_tiles_exactly():
    """1x128 to 128x1: only the exponent moves while nothing falls below the smallest value (V3 §3.3.2)."""
    rng = np.random.default_rng(0)
    x = np.float32(rng.uniform(1, 2, (128, 256)) * rng.choice([-1, 1], (128, 256)))
    x *= np.exp2(rng.integers(0, 3, (128, 1)), dtype=np.float32)
    moved = {}
    for power_of_two in (True, False):
        rows = defined(x, (1, 128), "e4m3", power_of_two)[1]
        moved[power_of_two] = np.mean(np.asarray(defined(rows, (128, 1), "e4m3", power_of_two)[1] != rows))
    assert moved[True] == 0 and moved[False] > 0.1


def test_an_infinity_is_not_lost():
    for power_of_two in (False, True):
        x = jnp.ones((1, 128)).at[0, 5].set(jnp.inf)
        assert not np.isfinite(defined(x, (1, 128), "e4m3", power_of_two)[1]).all()


@pytest.mark.parametrize("tile", [(1, 128), (128, 128), (33, 257)])
def test_ragged_tiles_are_those_of_the_padded_matrix(tile):
    x = wide((33, 257))
    (values, scales), back = defined(x, tile)
    (padded_values, padded_scales), padded_back = defined(
        jnp.pad(x, ((0, -33 % tile[0]), (0, -257 % tile[1]))), tile)
    assert scales.shape == (-(-257 // tile[1]), -(-33 // tile[0]))
    assert_same_bits(((values, scales), back), ((padded_values[:33, :257], padded_scales), padded_back[:33, :257]))
    assert_same_bits(jax.jit(partial(xla.quantize, tile=tile))(x), (values, scales))


COMBINATIONS = [((1, 128), "e4m3", False), ((1, 128), "e4m3", True), ((1, 128), "e5m6", True),
                ((128, 1), "e4m3", False), ((128, 128), "e4m3", False), ((128, 128), "e5m2", False),
                ((1, 32), "e4m3", True), (None, "e5m2", False)]


@partial(jax.jit, static_argnums=1)
def everything(x, module):
    """Values, scales, and what they stand for, by one implementation; tile None: one scale for all."""
    results = []
    for tile, kind, power_of_two in COMBINATIONS:
        tile = tile or x.shape
        values, scales = module.quantize(x, tile, kind, power_of_two)
        results.append((values, scales, module.dequantize(values, scales, tile)))
        if module is xla:
            directly = xla.round_trip(x, tile, kind, power_of_two), xla.round_trip_with(x, scales, tile, kind)
        else:
            directly = results[-1][2], results[-1][2]
        results.append(directly)
    return results


@hypothesis.given(st.integers(0, 2**32 - 1), st.floats(0, 60), st.integers(-60, 60))
@hypothesis.settings(max_examples=40)
def test_plain_xla_gives_the_bits_of_the_definition(seed, octaves, exponent):
    x = wide((66, 200), seed=seed, octaves=octaves) * 2.0**exponent
    x = jnp.where(jnp.abs(x) < 1e37, x, 1.0).at[5, 7].set(jnp.inf)
    assert_same_bits(everything(x, xla), everything(x, reference))


@partial(jax.jit, static_argnums=1)
def orientations(x, module):
    return {kind: [getattr(module, f"quantize_{name}")(x, kind) for name in ("both", "transposed", "weight")]
            for kind in ("e4m3", "e5m6")}


def test_orientations():
    x = wide((130, 200))
    definition = orientations(x, reference)
    assert_same_bits(orientations(x, xla), definition)
    for kind, (both, transposed, weight) in definition.items():
        assert_same_bits(both, (*defined(x, (1, 128), kind)[0], *defined(x.T, (1, 128), kind)[0]))
        assert_same_bits(transposed, both[2:])
        assert_same_bits(weight, (*defined(x, (128, 128), kind)[0], weight[0].T, weight[1].T))


OPERATIONS = {
    "quantize": partial(kernel.quantize, tile=(1, 128)),
    "quantize_transposed": kernel.quantize_transposed,
    "quantize_both": kernel.quantize_both,
    "quantize_weight": kernel.quantize_weight,
    "round_trip": partial(kernel.round_trip, tile=(1, 128)),
}


@pytest.mark.parametrize("name", ["quantize_both", "round_trip"])
def test_under_jit_vmap_and_scan(name):
    x, run = wide((3, 20, 150)), OPERATIONS[name]
    one = jax.jit(run)
    expected = jax.tree.map(lambda *each: np.stack(each), *(one(matrix) for matrix in x))
    assert_same_bits(one(x), expected)
    assert_same_bits(jax.jit(jax.vmap(run))(x), expected)
    assert_same_bits(jax.lax.scan(lambda carry, matrix: (carry, run(matrix)), 0, x)[1], expected)


def test_experts_under_given_scales():
    x = wide((3, 20, 150))
    values, scales = jax.jit(partial(kernel.quantize, tile=(1, 128)))(x)
    assert scales.shape == (3, 2, 20)
    assert_same_bits(jax.jit(partial(kernel.quantize_with, tile=(1, 128)))(x, scales), values)
    backs = [jax.jit(partial(kernel.dequantize, tile=(1, 128), implementation=name))(values, scales)
             for name in ("auto", "reference")]
    assert_same_bits(backs, 2 * [jax.jit(partial(kernel.round_trip, tile=(1, 128)))(x)])


def test_what_the_kernels_do_not_take(monkeypatch):
    x = jnp.ones((4, 8))
    with pytest.raises(ValueError, match="not a GPU"):
        kernel.quantize(x, (1, 128), implementation="mosaic")
    with pytest.raises(ValueError, match="implementation='cuda' is none of auto, mosaic"):
        kernel.quantize_weight(x, implementation="cuda")
    with pytest.raises(ValueError, match=r"expected \(R, C\) or \(E, R, C\)"):
        kernel.quantize_both(jnp.ones(4))
    monkeypatch.setattr(choice, "gpu_refusal", lambda: None)
    for text, call in {
        "they write E4M3, not E5M6": partial(kernel.quantize, x, (1, 128), "e5m6"),
        r"tiles of \(1, 32\)": partial(kernel.quantize, x, (1, 32)),
        "they read float32, bfloat16, float16, not int32": partial(kernel.quantize_both, jnp.ones((4, 8), jnp.int32)),
        "has no entries": partial(kernel.quantize_weight, jnp.ones((0, 8))),
        "no such kernel": partial(kernel.dequantize, x, x, (1, 128)),
    }.items():
        with pytest.raises(ValueError, match=text):
            call(implementation="mosaic")
    for name in ("quantize", "quantize_transposed", "quantize_both", "quantize_weight"):
        monkeypatch.setattr(mosaic, name, lambda *arguments, name=name: (name, arguments))
        assert OPERATIONS[name](x, power_of_two=True) == (name, (x, True))


KERNELS = {"quantize": partial(reference.quantize, tile=(1, 128)), "quantize_transposed": reference.quantize_transposed,
           "quantize_both": reference.quantize_both, "quantize_weight": reference.quantize_weight}


def assert_a_kernel_agrees(name, x, power_of_two, tiles):
    expected = jax.jit(partial(KERNELS[name], power_of_two=power_of_two))
    actual = getattr(mosaic, name)(x, power_of_two, tiles=tiles, interpret=interpret_params(detect_races=True))
    assert not races_found(actual)
    assert_same_bits(actual, (jax.vmap(expected) if x.ndim == 3 else expected)(x))


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_give_the_bits_of_the_definition_without_a_race(name):
    x = wide((256, 384), jnp.bfloat16).at[5, 7].set(jnp.inf)
    assert_a_kernel_agrees(name, x, False, Tiles(steps=3, stages=2, places=2))


@pytest.mark.parametrize("name", ["quantize_both", "quantize_weight"])
def test_kernels_of_experts_with_ragged_matrices(name):
    assert_a_kernel_agrees(name, wide((2, 130, 200)), True, None)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_kernels_at_ties(dtype):
    """Rows of middles between neighbours, as close as the dtype comes to them."""
    rng = np.random.default_rng(0)
    largest = rng.uniform(1, 2, (128, 1))
    largest[::2] = rng.integers(1, 37, (64, 1)) * 7 / 256  # scales of few bits: exact ties
    largest = np.asarray(jnp.asarray(largest, dtype), np.float64)
    x = rng.choice(MIDDLES, (128, 128)) * (largest / 448)
    x[:, :1] = largest
    x = jnp.asarray(x, dtype)
    expected, _ = defined(x, (1, 128))
    assert_same_bits(mosaic.quantize(x, tiles=Tiles(rows=64, steps=1), interpret=interpret_params()), expected)
    inverse = reference.cast(x.astype(jnp.float32) * (1 / expected[1].T), "e4m3")
    assert (np.asarray(inverse, np.float32) != np.asarray(expected[0], np.float32)).any()


def lower(function, *shapes, dtype=jnp.bfloat16):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("shape", ACTIVATIONS)
def test_kernels_of_activations_lower_for_hopper(shape):
    assert "mosaic_gpu" in lower(mosaic.quantize_both, shape).as_text()
    if shape.columns == ACTIVATIONS[0].columns:  # the others are parts of that kernel
        for name in ("quantize", "quantize_transposed"):
            assert "mosaic_gpu" in lower(getattr(mosaic, name), shape).as_text()


@pytest.mark.parametrize("shape", WEIGHTS)
def test_kernel_of_weights_lowers_for_hopper(shape):
    assert "mosaic_gpu" in lower(mosaic.quantize_weight, shape, dtype=jnp.float32).as_text()


@pytest.mark.parametrize("name", KERNELS)
def test_candidates_fit_into_shared_memory(name):
    candidates = mosaic.candidates(name)
    assert mosaic.DEFAULTS[name] in candidates
    largest = max(candidates, key=lambda tiles: (tiles.rows, tiles.stages, tiles.places, -tiles.steps))
    assert "mosaic_gpu" in lower(partial(getattr(mosaic, name), tiles=largest), (128, 1024)).as_text()


def test_unknown_tiles_are_refused():
    for fields in (dict(rows=96), dict(steps=0), dict(stages=0), dict(places=0)):
        with pytest.raises(ValueError, match=f"Tiles.{next(iter(fields))}="):
            Tiles(**fields)
