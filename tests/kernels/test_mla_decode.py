"""Absorbed attention: the definition against expanded attention, every implementation against the definition."""

from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import choice
from kernels.attention import cached_attention
from kernels.comparison import relative_error
from kernels.interpret import interpret_params, races_found
from kernels.mla_decode import mla_decode, mosaic, reference, xla
from kernels.mla_decode.shapes import LATENT, ROTARY, SHAPES, Shape
from kernels.operations import OPERATIONS

SCALE = 0.2


def inputs(B, T, N, S, R=8, P=4, seed=0, dtype=jnp.float32, cache_dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    queries = (jnp.asarray(rng.normal(size=(B, T, N, width)), dtype) for width in (R, P))
    return *queries, *(jnp.asarray(rng.normal(size=(B, S, width)), cache_dtype) for width in (R, P))


def positions(*lengths):
    return jnp.array(lengths, jnp.int32)


run_xla = jax.jit(xla.mla_decode, static_argnames=("scale", "block"))
run_reference = jax.jit(reference.mla_decode, static_argnames="scale")
run_expanded = jax.jit(cached_attention, static_argnums=4)


def assert_near(actual, expected, limit):
    """Of each query's norm, so that no query hides behind another's."""
    actual, expected = np.float64(actual), np.float64(expected)
    error = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() <= limit  # false of a NaN


WIDTH = st.integers(1, 24)


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.sampled_from(["reference", "xla"]), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), WIDTH,
                  WIDTH, WIDTH, WIDTH, st.integers(4, 40), st.data())
def test_absorbed_equals_expanded(how, B, T, N, R, P, H, J, S, data):
    """Over shapes, lengths and blocks: queries projected into the space of latents and values out of it, beside keys
    and values made of every latent, as prefill has them."""
    length = st.integers(0, S - T) | st.just(S - T)  # a full cache often: its last block may begin in the one before
    lengths = np.array(data.draw(st.lists(length, min_size=B, max_size=B)), np.int32)
    rng = np.random.default_rng(S)
    q_BTNH, q_BTNP, latent_BSR, rope_key_BSP, w_RNH, w_RNJ = (
        rng.normal(size=size).astype(np.float32) for size in (
            (B, T, N, H), (B, T, N, P), (B, S, R), (B, S, P), (R, N, H), (R, N, J)))
    run = run_reference if how == "reference" else partial(run_xla, block=data.draw(st.sampled_from([None, 3, 7, S])))
    o_BTNR = run(np.einsum("BTNH,RNH->BTNR", q_BTNH, w_RNH), q_BTNP, latent_BSR, rope_key_BSP, lengths, scale=SCALE)
    k_BSNH = np.einsum("BSR,RNH->BSNH", latent_BSR, w_RNH)
    k_rope_BSNP = np.broadcast_to(rope_key_BSP[:, :, None], (B, S, N, P))
    expected = run_expanded(np.concatenate([q_BTNH, q_BTNP], axis=-1), np.concatenate([k_BSNH, k_rope_BSNP], axis=-1),
                            np.einsum("BSR,RNJ->BSNJ", latent_BSR, w_RNJ), lengths[:, None] + np.arange(T), SCALE)
    np.testing.assert_allclose(np.einsum("BTNR,RNJ->BTNJ", o_BTNR, w_RNJ), expected, rtol=1e-5, atol=1e-5)


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(5, 40), st.integers(1, 45),
                  st.data())
def test_blocks_equal_the_definition(B, T, N, S, block, data):
    """Whether they divide the cache or not, are longer than it, or end between two new tokens."""
    lengths = positions(*data.draw(st.lists(st.integers(0, S - T), min_size=B, max_size=B)))
    operands = inputs(B, T, N, S, seed=S)
    expected = run_reference(*operands, lengths, SCALE)
    assert_near(run_xla(*operands, lengths, SCALE, block=block), expected, 1e-6)


@pytest.mark.parametrize("S", [2 * xla.BLOCK, 2 * xla.BLOCK + 1, 3 * xla.BLOCK])
def test_blocks_of_the_real_size(S):
    operands, lengths = inputs(3, 2, 2, S), positions(0, xla.BLOCK - 1, S - 2)
    assert_near(run_xla(*operands, lengths, SCALE), run_reference(*operands, lengths, SCALE), 1e-6)


