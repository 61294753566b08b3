"""Blocked attention against its definition, and the definition against a loop over queries."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import attention, cached_attention, cudnn, xla
from kernels.choice import Unavailable, meant_for_h200
from tests.model.reference import attend
from tests.tiny import assert_close

SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 0], [1, 1, 2, 3, 3, 3, 3, 3, 3, 3, 0, 0, 0]], np.int32)
CASES = {  # name: T, query heads, key heads, key width, value width, segments
    "one document": (13, 2, 2, 6, 6, None),
    "documents": (13, 2, 2, 6, 6, SEGMENTS),
    "grouped queries": (13, 6, 2, 6, 6, SEGMENTS),
    "narrow values": (13, 2, 2, 6, 4, SEGMENTS),
    "grouped queries, narrow values": (16, 4, 1, 6, 2, None),
    "one position": (1, 2, 1, 6, 4, SEGMENTS[:, :1]),
    "fewer positions than blocks": (3, 2, 1, 6, 4, SEGMENTS[:, 4:7]),
}


def inputs_of(name, seed=0):
    T, N, G, H, J, segments_BT = CASES[name]
    rng = np.random.default_rng(seed)
    shapes = (2, T, N, H), (2, T, G, H), (2, T, G, J), (2, T, N, J)
    q, k, v, do = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return (q, k, v), do, segments_BT


@partial(jax.jit, static_argnames=("scale", "how"))
def value_and_gradients(inputs, do_BTNJ, segments_BT, scale=0.4, how="xla"):
    def value(q, k, v):
        if how == "recompute":
            return xla.attention(q, k, v, segments_BT, scale, recompute=True)
        return attention(q, k, v, segments_BT, scale, implementation=how)

    o_BTNJ, backward = jax.vjp(value, *inputs)
    return o_BTNJ, dict(zip("qkv", backward(do_BTNJ.astype(o_BTNJ.dtype)), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_blocks_equal_the_definition_in_value_and_gradient(name):
    inputs, do_BTNJ, segments_BT = inputs_of(name)
    expected = value_and_gradients(inputs, do_BTNJ, segments_BT, how="reference")
    assert_close(value_and_gradients(inputs, do_BTNJ, segments_BT), expected)


@pytest.mark.parametrize("name", ["documents", "grouped queries, narrow values"])
def test_recomputed_scores_change_nothing(name):
    inputs, do_BTNJ, segments_BT = inputs_of(name)
    expected = value_and_gradients(inputs, do_BTNJ, segments_BT, how="reference")
    assert_close(value_and_gradients(inputs, do_BTNJ, segments_BT, how="recompute"), expected)


@pytest.mark.parametrize("name", ["grouped queries", "one document"])
def test_the_definition_equals_a_loop_over_queries(name):
    inputs, do_BTNJ, segments_BT = inputs_of(name)
    value = value_and_gradients(inputs, do_BTNJ, segments_BT, how="reference")[0]
    for row in range(2):
        q, k, v = (x[row].astype(np.float64) for x in inputs)
        segments_T = None if segments_BT is None else segments_BT[row]
        assert_close(value[row], attend(q, k, v, segments_T, 0.4))


def test_the_default_is_the_blocked_one():
    inputs, do_BTNJ, segments_BT = inputs_of("documents")
    assert_close(value_and_gradients(inputs, do_BTNJ, segments_BT, how="auto"),
                 value_and_gradients(inputs, do_BTNJ, segments_BT, how="reference"))


def test_cudnn_is_refused_by_name_where_it_cannot_run():
    (q, k, v), _, _ = inputs_of("one document")
    with pytest.raises(Unavailable, match="^attention: implementation='cudnn' cannot run: the default device is a cpu"):
        attention(q, k, v, None, 0.4, implementation="cudnn")
    with meant_for_h200():
        assert cudnn.refusal(jnp.zeros((1, 2, 2, 192), jnp.bfloat16)) is None
        assert "float32" in cudnn.refusal(q) and "width 6" in cudnn.refusal(q.astype(jnp.bfloat16))


@pytest.mark.parametrize("how", ["xla", "recompute"])
def test_scores_of_thousands_do_not_overflow(how):
    """Attention turns to its best key: exp of a score of 1000 is infinite in float32."""
    inputs, do_BTNJ, segments_BT = inputs_of("documents")
    value, gradients = value_and_gradients(inputs, do_BTNJ, segments_BT, scale=500.0, how=how)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, gradients)))
    for row in range(2):
        q, k, v = (x[row].astype(np.float64) for x in inputs)
        assert_close(value[row], attend(q, k, v, segments_BT[row], 500.0), rtol=1e-2, atol=1e-2)


def test_bfloat16_is_close_and_keeps_the_dtype():
    inputs, do_BTNJ, segments_BT = inputs_of("grouped queries")
    exact = value_and_gradients(inputs, do_BTNJ, segments_BT, how="reference")
    half = [jnp.asarray(x, jnp.bfloat16) for x in inputs]
    value, gradients = value_and_gradients(half, do_BTNJ, segments_BT)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves((value, gradients)))
    assert_close((value, gradients), exact, rtol=0.02, atol=0.02)


def test_a_later_key_or_another_document_is_never_seen():
    """Not merely weighted little: replacing them by huge values leaves the output bit for bit."""
    inputs, do_BTNJ, segments_BT = inputs_of("documents")
    value = value_and_gradients(inputs, do_BTNJ, segments_BT)[0]
    q, k, v = (x.copy() for x in inputs)
    k[:, 7:], v[:, 7:] = 1e4, 1e4  # what is past position 6
    k[0, :5], v[0, :5] = -1e4, 1e4  # the first document of the first row
    changed = value_and_gradients((q, k, v), do_BTNJ, segments_BT)[0]
    np.testing.assert_array_equal(changed[0, 5:7], value[0, 5:7])
    np.testing.assert_array_equal(changed[1, :7], value[1, :7])


@pytest.mark.parametrize(("N", "G", "J"), [(2, 2, 6), (6, 2, 6), (4, 1, 3)])
@pytest.mark.parametrize("T", [1, 3, 8])
def test_new_tokens_over_a_cache_equal_the_definition(T, N, G, J):
    """The last T of a text of each row's own length; slots beyond hold what would be seen at once."""
    rng, S, last = np.random.default_rng(T), 16, (8, 11, 16)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in ((3, S, N, 6), (3, S, G, 6), (3, S, G, J)))
    full = attention(q, k, v, None, 0.4, implementation="reference")
    positions_BT = np.stack([np.arange(end - T, end) for end in last]).astype(np.int32)
    new = np.take_along_axis(q, positions_BT[..., None, None], axis=1)
    for b, end in enumerate(last):
        k[b, end:], v[b, end:] = 1e4, -1e4
    actual = jax.jit(cached_attention, static_argnums=4)(new, k, v, positions_BT, 0.4)
    assert_close(actual, np.take_along_axis(np.asarray(full), positions_BT[..., None, None], axis=1))
    half = cached_attention(jnp.asarray(new, jnp.bfloat16), k, v, jnp.asarray(positions_BT), 0.4)
    assert half.dtype == jnp.bfloat16
    assert_close(half, actual, rtol=0.02, atol=0.02)
