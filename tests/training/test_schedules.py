"""Schedules at their corners, by hand."""

import numpy as np
import pytest

from research.training import schedules
from tests import tiny

V3 = {"optimizer.learning_rate": 2.2e-4, "optimizer.warmup_fraction": 0.01, "optimizer.plateau_until": 0.6,
      "optimizer.cosine_until": 0.9, "optimizer.cosine_final": 0.1, "optimizer.tail_from": 0.95,
      "optimizer.tail_final": 7.3 / 220}


def rate(step, steps, changes=None):
    s = tiny.settings({"training.steps": steps} | V3 | (changes or {}))
    return float(schedules.learning_rate(step, s.optimizer, steps))


@pytest.mark.parametrize("step, expected", [
    (1, 2.2e-5), (5, 1.1e-4), (10, 2.2e-4),  # warm-up of 10 steps
    (11, 2.2e-4), (600, 2.2e-4),  # plateau
    (675, 2.2e-4 * (0.1 + 0.9 * (2 + 2 ** 0.5) / 4)),  # a quarter of the cosine
    (750, 2.2e-4 * 0.55), (900, 2.2e-5),  # its middle and its end
    (901, 2.2e-5), (950, 2.2e-5), (951, 7.3e-6), (1000, 7.3e-6),  # constant, tail
])
def test_learning_rate_of_a_thousand_steps(step, expected):
    assert rate(step, 1000) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("steps, expected", [
    (1, [7.3e-6]),  # its one step is in the tail
    (2, [2.2e-4, 7.3e-6]),  # step 1 is before 0.6 * 2
    (3, [2.2e-4, 2.2e-4 * (0.1 + 0.45 * (1 + np.cos(np.pi * (2 - 1.8) / 0.9))), 7.3e-6]),
])
def test_learning_rate_of_few_steps(steps, expected):
    assert [rate(step, steps) for step in range(1, steps + 1)] == pytest.approx(expected, rel=1e-5)


def test_learning_rate_of_twenty_steps_has_every_part():
    """Warm-up 4, plateau up to 12, cosine up to 18, constant up to 19, tail."""
    cosine = [0.1 + 0.45 * (1 + np.cos(np.pi * n / 6)) for n in range(1, 7)]
    expected = [0.25, 0.5, 0.75] + [1] * 9 + cosine + [0.1] + [7.3 / 220]
    actual = [rate(step, 20, {"optimizer.warmup_fraction": 0.2}) for step in range(1, 21)]
    assert actual == pytest.approx([2.2e-4 * factor for factor in expected], rel=1e-5)


def test_a_cosine_of_no_length_is_a_drop():
    changes = {"optimizer.plateau_until": 0.9, "optimizer.cosine_until": 0.9}
    assert rate(900, 1000, changes) == pytest.approx(2.2e-4, rel=1e-5)
    assert rate(901, 1000, changes) == pytest.approx(2.2e-5, rel=1e-5)


def test_the_bias_stops_and_the_multi_token_weight_drops_after_their_fractions():
    """Of V3's 14.8T tokens the bias moves for 14.3T and lambda is 0.3 for 10T."""
    s = tiny.settings()
    speed = [float(schedules.bias_update_speed(step, s.model, 1480)) for step in (1, 1430, 1431, 1480)]
    assert speed == pytest.approx([0.01, 0.01, 0, 0])
    weight = [float(schedules.mtp_loss_weight(step, s.mtp, 1480)) for step in (1, 1000, 1001, 1480)]
    assert weight == pytest.approx([0.3, 0.3, 0.1, 0.1])
    assert float(schedules.bias_update_speed(1, s.model, 1)) == 0  # one step is past any fraction below one
    assert float(schedules.mtp_loss_weight(1, s.mtp, 1)) == pytest.approx(0.1)
