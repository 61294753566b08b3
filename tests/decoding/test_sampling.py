"""The distribution that tokens are drawn from, against its definition token by token, with ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from research.decoding.sampling import Sampling, draw, likeliest, probabilities


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / np.sum(e)


def expected(logits_V, s: Sampling):
    """A filter after another, in float64; what is as likely as the k-th stays, in the nucleus the lower id comes first.
    """
    scaled = np.asarray(logits_V, np.float64) / s.temperature
    kept = set(range(len(scaled)))
    if s.top_k:
        least = sorted(scaled, reverse=True)[min(s.top_k, len(scaled)) - 1]
        kept = {v for v in kept if scaled[v] >= least}
    if s.top_p < 1:
        p = softmax(np.array([scaled[v] if v in kept else -np.inf for v in range(len(scaled))]))
        nucleus, reached = set(), 0.0
        for v in sorted(kept, key=lambda v: (-scaled[v], v)):
            if reached >= s.top_p - 1e-6:
                break
            nucleus.add(v)
            reached += p[v]
        kept = nucleus
    p = softmax(np.array([scaled[v] if v in kept else -np.inf for v in range(len(scaled))]))
    p = np.where(p >= s.min_p * np.max(p), p, 0)
    return p / np.sum(p)


SAMPLINGS = [
    Sampling(1.0), Sampling(0.3), Sampling(2.5), Sampling(1.0, top_k=1), Sampling(0.7, top_k=3),
    Sampling(1.0, top_k=9), Sampling(1.0, top_p=0.55), Sampling(0.7, top_p=0.05), Sampling(1.0, min_p=0.25),
    Sampling(1.0, min_p=1.0), Sampling(1.3, top_k=4, top_p=0.77), Sampling(1.3, top_k=5, top_p=0.83, min_p=0.3),
]
compiled = jax.jit(probabilities, static_argnums=1)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_probabilities_equal_their_definition(sampling):
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(40, 8)).astype(np.float32) * 2
    tied = rng.integers(0, 3, (40, 8)).astype(np.float32)  # nearly every row has ties of the best and at the border
    logits = np.concatenate([normal, tied, np.zeros((1, 8), np.float32)])
    actual = np.asarray(compiled(logits, sampling))
    for logits_V, p_V in zip(logits, actual, strict=True):
        np.testing.assert_allclose(p_V, expected(logits_V, sampling), rtol=1e-4, atol=1e-7, err_msg=str(logits_V))
    np.testing.assert_allclose(actual.sum(axis=-1), 1, rtol=1e-5)


def test_ties_written_out():
    logits = np.log(np.array([[0.1, 0.3, 0.3, 0.3]], np.float32))
    np.testing.assert_allclose(probabilities(logits, Sampling(1.0, top_k=2))[0], [0, 1 / 3, 1 / 3, 1 / 3], rtol=1e-5)
    np.testing.assert_allclose(probabilities(logits, Sampling(1.0, top_p=0.5))[0], [0, 0.5, 0.5, 0], rtol=1e-5)
    np.testing.assert_allclose(probabilities(logits, Sampling(1.0, min_p=0.9))[0], [0, 1 / 3, 1 / 3, 1 / 3], rtol=1e-5)
    assert likeliest(logits)[0] == 1


def test_the_order_of_the_filters_matters_and_is_as_listed():
    """top_p of what top_k left: 0.4 and 0.3 are 0.57 and 0.43 of it, and the first alone reaches 0.55."""
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    np.testing.assert_allclose(probabilities(logits, Sampling(1.0, top_k=2, top_p=0.55))[0], [1, 0, 0, 0])
    np.testing.assert_allclose(probabilities(logits, Sampling(1.0, top_p=0.55))[0], [4 / 7, 3 / 7, 0, 0], rtol=1e-5)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=9), st.sampled_from(SAMPLINGS))
@example([1e4, -1e4, 0.0], SAMPLINGS[-1])
def test_a_distribution_always(logits_V, sampling):
    logits_V = (logits_V * 5)[:9]
    p_V = np.asarray(compiled(np.array(logits_V, np.float32), sampling))
    assert np.isfinite(p_V).all() and (p_V >= 0).all() and abs(p_V.sum() - 1) < 1e-5
    assert p_V[int(np.argmax(logits_V))] > 0  # the likeliest is never filtered out


def test_draws_follow_the_distribution_and_a_rows_own_key():
    p_V = np.array([0.5, 0.0, 0.3, 0.2], np.float32)
    keys = jax.random.split(jax.random.key(0), 20_000)
    tokens = np.asarray(draw(keys, jnp.broadcast_to(p_V, (len(keys), 4))))
    counts = np.bincount(tokens, minlength=4)
    assert counts[1] == 0 and tokens.dtype == np.int32
    np.testing.assert_allclose(counts / len(keys), p_V, atol=4 * 0.5 / np.sqrt(len(keys)))
    np.testing.assert_array_equal(draw(keys[5:8], jnp.broadcast_to(p_V, (3, 4))), tokens[5:8])


@pytest.mark.parametrize(("sampling", "name"), [
    (Sampling(temperature=-0.1), "temperature=-0.1"), (Sampling(temperature=float("nan")), "temperature=nan"),
    (Sampling(temperature=float("inf")), "temperature=inf"), (Sampling(top_k=-1), "top_k=-1"),
    (Sampling(top_p=0.0), "top_p=0.0"), (Sampling(top_p=1.5), "top_p=1.5"), (Sampling(min_p=-1.0), "min_p=-1.0"),
    (Sampling(min_p=float("nan")), "min_p=nan"),
])
def test_a_field_out_of_its_range_is_named(sampling, name):
    assert sampling.problem().startswith(f"{name} must be ")


@pytest.mark.parametrize("sampling", [Sampling(1e-40), Sampling(1e-38), Sampling(1.0, top_p=1e-44)], ids=str)
def test_the_least_of_a_field_leaves_the_likeliest(sampling):
    np.testing.assert_array_equal(probabilities(jnp.array([[10.0, 9.99, -3.0]]), sampling), [[1, 0, 0]])


def test_good_fields_have_no_problem_and_greedy_has_no_distribution():
    assert all(s.problem() is None for s in (*SAMPLINGS, Sampling()))
    with pytest.raises(ValueError, match="temperature=0"):
        probabilities(np.zeros((1, 4), np.float32), Sampling())
