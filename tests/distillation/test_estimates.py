import itertools

import numpy as np
import pytest

from research.distillation.estimates import cons_at_k, pass_at_1, pass_at_k


def test_pass_at_k_is_the_share_of_all_draws_of_k():
    right = [[True, False, False, True, False], [False] * 5, [True] * 5, [False, False, True, False, False]]
    for k in range(1, 6):
        expected = np.mean([np.mean([any(draw) for draw in itertools.combinations(row, k)]) for row in right])
        assert pass_at_k(right, k) == pytest.approx(expected)
    assert pass_at_k(right, 1) == pytest.approx(pass_at_1(right).value)


def test_pass_at_1_weighs_problems_and_its_interval_holds_what_it_should():
    """Problems of their own difficulty, 4 samples of each: 95% of the intervals hold the true rate, give or take."""
    assert pass_at_1([[True], [False] * 9]).value == 0.5
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(600):
        chance = rng.beta(0.4, 0.9, size=40)
        found = pass_at_1(rng.random((40, 4)) < chance[:, None])
        hits.append(found.low <= 0.4 / 1.3 <= found.high)
    assert 0.93 < np.mean(hits) < 0.975


def test_intervals_at_the_ends():
    """Wilson's of 10 problems, whatever their samples: 10 right ones leave 72% possible."""
    for samples in (1, 16):
        assert pass_at_1([[True] * samples] * 10) == pytest.approx((1, 0.7225, 1), abs=1e-4)
        assert pass_at_1([[False] * samples] * 10) == pytest.approx((0, 0, 0.2775), abs=1e-4)
    narrow, wide = pass_at_1([[True, False] * 8] * 10), pass_at_1([[True] * 16, [False] * 16] * 5)
    assert narrow.high - narrow.low < 0.16 < 0.5 < wide.high - wide.low


def test_majority_votes():
    answers = [["4", "4", "5", None], [None, "7", None, None], ["1", "2", "2", "1"], [None] * 4]
    right = [[True, True, False, False], [False, True, False, False], [True, False, False, True], [False] * 4]
    assert cons_at_k(answers, right, 4) == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert cons_at_k(answers, right, 3) == pytest.approx((1 + 1 + 0 + 0) / 4)


def test_too_few_samples_are_refused():
    for refused in (lambda: pass_at_k([[True], [True, False]], 2), lambda: cons_at_k([["1"]], [[True]], 0)):
        with pytest.raises(ValueError, match="must be from 1 to .* of which the fewest are 1"):
            refused()
    with pytest.raises(ValueError, match="a sample of each"):
        pass_at_1([[True], []])
