"""Few rows times a matrix: in C++, where there is a compiler, against float64; any width and number of rows."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import choice, few_rows


def operands(rows: int, inputs: int, outputs: int, dtype: str, seed: int = 0):
    rng = np.random.default_rng(seed)
    x_XD = rng.normal(size=(rows, inputs)) * 10 ** rng.uniform(-2, 2, (rows, inputs))
    return (np.asarray(z, np.float32).astype(jnp.dtype(dtype)) for z in (x_XD, rng.normal(size=(inputs, outputs))))


@given(rows=st.integers(0, few_rows.ROWS + 1), inputs=st.integers(1, 300), outputs=st.integers(1, 400),
       dtype=st.sampled_from(few_rows.DTYPES), seed=st.integers(0, 99))
@example(rows=1, inputs=300, outputs=400, dtype="float32", seed=0)  # other threads
@example(rows=8, inputs=300, outputs=399, dtype="bfloat16", seed=0)
@settings(max_examples=20, deadline=None)
def test_the_product_is_the_definitions(rows, inputs, outputs, dtype, seed):
    x_XD, w_DF = operands(rows, inputs, outputs, dtype, seed)
    y_XF = few_rows.product(jnp.asarray(x_XD, jnp.float32), w_DF)
    assert y_XF.dtype == jnp.float32 and y_XF.shape == (rows, outputs)
    x_XD, w_DF = x_XD.astype(np.float64), w_DF.astype(np.float64)
    assert np.all(np.abs(y_XF - x_XD @ w_DF) <= 3e-6 * (np.abs(x_XD) @ np.abs(w_DF)))


@pytest.mark.parametrize("dtype", few_rows.DTYPES)
def test_a_row_is_the_same_beside_others_and_in_many_threads(dtype):
    """To the bit, where C++ computes it: all wait for the pieces that others have begun."""
    x_XD, w_DF = operands(5, 320, 1000, dtype)
    product = jax.jit(few_rows.product)
    y_XF = np.asarray(product(x_XD, w_DF))
    if few_rows.cpp.refusal(few_rows.SOURCE) is None:
        for row, y_F in zip(x_XD, y_XF, strict=True):
            np.testing.assert_array_equal(product(row[None], w_DF)[0], y_F)
    with ThreadPoolExecutor(8) as pool:
        for other in pool.map(lambda _: np.asarray(product(x_XD, w_DF)), range(32)):
            np.testing.assert_array_equal(other, y_XF)


def test_what_is_no_number_stays_none():
    x_XD, w_DF = operands(2, 40, 50, "float32")
    x_XD[1, 3] = np.nan
    w_DF[:, 7] = np.inf
    y_XF = np.asarray(few_rows.product(x_XD, w_DF))
    assert np.all(np.isnan(y_XF[1])) and not np.isfinite(y_XF[0, 7]) and np.all(np.isfinite(np.delete(y_XF[0], 7)))


def test_many_at_once_are_one_product():
    """Under `vmap` no call is made for each: XLA has a product for all."""
    x_XD, w_DF = operands(6, 40, 50, "float32")
    run = jax.vmap(few_rows.product, (0, None))
    y_XF = run(x_XD.reshape(3, 2, 40), w_DF).reshape(6, 50)
    np.testing.assert_allclose(y_XF, few_rows.product(x_XD, w_DF), rtol=1e-4, atol=1e-4)
    assert "dot_general" in str(jax.make_jaxpr(run)(x_XD.reshape(3, 2, 40), w_DF))


def test_without_a_compiler_it_is_xlas_product_and_said_once(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(choice, "_said", set())
    monkeypatch.setattr(choice.logging, "warning", lambda form, *values: lines.append(form % values))
    x_XD, w_DF = operands(2, 40, 50, "float32")
    few_rows.cpp._register.cache_clear()
    try:
        for _ in range(2):
            np.testing.assert_array_equal(few_rows.product(x_XD, w_DF), jnp.asarray(x_XD) @ w_DF)
    finally:
        few_rows.cpp._register.cache_clear()
    assert lines == ["few_rows: plain XLA instead of C++: none of c++, g++, clang++ is on PATH"]
