"""Multi-token modules: what each depth reads, by gradient, and how they are joined. Values: test_transformer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.model.mtp import shift_left
from research.training.losses import mtp_targets, token_losses
from tests import tiny
from tests.model import reference

ROW = (5, 6)  # two documents and one position of padding
DOCUMENT = np.array([0] * 5 + [1] * 6 + [2])


def test_shift_left():
    x_BT = np.array([[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(shift_left(x_BT, 1), [[2, 3, 0], [5, 6, 0]])
    np.testing.assert_array_equal(shift_left(x_BT, 3), np.zeros((2, 3)))
    np.testing.assert_array_equal(shift_left(x_BT, 5), np.zeros((2, 3)))  # a prompt shorter than the depth


@functools.cache
def jacobian_of():
    """A function of the segments: (1 + M, T, T, D), each head's logits at i by the embedding at j.

    Each position has a token of its own, so that the embedding's rows are the positions'.
    """
    model, variables = tiny.model(tiny.settings())
    tokens_BT = np.arange(1, tiny.LENGTH + 1, dtype=np.int32)[None]
    positions_BT = tiny.batch((ROW,))["positions_BT"]
    probe_V = np.random.default_rng(3).normal(size=tiny.VOCABULARY).astype(np.float32)

    @jax.jit
    def pull(segments_BT, one_hot):
        def heads(embedding_VD):
            params = variables["params"] | {"embed_tokens": embedding_VD}
            logits, out = model.apply({**variables, "params": params}, tokens_BT, segments_BT, positions_BT)
            return jnp.stack([x[0] @ probe_V for x in (logits, *out["mtp_logits"])])

        return jax.vjp(heads, variables["params"]["embed_tokens"])[1](one_hot)[0][1:tiny.LENGTH + 1]

    one_hots = np.eye(3 * tiny.LENGTH, dtype=np.float32).reshape(3, tiny.LENGTH, 3, tiny.LENGTH)
    return lambda segments_BT: np.array([[pull(segments_BT, one) for one in head] for head in one_hots])


@functools.cache
def influence(one_document):
    """(1 + M, T, T) whether the logits of each head at position i move with the input at position j."""
    segments_BT = tiny.batch((ROW,))["segments_BT"]
    return np.max(np.abs(jacobian_of()(segments_BT * 0 + 1 if one_document else segments_BT)), axis=-1) > 0


@pytest.mark.parametrize("one_document", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_causality(depth, one_document):
    """Main logits at i read tokens up to i, those of depth k up to i + k; all of them, and of their document alone."""
    reads = influence(one_document)[depth]
    document = np.zeros(tiny.LENGTH) if one_document else DOCUMENT
    for i in range(tiny.LENGTH - depth):
        last = i + depth
        if document[last] != document[i]:
            continue  # no target there: token i + k is of another document
        for j in range(tiny.LENGTH):
            assert reads[i, j] == (j <= last and document[j] == document[i]), (i, j)


def test_where_targets_count_with_two_documents():
    """Documents a b c d e and f g h i j k, one position of padding, depth 2, written out."""
    tokens = np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0]], np.int32)
    segments = np.array([[1] * 5 + [2] * 6 + [0]], np.int32)
    batch = {"tokens_BT": tokens, "targets_BT": np.append(tokens[:, 1:], [[0]], axis=1), "segments_BT": segments,
             "mask_BT": np.array([[1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0]], bool)}
    targets_1, mask_1 = mtp_targets(batch, 1)
    targets_2, mask_2 = mtp_targets(batch, 2)
    np.testing.assert_array_equal(mask_1, np.array([[1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0]], bool))
    np.testing.assert_array_equal(mask_2, np.array([[1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0]], bool))
    assert targets_1[mask_1].tolist() == [3, 4, 5, 8, 9, 10, 11]
    assert targets_2[mask_2].tolist() == [4, 5, 9, 10, 11]
    np.testing.assert_array_equal(mtp_targets(batch, 0)[1], batch["mask_BT"])


def test_losses_of_each_depth_are_summed_over_its_own_targets():
    batch = tiny.batch((ROW, (12,)))
    rng = np.random.default_rng(0)
    logits = [rng.normal(size=(2, 12, tiny.VOCABULARY)).astype(np.float32) for _ in range(3)]
    main, deeper = token_losses((logits[0], np.concatenate(logits[1:], axis=1)), batch)
    expected = np.zeros(3)
    for k in range(3):
        for b, documents in enumerate((ROW, (12,))):
            start = 0
            for size in documents:
                for i in range(start, start + size - 1 - k):  # the last token of a document has no next
                    probability_V = reference.softmax(logits[k][b, i].astype(np.float64))
                    expected[k] -= np.log(probability_V[batch["targets_BT"][b, i + k]])
                start += size
    np.testing.assert_allclose(main, expected[0], rtol=1e-5)
    np.testing.assert_allclose(deeper, expected[1:], rtol=1e-5)


@functools.cache
def variant(hidden):
    s = tiny.settings({"mtp.hidden": hidden})
    model, variables = tiny.model(s)
    return s, variables, jax.jit(model.apply)


def logits_of(hidden, params=None, batch=None):
    s, variables, apply = variant(hidden)
    batch = batch or tiny.batch()
    _, out = apply({**variables, "params": params or variables["params"]}, batch["tokens_BT"], batch["segments_BT"],
                   batch["positions_BT"])
    return out["mtp_logits"]


def numpy_logits_of(hidden, params=None):
    s, variables, _ = variant(hidden)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), {**variables, "params": params or variables["params"]})
    rows = reference.rows(exact["params"], exact["routing"], tiny.batch(), s)
    return [np.stack([row.mtp_logits[k] for row in rows]) for k in range(2)]


@pytest.mark.parametrize("hidden", ["after_norm", "before_norm"])
def test_two_depths_equal_the_numpy_modules(hidden):
    for actual, expected in zip(logits_of(hidden), numpy_logits_of(hidden), strict=True):
        tiny.assert_close(actual, expected, rtol=1e-3, atol=2e-5)


def test_the_hidden_state_after_and_before_the_norm_differ():
    """The gains of the final norm scale channels, which the module's own norm of the hidden state does not undo."""
    assert np.max(np.abs(logits_of("after_norm")[0] - logits_of("before_norm")[0])) > 1e-2


def test_the_embedding_comes_first_and_the_hidden_state_second():
    """Without the first half of eh_proj's rows no depth reads tokens ahead; without the second none reads behind."""
    _, variables, _ = variant("after_norm")
    batch = tiny.batch(((12,),) * 4)
    changed = {**batch, "tokens_BT": batch["tokens_BT"].copy()}
    changed["tokens_BT"][:, 6] = 1 + batch["tokens_BT"][:, 6] % (tiny.VOCABULARY - 1)

    def moves(rows):
        """Whether depth 1 at position 5, whose token ahead is number 6, reads that token."""
        module = variables["params"]["mtp_1"]
        kernel = module["eh_proj"]["kernel"].at[rows].set(0)
        params = variables["params"] | {"mtp_1": module | {"eh_proj": {"kernel": kernel}}}
        one, other = (logits_of("after_norm", params, b)[0][:, 5] for b in (batch, changed))
        return bool(np.max(np.abs(one - other)) > 1e-3)

    assert not moves(slice(0, 16))
    assert moves(slice(16, 32))
