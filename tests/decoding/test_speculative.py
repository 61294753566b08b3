"""Drafts are what the training forward's modules say; verification leaves the model's own distribution."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from research.decoding import speculative
from research.decoding.forward import decoding_model
from research.decoding.generate import GREEDY, decode, prefill, tokens_of
from research.decoding.sampling import Sampling, draw, probabilities
from tests.decoding.models import CHOOSY, CLOSE, PLAIN, agreeing, built, draft_logits, full_forward, gap, prepare_of

NEVER = 1e-6  # a probability below which a chi-square statistic is no chance


def likelihood(counts, p) -> float:
    """Of counts so far from p, or further, by Pearson's chi-square; cells of less than 5 are one."""
    counts, expected = np.ravel(counts), np.ravel(p) * np.sum(counts)
    assert np.all(counts[expected == 0] == 0)
    large = expected >= 5
    observed, wanted = (np.append(x[large], x[~large].sum()) for x in (counts, expected))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    return float(chi2.sf(np.sum((observed - wanted) ** 2 / wanted), len(wanted) - 1))


def verified(sampling, number=20_000, k=2, V=8, verify=speculative.verify):
    """(drafts, accepted, next) of as many keys, with the p of each position and the q that drafts come from."""
    rng = np.random.default_rng(5)
    logits_TV, draft_logits_kV = rng.normal(size=(k + 1, V)) * 1.5, rng.normal(size=(k, V)) * 1.5
    p_TV = np.asarray(probabilities(jnp.asarray(logits_TV, jnp.float32), sampling))
    q_kV = probabilities(jnp.asarray(draft_logits_kV, jnp.float32), sampling)
    keys, position_B = jax.random.split(jax.random.key(2), number), jnp.full(number, 9)

    @jax.jit
    def run(keys):
        drafts_Bk = jnp.stack([
            draw(speculative.keys_at(keys, position_B + n, speculative.DRAFTING), jnp.broadcast_to(q, (number, V)))
            for n, q in enumerate(q_kV)], axis=1)
        logits_BTV = jnp.broadcast_to(jnp.asarray(logits_TV, jnp.float32), (number, k + 1, V))
        q_BkV = jnp.broadcast_to(q_kV, (number, k, V))
        return drafts_Bk, *verify(logits_BTV, drafts_Bk, q_BkV, sampling, keys, position_B)

    return *(np.asarray(x) for x in run(keys)), p_TV, np.asarray(q_kV)


def likelihoods(drafts_Bk, accepted_B, next_B, p_TV):
    """Of the tokens in each place, among the rows that got that far."""
    emitted_BT = np.asarray(speculative.emitted(jnp.asarray(drafts_Bk), jnp.asarray(accepted_B), jnp.asarray(next_B)))
    return [likelihood(np.bincount(emitted_BT[accepted_B >= place, place], minlength=p_TV.shape[1]), p_V)
            for place, p_V in enumerate(p_TV)]


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=4), Sampling(1.2, top_p=0.8, min_p=0.05)],
                         ids=str)
def test_verified_tokens_have_the_models_distribution(sampling):
    """Each token by chi-square, and drafts stand as often as p and q overlap."""
    drafts_Bk, accepted_B, next_B, p_TV, q_kV = verified(sampling)
    assert min(likelihoods(drafts_Bk, accepted_B, next_B, p_TV)) > 1e-3
    overlap_k = np.minimum(p_TV[:-1], q_kV).sum(axis=-1)
    for place, overlap in enumerate(overlap_k):
        reached_B = accepted_B >= place
        share = np.mean(accepted_B[reached_B] > place)
        assert abs(share - overlap) < 4 * 0.5 / np.sqrt(reached_B.sum())


def planted(kind):
    """A verification with a mistake, written as the right one otherwise is."""
    def verify(logits_BTV, drafts_Bk, q_BkV, sampling, key_B, position_B):
        accepted_B, next_B = speculative.verify(logits_BTV, drafts_Bk, q_BkV, sampling, key_B, position_B)
        p_BTV = probabilities(logits_BTV, sampling)
        at = accepted_B[:, None, None]
        p_BV = jnp.take_along_axis(p_BTV, at, axis=1)[:, 0]
        q_BV = jnp.take_along_axis(jnp.pad(q_BkV, ((0, 0), (0, 1), (0, 0))), at, axis=1)[:, 0]
        wrong_BV = {"p itself": p_BV, "|p - q|": jnp.abs(p_BV - q_BV), "nothing wrong": jnp.maximum(p_BV - q_BV, 0)}
        return accepted_B, draw(speculative.keys_at(key_B, position_B, speculative.EMITTING), wrong_BV[kind])

    return verify


@pytest.mark.parametrize(("kind", "noticed"), [("p itself", True), ("|p - q|", True), ("nothing wrong", False)])
def test_the_chi_square_notices_a_wrong_residual(kind, noticed):
    *outcome, _ = verified(Sampling(1.0), verify=planted(kind))
    assert (min(likelihoods(*outcome)) < NEVER) == noticed


def test_equal_distributions_accept_everything():
    logits_BTV = jnp.asarray(np.random.default_rng(0).normal(size=(500, 3, 8)), jnp.float32)
    p_BTV, keys = probabilities(logits_BTV, Sampling(1.0)), jax.random.split(jax.random.key(0), 500)
    drafts_Bk = jnp.stack([draw(keys, p_BTV[:, t]) for t in range(2)], axis=1)
    accepted_B, _ = speculative.verify(logits_BTV, drafts_Bk, p_BTV[:, :2], Sampling(1.0), keys, jnp.zeros(500, int))
    np.testing.assert_array_equal(accepted_B, 2)