@pytest.mark.parametrize("block", [None, 4])
def test_the_first_token_alone_is_its_own_value(block):
    operands = inputs(2, 1, 3, 20)
    o_BTNR = run_xla(*operands, positions(0, 0), SCALE, block=block)
    np.testing.assert_array_equal(o_BTNR, np.broadcast_to(operands[2][:, :1, None], o_BTNR.shape))


@pytest.mark.parametrize("block", [None, 4])
def test_slots_that_nobody_sees_change_no_bit(block):
    """Huge ones do not, and one row's length is nothing to another row."""
    q, q_rope, latent, rope_key = inputs(2, 2, 3, 20)
    lengths = positions(5, 17)
    o = run_xla(q, q_rope, latent, rope_key, lengths, SCALE, block=block)
    latent, rope_key = latent.at[0, 7:].set(1e30), rope_key.at[0, 7:].set(-1e30)
    np.testing.assert_array_equal(run_xla(q, q_rope, latent, rope_key, lengths, SCALE, block=block), o)
    assert not np.array_equal(run_xla(q, q_rope, latent.at[0, 6].add(1), rope_key, lengths, SCALE, block=block)[0, 1],
                              o[0, 1])


def test_what_is_past_the_longest_sequence_is_not_read():
    """NaNs of a block that is read would show."""
    q, q_rope, latent, rope_key = inputs(2, 1, 3, 40)
    latent = latent.at[:, 24:].set(jnp.nan)
    assert np.isfinite(run_xla(q, q_rope, latent, rope_key, positions(5, 23), SCALE, block=8)).all()
    assert not np.isfinite(run_xla(q, q_rope, latent, rope_key, positions(5, 24), SCALE, block=8)).all()


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("best", [0, 9, 20])
def test_a_huge_score_takes_all(best, block):
    """exp of a score of thousands is infinite in float32, and so is that of the difference from a first block's."""
    q, q_rope, latent, rope_key = inputs(1, 1, 2, 21)
    latent = latent.at[0, best].set(3e3 * jnp.sign(q[0, 0, 0]))
    q = q.at[0, 0, 1].set(q[0, 0, 0])
    o = run_xla(q, q_rope, latent, rope_key, positions(20), SCALE, block=block)
    np.testing.assert_array_equal(o, np.broadcast_to(latent[:, best, None, None], o.shape))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_16_bit_cache(dtype):
    """Rounding queries and probabilities to 8 bits, 2^-9 each at most, moves a mean of normal latents by about that."""
    operands, lengths = inputs(2, 2, 4, 90, R=32, P=8, dtype=dtype, cache_dtype=jnp.bfloat16), positions(3, 88)
    for block in (None, 16):
        o = run_xla(*operands, lengths, SCALE, block=block)
        assert o.dtype == dtype
        assert_near(o, run_reference(*operands, lengths, SCALE), 1.5e-2)


def test_a_float32_result_of_the_definition_is_exact_of_a_16_bit_cache():
    operands, lengths = inputs(2, 1, 4, 30, cache_dtype=jnp.bfloat16), positions(3, 29)
    wide = (x.astype(jnp.float32) for x in operands)
    np.testing.assert_array_equal(run_reference(*operands, lengths, SCALE), run_reference(*wide, lengths, SCALE))


def test_the_default_on_a_cpu_is_plain_xla():
    operands, lengths = inputs(2, 1, 3, 20), positions(4, 19)
    np.testing.assert_array_equal(jax.jit(mla_decode)(*operands, lengths, SCALE),
                                  jax.jit(xla.mla_decode)(*operands, lengths, SCALE))
    np.testing.assert_array_equal(mla_decode(*operands, lengths, SCALE, implementation="reference"),
                                  reference.mla_decode(*operands, lengths, SCALE))


