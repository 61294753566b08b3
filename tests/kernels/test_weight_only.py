"""Weight-only quantisation: the error of the formats, the products' equality with the definition, ragged shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.weight_only import dequantize, product, quantize, reference, rows, xla

FORMATS = ((8, None), (8, 16), (4, None), (4, 16))  # bits, group


def matrix(inputs: int, outputs: int, seed: int = 0):
    """Rows of very different magnitudes, a column of zeros, one huge weight."""
    rng = np.random.default_rng(seed)
    w_DF = rng.normal(size=(inputs, outputs)) * 10 ** rng.uniform(-3, 3, (inputs, 1))
    w_DF[:, 0] = 0
    w_DF[0, -1] = 1e6
    return jnp.asarray(w_DF, jnp.float32)


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_an_error_is_half_a_step_of_its_group_at_the_most(bits, group):
    w_DF = matrix(50, 7)
    w = quantize(w_DF, bits, group)
    steps_GF = np.repeat(np.asarray(w.scales_GF), w.group, axis=0)[:50]
    error_DF = np.abs(np.asarray(dequantize(w)) - np.asarray(w_DF))
    assert np.all(error_DF <= steps_GF * 0.5001)
    for start in range(0, 50, w.group):  # the scale is the largest magnitude's, of its own group alone
        largest_F = np.max(np.abs(np.asarray(w_DF)[start:start + w.group]), axis=0)[1:]
        np.testing.assert_allclose(steps_GF[start, 1:], largest_F / reference.LARGEST[bits], rtol=1e-6)
    assert not np.any(np.asarray(dequantize(w))[:, 0])


@pytest.mark.parametrize("bits", [8, 4])
def test_values_on_the_grid_come_back(bits):
    """And twice quantised is once quantised, each nibble in its place."""
    largest = reference.LARGEST[bits]
    w_DF = np.random.default_rng(1).integers(-largest, largest + 1, (64, 5)).astype(np.float32)
    w_DF[0] = largest
    w = quantize(w_DF, bits)
    np.testing.assert_array_equal(dequantize(w), w_DF)
    assert w.values_GFY.dtype == jnp.int8 and w.nbytes == 64 * 5 * bits // 8 + 4 * 5
    assert w.shape == (64, 5)


@given(rows_=st.integers(1, 3), inputs=st.integers(1, 70), outputs=st.integers(2, 9), chosen=st.sampled_from(FORMATS),
       seed=st.integers(0, 99))
@settings(max_examples=3, deadline=None)
def test_product_is_the_definitions(rows_, inputs, outputs, chosen, seed):
    bits, group = chosen
    w = quantize(matrix(inputs, outputs, seed), bits, group or (inputs + inputs % 2))
    x_XD = jnp.asarray(np.random.default_rng(seed).normal(size=(rows_, inputs)), jnp.float32)
    assert_product(x_XD, w, product(x_XD, w))


def assert_product(x_XD, w, y_XF):
    """Against float64, to what float32 sums of 16 times as large parts may err."""
    w_DF = np.asarray(dequantize(w), np.float64)
    exact = np.asarray(x_XD, np.float64) @ w_DF
    sizes = np.abs(np.asarray(x_XD, np.float64)) @ np.abs(w_DF)
    largest_F = np.max(np.abs(w_DF), axis=0, keepdims=True) * np.abs(np.asarray(x_XD)).sum(1, keepdims=True)
    assert np.all(np.abs(np.asarray(y_XF) - exact) <= 2e-6 * (sizes + largest_F))
    assert y_XF.dtype == jnp.float32 and y_XF.shape == exact.shape


@pytest.mark.parametrize("bits", [8, 4])
def test_many_rows_share_blocks_whose_last_overlaps(bits):
    w = quantize(matrix(70, 11), bits, 16)
    x_XD = jnp.asarray(np.random.default_rng(2).normal(size=(xla.FEW + 1, 70)), jnp.float32)
    y_XF = product(x_XD, w)
    assert_product(x_XD, w, y_XF)
    assert_product(x_XD, w, product(x_XD, w, "reference"))
    x_XGC = jnp.pad(x_XD, ((0, 0), (0, 10))).reshape(-1, 5, 16)
    assert_product(x_XD, w, xla._blocks(x_XGC, w, 4))


def test_rows_are_outputs():
    w = quantize(matrix(22, 9), 4, 16, "bfloat16")
    at = jnp.array([[3, 8], [0, 3]])
    expected = np.asarray(dequantize(w)).T[np.asarray(at)]
    assert rows(w, at).dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows(w, at), expected.astype(jnp.bfloat16))


@pytest.mark.parametrize(("bits", "group"), ((8, None), (4, 64)))
def test_a_loop_of_one_row_makes_no_copy_of_the_matrix(bits, group):
    """The reason for the formulation: XLA:CPU keeps no temporary of the matrix's size, within a loop or before it."""
    w = jax.eval_shape(lambda: quantize(jnp.zeros((512, 512)), bits, group))

    def loop(x_XD, w):
        return jax.lax.while_loop(lambda x_XD: x_XD[0, 0] < 1, lambda x_XD: product(x_XD, w), x_XD)

    compiled = jax.jit(loop).lower(jax.ShapeDtypeStruct((1, 512), jnp.float32), w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 512 // 4


def test_refused():
    with pytest.raises(ValueError, match="group=15 must be even"):
        quantize(jnp.ones((30, 4)), 4, 15)