def test_greedy_verification_written_out():
    """Best tokens 1, 2, 3; what stands after a draft that fell does not count."""
    logits_TV = np.eye(4, dtype=np.float32)[[1, 2, 3]]
    drafts_Bk = np.array([[1, 2], [1, 0], [0, 2], [0, 0]], np.int32)
    accepted_B, next_B = speculative.verify(jnp.asarray(np.stack([logits_TV] * 4)), drafts_Bk, None, GREEDY, None, None)
    assert accepted_B.tolist() == [2, 1, 0, 0] and next_B.tolist() == [3, 2, 1, 1]
    np.testing.assert_array_equal(speculative.emitted(drafts_Bk, accepted_B, next_B),
                                  [[1, 2, 3], [1, 2, 2], [1, 1, 1], [1, 1, 1]])


CASES = {  # modules, drafts, what the modules hand on, other changes
    "1, 1": (1, 1, "after_norm", {}),
    "1, 3": (1, 3, "before_norm", PLAIN),
    "2, 3": (2, 3, "after_norm", PLAIN),
    "3, 3": (3, 3, "after_norm", PLAIN),
    "3, 2": (3, 2, "before_norm", PLAIN),
}


def changes_of(M, hidden, more):
    return tuple(sorted((CHOOSY | {"mtp.num_nextn_predict_layers": M, "mtp.hidden": hidden} | more).items()))


@pytest.mark.parametrize("name", CASES)
def test_drafts_are_those_of_the_training_forward(name):
    """After the prompt and after each step, whether drafts stood or fell: no row of a module is stale or shifted."""
    M, k, hidden, more = CASES[name]
    _, model, weights_of = built(changes_of(M, hidden, more))
    decoding, lengths, ends = decoding_model(model), [4, 9, 15, 16], np.zeros(0, np.int32)
    static = {"model": decoding, "sampling": GREEDY, "k": k}
    begin = jax.jit(partial(prefill, **static, slots=64, storage="float32", room=32))
    step = jax.jit(partial(decode, **static))
    accepted, close = np.zeros(k + 1, int), 0
    for seed, share in enumerate((0, 0.95)):
        variables = agreeing(weights_of(seed), share)
        weights = prepare_of(model)(variables)
        tokens_BT = np.random.default_rng(seed).integers(0, 5, (4, 16)).astype(np.int32)
        state = begin(weights, tokens_BT, np.array(lengths), jax.random.key(0), ends, 24)
        for _ in range(5):
            counts = [len(row) for row in tokens_of(state)]
            known = [tokens_BT[b, :lengths[b]].tolist() + row for b, row in enumerate(tokens_of(state))]
            drafts_Bk = np.asarray(state["drafts_Bk"])
            expected_kBV = draft_logits(model, variables, known, drafts_Bk.tolist())
            for number, b in np.argwhere(np.argmax(expected_kBV, axis=-1) != drafts_Bk.T):
                assert gap(expected_kBV[number, b]) < CLOSE, (seed, number, known[b], drafts_Bk[b])
                close += 1
            state = step(weights, state, ends, 24, 1)
            for row, count in zip(tokens_of(state), counts, strict=True):
                accepted[len(row) - count - 1] += 1
    assert accepted[0] and accepted[k], accepted  # drafts fell, and all of them stood, before a check
    assert close <= 1


def test_sampled_continuations_have_the_models_joint_distribution():
    """8,192 keys, 64 continuations of three tokens: chi-square against all of them in the full forward."""
    V, k, prompt = 4, 2, [1, 3, 0, 2, 2]
    _, model, weights_of = built(changes_of(1, "after_norm", {"model.vocab_size": V} | PLAIN))
    variables, decoding, sampling = weights_of(1), decoding_model(model), Sampling(1.5, top_p=0.95)
    weights = prepare_of(model)(variables)
    static = {"model": decoding, "sampling": sampling, "k": k}
    ends = np.zeros(0, np.int32)

    @jax.jit
    @jax.vmap
    def continued(key):
        tokens = jnp.pad(jnp.asarray(prompt)[None], ((0, 0), (0, 3)))
        state = prefill(weights, tokens, jnp.full(1, len(prompt)), key, ends, 3, **static, slots=16,
                        storage="float32", room=3)
        state = decode(weights, state, ends, 3, 9, **static)
        return state["tokens"][0, :3], state["accepted_k"]

    tokens, accepted_k = continued(jax.random.split(jax.random.key(3), 8192))
    outcomes = list(product(range(V), repeat=3))
    logits = full_forward(model, variables, [prompt + list(outcome) for outcome in outcomes], 16)[0]
    p_NTV = np.asarray(probabilities(jnp.asarray(logits), sampling))
    joint = [np.prod([p_NTV[n, len(prompt) - 1 + place, token] for place, token in enumerate(outcome)])
             for n, outcome in enumerate(outcomes)]
    counts = np.bincount(np.asarray(tokens) @ [V * V, V, 1], minlength=V**3)
    assert abs(sum(joint) - 1) < 1e-4
    assert likelihood(counts, joint) > 1e-3
    shares = np.sum(accepted_k, axis=0) / 8192
    assert 0.2 < shares[1] < shares[0] < 1.5  # drafts stood and fell