def test_what_the_kernel_does_not_take(monkeypatch):
    def of(slots=64, R=LATENT, P=ROTARY, dtype=jnp.bfloat16, cache_dtype=jnp.bfloat16):
        return *inputs(1, 1, 2, slots, R, P, dtype=dtype, cache_dtype=cache_dtype), positions(3), SCALE

    with pytest.raises(ValueError, match="mla_decode: implementation='mosaic' cannot run: .*not a GPU"):
        mla_decode(*of(), implementation="mosaic")
    monkeypatch.setattr(choice, "gpu_refusal", lambda: None)
    for text, operands in {
        "its queries are bfloat16, not float32": of(dtype=jnp.float32),
        "its latents are bfloat16, not float32": of(cache_dtype=jnp.float32),
        "512 numbers and its rotary keys 64, not 96 and 16": of(R=96, P=16),
        "a multiple of 64 slots, not 100": of(slots=100),
    }.items():
        with pytest.raises(ValueError, match=text):
            mla_decode(*operands, implementation="mosaic")
        assert mla_decode(*operands).shape == operands[0].shape  # plain XLA takes it
    monkeypatch.setattr(mosaic, "mla_decode", lambda *arguments: arguments)
    operands = of()
    assert mla_decode(*operands) == operands


def interpreted(operands, lengths, splits):
    o = mosaic.mla_decode(*operands, lengths, SCALE / 4, tiles=mosaic.Tiles(splits),
                          interpret=interpret_params(detect_races=True))
    assert not races_found(o)
    return o


@pytest.mark.parametrize("shape, lengths, splits", [
    (Shape(1, 1, 4, 384), (383,), 1),  # more steps than twice the stages
    (Shape(2, 2, 40, 256), (63, 0), 2),  # the second split's block is one token's alone, and none of the second row
    (Shape(1, 4, 4, 320), (260,), 4),  # splits of two blocks, the last of none
], ids=["one split", "two tiles of rows", "an empty split"])
def test_kernel(shape, lengths, splits):
    """bfloat16 rounds the probabilities and the result: 1.7e-3 of a norm each, and no query's error is thrice that."""
    operands = inputs(*shape, R=LATENT, P=ROTARY, dtype=jnp.bfloat16, cache_dtype=jnp.bfloat16)
    expected = reference.mla_decode(*(x.astype(jnp.float32) for x in operands), positions(*lengths), SCALE / 4)
    actual = interpreted(operands, positions(*lengths), splits)
    assert actual.dtype == jnp.bfloat16
    assert_near(actual, expected, 5e-3)
    assert relative_error(actual.astype(jnp.float32), expected) <= 3e-3


def test_combining_splits_is_attention_over_all_of_them():
    rng = np.random.default_rng(0)
    score_KQS, value_KSR = rng.normal(size=(3, 5, 7)) * 4, rng.normal(size=(3, 7, 6))
    e_KQS = np.exp2(score_KQS)
    o_KQR = np.einsum("KQS,KSR->KQR", e_KQS, value_KSR) / e_KQS.sum(-1)[..., None]
    lse_KQ = np.log2(e_KQS.sum(-1))
    o_KQR[1, 2], lse_KQ[1, 2], e_KQS[1, 2] = 0, mosaic.FLOOR, 0  # a split in which a row sees nothing
    expected = np.einsum("KQS,KSR->QR", e_KQS, value_KSR) / e_KQS.sum((0, 2))[:, None]
    actual = mosaic.combine(jnp.float32(o_KQR)[None, None], jnp.float32(lse_KQ)[None, None])[0, 0]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_lowers_for_hopper(shape):
    operation = OPERATIONS["mla_decode"]
    arguments = jax.eval_shape(partial(operation.arguments, shape), jax.random.key(0))
    kernel = jax.jit(operation.mosaic(shape, operation.chosen(shape)))
    assert "mosaic_gpu" in kernel.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def test_splits_fill_the_multiprocessors_once():
    for shape in SHAPES:
        splits = mosaic.default(shape).splits
        assert splits == 1 or (mosaic.tasks(shape) * splits <= 132 and shape.slots >= 128 * splits)
        assert mosaic.tasks(shape) * (splits + 1) > 132 or shape.slots < 128 * (splits + 1)
        assert len(mosaic.candidates(shape)) >= 2
    with pytest.raises(ValueError, match="Tiles.splits=0: expected at least 1"):
        mosaic.Tiles(0)
