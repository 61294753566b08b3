"""The emulated accumulator: against integers, and the errors that V3 §3.3.2 promotes its sums for."""

import subprocess
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.product import accumulator, reference
from kernels.quantize import reference as quantization

ROW, SQUARE, ONE = (1, 128), (128, 128), jnp.ones((1, 1))
E4M3 = jnp.float8_e4m3fn
ROOT = Path(__file__).parents[2]


@partial(jax.jit, static_argnames=("tile_a", "tile_b", "promote"))
def accumulated(a, scales_a, b, scales_b, tile_a, tile_b, promote=None):
    return accumulator.product(a, scales_a, tile_a, b, scales_b, tile_b, promote)


def unscaled(a, b, promote=None):
    """Of values alone."""
    a, b = jnp.asarray(a, E4M3), jnp.asarray(b, E4M3)
    return np.asarray(accumulated(a, ONE, b, ONE, a.shape, b.shape, promote), np.float64)


def exponent(x: Fraction) -> int:
    """Of the largest power of two that is not above |x|."""
    return abs(x.numerator).bit_length() - x.denominator.bit_length()  # denominators are powers of two


def cut(x: Fraction, last: int) -> Fraction:
    """Without what lies below 2^last."""
    unit = Fraction(2) ** last
    return int(x / unit) * unit  # int() cuts towards zero


def slow(a, b):
    """One sum of any length in exact arithmetic, 32 products at a time."""
    total = Fraction(0)
    for start in range(0, len(a), 32):
        terms = [Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a[start:start + 32], b[start:start + 32],
                                                                         strict=True)] + [total]
        largest = max(abs(term) for term in terms)
        if largest:
            total = sum(cut(term, exponent(largest) - 13) for term in terms)
            total = cut(total, exponent(total) - 13) if total else total
    return float(total)


def values(shape, seed, octaves=2.0):
    """E4M3 of many magnitudes."""
    rng = np.random.default_rng(seed)
    return np.array(jnp.clip(rng.normal(size=shape) * np.exp2(rng.normal(size=shape) * octaves), -448, 448)
                    .astype(E4M3).astype(jnp.float32))


@pytest.mark.parametrize("octaves", [0.0, 2.0, 4.0])
def test_sums_are_those_of_exact_arithmetic(octaves):
    a, b = values((5, 160), 0, octaves), values((6, 160), 1, octaves)
    a[0, 32:] = 0
    found = unscaled(a, b)
    np.testing.assert_array_equal(found, [[slow(x, y) for y in b] for x in a])
    assert (found != np.float64(a) @ np.float64(b).T).any()
    parts = [[sum(slow(x[i:i + 64], y[i:i + 64]) for i in range(0, 160, 64)) for y in b] for x in a]
    np.testing.assert_allclose(unscaled(a, b, promote=64), parts, atol=2.0**-22 * np.abs(parts).max())


def test_nothing_is_lost_where_all_bits_fit():
    rng = np.random.default_rng(0)
    a, b = rng.integers(-4, 5, (8, 256)), rng.integers(-4, 5, (9, 256))
    np.testing.assert_array_equal(unscaled(a, b), a @ b.T)
    np.testing.assert_array_equal(unscaled(np.zeros((2, 64)), b[:, :64]), 0)


def test_bits_are_cut_by_hand():
    def sums(*products):
        return unscaled(np.float32([products]), np.ones((1, len(products))))[0, 0]

    assert sums(256, 2.0**-5) == 256 + 2.0**-5  # the fourteenth bit
    assert sums(256, 2.0**-6) == 256
    assert sums(256, 2.0**-5 * 1.75) == 256 + 2.0**-5 and sums(-256, -(2.0**-5) * 1.75) == -256 - 2.0**-5  # not rounded
    assert sums(256, *31 * [2.0**-6]) == 256  # each by itself
    assert sums(*32 * [2.0**-6], 256) == 256.5 and sums(256, *31 * [0], *32 * [2.0**-6]) == 256  # groups of 32
    assert sums(256, 256, 2.0**-5) == 512  # and the sum itself


def quantized(data, shape, tile, seed):
    rng = np.random.default_rng(seed)
    return *quantization.quantize(jnp.asarray(accumulator.DATA[data](rng, shape), jnp.float32), tile), tile


@pytest.mark.parametrize("tile_a, tile_b", [(ROW, SQUARE), (ROW, ROW), ((20, 300), (30, 300))])
@pytest.mark.parametrize("promote", [32, 128])
def test_promoted_sums_are_the_reference_but_for_14_bits(tile_a, tile_b, promote):
    """A cut costs less than 2^-13 of the largest number there: 34 of them, were all as large and none of the rest."""
    a, b = quantized("normal", (20, 300), tile_a, 0), quantized("normal", (30, 300), tile_b, 1)
    y = accumulated(a[0], a[1], b[0], b[1], tile_a, tile_b, promote)
    expected, magnitudes = (reference.product(f(a[0].astype(jnp.float32)), a[1], tile_a, f(b[0].astype(jnp.float32)),
                                              b[1], tile_b) for f in (jnp.asarray, jnp.abs))
    assert (np.abs(y - expected) <= 34 * 2.0**-13 * magnitudes).all()
    error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    assert 2e-5 < error < 3e-4  # float32 alone would be near 1e-7


def test_scales_multiply_sums_that_they_do_not_change_within():
    """A power of two may stand on either side of the cuts, other numbers may not."""
    a, b = values((4, 512), 0), values((5, 512), 1)
    scales = jnp.float32([[1.3]])
    for promote in None, 512, 128:
        y = accumulated(jnp.asarray(a, E4M3), scales, jnp.asarray(b, E4M3), scales, (4, 512), (5, 512), promote)
        np.testing.assert_allclose(y, unscaled(a, b, promote) * np.float64(scales[0, 0])**2, rtol=2.0**-21)


def test_scales_that_change_multiply_the_products():
    a, b = quantized("normal", (4, 256), ROW, 0), quantized("normal", (5, 256), SQUARE, 1)
    found = accumulated(a[0], a[1], b[0], b[1], ROW, SQUARE)
    dequantized = [np.float64(quantization.dequantize(*x)) for x in (a, b)]
    exact = dequantized[0] @ dequantized[1].T
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 2e-3


@pytest.mark.parametrize("promote", [0, -32, 48])
def test_spans_are_whole_groups(promote):
    with pytest.raises(ValueError, match=f"promote={promote}: expected a positive multiple of 32, or None"):
        accumulator.product(jnp.ones((1, 64)), ONE, (1, 64), jnp.ones((1, 64)), ONE, (1, 64), promote)


def test_why_sums_are_promoted():
    """Of the norm, K = 7168. Public emulations of the same accumulator: 5.5e-4, 13%, 1.3e-4, 0.2%."""
    def error(data, promote):
        return accumulator.errors(data, 7168, promote, seed=0, size=16)["norm of error / norm"]

    assert 4e-4 < error("uniform 0..1", 128) < 7e-4
    assert 0.11 < error("uniform 0..1", None) < 0.14
    assert 1e-4 < error("normal", 128) < 2e-4
    assert 1e-3 < error("normal", None) < 4e-3


@pytest.mark.parametrize("word, code", [("--help", 0), ("--widths=3", 2), ("uniform", 2)])
def test_the_command_answers_in_a_line_or_with_its_help(word, code):
    done = subprocess.run([sys.executable, "-m", "kernels.product.accumulator", word], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == code and done.stderr.count("\n") == (1 if code else 0), done.stderr
    assert (accumulator.__doc__ in done.stdout) is (code == 0)
