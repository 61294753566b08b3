"""Rotary embedding against complex multiplication, published numbers and obvious loops."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from research.model import rope
from tests.model.reference import turn_halves, turn_pairs

PLAIN = SimpleNamespace(type="default")
YARN = SimpleNamespace(type="yarn", factor=40.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0,
                       mscale=1.0, mscale_all_dim=1.0)
LLAMA3 = SimpleNamespace(type="llama3", factor=8.0, original_max_position_embeddings=8192, low_freq_factor=1.0,
                         high_freq_factor=4.0)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1], [5, 6, 4095, 7, 100, 0]], np.int32)
WIDTH = 8


def rotated(x_BTNP, positions_BT=POSITIONS, interleaved=True, scaling=PLAIN):
    cos, sin = rope.rotation(positions_BT, x_BTNP.shape[-1], 10000.0, scaling)
    return np.asarray(rope.rotate(x_BTNP, cos, sin, interleaved))


def random(seed=0):
    return np.random.default_rng(seed).normal(size=(2, 6, 3, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_pair_of_channels_is_multiplied_by_a_complex_number(interleaved):
    x = random()
    actual = rotated(x, interleaved=interleaved)
    speed = np.array([10000.0 ** (-2 * i / WIDTH) for i in range(WIDTH // 2)])
    for row in range(2):
        for t in range(6):
            turn = turn_pairs if interleaved else turn_halves
            expected = turn(x[row, t].astype(np.float64), float(POSITIONS[row, t]), speed)
            if interleaved:  # pairs come out in halves
                expected = np.concatenate([expected[:, 0::2], expected[:, 1::2]], axis=-1)
            np.testing.assert_allclose(actual[row, t], expected, atol=2e-3 if POSITIONS[row, t] > 1000 else 2e-5)


def test_the_layouts_differ_by_a_permutation_of_channels():
    x = random()
    in_halves = np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    np.testing.assert_array_equal(rotated(x), rotated(in_halves, interleaved=False))
    assert np.max(np.abs(rotated(x) - rotated(x, interleaved=False))) > 0.1


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("scaling", [PLAIN, YARN, LLAMA3], ids=lambda s: s.type)
def test_products_depend_on_the_distance_alone(scaling, interleaved):
    q, k = random(0), random(1)

    def products(shift):
        a, b = (rotated(x, POSITIONS[:, :1] * 0 + place, interleaved, scaling)
                for x, place in ((q[:, :1], shift + 9), (k[:, :1], shift + 4)))
        return np.sum(a * b, axis=-1)

    np.testing.assert_allclose(products(0), products(37), rtol=1e-4, atol=1e-4)
    assert np.max(np.abs(products(0) - np.sum(q[:, :1] * k[:, :1], axis=-1))) > 0.1


def test_the_dtype_stays_and_the_angles_are_float32():
    x = random().astype("bfloat16")
    actual = rotated(x)
    assert actual.dtype == x.dtype
    np.testing.assert_allclose(actual.astype(np.float32), rotated(x.astype(np.float32)), rtol=1e-2, atol=1e-6)


def test_yarn_slows_dimensions_past_the_tenth_and_fully_from_the_twenty_third():
    """DeepSeek-V3's numbers: width 64, base 10000, 4096 positions, factor 40: low 10, high 23."""
    plain = np.array([10000.0 ** (-2 * i / 64) for i in range(32)])
    ratio = rope.inverse_frequencies(64, 10000.0, YARN) / plain
    np.testing.assert_allclose(ratio[:11], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[23:], 1 / 40, rtol=1e-6)
    for i in range(11, 23):
        ramp = (i - 10) / 13
        np.testing.assert_allclose(ratio[i], (1 - ramp) + ramp / 40, rtol=1e-6)


@pytest.mark.parametrize("multiplier, mscale, squared, scale", [
    (1.0, 1.3688879, 1.8738542, 0.1352338),  # V3
    (0.707, 1.2608038, 1.5896262, 0.1147214),  # V2, V2-Lite
])
def test_yarn_softmax_scale_to_seven_digits(multiplier, mscale, squared, scale):
    yarn = SimpleNamespace(**{**vars(YARN), "mscale": multiplier, "mscale_all_dim": multiplier})
    assert rope.mscale(40.0, multiplier) == pytest.approx(mscale, abs=6e-8)
    assert rope.mscale(40.0, multiplier) ** 2 == pytest.approx(squared, abs=6e-8)
    assert rope.softmax_scale(192, yarn) == pytest.approx(scale, abs=6e-8)
    np.testing.assert_allclose(rope.rotation(np.zeros((1, 1), np.int32), 64, 10000.0, yarn)[0], 1)


def test_without_yarn_the_softmax_scale_is_plain():
    assert rope.mscale(1.0, 1.0) == 1
    for scaling in (PLAIN, LLAMA3):
        assert rope.softmax_scale(192, scaling) == pytest.approx(0.0721688, abs=6e-8)


def test_yarn_multiplies_cos_and_sin_by_the_ratio_of_its_two_mscales():
    yarn = SimpleNamespace(**{**vars(YARN), "mscale": 0.707, "mscale_all_dim": 0.0})
    cos, sin = rope.rotation(np.zeros((1, 1), np.int32), 64, 10000.0, yarn)
    np.testing.assert_allclose(cos, 1.2608038, rtol=1e-6)
    assert rope.softmax_scale(192, yarn) == pytest.approx(0.0721688, abs=6e-8)


def test_llama3_scaling_dimension_by_dimension():
    """Llama 3.1: width 128, base 500000, factor 8: long wavelengths are slowed, short ones kept, between is a blend."""
    actual = rope.inverse_frequencies(128, 500000.0, LLAMA3)
    kinds = set()
    for i in range(64):
        speed = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / speed
        if wavelength < 8192 / 4:
            expected, kind = speed, "kept"
        elif wavelength > 8192 / 1:
            expected, kind = speed / 8, "slowed"
        else:
            blend = (8192 / wavelength - 1) / (4 - 1)
            expected, kind = (1 - blend) * speed / 8 + blend * speed, "blended"
        kinds.add(kind)
        assert actual[i] == pytest.approx(expected, rel=1e-6), i
    assert kinds == {"kept", "slowed", "blended"}
